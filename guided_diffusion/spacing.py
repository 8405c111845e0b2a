"""Which rows of a process a sampler visits: functions `(process, count) -> count different rows, ascending`.

Every spacing but `leading` keeps the last row, where sampling starts from pure noise; a single row is always the last.
"""

import numpy as np

from .schedules import unknown


def pick(table, name, kind):
    """
    A row of a table.

    :raises ValueError: for an unknown name; the nearest ones are shown.
    """
    if name in table:
        return table[name]
    raise ValueError(unknown(kind, name, table))


def spaced_rows(process, spacing, count):
    """
    `count` rows of a process, ascending: list of ints.

    :param spacing: a name in SPACINGS.
    :raises ValueError: for an unknown name, fewer than one row, or more than there are.
    """
    choose, last = pick(SPACINGS, spacing, "spacing"), process.num_timesteps - 1
    if count != int(count) or not 1 <= count <= last + 1:
        raise ValueError(f"steps must be a whole number from 1 to the {last + 1} rows of the process, not {count}")
    return [last] if count == 1 else [int(row) for row in choose(process, int(count))]


def uniform(process, count):
    """Even in t, both ends included: the original's, sum of strides in floating point and halves to even."""
    stride = (process.num_timesteps - 1) / (count - 1)
    return np.round(np.cumsum([0.0] + [stride] * (count - 1)))


def leading(process, count):
    """0, k, 2k, ... with the largest k that fits (DDIM, arXiv 2010.02502, appendix D.2): starts below pure noise."""
    return np.arange(count) * (process.num_timesteps // count)


def trailing(process, count):
    """Even in t, counted from the last row (Lin et al. 2023, arXiv 2305.08891, table 2)."""
    return np.round(np.linspace(process.num_timesteps, 0, count, endpoint=False))[::-1] - 1


def quadratic(process, count):
    """Even in sqrt(t), dense near the data (DDIM, appendix D.2, which leaves out the noisiest fifth; we keep it)."""
    return _distinct(np.linspace(0, np.sqrt(process.num_timesteps - 1), count) ** 2, process.num_timesteps)


# Above this, rows look alike: x_0 / sigma is lost in the noise. EDM starts here (Karras et al. 2022, arXiv 2206.00364,
# table 1); a cosine process goes on to 20,000, where steps even in log-SNR would spend half their number on nothing.
SIGMA_MAX = 80.0


def log_snr(process, count):
    """
    Even in the log-SNR, the spacing that DPM-Solver assumes (arXiv 2206.00927, section 3.3), up to SIGMA_MAX; the last
    row, where sampling starts, comes on top if it is noisier.
    """
    return _even_in(process, count, np.log, np.exp)


def karras(process, count, rho=7):
    """Even in sigma^(1/rho) (Karras et al. 2022, arXiv 2206.00364, eq. 5); the last row as for `log_snr`."""
    return _even_in(process, count, lambda sigma: sigma ** (1 / rho), lambda level: level**rho)


SPACINGS = {
    "uniform": uniform,
    "leading": leading,
    "trailing": trailing,
    "quadratic": quadratic,
    "log_snr": log_snr,
    "karras": karras,
}


def _even_in(process, count, level, inverse):
    """Rows nearest, in log sigma, to `count` even steps of level(sigma); a last row above SIGMA_MAX comes on top."""
    sigma = process.sqrt_recipm1_alphas_cumprod
    calm = int((sigma <= SIGMA_MAX * (1 + 1e-6)).sum())
    top = [len(sigma) - 1] if calm < len(sigma) else []
    count -= len(top)
    sigma = sigma[: max(calm, count)]  # noisier rows are taken only where the calm ones do not suffice
    wanted = inverse(np.linspace(level(sigma[0]), level(sigma[-1]), count)) if count > 1 else sigma[:1]
    places = np.interp(np.log(wanted), np.log(sigma), np.arange(len(sigma)))
    return [*_distinct(places, len(sigma)), *top]


def _distinct(places, total):
    """Ascending places in 0..total-1, rounded to different rows; where they crowd, the later ones move up."""
    count = len(places)
    steps = np.arange(count)
    rows = np.maximum.accumulate(np.round(places) - steps) + steps
    return np.minimum(rows, total - count + steps)
