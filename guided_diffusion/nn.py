"""Small parts that every network shares: embeddings, norms, initialisation, recomputation, averaging of weights."""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

GROUPS = 32  # of every group norm: a feature width must be a multiple of it

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}

SiLU = nn.SiLU


class UsageError(ValueError, AssertionError):
    """Wrong arguments, where the original code asserted: callers may catch either of its two bases."""


def is_channels_last(x):
    """Whether a tensor [N,C,H,W] has the channels of a position side by side, and is not contiguous as well."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def laid_out(tensor, like):
    """A tensor of the shape of another, laid out in memory as that one is."""
    return tensor.contiguous(memory_format=torch.channels_last) if is_channels_last(like) else tensor


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in float32 whatever the input's dtype; the result has the input's dtype."""

    def forward(self, x, scale=None, shift=None):
        """
        x: [N,C,...]. With scale and shift, [N,C] float32, the norm is adaptive: GN(x) (1 + scale) + shift.

        The two join the norm's own weight and bias, with the samples side by side as so many more channels: one pass
        over x instead of three, and nothing in between to keep for the backward pass.
        """
        by_moments = x.device.type != "cpu" and is_channels_last(x)  # the kernel of a GPU would turn the layout
        if scale is None:
            h = self._by_moments(x, self.weight, self.bias) if by_moments else super().forward(x.float())
            return h.type(x.dtype)
        gain, offset = self.weight * (1 + scale), self.bias * (1 + scale) + shift       # [N,C], [N,C]
        if by_moments:
            return self._by_moments(x, gain, offset).type(x.dtype)
        if not x.is_contiguous():  # channels last: side by side they would have to be copied
            h = nn.functional.group_norm(x.float(), self.num_groups, eps=self.eps)
            gain, offset = (t[(...,) + (None,) * (x.dim() - 2)] for t in (gain, offset))
            return (h * gain + offset).type(x.dtype)
        flat = x.float().view(1, -1, *x.shape[2:])                                      # [1,N*C,...]
        h = nn.functional.group_norm(flat, len(x) * self.num_groups, gain.flatten(), offset.flatten(), self.eps)
        return h.view(x.shape).type(x.dtype)

    def _by_moments(self, x, gain, offset):
        """The norm of x [N,C,H,W] times gain [C] or [N,C] plus offset likewise, float32, laid out as x is."""
        x = x.float()
        grouped = (self.num_groups, -1)
        var, mean = torch.var_mean(x.unflatten(1, grouped), dim=(2, 3, 4), correction=0)  # [N,groups], [N,groups]
        gain = gain.unflatten(-1, grouped) * (var + self.eps).rsqrt()[..., None]          # [N,groups,C/groups]
        offset = offset.unflatten(-1, grouped) - gain * mean[..., None]
        gain, offset = (t.flatten(1)[..., None, None] for t in (gain, offset))            # [N,C,1,1]
        return torch.addcmul(offset, x, gain)


def _for_dims(table, dims):
    if dims not in table:
        raise ValueError(f"unsupported dimensions: {dims} (choose 1, 2 or 3)")
    return table[dims]


def conv_nd(dims, *args, **kwargs):
    """A convolution over `dims` (1, 2 or 3) spatial axes."""
    return _for_dims(_CONVS, dims)(*args, **kwargs)


def avg_pool_nd(dims, *args, **kwargs):
    """An average pool over `dims` (1, 2 or 3) spatial axes."""
    return _for_dims(_AVG_POOLS, dims)(*args, **kwargs)


def linear(*args, **kwargs):
    """A linear layer."""
    return nn.Linear(*args, **kwargs)


def normalization(channels):
    """Group norm with 32 groups over [N,channels,...]. Raises ValueError if 32 does not divide `channels`."""
    if channels < GROUPS or channels % GROUPS:
        low = channels // GROUPS * GROUPS
        near = f"{low} or {low + GROUPS}" if low else f"{GROUPS}"
        raise ValueError(f"width {channels} is not a multiple of {GROUPS}, the number of norm groups: use {near}")
    return GroupNorm32(GROUPS, channels)


