"""
Averages of the weights over training: constant rates, half-lives in images, and power functions of time from whose
snapshots any other length is put together afterwards (Karras et al. 2024, arXiv 2312.02696, section 3).
"""

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rate:
    """
    The original's average: weight `rate` stays at each update; with `warmup` at most (1 + s) / (10 + s) after s
    updates, so that the average forgets the random start.
    """

    rate: float
    warmup: bool = True

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"an ema_rate is a decay in [0, 1), as 0.9999, not {self.rate}")

    @property
    def name(self):
        return f"{self.rate}"

    def decay(self, step, batch_size):
        """What stays of the average at update number `step` (1, 2, ...) with so many images an update."""
        return min(self.rate, step / (9 + step)) if self.warmup else self.rate


@dataclass(frozen=True)
class HalfLife:
    """
    An average in which images count half after `kimg` thousand others, whatever the batch; at first after a share
    `rampup` of those seen so far (Karras et al. 2022, arXiv 2206.00364, appendix F).
    """

    kimg: float
    rampup: float = 0.05

    def __post_init__(self):
        if not self.kimg > 0:
            raise ValueError(f"an ema_halflife is a number of thousand images above 0, as 500, not {self.kimg}")

    @property
    def name(self):
        return f"halflife{self.kimg:g}"

    def decay(self, step, batch_size):
        """As `Rate.decay`."""
        images = min(1000 * self.kimg, step * batch_size * self.rampup)
        return 0.5 ** (batch_size / images)


@dataclass(frozen=True)
class Power:
    """
    An average whose weights grow as a power of time: of standard deviation `sigma_rel` relative to the training so
    far (arXiv 2312.02696, eq. 2 and 4). Its snapshots make averages of other lengths: `combination`.
    """

    sigma_rel: float

    def __post_init__(self):
        power_of(self.sigma_rel)

    @property
    def name(self):
        return f"power{self.sigma_rel:g}"

    def decay(self, step, batch_size):
        """As `Rate.decay`."""
        return (1 - 1 / step) ** (power_of(self.sigma_rel) + 1)


@functools.cache
def power_of(sigma_rel):
    """
    The exponent of the power function of a relative standard deviation: the root above -1 of
    sigma^2 = (g + 1) / ((g + 2)^2 (g + 3)) (arXiv 2312.02696, eq. 123-126).

    :raises ValueError: for a width that no power function has; with g above 0 they lie below 0.29.
    """
    if not 0 < sigma_rel < 0.28:
        raise ValueError(f"the relative width of an average is above 0 and below 0.28, as 0.05 or 0.1, not {sigma_rel}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def combination(snapshots, step, sigma_rel):
    """
    The weights [K] with which snapshots of power averages add up to the one of another width, the best in the square
    of the difference between profiles (arXiv 2312.02696, algorithm 3) among those that add up to 1. (The paper's are 1
    only where snapshots are many; from two, a width of 0.08 would have weights 3 % too large.)

    :param snapshots: [(step, sigma_rel)] of the K snapshots.
    :param step: the update at which the average wanted ends; later snapshots get the weight 0.
    :raises ValueError: if no snapshot ends there.
    """
    if not any(each == step for each, _ in snapshots):
        held = ", ".join(str(each) for each in sorted({each for each, _ in snapshots})) or "none"
        raise ValueError(f"no snapshot ends at update {step}; there are those of updates {held}")
    weights, used = np.zeros(len(snapshots)), [k for k, (each, _) in enumerate(snapshots) if each <= step]
    gram, target, square = _products([snapshots[k] for k in used], step, sigma_rel)
    ones = np.ones((len(used), 1))
    system = np.block([[gram / square, ones], [ones.T, np.zeros((1, 1))]])    # with Lagrange's multiplier of the sum
    weights[used] = np.linalg.lstsq(system, np.append(target / square, 1.0), rcond=None)[0][:-1]
    return weights


def profile_error(snapshots, weights, step, sigma_rel):
    """
    How far the profile that `weights` [K] make of snapshots is from the one wanted: the L2 norm of the difference over
    that of the wanted one. Of two averages that differ so, the one of weights that wander differs about as much of
    what averaging removes.
    """
    gram, target, square = _products(snapshots, step, sigma_rel)
    weights = np.asarray(weights)
    return float(np.sqrt(max(0.0, weights @ gram @ weights - 2 * weights @ target + square) / square))


def _products(snapshots, step, sigma_rel):
    """Inner products of the profiles of K snapshots [K,K], of each with the one wanted [K], and of that with itself."""
    steps = np.array([each for each, _ in snapshots], dtype=np.float64)       # [K]
    powers = np.array([power_of(width) for _, width in snapshots])            # [K]
    wanted = float(step), power_of(sigma_rel)
    gram = _inner(steps[:, None], powers[:, None], steps, powers)             # [K,K]
    return gram, _inner(steps, powers, *wanted), float(_inner(*wanted, *wanted))


def _inner(step_a, power_a, step_b, power_b):
    """The integral of the product of two profiles (g + 1) t^g / T^(g + 1) over 0 .. min(T_a, T_b)."""
    first, last = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    exponent = np.where(step_a < step_b, power_b, power_a)  # of the one that goes on
    return (power_a + 1) * (power_b + 1) / (power_a + power_b + 1) * (first / last) ** exponent / last


def parse(ema_rate="", halflives="", powers="", warmup=True):
    """
    The averages that the options ask for: numbers with commas between, or nothing.

    :raises ValueError: for a text that is no list of numbers, or a number that makes no average.
    """
    kinds = {"ema_rate": (ema_rate, lambda x: Rate(x, warmup)), "ema_halflife": (halflives, HalfLife)}
    kinds["ema_power"] = (powers, Power)
    averages = []
    for option, (text, make) in kinds.items():
        try:
            numbers = [float(part) for part in str(text).split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"cannot read {option} {text!r}: give numbers with commas between, as 0.999") from None
        averages += [make(number) for number in numbers]
    return averages
