"""
The other side of every comparison of speed: the networks written in the most literal way.

Nothing here is clever, on purpose. Attention is an einsum over strided rows whose softmax is float32 and whose
activations are always computed again in the backward pass; each block embeds the time by itself; norms go through
float32 copies. State dicts of guided_diffusion load key by key, and outputs and gradients agree to rounding. The steps
are in plain_steps.py.

Two spatial axes; labels are the only condition of the diffusion network.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Recomputed(torch.autograd.Function):
    """A function of tensors and parameters that keeps its inputs only and runs again in the backward pass."""

    @staticmethod
    def forward(ctx, function, count, *tensors):
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(*tensors)
        return function(*tensors[:count])

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        inputs = [tensor.detach().requires_grad_(True) for tensor in saved[: ctx.count]]
        with torch.enable_grad():
            # Views: a function that writes into its input would otherwise meet a leaf.
            output = ctx.function(*[tensor.view_as(tensor) for tensor in inputs])
        grads = torch.autograd.grad(output, inputs + list(saved[ctx.count :]), grad, allow_unused=True)
        return (None, None, *grads)


def recomputed(module, function, *inputs):
    """function(*inputs) of a module, its activations computed again in the backward pass."""
    return Recomputed.apply(function, len(inputs), *inputs, *module.parameters())


class Norm(nn.GroupNorm):
    """Group norm in float32."""

    def __init__(self, channels):
        super().__init__(32, channels)

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Up(nn.Module):
    """Nearest neighbours, and a convolution if there are channels."""

    def __init__(self, channels=None):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if channels else None

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.conv else x


class Down(nn.Module):
    """A strided convolution, or an average if there are no channels."""

    def __init__(self, channels=None):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if channels else nn.AvgPool2d(2)

    def forward(self, x):
        return self.op(x)


class Res(nn.Module):
    """A residual block, which embeds the time on its own."""

    def __init__(self, net, channels, width, resample=None):
        super().__init__()
        self.adaptive, self.use_checkpoint = net.use_scale_shift_norm, net.use_checkpoint
        self.in_layers = nn.Sequential(Norm(channels), nn.SiLU(), nn.Conv2d(channels, width, 3, padding=1))
        self.of_h, self.of_x = (resample(), resample()) if resample else (None, None)
        outputs = 2 * width if self.adaptive else width
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * net.model_channels, outputs))
        conv = nn.Conv2d(width, width, 3, padding=1)
        self.out_layers = nn.Sequential(Norm(width), nn.SiLU(), nn.Dropout(net.dropout), conv)
        self.skip_connection = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x, emb):
        if self.use_checkpoint:
            return recomputed(self, self.compute, x, emb)
        return self.compute(x, emb)

    def compute(self, x, emb):
        if self.of_h:
            h = self.in_layers[1](self.in_layers[0](x))
            h, x = self.of_h(h), self.of_x(x)
            h = self.in_layers[2](h)
        else:
            h = self.in_layers(x)
        emb = self.emb_layers(emb).type(h.dtype)[:, :, None, None]          # [N,width or 2*width,1,1]
        if self.adaptive:
            scale, shift = torch.chunk(emb, 2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Attention over all positions, always recomputed."""

    def __init__(self, net, channels, heads):
        super().__init__()
        self.heads = heads if net.num_head_channels == -1 else channels // net.num_head_channels
        self.by_head = not net.use_new_attention_order
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        return recomputed(self, self.compute, x)

    def compute(self, x):
        rows = x.reshape(*x.shape[:2], -1)                                   # [N,C,L]
        h = attention(self.qkv(self.norm(rows)), self.heads, self.by_head)
        return (rows + self.proj_out(h)).reshape(x.shape)


def attention(qkv, heads, by_head):
    """[N,3*C,L] -> [N,C,L]: softmax(q^T k / sqrt(c)) v, every product an einsum over strided rows."""
    batch, width, length = qkv.shape
    channels = width // (3 * heads)
    if by_head:
        q, k, v = qkv.reshape(batch * heads, 3 * channels, length).split(channels, dim=1)
    else:
        parts = qkv.chunk(3, dim=1)
        q, k, v = (part.reshape(batch * heads, channels, length) for part in parts)
    scale = 1 / math.sqrt(math.sqrt(channels))
    logits = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weights = torch.softmax(logits.float(), dim=-1).type(logits.dtype)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(batch, -1, length)


