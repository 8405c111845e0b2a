"""
The U-Net of ADM (Dhariwal & Nichol 2021, section 3), its super-resolution form, and its encoder as a classifier.

Shapes: x is [N,C,H,W] (dims=2), [N,C,L] (dims=1) or [N,C,D,H,W] (dims=3, D is never resampled); timesteps and labels
are [N]. State-dict keys, their order and shapes are those of the published checkpoints.
"""

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .conditions import Label, Tokens, Vector
from .nn import (
    GROUPS,
    HalfBody,
    UsageError,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)

# Up to this many tokens, and up to four times the width of a head, the written-out softmax is as fast on a CPU as the
# fused kernel: forward and forward+backward in ms, 8 x 4 heads x 64 channels, one core: 16 tokens .11/.36 against
# .21/.53, 64: .80/2.4 against 1.2/3.1, 256: 8.2/27 against 8.8/27, 1024: 233/858 against 114/376. In narrow heads the
# softmax is most of the work, and the fused kernel ahead earlier: an attention block of 8 x 4 heads x 16 channels takes
# at 64 tokens .42/1.6 against .47/1.5, at 144 3.5/8.9 against 1.8/5.0, at 196 7.9/15 against 2.7/7.9. Only the
# written-out one can be differentiated twice.
SHORT_LENGTH = 256
RESCALE = 0.5**0.5  # of a sum of two parts of equal variance, which then has that variance


class AttentionPool2d(nn.Module):
    """
    Attention of the mean token over a square feature map (CLIP, Radford et al. 2021): [N,C,S,S] -> [N,output_dim].

    spacial_dim: S. output_dim: embed_dim if None. Raises ValueError for a feature map of another size.
    """

    def __init__(self, spacial_dim, embed_dim, num_heads_channels, output_dim=None):
        super().__init__()
        self.spacial_dim = spacial_dim
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.attention = QKVAttention(count_heads(embed_dim, 1, num_heads_channels))

    def forward(self, x):
        if x.shape[2:] != (self.spacial_dim, self.spacial_dim):
            raise ValueError(
                f"the attention pool was built for {self.spacial_dim}x{self.spacial_dim} features, got"
                f" {_by(x.shape[2:])}: give images of the classifier's image_size, or build it with another pool"
            )
        x = x.flatten(2)                                           # [N,C,S*S]
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)   # [N,C,1+S*S]
        x = x + self.positional_embedding.type(x.dtype)
        return self.c_proj(self.attention(self.qkv_proj(x)))[:, :, 0]


class Activated(NamedTuple):
    """An embedding [N,emb_channels] after its SiLU, which a network takes once for all of its blocks."""

    value: torch.Tensor


