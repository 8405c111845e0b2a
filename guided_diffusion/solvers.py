"""
Step rules: one function a sampler, `(step, **options) -> (x at the row it lands on, Prediction)`.

The network is evaluated at kept rows only, so one that was trained on discrete steps needs no interpolation. Away from
the two oldest rules everything is written for two readings of the same x: with alpha = sqrt(abar), s = sqrt(1 - abar)
and sigma = s / alpha, the scaled sample y = x / alpha = x_0 + sigma eps obeys dy / d sigma = eps (Karras et al. 2022,
arXiv 2206.00364, eq. 1). A solver is a choice of the eps, or of the x_0, that stands for a whole step; lambda is
-log sigma, half the log-SNR.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch as th

from .prediction import mean_of, rows_at, x0_from_eps


@dataclass
class Step:
    """
    What a step rule may look at. A walk goes down to row t-1, and from row 0 to clean data; `upward` it goes to t+1.

    :param predict: `(x, t) -> Prediction`.
    :param noise: `() -> N(0, I)` like x.
    :param history: earlier predictions, the latest last (at most three are kept).
    """

    process: object
    predict: Callable
    x: th.Tensor  # [N, ...]
    t: th.Tensor  # [N]
    noise: Callable
    row: int | None = None  # t as a number, where it is equal in the batch (always, in the driver)
    history: list = field(default_factory=list)
    upward: bool = False
    rows_used: int = 1  # a rule that takes several rows at once finds here what its last step took, and sets it

    def table(self, name):
        return self.process.at(name, self.t, self.x)

    def ahead(self, count=1):
        """The row `count` rows further on; -1 is clean data, negative counts look back."""
        return self.row + count if self.upward else self.row - count

    def rows_left(self, wanted):
        """
        How many rows ahead, at most `wanted`, a step of higher order can use. None on the way to clean data or
        from and to pure noise, where log sigma is infinite: there every solver takes a step of first order.
        """
        last = self.process.num_timesteps - 1 - (self.process.alphas_cumprod[-1] == 0)
        return max(0, min(wanted, last - self.row if self.upward else self.row if self.row <= last else 0))

    def known(self, wanted):
        """The latest earlier predictions, at most `wanted`, the nearest row first; one at pure noise is not used."""
        usable = min(wanted, len(self.history))
        if usable and math.isinf(sigma_of(self, self.ahead(-usable))):
            usable -= 1
        return self.history[::-1][:usable]


def guided_score(process, x, t, pred):
    """
    Apply a gradient the score's way (ADM algorithm 2): eps -= sqrt(1 - abar) grad, and x_0 follows from eps.

    x_0 is not clipped again, as in the original. At a last row of pure noise, which tells nothing of y, the true
    gradient is zero and that of a classifier is not applied.
    """
    if pred.grad is None:
        return pred
    eps = pred.eps - process.at("sqrt_one_minus_alphas_cumprod", t, x) * pred.grad
    x0 = x0_from_eps(process, x, t, eps)
    if process.ends_in_noise:
        noise = (t == process.num_timesteps - 1).reshape(-1, *[1] * (x.ndim - 1))         # [N,1,..]
        eps, x0 = th.where(noise, pred.eps, eps), th.where(noise, pred.x0, x0)
    return replace(pred, eps=eps, x0=x0, mean=None, grad=None)


def not_last(t, x):
    """1 where a row is still to come, 0 at row 0, broadcast over x; the last step of a sampler adds no noise."""
    return (t != 0).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


# ------------------------------------------------------------------------- the original's, for any t in a batch

def ddpm(step):
    """Ancestral sampling (DDPM algorithm 2), guided through the mean (ADM algorithm 1), at row 0 too."""
    x, t = step.x, step.t
    noise = step.noise()  # before a guidance that may draw random numbers of its own, as in the original
    pred = step.predict(x, t)
    mean = mean_of(step.process, x, t, pred)
    if pred.grad is not None:
        mean = mean + pred.variance * pred.grad
    return mean + not_last(t, x) * th.exp(0.5 * pred.log_variance) * noise, pred


def ddim(step, eta=0.0):
    """DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12); eta = 1 is ancestral sampling with the small variance."""
    if step.upward and eta == 0:
        return ddim_reverse(step)
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


# ------------------------------------------------------------- what the others are made of: coefficients in float64

def level(step, row):
    """(alpha, s) = sqrt of (abar, 1 - abar) at a row; (1, 0) for clean data."""
    if row < 0:
        return 1.0, 0.0
    process = step.process
    return float(process.sqrt_alphas_cumprod[row]), float(process.sqrt_one_minus_alphas_cumprod[row])


def sigma_of(step, row):
    """s / alpha, infinite for pure noise."""
    return float(step.process.sqrt_recipm1_alphas_cumprod[row]) if row >= 0 else 0.0


def lam(step, row):
    """lambda = -log sigma of a row that has one."""
    return -math.log(sigma_of(step, row))


def evaluate(step, x=None, row=None):
    """The prediction at x and a row, guidance inside; by default where the step starts."""
    x, t = step.x if x is None else x, step.t
    if row is not None:
        t = rows_at(row, len(t), t.device, getattr(t, "doubts", None))
    return guided_score(step.process, x, t, step.predict(x, t))


def euler_to(step, pred, row):
    """alpha' x_0 + s' eps: the step of first order, from and to any level (DDIM)."""
    alpha, s = level(step, row)
    return alpha * pred.x0 + s * pred.eps


def by_eps(step, eps, row, x=None, start=None):
    """x at `row` if eps were the same all the way from `start`: y' = y + (sigma' - sigma) eps."""
    (alpha, s), (alpha_to, s_to) = level(step, step.row if start is None else start), level(step, row)
    return alpha_to / alpha * (step.x if x is None else x) + (s_to - alpha_to / alpha * s) * eps


def by_x0(step, x0, row, keep=1.0):
    """
    x at `row` if x_0 were the same all the way: y' = (sigma' / sigma) y + (1 - sigma' / sigma) x_0.

    :param keep: the share of eps that is kept, where fresh noise takes the place of the rest.
    """
    (alpha, s), (alpha_to, s_to) = level(step, step.row), level(step, row)
    share = keep * s_to / s
    return share * step.x + (alpha_to - share * alpha) * x0


def lagrange(knots, at):
    """The polynomials that are 1 at one of the different `knots` [K] and 0 at the others, at `at` [Q]: [Q, K]."""
    columns = []
    for j, knot in enumerate(knots):
        others = np.delete(knots, j)
        columns.append(np.prod((at[:, None] - others) / (knot - others), axis=1))
    return np.stack(columns, 1)


def fit_over_step(knots, start, end, growth, abscissa=None):
    """
    The weights [K] of values at `knots` in the mean over [start, end] of the polynomial through them, where the mean
    gives the point u the weight exp(growth u): what exponential integrators (growth 1: x_0 over lambda, -1: eps)
    ask for. Gauss' rule of 16 points is exact here to rounding.

    :param abscissa: u -> the coordinate of the knots, if that is another.
    """
    points, weights = np.polynomial.legendre.leggauss(16)
    u = start + (end - start) * (points + 1) / 2  # [Q]
    weights = weights * np.exp(growth * (u - end))
    return weights @ lagrange(np.asarray(knots), u if abscissa is None else abscissa(u)) / weights.sum()


def blend(weights, values):
    """The sum of weights [K] times K tensors."""
    return sum(float(weight) * value for weight, value in zip(weights, values))


# ------------------------------------------------------------------------------------------------ in sigma: Euler, Heun

def euler(step, eta=0.0):
    """
    Euler's step in sigma; with eta = 1 the ancestral one: down to a lower level, up again by fresh noise
    (k-diffusion's `euler_ancestral`).
    """
    pred, row = evaluate(step), step.ahead()
    if not eta:
        return euler_to(step, pred, row), pred
    noise, (alpha, s) = step.noise(), level(step, row)
    up = eta * math.sqrt(1 - (sigma_of(step, row) / sigma_of(step, step.row)) ** 2)  # sigma_up / sigma'
    return alpha * pred.x0 + s * math.sqrt(1 - up**2) * pred.eps + s * up * noise, pred


def _trapezoid(step, x, start, end):
    """Heun's second-order step between two rows with finite, positive sigma: (x, the first prediction)."""
    pred = evaluate(step, x, start)
    ahead = evaluate(step, by_eps(step, pred.eps, end, x, start), end)
    return by_eps(step, (pred.eps + ahead.eps) / 2, end, x, start), pred


def heun(step):
    """Second order in sigma (Karras et al. 2022, arXiv 2206.00364, algorithm 1), two evaluations a row."""
    if not step.rows_left(1):
        return euler(step)
    return _trapezoid(step, step.x, step.row, step.ahead())


def edm(step, stride=2, rise=1, s_min=0.0, s_max=math.inf, s_noise=1.0):
    """
    Heun with churn (Karras et al. 2022, algorithm 2): noise lifts x by `rise` rows, then a step of second order takes
    it down to the `stride`-th row below where it was. The rows between are kept for that. The paper's gamma is
    sigma_lifted / sigma - 1; as there it is at most sqrt(2) - 1, so where rows lie further apart nothing is lifted:
    with few steps there is no churn at all.

    :param s_min, s_max: churn only where sigma lies between.
    :param s_noise: standard deviation of the noise added.
    """
    step.rows_used = max(1, step.rows_left(stride))
    if not step.rows_left(1):
        return euler(step)
    x, sigma = step.x, sigma_of(step, step.row)
    lifted = min(step.row + rise, step.process.num_timesteps - 1)
    if lifted > step.row and s_min <= sigma <= s_max and (high := sigma_of(step, lifted)) <= math.sqrt(2) * sigma:
        fresh = s_noise * math.sqrt(high**2 - sigma**2) * step.noise()
        x = level(step, lifted)[0] * (x / level(step, step.row)[0] + fresh)
    else:
        lifted = step.row
    return _trapezoid(step, x, lifted, step.ahead(step.rows_used))


def adaptive(step, rtol=0.01, atol=0.001, safety=0.8):
    """
    Heun with as many rows in one go as the error allows: the gap between the steps of first and second order, in root
    mean square over a sample, stays below atol + rtol |x| in every sample of the batch. Give it dense rows; a step of
    one row is always taken. The batch shares its steps, so a sample is the same in another batch only to the tolerance.
    """
    room = step.rows_left(step.process.num_timesteps)
    if not room:
        step.rows_used = 1
        return euler(step)
    pred, used = evaluate(step), min(room, 2 * step.rows_used)
    while True:
        row = step.ahead(used)
        low = by_eps(step, pred.eps, row)
        high = by_eps(step, (pred.eps + evaluate(step, low, row).eps) / 2, row)
        allowed = atol + rtol * th.maximum(step.x.abs(), high.abs())
        error = ((high - low) / allowed).flatten(1).square().mean(1).sqrt().max().item()
        if error <= 1 or used == 1:
            step.rows_used = used
            return high, pred
        used = max(1, min(used - 1, int(used * safety / math.sqrt(error))))


# ------------------------------------------------------------------- single steps that take the rows between (DPM)

def dpm_1(step):
    """DPM-Solver-1 (Lu et al. 2022, arXiv 2206.00927, eq. 4.1), which is DDIM."""
    pred, row = evaluate(step), step.ahead()
    return (by_x0(step, pred.x0, row) if step.rows_left(1) else euler_to(step, pred, row)), pred


def dpm_2(step):
    """DPM-Solver-2 (arXiv 2206.00927, algorithm 1): the row between is the intermediate point, r_1 its place."""
    return _second_order(step, by_eps, "eps")


def dpmpp_2s(step):
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv 2211.01095, algorithm 1): as DPM-Solver-2, for x_0."""
    return _second_order(step, by_x0, "x0")


def _second_order(step, move, name):
    step.rows_used = max(1, step.rows_left(2))
    if step.rows_used < 2:
        return dpm_1(step)
    middle, row = step.ahead(1), step.ahead(2)
    (r1,), _ = _places(step, [middle], row)
    pred = evaluate(step)
    here = getattr(pred, name)
    there = getattr(evaluate(step, move(step, here, middle), middle), name)
    return move(step, here + (there - here) / (2 * r1), row), pred


def dpm_3(step):
    """
    DPM-Solver-3 (arXiv 2206.00927, algorithm 2). The paper's r = 1/3, 2/3 are replaced by where the rows lie: the
    weights of the two differences fulfil the order conditions for any r_1, r_2, and are the paper's at its own.

    The last rows go to DPM-Solver-2; four are two of its steps, since one of first order would cost the third order.
    """
    left = step.rows_left(5)
    if left < 3 or left == 4:
        return dpm_2(step)
    step.rows_used = 3
    rows = [step.ahead(k) for k in (1, 2, 3)]
    (r1, r2), h = _places(step, rows[:2], rows[2])
    phi = [np.expm1(r * h) / (r * h) - 1 for r in (r1, r2, 1)]  # times sigma' / (sigma' - sigma) it weighs d eps
    b1, b2 = (r2 - 2 / 3) / (r1 * (r2 - r1)), (2 / 3 - r1) / (r2 * (r2 - r1))  # of phi[2]
    inner = (b1 * r1 * phi[0] + b2 * r2 * phi[1]) / (b2 * r1)
    pred = evaluate(step)
    d1 = evaluate(step, by_eps(step, pred.eps, rows[0]), rows[0]).eps - pred.eps
    d2 = evaluate(step, by_eps(step, pred.eps + inner / np.expm1(r2 * h) * d1, rows[1]), rows[1]).eps - pred.eps
    return by_eps(step, pred.eps + phi[2] / np.expm1(h) * (b1 * d1 + b2 * d2), rows[2]), pred


def _places(step, between, row):
    """([r of each row between], h): where rows lie in lambda, as shares of the step h to `row`."""
    start = lam(step, step.row)
    h = lam(step, row) - start
    return [(lam(step, each) - start) / h for each in between], h


# -------------------------------------------------------------------------- several steps remembered (multistep)

def dpmpp_2m(step, eta=0.0):
    """
    DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): x_0 extrapolated linearly in lambda. eta = 1 is
    SDE-DPM-Solver++(2M), which replaces part of eps by fresh noise.
    """
    pred, row, x0 = evaluate(step), step.ahead(), None
    if step.rows_left(1):
        x0, h = pred.x0, lam(step, row) - lam(step, step.row)
        for last in step.known(1):
            x0 = x0 + h / (2 * (lam(step, step.row) - lam(step, step.ahead(-1)))) * (x0 - last.x0)
    elif not eta or row < 0:
        return euler_to(step, pred, row), pred
    keep = (sigma_of(step, row) / sigma_of(step, step.row)) ** eta
    x = by_x0(step, pred.x0 if x0 is None else x0, row, keep)
    return (x + level(step, row)[1] * step.noise() * math.sqrt(1 - keep**2) if eta else x), pred


def _fitted_x0(step, start, rows, values, end):
    """The x_0 that stands for the step start -> end, by the polynomial in lambda through `values` at `rows`."""
    weights = fit_over_step([lam(step, row) for row in rows], lam(step, start), lam(step, end), growth=1)
    return blend(weights, values)


def dpmpp_3m(step):
    """
    DPM-Solver++(3M) (arXiv 2211.01095, appendix): x_0 extrapolated by a parabola in lambda, integrated exactly.

    The widespread code halves the second derivative's term, which makes it a solver of second order; see the tests.
    """
    pred, row = evaluate(step), step.ahead()
    if not step.rows_left(1):
        return euler_to(step, pred, row), pred
    known = [pred, *step.known(2)]
    rows = [step.ahead(-k) for k in range(len(known))]
    return by_x0(step, _fitted_x0(step, step.row, rows, [each.x0 for each in known], row), row), pred


def unipc(step, order=2, correct=True):
    """
    UniPC (Zhao et al. 2023, arXiv 2302.04867, B_2, for x_0): the prediction made here first corrects the step that led
    here, then helps to predict the next; no evaluation is spent on correcting. The predictor alone has order `order`,
    corrected one more.
    """
    pred, row, x = evaluate(step), step.ahead(), step.x
    past = step.known(order)
    if correct and past and step.rows_left(1):
        rows = [step.ahead(-k) for k in range(len(past) + 1)]
        x0 = [each.x0 for each in (pred, *past)]
        # Both readings of the last step differ only in the x_0 that stood for it.
        gain = _fitted_x0(step, rows[1], rows, x0, step.row) - _fitted_x0(step, rows[1], rows[1:], x0[1:], step.row)
        (alpha, s), (alpha_to, s_to) = level(step, rows[1]), level(step, step.row)
        x = x + (alpha_to - s_to / s * alpha) * gain
    if not step.rows_left(1):
        return euler_to(step, pred, row), pred
    known = [pred, *past[: order - 1]]
    rows = [step.ahead(-k) for k in range(len(known))]
    x0 = _fitted_x0(step, step.row, rows, [each.x0 for each in known], row)
    return by_x0(replace(step, x=x), x0, row), pred


ADAMS = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


def plms(step):
    """
    PLMS (Liu et al. 2022, arXiv 2202.09778, eq. 12): eps by the formulas of Adams and Bashforth for even steps, lower
    orders at the start; then DDIM's step, which keeps second order.
    """
    pred, row = evaluate(step), step.ahead()
    if not step.rows_left(1):
        return euler_to(step, pred, row), pred
    known = [pred, *step.known(3)]
    return by_eps(step, blend(ADAMS[len(known) - 1], [each.eps for each in known]), row), pred


def deis(step, order=3):
    """
    tAB-DEIS (Zhang & Chen 2022, arXiv 2204.13902, eq. 15): eps extrapolated by a polynomial in the network's time,
    integrated exactly over sigma. Between the rows, time is a polynomial in log sigma through them.

    :param order: 1 (DDIM) to 4; the paper's r is order - 1.
    """
    pred, row = evaluate(step), step.ahead()
    if not step.rows_left(1):
        return euler_to(step, pred, row), pred
    known = [pred, *step.known(order - 1)]
    rows = [step.ahead(-k) for k in range(-1, len(known))]
    clock, lams = step.process.timesteps[rows].astype(float), np.array([lam(step, each) for each in rows])
    weights = fit_over_step(clock[1:], lams[1], lams[0], growth=-1, abscissa=lambda u: lagrange(lams, u) @ clock)
    return by_eps(step, blend(weights, [each.eps for each in known]), row), pred


def gam_mu(step, gam=2.0, mu=0.0):
    """
    The family of smalldiffusion (Permenter & Yuan 2023, arXiv 2306.04848, section 5): eps averaged with the one before
    (gam), and a lower level reached, from which noise lifts x again (mu). DDIM is (1, 0), DDPM (1, 1/2), the
    accelerated sampler (2, 0).
    """
    if not 0 <= mu < 1:
        raise ValueError(f"mu must lie in [0, 1), not {mu}")
    pred, row = evaluate(step), step.ahead()
    (alpha, s), sigma = level(step, row), sigma_of(step, step.row)
    lower = (sigma_of(step, row) / sigma) ** (mu / (1 - mu))  # sigma_p / sigma'
    x = alpha * pred.x0 + s * lower * pred.eps
    for last in step.known(1):
        x = x + (1 - gam) * (alpha * sigma - s * lower) * (pred.eps - last.eps)
    return (x + s * step.noise() * math.sqrt(1 - lower**2) if mu else x), pred
