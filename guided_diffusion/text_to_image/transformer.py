"""The transformer that the text encoders, the image encoder of CLIP and the prior share."""

import torch
from torch import nn

from ..nn import UsageError
from ..unet import attend, count_heads
from .tokenizer import LENGTH, SIZE


class Attention(nn.Module):
    """Self-attention over [N,L,width], of which the keys where mask [N,L] or [N,L,L] is true count."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = count_heads(width, heads, -1)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)   # each [N,heads,c,L]
        return self.out(attend(q, k, v, mask).flatten(1, 2).transpose(1, 2))


class Block(nn.Module):
    """Pre-norm block: attention and an MLP of four times the width with GELU, each after a norm and added."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        wide = nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        self.mlp = nn.Sequential(*wide)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """
    Blocks and a last norm: [N,L,width] -> the same (Vaswani et al. 2017, with the norms first as in GPT-2 and CLIP).

    The first position always counts as a key, so that each query has one.

    :param causal: a position sees itself and those before it.
    Raises UsageError if the width does not split into the heads, ValueError if there is no layer.
    """

    def __init__(self, width, layers, heads, dropout=0.0, causal=False):
        super().__init__()
        if layers < 1:
            raise ValueError(f"a transformer needs a layer, not {layers}")
        if heads < 1:
            raise UsageError(f"a transformer needs a head, not {heads}")
        self.causal = causal
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x, mask=None):
        """mask: [N,L], true for the positions that count as keys; None: all."""
        first = torch.arange(x.shape[1], device=x.device) == 0                   # [L]
        mask = None if mask is None else mask | first
        if self.causal:
            past = torch.ones(2 * x.shape[1:2], dtype=torch.bool, device=x.device).tril()  # [L,L]
            mask = past[None].expand(len(x), -1, -1) if mask is None else past & mask[:, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class TextEncoder(nn.Module):
    """
    Captions [N,L] as tokens of the tokenizer -> features [N,L,width]. Padding is no key: what stands there changes no
    feature of a place that counts.
    """

    def __init__(self, width, layers, heads, length=LENGTH, dropout=0.0):
        super().__init__()
        self.length = length
        self.token_emb = nn.Embedding(SIZE, width)
        self.positions = nn.Parameter(width**-0.5 * torch.randn(length, width))
        self.transformer = Transformer(width, layers, heads, dropout)

    def forward(self, ids, mask):
        """Raises ValueError for captions of another length."""
        if ids.dim() != 2 or ids.shape[1] != self.length or mask.shape != ids.shape:
            raise ValueError(
                f"captions must be integers [N,{self.length}] with a mask like them, got {list(ids.shape)} and"
                f" {list(mask.shape)} (context_length)"
            )
        return self.transformer(self.token_emb(ids) + self.positions, mask)       # [N,L,width]