class TimestepBlock(nn.Module):
    """
    A module whose forward also takes the embedding of the timestep (and class): [N,emb_channels], or inside a network
    what all blocks need of it, `Activated`.
    """

    @abstractmethod
    def forward(self, x, emb):
        """Apply the module to x, given the embedding."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the embedding, or `tokens` (those of AttentionBlock), to its children that take them."""

    def forward(self, x, emb, *tokens):
        for layer in self:
            if isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            else:
                x = layer(x, *tokens) if isinstance(layer, AttentionBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour x2 (dims=3: of the last two axes), then a 3x3 convolution if use_conv."""

    def __init__(self, channels, use_conv, dims=2, out_channels=None):
        super().__init__()
        self.axes = range(-1, -1 - min(dims, 2), -1)
        self.factor = (1, 2, 2) if dims == 3 else 2
        self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x):
        if x.device.type != "cpu" or not x.is_contiguous():
            return self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))
        for axis in self.axes:  # plain copies, without the index arithmetic of the kernel for any factor
            x = x.repeat_interleave(2, axis)
        return self.conv(x)


class Downsample(nn.Module):
    """Half the resolution (dims=3: of the last two axes) by a strided 3x3 convolution; by averages if not use_conv."""

    def __init__(self, channels, use_conv, dims=2, out_channels=None):
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels or channels, 3, stride=stride, padding=1)
        elif out_channels in (None, channels):
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)
        else:
            raise UsageError(f"an average cannot turn {channels} channels into {out_channels}: set use_conv")

    def forward(self, x):
        return self.op(x)


class ResBlock(TimestepBlock):
    """
    Two 3x3 convolutions around a skip connection, the embedding added between them or, with use_scale_shift_norm, as
    adaptive group norm (AdaGN in section 3.1 of the paper): GN(h) (1 + scale) + shift.

    emb_channels: width of the embedding. use_conv: 3x3 instead of 1x1 convolution on a skip that changes its width.
    use_checkpoint: recompute in the backward pass. up, down: resample between the first norm and convolution, and on
    the skip, without weights (BigGAN). rescale: the sum is divided by sqrt 2 (Song et al. 2021, arXiv 2011.13456,
    section 4.1), an ablation of the paper. Starts as its skip connection: the last convolution is zero.
    """

    def __init__(self, channels, emb_channels, dropout, out_channels=None, use_conv=False,
                 use_scale_shift_norm=False, dims=2, use_checkpoint=False, up=False, down=False, rescale=False):
        super().__init__()
        width = out_channels or channels
        self.rescale = rescale
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, width, 3, padding=1)
        )
        if up:
            self.resample = Upsample(channels, False, dims)
        elif down:
            self.resample = Downsample(channels, False, dims)
        else:
            self.resample = nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(emb_channels, width * (2 if use_scale_shift_norm else 1)))
        self.out_layers = nn.Sequential(
            normalization(width),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, width, width, 3, padding=1)),
        )
        if width == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, width, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, width, 1)

    def forward(self, x, emb):
        return checkpoint(self._forward, (x, emb), (), self.use_checkpoint)

    def _forward(self, x, emb):
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        act, project = self.emb_layers
        emb = project(emb.value if isinstance(emb, Activated) else act(emb))    # [N,width or 2*width]
        norm, *rest = self.out_layers
        if self.use_scale_shift_norm:
            h = norm(h, *emb.chunk(2, dim=1))
        else:
            h = norm(h + emb.type(h.dtype)[(...,) + (None,) * (h.dim() - 2)])
        for layer in rest:
            h = layer(h)
        total = self.skip_connection(self.resample(x)) + h
        return total * RESCALE if self.rescale else total


class AttentionBlock(nn.Module):
    """
    Self-attention over all positions, added to the input: [N,C,...] -> the same. Starts as the identity.

    With encoder_channels, positions also attend to tokens [N,L,encoder_channels], those where mask [N,L] is true
    (GLIDE, Nichol et al. 2021, arXiv 2112.10741, section 4).

    num_head_channels: channels of a head, from which the number of heads follows; -1 takes num_heads.
    use_new_attention_order: the layout of the qkv weights (QKVAttention, else QKVAttentionLegacy).
    rescale: the sum is divided by sqrt 2, as in ResBlock. Raises UsageError if the channels do not split evenly.
    """

    def __init__(self, channels, num_heads=1, num_head_channels=-1, use_checkpoint=False,
                 use_new_attention_order=False, encoder_channels=None, rescale=False):
        super().__init__()
        self.channels = channels
        self.rescale = rescale
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(self.num_heads)
        if encoder_channels is not None:
            self.encoder_kv = conv_nd(1, encoder_channels, 2 * channels, 1)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x, tokens=None, mask=None):
        return checkpoint(self._forward, (x, tokens, mask), (), self.use_checkpoint)

    def _forward(self, x, tokens, mask):
        qkv = self.qkv(self.norm(x.flatten(2)))                # [N,3*C,L]
        more = ()
        if tokens is not None and tokens.shape[1]:
            more = self.encoder_kv(tokens.transpose(1, 2).type(qkv.dtype)), mask
        total = x + self.proj_out(self.attention(qkv, *more)).view_as(x)
        return total * RESCALE if self.rescale else total


def count_heads(channels, num_heads, num_head_channels):
    """Number of attention heads for a width; raises UsageError, naming the numbers, if it does not split evenly."""
    by_count = num_head_channels == -1
    name, number = ("num_heads", num_heads) if by_count else ("num_head_channels", num_head_channels)
    if number < 1:
        raise UsageError(f"{name} must be 1 or more, not {number}")
    if channels % number:
        raise UsageError(f"q,k,v channels {channels} is not divisible by {name} {number}")
    return number if by_count else channels // number


def attend(q, k, v, valid=None):
    """
    softmax(q^T k / sqrt(c)) v for each head: q [N,heads,c,L], k and v [N,heads,c,K] of any strides -> [N,heads,c,L].

    valid: [N,K] or, if not the same for every query, [N,L,K]: true for the keys that count, at least one a query; None:
    all.

    The softmax is float32 for half inputs as well (inside the fused kernel too). The gradient of the fused kernel
    cannot be differentiated again: to do that with long sequences or on a GPU, run the forward pass inside
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """
    if valid is not None:
        valid = valid[:, None] if valid.dim() == 3 else valid[:, None, None]   # [N,1,L or 1,K]
    if q.device.type == "cpu" and k.shape[-1] <= min(SHORT_LENGTH, 4 * q.shape[-2]):
        scale = q.shape[-2] ** -0.25  # on q and k each: less overflow in half precision than after the product
        logits = (q * scale).transpose(-1, -2) @ (k * scale)   # [N,heads,L,K]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if valid is None else logits.masked_fill(~valid, -math.inf)
        weights = torch.softmax(logits, dim=-1).type(v.dtype)
        return v @ weights.transpose(-1, -2)
    # On strided tensors scaled_dot_product_attention falls to a kernel slower than the formula above.
    q, k, v = (t.transpose(-1, -2).contiguous() for t in (q, k, v))        # [N,heads,L or K,c]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid).transpose(-1, -2)


def count_flops_attn(model, _x, y):
    """
    Operation counter for the `thop` package: adds 2 N L^2 C, the two matrix products of an attention with output y
    [N,C,L], to model.total_ops. Use: profile(model, custom_ops={QKVAttention: QKVAttention.count_flops}).
    """
    batch, channels, *spatial = (y if isinstance(y, torch.Tensor) else y[0]).shape
    model.total_ops += torch.tensor([2.0 * batch * math.prod(spatial) ** 2 * channels], dtype=torch.float64)


class QKVAttention(nn.Module):
    """
    Attention [N,3*C,L] -> [N,C,L] whose input rows are all of q, then k, then v, each split into heads.

    encoder_kv: [N,2*C,K], further keys and values in the same layout, of which those count where mask [N,K] is true.
    """

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def split(self, rows, parts=3):
        """[N,parts*C,L] -> q, k, v, or k and v, each [N,heads,c,L]."""
        return rows.unflatten(1, (parts, self.n_heads, -1)).unbind(1)

    def forward(self, qkv, encoder_kv=None, mask=None):
        if qkv.shape[1] % (3 * self.n_heads):
            raise UsageError(f"{qkv.shape[1]} rows of q, k, v do not split into {self.n_heads} heads")
        q, k, v = self.split(qkv)
        if encoder_kv is None:
            return attend(q, k, v).flatten(1, 2)
        k, v = (torch.cat(pair, dim=-1) for pair in zip(self.split(encoder_kv, 2), (k, v)))    # [N,heads,c,K+L]
        valid = torch.cat([mask, mask.new_ones(len(mask), qkv.shape[-1])], dim=1)              # [N,K+L]
        return attend(q, k, v, valid).flatten(1, 2)

    @staticmethod
    def count_flops(model, _x, y):
        """See count_flops_attn."""
        return count_flops_attn(model, _x, y)


class QKVAttentionLegacy(QKVAttention):
    """The same attention with the input rows split into heads first, and each head into its q, k and v."""

    def split(self, rows, parts=3):
        """[N,parts*C,L] -> q, k, v, or k and v, each [N,heads,c,L]."""
        return rows.unflatten(1, (self.n_heads, parts, -1)).unbind(2)


class UNetTrunk(HalfBody, nn.Module):
    """
    What UNetModel and EncoderUNetModel share: the embeddings, the downward path and the middle.

    `options` are the arguments of the subclass by name (its `locals()`): each becomes an attribute.
    """

    num_classes = vector_channels = token_channels = None
    checkpoint_levels = 0
    residual_rescale = False

    def __init__(self, options):
        super().__init__()
        vars(self).update((k, v) for k, v in options.items() if k not in ("self", "__class__"))
        if self.num_heads_upsample == -1:
            self.num_heads_upsample = self.num_heads
        self._check_widths()
        if not 0 <= self.checkpoint_levels <= len(self.channel_mult):
            raise ValueError(
                f"--checkpoint_levels must be from 0 to {len(self.channel_mult)}, the number of levels of channel_mult,"
                f" not {self.checkpoint_levels}"
            )
        self.emb_channels = 4 * self.model_channels
        self.time_embed = nn.Sequential(
            linear(self.model_channels, self.emb_channels),
            nn.SiLU(),
            linear(self.emb_channels, self.emb_channels),
        )
        if self.num_classes is not None:
            self.label_emb = Label(self.num_classes, self.emb_channels, null=False)
        if self.vector_channels is not None:
            self.vector_emb = Vector(self.vector_channels, self.emb_channels)
        if self.token_channels is not None:  # zeros are no keys: the image's own positions remain
            self.token_emb = Tokens(self.token_channels, self.emb_channels, null="zero")
        self.input_blocks, self.widths = self._build_input_blocks()
        width, last = self.widths[-1], len(self.channel_mult) - 1
        self.middle_block = TimestepEmbedSequential(
            self._res_block(last, width),
            self._attention_block(last, width, self.num_heads),
            self._res_block(last, width),
        )

    @property
    def dtype(self):
        """The dtype that the convolutions compute in; read from their weights, so that it cannot disagree."""
        return self.input_blocks[0][0].weight.dtype

    @property
    def downsampling(self):
        """How many times smaller than the image the smallest feature map is, per side."""
        return 2 ** (len(self.channel_mult) - 1)

    def _width(self, level):
        return int(self.channel_mult[level] * self.model_channels)

    def _check_widths(self):
        def works(model_channels):
            widths = [int(mult * model_channels) for mult in self.channel_mult]
            return all(width and width % GROUPS == 0 for width in widths)

        wanted = self.model_channels
        if works(wanted):
            return
        usable = [n for n in range(1, wanted + 1024) if works(n)]
        near = [n for n in usable if n < wanted][-1:] + [n for n in usable if n > wanted][:1]
        raise ValueError(
            f"model_channels {wanted} (--num_channels, --classifier_width) with channel_mult {tuple(self.channel_mult)}"
            f" makes feature widths {[self._width(level) for level in range(len(self.channel_mult))]}; each must be a"
            f" multiple of {GROUPS}: use {' or '.join(map(str, near)) or 'other multipliers'}"
        )

    def _check_size(self, what, sizes):
        factor = self.downsampling
        if any(size % factor or not size for size in sizes):
            low = [size // factor * factor for size in sizes]
            high = [-(-size // factor) * factor for size in sizes]
            near = " or ".join(_by(usable) for usable in (low, high) if all(usable))
            raise ValueError(
                f"{what} {_by(sizes)} is not divisible by {factor}, the downsampling of the {len(self.channel_mult)}"
                f" levels of channel_mult: use {near or factor}, or fewer levels"
            )

    def _check_channels(self, x):
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"the network was built for [N,{self.in_channels}] and {self.dims} spatial axes (in_channels, dims),"
                f" got an input of shape {list(x.shape)}"
            )

    def _check_labels(self, y, batch):
        if (y is None) != (self.num_classes is None):
            raise UsageError(
                "must specify y if and only if the model is class-conditional: this one has"
                f" num_classes={self.num_classes} and y is {'missing' if y is None else 'given'}"
            )
        if y is None:
            return
        if y.shape != (batch,):
            raise UsageError(f"y must hold one label per image, shape [{batch}], got {list(y.shape)}")

    def _check_given(self, **conditions):
        for name, value in conditions.items():
            option = name.removesuffix("s") + "_channels"
            if (value is None) != (getattr(self, option) is None):
                state, remedy = ("missing", "pass it, zeros for none") if value is None else ("given", "leave it out")
                raise UsageError(
                    f"the condition {name} is {state}, but this network has {option}={getattr(self, option)}: {remedy}"
                )

    def _recomputes(self, level):
        """Whether the blocks of a level are computed again in the backward pass."""
        return self.use_checkpoint or level < self.checkpoint_levels

    def _res_block(self, level, channels, out_channels=None, **resample):
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self._recomputes(level),
            rescale=self.residual_rescale,
            **resample,
        )

    def _attention_block(self, level, channels, num_heads):
        return AttentionBlock(
            channels,
            num_heads,
            self.num_head_channels,
            self._recomputes(level),
            self.use_new_attention_order,
            None if self.token_channels is None else self.emb_channels,
            self.residual_rescale,
        )

    def _stage(self, level, channels, num_heads):
        """The layers of one entry at a level: a ResBlock, and attention where the downsampling factor asks for it."""
        width = self._width(level)
        layers = [self._res_block(level, channels, width)]
        if 2**level in self.attention_resolutions:
            layers.append(self._attention_block(level, width, num_heads))
        return layers

    def _resample(self, level, channels, **direction):
        """One layer that halves (down=True) or doubles (up=True) the resolution, `level` the finer of the two."""
        if self.resblock_updown:
            return self._res_block(level, channels, **direction)
        return (Upsample if "up" in direction else Downsample)(channels, self.conv_resample, self.dims)

    def _build_input_blocks(self):
        """The downward path and the width of each entry's output."""
        widths = [self._width(0)]
        blocks = [TimestepEmbedSequential(conv_nd(self.dims, self.in_channels, widths[0], 3, padding=1))]
        for level in range(len(self.channel_mult)):
            if level > 0:
                blocks.append(TimestepEmbedSequential(self._resample(level - 1, widths[-1], down=True)))
                widths.append(widths[-1])
            for _ in range(self.num_res_blocks):
                blocks.append(TimestepEmbedSequential(*self._stage(level, widths[-1], self.num_heads)))
                widths.append(self._width(level))
        return nn.ModuleList(blocks), widths

    def _embed(self, timesteps, y=None, vector=None):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))  # [N,emb_channels]
        emb = emb if y is None else emb + self.label_emb(y)
        return emb if vector is None else emb + self.vector_emb(vector, len(emb))

    def _encode(self, x, emb, tokens=(), first=None):
        """The output of every input block and, last, of the middle block; or of the `first` so many of these."""
        h, outputs = x.type(self.dtype), []
        for module in [*self.input_blocks, self.middle_block][:first]:
            h = module(h, emb, *tokens)
            outputs.append(h)
        return outputs

    def _half_modules(self):
        return [self.input_blocks, self.middle_block]


