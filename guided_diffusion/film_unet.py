"""
A small U-Net without attention whose blocks a vector modulates (FiLM, Perez et al. 2017, arXiv 1709.07871).

The context, time embedding plus condition embedding, scales and shifts the features of every residual block. It is the
network of a course assignment on text-conditioned pictures (Stanford CS231n, after lucidrains' denoising-diffusion),
whose widths, counts of parameters and numbers it keeps.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .conditions import Vector, check
from .nn import HalfBody, linear, timestep_embedding


class RMSNorm(nn.Module):
    """Features [N,C,H,W] brought to L2 norm sqrt(C) over the channels, times a learned gain; float32 inside."""

    def __init__(self, channels):
        super().__init__()
        self.scale = channels**0.5
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return (F.normalize(wide, dim=1) * self.g * self.scale).type(x.dtype)


class Block(nn.Module):
    """Convolution, norm, modulation by (scale, shift) [N,C,1,1] if given, GELU: [N,dim,H,W] -> [N,dim_out,H,W]."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = RMSNorm(dim_out)

    def forward(self, x, modulation=None):
        x = self.norm(self.proj(x))
        if modulation is not None:
            scale, shift = modulation
            x = x * (scale + 1) + shift
        return F.gelu(x)


class ResnetBlock(nn.Module):
    """Two Blocks, dropout between them, around a shortcut; the context [N,context_dim] modulates the first."""

    def __init__(self, dim, dim_out, context_dim, dropout=0.1):
        super().__init__()
        self.mlp = nn.Sequential(nn.GELU(), linear(context_dim, 2 * dim_out))
        self.block1, self.block2 = Block(dim, dim_out), Block(dim_out, dim_out)
        self.dropout = nn.Dropout(dropout)
        self.res_conv = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1)

    def forward(self, x, context):
        modulation = self.mlp(context).type(x.dtype)[:, :, None, None].chunk(2, dim=1)    # two [N,dim_out,1,1]
        h = self.block2(self.dropout(self.block1(x, modulation)))
        return h + self.res_conv(x)


def sinusoidal(time, dim):
    """
    sin, then cos, of time * 10000^(-k / (half - 1)), k = 0..half-1: [N] -> [N,dim], half = dim // 2.

    Where half is 1 the only frequency is 1, and an odd dim has a last column of zeros; as first written, the first
    case divided by zero and the second lost a column.
    """
    half = dim // 2
    waves = timestep_embedding(time, dim, 10000 ** (half / max(half - 1, 1)))     # cosines first
    return torch.cat([waves[:, half : 2 * half], waves[:, :half], waves[:, 2 * half :]], dim=1)


