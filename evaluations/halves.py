"""Errors and limits from random halves of a set, where a formula for each image's part is missing or wants a check."""

import numpy as np

from evaluations import metrics
from evaluations.influence import share, within
from evaluations.neighbours import nearest

SPLITS = 32  # of a manifold's error, which is then known to about 1/8 of itself
BLOCK_ENTRIES = 2**23  # of a block of distances: 64 MB in float64
LISTED = 12  # neighbours kept for each order k: a half has k of the 12 k nearest but for one case in billions


def precision_recall(reference, sample, k=3, seed=0, splits=SPLITS, strata=(None, None)):
    """metrics.precision_recall of features [M,D] and [N,D] as two Estimates.

    For precision the samples are trials, and the reference makes the manifold. The influence of one point on a manifold
    of nearest neighbours is no guide to its variance (leaving out one image at a time overstates the error twofold), so
    that part comes from halves: the difference of the shares inside the manifolds of two disjoint random halves has
    four times the variance in question, and the mean of its square over the splits is taken. Recall is the same with
    the sets exchanged. With fewer than 2k + 2 centres that part is nan.

    :param strata: of the reference [M] and of the sample [N], as influence.strata finds them, or None; halves then take
        half of each.
    """
    inside, manifold = _cover(reference, sample, k, seed, splits, strata)
    precision = share(inside, strata[1])._replace(reference=manifold)
    inside, manifold = _cover(sample, reference, k, seed + 1, splits, strata[::-1])
    trials = share(inside, strata[0])
    return precision, trials._replace(sample=manifold, reference=trials.sample)


def fid_infinity(reference, sample, seed=0, splits=2, fixed=None, strata=(None, None)):
    """The Frechet distance of endless sets, extrapolated from features [M,D], [N,D] and their halves, as a dict.

    2 FD(all) - mean FD(halves), over `splits` random splits of both sets into two: exact if the bias falls as 1/N
    (Chong and Forsyth 2020 take more sizes and draws). fixed: moments (mean, covariance) that stand for the reference.
    """
    rng, halves = np.random.default_rng(seed), []
    whole = _distance(reference, sample, fixed)
    for _ in range(splits):
        mine = in_halves(len(sample), rng, strata[1])
        theirs = None if fixed else in_halves(len(reference), rng, strata[0])
        for half in (False, True):
            halves.append(_distance(None if fixed else reference[theirs == half], sample[mine == half], fixed))
    return {"value": 2 * whole - float(np.mean(halves)), "seed": seed, "splits": splits}


def in_halves(count, rng, strata=None):
    """Which of `count` images are in the first of two random halves, bool [count]; half of each stratum, if given."""
    order = np.lexsort((rng.random(count), np.zeros(count) if strata is None else strata))
    side = np.empty(count, bool)
    side[order] = np.arange(count) % 2 == 0
    return side


def _distance(reference, sample, fixed):
    if fixed is None:
        return metrics.frechet_distance_from_features(reference, sample)
    return metrics.frechet_distance(*fixed, *metrics.moments(sample))


def _cover(centres, points, k, seed, splits, strata=(None, None)):
    """(which of the points [N] lie in a ball of a centre [M], contrasts [splits] whose squares add up to the variance
    that the centres cause in their share)."""
    if k < 1 or len(centres) < k + 1:
        raise ValueError(f"neighbours of order {k} among {len(centres)} images: give more images")
    distances, owners = nearest(centres, centres, min(len(centres) - 1, LISTED * k), itself=0)
    rng = np.random.default_rng(seed)
    side = np.stack([in_halves(len(centres), rng, strata[0]) for _ in range(splits)])  # [splits,M]
    of_half = np.stack([_radii_of_halves(distances, owners, each, k) for each in side])
    radii, widest = distances[:, k - 1], of_half.max(axis=0)
    inside, in_half = np.zeros(len(points), bool), np.zeros((2, splits, len(points)), bool)
    for rows, block in _squared_distances(points, centres):                   # [B,M]
        inside[rows] = (block <= radii).any(axis=1)
        row, centre = np.nonzero(block <= widest)
        near, row = block[row, centre], row + rows.start
        for split in range(splits):
            hit = near <= of_half[split, centre]
            for half in (0, 1):
                in_half[half, split, row[hit & (side[split, centre] == half)]] = True
    if len(centres) < 2 * k + 2:
        return inside, np.full(splits, np.nan)
    contrast = in_half[1].astype(float) - in_half[0]                                  # [splits,N]
    parts = contrast.mean(axis=1) / (2 * np.sqrt(splits))
    # The points are finite too, and vary the contrast; that part is known, and is the trials', not the manifold's.
    noise = [np.square(within((each - each.mean()) / len(points), strata[1])).sum() for each in contrast]
    excess, total = np.mean(noise) / 4, np.square(parts).sum()
    return inside, parts * np.sqrt(max(0.0, 1 - excess / total)) if total else parts


def _radii_of_halves(distances, owners, side, k):
    """Squared distance [M] of each centre to the k-th nearest other one of its own half, side [M], by lists [M,L]."""
    enough = (side[owners] == side[:, None]).cumsum(axis=1, dtype=np.int16) >= k      # [M,L]
    return np.where(enough[:, -1], distances[np.arange(len(side)), enough.argmax(axis=1)], distances[:, -1])


def _squared_distances(rows, columns):
    """Yields (slice of the rows, their squared distances [B,M] to all columns), in blocks of bounded memory.

    float64, since |u|^2 - 2uv + |v|^2 cancels. What lies below the rounding error of that sum is zero: duplicates
    are at distance 0 exactly, so that a ball of radius 0 still holds them.
    """
    rows, columns = rows.astype(np.float64, copy=False), columns.astype(np.float64, copy=False)
    row_norms, column_norms = (np.einsum("nd,nd->n", x, x) for x in (rows, columns))
    resolution = np.finfo(np.float64).eps * (rows.shape[1] + 4)
    step = max(1, BLOCK_ENTRIES // len(columns))
    for start in range(0, len(rows), step):
        block = slice(start, min(start + step, len(rows)))
        norms = row_norms[block, None] + column_norms                                 # [B,M]
        distances = norms - 2 * (rows[block] @ columns.T)
        distances[distances <= resolution * norms] = 0
        yield block, distances
