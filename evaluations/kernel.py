"""Kernel inception distance: the unbiased squared maximum mean discrepancy of features, under a cubic kernel."""

import numpy as np

from evaluations.influence import ROWS, Estimate, members, within


def kid(reference, sample, degree=3, strata=(None, None)):
    """The kernel distance of features [M,D] and [N,D] over all pairs of images, as an Estimate (Binkowski et al. 2018).

    The kernel is (x.y / D + 1)^degree. No pair of an image with itself counts, so the expectation is exact for any
    number of independent images, and negative values occur where the distributions agree. Where the counts of classes
    are fixed, pairs of one class are rarer than among independent images, and the value is too small by its bias, which
    is known exactly. ValueError for sets of one image, or of different widths.

    :param strata: of the reference [M] and of the sample [N], as influence.strata finds them, or None.
    """
    reference, sample = np.asarray(reference), np.asarray(sample)
    if min(len(reference), len(sample)) < 2:
        raise ValueError(f"kernel distance of {len(reference)} and {len(sample)} images: each set needs 2 or more")
    if reference.shape[1] != sample.shape[1]:
        widths = f"{reference.shape[1]} and of {sample.shape[1]}"
        raise ValueError(f"features of {widths} dimensions do not compare: use one extractor")
    apart = _row_means(sample, reference, degree), _row_means(reference, sample, degree)
    among = _row_means(sample, sample, degree, others=True), _row_means(reference, reference, degree, others=True)
    value = among[0].mean() + among[1].mean() - 2 * apart[0].mean()
    parts = [2 * (near - far - np.mean(near - far)) / len(near) for near, far in zip(among, apart)]
    sides = list(zip((sample, reference), among, parts, strata[::-1]))
    bias = sum(_missing_pairs(features, means.mean(), each, degree) for features, means, _, each in sides)
    return Estimate(float(value), *(within(part, each) for _, _, part, each in sides), bias)


def _missing_pairs(features, mean, strata, degree):
    """What fixed counts of strata add to `mean`, the kernel's over all pairs: (mean - that over pairs of one stratum) /
    N, where endless draws of these shares would have none of it."""
    if strata is None:
        return 0.0
    own = [_row_means(features[rows], features[rows], degree, others=True).sum() for rows in members(strata)]
    return float(mean - sum(own) / len(features)) / len(features)


def kid_of_subsets(reference, sample, subsets=100, size=1000, seed=2020, degree=3):
    """(mean, standard deviation) of the kernel distance of random subsets, as torch-fidelity reports it.

    The deviation is that of subsets, not the error of the mean. ValueError for sets smaller than a subset.
    """
    if min(len(reference), len(sample)) < size:
        raise ValueError(f"subsets of {size} of {len(reference)} and {len(sample)} images: give a smaller size")
    rng, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        chosen = [features[rng.choice(len(features), size, replace=False)] for features in (sample, reference)]
        found.append(kid(chosen[1], chosen[0], degree).value)
    return float(np.mean(found)), float(np.std(found))


def _row_means(rows, columns, degree, others=False):
    """Mean of the kernel of each row [N,D] with all columns [M,D], or with all others if these are the rows: [N]."""
    sums, width, step = np.zeros(len(rows)), rows.shape[1], ROWS // 2
    for start in range(0, len(rows), step):
        block = rows[start : start + step].astype(np.float64)                         # [B,D]
        for first in range(0, len(columns), step):
            products = block @ columns[first : first + step].T.astype(np.float64)     # [B,C]
            sums[start : start + step] += ((products / width + 1) ** degree).sum(axis=1)
        if others:
            sums[start : start + step] -= (np.einsum("nd,nd->n", block, block) / width + 1) ** degree
    return sums / (len(columns) - others)
