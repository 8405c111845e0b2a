"""
CLIP (Radford et al. 2021, arXiv 2103.00020): pictures and captions in one space, where those that belong together are
near. `hugging_face` has others behind the same calls; `models.open_clip` opens both kinds.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .tokenizer import LENGTH, cut, tokenize
from .transformer import TextEncoder, Transformer

MAX_LOG_SCALE = math.log(100)  # of similarities, as in the paper


class ImageEncoder(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2020): images [N,C,S,S] -> the feature of a class token [N,width]."""

    def __init__(self, image_size, channels, patch_size, width, layers, heads, dropout=0.0):
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"--patch_size {patch_size} does not divide --image_size {image_size}: take one that does, as"
                f" {math.gcd(image_size, 4)}"
            )
        self.size, self.channels = image_size, channels
        self.patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positions = nn.Parameter(width**-0.5 * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.norm = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, dropout)

    def forward(self, x):
        if x.shape[1:] != (self.channels, self.size, self.size):
            wanted = f"[N,{self.channels},{self.size},{self.size}]"
            raise ValueError(f"this CLIP was built for images {wanted}, got {list(x.shape)} (image_size)")
        x = self.patches(x).flatten(2).transpose(1, 2)                            # [N,P,width]
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)         # [N,1+P,width]
        return self.transformer(self.norm(x + self.positions))[:, 0]


class CLIP(nn.Module):
    """
    Two encoders and the scale of their similarities.

    size: D, the width of the space. image_mean, image_std: of the pixels of the data in [0,1], by which images, given
    in [-1,1], are normalized here and nowhere else. `images` tells the image_size and image_channels that it reads.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, image_size, channels, size=256, patch_size=4, image_width=256, image_layers=6, image_heads=8,
                 text_width=256, text_layers=6, text_heads=8, length=LENGTH, dropout=0.0, image_mean=0.5,
                 image_std=0.5):
        super().__init__()
        if image_std <= 0:
            raise ValueError(f"--image_std is a standard deviation, above 0, not {image_std}")
        self.size, self.length, self.token_size = size, length, text_width
        self.images = {"image_size": image_size, "image_channels": channels}
        self.mean, self.std = 2 * image_mean - 1, 2 * image_std
        self.image = ImageEncoder(image_size, channels, patch_size, image_width, image_layers, image_heads, dropout)
        self.image_proj = nn.Linear(image_width, size, bias=False)
        self.text = TextEncoder(text_width, text_layers, text_heads, length, dropout)
        self.text_proj = nn.Linear(text_width, size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def device(self):
        """Where the network lives."""
        return self.log_scale.device

    def check(self, flags):
        """Raise ValueError unless it reads images of these options."""
        for name, its in self.images.items():
            if flags[name] != its:
                raise ValueError(f"--{name} {flags[name]}: the CLIP was trained with {name} {its}: give that")

    def cut(self, text):
        """What is read of a text."""
        return cut(text, self.length)

    def image_embed(self, x):
        """Images [N,C,S,S] in [-1,1] -> unit vectors [N,D]."""
        return F.normalize(self.image_proj(self.image((x - self.mean) / self.std)), dim=-1)

    def text_embed(self, texts):
        """Texts, or their tokens [N,L] -> unit vectors [N,D]."""
        return self.text_encode(texts)[0]

    def text_encode(self, texts):
        """Texts, or their tokens [N,L] -> (unit vectors [N,D], features [N,L,token_size], which of them count)."""
        ids = texts if isinstance(texts, torch.Tensor) else tokenize(texts, self.length)[0]
        ids = ids.to(self.device)
        mask = ids != 0                                                           # [N,L]
        features = self.text(ids, mask)                                           # [N,L,width]
        last = (mask.sum(1) - 1).clamp(min=0)                                     # [N], the end of each text
        at_end = features[torch.arange(len(ids), device=ids.device), last]        # [N,width]
        return F.normalize(self.text_proj(at_end), dim=-1), features, mask

    def forward(self, x, ids):
        """(image embeddings [N,D], text embeddings [N,D], the scale of their similarities)."""
        if self.training:
            with torch.no_grad():
                self.log_scale.clamp_(max=MAX_LOG_SCALE)
        return self.image_embed(x), self.text_embed(ids), self.log_scale.exp()


def contrast(image_emb, text_emb, scale, same, rows=slice(None)):
    """
    The loss of each pair: the symmetric cross-entropy of CLIP, with targets that equal captions share, so that a batch
    with repeated captions does not push apart what belongs together, less the targets' entropy: 0 is the least.

    :param image_emb, text_emb: [M,D], unit.
    :param same: [M,M], whether two captions are equal.
    :param rows: of the pairs whose loss is wanted; the others are but contrasts.
    :return: ([n], [n], whether the most similar caption of each image is its own).
    """
    target = same.float() / same.sum(1, keepdim=True)                             # [M,M], symmetric but for its rows
    similar = scale * image_emb @ text_emb.T                                      # [M,M]
    by_image = F.cross_entropy(similar[rows], target[rows], reduction="none")
    by_text = F.cross_entropy(similar.T[rows], target[rows], reduction="none")
    entropy = same.sum(1).float().log()[rows]
    best = similar.argmax(1)                                                      # [M]
    right = same.gather(1, best[:, None])[rows, 0].float()
    return (by_image + by_text) / 2 - entropy, right


@torch.no_grad()
def classify(clip, x, texts, batch_size=256):
    """
    Zero-shot classification (section 3.1): the number [N] of the text nearest to each image.

    :param texts: one for each class, or for each class a list, whose embeddings are averaged.
    """
    lists = [[each] if isinstance(each, str) else list(each) for each in texts]
    centres = torch.stack([F.normalize(clip.text_embed(each).mean(0), dim=0) for each in lists])    # [K,D]
    parts = [clip.image_embed(part.to(centres.device)) @ centres.T for part in x.split(batch_size)]
    return torch.cat(parts).argmax(1)
