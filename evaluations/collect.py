"""One pass over images: features, running moments and fingerprints, on each of the processes that share the work."""

from typing import NamedTuple

import numpy as np

from evaluations import sources
from evaluations.features import Features, checked
from evaluations.moments import Moments

PARTS = {"mu": "pool", "mu_s": "spatial"}  # the features that each kind of stored moments is of


class Collected(NamedTuple):
    """What a rank has collected, or, on rank 0 after `gathered`, what all ranks have, in the order of the images."""

    indices: np.ndarray  # int64 [n]
    features: Features
    labels: np.ndarray | None  # int64 [n]
    digests: np.ndarray  # uint8 [n,32]
    moments: dict  # {"mu": Moments, "mu_s": Moments} of all of them
    shapes: frozenset  # of the images, [H,W,C]


class Collector:
    """Takes Blocks of images and keeps what a network says of them.

    :param batch_size: images given to the extractor at once.
    :param cache: a Cache, or None.
    :param keep_rows: False: only the moments remember the features.
    """

    def __init__(self, extractor, batch_size=64, cache=None, keep_rows=True):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        self.extractor, self.batch_size, self.cache = extractor, batch_size, cache
        self.parts, self.moments, self.shapes = [], {}, set()
        self.waiting, self.keep_rows = [], keep_rows

    def add(self, block):
        """Take in a Block; its features are computed as soon as there is work for the network."""
        self.shapes.add(block.images.shape[1:])
        if len(self.shapes) > 1:
            raise ValueError(f"images of different shapes in one set: {sorted(map(list, self.shapes))}")
        self.waiting.append(block)
        if sum(len(each.indices) for each in self.waiting) >= sources.BLOCK:
            self.flush()

    def collected(self):
        """The Collected of this rank; its features have rows of no images where it had none."""
        self.flush()
        if not self.parts:
            return None
        indices, features, labels, digests = zip(*self.parts)
        labels = None if labels[0] is None else np.concatenate(labels)
        return Collected(
            np.concatenate(indices), Features.join(features), labels, np.concatenate(digests), self.moments,
            frozenset(self.shapes),
        )  # fmt: skip

    def flush(self):
        """Look at what waits."""
        if not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        indices, images = (np.concatenate(each) for each in list(zip(*waiting))[:2])
        labels = None if waiting[0].labels is None else np.concatenate([each.labels for each in waiting])
        digests = sources.digests(images)
        features = self.cache.features(digests, lambda: self._look(images)) if self.cache else self._look(images)
        for key, what in PARTS.items():
            rows = getattr(features, what)
            if rows is not None:
                self.moments.setdefault(key, Moments(rows.shape[1])).add(rows)
        if self.keep_rows:
            self.parts.append((indices, features, labels, digests))

    def _look(self, images):
        steps = range(0, len(images), self.batch_size)
        return Features.join([checked(self.extractor, images[i : i + self.batch_size]) for i in steps])


def collect(source, extractor, ranks, batch_size=64, cache=None, progress=None):
    """What this rank collects of a Source; progress is a name for a bar. Collective: see `complete`."""
    from tqdm import tqdm

    collector = Collector(extractor, batch_size, cache)
    total = -(-source.count // ranks.size) if source.count is not None else None
    with tqdm(desc=progress, total=total, unit="img", disable=not progress or not ranks.is_main) as bar:
        for block in source.blocks(ranks.rank, ranks.size):
            collector.add(block)
            bar.update(len(block.indices))
        return complete(collector, ranks, source.name)


def complete(collector, ranks, name):
    """The Collected of this rank once all ranks have theirs: one without images has arrays of no rows. Collective.

    :raises ValueError: if no rank has any, or an image came twice.
    """
    mine = collector.collected()
    nothing = None if mine is None else _nothing(mine)
    pattern = next((each for each in ranks.share(nothing) if each is not None), None)
    if pattern is None:
        raise ValueError(f"{name}: no images")
    mine = pattern if mine is None else mine
    indices = np.sort(np.concatenate(ranks.share(mine.indices)))
    twice = indices[1:][indices[1:] == indices[:-1]]
    if len(twice):
        raise ValueError(f"{name}: image {twice[0]} came twice: drop what a sampler of several processes fills up with")
    return mine


def _nothing(collected):
    """A Collected of the same widths without images."""
    no_rows = slice(0, 0)
    return Collected(
        collected.indices[no_rows],
        Features(*(None if each is None else np.array(each[no_rows]) for each in collected.features)),
        None if collected.labels is None else collected.labels[no_rows], collected.digests[no_rows],
        {key: Moments(len(each.mean)) for key, each in collected.moments.items()}, frozenset(),
    )  # fmt: skip


def gathered(collected, ranks):
    """On rank 0 the Collected of all ranks, in the order of the images; None elsewhere. Collective."""
    parts = ranks.to_main(collected)
    if parts is None:
        return None
    order = np.argsort(np.concatenate([part.indices for part in parts]))
    if len(parts) == 1 and (np.diff(order) == 1).all():  # nothing to move: no copy of gigabytes
        return parts[0]
    moments = {key: Moments(len(each.mean)) for key, each in parts[0].moments.items()}
    for part in parts:
        for key, each in part.moments.items():
            moments[key].merge(each)
    labels = None if parts[0].labels is None else np.concatenate([part.labels for part in parts])[order]
    return Collected(
        np.concatenate([part.indices for part in parts])[order],
        Features.join([part.features for part in parts]).rows(order),
        labels,
        np.concatenate([part.digests for part in parts])[order],
        moments,
        frozenset().union(*(part.shapes for part in parts)),
    )
