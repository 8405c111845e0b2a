"""Every sampler against flows that are known exactly: its order, its equalities, its rows, its noise."""

import math
import re
from collections import Counter, deque
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion import sampling, solvers, spacing, toy
from guided_diffusion.guidance import classifier_guided
from guided_diffusion.prediction import ModelVarType, Prediction, clipped
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.respace import space_timesteps
from guided_diffusion.sampling import SAMPLERS, BrownianNoise, SeededNoise, plan, sample

F64 = th.float64
BUILT_IN = dict(SAMPLERS)  # other tests may add to the table
DETERMINISTIC = [name for name, row in SAMPLERS.items() if not row.stochastic]
STOCHASTIC = [name for name, row in SAMPLERS.items() if row.stochastic]


def process(steps=1000, schedule="linear"):
    return Process(get_named_beta_schedule(schedule, steps))


def process_of(sigma):
    """Rows of the noise levels sigma, ascending."""
    abar = 1 / (1 + np.asarray(sigma) ** 2)
    return Process(1 - abar / np.append(1.0, abar[:-1]))


def walk(process, predict, rule, x, **kwargs):
    return [x for x, _ in sample(process, predict, rule, x, **kwargs)]


def named(full, name, steps, data, x, **kwargs):
    """Where a named sampler with its own spacing ends."""
    rule, rows = plan(full, name, steps)
    kept = full.spaced(rows)
    return walk(kept, data.predictor(kept, ModelVarType.FIXED_SMALL), rule, x, **kwargs)[-1]


# ------------------------------------------------------------------------------------------------------- the order

