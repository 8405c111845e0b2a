"""
The diffusion prior of unCLIP (Ramesh et al. 2022, arXiv 2204.06125, section 2.2): from a caption to the CLIP embedding
of a picture of it. The process is the one of images, on vectors [N,D]; the network predicts the clean vector.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..conditions import Tokens, Vector
from ..nn import UsageError, timestep_embedding
from .tokenizer import LENGTH
from .transformer import Transformer

EXTRA = 4  # places after the caption: its embedding, the time, the noised embedding, and the query
NULL = {"vector": 0.0, "tokens": 0.0, "token_mask": False}  # what stands for no caption, as `guidance.nulled` takes it


class Prior(nn.Module):
    """
    (x [N,D], timesteps [N], vector, tokens, token_mask) -> [N,D]: a causal transformer over the encoded caption, its
    CLIP embedding, the time, the noised embedding and a learned query, whose output is the prediction.

    size: D. token_channels: of the encoded caption. length: of captions. Raises UsageError for a width that does not
    split into the heads.
    """

    def __init__(self, size, token_channels, length=LENGTH, width=256, layers=6, heads=8, dropout=0.0):
        super().__init__()
        self.size, self.width = size, width
        self.token_emb = Tokens(token_channels, width)
        self.vector_emb = Vector(size, width)
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.noised_emb = nn.Linear(size, width)
        self.query = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positions = nn.Parameter(width**-0.5 * torch.randn(length + EXTRA, width))
        self.transformer = Transformer(width, layers, heads, dropout, causal=True)
        self.out = nn.Linear(width, size, bias=False)

    def forward(self, x, timesteps, vector=None, tokens=None, token_mask=None):
        """
        vector: CLIP embeddings of the captions, as `as_data` scales them, [N,D]; tokens: [N,L,token_channels], of which
        those count where token_mask [N,L] is true. All of them zeros (False): no caption.

        Raises UsageError if a condition is missing, ValueError for other shapes.
        """
        for name, value in {"vector": vector, "tokens": tokens, "token_mask": token_mask}.items():
            if value is None:
                raise UsageError(f"the prior needs the condition {name}: pass it, zeros for no caption")
        if x.dim() != 2 or x.shape[1] != self.size:
            raise ValueError(f"this prior was built for embeddings [N,{self.size}], got {list(x.shape)} (clip_size)")
        caption, mask = self.token_emb(tokens, token_mask, len(x))                # [N,L,width], [N,L]
        time = self.time_embed(timestep_embedding(timesteps, self.width))         # [N,width]
        extra = [self.vector_emb(vector, len(x)), time, self.noised_emb(x), self.query.expand(len(x), -1)]
        sequence = torch.cat([caption, torch.stack(extra, 1)], dim=1)             # [N,L+4,width]
        if sequence.shape[1] > len(self.positions):
            raise ValueError(
                f"captions of {caption.shape[1]} tokens are too long for this prior, built for"
                f" {len(self.positions) - EXTRA} (context_length)"
            )
        # The last places are the same whatever the captions' length.
        positions = torch.cat([self.positions[: caption.shape[1]], self.positions[-EXTRA:]])
        mask = torch.cat([mask, mask.new_ones(len(x), EXTRA)], dim=1)
        return self.out(self.transformer(sequence + positions, mask)[:, -1])


def as_data(embedding):
    """Embeddings of any length as data of the process, and as conditions: of norm sqrt(D), about 1 a coordinate."""
    return F.normalize(embedding, dim=-1) * embedding.shape[-1] ** 0.5


def as_embedding(x):
    """Unit vectors, of what the process drew."""
    return F.normalize(x, dim=-1)


def nearest(candidates, text_emb):
    """
    Of each sample's candidates the one whose dot product with its caption's embedding is largest, of equal ones the
    first: [N,K,D], [N,D] -> [N,D].
    """
    similar = (candidates * text_emb[:, None]).sum(-1)                            # [N,K]
    best = (similar == similar.amax(1, keepdim=True)).int().argmax(1)             # [N]
    return candidates[torch.arange(len(candidates), device=best.device), best]
