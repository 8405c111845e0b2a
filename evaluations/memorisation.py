"""Do samples repeat training images, or one another? Nearest neighbours, with real images as the measure of near.

A sample copies if it lies closer to a training image than that one's own nearest other training image does (Alaa et al.
2022 call samples for which this fails authentic). Held-out real images pass or fail the same test, and say how many
would by chance.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from evaluations import influence, intervals
from evaluations.nearest import nearest

REAL_QUANTILE = 0.01  # of the distances among real images: what is closer counts as a repetition


class Neighbours(NamedTuple):
    """Of N samples: the distance to the K nearest training images [N,K], whose they are [N,K], and the ratio [N] of the
    first to that training image's own distance to its nearest other; below 1 the sample is suspect, 0 is a copy."""

    distances: np.ndarray
    owners: np.ndarray
    ratios: np.ndarray

    def closest(self, count):
        """The samples of the smallest ratios, smallest first."""
        return np.argsort(self.ratios, kind="stable")[:count]


def neighbours(training, sample, k=3):
    """The Neighbours of sample features [N,D] among training features [M,D], M >= 2; Euclidean distances."""
    if len(training) < 2:
        raise ValueError(f"{len(training)} training images: their distances among one another need 2 or more")
    squares, owners = nearest(sample, training, k)
    known = np.unique(owners[:, 0])
    own = np.empty(len(training))
    own[known] = np.sqrt(nearest(training[known], training, 2)[0][:, 1])  # the first is itself, or one just like it
    distances, own = np.sqrt(squares), own[owners[:, 0]]
    ratios = np.divide(distances[:, 0], own, out=np.where(distances[:, 0] > 0, np.inf, 0.0), where=own > 0)
    return Neighbours(distances, owners, ratios)


def repeated_pixels(images, others=None):
    """Groups of rows of images [N,...] whose pixels are the same: lists of two rows or more. With others [M,...]: the
    pairs (row, row of others), the first of several."""
    if others is None:
        rows = {}
        for row, digest in enumerate(map(_digest, images)):
            rows.setdefault(digest, []).append(row)
        return [group for group in rows.values() if len(group) > 1]
    known = {digest: row for row, digest in reversed(list(enumerate(map(_digest, others))))}
    return [(row, known[digest]) for row, digest in enumerate(map(_digest, images)) if digest in known]


def repetitions(training, sample, seed=0):
    """(which samples [n] are closer to another one than all but 1 % of real images are to another, the closest pairs).

    Distances among fewer images are larger, so as many of both sets are looked at, drawn at random from the larger.
    The pairs are rows (i, j) of the samples, closest first, one for each image that is too close to another.
    """
    count, rng = min(len(training), len(sample)), np.random.default_rng(seed)
    real, drawn = (np.sort(rng.permutation(len(each))[:count]) for each in (training, sample))
    if count < 2:
        raise ValueError(f"{count} images have no distances among one another: give 2 or more of both sets")
    among_real = nearest(training[real], training[real], 1, itself=0)[0][:, 0]
    among_samples, owners = nearest(sample[drawn], sample[drawn], 1, itself=0)
    close = among_samples[:, 0] < np.quantile(among_real, REAL_QUANTILE)
    close |= (among_samples[:, 0] == 0) & (np.quantile(among_real, REAL_QUANTILE) == 0)
    order = np.flatnonzero(close)[np.argsort(among_samples[close, 0], kind="stable")]
    pairs = {tuple(sorted((drawn[i], drawn[owners[i, 0]]))): None for i in order}
    return close, [tuple(map(int, pair)) for pair in pairs]


def summary(training, sample, images=None, training_images=None, held_out=None):
    """What a report says, of features (training [M,D], sample [N,D], held-out real ones or None) and their images.

    Returns a dict of json's types: samples, training, copies (share of samples with a ratio below 1, standard error and
    interval; of the held-out images too), closest (the ten smallest ratios: sample, training image, ratio), repetitions
    (share, expected, pairs), and with images the exact copies: same_pixels (among samples), copied_pixels.
    """
    found = neighbours(training, sample)
    close, pairs = repetitions(training, sample)
    told = {
        "samples": len(sample),
        "training": len(training),
        "copies": _share(found.ratios < 1),
        "closest": [{"sample": int(i), "training": int(found.owners[i, 0]), "ratio": float(found.ratios[i])}
                    for i in found.closest(10)],
        "repetitions": {**_share(close), "expected": REAL_QUANTILE, "pairs": pairs[:10]},
    }  # fmt: skip
    if held_out is not None:
        told["copies_held_out"] = _share(neighbours(training, held_out).ratios < 1)
    if images is not None:
        told["same_pixels"] = repeated_pixels(images)
    if images is not None and training_images is not None:
        told["copied_pixels"] = repeated_pixels(images, training_images)
    return told


def _share(hits):
    found = influence.share(hits)
    return {"share": found.value, "standard_error": intervals.standard_error(found),
            "interval": list(intervals.interval(found))}  # fmt: skip


def _digest(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
