"""What each image adds to a score: the first-order influence of every sample and every reference image.

An `Estimate` holds a score and, for each image, its part of the score's deviation from what endless data would give:
without the image the score would be lower by about that part. The variance of the score is the sum of their squares,
so they are all that standard errors, intervals and paired differences need (evaluations/intervals.py), and the largest
parts name the images that hurt most. (Infinitesimal jackknife: Jaeckel 1972; Serfling 1980, chapter 6.)
"""

from typing import NamedTuple

import numpy as np
from scipy.special import chdtr, rel_entr

from evaluations import metrics

ROWS = 4096  # of features that are worked on at once


class Estimate(NamedTuple):
    """A score and the parts that its images have in it, float64; their squares add up to its variance.

    bias is what finite sets of these sizes add to the score on average; bounds are the values that it can have.
    """

    value: float
    sample: np.ndarray  # [N], sum 0; or of random halves of the samples (evaluations/halves.py)
    reference: np.ndarray | None = None  # [M], or of halves; None: it is fixed, not a sample of anything
    bias: float = 0.0
    bounds: tuple = (0.0, np.inf)


def strata(labels):
    """Labels [N] as strata, 0 .. C-1, if the classes have more even counts than chance would leave them; else None.

    Classes drawn in turn, or a data set with as many images of each, have counts by design; the error is then that
    within the classes only. By the lower hundredth of chi-square, for two classes or more of two images or more.
    """
    if labels is None:
        return None
    classes, strata, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        return None
    even = len(strata) / len(classes)
    return strata if chdtr(len(classes) - 1, np.square(counts - even).sum() / even) < 0.01 else None


def members(strata):
    """The rows of each stratum, ascending."""
    return np.split(np.argsort(strata, kind="stable"), np.cumsum(np.bincount(strata))[:-1])


def within(parts, strata):
    """Parts [N] of images whose counts in each stratum are fixed: less its mean, for one degree of freedom fewer."""
    if strata is None or len(strata) != len(parts):
        return parts
    counts = np.bincount(strata)
    means = np.bincount(strata, parts) / counts
    return (parts - means[strata]) * np.sqrt(counts / (counts - 1))[strata]


def frechet(reference, sample, fixed=None, strata=(None, None)):
    """The squared Frechet distance of features [M,D] and [N,D] as an Estimate; its value is metrics.frechet_distance.

    With S1 the covariance of the one set, S2 of the other, and T = S1^(-1/2) (S1^(1/2) S2 S1^(1/2))^(1/2) S1^(-1/2)
    the optimal map between the Gaussians, the influence of x is 2 (m1 - m2)'(x - m1) + (x - m1)'(I - T)(x - m1), less
    its mean. The bias is the second-order term of the same expansion, half the mean over the images of the second
    derivative in the direction of each; unlike extrapolation from halves it needs no seed and adds no noise.

    :param fixed: (mean [D], covariance [D,D]) that stand for the reference and are exact; its features are not used.
    :param strata: of the reference [M] and of the sample [N], or None; within them both parts and bias are taken.
    """
    m2, s2 = metrics.moments(sample)
    m1, s1 = metrics.moments(reference) if fixed is None else metrics.checked_moments(*fixed)
    if m1.shape != m2.shape:
        raise ValueError(f"features of {len(m1)} and of {len(m2)} dimensions do not compare: use one extractor")
    values, vectors = np.linalg.eigh(s1)
    values = metrics._without_noise(values)
    root = vectors[:, values > 0] * np.sqrt(values[values > 0])                       # [D,R]: s1 = root root'
    squares, vectors = np.linalg.eigh(root.T @ s2 @ root)
    squares = metrics._without_noise(squares)
    kept = squares > 0
    scale = np.sqrt(squares[kept])                                                    # [K]; sum: trace of the root
    shift = m2 - m1
    value = float(shift @ shift + np.trace(s1) + np.trace(s2) - 2 * scale.sum())
    to_reference = root @ vectors[:, kept]                       # [D,K] = B, with B' s2 B = diag(scale^2)
    parts, bias = _frechet_parts(sample, m2, shift, to_reference, scale, strata[1])
    if fixed is not None:
        return Estimate(value, parts, None, bias)
    to_sample = s2 @ to_reference / scale                        # [D,K]: the same with the sets exchanged
    of_reference, more = _frechet_parts(reference, m1, -shift, to_sample, scale, strata[0])
    return Estimate(value, parts, of_reference, bias + more)