MEANS = np.array([[-0.6, 0.2], [0.5, 0.5], [0.1, -0.7]])
STDS = np.array([[0.25, 0.3], [0.2, 0.25], [0.3, 0.2]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
MIXTURE = toy.Mixture(th.tensor(MEANS), th.tensor(STDS), th.tensor(WEIGHTS))
GAUSS = toy.Mixture(th.tensor([[0.3, -0.2]], dtype=F64), 0.5)
LOW, HIGH = 0.3, 80.0
NOISE = np.random.default_rng(0).standard_normal((24, 2)) * HIGH  # y = x / sqrt(abar) at the highest level


def slope_of_mixture(y, u):
    """dy / du at u = log sigma, in numpy and from the density alone: none of the code under test."""
    var = STDS**2 + math.exp(2 * u)
    gap = y[:, None] - MEANS  # [N,K,2]
    log_p = -0.5 * (gap**2 / var + np.log(var)).sum(2) + np.log(WEIGHTS)
    share = np.exp(log_p - log_p.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    return math.exp(2 * u) * (share[..., None] * gap / var).sum(1)


@cache
def flow_of_mixture(low):
    """NOISE carried from HIGH down to sigma = low by the classical Runge-Kutta method: [N, 2]."""
    y, steps = NOISE, 3000
    h = math.log(low / HIGH) / steps
    for u in math.log(HIGH) + h * np.arange(steps):
        k1 = slope_of_mixture(y, u)
        k2 = slope_of_mixture(y + h / 2 * k1, u + h / 2)
        k3 = slope_of_mixture(y + h / 2 * k2, u + h / 2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope_of_mixture(y + h * k3, u + h))
    return y


def flow_of_gaussian(sigma):
    """A Gaussian's flow moves quantiles to quantiles."""
    mean, var = GAUSS.means.numpy(), GAUSS.var.numpy()
    return mean + (NOISE - mean) * np.sqrt((var + sigma**2) / (var + HIGH**2))


def distances(rule, p, data, exact):
    """
    The mean distance from the flow at each row reached, in standard deviations of the noised data, which are 1 here;
    without the step to clean data, which is E[x_0 | x] for every sampler.
    """
    rows = []

    def watched(step):
        out = rule(step)
        rows.append(step.ahead(step.rows_used))
        return out

    ends = walk(p, data.predictor(p), watched, th.tensor(NOISE) * p.alphas_cumprod[-1] ** 0.5)
    sigma = p.sqrt_recipm1_alphas_cumprod
    return [np.abs(x.numpy() / p.alphas_cumprod[row] ** 0.5 - exact(sigma[row])).max(1).mean()
            / math.hypot(sigma[row], 0.5) for row, x in zip(rows, ends) if row >= 0]  # fmt: skip


def error(rule, flow, p):
    """On the mixture at the end; on the Gaussian over the whole walk, as symmetry cancels errors at single levels."""
    if flow == "gaussian":
        return np.mean(distances(rule, p, GAUSS, flow_of_gaussian))
    return distances(rule, p, MIXTURE, lambda sigma: flow_of_mixture(LOW))[-1]


def order_of(rule, flow, counts=(60, 120, 240)):
    """By a straight line through log error against log step; 60 rows can be taken in twos and in threes."""
    errors = [error(rule, flow, process_of(np.geomspace(LOW, HIGH, count + 1))) for count in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def halved_3m(step):
    """DPM-Solver++(3M) as it is written in widespread code: h^2 / 2 times the second derivative is halved again."""
    pred, known = solvers.evaluate(step), step.known(2)
    if len(known) < 2 or not step.row:
        return solvers.dpmpp_3m(step)
    u = [solvers.lam(step, step.row + k) for k in (-1, 0, 1, 2)]
    h, r0, r1 = u[0] - u[1], (u[1] - u[2]) / (u[0] - u[1]), (u[2] - u[3]) / (u[0] - u[1])
    d0, d1 = (pred.x0 - known[0].x0) / r0, (known[0].x0 - known[1].x0) / r1
    first, second = d0 + r0 / (r0 + r1) * (d0 - d1), (d0 - d1) / (r0 + r1)
    phi1 = np.expm1(-h)
    phi2 = phi1 / h + 1
    x0 = pred.x0 - float(phi2 / phi1) * first + float((phi2 / h - 0.5) / phi1) * second
    return solvers.by_x0(step, x0, step.row - 1), pred


def forgetful(rule, keep):
    """The rule with a shorter memory."""
    return lambda step: rule(replace(step, history=step.history[len(step.history) - keep :] if keep else []))


ORDERS = {
    "ddim": (SAMPLERS["ddim"], 1), "dpm_1": (SAMPLERS["dpm_1"], 1), "euler": (SAMPLERS["euler"], 1),
    "accelerated": (SAMPLERS["gam_mu"], 1), "gam 1.5": (partial(solvers.gam_mu, gam=1.5), 2),
    "heun": (SAMPLERS["heun"], 2), "dpm_2": (SAMPLERS["dpm_2"], 2), "2S": (SAMPLERS["dpmpp_2s"], 2),
    "2M": (SAMPLERS["dpmpp_2m"], 2), "plms": (SAMPLERS["plms"], 2), "deis 2": (partial(solvers.deis, order=2), 2),
    "edm without churn": (partial(solvers.edm, rise=0), 2), "UniP-2": (partial(solvers.unipc, correct=False), 2),
    "UniPC-1": (partial(solvers.unipc, order=1), 2), "UniPC-2": (SAMPLERS["unipc"], 3),  # the corrector adds one
    "dpm_3": (SAMPLERS["dpm_3"], 3), "3M": (SAMPLERS["dpmpp_3m"], 3), "deis 3": (SAMPLERS["deis"], 3),
}  # fmt: skip


@pytest.mark.parametrize("flow", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_at_the_solvers_order(name, flow):
    rule, order = ORDERS[name]
    assert order_of(rule, flow) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("flow", ["gaussian", "mixture"])
@pytest.mark.parametrize("rule, order", [
    (forgetful(solvers.dpmpp_2m, 0), 2), (forgetful(solvers.dpmpp_3m, 1), 3), (halved_3m, 3),
    (forgetful(solvers.deis, 0), 3), (forgetful(solvers.plms, 0), 2), (forgetful(solvers.unipc, 1), 3),
])  # fmt: skip
def test_the_fit_sees_a_solver_that_lost_its_order(rule, order, flow):
    assert order_of(rule, flow) < order - 0.5


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "adaptive"])
def test_every_deterministic_sampler_is_close_to_the_flow_down_to_little_noise(name):
    first, second = (
        distances(SAMPLERS[name], process_of(np.geomspace(0.02, HIGH, count)), MIXTURE, lambda s: flow_of_mixture(0.02))
        for count in (61, 121)
    )
    assert second[-1] < 0.65 * first[-1] and first[-1] < 0.04


@pytest.mark.parametrize("steps", [60, 61, 62])
def test_dpm_3_keeps_its_order_whatever_rows_are_left_over(steps):
    """T rows leave T - 1 to go in threes: none, one or two are left over, and the same of four times as many."""
    assert order_of(SAMPLERS["dpm_3"], "mixture", (steps, 4 * steps)) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize("name, order", [
    ("heun", 2), ("dpm_2", 2), ("dpmpp_2s", 2), ("dpmpp_2m", 2), ("dpm_3", 3), ("dpmpp_3m", 3), ("unipc", 3),
])  # fmt: skip
def test_the_order_does_not_depend_on_where_the_rows_lie(name, order):
    """Gaps in log sigma alternate, 1 : 2, however small: r_1, r_2 are not the paper's 1/3, 1/2, 2/3."""
    errors, counts = [], (60, 120, 240)
    for count in counts:
        places = np.append(0, np.cumsum(np.tile([1.0, 2.0], count // 2)))
        errors.append(error(SAMPLERS[name], "mixture", process_of(LOW * (HIGH / LOW) ** (places / places[-1]))))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(order, abs=0.2)


def test_dpm_3_at_the_papers_thirds_is_the_papers_algorithm():
    p = process_of(np.exp(-np.array([2.1, 1.8, 1.5, 1.2])))  # r = 1/3, 2/3 and h = 0.9 from row 3 to row 0
    predict, x = MIXTURE.predictor(p), th.randn(6, 2, dtype=F64, generator=th.Generator().manual_seed(0))
    ours = walk(p, predict, solvers.dpm_3, x)[0]

    def eps(u, row):
        return predict(u, th.full((6,), row)).eps

    a, s, h = np.sqrt(p.alphas_cumprod), np.sqrt(1 - p.alphas_cumprod), 0.9
    e = math.expm1(2 * h / 3)
    u1 = a[2] / a[3] * x - s[2] * math.expm1(h / 3) * eps(x, 3)
    d1 = eps(u1, 2) - eps(x, 3)
    u2 = a[1] / a[3] * x - s[1] * e * eps(x, 3) - s[1] * 2 * (e / (2 * h / 3) - 1) * d1
    d2 = eps(u2, 1) - eps(x, 3)
    by_hand = a[0] / a[3] * x - s[0] * math.expm1(h) * eps(x, 3) - s[0] * 3 / 2 * (math.expm1(h) / h - 1) * d2
    th.testing.assert_close(ours, by_hand, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- equalities

def same(process, rules, data=MIXTURE, **kwargs):
    """Rules give the same walk, for the same start and noise."""
    predict, walks = data.predictor(process, ModelVarType.FIXED_SMALL), []
    for rule in rules:
        th.manual_seed(0)
        walks.append(th.stack(walk(process, predict, rule, th.randn(20, 2, dtype=F64), **kwargs)))
    for other in walks[1:]:
        th.testing.assert_close(other, walks[0], rtol=0, atol=1e-9)


def test_ddim_under_its_other_names():
    """DPM-Solver-1, Euler in sigma, (gam, mu) = (1, 0), and every multistep method of order one."""
    others = [solvers.dpm_1, solvers.euler, partial(solvers.gam_mu, gam=1.0), partial(solvers.deis, order=1)]
    others += [partial(solvers.unipc, order=1, correct=False), forgetful(solvers.plms, 0)]
    same(process().spaced(range(0, 1000, 20)), [sampling.ddim, *others])


def test_ancestral_sampling_under_its_other_names():
    """DDIM with eta = 1, the SDE's first-order step, Euler-ancestral, (gam, mu) = (1, 1/2)."""
    others = [partial(sampling.ddim, eta=1.0), SAMPLERS["euler_ancestral"], partial(solvers.gam_mu, gam=1.0, mu=0.5)]
    sde = forgetful(partial(solvers.dpmpp_2m, eta=1.0), 0)
    same(process().spaced(range(0, 1000, 20)), [sampling.ddpm, *others, sde])


def test_multistep_methods_that_are_one():
    p = process().spaced(range(0, 1000, 20))
    same(p, [SAMPLERS["dpmpp_3m"], partial(solvers.unipc, order=3, correct=False)])
    same(p, [SAMPLERS["heun"], partial(solvers.edm, stride=1, rise=0)])
    th.testing.assert_close(*[  # weights of 3M on even rows, in the closed form of exponential integrators
        th.tensor(solvers.fit_over_step([0.0, -h, -2 * h], 0.0, h, 1)) if exact else th.tensor(adams(h))
        for h in [0.3] for exact in (True, False)
    ], rtol=0, atol=1e-13)  # fmt: skip


def adams(h):
    phi1 = -math.expm1(-h)
    phi2, phi3 = 1 - phi1 / h, 0.5 - (1 - phi1 / h) / h
    first, second = np.array([1.5, -2, 0.5]), np.array([1.0, -2, 1])
    return (np.array([phi1, 0, 0]) + phi2 * first + phi3 * second) / phi1


def smalldiffusion_samples(eps, sigmas, xt, gam, mu):
    """The sampler of the package, from its paper: `sigmas` descend, xt is y = x / sqrt(abar)."""
    last = None
    for sigma, target in pairwise(sigmas):
        now = eps(xt, sigma)
        mean = now if last is None else gam * now + (1 - gam) * last
        lower = (target / sigma**mu) ** (1 / (1 - mu))
        xt, last = xt - (sigma - lower) * mean + math.sqrt(target**2 - lower**2) * th.randn_like(xt), now
        yield xt


@pytest.mark.parametrize("gam, mu", [(1.0, 0.0), (1.0, 0.5), (2.0, 0.0), (1.3, 0.2)])
def test_the_world_of_sigma_is_the_scaled_world(gam, mu):
    """A sample in sigma's world is ours over sqrt(abar); (1, 0) is DDIM there, (1, 1/2) is DDPM: see above."""
    p = process().spaced(range(0, 1000, 20))
    predict, sigmas = MIXTURE.predictor(p, ModelVarType.FIXED_SMALL), p.sqrt_recipm1_alphas_cumprod
    row = {float(sigma): k for k, sigma in enumerate(sigmas)}

    def eps(y, sigma):
        return predict(y * p.alphas_cumprod[row[sigma]] ** 0.5, th.full((len(y),), row[sigma])).eps

    start = th.randn(20, 2, dtype=F64)
    th.manual_seed(1)
    theirs = list(smalldiffusion_samples(eps, [float(s) for s in sigmas[::-1]], start / p.alphas_cumprod[-1] ** 0.5,
                                         gam, mu))  # fmt: skip
    th.manual_seed(1)
    ours = walk(p, predict, partial(solvers.gam_mu, gam=gam, mu=mu), start)
    for row, mine, other in zip(range(len(sigmas) - 2, -1, -1), ours, theirs):
        th.testing.assert_close(mine / p.alphas_cumprod[row] ** 0.5, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
def test_the_posterior_step_of_textbooks_is_ancestral_sampling_with_the_small_variance(clip):
    """
    x_0 from eps, clamped or not, then q(x_{t-1} | x_t, x_0) with the root of its variance; without clamping the mean
    is (x - beta / sqrt(1 - abar) eps) / sqrt(alpha).
    """
    p = process(60)
    predict = clipped(MIXTURE.predictor(p, ModelVarType.FIXED_SMALL), p, clip)
    x = th.randn(20, 2, dtype=F64) * 2
    th.manual_seed(2)
    ours = walk(p, predict, sampling.ddpm, x)[-1]
    th.manual_seed(2)
    for t in reversed(range(60)):
        abar, prev, beta = p.alphas_cumprod[t], p.alphas_cumprod[t - 1] if t else 1.0, p.betas[t]
        x0 = predict(x, th.full((20,), t)).x0
        mean = (math.sqrt(prev) * beta * x0 + math.sqrt(1 - beta) * (1 - prev) * x) / (1 - abar)
        if not clip:
            eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
            textbook = (x - beta / math.sqrt(1 - abar) * eps) / math.sqrt(1 - beta)
            th.testing.assert_close(mean, textbook, rtol=0, atol=1e-12)
        x = mean + math.sqrt(beta * (1 - prev) / (1 - abar)) * th.randn_like(x)
    th.testing.assert_close(ours, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_guidance_by_the_exact_classifier_is_the_conditional_model(name):
    data, p = toy.ring(), process().spaced(range(0, 1000, 20))
    exact, y = data.predictor(p, ModelVarType.FIXED_SMALL), th.arange(12) % 3
    guided = classifier_guided(lambda x, t, y=None: exact(x, t), data.classifier_gradient(p))
    start = th.randn(12, 2, dtype=F64, generator=th.Generator().manual_seed(0))
    ends = [walk(p, predict, SAMPLERS[name], start, cond={"y": y})[-1] for predict in (guided, exact)]
    th.testing.assert_close(*ends, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------ rows, evaluations

def counted(predict):
    calls = Counter()

    def counting(x, t, **cond):
        calls[int(t[0])] += 1
        return predict(x, t, **cond)

    return counting, calls


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "adaptive"])
def test_evaluations_are_what_the_table_says(name):
    p = process().spaced(range(30, 1000, 30))
    predict, calls = counted(MIXTURE.predictor(p))
    walk(p, predict, SAMPLERS[name], th.randn(2, 2, dtype=F64))
    assert calls.total() == pytest.approx(SAMPLERS[name].evaluations * p.num_timesteps, abs=2)
    if SAMPLERS[name].evaluations == 1 and name != "edm":
        assert set(calls) == set(range(p.num_timesteps)) and set(calls.values()) == {1}


def test_rules_of_several_rows_pass_over_them():
    p = process().spaced(range(0, 1000, 100))  # rows 9 .. 0
    landed = {name: [] for name in ("dpm_2", "dpm_3", "dpmpp_2s", "edm")}
    for name, starts in landed.items():

        def watched(step, name=name, starts=starts):
            starts.append(step.row)
            return SAMPLERS[name](step)

        walk(p, MIXTURE.predictor(p), watched, th.randn(2, 2, dtype=F64))
    twos = [9, 7, 5, 3, 1, 0]
    assert landed == {"dpm_2": twos, "dpm_3": [9, 6, 3, 0], "dpmpp_2s": twos, "edm": twos}
    eleven, starts = process().spaced(range(0, 1000, 91)), []
    walk(eleven, MIXTURE.predictor(eleven), lambda step: starts.append(step.row) or solvers.dpm_3(step),
         th.randn(2, 2, dtype=F64))  # fmt: skip
    assert starts == [10, 7, 4, 2, 0]  # 4 rows are two steps of second order, not one of third and one of first


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_few_steps_work(name, steps):
    x = th.randn(10, 2, dtype=F64, generator=th.Generator().manual_seed(0))
    out = named(process(), name, steps, MIXTURE, x)
    assert out.isfinite().all()
    if name in ("ddim", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc"):  # high orders in eps overshoot at such steps
        assert out.abs().max() < 3
    if steps == 1:  # E[x_0 | x_T]
        expected = MIXTURE.denoise(process(), x, th.full((10,), 999))[0]
        th.testing.assert_close(out, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_process_that_ends_in_pure_noise(name):
    """abar = 0 in the last row: sigma is infinite, and the first step is of first order. Nearly pure noise agrees."""
    ends = []
    for last in (0.0, 1e-9):
        abar = np.append(process().alphas_cumprod[9::30], last)
        p = Process(1 - abar / np.append(1.0, abar[:-1]))

        def predict(x, t, p=p):
            x0 = MIXTURE.denoise(p, x, t)[0]
            alpha, s = p.at("sqrt_alphas_cumprod", t, x), p.at("sqrt_one_minus_alphas_cumprod", t, x)
            variance, log = (p.at(n, t, x) for n in ("posterior_variance", "posterior_log_variance_clipped"))
            return Prediction(x0, (x - alpha * x0) / s, variance, log)

        th.manual_seed(0)
        ends.append(walk(p, predict, SAMPLERS[name], th.randn(10, 2, dtype=F64))[-1])
    assert ends[0].isfinite().all()
    if name not in ("heun", "edm", "adaptive", "dpm_2", "dpm_3", "dpmpp_2s"):  # their first step spans 1e-9 .. 1
        th.testing.assert_close(*ends, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_from_pure_noise(name):
    """
    The last row tells nothing of y, so it is not guided; nothing divides by 0, and as many samples come to their class
    as from nearly pure noise.
    """
    data, y, shares = toy.ring(), th.arange(60) % 3, []
    start = th.randn(60, 2, dtype=F64, generator=th.Generator().manual_seed(0))
    for last in (0.0, 1e-9):
        abar = np.append(process().alphas_cumprod[9::30], last)
        p = Process(1 - abar / np.append(1.0, abar[:-1]))

        def predict(x, t, y=None, p=p):
            x0 = data.denoise(p, x, t)[0]
            alpha, s = p.at("sqrt_alphas_cumprod", t, x), p.at("sqrt_one_minus_alphas_cumprod", t, x)
            variance, log = (p.at(n, t, x) for n in ("posterior_variance", "posterior_log_variance_clipped"))
            return Prediction(x0, (x - alpha * x0) / s, variance, log)

        guided = classifier_guided(predict, data.classifier_gradient(p, 3.0))
        th.manual_seed(0)
        x = deque(sample(p, guided, SAMPLERS[name], start, cond={"y": y}), maxlen=1).pop()[0]
        assert x.isfinite().all()
        shares.append((data.posterior(p, x, th.zeros_like(y), 3).argmax(1) == y).float().mean().item())
        if last == 0:
            top = th.full_like(y, p.num_timesteps - 1)
            pure = sampling.guided_score(p, start, top, guided(start, top, y=y))
            assert th.equal(pure.x0, predict(start, top).x0) and pure.grad is None
    assert shares[0] >= min(shares[1] - 0.1, 0.9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_single_precision_stays_single_and_close(name):
    p = process().spaced(range(0, 1000, 50))
    start, ends = th.randn(8, 2, generator=th.Generator().manual_seed(0)), []
    for dtype in (th.float32, F64):
        data = toy.Mixture(th.tensor(MEANS, dtype=dtype), th.tensor(STDS, dtype=dtype), th.tensor(WEIGHTS))
        predict = data.predictor(p, ModelVarType.FIXED_SMALL)
        noise = SeededNoise(0, range(8))
        ends.append(walk(p, predict, SAMPLERS[name], start.to(dtype), noise=noise)[-1])
    assert ends[0].dtype == th.float32
    th.testing.assert_close(ends[0].double(), ends[1], rtol=0, atol=2e-3)


def test_adaptive_steps_meet_the_tolerance_with_fewer_evaluations():
    p = process_of(np.geomspace(LOW, HIGH, 2001))
    errors, evaluations = [], []
    for rtol in (1e-1, 1e-2, 1e-3):
        predict, calls = counted(MIXTURE.predictor(p))
        rule = partial(solvers.adaptive, rtol=rtol, atol=rtol / 10)
        x = walk(p, predict, rule, th.tensor(NOISE) * p.alphas_cumprod[-1] ** 0.5)[-2]
        errors.append(np.abs(x.numpy() / p.alphas_cumprod[0] ** 0.5 - flow_of_mixture(LOW)).max(1).mean())
        evaluations.append(calls.total())
    assert all(error < rtol for error, rtol in zip(errors, (1e-1, 1e-2, 1e-3)))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert evaluations[0] < 40 and 2 * evaluations[0] < evaluations[2] < 400


# ------------------------------------------------------------------------------------------- the distribution reached

def moments(full, name, steps, mean, std):
    """
    The exact mean and variance of a sampler's output on Gaussian data of one dimension, without sampling: each step is
    affine in x and the noise, so feed unit vectors.
    """
    rule, rows = plan(full, name, steps)
    p = full.spaced(rows)
    sources = th.cat([th.zeros(1, steps + 1, dtype=F64), th.eye(steps + 1, dtype=F64)])
    draws = iter(range(1, steps + 1))
    predict = toy.Mixture(th.tensor([[mean]], dtype=F64), std).predictor(p, ModelVarType.FIXED_SMALL)
    out = walk(p, predict, rule, sources[:, :1], noise=lambda x: sources[:, next(draws)].unsqueeze(1))[-1]
    return out[0].item(), ((out[1:] - out[0]) ** 2).sum().item()


@pytest.mark.parametrize("name, bound", [
    ("ddpm", 0.06), ("dpmpp_2m_sde", 0.002), ("euler_ancestral", 0.055), ("edm", 0.008), ("ddim", 0.05), ("heun", 1e-3),
    ("dpmpp_2m", 1e-3), ("dpm_3", 1e-3), ("dpmpp_3m", 1e-3), ("unipc", 1e-3), ("deis", 1e-3), ("plms", 2e-3),
])  # fmt: skip
def test_mean_and_variance_on_gaussian_data_come_closer_with_more_steps(name, bound):
    """Exact, no Monte Carlo. abar_T = 4e-5 leaves a trace of the start in the mean: 0.3 (1 - ...) < 0.002."""
    full, errors = process(), []
    for steps in (60, 240):
        mean, variance = moments(full, name, steps, 0.3, 0.5)
        errors.append(abs(variance / 0.25 - 1))
        assert mean == pytest.approx(0.3, abs=0.012 if steps == 60 else 0.004)
    assert errors[1] < bound


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_reach_mean_covariance_and_weights(name):
    """
    Monte Carlo with 6000 samples, 150 rows of the sampler's own spacing: bounds are four standard errors, plus 0.012
    for the steps.
    """
    count, mean = 6000, WEIGHTS @ MEANS
    gap = MEANS - mean
    covariance = (WEIGHTS[:, None] * gap).T @ gap + np.diag(WEIGHTS @ STDS**2)
    th.manual_seed(5)
    x = named(process(), name, 150, MIXTURE, th.randn(count, 2, dtype=F64))
    spread = math.sqrt(covariance.diagonal().max())
    assert np.abs(x.mean(0).numpy() - mean).max() < 4 * spread / count**0.5 + 0.012
    assert np.abs(np.cov(x.T.numpy()) - covariance).max() < 4 * 1.5 * spread**2 / count**0.5 + 0.012
    # Which component a sample is of is uncertain where they overlap; the expected share is the weight all the same.
    share = MIXTURE.posterior(process_of([1e-6]), x, th.zeros(count, dtype=th.int64), 3).mean(0)
    assert np.abs(share.numpy() - WEIGHTS).max() < 4 * 0.5 / count**0.5 + 0.012


def test_churn_adds_noise_that_the_steps_take_away_again():
    """The samples change, the distribution stays; s_max below every sigma switches churn off."""
    p, x = process().spaced(range(0, 1000, 20)), th.randn(20, 2, dtype=F64)
    predict = MIXTURE.predictor(p)
    plain = walk(p, predict, partial(solvers.edm, rise=0), x)[-1]
    assert (walk(p, predict, solvers.edm, x)[-1] - plain).abs().max() > 0.05
    assert th.equal(walk(p, predict, partial(solvers.edm, s_max=1e-3), x)[-1], plain)
    assert th.equal(walk(p, predict, partial(solvers.edm, s_min=1e3), x)[-1], plain)


def test_churn_adds_the_noise_between_two_levels_and_only_between_near_ones():
    """What the first evaluation sees is x lifted by a row: variance sigma_lifted^2 - sigma^2, times s_noise^2."""
    p, seen = process(), []

    def predict(x, t):
        seen.append(x / p.at("sqrt_alphas_cumprod", t, x))
        return Prediction(th.zeros_like(x), x, th.zeros_like(x), th.zeros_like(x))

    th.manual_seed(0)
    x = th.zeros(40000, 1, dtype=F64)
    sigma = p.sqrt_recipm1_alphas_cumprod
    for s_noise in (1.0, 0.5):
        for lift in (1, 5):
            seen.clear()
            next(sample(p, predict, partial(solvers.edm, rise=lift, s_noise=s_noise), x, rows=[500]))
            expected = s_noise**2 * (sigma[500 + lift] ** 2 - sigma[500] ** 2)
            assert seen[0].var().item() == pytest.approx(expected, rel=4 * (2 / 40000) ** 0.5)
    far = next(k for k in range(501, 1000) if sigma[k] > 2**0.5 * sigma[500])
    for row, lifted in ((far - 1, True), (far, False)):  # up to sqrt(2) and no further
        seen.clear()
        next(sample(p, predict, partial(solvers.edm, rise=row - 500), x, rows=[500]))
        assert (seen[0].var().item() > 0) == lifted


# ------------------------------------------------------------------------------------------------- Brownian noise

FINE = process_of(np.geomspace(0.05, 50, 1025))


def sde_end(rule, steps, seed=0, indices=range(12)):
    p = FINE.spaced(range(0, 1025, 1024 // steps))
    start = SeededNoise(seed, indices).normal(2).double()
    return walk(p, MIXTURE.predictor(p, ModelVarType.FIXED_SMALL), rule, start,
                noise=BrownianNoise(seed, indices, FINE))[-1]  # fmt: skip


def test_with_brownian_noise_a_sample_converges_as_steps_grow():
    """The same seed is the same path, so that all samplers of the SDE come to the same samples; ordinary noise not."""
    best = sde_end(SAMPLERS["dpmpp_2m_sde"], 1024)
    for name in ("ddpm", "dpmpp_2m_sde"):
        errors = [(sde_end(SAMPLERS[name], steps) - best).abs().mean().item() for steps in (16, 64, 256)]
        assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.02, (name, errors)
    start, p = SeededNoise(0, range(12)).normal(2).double(), FINE.spaced(range(0, 1025, 8))
    ordinary = walk(p, MIXTURE.predictor(p), SAMPLERS["dpmpp_2m_sde"], start, noise=SeededNoise(1, range(12)))[-1]
    assert (ordinary - best).abs().mean() > 0.1


def test_brownian_pieces_are_standard_normal_and_add_up():
    noise = BrownianNoise(0, range(3000), FINE)
    like = th.zeros(3000, 2, dtype=F64)
    whole = FINE.spaced([0, 1000, 1003, 1024])
    parts = [noise.piece(like, FINE, row) for row in (1001, 1002, 1003)]
    gaps = -np.diff(noise.snr[1000:1004])
    together = sum(part * math.sqrt(gap) for part, gap in zip(parts, gaps)) / math.sqrt(gaps.sum())
    th.testing.assert_close(noise.piece(like, whole, 2), together, rtol=0, atol=1e-9)
    assert together.std().item() == pytest.approx(1, abs=0.04) and abs(together.mean().item()) < 0.05
    assert abs((parts[0] * parts[1]).mean().item()) < 0.05
    other = noise.piece(like, whole, 2, path=1)  # a second draw in one step
    assert abs((other * together).mean().item()) < 0.05 and other.std().item() == pytest.approx(1, abs=0.04)
    assert th.equal(noise.piece(like, FINE, 0), like)
    first = noise._normal(0, 0, 0, like[:1])
    assert not th.equal(first, SeededNoise(0, [0]).normal(2)[0].double())  # the start, with the same seed


def test_brownian_noise_belongs_to_the_sample():
    whole = sde_end(SAMPLERS["dpmpp_2m_sde"], 16)
    parts = [sde_end(SAMPLERS["dpmpp_2m_sde"], 16, indices=each) for each in (range(0, 2), range(2, 12))]
    assert th.equal(th.cat(parts), whole)
    assert not th.equal(sde_end(SAMPLERS["dpmpp_2m_sde"], 16, seed=1), whole)


def test_brownian_noise_of_another_process_is_refused():
    p = process(50)
    with pytest.raises(ValueError, match="space the walked process"):
        walk(p, MIXTURE.predictor(p), sampling.ddpm, th.randn(2, 2), noise=BrownianNoise(0, range(2), FINE))


# ------------------------------------------------------------------------------------------------------- inversion

def there_and_back(rule, steps, **kwargs):
    """The mean distance between data and what comes back from their noise."""
    full = process_of(np.geomspace(0.02, 80, steps))
    predict = MIXTURE.predictor(full)
    data = MIXTURE.draw(200, th.Generator().manual_seed(0))[0]
    x = deque(sampling.invert(full, predict, data, rule, **kwargs), maxlen=1).pop()[0]
    return (walk(full, predict, rule, x)[-1] - data).abs().mean().item(), x


@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3), ("dpmpp_3m", 3)])
def test_data_come_back_from_their_noise(name, order):
    counts = (50, 100, 200)
    errors = [there_and_back(SAMPLERS[name], steps)[0] for steps in counts]
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] > order - 0.3
    assert errors[1] < (0.05 if name == "ddim" else 1e-3)


def test_the_noise_found_is_standard_normal():
    noise = there_and_back(SAMPLERS["heun"], 100)[1]
    assert abs(noise.mean().item()) < 4 / 400**0.5 and noise.std().item() == pytest.approx(1, abs=4 / 800**0.5)


def test_a_walk_up_is_the_originals_reverse_step():
    p, data = process(50), MIXTURE.draw(8, th.Generator().manual_seed(0))[0]
    predict, x = MIXTURE.predictor(p), data
    for row in range(49):
        x = sampling.ddim_reverse(sampling.Step(p, predict, x, th.full((8,), row), None))[0]
    for rule in (sampling.ddim, sampling.ddim_reverse, solvers.dpm_1):
        ours = deque(sampling.invert(p, predict, data, rule, refine=0), maxlen=1).pop()[0]
        th.testing.assert_close(ours, x, rtol=0, atol=1e-10)


def test_walks_that_cannot_go_up():
    p, data = process(50), th.zeros(2, 2, dtype=F64)
    for rule in (sampling.ddpm, partial(sampling.ddim, eta=0.5), *(SAMPLERS[name] for name in STOCHASTIC)):
        with pytest.raises(ValueError, match=r"adds noise.*deterministic"):
            list(sampling.invert(p, MIXTURE.predictor(p), data, rule))
    one = p.spaced([49])
    with pytest.raises(ValueError, match="two rows or more"):
        list(sampling.invert(one, MIXTURE.predictor(one), data))


# --------------------------------------------------------------------------------------------------------- spacing

@pytest.mark.parametrize("total", [50, 1000])
def test_the_uniform_spacing_is_the_originals(total):
    for count in range(2, total + 1):
        assert set(spacing.spaced_rows(process(total), "uniform", count)) == space_timesteps(total, f"{count}")


@pytest.mark.parametrize("name", spacing.SPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_spacings_give_as_many_different_rows_as_asked(name, schedule):
    p = process(200, schedule)
    for count in (1, 2, 3, 7, 50, 113, 199, 200):
        rows = spacing.spaced_rows(p, name, count)
        assert len(rows) == count and rows == sorted(set(rows)) and rows[0] >= 0 and rows[-1] < 200
        last = {"leading": None, "log_snr": p.row(-2 * np.log(80)), "karras": p.row(-2 * np.log(80))}.get(name, 199)
        assert last is None or rows[-1] >= min(199, int(last))  # the latter begin at sigma 80
        assert all(type(row) is int for row in rows)
    assert spacing.spaced_rows(p, name, 1) == [199]


def test_spacings_by_hand():
    p = process()

    def rows(name, count, p=p):
        return spacing.spaced_rows(p, name, count)

    assert rows("leading", 4) == [0, 250, 500, 750]
    assert rows("trailing", 4) == [249, 499, 749, 999]
    assert rows("uniform", 4) == [0, 333, 666, 999]
    assert rows("quadratic", 4) == [0, 111, 444, 999]
    fine = process_of(np.geomspace(0.002, 80, 20001))
    sigma = fine.sqrt_recipm1_alphas_cumprod
    i = np.arange(18)
    karras = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma[rows("karras", 18, fine)][::-1], karras, rtol=1e-3)
    np.testing.assert_allclose(sigma[rows("log_snr", 18, fine)], np.geomspace(0.002, 80, 18), rtol=1e-3)


def test_steps_are_not_spent_above_sigma_80():
    """A cosine process goes on to sigma 20,000: rows even in log-SNR begin at 80, as EDM's do."""
    p = Process(get_named_beta_schedule("cosine", 1000))
    sigma = p.sqrt_recipm1_alphas_cumprod
    for name, level in (("log_snr", np.log), ("karras", lambda s: s ** (1 / 7))):
        rows = spacing.spaced_rows(p, name, 9)
        assert sigma[rows[-1]] <= 80 < sigma[rows[-1] + 1]
        gaps = np.diff(level(sigma[rows[2:]]))  # near the data rows are too few to be even
        np.testing.assert_allclose(gaps, gaps.mean(), rtol=0.1)
    assert spacing.spaced_rows(p, "log_snr", 1000) == list(range(1000))
    assert spacing.spaced_rows(p, "log_snr", 997) == list(range(997))


def test_spacings_of_a_process_that_ends_in_pure_noise():
    p = Process(np.append(process(100).betas[:-1], 1.0))
    for name in spacing.SPACINGS:
        for count in (1, 2, 3, 40, 100):
            rows = spacing.spaced_rows(p, name, count)
            assert len(set(rows)) == count and (name == "leading" or rows[-1] == 99)


@pytest.mark.parametrize("call, message", [
    (lambda p: plan(p, "dpmp_2m"), "unknown sampler: dpmp_2m .choose from ddpm, ddim.*did you mean dpmpp_2m"),
    (lambda p: plan(p, "ddim", 10, "uniforn"), "unknown spacing: uniforn .*did you mean uniform"),
    (lambda p: plan(p, "ddim", 0), "steps must be a whole number from 1 to the 50 rows of the process, not 0"),
    (lambda p: plan(p, "ddim", -3), "not -3"),
    (lambda p: plan(p, "ddim", 2.5), "not 2.5"),
    (lambda p: plan(p, "ddim", 51), "from 1 to the 50 rows of the process, not 51"),
    (lambda p: plan(p, "ddim", 10, etta=1.0), "unknown option of ddim: etta .*did you mean eta"),
    (lambda p: plan(p, "dpm_2", 10, eta=1.0), "the sampler dpm_2 has no options, and so no eta"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(process(50))
    assert "\n" not in str(caught.value)


def test_a_plan_has_the_samplers_own_spacing_and_options():
    p = process()
    assert plan(p, "ddim", 10)[1] == spacing.spaced_rows(p, "uniform", 10)
    assert plan(p, "dpmpp_2m", 10)[1] == spacing.spaced_rows(p, "log_snr", 10)
    assert plan(p, "dpmpp_2m", 10, "karras")[1] == spacing.spaced_rows(p, "karras", 10)
    assert plan(p, "ddpm")[1] == list(range(1000))
    assert plan(p, "ddim", 10, eta=0.5)[0].keywords == {"eta": 0.5}
    assert plan(p, "euler_ancestral", 10, eta=0.5)[0].keywords == {"eta": 0.5}


# ------------------------------------------------------------------------------------------------------ the guide

def test_the_guide_to_adding_a_sampler_works_word_for_word(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLERS", dict(BUILT_IN))
    text = (Path(__file__).parent.parent / "docs" / "add_a_sampler.md").read_text()
    blocks, names = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL), {}
    for block in blocks:
        exec(block, names)
    added = set(sampling.SAMPLERS) - set(BUILT_IN)
    assert added == {"midpoint"} and names["slope"] == pytest.approx(2, abs=0.2)
    rule = next(block for block in blocks if "def midpoint" in block)
    assert len([line for line in rule.splitlines() if line.strip()]) <= 12
    table = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \| (.*?) \|", text.split("## On digits")[0], re.MULTILINE)
    said = {name: (order == "SDE", cost, own) for names, order, cost, own in table[-15:]
            for name, own in zip(re.findall(r"\w+", names), own.split(", ") * 2)}  # fmt: skip
    true = {name: (row.stochastic, str(row.evaluations or "varies"), row.spacing) for name, row in BUILT_IN.items()}
    assert said == true