class UNetModel(UNetTrunk):
    """
    The diffusion network: (x, timesteps, y) -> [N,out_channels,...] in x's dtype; zero when freshly built.

    image_size: side of the training images, or (height, width); the network itself takes any size that its
    downsampling divides.
    model_channels: base width; level i has width int(channel_mult[i] * model_channels), a multiple of 32.
    attention_resolutions: the downsampling factors (1, 2, 4...) at which there is attention; the middle always has it.
    num_classes: labels 0..num_classes-1 are then required. vector_channels, token_channels: vectors, and tokens, of so
    many channels are then required (see `conditions`); vectors join the embedding of the time, tokens every attention
    as further keys and values (GLIDE, arXiv 2112.10741). num_heads_upsample: heads of the upward path, -1 as
    num_heads; both count only when num_head_channels is -1. conv_resample: with weights (else average / nearest).
    checkpoint_levels: of so many levels, from the finest on, blocks are recomputed in the backward pass;
    use_checkpoint: all are. residual_rescale: every residual sum is divided by sqrt 2, attention's too. use_fp16: a
    wish, for the programs, that convert_to_fp16 be called after loading.
    Raises ValueError for widths, sizes or heads that do not divide.
    """

    def __init__(self, image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions,
                 dropout=0, channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2, num_classes=None,
                 use_checkpoint=False, use_fp16=False, num_heads=1, num_head_channels=-1, num_heads_upsample=-1,
                 use_scale_shift_norm=False, resblock_updown=False, use_new_attention_order=False,
                 vector_channels=None, token_channels=None, checkpoint_levels=0, residual_rescale=False):
        super().__init__(locals())
        self._check_size("image_size", _sides(image_size))
        self.output_blocks = self._build_output_blocks()
        width = self._width(0)
        self.out = nn.Sequential(
            normalization(width), nn.SiLU(), zero_module(conv_nd(dims, width, out_channels, 3, padding=1))
        )

    def _build_output_blocks(self):
        skips, width = list(self.widths), self.widths[-1]
        blocks = []
        for level in reversed(range(len(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                layers = self._stage(level, width + skips.pop(), self.num_heads_upsample)
                width = self._width(level)
                if level > 0 and i == self.num_res_blocks:
                    layers.append(self._resample(level - 1, width, up=True))
                blocks.append(TimestepEmbedSequential(*layers))
        return nn.ModuleList(blocks)

    def _half_modules(self):
        return [*super()._half_modules(), self.output_blocks]

    def forward(self, x, timesteps, y=None, vector=None, tokens=None, token_mask=None, deep=None):
        """
        x: [N,in_channels,...]; timesteps: [N], fractional allowed; y: labels [N], if and only if num_classes is set;
        vector: [N,vector_channels] and tokens: [N,L,token_channels] likewise; token_mask: [N,L], true for the tokens
        that count, None if all do; deep: a `reuse.Deep`, where deep features are kept or, if there, taken from.

        Raises UsageError (a ValueError and an AssertionError) for missing or needless conditions and misshapen labels,
        ValueError for labels out of range (seen on CPU only), conditions of another shape or kind, and inputs of other
        channels or an indivisible size.
        """
        self._check_channels(x)
        self._check_size("input size", x.shape[3 if self.dims == 3 else 2:])
        self._check_labels(y, len(x))
        self._check_given(vector=vector, tokens=tokens)
        emb = Activated(F.silu(self._embed(timesteps, y, vector)))
        tokens = () if tokens is None else self.token_emb(tokens, token_mask, len(x))    # [N,L,emb_channels], [N,L]
        depth = 0 if deep is None else deep.depth
        if depth and deep.feature is not None:
            skips, h = self._encode(x, emb, tokens, depth), deep.feature
        else:
            *skips, h = self._encode(x, emb, tokens)
        for left in range(len(skips), 0, -1):
            if left == depth:
                deep.feature = h
            h = self.output_blocks[-left](torch.cat([h, skips.pop()], dim=1), emb, *tokens)
        return self.out(h.float()).type(x.dtype)


class SuperResModel(UNetModel):
    """A UNetModel whose input is [noisy image, low-resolution image upsampled to its size], 2 * in_channels in all."""

    def __init__(self, image_size, in_channels, *args, **kwargs):
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        """low_res: [N,in_channels,h,w] of any size, in the same units as x. Raises ValueError if it is missing."""
        if low_res is None:
            raise ValueError("low_res is missing: a super-resolution network needs the small images, [N,C,h,w]")
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[self.dims]
        upsampled = F.interpolate(low_res, x.shape[2:], mode=mode)
        return super().forward(torch.cat([x, upsampled], dim=1), timesteps, **kwargs)


class EncoderUNetModel(UNetTrunk):
    """
    The classifier: the downward half of UNetModel, (x, timesteps) -> logits [N,out_channels] in x's dtype.

    pool: "adaptive" (mean over positions; zero logits when freshly built), "attention" (AttentionPool2d; needs
    num_head_channels and images of exactly image_size), "spatial" or "spatial_v2" (MLP on the spatial means of every
    block). Other arguments as for UNetModel. Raises NotImplementedError for another pool, ValueError as UNetModel.
    """

    def __init__(self, image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions,
                 dropout=0, channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2, use_checkpoint=False, use_fp16=False,
                 num_heads=1, num_head_channels=-1, num_heads_upsample=-1, use_scale_shift_norm=False,
                 resblock_updown=False, use_new_attention_order=False, pool="adaptive", residual_rescale=False):
        super().__init__(locals())
        self.out = self._build_pool()

    def _build_pool(self):
        width, classes = self.widths[-1], self.out_channels
        if self.pool == "adaptive":
            mean = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[self.dims - 1](1)
            logits = zero_module(conv_nd(self.dims, width, classes, 1))
            return nn.Sequential(normalization(width), nn.SiLU(), mean, logits, nn.Flatten())
        if self.pool == "attention":
            if self.num_head_channels == -1 or self.dims != 2:
                raise ValueError(
                    "the attention pool needs num_head_channels and dims=2, got"
                    f" {self.num_head_channels} and {self.dims}: set them, or choose another pool"
                )
            sides = _sides(self.image_size)
            if len(set(sides)) > 1:
                raise ValueError(
                    f"the attention pool takes square images only, not {_by(sides)}: choose another pool, adaptive or"
                    " spatial (--classifier_pool)"
                )
            self._check_size("image_size", sides)
            side = sides[0] // self.downsampling
            attention = AttentionPool2d(side, width, self.num_head_channels, classes)
            return nn.Sequential(normalization(width), nn.SiLU(), attention)
        features = linear(sum(self.widths) + width, 2048)
        if self.pool == "spatial":
            return nn.Sequential(features, nn.ReLU(), linear(2048, classes))
        if self.pool == "spatial_v2":
            return nn.Sequential(features, normalization(2048), nn.SiLU(), linear(2048, classes))
        raise NotImplementedError(
            f"Unexpected {self.pool} pooling: choose adaptive, attention, spatial or spatial_v2"
        )

    def _trunk_outputs(self, x, timesteps):
        self._check_channels(x)
        return self._encode(x, Activated(F.silu(self._embed(timesteps))))

    def features(self, x, timesteps):
        """Spatial mean of the trunk's last feature map, float32: [N,C,...], [N] -> [N,width of the last level]."""
        return _spatial_mean(self._trunk_outputs(x, timesteps)[-1])

    def forward(self, x, timesteps):
        """x: [N,in_channels,...]; timesteps: [N] -> logits [N,out_channels]."""
        outputs = self._trunk_outputs(x, timesteps)
        if self.pool.startswith("spatial"):
            h = torch.cat([_spatial_mean(output) for output in outputs], dim=1)   # [N,sum of widths]
        else:
            h = outputs[-1].float()
        return self.out(h).type(x.dtype)


def _spatial_mean(x):
    return x.float().flatten(2).mean(dim=2)                                       # [N,C,...] -> [N,C]


def _sides(image_size):
    return image_size if isinstance(image_size, tuple) else (image_size,)


def _by(sizes):
    return "x".join(str(size) for size in sizes)
