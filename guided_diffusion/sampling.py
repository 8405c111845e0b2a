"""Samplers: short step rules, one driver, and noise that belongs to the sample rather than to the batch.

To add a sampler, write a rule `(step, **options) -> (x at row t-1, Prediction)` and name it in SAMPLERS.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch as th

from .prediction import Prediction, mean_of, x0_from_eps


@dataclass
class Step:
    """
    What a step rule may look at. Row t-1 is the next one; from row 0 the next is clean data.

    :param predict: `(x, t) -> Prediction`.
    :param noise: `() -> N(0, I)` like x.
    :param history: earlier predictions, the latest last (at most two are kept).
    """

    process: object
    predict: Callable
    x: th.Tensor  # [N, ...]
    t: th.Tensor  # [N]
    noise: Callable
    row: int | None = None  # t as a number, where it is equal in the batch (always, in the driver)
    history: list = field(default_factory=list)

    def table(self, name):
        return self.process.at(name, self.t, self.x)


def guided_score(process, x, t, pred):
    """
    Apply a gradient the score's way (ADM algorithm 2): eps -= sqrt(1 - abar) grad, and x_0 follows from eps.

    x_0 is not clipped again, as in the original.
    """
    if pred.grad is None:
        return pred
    eps = pred.eps - process.at("sqrt_one_minus_alphas_cumprod", t, x) * pred.grad
    return replace(pred, eps=eps, x0=x0_from_eps(process, x, t, eps), mean=None, grad=None)


def not_last(t, x):
    """1 where a row is still to come, 0 at row 0, broadcast over x; the last step of a sampler adds no noise."""
    return (t != 0).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


# ----------------------------------------------------------------------------------------------------- step rules

def ddpm(step):
    """Ancestral sampling (DDPM algorithm 2), guided through the mean (ADM algorithm 1), at row 0 too."""
    x, t = step.x, step.t
    pred = step.predict(x, t)
    mean = mean_of(step.process, x, t, pred)
    noise = step.noise()
    if pred.grad is not None:
        mean = mean + pred.variance * pred.grad
    return mean + not_last(t, x) * th.exp(0.5 * pred.log_variance) * noise, pred


def ddim(step, eta=0.0):
    """DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12); eta = 1 is ancestral sampling with the small variance."""
    pred = guided_score(step.process, step.x, step.t, step.predict(step.x, step.t))
    abar, abar_prev = step.table("alphas_cumprod"), step.table("alphas_cumprod_prev")
    sigma = eta * th.sqrt((1 - abar_prev) / (1 - abar)) * th.sqrt(1 - abar / abar_prev)
    mean = pred.x0 * th.sqrt(abar_prev) + th.sqrt(1 - abar_prev - sigma**2) * pred.eps
    # Noise is drawn even if eta is 0, so that the random stream is the original's.
    return mean + not_last(step.t, step.x) * sigma * step.noise(), pred


def ddim_reverse(step):
    """One step of DDIM towards noise: row t to row t+1 (the ODE run backwards)."""
    pred = guided_score(step.process, step.x, step.t, step.predict(step.x, step.t))
    abar_next = step.table("alphas_cumprod_next")
    return pred.x0 * th.sqrt(abar_next) + th.sqrt(1 - abar_next) * pred.eps, pred


def heun(step):
    """
    Second-order steps of the ODE d(x / sqrt(abar)) / d sigma = eps (Karras et al. 2022, arXiv 2206.00364, alg. 1
    without churn). It evaluates the network at kept rows only; the step from row 0 to clean data is Euler's.
    """
    process, x, t = step.process, step.x, step.t
    pred = guided_score(process, x, t, step.predict(x, t))
    euler = pred.x0 * th.sqrt(step.table("alphas_cumprod_prev"))
    euler = euler + th.sqrt(1 - step.table("alphas_cumprod_prev")) * pred.eps
    if step.row == 0:
        return euler, pred
    ahead = guided_score(process, euler, t - 1, step.predict(euler, t - 1))
    sigma, sigma_next = (process.at("sqrt_recipm1_alphas_cumprod", s, x) for s in (t, t - 1))
    slope = (pred.eps + ahead.eps) / 2
    scaled = x * step.table("sqrt_recip_alphas_cumprod") + (sigma_next - sigma) * slope
    return scaled * process.at("sqrt_alphas_cumprod", t - 1, x), pred


def dpmpp_2m(step):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): x_0 extrapolated linearly in log-SNR."""
    process, x, t = step.process, step.x, step.t
    pred = guided_score(process, x, t, step.predict(x, t))
    if step.row == 0:
        return pred.x0, pred
    log_sigma = [th.log(process.at("sqrt_recipm1_alphas_cumprod", s, x)) for s in (t - 1, t)]
    x0 = pred.x0
    if step.history:
        h = log_sigma[1] - log_sigma[0]
        h_last = th.log(process.at("sqrt_recipm1_alphas_cumprod", t + 1, x)) - log_sigma[1]
        x0 = x0 + h / (2 * h_last) * (x0 - step.history[-1].x0)
    ratio = th.exp(log_sigma[0] - log_sigma[1])  # sigma_{t-1} / sigma_t
    scaled = ratio * x * step.table("sqrt_recip_alphas_cumprod") + (1 - ratio) * x0
    return scaled * process.at("sqrt_alphas_cumprod", t - 1, x), pred


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m}


# --------------------------------------------------------------------------------------------------------- driver

def sample(process, predict, rule, x, *, noise=th.randn_like, cond=None, rows=None):
    """
    Walk the rows and yield `(x, Prediction)` after each step. Consumers save, plot, measure and show progress.

    :param predict: a predictor `(x, t, **cond) -> Prediction`.
    :param rule: a step rule, e.g. `ddpm` or `functools.partial(ddim, eta=0.5)`.
    :param x: [N, ...] the start, usually N(0, I).
    :param noise: `(x) -> N(0, I)` like x.
    :param cond: what the predictor needs to know besides (x, t), e.g. `{"y": labels}`; never changed.
    :param rows: the rows to visit, default T-1 .. 0.
    """
    cond = dict(cond or {})
    history: list[Prediction] = []
    for row in reversed(range(process.num_timesteps)) if rows is None else rows:
        t = th.full((len(x),), row, dtype=th.int64, device=x.device)
        with th.no_grad():
            now = Step(process, lambda x, t: predict(x, t, **cond), x, t, lambda like=x: noise(like), row, history)
            x, pred = rule(now)
        history = [*history[-1:], pred]
        yield x, pred


class SeededNoise:
    """
    N(0, I) that is a function of (seed, sample index, number of the draw): the batch a sample sits in, and the
    process that draws it, change nothing.

    :param indices: the global index of each sample of the batch.
    """

    def __init__(self, seed, indices, device="cpu"):
        self.device = th.device(device)
        self.generators = []
        for index in indices:
            state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
            self.generators.append(th.Generator(self.device).manual_seed(int(state >> np.uint64(1))))

    def _stack(self, draw):
        return th.stack([draw(generator) for generator in self.generators])

    def normal(self, *shape):
        """[N, *shape]."""
        return self._stack(lambda g: th.randn(shape, generator=g, device=self.device))

    def integers(self, high):
        """[N] int64 in 0..high-1."""
        return self._stack(lambda g: th.randint(high, (), generator=g, device=self.device))

    def __call__(self, x):
        return self.normal(*x.shape[1:]).to(x.dtype)
