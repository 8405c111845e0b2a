"""The errors of all scores of one evaluation, from the features of its two sets."""

import json
import math
from pathlib import Path

import numpy as np

from evaluations import halves, influence, intervals, kernel
from evaluations.influence import Estimate


def estimates(reference, sample, *, labels=None, fixed=None, k=3, seed=0, classes=(None, None), **splits):
    """{score: Estimate} of two Features: inception_score, fid, sfid, kid, precision, recall, label_agreement.

    A score that the features or labels [N] do not allow is left out; without reference (None) all that need its images.

    :param fixed: {"fid": (mean, covariance), "sfid": ...}: stored moments of the reference, which count as exact. The
        reference images of the other scores are a sample always, and their error counts.
    :param k: of the protocol, neighbours of precision and recall.
    :param splits: as metrics.inception_score takes them.
    :param seed: of the random halves that the errors of precision and recall take.
    :param classes: labels of the reference [M] and of the sample [N], or None. Where their counts are more even than
        chance leaves them they count as fixed, and errors and bias are those within the classes (influence.strata).
    """
    fixed, strata = fixed or {}, strata_of((reference, sample), classes)
    found = {}
    if sample.probabilities is not None:
        found["inception_score"] = influence.inception_score(sample.probabilities, **splits, strata=strata[1])
    for name, what in (("fid", "pool"), ("sfid", "spatial")):
        both = [None if each is None else getattr(each, what) for each in (reference, sample)]
        if both[1] is not None and (name in fixed or (both[0] is not None and not fixed)):
            found[name] = influence.frechet(*both, fixed.get(name), strata)
    if reference is not None:
        pools = reference.pool, sample.pool
        found["kid"] = kernel.kid(*pools, strata=strata)
        found["precision"], found["recall"] = halves.precision_recall(*pools, k, seed, strata=strata)
    if labels is not None and sample.probabilities is not None:
        hits = sample.probabilities.argmax(axis=1) == np.asarray(labels)
        found["label_agreement"] = influence.share(hits, strata[1])
    return found


def described(found):
    """What a result says of its errors, from estimates: standard_errors, intervals (95 %, bias taken off), bias,
    error_sources (from samples, from reference), each {score: ...} of numbers that json knows (None for unknown)."""
    return {
        "standard_errors": {name: _known(intervals.standard_error(each)) for name, each in found.items()},
        "intervals": {name: list(map(_known, intervals.interval(each))) for name, each in found.items()},
        "bias": {name: float(each.bias) for name, each in found.items()},
        "error_sources": {
            name: dict(zip(("sample", "reference"), map(_known, intervals.errors_by_source(each))))
            for name, each in found.items()
        },
    }


def errors_of(reference, sample, *, fixed=None, seed=0, classes=(None, None), parts=None, leave=(), **how):
    """The errors in a result: `described(estimates(...))`; fid_infinity, the Frechet distance extrapolated from halves
    with that seed; fixed_classes, whether the counts of the classes of each set count as fixed.

    :param parts: a dict that receives the estimates.
    :param leave: scores to leave out, since their values are not of these features.
    :param how: what else `estimates` takes.
    """
    found = estimates(reference, sample, fixed=fixed, seed=seed, classes=classes, **how)
    found = {name: each for name, each in found.items() if name not in leave}
    if parts is not None:
        parts.update(found)
    strata = strata_of((reference, sample), classes)
    return {
        **described(found),
        "fid_infinity": infinity(reference, sample, found, fixed, seed, strata),
        "fixed_classes": {what: each is not None for what, each in zip(("reference", "sample"), strata)},
    }


def strata_of(features, classes):
    """influence.strata of the labels of each of some Features; None for labels that are not of as many images."""
    fits = [each is not None and labels is not None and np.shape(labels) == (len(each.pool),)
            for each, labels in zip(features, classes)]  # fmt: skip
    return tuple(influence.strata(labels) if fit else None for labels, fit in zip(classes, fits))


def infinity(reference, sample, found, fixed=None, seed=0, strata=(None, None)):
    """halves.fid_infinity of two Features with the standard error of fid; None for sets too small to halve."""
    fixed = (fixed or {}).get("fid")
    if "fid" not in found or len(sample.pool) < 4 or (fixed is None and len(reference.pool) < 4):
        return None
    pool = None if reference is None else reference.pool
    limit = halves.fid_infinity(pool, sample.pool, seed, fixed=fixed, strata=strata)
    return limit | {"standard_error": _known(intervals.standard_error(found["fid"]))}


def parts_path(path):
    """Where the estimates lie that belong to a result: beside NAME.json, NAME.parts.npz."""
    return Path(path).with_suffix(".parts.npz")


def save(file, found):
    """Write {score: Estimate} to a file or path as npz: NAME.sample, NAME.reference, NAME.about."""
    arrays = {}
    for name, each in found.items():
        arrays[f"{name}.about"] = np.array([each.value, each.bias, *each.bounds])
        arrays[f"{name}.sample"] = each.sample
        if each.reference is not None:
            arrays[f"{name}.reference"] = each.reference
    np.savez_compressed(file, **arrays)


def load(path):
    """{score: Estimate} that `save` wrote. ValueError for a file of other things."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            names = [key.removesuffix(".about") for key in npz.files if key.endswith(".about")]
            found = {}
            for name in names:
                value, bias, low, high = npz[f"{name}.about"].tolist()
                reference = npz[f"{name}.reference"] if f"{name}.reference" in npz.files else None
                found[name] = Estimate(value, npz[f"{name}.sample"], reference, bias, (low, high))
            return found
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} does not hold the errors of scores ({error}): evaluate with --out again") from error


def to_json(value):
    """Text of a result, with null for what is not finite (json has no nan)."""
    return json.dumps(value, indent=2, default=str, allow_nan=False)


def _known(number):
    return float(number) if math.isfinite(number) else None
