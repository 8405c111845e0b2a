"""
The hardware's limit: the rate of a large matrix product and of a copy, and what a piece of work needs of both.

The operations of a network are counted on its written-out attention and without what is computed twice, so that they
are the same for every way of computing it.
"""

import time

import timing
import torch as th
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "unbind", "alias",
         "detach", "squeeze", "unsqueeze", "as_strided", "split_with_sizes", "reshape", "chunk", "empty", "empty_like",
         "_reshape_alias", "lift_fresh"}  # fmt: skip


def rates(device="cpu", dtype=th.float32, seconds=1.0):
    """
    The best seen of a large matrix product, of a 3x3 convolution of 256 channels, and of a copy (read plus write):
    {"flops_per_s", "convolution_flops_per_s", "bytes_per_s"}.
    """
    cuda = th.device(device).type == "cuda"
    size, images, mebibytes = (8192, 64, 1024) if cuda else (1024, 1, 256)
    a, b = (th.randn(size, size, device=device).to(dtype) for _ in range(2))
    image = th.randn(images, 256, 64, 64, device=device).to(dtype)
    conv = th.nn.Conv2d(256, 256, 3, padding=1).to(device, dtype).requires_grad_(False)
    if cuda:
        image, conv = (each.to(memory_format=th.channels_last) for each in (image, conv))
    source = th.ones(mebibytes * 2**18, device=device)
    target, out = th.empty_like(source), th.empty_like(a)
    return {
        "flops_per_s": 2 * size**3 / _best(lambda: th.mm(a, b, out=out), device, seconds),
        "convolution_flops_per_s": 2 * 9 * 256 * image.numel() / _best(lambda: conv(image), device, seconds),
        "bytes_per_s": 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds),
    }


def _best(work, device, seconds):
    number, best, begun = ("wall", "cpu").index(timing.clock_of(device)), float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds or best == float("inf"):
        best = min(best, timing.once(work, device)[number])
    return best


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each on its own: `bytes`. A fused operation counts as one."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(x.numel() * x.element_size() for x in leaves if isinstance(x, th.Tensor))
        return result


def flops_of(work):
    """Floating-point operations of `work()`, of matrix products and convolutions, forward and backward."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def bytes_of(work):
    """Bytes that the operations of `work()` read and write."""
    with Traffic() as traffic:
        work()
    return traffic.bytes


def fractions(flops, moved, seconds, limit):
    """
    Which share of the measured rates some work reaches. The copy is of what no cache holds, and convolutions have
    kernels of their own: shares above 1 are possible.
    """
    per = {"matrix": flops / limit["flops_per_s"], "convolution": flops / limit["convolution_flops_per_s"],
           "copy": moved / limit["bytes_per_s"]}  # fmt: skip
    return {f"share_of_{name}_rate": needed / seconds for name, needed in per.items() if needed}
