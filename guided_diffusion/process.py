"""The noising process: float64 tables, q(x_t | x_0) and the posterior q(x_{t-1} | x_t, x_0).

Notation follows DDPM (Ho et al. 2020, arXiv 2006.11239): alpha_t = 1 - beta_t and abar_t = alpha_0 ... alpha_t.
Row t is 0-based: t = 0 means one noising step, so "the step before row 0" is clean data with abar = 1.
"""

import numpy as np
import torch as th

from .schedules import betas_for_alpha_bar, betas_from_abar, get_named_beta_schedule, log_snr_from_sigma

__all__ = ["Process", "betas_for_alpha_bar", "get_named_beta_schedule"]


class Process:
    """
    The tables of q for T kept steps, each a float64 numpy array [T], and what follows from them.

    :param betas: [T] variances of the single steps, in (0, 1].
    :param timesteps: [T] what a network is told for each row (its own clock); default 0..T-1.
    :raises ValueError: if betas are not one-dimensional or leave (0, 1].
    """

    sigma_data = 0.5  # the standard deviation of the data, where a prediction or a weight assumes one (EDM)

    def __init__(self, betas, timesteps=None):
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas):
            raise ValueError(f"betas must be a list of numbers, not an array of shape {betas.shape}")
        if not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas must lie in (0, 1], but they span {betas.min():.4g} .. {betas.max():.4g}")
        self.betas = betas
        self.num_timesteps = len(betas)
        self.timesteps = np.arange(len(betas)) if timesteps is None else np.asarray(timesteps)

        abar = np.cumprod(1 - betas)
        abar_prev = np.append(1.0, abar[:-1])
        self.alphas_cumprod = abar
        self.alphas_cumprod_prev = abar_prev
        self.alphas_cumprod_next = np.append(abar[1:], 0.0)
        with np.errstate(divide="ignore"):  # a schedule may end in pure noise, abar = 0
            self.sqrt_alphas_cumprod = np.sqrt(abar)
            self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - abar)
            self.log_one_minus_alphas_cumprod = np.log(1 - abar)
            self.sqrt_recip_alphas_cumprod = np.sqrt(1 / abar)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt((1 - abar) / abar)  # sigma, the noise level of x_t / sqrt(abar)

        # q(x_{t-1} | x_t, x_0): DDPM eqs. 6 and 7.
        self.posterior_variance = betas * (1 - abar_prev) / (1 - abar)
        self.posterior_mean_coef1 = betas * np.sqrt(abar_prev) / (1 - abar)
        self.posterior_mean_coef2 = (1 - abar_prev) * np.sqrt(1 - betas) / (1 - abar)
        # The variance of row 0 is 0, whose logarithm does not exist. As in the original, row 1 stands in for it, in
        # the logarithm of the small variance and in the large variance; with a single row its beta has to do.
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.large_variance = np.append(first, betas[1:])
        self.log_large_variance = np.log(self.large_variance)
        self.log_betas = np.log(betas)
        self._on_device = {}

    def spaced(self, rows):
        """
        The same process with only some of its rows: abar at the kept rows is unchanged, the betas follow from it.

        :param rows: the kept rows, any order, without repeats.
        :raises ValueError: if rows is empty, repeats, or leaves 0..T-1.
        """
        kept = Process(self._spaced_betas(rows), self.timesteps[sorted(rows)])
        kept.sigma_data = self.sigma_data
        return kept

    @property
    def ends_in_noise(self):
        """Whether the last row is pure noise, abar = 0: there sigma is infinite and eps says nothing about x_0."""
        return self.alphas_cumprod[-1] == 0

    def log_snr(self, t):
        """
        The log-SNR at fractional rows t, an array or a number in 0..T-1: float64, linear between the rows.

        :raises ValueError: if t leaves the rows, or lies strictly between the last two where the last is pure noise.
        """
        t = np.asarray(t, dtype=np.float64)
        last = self.num_timesteps - 1
        if not ((t >= 0) & (t <= last)).all():
            raise ValueError(f"rows must lie in 0..{last}, but they span {t.min():g} .. {t.max():g}")
        table = log_snr_from_sigma(self.sqrt_recipm1_alphas_cumprod)
        if not self.ends_in_noise:
            return np.interp(t, np.arange(last + 1), table)
        if ((t > last - 1) & (t < last)).any():
            raise ValueError(f"no level lies between row {last - 1} and row {last}, which is pure noise (log-SNR -inf)")
        return np.where(t == last, -np.inf, np.interp(t, np.arange(last), table[:-1]))

    def row(self, log_snr):
        """
        The fractional rows of a log-SNR, the inverse of `log_snr`: float64, like its argument.

        :raises ValueError: outside the levels of this process.
        """
        wanted = np.asarray(log_snr, dtype=np.float64)
        table = log_snr_from_sigma(self.sqrt_recipm1_alphas_cumprod)
        levels = table[: self.num_timesteps - self.ends_in_noise]
        room = 1e-9 * (1 + np.abs(levels).max())  # for rounding on the way here
        noise = self.ends_in_noise & (wanted == -np.inf)
        if not (noise | ((wanted <= levels[0] + room) & (wanted >= levels[-1] - room))).all():
            raise ValueError(
                f"log-SNR must lie in {levels[-1]:.6g} .. {levels[0]:.6g}, but it spans "
                f"{wanted.min():.6g} .. {wanted.max():.6g}"
            )
        return np.where(noise, self.num_timesteps - 1, np.interp(-wanted, -levels, np.arange(len(levels))))

    def _spaced_betas(self, rows):
        kept = sorted(rows)
        if not kept or len(set(kept)) != len(kept) or kept[0] < 0 or kept[-1] >= self.num_timesteps:
            raise ValueError(f"rows to keep must be different numbers in 0..{self.num_timesteps - 1}, not {rows}")
        return betas_from_abar(self.alphas_cumprod[kept])

    def at(self, table, t, like):
        """
        Entries t of a table, broadcast over the shape of `like`.

        Tables are float64; they reach a device once, in float32 (or float64 where `like` is float64), so that no
        step copies them from the host.

        :param table: the name of a table, e.g. "betas".
        :param t: [N] rows.
        :param like: [N, ...].
        :return: like's shape.
        """
        values = self._tensor(table, like.device, th.float64 if like.dtype == th.float64 else th.float32)
        return values[t].reshape(-1, *[1] * (like.ndim - 1)).expand(like.shape)

    def clock(self, t):
        """What the network is told at rows t [N]: original step numbers, or their rescaled form (float32)."""
        dtype = th.int64 if self.timesteps.dtype.kind == "i" else th.float32
        return self._tensor("timesteps", t.device, dtype)[t]

    def _tensor(self, table, device, dtype):
        key = table, device, dtype
        if key not in self._on_device:
            with th.inference_mode(False):  # a table that a walk brings there serves training as well
                self._on_device[key] = th.as_tensor(getattr(self, table)).to(dtype).to(device)
        return self._on_device[key]

    def q_mean_variance(self, x_start, t):
        """q(x_t | x_0): (mean, variance, log_variance), each of x_start's shape."""
        abar = self.at("alphas_cumprod", t, x_start)
        mean = self.at("sqrt_alphas_cumprod", t, x_start) * x_start
        return mean, 1 - abar, self.at("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start, t, noise=None):
        """
        Draw x_t ~ q(x_t | x_0) (DDPM eq. 4).

        :param x_start: [N, ...] clean data.
        :param t: [N] rows.
        :param noise: like x_start; drawn from N(0, I) if None.
        """
        noise = th.randn_like(x_start) if noise is None else noise
        if noise.shape != x_start.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, data {tuple(x_start.shape)}: they must agree")
        keep = self.at("sqrt_alphas_cumprod", t, x_start)
        return keep * x_start + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """q(x_{t-1} | x_t, x_0): (mean, variance, clipped log-variance), each of x_t's shape (DDPM eqs. 6, 7)."""
        if x_start.shape != x_t.shape:
            raise ValueError(f"x_start has shape {tuple(x_start.shape)}, x_t {tuple(x_t.shape)}: they must agree")
        c1, c2 = self.at("posterior_mean_coef1", t, x_t), self.at("posterior_mean_coef2", t, x_t)
        variance = self.at("posterior_variance", t, x_t)
        return c1 * x_start + c2 * x_t, variance, self.at("posterior_log_variance_clipped", t, x_t)