@torch.no_grad()
def update_ema(target_params, source_params, rate=0.99, where=None):
    """
    In place, for each pair of tensors: target <- rate * target + (1 - rate) * source.

    where: a boolean tensor of no axes on their device; where it is false nothing moves, and nobody waits for it.
    """
    targets = list(target_params)
    sources = [source.to(target) for target, source in zip(targets, source_params, strict=True)]
    if not targets:
        return
    # Written target + (1 - rate) * (source - target), so that a target which has arrived at its source stays there.
    if where is None:
        torch._foreach_lerp_(targets, sources, 1 - rate)
        return
    if where.device.type == "cpu":  # one pass in place of three; the kernels of a GPU take no such weights
        shares = {dtype: where.to(dtype) * (1 - rate) for dtype in {target.dtype for target in targets}}
        torch._foreach_lerp_(targets, sources, [shares[target.dtype] for target in targets])
        return
    gaps = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(gaps, where.to(gaps[0].dtype) * (1 - rate))
    torch._foreach_add_(targets, gaps)


@torch.no_grad()
def zero_module(module):
    """Set every parameter to zero, in place; returns the module."""
    for param in module.parameters():
        param.zero_()  # not times 0, which keeps a NaN
    return module


@torch.no_grad()
def scale_module(module, scale):
    """Multiply every parameter by `scale`, in place; returns the module."""
    for param in module.parameters():
        param.mul_(scale)
    return module


def mean_flat(tensor):
    """Mean over all axes but the first: [N,...] -> [N]."""
    return tensor.mean(dim=list(range(1, tensor.dim())))


def timestep_embedding(timesteps, dim, max_period=10000):
    """
    Sinusoidal embedding (Vaswani et al. 2017, section 3.5, cosines before sines).

    timesteps: [N], integer or fractional. Returns float32 [N,dim]: cos then sin of timesteps * max_period^(-i/half)
    for i in 0..half-1 with half = dim // 2, and one column of zeros if dim is odd.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    args = timesteps[:, None].float() * torch.exp(-math.log(max_period) * index / half)  # [N,half]
    embedding = torch.cat([torch.cos(args), torch.sin(args)], dim=-1)                    # [N,2*half]
    return nn.functional.pad(embedding, (0, dim % 2))                                    # [N,dim]


def checkpoint(func, inputs, params, flag):
    """
    func(*inputs); with `flag`, activations inside func are not kept but computed again in the backward pass.

    Dropout masks and autocast are the same the second time, parameters may be frozen, gradients may be differentiated
    again. `params` is unused (autograd finds them): it stays for callers of the original function.
    """
    if flag:
        return recompute(func, *inputs, use_reentrant=False)
    return func(*inputs)


class CheckpointFunction:
    """`checkpoint` as code written for the original may call it: apply(func, len(inputs), *inputs, *params)."""

    @staticmethod
    def apply(func, length, *args):
        return checkpoint(func, args[:length], args[length:], True)


def convert_convolution(module, dtype):
    """Convert the parameters of a convolution; leave any other module alone."""
    if isinstance(module, tuple(_CONVS.values())):
        module.to(dtype)


def convert_module_to_f16(module):
    """Convert the parameters of a convolution to float16; leave any other module alone. For `Module.apply`."""
    convert_convolution(module, torch.float16)


def convert_module_to_f32(module):
    """Undo `convert_module_to_f16`."""
    convert_convolution(module, torch.float32)


class HalfBody:
    """A network with a body, the modules of `_half_modules()`, that can compute in half precision."""

    def convert_to(self, dtype):
        """
        Turn the convolutions of the body to a dtype, and with them its arithmetic; linear layers, norms, embeddings,
        softmaxes and the end stay float32.
        """
        for module in self._half_modules():
            module.apply(lambda each: convert_convolution(each, dtype))

    def convert_to_fp16(self):
        """`convert_to(torch.float16)`."""
        self.convert_to(torch.float16)

    def convert_to_fp32(self):
        """Undo it."""
        self.convert_to(torch.float32)
