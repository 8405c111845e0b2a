"""Scores as pure functions of arrays: Frechet distance, inception score, precision and recall, diversity.

Every function takes features [N,D] or class probabilities [N,K] of any float type, works in float64, and raises
ValueError for arrays of the wrong shape, for values that are not finite, and for too few rows.
"""

import numpy as np
from scipy.special import entr

from evaluations import neighbours


def moments(features):
    """Mean [D] and covariance [D,D] (divisor N-1) of features [N,D], N >= 2, in float64."""
    features = _finite_matrix(features, "features", at_least=2)
    covariance = np.cov(features, rowvar=False, dtype=np.float64)
    return features.mean(axis=0, dtype=np.float64), np.atleast_2d(covariance)


def checked_moments(mu, sigma):
    """A mean [D] and a covariance [D,D] as float64 arrays; ValueError unless they have such shapes and are finite."""
    mu = np.asarray(mu, dtype=np.float64)
    sigma = _finite_matrix(np.asarray(sigma, dtype=np.float64), "sigma")
    if mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise ValueError(f"mu {list(mu.shape)} and sigma {list(sigma.shape)} must have shapes [D] and [D,D]")
    if not np.isfinite(mu).all():
        raise ValueError("mu holds NaN or infinite values")
    return mu, sigma


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).

    Means [D], covariances [D,D]. S1 S2 has the eigenvalues of the symmetric matrix R^T S2 R with R R^T = S1, so that
    two symmetric eigenvalue problems do the work of a matrix square root: real by construction, several times faster,
    and right for covariances of fewer samples than dimensions too, where the root of S1 S2 takes square roots of
    rounding noise. Rounding may leave a value just below zero for equal arguments. (FID: Heusel et al. 2017, eq. 6.)
    """
    mu1, sigma1 = checked_moments(mu1, sigma1)
    mu2, sigma2 = checked_moments(mu2, sigma2)
    if mu1.shape != mu2.shape:
        raise ValueError(f"Gaussians of {len(mu1)} and {len(mu2)} dimensions have no distance: use one extractor")
    values, vectors = np.linalg.eigh(sigma1)
    values = _without_noise(values)
    kept = values > 0
    root = vectors[:, kept] * np.sqrt(values[kept])                                   # [D,R], R the rank of sigma1
    trace_root = np.sqrt(_without_noise(np.linalg.eigvalsh(root.T @ sigma2 @ root))).sum()
    shift = mu1 - mu2
    return float(shift @ shift + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root)


def frechet_distance_from_features(features1, features2):
    """frechet_distance of the moments of two feature sets [N1,D], [N2,D], exact below full rank too.

    With F^T F = S for each set (F the centred features over sqrt(N-1)), the trace of the root is the sum of the
    singular values of F1 F2^T. That form squares nothing, so it has no noise to cut off, and it is the faster one
    when a set has no more rows than dimensions; above that the covariances are.
    """
    features1 = _finite_matrix(features1, "features", at_least=2)
    features2 = _finite_matrix(features2, "features", at_least=2)
    _check_same_width(features1, features2)
    if min(len(features1), len(features2)) > features1.shape[1]:
        return frechet_distance(*moments(features1), *moments(features2))
    mu1, factor1 = _mean_and_factor(features1)
    mu2, factor2 = _mean_and_factor(features2)
    trace_root = np.linalg.svd(factor1 @ factor2.T, compute_uv=False).sum()
    shift = mu1 - mu2
    return float(shift @ shift + np.square(factor1).sum() + np.square(factor2).sum() - 2 * trace_root)


def inception_score(probabilities, split_size=5000, splits=None, shuffle=None):
    """Mean over splits of exp(mean_i KL(p_i || mean p)), p [N,K] class probabilities (Salimans et al. 2016).

    The published protocol: consecutive splits of 5000 in the order of the rows (so the order matters), a short last
    split counting like the others.

    :param splits: so many splits of equal size, give or take a row, instead of those of split_size.
    :param shuffle: seed of an order to draw first, or None; torch-fidelity's default is splits=10, shuffle=2020.
    """
    return float(np.mean(split_scores(probabilities, split_size, splits, shuffle)))


def split_scores(probabilities, split_size=5000, splits=None, shuffle=None):
    """The inception score of each split, a list; see `inception_score`.

    The divergence is taken as entropy of the mean minus mean of the entropies, where a probability of zero adds zero.
    """
    probabilities = _finite_matrix(probabilities, "probabilities")
    if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1, dtype=np.float64) - 1).max() > 1e-3:
        raise ValueError("the rows are not probabilities (non-negative, sum 1): take the softmax of logits first")
    scores = []
    for rows in split_rows(len(probabilities), split_size, splits, shuffle):
        split = probabilities[rows].astype(np.float64)                                # [S,K]
        scores.append(float(np.exp(entr(split.mean(axis=0)).sum() - entr(split).sum(axis=1).mean())))
    return scores


def split_rows(count, split_size=5000, splits=None, shuffle=None):
    """The rows of each split of `inception_score`: slices of the file's order, or arrays of a shuffled one."""
    if split_size < 1:
        raise ValueError(f"split_size is {split_size}: it must be at least 1")
    if splits is not None and not 1 <= splits <= count:
        raise ValueError(f"splits is {splits}: it must be from 1 to the number of images, {count}")
    starts = range(0, count, split_size) if splits is None else [i * count // splits for i in range(splits)]
    slices = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], count])]
    if shuffle is None:
        return slices
    order = np.random.RandomState(shuffle).permutation(count)
    return [order[each] for each in slices]


