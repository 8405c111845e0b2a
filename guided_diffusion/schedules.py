"""
Noise schedules by name, their changes, and the four readings of a noise level: abar, sigma, log-SNR and row.

sigma = sqrt(1 / abar - 1) is the noise in x_t / sqrt(abar); SNR = 1 / sigma^2 = abar / (1 - abar). A schedule is a
function `(steps, **options) -> betas`, float64 [T], row 0 the least noise; SCHEDULES names them. A change is a
function `(betas, number or None) -> betas`; "cosine+shift2+zero_snr" is a schedule and its changes, in this order.
"""

import difflib
import math
import re

import numpy as np

# ------------------------------------------------------------------------------------------- readings of a noise level


def sigma_from_abar(abar):
    """sqrt(1 / abar - 1), infinite where abar is 0."""
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - np.asarray(abar, dtype=np.float64)) / abar)


def abar_from_sigma(sigma):
    """1 / (1 + sigma^2), 0 where sigma is infinite."""
    return 1 / (1 + np.asarray(sigma, dtype=np.float64) ** 2)


def log_snr_from_sigma(sigma):
    """-2 log sigma."""
    with np.errstate(divide="ignore"):
        return -2 * np.log(sigma)


def sigma_from_log_snr(log_snr):
    """exp(-log_snr / 2)."""
    return np.exp(-np.asarray(log_snr, dtype=np.float64) / 2)


def log_snr_from_abar(abar):
    """log(abar / (1 - abar)), -inf where abar is 0."""
    return log_snr_from_sigma(sigma_from_abar(abar))


def abar_from_log_snr(log_snr):
    """1 / (1 + exp(-log_snr))."""
    return abar_from_sigma(sigma_from_log_snr(log_snr))


def betas_from_abar(abar):
    """The single steps behind cumulative products abar [T], descending: float64 [T]."""
    abar = np.asarray(abar, dtype=np.float64)
    return 1 - abar / np.append(1.0, abar[:-1])


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """
    The betas whose cumulative product follows `alpha_bar(u)`, u in [0, 1]: float64 [T].

    :param max_beta: the largest beta, below 1 so that the last step stays invertible.
    """
    u = np.arange(num_diffusion_timesteps + 1) / num_diffusion_timesteps
    level = np.array([alpha_bar(v) for v in u])
    return np.minimum(1 - level[1:] / level[:-1], max_beta)


# ----------------------------------------------------------------------------------------------------- the schedules


def _scaled(name, steps, first, last):
    """The ends of a schedule of betas that was made for 1000 steps, scaled so that any T covers the same noise."""
    first, last = first * 1000, last * 1000
    if last >= steps:
        raise ValueError(
            f"a {name} schedule of {steps} steps would need a beta of {last / steps:.3g}, and beta must stay below 1: "
            f"use {math.floor(last) + 1} steps or more, the cosine schedule, or respace a longer process"
        )
    return first / steps, last / steps


def linear(steps, first=1e-4, last=0.02):
    """DDPM's (Ho et al. 2020, section 4): beta rises linearly; `first` and `last` are for 1000 steps."""
    return np.linspace(*_scaled("linear", steps, first, last), steps, dtype=np.float64)


def cosine(steps, offset=0.008):
    """Improved DDPM's (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17): sqrt(abar) is a quarter of a cosine."""
    return betas_for_alpha_bar(steps, lambda u: math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2)


def _sigmoid(v):
    return 1 / (1 + np.exp(-v))


def sigmoid(steps, start=-3.0, end=3.0, tau=1.0):
    """abar falls along a sigmoid from `start` to `end` (Jabri et al. 2022, arXiv 2212.11972, appendix B)."""
    low, high = _sigmoid(start / tau), _sigmoid(end / tau)
    return betas_for_alpha_bar(steps, lambda u: (high - _sigmoid((u * (end - start) + start) / tau)) / (high - low))


def sigmoid_beta(steps, first=1e-4, last=0.02):
    """beta rises along a sigmoid from -6 to 6 (GeoDiff, Xu et al. 2022, arXiv 2203.02923); ends as for `linear`."""
    first, last = _scaled("sigmoid_beta", steps, first, last)
    return first + (last - first) * _sigmoid(np.linspace(-6, 6, steps))