class Unet(HalfBody, nn.Module):
    """
    (x [N,channels,H,W], time [N]) and a vector [N,condition_dim] -> like x, with learn_sigma [N,2*channels,H,W].

    dim: base width; stage i has width dims[i] of [dim, dim*m...] for m in dim_mults, and halves the side.
    condition_dim: width of the vector; 0: the network takes none. No vector is the same as zeros, the null.
    uncond_prob: how often training shall drop the vector; only recorded, for whoever trains: it is the training step
    that drops (`guidance.dropped`), and the network does the same in training and evaluation but for dropout.
    dropout: probability of dropping a feature between the two halves of a block.
    """

    def __init__(self, dim, condition_dim, dim_mults=(1, 2, 4, 8), channels=3, uncond_prob=0.2, *, dropout=0.1,
                 learn_sigma=False):
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim (--num_channels) is the base width, 2 or more, not {dim}")
        self.dim, self.channels, self.condition_dim, self.uncond_prob = dim, channels, condition_dim, uncond_prob
        self.context_dim = 4 * dim
        self.dims = [dim, *(int(dim * mult) for mult in dim_mults)]
        self.init_conv = nn.Conv2d(channels, dim, 3, padding=1)
        self.time_mlp = nn.Sequential(
            linear(dim, self.context_dim), nn.GELU(), linear(self.context_dim, self.context_dim)
        )
        if condition_dim:
            self.condition_mlp = Vector(condition_dim, self.context_dim, null="zero", act=nn.GELU)

        def block(width, width_out):
            return ResnetBlock(width, width_out, self.context_dim, dropout)

        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for width, below in zip(self.dims, self.dims[1:]):
            down = nn.Conv2d(width, below, 2, stride=2)
            self.downs.append(nn.ModuleList([block(width, width), block(width, width), down]))
            up = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(below, width, 3, padding=1))
            self.ups.insert(0, nn.ModuleList([up, block(2 * width, width), block(2 * width, width)]))
        self.mid = nn.ModuleList([block(self.dims[-1], self.dims[-1]) for _ in range(2)])
        self.final_conv = nn.Conv2d(dim, channels * (2 if learn_sigma else 1), 1)

    def forward(self, x, time, model_kwargs=None, *, vector=None):
        """
        The output at time [N], fractional allowed.

        :param model_kwargs: the assignment's way of passing the vector, {"text_emb": [N,condition_dim] or None}, and
            of asking for guidance, see `cfg_forward`; never changed.
        :param vector: [N,condition_dim], or None for none.
        :raises ValueError: for a vector of another shape or kind, or where the network takes none, and for images of
            other channels or a size that the stages do not divide.
        """
        kwargs = dict(model_kwargs or {})
        if kwargs.get("cfg_scale") is not None:
            return self.cfg_forward(x, time, kwargs)
        vector = kwargs.get("text_emb") if vector is None else vector
        self.check_input(x)
        context = self._context(time.expand(len(x)), vector)                      # [N,context_dim]
        h, skips = self.init_conv(x.type(self.init_conv.weight.dtype)), []
        for first, second, down in self.downs:
            skips.append(first(h, context))
            skips.append(second(skips[-1], context))
            h = down(skips[-1])
        for block in self.mid:
            h = block(h, context)
        for up, *blocks in self.ups:
            h = up(h)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), context)
        return self.final_conv(h.type(self.final_conv.weight.dtype)).type(x.dtype)

    def _half_modules(self):
        return [self.init_conv, self.downs, self.mid, self.ups]

    def _context(self, time, vector):
        context = self.time_mlp(sinusoidal(time, self.dim))
        if not self.condition_dim:
            if vector is not None:
                raise ValueError("this network takes no vector (condition_dim 0): leave it out, or build it with one")
            return context
        vector = context.new_zeros(len(time), self.condition_dim) if vector is None else vector
        return context + self.condition_mlp(vector, len(time))

    def check_input(self, x):
        """Raises ValueError unless x is [N,channels,H,W] with sides that all stages can halve."""
        check("x", x, (None, self.channels, None, None))
        self.check_size(*x.shape[2:])

    def check_size(self, height, width):
        """Raises ValueError unless all stages can halve both sides."""
        factor = 2 ** len(self.downs)
        if height % factor or width % factor or not height * width:
            raise ValueError(
                f"images of {height}x{width} cannot be halved {len(self.downs)} times, once for each of dim_mults"
                f" (--channel_mult): give sides divisible by {factor}, or fewer factors"
            )

    def cfg_forward(self, x, time, model_kwargs, batched=True):
        """
        Classifier-free guidance (1 + w) f(c) - w f(none) with w = model_kwargs["cfg_scale"] >= 0 (Ho & Salimans 2022,
        arXiv 2207.12598, eq. 6), as `guidance.classifier_free` of scale 1 + w; a learned variance stays that of f(c).

        :param model_kwargs: {"text_emb": [N,condition_dim], "cfg_scale": w}; without the second, w is 0. Not changed.
        :param batched: one pass of twice the batch instead of two passes.
        :raises ValueError: for a negative w, or without a vector.
        """
        w, vector = model_kwargs.get("cfg_scale") or 0.0, model_kwargs.get("text_emb")
        if w < 0 or vector is None:
            raise ValueError(f"guidance needs text_emb, [N,{self.condition_dim}], and cfg_scale 0 or more, not {w}")
        if batched:
            both = self(torch.cat([x, x]), time.expand(len(x)).repeat(2),
                        vector=torch.cat([vector, torch.zeros_like(vector)]))
            given, free = both.chunk(2)
        else:
            given, free = self(x, time, vector=vector), self(x, time)
        mixed = given[:, : self.channels] + w * (given - free)[:, : self.channels]
        return torch.cat([mixed, given[:, self.channels :]], dim=1)