def knn_radii(features, k=3, distances="float32"):
    """Squared Euclidean distance [N] from each row of features [N,D] to its k-th nearest other row; N > k."""
    if k < 1:
        raise ValueError(f"k is {k}: a point's nearest other point is k = 1")
    features = _finite_matrix(features, "features", at_least=k + 1, why=f"each needs {k} others as neighbours")
    return neighbours.nearest(features, features, k, distances, itself=0)[0][:, -1]


def precision_recall(reference, sample, k=3, distances="float32"):
    """Precision and recall of sample [N2,D] against reference [N1,D] (Kynkaanniemi et al. 2019): two shares in 0..1.

    Precision is the share of sample rows within a reference row's distance to its k-th nearest other row, recall the
    share of reference rows within such a distance of a sample row, rims included. See `neighbours` for the whole.
    """
    sets = []
    for features in (reference, sample):
        sets.append(_finite_matrix(features, "features", k + 1, f"each needs {k} others as neighbours"))
    _check_same_width(*sets)
    scores = neighbours.neighbourhood_scores(*sets, k, k, distances)
    return scores["precision"], scores["recall"]


def within_class_variance(features, labels):
    """Diversity inside the classes: mean over the classes of the trace of the class covariance (divisor n-1).

    Features [N,D], labels [N]; every class that occurs must occur at least twice.
    """
    features = _finite_matrix(features, "features")
    labels = _checked_labels(labels, len(features))
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(f"class {classes[counts.argmin()]} has one image: a variance needs at least 2 of each class")
    variances = [features[labels == c].var(axis=0, ddof=1, dtype=np.float64).sum() for c in classes]
    return float(np.mean(variances))


def label_agreement(probabilities, labels):
    """Share of the rows of probabilities (or logits) [N,K] whose largest entry is at the row's label, labels [N]."""
    probabilities = _finite_matrix(probabilities, "probabilities")
    labels = _checked_labels(labels, len(probabilities))
    classes = probabilities.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels {labels.min()}..{labels.max()} do not fit {classes} classes (0..{classes - 1})")
    return float((probabilities.argmax(axis=1) == labels).mean())


def _mean_and_factor(features):
    """Mean [D] and a matrix F [min(N,D),D] with F^T F the covariance of features [N,D]."""
    mu = features.mean(axis=0, dtype=np.float64)
    factor = (features - mu) / np.sqrt(len(features) - 1)
    return mu, factor if len(factor) <= factor.shape[1] else np.linalg.qr(factor, mode="r")


def _without_noise(eigenvalues):
    """Eigenvalues [D] of a covariance with those that rounding alone explains set to 0; ValueError if some are < 0."""
    largest = np.abs(eigenvalues).max(initial=0)
    if eigenvalues.min(initial=0) < -1e-6 * largest:
        raise ValueError(f"not a covariance: it has an eigenvalue of {eigenvalues.min():.3g} (largest {largest:.3g})")
    noise = np.finfo(np.float64).eps * len(eigenvalues) * largest
    return np.where(eigenvalues > noise, eigenvalues, 0)


def _finite_matrix(array, what, at_least=1, why="one image has no spread"):
    array = np.asarray(array)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{what} have shape {list(array.shape)}: expected two axes, images by values")
    if len(array) < at_least:
        raise ValueError(f"{what} of {len(array)} images, but at least {at_least} are needed: {why}")
    broken = ~np.isfinite(array).all(axis=1)
    if broken.any():
        raise ValueError(f"{what} hold NaN or infinite values in {broken.sum()} rows (first: {broken.argmax()})")
    return array


def _check_same_width(features1, features2):
    if features1.shape[1] != features2.shape[1]:
        raise ValueError(
            f"features of {features1.shape[1]} and of {features2.shape[1]} dimensions do not compare: use one extractor"
        )


def _checked_labels(labels, count):
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype} of shape {list(labels.shape)}: expected {count} whole numbers")
    return labels
