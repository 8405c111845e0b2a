"""
A network too large for one device, shared by the processes of a run: each holds a part of every weight, and with it of
the gradient, the averages and the optimizer's moments, and sees a block's weights whole only while it computes with
them (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054, stage 3; torch's fully_shard).

The loop works on the parts, which are plain tensors; files hold whole tensors, so they are those of any other run.
"""

import torch as th
import torch.distributed as dist

from . import dist_util


def shard(net):
    """
    Turn a network of equal weights in all processes, in place, into one whose weights are shared among them: block by
    block of its lists of modules and its middle block, then the rest. Collective, as every forward pass then is.

    :raises ValueError: if the weights are not all of one dtype.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dtypes = {p.dtype for p in net.parameters()}
    if len(dtypes) > 1:
        raise ValueError(f"the weights to shard must be of one dtype, and these are {', '.join(map(str, dtypes))}")
    mesh = init_device_mesh(dist_util.dev().type, (dist_util.world_size(),))
    for module in [*blocks(net), net]:
        fully_shard(module, mesh=mesh)


def blocks(net):
    """The modules of a network that are shared one by one: the entries of its lists, and its middle block."""
    found = []
    for name, child in net.named_children():
        if isinstance(child, th.nn.ModuleList):
            found += child
        elif name == "middle_block":
            found.append(child)
    return [block for block in found if any(True for _ in block.parameters())]


def is_sharded(net):
    """Whether `shard` has been here."""
    return any(hasattr(p, "to_local") for p in net.parameters())


@th.no_grad()
def local(tensor):
    """The part of a shared tensor that lies in this process, in the same memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@th.no_grad()
def whole(part, like):
    """
    The whole tensor, on the host of rank 0 (None elsewhere), of which `part` is shared as the parameter `like` is.
    Where `like` is not shared, `part` itself. Collective.
    """
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    spread = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    full = spread.full_tensor()
    return full.cpu() if dist_util.is_main() else None


@th.no_grad()
def part_of(tensor, like):
    """
    The part of a whole tensor that this process holds, if the parameter `like` is shared; else the tensor.

    :raises ValueError: if their shapes differ.
    """
    if not hasattr(like, "to_local"):
        return tensor
    if tensor.shape != like.shape:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where {tuple(like.shape)} is needed")
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device, like.dtype)
    return local(distribute_tensor(tensor, like.device_mesh, like.placements)).clone()


def moments(convert, state, params):
    """
    An optimizer's state dict, each moment of each of its parameters converted by `whole` or `part_of`.

    :param params: of the network, in the optimizer's order.
    :raises ValueError: if it is the state of another number of parameters.
    """
    if state["state"] and len(state["state"]) != len(params):
        raise ValueError(f"it is of {len(state['state'])} parameters, and the network has {len(params)}")
    # A count of steps has no axes: nothing of it can be shared.
    converted = {
        i: {name: convert(value, params[i]) if value.ndim else value for name, value in held.items()}
        for i, held in state["state"].items()
    }
    return {**state, "state": converted}


def total_norm(norm):
    """The L2 norm over all processes of parts whose norm here is `norm`, a tensor of no axes. Collective."""
    square = norm.double().square()
    dist.all_reduce(square)
    return square.sqrt().to(norm.dtype)
