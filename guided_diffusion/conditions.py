"""
Conditions: what a network is told besides (x, t), and the modules that embed it, for any network.

Conditions travel by name: `y` labels [N], `vector` [N,D] (an embedded text, say), `tokens` [N,L,D] with `token_mask`
[N,L] (true where a token counts), `low_res` [N,C,h,w]. Each has a null, which stands for no condition: of labels the
number num_classes, of all others zeros (of the mask: False). Nulls are put in place by `guidance.nulled` and, in
training, `guidance.dropped`: by the training step, never by a network, whatever mode it is in. Here a null is only
embedded, by a learned vector or as the zeros that it is.
"""

import torch
from torch import nn

from .nn import linear

NULLS = ("learned", "zero")


def check(name, value, shape):
    """
    Raise ValueError unless a value is a tensor of floating-point numbers of this shape; None is any length.

    :param name: what to call it in the error.
    """
    given = tuple(value.shape) if isinstance(value, torch.Tensor) else None
    fits = given is not None and len(given) == len(shape) and all(w in (None, g) for w, g in zip(shape, given))
    if not fits or not value.is_floating_point():
        wanted = ",".join("any" if side is None else str(side) for side in shape)
        held = type(value).__name__ if given is None else f"{str(value.dtype).removeprefix('torch.')} {list(given)}"
        raise ValueError(f"{name} must be floats of shape [{wanted}], got {held}")


def _learned(null, width):
    if null not in NULLS:
        raise ValueError(f"unknown null {null!r}: choose one of {', '.join(NULLS)}")
    return nn.Parameter(0.02 * torch.randn(width)) if null == "learned" else None


class Label(nn.Embedding):
    """
    Labels [N] -> [N,width]. With `null` there is one label more, number num_classes, that stands for none.

    Raises ValueError for labels that are no integers [N] or, where looking costs nothing (on CPU), out of range.
    """

    def __init__(self, num_classes, width, null=True):
        super().__init__(num_classes + bool(null), width)
        self.num_classes = num_classes

    @property
    def null_cond(self):
        """The label that stands for none. Raises ValueError if there is none."""
        if self.num_embeddings == self.num_classes:
            raise ValueError(f"the embedding of {self.num_classes} labels has no null: build it with null=True")
        return self.num_classes

    def null(self, labels):
        """The label that stands for none, in place of each."""
        return torch.full_like(labels, self.null_cond)

    def all_null(self, x):
        """A label that stands for none for each sample of x: [N]."""
        return torch.full((len(x),), self.null_cond, device=x.device)

    def check_data(self, labels, last=None):
        """Raises ValueError for labels of data outside 0..num_classes-1 (`last`): num_classes itself means none."""
        last = self.num_classes - 1 if last is None else last
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= last:
            span = f"{int(labels.min())} .. {int(labels.max())}"
            raise ValueError(f"labels must lie in 0..{last}, but span {span} (num_classes)")

    def forward(self, labels):
        if labels.dim() != 1 or labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"labels must be integers of shape [N], got {labels.dtype} {list(labels.shape)}")
        if labels.device.type == "cpu":  # elsewhere a look at the values would wait for the device
            self.check_data(labels, self.num_embeddings - 1)
        return super().forward(labels)


class Vector(nn.Sequential):
    """
    Vectors [N,size] -> [N,width]: linear, act, linear.

    null: "learned" gives rows that are all zeros, the null, a learned embedding; "zero" treats them as any other.
    Raises ValueError for another shape or kind, and for an unknown null.
    """

    def __init__(self, size, width, null="learned", act=nn.SiLU):
        super().__init__(linear(size, width), act(), linear(width, width))
        self.size = size
        self.register_parameter("null_emb", _learned(null, width))

    def null(self, vector):
        """The vector that stands for none, in place of each."""
        return torch.zeros_like(vector)

    def all_null(self, x):
        """A vector that stands for none for each sample of x: [N,size]."""
        return x.new_zeros(len(x), self.size)

    def forward(self, vector, batch=None):
        """batch: N, where it is known what it must be."""
        check("the condition vector", vector, (batch, self.size))
        emb = super().forward(vector.to(self[0].weight.dtype))                    # [N,width]
        if self.null_emb is None:
            return emb
        return torch.where((vector == 0).all(1, keepdim=True), self.null_emb, emb)


class Tokens(nn.Module):
    """
    Tokens [N,L,size] and which of them count [N,L] -> ([N,L,width], [N,L]); norm, then a linear layer, token by token.

    null: "learned" puts a learned token in place of the first where no token counts, so that attention over tokens
    alone always has a key; "zero" leaves such samples without any. Tokens that do not count may hold anything.
    Raises ValueError for another shape or kind, and for an unknown null.
    """

    def __init__(self, size, width, null="learned"):
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(size)
        self.proj = linear(size, width)
        self.register_parameter("null_emb", _learned(null, width))

    def forward(self, tokens, mask=None, batch=None):
        """mask: None if all count. batch: N, where it is known what it must be."""
        check("the condition tokens", tokens, (batch, None, self.size))
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
        if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"token_mask must be booleans of shape {list(tokens.shape[:2])}, true where a token counts, got"
                f" {mask.dtype} {list(mask.shape)}"
            )
        if self.null_emb is not None and not tokens.shape[1]:
            tokens, mask = tokens.new_zeros(len(tokens), 1, self.size), mask.new_zeros(len(tokens), 1)
        tokens = tokens.masked_fill(~mask[..., None], 0).to(self.proj.weight.dtype)
        emb = self.proj(self.norm(tokens))                                        # [N,L,width]
        if self.null_emb is None:
            return emb, mask
        first = torch.arange(mask.shape[1], device=mask.device) == 0              # [L]
        place = first & ~mask.any(1, keepdim=True)                                # [N,L]
        return torch.where(place[..., None], self.null_emb, emb), mask | place
