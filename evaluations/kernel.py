"""Kernel inception distance: the unbiased squared maximum mean discrepancy of features, under a cubic kernel."""

import numpy as np

from evaluations.influence import ROWS, Estimate


def kid(reference, sample, degree=3):
    """The kernel distance of features [M,D] and [N,D] over all pairs of images, as an Estimate (Binkowski et al. 2018).

    The kernel is (x.y / D + 1)^degree. No pair of an image with itself counts, so the expectation is exact for any
    number of images, and negative values occur where the distributions agree. ValueError for sets of one image, or of
    different widths.
    """
    reference, sample = np.asarray(reference), np.asarray(sample)
    if min(len(reference), len(sample)) < 2:
        raise ValueError(f"kernel distance of {len(reference)} and {len(sample)} images: each set needs 2 or more")
    if reference.shape[1] != sample.shape[1]:
        widths = f"{reference.shape[1]} and of {sample.shape[1]}"
        raise ValueError(f"features of {widths} dimensions do not compare: use one extractor")
    apart = _row_means(sample, reference, degree), _row_means(reference, sample, degree)
    within = _row_means(sample, sample, degree, others=True), _row_means(reference, reference, degree, others=True)
    value = within[0].mean() + within[1].mean() - 2 * apart[0].mean()
    parts = [2 * (w - a - np.mean(w - a)) / len(w) for w, a in zip(within, apart)]
    return Estimate(float(value), *parts)


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
    columns = columns.astype(np.float64)
    means = np.empty(len(rows))
    for start in range(0, len(rows), ROWS // 4):
        block = rows[start : start + ROWS // 4].astype(np.float64)                    # [B,D]
        sums = ((block @ columns.T / columns.shape[1] + 1) ** degree).sum(axis=1)
        if others:
            sums -= (np.einsum("nd,nd->n", block, block) / columns.shape[1] + 1) ** degree
        means[start : start + ROWS // 4] = sums / (len(columns) - others)
    return means