def _frechet_parts(features, mean, shift, basis, scale, strata=None):
    """(parts [N], bias) of one of two sets; T = basis diag(1 / scale) basis', shift leads from the other's mean."""
    curvature = 1 / (np.multiply.outer(scale, scale) * np.add.outer(scale, scale))    # of -tr (.)^(1/2), times 2
    first, second, count = np.empty(len(features)), np.empty(len(features)), len(features)
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        y = np.asarray(features[rows], np.float64) - mean                             # [B,D]
        squares, lengths = np.square(y @ basis), np.einsum("nd,nd->n", y, y)          # [B,K] of mean scale^2, [B]
        stretched = squares @ (1 / scale)
        first[rows] = 2 * y @ shift + lengths - stretched
        second[rows] = lengths + np.einsum("nk,nk->n", squares @ curvature, squares) / 2
        second[rows] += scale.sum() / 4 - stretched / 2
    parts = within((first - first.mean()) / count, strata)
    if strata is None:
        return parts, second.mean() / count
    sums = [_within_second(features[rows], second[rows], mean, basis, scale, curvature) for rows in members(strata)]
    return parts, sum(sums) / count**2


def _within_second(features, second, mean, basis, scale, curvature):
    """Sum of the second-order terms [n] of a stratum, less those of its mean: what its own spread adds to the bias."""
    y, count = np.asarray(features, np.float64) - mean, len(second)                   # [n,D]
    z, centre = y @ basis, y.mean(axis=0)                                             # [n,K], [D]
    tilt = z.T @ z / count - np.diag(np.square(scale))                                # [K,K]
    of_mean = centre @ centre + np.einsum("ij,ij->", np.square(tilt), curvature) / 2
    return count / (count - 1) * (second.sum() - count * of_mean)


def inception_score(probabilities, split_size=5000, splits=None, shuffle=None, strata=None):
    """metrics.inception_score of probabilities [N,K], by those splits and that order, as an Estimate.

    The logarithm of a split's score is the mean of KL(p_i || mean p), which to first order does not change with
    `mean p`, so an image's part is its own divergence less the mean. The expected score depends on split_size: no bias
    is taken off, and an interval is for the score by that protocol. strata: of the images, as `strata` finds them.
    """
    scores = metrics.split_scores(probabilities, split_size, splits, shuffle)
    value, parts = float(np.mean(scores)), np.empty(len(probabilities))
    for rows, score in zip(metrics.split_rows(len(probabilities), split_size, splits, shuffle), scores):
        p = np.asarray(probabilities[rows], np.float64)                               # [S,K]
        divergence = rel_entr(p, p.mean(axis=0)).sum(axis=1)
        parts[rows] = score * (divergence - divergence.mean()) / (len(p) * len(scores))
    return Estimate(value, within(parts, strata), bounds=(1.0, float(probabilities.shape[1])))


def share(hits, strata=None):
    """The share of true values in hits [N] as an Estimate: images are independent trials."""
    hits = np.asarray(hits, np.float64)
    return Estimate(float(hits.mean()), within((hits - hits.mean()) / len(hits), strata), bounds=(0.0, 1.0))


def within_class_variance(features, labels):
    """metrics.within_class_variance of features [N,D] with labels [N] as an Estimate.

    Classes count alike, whatever their sizes, so an image's part is its squared distance from the mean of its class,
    less that class's variance, over the numbers of its images and of classes.
    """
    value, rows = metrics.within_class_variance(features, labels), members(np.unique(labels, return_inverse=True)[1])
    parts = np.empty(len(features))
    for mine in rows:
        x = np.asarray(features[mine], np.float64)
        squares = np.square(x - x.mean(axis=0)).sum(axis=1)
        parts[mine] = (squares - squares.mean()) / (len(mine) * len(rows))
    return Estimate(value, parts)
