"""What a judge, a classifier that took no part in the sampling, says of samples that were asked to be of a class."""

import numpy as np

from evaluations import metrics
from evaluations.evaluator import evaluate


def judged(reference, sample, judge):
    """
    The scores of `evaluate` for the npz `sample` against `reference`, and `spread`: the variance of features within
    the classes, averaged over them.

    The classes of the spread are those that the judge sees, not those asked for, lest obedience look like lost
    diversity. :param judge: an extractor.
    """
    scores = evaluate(str(reference), str(sample), judge)
    with np.load(sample, allow_pickle=False) as npz:
        features = judge(npz["arr_0"])
    seen = features.probabilities.argmax(1)
    several = np.bincount(seen)[seen] > 1
    return {"spread": metrics.within_class_variance(features.pool[several], seen[several]), **scores}


def mean_and_error(values):
    """The mean of runs that differ in their seed alone, and its standard error; of a single one, an error of nan."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)
