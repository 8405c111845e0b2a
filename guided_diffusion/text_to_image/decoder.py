"""
The decoder of unCLIP (Ramesh et al. 2022, arXiv 2204.06125, section 2.1): from the CLIP embedding of a picture, and a
caption if there is one, to the picture. It is `UNetModel`, whose tokens are those of the caption and of the embedding.
"""

import torch
from torch import nn

from .. import guidance
from ..conditions import check
from ..nn import UsageError
from ..unet import UNetModel
from .tokenizer import LENGTH
from .transformer import TextEncoder

# What stands for no picture and no caption, as `guidance.nulled` takes it: while training, and while sampling, where
# captions come encoded.
NULL = {"vector": 0.0, "caption": 0}
ENCODED_NULL = {"vector": 0.0, "tokens": 0.0, "token_mask": False}


class Decoder(UNetModel):
    """
    A UNetModel of the CLIP embedding and the caption of a picture.

    The embedding is added to that of the time and makes `image_tokens` tokens; the caption, encoded by a transformer of
    the decoder's own, makes a token for each place. All of them are keys and values of every attention (as in GLIDE,
    arXiv 2112.10741). Each of the two may be missing.

    clip_size: D. text_layers 0: captions are not looked at. Other arguments as for UNetModel.
    """

    def __init__(self, image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions,
                 clip_size=256, image_tokens=4, text_width=256, text_layers=4, text_heads=8, length=LENGTH,
                 text_dropout=0.0, **options):
        if image_tokens < 0 or text_layers < 0:
            raise ValueError(f"--image_tokens {image_tokens} and --text_layers {text_layers} must be 0 or more")
        super().__init__(image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions,
                         vector_channels=clip_size, token_channels=text_width if image_tokens or text_layers else None,
                         **options)
        self.image_tokens, self.length = image_tokens, length
        self.to_tokens = nn.Linear(clip_size, image_tokens * text_width) if image_tokens else None
        self.text = TextEncoder(text_width, text_layers, text_heads, length, text_dropout) if text_layers else None

    def encode(self, caption):
        """
        Captions [N,L] as a condition: {"tokens": [N,L,text_width], "token_mask": [N,L]}, for whoever walks many steps
        with them; {} if the network does not look at captions.
        """
        if self.text is None:
            return {}
        mask = caption != 0                                                       # [N,L]
        return {"tokens": self.text(caption, mask), "token_mask": mask}

    def forward(self, x, timesteps, vector=None, caption=None, tokens=None, token_mask=None, deep=None):
        """
        vector: CLIP embeddings of the pictures, as `prior.as_data` scales them, [N,D], zeros for none; caption: tokens
        of the tokenizer [N,L], padding for none; in its place tokens and token_mask, what `encode` makes of it;
        deep: as UNetModel takes it.

        Raises UsageError if the embedding is missing, ValueError as UNetModel.
        """
        if vector is None:
            raise UsageError("the decoder needs the condition vector: pass it, zeros for no picture")
        check("the condition vector", vector, (len(x), self.vector_channels))
        if caption is not None:
            tokens, token_mask = (self.encode(caption).get(name) for name in ("tokens", "token_mask"))
        parts = [] if tokens is None else [(tokens, token_mask)]
        if self.to_tokens is not None:
            own = self.to_tokens(vector.to(self.to_tokens.weight.dtype))
            own = own.unflatten(1, (self.image_tokens, self.token_channels))      # [N,4,text_width]
            there = (vector != 0).any(1, keepdim=True)                            # [N,1]
            parts.append((own, there.expand(-1, self.image_tokens)))
        tokens = mask = None
        if parts:
            tokens, mask = (torch.cat(each, dim=1) for each in zip(*parts))       # [N,L+4,text_width], [N,L+4]
        return super().forward(x, timesteps, vector=vector, tokens=tokens, token_mask=mask, deep=deep)


def check_rate(name, rate):
    """Raise ValueError unless a rate of dropping is a probability below 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"--{name} is a probability from 0 to below 1, not {rate}")


def dropping(embedding_rate, caption_rate):
    """
    `(cond, rng) -> cond` for the training loop: the embedding and the caption of each picture dropped independently,
    each at its own rate (section 2.1: 0.1 and 0.5).

    :raises ValueError: for a rate that is no probability below 1.
    """
    rates = {"vector": embedding_rate, "caption": caption_rate}
    check_rate("embedding_dropout", embedding_rate)
    check_rate("caption_dropout", caption_rate)

    def drop(cond, rng):
        for name, rate in rates.items():
            if name in cond:
                cond = guidance.dropped(cond, rng, {name: NULL[name]}, rate)
        return cond

    return drop
