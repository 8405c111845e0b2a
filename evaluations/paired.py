"""Differences between arms of a study that were run with the same seeds: paired, with Student's t intervals."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from evaluations import intervals

LEVEL = 0.95


class Paired(NamedTuple):
    """The mean of n numbers, its standard error, and the interval that holds the true mean with probability LEVEL; nan
    where one number alone tells of neither."""

    mean: float
    standard_error: float
    interval: tuple
    count: int

    @property
    def apart(self):
        """
        Whether the interval leaves out 0, so that an effect may be claimed. Never without spread: numbers that are
        equal to the last digit come of scores with few values, as shares of a few images, and not of certainty.
        """
        low, high = self.interval
        return self.standard_error > 0 and (low > 0 or high < 0)


def mean(values):
    """
    Mean of independent numbers of one normal distribution: standard error s/sqrt(n), interval by Student's t with n-1
    degrees of freedom (Student 1908). With one number there is neither. Raises ValueError for none at all.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("there is no mean of no numbers")
    centre, error = float(values.mean()), math.nan
    if len(values) > 1:
        error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = quantile(len(values) - 1) * error
    return Paired(centre, error, (centre - half, centre + half), len(values))


def difference(arm, base):
    """
    What an arm has more than the base, seed by seed: {seed: value} twice -> Paired of arm - base over the seeds that
    both have, or None if there is none. What a seed does to both alike (its data order, its noise) cancels.
    """
    seeds = [seed for seed in base if seed in arm]
    return mean([arm[seed] - base[seed] for seed in seeds]) if seeds else None


def quantile(freedom, level=LEVEL):
    """t such that Student's distribution has `level` between -t and t; nan for no degrees of freedom."""
    return float(stdtrit(freedom, 0.5 + level / 2)) if freedom > 0 else math.nan


def plain(each):
    """A Paired as json has it: nan becomes None."""
    low, high = each.interval
    numbers = {"value": each.mean, "standard_error": each.standard_error, "low": low, "high": high}
    return {**{key: None if math.isnan(x) else x for key, x in numbers.items()}, "seeds": each.count,
            "apart": each.apart}  # fmt: skip


def texts(each):
    """(value ± standard error, interval) of a plain Paired as texts; "-" where there is none."""
    if not each:
        return "-", "-"
    error = each["standard_error"]
    ends = "-" if each["low"] is None else intervals.shown_interval(each["low"], each["high"], error)
    return intervals.shown(each["value"], error), ends
