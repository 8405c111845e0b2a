"""Scores of each class by itself, where both sets have labels."""

import numpy as np

from evaluations import errors, halves, influence, kernel

LEAST = 5  # images of a class in each set, for its distances


def per_class(reference, sample, reference_labels, sample_labels, k=3, agreement=True):
    """{class: {images, reference_images, and each score: {value, standard_error, interval, bias}}}, classes ascending.

    Of two Features with labels [M] and [N]: label_agreement; fid and kid of the class against the same class of the
    reference; precision and recall, where each set has more than k of it. So few images leave a large bias in fid,
    which the interval takes off and which differs by class: compare kid, which has none, or the intervals. Scores that
    a class has too few images for are left out. ValueError for labels that do not fit.

    :param agreement: whether the network's classes are those of the labels.
    """
    of_reference = _checked("reference", reference_labels, reference)
    of_sample, told = _checked("sample", sample_labels, sample), {}
    for c in np.unique(of_sample).tolist():
        theirs, mine = np.flatnonzero(of_reference == c), np.flatnonzero(of_sample == c)
        x, y, found = sample.pool[mine], reference.pool[theirs], {}
        if agreement:
            found["label_agreement"] = influence.share(sample.probabilities[mine].argmax(axis=1) == c)
        if min(len(x), len(y)) >= LEAST:
            found["fid"], found["kid"] = influence.frechet(y, x), kernel.kid(y, x)
        if min(len(x), len(y)) > k:
            found["precision"], found["recall"] = halves.precision_recall(y, x, k)
        about, scores = errors.described(found), {}
        for name, each in found.items():
            scores[name] = {"value": each.value, "standard_error": about["standard_errors"][name],
                            "interval": about["intervals"][name], "bias": each.bias}  # fmt: skip
        told[c] = {"images": len(mine), "reference_images": len(theirs), **scores}
    return told


def no_labels(what):
    """The error of a set without labels."""
    return ValueError(f"the {what} has no labels (arr_1), and scores of each class need them in both sets")


def _checked(what, labels, features):
    if labels is None:
        raise no_labels(what)
    labels = np.asarray(labels)
    if labels.shape != (len(features.pool),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"the labels of the {what} are {labels.dtype} of shape {list(labels.shape)}: expected {len(features.pool)} "
            "whole numbers"
        )
    return labels
