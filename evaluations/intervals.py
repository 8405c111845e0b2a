"""Standard errors, intervals and paired differences of Estimates, and numbers shown to the digits that they support."""

import math
from typing import NamedTuple

import numpy as np

from evaluations.influence import Estimate

Z = 1.959963984540054  # two-sided 95 % of a normal distribution


class Difference(NamedTuple):
    """What one run has more than another of a score: bias taken off, standard error, 95 % interval, and whether the
    images of the two were compared pair by pair."""

    value: float
    standard_error: float
    interval: tuple
    paired: bool


def standard_error(estimate):
    """The standard error of an Estimate, from samples and reference together; nan where it is not known."""
    return math.hypot(*errors_by_source(estimate))


def errors_by_source(estimate):
    """The standard errors (from the samples, from the reference; 0 for a fixed one)."""
    sample, reference = estimate.sample, estimate.reference
    return _length(sample), 0.0 if reference is None else _length(reference)


def interval(estimate):
    """The 95 % interval (low, high) of an Estimate's limit for endless sets, within the bounds of the score.

    For a share it is Wilson's (1927), for as many trials as would give its standard error, so that 0 or 100 % of a few
    images claim no certainty. For the others it is the value less its bias, give and take 1.96 standard errors, counted
    from the bound where that value lies beyond one. Where two sets hardly differ the first-order errors overstate those
    of distances, by up to sqrt(2).
    """
    error = standard_error(estimate)
    if tuple(estimate.bounds) == (0.0, 1.0):
        return _wilson(estimate.value, error, len(estimate.sample if estimate.reference is None else _longer(estimate)))
    if math.isnan(error):
        return math.nan, math.nan
    low, high = estimate.bounds
    centre = min(max(estimate.value - estimate.bias, low), high)
    return float(max(centre - Z * error, low)), float(min(centre + Z * error, high))


def share(p, trials):
    """Wilson's 95 % interval of a share p of so many independent trials."""
    return _wilson(p, 0.0, trials)


def mean(runs):
    """The mean of one score's Estimates in runs of their own samples against one reference, as an Estimate.

    What their samples add is independent, what the reference adds is common; with several runs it is known as well as
    with one, unlike the spread of a few runs, which tells little of itself.
    """
    samples = np.concatenate([each.sample for each in runs]) / len(runs)
    references = [each.reference for each in runs if each.reference is not None]
    if references and len({len(parts) for parts in references}) > 1:
        raise ValueError("runs against references of unlike sizes have no common mean: use one reference")
    reference = np.mean(references, axis=0) if references else None
    value, bias = (float(np.mean([getattr(each, name) for each in runs])) for name in ("value", "bias"))
    return Estimate(value, samples, reference, bias, runs[0].bounds)


def difference(first, second):
    """first - second, two Estimates of one score against the same reference, as a Difference.

    Sets of as many images are taken pair by pair: what image i of both has in common (its seed) cancels. If they have
    nothing in common, that is as right as adding the squares. The reference's part is common to both always.
    """
    paired = first.sample.shape == second.sample.shape
    squares = [sum(_square(parts) for parts in _subtracted(getattr(first, source), getattr(second, source)))
               for source in ("sample", "reference")]  # fmt: skip
    error = math.sqrt(sum(squares))
    value = float((first.value - second.value) - (first.bias - second.bias))
    return Difference(value, error, (value - Z * error, value + Z * error), paired)


def shown(value, error=math.nan):
    """A value with its error, to the digits that the error supports: "3.94 ± 0.03", and "3.943 ± 0.012".

    The error keeps two digits if they are 10..35, else one (the rule of the Particle Data Group), and the value as many
    decimals; very large and very small errors are written with an exponent. Without an error, three digits.
    """
    if value is None or not math.isfinite(value):
        return "-"
    if error is None or not math.isfinite(error):
        return f"{value:.3g}"
    places = decimals(error)
    return f"{value:.4g} ± 0" if places is None else f"{_rounded(value, places)} ± {_rounded(error, places)}"


def shown_interval(low, high, error):
    """An interval to the digits that the error supports: "3.87 .. 4.01"."""
    if not math.isfinite(low + high):
        return "-"
    places = decimals(error)
    return " .. ".join(f"{end:.4g}" if places is None else _rounded(end, places) for end in (low, high))


def decimals(error):
    """Decimal places that an error supports, negative left of the point; None for an error of 0."""
    if not error > 0:
        return None
    exponent = math.floor(math.log10(error))
    leading = round(error / 10.0 ** (exponent - 2))  # three digits, 100 .. 1000
    if leading > 949:
        return -exponent
    return 1 - exponent if leading <= 354 else -exponent


def _rounded(value, places):
    rounded = round(value, places) + 0.0  # adding 0 makes -0.0 positive
    if -5 < places < 9 or not rounded:
        return f"{rounded:.{max(places, 0)}f}"
    return f"{rounded:.{max(places + math.floor(math.log10(abs(rounded))), 0)}e}"


def _wilson(p, error, trials):
    if math.isnan(error):
        return math.nan, math.nan
    if 0 < p < 1 and error > 0:
        trials = p * (1 - p) / error**2
    centre = (p + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z * math.sqrt(p * (1 - p) / trials + Z**2 / (4 * trials**2)) / (1 + Z**2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def _subtracted(*both):
    """The parts of a difference: one list of parts where two of the same images are given, else what is there."""
    known = [parts for parts in both if parts is not None]
    return [known[0] - known[1]] if len(known) == 2 and known[0].shape == known[1].shape else known


def _longer(estimate):
    return max(estimate.sample, estimate.reference, key=len)


def _square(parts):
    return float(np.square(parts).sum())


def _length(parts):
    return math.sqrt(_square(parts))