def sqrt_linear(steps, first=0.00085, last=0.012):
    """sqrt(beta) rises linearly (latent diffusion, Rombach et al. 2022, arXiv 2112.10752); ends as for `linear`."""
    first, last = _scaled("sqrt_linear", steps, first, last)
    return np.linspace(math.sqrt(first), math.sqrt(last), steps) ** 2


def log_linear(steps, sigma_min=0.002, sigma_max=80.0):
    """log sigma, and so the log-SNR, in even steps; a single step is at sigma_max."""
    return betas_from_abar(abar_from_sigma(np.geomspace(sigma_max, sigma_min, steps)[::-1]))


def karras(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """sigma^(1/rho) in even steps (EDM, Karras et al. 2022, arXiv 2206.00364, eq. 5); a single one at sigma_max."""
    root = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps)[::-1]
    return betas_from_abar(abar_from_sigma(root**rho))


SCHEDULES = {
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid_beta": sigmoid_beta,
    "sqrt_linear": sqrt_linear,
    "log_linear": log_linear,
    "karras": karras,
}


# ------------------------------------------------------------------------------------------- changes of any schedule


def zero_snr(betas, number=None):
    """
    Let the last row be pure noise, abar = 0: sqrt(abar) is shifted and stretched, its first value unchanged (Lin et
    al. 2023, arXiv 2305.08891, algorithm 1). Then eps says nothing about x_0 at the last row: predict v or x0.

    :raises ValueError: for a single step, or with a number.
    """
    if number is not None:
        raise ValueError(f"zero_snr takes no number, but was given {number:g}")
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))
    if len(root) < 2:
        raise ValueError("zero_snr needs two steps or more: with one, nothing of the data would be left at any step")
    return betas_from_abar((root[0] * (root - root[-1]) / (root[0] - root[-1])) ** 2)


def shift(betas, ratio):
    """
    Multiply every sigma by `ratio`: the log-SNR moves by -2 log ratio. At `ratio` times the image side the same noise
    hides as much of the picture (Hoogeboom et al. 2023, arXiv 2301.11093, eq. 4). With t = sigma / (1 + sigma) it is
    the t-shift of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, eq. 23), ratio = sqrt(m / n).

    :raises ValueError: if the ratio is missing or not positive.
    """
    if ratio is None or not ratio > 0:
        raise ValueError(f"shift needs a positive factor for sigma, as in cosine+shift2, not {ratio}")
    abar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))
    return betas_from_abar(abar / (abar + ratio**2 * (1 - abar)))


CHANGES = {"zero_snr": zero_snr, "shift": shift}


# ------------------------------------------------------------------------------------------------------------- names


def unknown(what, name, names):
    """A text for an error: the unknown name, the choices, and the nearest of them."""
    near = difflib.get_close_matches(str(name), list(names), n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown {what}: {name} (choose from {', '.join(names)}{hint})"


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """
    The betas of a named schedule: float64 [T].

    :param schedule_name: a row of SCHEDULES, and after a + rows of CHANGES, as "linear+zero_snr" or "cosine+shift4".
    :raises NotImplementedError: for an unknown name; it tells the nearest.
    :raises ValueError: for no steps, or so few that a beta would reach 1.
    """
    name, *changes = schedule_name.split("+")
    if name not in SCHEDULES:
        raise NotImplementedError(unknown("beta schedule", name, SCHEDULES))
    if num_diffusion_timesteps < 1:
        raise ValueError(f"a schedule needs one step or more, not {num_diffusion_timesteps}")
    betas = SCHEDULES[name](num_diffusion_timesteps)
    for change in changes:
        parts = re.fullmatch(r"([a-z_]+)(\d+\.?\d*|\.\d+)?", change)
        if not parts or parts[1] not in CHANGES:
            raise NotImplementedError(unknown("change of a schedule", change, CHANGES))
        betas = CHANGES[parts[1]](betas, float(parts[2]) if parts[2] else None)
    return betas
