"""Sigma models: the ideal denoiser, perceptrons for points in the plane, and small networks for small images."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from . import toy
from .conditions import Label
from .sigma import ModelMixin, over, positive
from .unet import UNetModel


def sq_norm(M, k):
    """The squared norm of each row of M [N,D], k times: [N,k]."""
    return M.square().sum(1, keepdim=True).expand(-1, k)


class IdealDenoiser(nn.Module, ModelMixin):
    """
    The best denoiser of a finite data set: no model has a lower expected loss at any sigma, and none is trained.

    Its x_0 is the mean of the data weighted by exp(-|x - d_i|^2 / 2 sigma^2); with labels as conditions, of the data
    with that label, where -1 means any. `toy.Mixture` does the work.

    dataset: a tensor [N,...], or a Dataset of points or of pairs (point, label), of any item shape.
    """

    cond_embed = None  # set in __init__ where there are labels

    def __init__(self, dataset):
        super().__init__()
        data, labels = _stacked(dataset)
        self.input_dims = tuple(data.shape[1:])
        self.register_buffer("data", data)
        self.register_buffer("labels", labels)
        if labels is not None:
            self.cond_embed = SimpleNamespace(null_cond=toy.ANY)

    def forward(self, x, sigma, cond=None):
        """E[eps | x]: like x. cond: labels [N]. Raises ValueError for labels that no data have, or without labels."""
        known = [] if self.labels is None else self.labels.unique().tolist()
        if cond is not None and not set(cond.tolist()) <= {*known, toy.ANY}:
            raise ValueError(f"the data have labels {known}, and the condition asks for {cond.unique().tolist()}")
        sigma = positive(over(sigma, x)).flatten().expand(len(x))
        return toy.ideal_denoiser(self.data, self.labels).noise_at(sigma, x, cond)


def _stacked(dataset):
    if isinstance(dataset, torch.Tensor):
        return dataset, None
    items = [dataset[i] for i in range(len(dataset))]
    if isinstance(items[0], (tuple, list)):
        points, labels = zip(*(item[:2] for item in items))
        return torch.stack(points), torch.as_tensor([int(label) for label in labels])
    return torch.stack(items), None


# ------------------------------------------------------------------------------------------------------- embeddings

def get_sigma_embeds(batches, sigma, scaling_factor=0.5, log_scale=True):
    """
    [sin(f s), cos(f s)] with s = ln sigma (sigma itself if not log_scale), f = scaling_factor: [batches,2].

    sigma: a scalar, or `batches` of them in any shape. Raises ValueError for another number, and for ln of sigma <= 0.
    """
    sigma = torch.as_tensor(sigma).reshape(-1, 1)
    if len(sigma) not in (1, batches):
        raise ValueError(f"sigma holds {len(sigma)} noise levels for {batches} samples: give one, or one for each")
    phase = scaling_factor * (positive(sigma).log() if log_scale else sigma)    # [1 or N,1]
    return torch.cat([phase.sin(), phase.cos()], dim=1).expand(batches, 2)


class SigmaWaves(nn.Module):
    """`get_sigma_embeds` as a layer, (batches, sigma) -> [batches,2]."""

    def __init__(self, scaling_factor=0.5, log_scale=True):
        super().__init__()
        self.scaling_factor, self.log_scale = scaling_factor, log_scale

    def largest_scaling(self, low, high):
        """The scaling_factor from which noise levels low and high, or some between them, look the same."""
        return 2 * math.pi / (math.log(high / low) if self.log_scale else high - low)

    def forward(self, batches, sigma):
        return get_sigma_embeds(batches, sigma, self.scaling_factor, self.log_scale)


class SigmaEmbedderSinCos(nn.Module):
    """A learned embedding of the noise level, (batches, sigma) -> [batches,hidden_size]."""

    def __init__(self, hidden_size, scaling_factor=0.5, log_scale=True):
        super().__init__()
        self.waves = SigmaWaves(scaling_factor, log_scale)
        self.mlp = nn.Sequential(nn.Linear(2, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, batches, sigma):
        return self.mlp(self.waves(batches, sigma).to(self.mlp[0].weight))


class CondEmbedderLabel(nn.Module):
    """
    Labels [N] -> [N,hidden_size]. In training mode each label is replaced by `null_cond`, the label that means none,
    with probability dropout_prob; in evaluation mode none is.
    """

    def __init__(self, hidden_size, num_classes, dropout_prob=0.1):
        super().__init__()
        self.num_classes, self.null_cond, self.dropout_prob = num_classes, num_classes, dropout_prob
        self.embeddings = Label(num_classes, hidden_size)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def check_data(self, labels):
        """Raises ValueError for labels of data outside 0..num_classes-1: num_classes itself means none."""
        self.embeddings.check_data(labels)

    def null(self, labels):
        """The label that means none, in place of each."""
        return self.embeddings.null(labels)

    def all_null(self, x):
        """A label that means none for each sample of x: [N]."""
        return self.embeddings.all_null(x)

    def forward(self, labels):
        self.embeddings.check_data(labels, self.null_cond)  # before some are dropped
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = labels.masked_fill(drop, self.null_cond)
        return self.mlp(self.embeddings(labels))


# ------------------------------------------------------------------------------------------------------ perceptrons

class TimeInputMLP(nn.Module, ModelMixin):
    """
    A perceptron (x [N,dim], sigma) -> [N,output_dim], whose input is [x, sin, cos of the noise level].

    output_dim: dim if None.
    """

    sigma_dim = 2

    def __init__(self, dim=2, output_dim=None, hidden_dims=(16, 128, 256, 128, 16), scaling_factor=0.5):
        super().__init__()
        self.input_dims = (dim,)
        self.waves = SigmaWaves(scaling_factor)
        self.net = self._layers(dim + self.sigma_dim, hidden_dims, output_dim or dim)

    @staticmethod
    def _layers(width, hidden_dims, output_dim):
        layers = []
        for hidden in hidden_dims:
            layers += [nn.Linear(width, hidden), nn.GELU()]
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, output_dim))

    def forward(self, x, sigma, cond=None):
        return self.net(torch.cat([x, self.waves(len(x), sigma).to(x)], dim=1))


class ConditionalMLP(TimeInputMLP):
    """A perceptron whose input is [x, sin, cos, embedded label]; without a condition the label is the null one."""

    def __init__(self, dim=2, hidden_dims=(16, 128, 256, 128, 16), cond_dim=4, num_classes=10, dropout_prob=0.1,
                 scaling_factor=0.5):
        super().__init__(dim + cond_dim, dim, hidden_dims, scaling_factor)
        self.input_dims = (dim,)
        self.cond_embed = CondEmbedderLabel(cond_dim, num_classes, dropout_prob)

    def forward(self, x, sigma, cond=None):
        label = self.cond_embed(self.cond_embed.all_null(x) if cond is None else cond)    # [N,cond_dim]
        return self.net(torch.cat([x, self.waves(len(x), sigma).to(x), label], dim=1))


# ----------------------------------------------------------------------------------------------------- transformers

class CondSequential(nn.Sequential):
    """A sequence that hands (x, cond) to each child."""

    def forward(self, x, cond):
        for module in self:
            x = module(x, cond)
        return x


class Attention(nn.Module):
    """Self-attention over tokens: [B,N,D] -> [B,N,D], D = head_dim * num_heads."""

    def __init__(self, head_dim, num_heads=8, qkv_bias=False):
        super().__init__()
        dim = head_dim * num_heads
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))                   # [B,N,3,heads,k]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()                         # [B,heads,N,k]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def modulated(x, shift, scale):
    """x [B,N,D] (1 + scale) + shift, both [B,D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _norm(width):
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def _modulation(width, count):
    """SiLU and a linear layer to `count` vectors; it starts at zero, so that blocks start as the identity."""
    linear = nn.Linear(width, count * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


class DiTBlock(nn.Module):
    """A transformer block modulated by the condition (adaLN-Zero): (tokens [B,N,D], cond [B,D]) -> [B,N,D]."""

    def __init__(self, head_dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        width, hidden = head_dim * num_heads, int(head_dim * num_heads * mlp_ratio)
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attn = Attention(head_dim, num_heads, qkv_bias=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = _modulation(width, 6)

    def forward(self, x, cond):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulated(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), shift2, scale2))


def _positions(side, width):
    """Sines and cosines of the rows and columns of a side x side grid: [side^2,width]."""
    omega = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * omega                                   # [side,width/4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                           # [side,width/2]
    rows, columns = wave.repeat_interleave(side, 0), wave.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


class DiT(nn.Module, ModelMixin):
    """
    A diffusion transformer (Peebles & Xie 2022, arXiv 2212.09748) for x [N,channels,in_dim,in_dim].

    Zero when freshly built. sig_embed, cond_embed: modules (batches, sigma) and (cond) -> [N,head_dim*num_heads];
    without cond_embed the network ignores conditions. Raises ValueError unless patch_size divides in_dim, 4 the width.
    """

    def __init__(self, in_dim, channels=3, patch_size=2, depth=12, head_dim=64, num_heads=6, mlp_ratio=4.0,
                 sig_embed=None, cond_embed=None):
        super().__init__()
        width = head_dim * num_heads
        if in_dim % patch_size or width % 4:
            raise ValueError(f"patch_size {patch_size} must divide in_dim {in_dim}, and 4 the width {width}")
        self.input_dims = (channels, in_dim, in_dim)
        self.patch_size = patch_size
        self.register_buffer("positions", _positions(in_dim // patch_size, width), persistent=False)
        self.embed = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.sig_embed = SigmaEmbedderSinCos(width) if sig_embed is None else sig_embed
        self.cond_embed = cond_embed
        self.blocks = CondSequential(*[DiTBlock(head_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm, self.modulation = _norm(width), _modulation(width, 2)
        self.out = nn.Linear(width, patch_size**2 * channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, sigma, cond=None):
        emb = self.sig_embed(len(x), sigma)                                       # [N,D]
        if self.cond_embed is not None:
            emb = emb + self.cond_embed(self.cond_embed.all_null(x) if cond is None else cond)
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions        # [N,L,D]
        tokens = self.blocks(tokens, emb)
        tokens = self.out(modulated(self.norm(tokens), *self.modulation(emb).chunk(2, dim=1)))
        return F.fold(tokens.transpose(1, 2), x.shape[2:], self.patch_size, stride=self.patch_size)


class Unet(nn.Module, ModelMixin):
    """
    The project's U-Net in the sigma protocol: (x [N,in_ch,in_dim,in_dim], sigma, cond) -> [N,out_ch,in_dim,in_dim].

    It is told 100 ln(sigma) in place of a timestep: over the usual noise levels about the range of 1000 timesteps.
    attn_resolutions: sides of the feature maps with attention. cond_embed: labels -> [N,4*ch], such as
    CondEmbedderLabel. Raises ValueError as UNetModel does, e.g. for widths that are no multiples of 32.
    """

    def __init__(self, in_dim, in_ch, out_ch, ch=128, ch_mult=(1, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,),
                 dropout=0.1, cond_embed=None):
        super().__init__()
        self.input_dims = (in_ch, in_dim, in_dim)
        factors = [in_dim // side for side in attn_resolutions]
        labels = None if cond_embed is None else cond_embed.null_cond + 1
        self.net = UNetModel(in_dim, in_ch, ch, out_ch, num_res_blocks, factors, dropout, ch_mult, num_classes=labels)
        if cond_embed is not None:
            self.net.label_emb = cond_embed

    @property
    def cond_embed(self):
        """The network's embedding of labels, or None."""
        return getattr(self.net, "label_emb", None)

    def forward(self, x, sigma, cond=None):
        embed = self.cond_embed
        if embed is not None and cond is None:
            cond = embed.all_null(x)
        clock = 100 * positive(over(sigma, x)).log().flatten().expand(len(x))
        return self.net(x, clock, None if embed is None else cond)
