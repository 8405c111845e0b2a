"""What a judge, a classifier that took no part in the sampling, says of samples that were asked to be of a class."""

import numpy as np

from evaluations import errors, influence
from evaluations.evaluator import evaluate


def judged(reference, sample, judge, parts=None):
    """
    The scores of `evaluate` for the npz `sample` against `reference`, with their errors, and `spread`: the variance of
    features within the classes, averaged over them.

    The classes of the spread are those that the judge sees, not those asked for, lest obedience look like lost
    diversity. :param judge: an extractor. :param parts: as `evaluate` takes it.
    """
    parts = {} if parts is None else parts
    scores = evaluate(str(reference), str(sample), judge, parts=parts)
    with np.load(sample, allow_pickle=False) as npz:
        features = judge(npz["arr_0"])
    seen = features.probabilities.argmax(1)
    several = np.flatnonzero(np.bincount(seen)[seen] > 1)
    found = influence.within_class_variance(features.pool[several], seen[several])
    part = np.zeros(len(seen))
    part[several] = found.sample
    parts["spread"] = found._replace(sample=part)
    for key, each in errors.described({"spread": parts["spread"]}).items():
        scores[key] |= each
    return {**scores, "spread": found.value}