class Entry(nn.Sequential):
    """Layers one after the other, of which residual blocks are handed the embedding."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, Res) else layer(x)
        return x


class Trunk(nn.Module):
    """The way down and the middle, from the attributes of a UNetModel or EncoderUNetModel."""

    def __init__(self, options):
        super().__init__()
        for name, value in options.items():
            setattr(self, name, value)
        self.half = torch.float32
        width = 4 * self.model_channels
        linear = nn.Linear(self.model_channels, width), nn.Linear(width, width)
        self.time_embed = nn.Sequential(linear[0], nn.SiLU(), linear[1])
        if getattr(self, "num_classes", None) is not None:
            self.label_emb = nn.Embedding(self.num_classes, width)
        channels = self.width(0)
        blocks, self.skips = [Entry(nn.Conv2d(self.in_channels, channels, 3, padding=1))], [channels]
        for level in range(len(self.channel_mult)):
            if level:
                blocks.append(Entry(self.resample(channels, Down)))
                self.skips.append(channels)
            for _ in range(self.num_res_blocks):
                blocks.append(Entry(*self.stage(level, channels, self.num_heads)))
                channels = self.width(level)
                self.skips.append(channels)
        self.input_blocks = nn.ModuleList(blocks)
        middle = Attention(self, channels, self.num_heads)
        self.middle_block = Entry(Res(self, channels, channels), middle, Res(self, channels, channels))

    def width(self, level):
        return int(self.channel_mult[level] * self.model_channels)

    def stage(self, level, channels, heads):
        layers = [Res(self, channels, self.width(level))]
        if 2**level in self.attention_resolutions:
            layers.append(Attention(self, self.width(level), heads))
        return layers

    def resample(self, channels, kind):
        return Res(self, channels, channels, kind) if self.resblock_updown else kind(channels)

    def to_half(self, dtype=torch.float16):
        """Convolutions of the body in 16 bits, all else in float32; returns the network."""
        for part in (self.input_blocks, self.middle_block, getattr(self, "output_blocks", nn.ModuleList())):
            for module in part.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)
        self.half = dtype
        return self

    def embed(self, timesteps):
        half = self.model_channels // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(0, half, dtype=torch.float32) / half)
        args = timesteps[:, None].float() * freqs.to(timesteps.device)[None]
        return self.time_embed(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))

    def encode(self, x, emb):
        outputs, h = [], x.type(self.half)
        for module in self.input_blocks:
            h = module(h, emb)
            outputs.append(h)
        return outputs, self.middle_block(h, emb)


class PlainUNet(Trunk):
    """The diffusion network, (x, timesteps, y) -> [N,out_channels,H,W]; build it with `plain_of`."""

    def __init__(self, options):
        super().__init__(options)
        skips, channels, blocks = list(self.skips), self.skips[-1], []
        for level in reversed(range(len(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                layers = self.stage(level, channels + skips.pop(), self.num_heads_upsample)
                channels = self.width(level)
                if level and i == self.num_res_blocks:
                    layers.append(self.resample(channels, Up))
                blocks.append(Entry(*layers))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(Norm(channels), nn.SiLU(), nn.Conv2d(channels, self.out_channels, 3, padding=1))

    def forward(self, x, timesteps, y=None):
        emb = self.embed(timesteps)
        if y is not None:
            emb = emb + self.label_emb(y)
        skips, h = self.encode(x, emb)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


class AttentionPool(nn.Module):
    """Attention of the mean position over all of them."""

    def __init__(self, side, channels, per_head, classes):
        super().__init__()
        self.heads = channels // per_head
        self.positional_embedding = nn.Parameter(torch.zeros(channels, side**2 + 1))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, classes, 1)

    def forward(self, x):
        x = x.reshape(*x.shape[:2], -1)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding[None].to(x.dtype)
        return self.c_proj(attention(self.qkv_proj(x), self.heads, by_head=False))[:, :, 0]


class PlainClassifier(Trunk):
    """The classifier with the attention pool, (x, timesteps) -> logits [N,classes]; build it with `plain_of`."""

    def __init__(self, options):
        super().__init__(options)
        channels = self.skips[-1]
        side = self.image_size // 2 ** (len(self.channel_mult) - 1)
        pool = AttentionPool(side, channels, self.num_head_channels, self.out_channels)
        self.out = nn.Sequential(Norm(channels), nn.SiLU(), pool)

    def forward(self, x, timesteps):
        _, h = self.encode(x, self.embed(timesteps))
        return self.out(h.type(x.dtype))


OPTIONS = (
    "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions dropout channel_mult"
    " num_classes use_checkpoint num_heads num_head_channels num_heads_upsample use_scale_shift_norm resblock_updown"
    " use_new_attention_order"
).split()


def plain_of(model):
    """
    The plain form of a UNetModel, or of an EncoderUNetModel with the attention pool, with the same weights, in
    float32 and in the same mode.

    :raises ValueError: for a network with what the plain form has not.
    """
    refused = [name for name in ("vector_channels", "token_channels") if getattr(model, name, None) is not None]
    pool = getattr(model, "pool", None)
    if refused or model.dims != 2 or not model.conv_resample or pool not in (None, "attention"):
        raise ValueError(f"no plain form: {refused or (model.dims, model.conv_resample, pool)}")
    options = {name: getattr(model, name, None) for name in OPTIONS}
    net = (PlainClassifier if pool else PlainUNet)(options)
    net.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return net.to(next(model.parameters()).device).train(model.training)
