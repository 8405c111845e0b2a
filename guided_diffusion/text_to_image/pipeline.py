"""
From texts or pictures to embeddings and captions, as conditions of the decoder: {name: function of the indices of
samples}, which `generate.sample_stream` takes as `given`. Sample i is of prompt or picture i modulo their number.
"""

import torch as th
import torch.nn.functional as F

from .. import guidance, sampling
from ..sampling import SeededNoise
from .prior import NULL, as_data, as_embedding, nearest
from .tasks import Captions
from .tokenizer import is_blank, tokenize

_NOISE = 1 << 33  # added to a seed: the noise of embeddings is none of that which pictures start from


class TextEmbeddings:
    """
    CLIP embeddings of pictures of the prompts, drawn by the prior: `(indices) -> [n,D]`, unit.

    Each sample has candidates of its own, and keeps the one nearest to the text (arXiv 2204.06125, section 2.2). What
    it gets is a function of the seed, its index and its prompt.

    :param clip: its CLIP, or any with `text_encode`.
    :param prior: the network, and `diffusion` its process, with the rows that are walked; None: the embeddings of the
        texts themselves.
    :param scale: of classifier-free guidance.
    :raises ValueError: for no prompts, fewer than one candidate, or a blank prompt without a prior.
    """

    def __init__(self, clip, prompts, prior=None, diffusion=None, *, candidates=2, scale=1.0, seed=0):
        if not prompts:
            raise ValueError("no prompts: give --prompts, each in quotes, --prompts_file or --images")
        if candidates < 1:
            raise ValueError(f"--prior_candidates must be 1 or more, not {candidates}")
        self.captions, self.device = Captions(clip, prompts), clip.device
        self.blank = [is_blank(prompt) for prompt in prompts]
        if prior is None and any(self.blank):
            raise ValueError("an empty prompt has no embedding of its own: give --prior_path, or words")
        self.diffusion, self.candidates, self.seed = diffusion, candidates, seed
        self.predict = prior and diffusion.predictor(prior, clip_denoised=False, guide=_guide(scale))

    def __call__(self, indices):
        prompts = th.tensor([i % len(self.blank) for i in indices])               # [n]
        told = self.captions(prompts)
        text_emb = as_embedding(told["vector"])                                   # [n,D]
        if self.predict is None:
            return text_emb
        k = self.candidates
        noise = SeededNoise(self.seed + _NOISE, [i * k + j for i in indices for j in range(k)], self.device)
        start = noise.normal(text_emb.shape[1])                                   # [n*k,D]
        cond = {name: value.repeat_interleave(k, 0) for name, value in told.items()}
        for x, _ in sampling.sample(self.diffusion, self.predict, sampling.ddpm, start, noise=noise, cond=cond):
            end = x
        return nearest(as_embedding(end).unflatten(0, (-1, k)), text_emb)


def _guide(scale):
    if scale == 1:
        return None
    return lambda predict: guidance.classifier_free(predict, NULL, scale, batched=True)


class ImageEmbeddings:
    """CLIP embeddings of pictures [P,C,S,S] in [-1,1], in turn: `(indices) -> [n,D]`, unit; for variations."""

    def __init__(self, clip, images):
        with th.no_grad():
            self.table = th.cat([clip.image_embed(part.to(clip.device)) for part in images.split(64)])   # [P,D]

    def __call__(self, indices):
        return self.table[[i % len(self.table) for i in indices]]


class Between:
    """
    Embeddings on the great circles from each anchor to the next (section 3.2): `(indices) -> [n,D]`, unit.

    Samples p * steps to (p + 1) * steps - 1 go from anchor p to anchor p + 1, both included. All samples of one way
    begin with the same noise, that of number `noise_of(index)`.

    :param embeddings: `(indices) -> [n,D]`, of the anchors. :param steps: pictures on each way, 2 or more.
    """

    def __init__(self, embeddings, steps):
        if steps < 2:
            raise ValueError(f"--interpolate is how many pictures a way has, with both ends: 2 or more, not {steps}")
        self.embeddings, self.steps = embeddings, steps

    def noise_of(self, index):
        """The number of the way that a sample lies on."""
        return index // self.steps

    def __call__(self, indices):
        first = [self.noise_of(i) for i in indices]
        share = th.tensor([i % self.steps / (self.steps - 1) for i in indices])   # [n]
        anchors = range(min(first), max(first) + 2)  # each is drawn once, however many samples lie beside it
        table, row = self.embeddings(anchors), th.tensor(first) - anchors[0]      # [K,D], [n]
        row = row.to(table.device)
        return slerp(table[row], table[row + 1], share.to(table))


def slerp(a, b, share):
    """
    Unit vectors on the great circle from a to b [N,D], at shares [N] of the angle between them (Shoemake 1985).
    Vectors that are equal, or nearly opposite, are mixed in a straight line.
    """
    share, angle = share[:, None], (a * b).sum(1, keepdim=True).clamp(-1, 1).acos()          # [N,1]
    sine = angle.sin()
    straight = sine < 1e-4
    safe = sine.masked_fill(straight, 1)
    left = th.where(straight, 1 - share, ((1 - share) * angle).sin() / safe)
    right = th.where(straight, share, (share * angle).sin() / safe)
    return F.normalize(left * a + right * b, dim=1)


def conditions(decoder, embeddings, prompts=()):
    """
    What the decoder is told of samples: {name: function of their indices}, and what stands for none of it, as
    `guidance.nulled` takes it.

    :param embeddings: `(indices) -> [n,D]`, unit.
    :param prompts: captions in turn; without them, and where the decoder looks at none, captions are null.
    """
    given, null = {"vector": lambda indices: as_data(embeddings(indices))}, {"vector": 0.0}
    ids = tokenize(list(prompts) or [""], decoder.length)[0].to(next(decoder.parameters()).device)
    with th.no_grad():
        told = decoder.encode(ids)
    for name, table in told.items():
        table = table if prompts else th.zeros_like(table)
        given[name] = lambda indices, table=table: table[[i % len(table) for i in indices]]
        null[name] = False if table.dtype == th.bool else 0.0
    return given, null
