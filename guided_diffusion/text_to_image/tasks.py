"""CLIP as a task of the training loop, and what the loop's data are for each of the three networks."""

from functools import partial

import torch as th
import torch.distributed as dist
import torch.nn.functional as F

from .. import dist_util, logger
from .clip import contrast
from .prior import as_data
from .tokenizer import clean, cut, is_blank, tokenize

MANY_TEXTS = 4096  # from so many different captions on they are encoded batch by batch, not all beforehand


class ClipTask:
    """
    Contrast of the pictures and captions of a batch, those of all processes; see `tasks.DiffusionTask` for the methods.

    :param crop_padding: pixels by which pictures are shifted at random in training; what comes in is black.
    """

    prefix = ""
    num_timesteps = 1

    def __init__(self, clip, crop_padding=0):
        if crop_padding < 0:
            raise ValueError(f"--crop_padding is a number of pixels, 0 or more, not {crop_padding}")
        self.net, self.crop_padding = clip, crop_padding

    def draw(self, n, device, rng):
        return th.zeros(n, dtype=th.int64, device=device), th.ones(n, device=device)

    def condition(self, x0, cond, rng, normal):
        """Where each picture is cut from its padded self, in pixels from the corner."""
        if not self.crop_padding:
            return cond
        places = [th.from_numpy(rng.random(len(x0)) * (2 * self.crop_padding + 1)).long() for _ in range(2)]
        return cond | {"corner": th.stack(places, 1).to(x0.device)}               # [N,2]

    def loss(self, net, x0, cond, t, noise):
        if "corner" in cond and net.training:
            x0 = shifted(x0, cond["corner"], self.crop_padding)
        image_emb, text_emb, scale = net(x0, cond["caption"])
        rows = slice(dist_util.rank() * len(x0), (dist_util.rank() + 1) * len(x0)) if net.training else slice(None)
        gather = gathered if net.training else (lambda x: x)  # validation is of each process
        image_emb, text_emb, captions = gather(image_emb), gather(text_emb), gather(cond["caption"])
        same = (captions[:, None] == captions).all(-1)                            # [M,M]
        loss, right = contrast(image_emb, text_emb, scale, same, rows)
        return {"loss": loss, "acc@1": right}


def gathered(x):
    """x [n,...] of all processes in the order of their ranks [ranks*n,...]; gradients reach each from all."""
    if dist_util.world_size() == 1:
        return x
    if x.is_floating_point():
        from torch.distributed.nn.functional import all_gather

        return th.cat(all_gather(x))
    parts = [th.empty_like(x) for _ in range(dist_util.world_size())]
    dist.all_gather(parts, x.contiguous())
    return th.cat(parts)


def shifted(x, corner, padding):
    """Pictures [N,C,H,W] cut, each at its corner [N,2], from themselves padded by so many black pixels."""
    wide = F.pad(x, (padding,) * 4, value=-1.0)                                   # [N,C,H+2p,W+2p]
    rows = corner[:, :1] + th.arange(x.shape[2], device=x.device)                 # [N,H]
    columns = corner[:, 1:] + th.arange(x.shape[3], device=x.device)              # [N,W]
    sample = th.arange(len(x), device=x.device)[:, None, None]
    return wide.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


class Mapped:
    """The batches (x0, cond) of a stream, each changed by a function; all else is the stream's."""

    def __init__(self, data, function):
        self._data, self._function = data, function

    def __iter__(self):
        return self

    def __next__(self):
        return self._function(*next(self._data))

    def __getattr__(self, name):
        return getattr(self._data, name)


def with_captions(data, length):
    """A stream with "text", numbers of `data.texts`, as one with "caption", their tokens [N,length]."""
    warn_of_cuts(data.texts, partial(cut, length=length))
    table = tokenize(data.texts, length)[0].to(th.uint8)                          # [T,L]
    return Mapped(data, lambda x, cond: (x, _without_text(cond) | {"caption": table[cond["text"]].long()}))


def with_embeddings(data, clip, length):
    """As `with_captions`, and with "vector", the embedding of each picture itself [N,D]; for the decoder."""

    def add(x, cond):
        return x, cond | {"vector": _frozen(lambda: as_data(clip.image_embed(x.to(clip.device))))}

    return Mapped(with_captions(data, length), add)


def embedded(data, clip):
    """A stream of embeddings of pictures [N,D] with their encoded captions as conditions; for the prior."""
    warn_of_cuts(data.texts, clip.cut)
    encode = Captions(clip, data.texts)

    def both(x, cond):
        return _frozen(lambda: as_data(clip.image_embed(x.to(clip.device)))), encode(cond["text"])

    return Mapped(data, both)


def warn_of_cuts(texts, cut):
    """Warn of texts that `cut(text) -> text` makes shorter, and of what becomes of the first of them."""
    short = [text for text in texts if len(cut(text)) < len(clean(text))]
    if short:
        logger.warn(
            f"{len(short)} of {len(texts)} texts are too long and are cut; the first to {cut(short[0])!r}"
            " (--context_length of the training)"
        )


class Captions:
    """
    What the prior is told of captions: {"vector": [N,D], "tokens": [N,L,W], "token_mask": [N,L]}, of their numbers [N]
    in a list. A blank caption is the null. Few captions are encoded once, many when they are asked for.
    """

    def __init__(self, clip, texts):
        self.clip, self.texts, self.table = clip, list(texts), None
        if len(self.texts) <= MANY_TEXTS:
            parts = [self._encode(self.texts[i : i + 256]) for i in range(0, len(self.texts), 256)]
            self.table = {name: th.cat([part[name] for part in parts]) for name in parts[0]}

    def __call__(self, numbers):
        if self.table is None:
            return self._encode([self.texts[number] for number in numbers.tolist()])
        return {name: table[numbers.to(table.device)] for name, table in self.table.items()}

    def _encode(self, texts):
        vector, tokens, mask = _frozen(lambda: self.clip.text_encode(texts))
        said = th.tensor([not is_blank(text) for text in texts], device=mask.device)   # [N]
        vector, tokens, mask = as_data(vector) * said[:, None], tokens * said[:, None, None], mask & said[:, None]
        return {"vector": vector, "tokens": tokens, "token_mask": mask}


def _frozen(function):
    with th.no_grad():
        return function()


def _without_text(cond):
    return {name: value for name, value in cond.items() if name != "text"}
