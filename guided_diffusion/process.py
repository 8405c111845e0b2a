"""The noising process: schedules, float64 tables, q(x_t | x_0) and the posterior q(x_{t-1} | x_t, x_0).

Notation follows DDPM (Ho et al. 2020, arXiv 2006.11239): alpha_t = 1 - beta_t and abar_t = alpha_0 ... alpha_t.
Row t is 0-based: t = 0 means one noising step, so "the step before row 0" is clean data with abar = 1.
"""

import math

import numpy as np
import torch as th

SCHEDULES = ("linear", "cosine")


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """
    The betas of a named schedule: float64 [T].

    `linear` is DDPM's, scaled so that any T covers the same noise levels; `cosine` is Improved DDPM's
    (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17).

    :raises NotImplementedError: for an unknown name.
    :raises ValueError: for a linear schedule so short that beta would reach 1.
    """
    steps = num_diffusion_timesteps
    if schedule_name == "linear":
        if steps <= 20:
            raise ValueError(
                f"a linear schedule of {steps} steps would need a beta of {20 / max(steps, 1):.3g}, and beta must "
                "stay below 1: use 21 steps or more, the cosine schedule, or respace a longer process"
            )
        return np.linspace(0.1 / steps, 20 / steps, steps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(steps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise NotImplementedError(f"unknown beta schedule: {schedule_name} (choose from {', '.join(SCHEDULES)})")


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """
    The betas whose cumulative product follows `alpha_bar(u)`, u in [0, 1]: float64 [T].

    :param max_beta: the largest beta, below 1 so that the last step stays invertible.
    """
    u = np.arange(num_diffusion_timesteps + 1) / num_diffusion_timesteps
    level = np.array([alpha_bar(v) for v in u])
    return np.minimum(1 - level[1:] / level[:-1], max_beta)


class Process:
    """
    The tables of q for T kept steps, each a float64 numpy array [T], and what follows from them.

    :param betas: [T] variances of the single steps, in (0, 1].
    :param timesteps: [T] what a network is told for each row (its own clock); default 0..T-1.
    :raises ValueError: if betas are not one-dimensional or leave (0, 1].
    """

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
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / abar - 1)  # sigma, the noise level of x_t / sqrt(abar)

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
        return Process(self._spaced_betas(rows), self.timesteps[sorted(rows)])

    def log_snr_rows(self, count):
        """About `count` rows, first and last included, spaced evenly in log-SNR = -2 log sigma: ascending."""
        log_sigma = np.log(self.sqrt_recipm1_alphas_cumprod)
        wanted = np.linspace(log_sigma[0], log_sigma[-1], count)
        return sorted({int(np.abs(log_sigma - value).argmin()) for value in wanted})

    def _spaced_betas(self, rows):
        kept = sorted(rows)
        if not kept or len(set(kept)) != len(kept) or kept[0] < 0 or kept[-1] >= self.num_timesteps:
            raise ValueError(f"rows to keep must be different numbers in 0..{self.num_timesteps - 1}, not {rows}")
        abar = self.alphas_cumprod[kept]
        return 1 - abar / np.append(1.0, abar[:-1])

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
