"""Samplers and guidance against data whose ideal denoiser, scores and classifier are known exactly."""

import math
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch as th

from guided_diffusion import sampling, toy
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.guidance import classifier_guided, interval, mix
from guided_diffusion.prediction import (
    Prediction,
    clipped,
    edm_scales,
    edm_target,
    eps_from_x0,
    posterior_mean,
    velocity,
)
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.spacing import spaced_rows

F64 = th.float64


def process(steps=1000, respacing=None, schedule="linear"):
    full = Process(get_named_beta_schedule(schedule, steps))
    return full.spaced(space_timesteps(steps, respacing)) if respacing else full


def run(process, predict, rule, x, noise=th.randn_like, cond=None):
    return deque(sampling.sample(process, predict, rule, x, noise=noise, cond=cond), maxlen=1).pop()[0]


def mean_and_variance(process, predict, rule):
    """
    The exact mean and variance of a sampler's output on one-dimensional Gaussian data, without any sampling.

    There each step is affine in (x, noise), so the output is affine in (x_T, z_T, ..., z_0): feed unit vectors.
    """
    steps = process.num_timesteps
    sources = th.cat([th.zeros(1, steps + 1, dtype=F64), th.eye(steps + 1, dtype=F64)])  # [1+sources, sources]
    draws = iter(range(1, steps + 1))
    out = run(process, predict, rule, sources[:, :1], noise=lambda x: sources[:, next(draws)].unsqueeze(1))
    mean = out[0].item()
    return mean, ((out[1:] - mean) ** 2).sum().item()


M, S = 0.3, 0.5
GAUSS = toy.Mixture(th.tensor([[M]], dtype=F64), S)


# -------------------------------------------------------------------------------------------------- the samplers

@pytest.mark.parametrize("steps", [1, 7, 100])
def test_ancestral_sampling_with_the_exact_variance_is_exact(steps):
    """Started from the true q(x_T), every step has the true mean and variance; the last returns E[x_0 | x_1]."""
    p = process(1000, f"{steps}")
    abar_T = p.alphas_cumprod[-1]

    def rule(step):  # start from q(x_T) instead of N(0, 1)
        if step.row == p.num_timesteps - 1:
            step.x = math.sqrt(abar_T) * M + math.sqrt(abar_T * S**2 + 1 - abar_T) * step.x
        return sampling.ddpm(step)

    mean, variance = mean_and_variance(p, GAUSS.predictor(p), rule)
    abar = p.alphas_cumprod[0]
    assert mean == pytest.approx(M, rel=1e-12)
    assert variance == pytest.approx(abar * S**4 / (abar * S**2 + 1 - abar), rel=1e-10)


def log_snr_process(steps):
    """sigma from 0.02 to 80 in even steps of its logarithm."""
    abar = 1 / (1 + np.geomspace(0.02, 80, steps) ** 2)
    return Process(1 - abar / np.append(1.0, abar[:-1]))


@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_ode_samplers_reach_the_data_at_their_order(name, order):
    """On Gaussian data the flow moves quantiles to quantiles; the error falls as (1 / steps)^order."""
    errors, counts = [], (80, 160, 320)
    for count in counts:
        p = log_snr_process(count)
        mean = np.sqrt(p.alphas_cumprod) * M
        std = np.sqrt(p.alphas_cumprod * S**2 + 1 - p.alphas_cumprod)
        start = th.tensor([[mean[-1] + 1.7 * std[-1]]], dtype=F64)
        walk = sampling.sample(p, GAUSS.predictor(p), sampling.SAMPLERS[name], start)
        xs = [x.item() for x, _ in walk]
        # Look at row 0: the last step, to clean data, is E[x_0 | x_1] for every sampler.
        errors.append(abs(xs[-2] - (mean[0] + 1.7 * std[0])))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2), errors


def test_rows_even_in_log_snr():
    p = process()
    rows = spaced_rows(p, "log_snr", 20)
    sigma = p.sqrt_recipm1_alphas_cumprod
    gaps = np.diff(np.log(sigma[rows]))
    assert rows[0] == 0 and sigma[rows[-1]] <= 80 < sigma[rows[-1] + 1] and len(rows) == 20
    assert gaps.max() / gaps.min() < 2.5 and np.ptp(np.diff(rows)) > 50


@pytest.mark.parametrize("rule", [
    sampling.ddpm, sampling.ddim, partial(sampling.ddim, eta=0.5), partial(sampling.ddim, eta=1.0),
    sampling.heun, sampling.dpmpp_2m,
])  # fmt: skip
def test_every_sampler_reaches_mean_and_variance(rule):
    p = process(1000)
    mean, variance = mean_and_variance(p, GAUSS.predictor(p, ModelVarType.FIXED_SMALL), rule)
    assert mean == pytest.approx(M, abs=0.003)  # abar_T = 4e-5 leaves a trace of the start
    assert variance == pytest.approx(S**2, rel=0.02)  # the small variance is too small by O(1 / T)


@pytest.mark.parametrize("name", list(sampling.SAMPLERS))
def test_samplers_reach_mean_covariance_and_weights_of_a_mixture(name):
    """Monte Carlo, 4000 samples: every bound is four standard errors plus 0.01 for the discretization."""
    means = th.tensor([[-0.6, 0.2], [0.5, 0.5], [0.1, -0.7]], dtype=F64)
    weights = th.tensor([0.5, 0.3, 0.2], dtype=F64)
    data = toy.Mixture(means, 0.1, weights)
    p = process(1000, "200")
    th.manual_seed(0)
    x = run(p, data.predictor(p, ModelVarType.FIXED_SMALL), sampling.SAMPLERS[name], th.randn(4000, 2, dtype=F64))
    mean = weights @ means
    covariance = (means - mean).T @ ((means - mean) * weights[:, None]) + 0.01 * th.eye(2)
    spread = covariance.diagonal().max().sqrt().item()
    assert (x.mean(0) - mean).abs().max() < 4 * spread / 4000**0.5 + 0.01
    assert (th.cov(x.T) - covariance).abs().max() < 4 * 1.5 * spread**2 / 4000**0.5 + 0.01
    share = th.bincount(th.cdist(x, means).argmin(1), minlength=3) / 4000
    assert (share - weights).abs().max() < 4 * 0.5 / 4000**0.5 + 0.01


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_small_variance():
    data = toy.ring()
    for respacing in (None, "25"):
        p = process(200, respacing)
        predict = data.predictor(p, ModelVarType.FIXED_SMALL)
        results = []
        for rule in (sampling.ddpm, partial(sampling.ddim, eta=1.0)):
            th.manual_seed(0)
            results.append(run(p, predict, rule, th.randn(50, 2, dtype=F64)))
        th.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_sampling_lands_on_the_points_of_a_finite_data_set():
    """Limits of the ideal denoiser: the data's mean at all noise, the nearest point at none."""
    th.manual_seed(0)
    images = th.rand(6, 1, 4, 4, dtype=F64) * 2 - 1
    ideal = toy.ideal_denoiser(images)
    p = process()
    x = th.randn(5, 1, 4, 4, dtype=F64)
    far = ideal.denoise(Process([1 - 1e-14]), x, th.zeros(5, dtype=th.int64))[0]
    th.testing.assert_close(far, images.mean(0).expand(5, 1, 4, 4), atol=1e-5, rtol=0)
    near = ideal.denoise(p, images[:5] * p.alphas_cumprod[0] ** 0.5, th.zeros(5, dtype=th.int64))[0]
    th.testing.assert_close(near, images[:5], atol=1e-9, rtol=0)
    for rule in (sampling.ddpm, sampling.ddim):
        out = run(p, ideal.predictor(p, ModelVarType.FIXED_SMALL), rule, x)
        assert th.cdist(out.flatten(1), images.flatten(1)).min(1).values.max() < 1e-6


def test_mixture_agrees_with_numerical_integration():
    """E[x_0 | x_t], its variance and p(x_t) of a one-dimensional mixture, against a sum over a fine grid of x_0."""
    data = toy.Mixture(th.tensor([[-0.5], [0.4]], dtype=F64), th.tensor([[0.2], [0.1]], dtype=F64), [0.3, 0.7])
    p, t, x = process(), th.tensor([350]), th.tensor([[0.25]], dtype=F64)
    abar = p.alphas_cumprod[350]
    grid = np.linspace(-3, 3, 200001)

    def normal(x, mean, var):
        return np.exp(-((x - mean) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)

    prior = 0.3 * normal(grid, -0.5, 0.04) + 0.7 * normal(grid, 0.4, 0.01)
    joint = prior * normal(0.25, np.sqrt(abar) * grid, 1 - abar) * (grid[1] - grid[0])
    mean, var = data.denoise(p, x, t)
    expected = (joint * grid).sum() / joint.sum()
    assert data.log_density(p, x, t).item() == pytest.approx(np.log(joint.sum()), rel=1e-9)
    assert mean.item() == pytest.approx(expected, rel=1e-9)
    assert var.item() == pytest.approx((joint * (grid - expected) ** 2).sum() / joint.sum(), rel=1e-8)


# --------------------------------------------------------------------------------------------- equal formulations

def reread(process, mean_type, var_type):
    """The mixture's ideal x_0 as the output of a network of another kind."""
    data = toy.ring()

    def network(x, t, y=None):
        if mean_type is ModelMeanType.EDM:  # told log(sigma) / 4 and shown c_in x
            t = th.from_numpy(process.row(-8 * t.numpy())).round().long()
            x = x / edm_scales(process, x, t)[2]
        x0 = data.denoise(process, x, t)[0]
        eps = eps_from_x0(process, x, t, x0)
        out = {
            ModelMeanType.START_X: x0,
            ModelMeanType.EPSILON: eps,
            ModelMeanType.VELOCITY: velocity(process, x0, t, eps),
            ModelMeanType.PREVIOUS_X: posterior_mean(process, x, t, x0),
            ModelMeanType.EDM: edm_target(process, x, t, x0),
        }[mean_type]
        return th.cat([out, out * 0], 1) if "LEARNED" in var_type.name else out

    return network


@pytest.mark.parametrize("sampler", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_LARGE, ModelVarType.LEARNED_RANGE])
def test_eps_x0_v_previous_x_and_edm_give_the_same_samples(sampler, var_type):
    start = th.randn(20, 2, dtype=F64, generator=th.Generator().manual_seed(0))
    results = []
    for mean_type in ModelMeanType:
        diffusion = GaussianDiffusion(
            betas=get_named_beta_schedule("linear", 60),
            model_mean_type=mean_type,
            model_var_type=var_type,
            loss_type=LossType.MSE,
        )
        th.manual_seed(1)
        network = reread(diffusion, mean_type, var_type)
        results.append(getattr(diffusion, sampler)(network, (20, 2), noise=start, clip_denoised=False))
    for other in results[1:]:
        th.testing.assert_close(other, results[0], rtol=0, atol=1e-9)


def test_losses_of_all_predictions_differ_by_their_weights():
    """For the same denoiser: |eps error|^2 = SNR |x0 error|^2 and |v error|^2 = (SNR + 1) |x0 error|^2."""
    g = th.Generator().manual_seed(0)
    x0, noise, t = (th.randn(8, 2, dtype=F64, generator=g), th.randn(8, 2, dtype=F64, generator=g), th.arange(8) * 7)
    mse = {}
    for mean_type in ModelMeanType:
        diffusion = GaussianDiffusion(
            betas=get_named_beta_schedule("linear", 60),
            model_mean_type=mean_type,
            model_var_type=ModelVarType.FIXED_SMALL,
            loss_type=LossType.MSE,
        )
        network = reread(diffusion, mean_type, ModelVarType.FIXED_SMALL)
        mse[mean_type] = diffusion.training_losses(network, x0, t, noise=noise)["mse"]
    abar = th.from_numpy(diffusion.alphas_cumprod)[t]
    snr, unit = abar / (1 - abar), mse[ModelMeanType.START_X]
    th.testing.assert_close(mse[ModelMeanType.EPSILON], snr * unit, rtol=1e-9, atol=0)
    th.testing.assert_close(mse[ModelMeanType.VELOCITY], (snr + 1) * unit, rtol=1e-9, atol=0)
    coef1 = th.from_numpy(diffusion.posterior_mean_coef1)[t]
    th.testing.assert_close(mse[ModelMeanType.PREVIOUS_X], coef1**2 * unit, rtol=1e-9, atol=0)
    th.testing.assert_close(mse[ModelMeanType.EDM], (snr + 4) * unit, rtol=1e-9, atol=0)  # sigma_data 1/2


def test_ancestral_step_with_the_large_variance_is_the_textbook_formula():
    """x <- (x - beta / sqrt(1 - abar) eps) / sqrt(alpha) + sqrt(beta) z (DDPM algorithm 2)."""
    diffusion = GaussianDiffusion(
        betas=get_named_beta_schedule("linear", 1000),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
    )
    x, t = th.randn(1, 1, 4, 4, dtype=F64), 437
    th.manual_seed(2)
    ours = diffusion.p_sample(lambda x, t: x.sin(), x, th.tensor([t]), clip_denoised=False)["sample"]
    th.manual_seed(2)
    z, beta, abar = th.randn_like(x), diffusion.betas[t], diffusion.alphas_cumprod[t]
    by_hand = (x - beta / math.sqrt(1 - abar) * x.sin()) / math.sqrt(1 - beta) + math.sqrt(beta) * z
    th.testing.assert_close(ours, by_hand, rtol=0, atol=1e-11)


def test_respacing_with_all_rows_equals_the_base():
    data = toy.ring()
    base = process(50)
    again = base.spaced(range(50))
    start = th.randn(10, 2, dtype=F64)
    results = []
    for p in (base, again):
        th.manual_seed(0)
        results.append(run(p, data.predictor(p, ModelVarType.FIXED_LARGE), sampling.ddpm, start))
    th.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_spacing_twice_keeps_the_networks_clock():
    once = SpacedDiffusion(
        range(0, 1000, 10),
        betas=get_named_beta_schedule("linear", 1000),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
    )
    twice = once.spaced([0, 50, 99])
    assert twice.clock(th.tensor([0, 1, 2])).tolist() == [0, 500, 990]
    np.testing.assert_allclose(twice.alphas_cumprod, once.alphas_cumprod[[0, 50, 99]], rtol=1e-12)


# ------------------------------------------------------------------------------------------------------ guidance

def conditional_setup(respacing="50"):
    data, p = toy.ring(), process(1000, respacing)
    g = th.Generator().manual_seed(0)
    start, y = th.randn(60, 2, dtype=F64, generator=g), th.arange(60) % 3
    return data, p, data.predictor(p, ModelVarType.FIXED_SMALL), start, y


def unconditional(predict):
    return lambda x, t, y=None: predict(x, t)


@pytest.mark.parametrize("rule", [sampling.ddim, partial(sampling.ddim, eta=0.6), sampling.heun, sampling.dpmpp_2m])
def test_guidance_by_the_exact_classifier_is_the_conditional_model(rule):
    """score(x | y) = score(x) + grad log p(y | x): scale 1 on the unconditional score, under every score sampler."""
    data, p, predict, start, y = conditional_setup()
    guided = classifier_guided(unconditional(predict), data.classifier_gradient(p))
    results = []
    for each in (guided, predict):
        th.manual_seed(0)
        results.append(run(p, each, rule, start, cond={"y": y}))
    th.testing.assert_close(*results, rtol=0, atol=1e-8)
    nearest = data.labels[th.cdist(results[0], data.means).argmin(1)]
    assert (nearest == y).all()


def test_the_published_methods_do_the_same_through_condition_score():
    data, p, predict, start, y = conditional_setup()
    kinds = {"model_mean_type": ModelMeanType.START_X, "model_var_type": ModelVarType.FIXED_SMALL}
    diffusion = SpacedDiffusion(
        space_timesteps(1000, "50"), betas=get_named_beta_schedule("linear", 1000), loss_type=LossType.MSE, **kinds
    )
    row_of = {clock: row for row, clock in enumerate(diffusion.timestep_map)}  # cond_fn is told original steps

    def rows(t):
        return th.tensor([row_of[clock] for clock in t.tolist()])

    def model(x, t, y):
        return data.denoise(p, x, rows(t))[0]

    def cond_fn(x, t, y):
        return data.classifier_gradient(p)(x, rows(t), y)

    ours = diffusion.ddim_sample_loop(
        model, start.shape, noise=start, clip_denoised=False, cond_fn=cond_fn, model_kwargs={"y": y}
    )
    th.testing.assert_close(ours, run(p, predict, sampling.ddim, start, cond={"y": y}), rtol=0, atol=1e-8)


@pytest.mark.parametrize("w", [0.5, 2.0])
def test_classifier_free_guidance_equals_classifier_guidance_at_the_corresponding_scale(w):
    """1 + w on the unconditional model, w on the conditional one, mix at 1 + w: the same score."""
    data, p, predict, start, y = conditional_setup()
    plain = unconditional(predict)
    variants = [
        mix(predict, plain, 1 + w),
        classifier_guided(plain, data.classifier_gradient(p, 1 + w)),
        classifier_guided(predict, data.classifier_gradient(p, w)),
    ]
    results = [run(p, each, sampling.ddim, start, cond={"y": y}) for each in variants]
    th.testing.assert_close(results[1], results[0], rtol=0, atol=1e-8)
    th.testing.assert_close(results[2], results[0], rtol=0, atol=1e-8)


def test_scale_1_is_conditional_and_an_interval_over_everything_is_plain_guidance():
    _, p, predict, start, y = conditional_setup()
    plain = unconditional(predict)
    conditional = run(p, predict, sampling.ddim, start, cond={"y": y})
    th.testing.assert_close(run(p, mix(predict, plain, 1.0), sampling.ddim, start, cond={"y": y}), conditional)
    strong = mix(predict, plain, 3.0)
    whole = run(p, interval(strong, predict, 0, p.num_timesteps - 1), sampling.ddim, start, cond={"y": y})
    assert th.equal(whole, run(p, strong, sampling.ddim, start, cond={"y": y}))
    never = run(p, interval(strong, predict, 99, 100), sampling.ddim, start, cond={"y": y})
    assert th.equal(never, conditional)


def test_a_mix_takes_the_variance_of_the_main_predictor():
    p = process(50)
    main, other = (toy.ring().predictor(p, v) for v in (ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE))
    x, t = th.randn(4, 2, dtype=F64), th.tensor([3, 9, 20, 40])
    assert th.equal(mix(main, other, 2.0)(x, t).variance, main(x, t).variance)


@pytest.mark.parametrize("steps, var_type, ratio", [
    (25, ModelVarType.FIXED_SMALL, 0.66), (25, ModelVarType.FIXED_LARGE, 0.90),
    (1000, ModelVarType.FIXED_SMALL, 0.99), (1000, ModelVarType.FIXED_LARGE, 1.0),
])  # fmt: skip
def test_ancestral_guidance_is_weaker_than_score_guidance_at_few_steps(steps, var_type, ratio):
    """
    p(y | x_0) proportional to exp(a x_0) shifts the mean of N(m, 1) by exactly a. DDIM's form reaches it; variance x
    gradient falls short at few steps, the more so the smaller the variance, and reaches it with many.
    """
    a, p = 0.4, process(1000, f"{steps}")
    predict = toy.Mixture(th.tensor([[M]], dtype=F64), 1.0).predictor(p, var_type)

    def grad_fn(x, t):  # log p(y | x_t) = a E[x_0 | x_t] + const, and E[x_0 | x_t] = sqrt(abar) x_t + const
        return a * p.at("sqrt_alphas_cumprod", t, x)

    shift = {}
    for rule in (sampling.ddpm, sampling.ddim):
        plain, guided = (
            run(p, each, rule, th.zeros(1, 1, dtype=F64), noise=th.zeros_like).item()
            for each in (predict, classifier_guided(predict, grad_fn))
        )
        shift[rule] = guided - plain
    assert shift[sampling.ddim] == pytest.approx(a, rel=0.007)
    assert shift[sampling.ddpm] / shift[sampling.ddim] == pytest.approx(ratio, abs=0.006)


def test_clipping_after_mixing_keeps_x0_and_eps_together():
    _, p, predict, start, y = conditional_setup()
    strong = mix(predict, unconditional(predict), 8.0)
    t = th.full((60,), 15)
    loose, tight = strong(start, t, y=y), clipped(strong, p)(start, t, y=y)
    assert loose.x0.abs().max() > 1.05 and tight.x0.abs().max() <= 1
    th.testing.assert_close(tight.eps, eps_from_x0(p, start, t, tight.x0))
    assert clipped(strong, p, clip_denoised=False) is strong


def test_the_callers_condition_is_never_changed():
    _, p, predict, start, y = conditional_setup("5")
    cond = {"y": y}
    run(p, mix(predict, unconditional(predict), 2.0), sampling.ddim, start, cond=cond)
    assert list(cond) == ["y"] and cond["y"] is y


# --------------------------------------------------------------------------------------------------------- noise

def test_seeded_noise_belongs_to_the_sample():
    def draw(indices):
        noise = sampling.SeededNoise(7, indices)
        first = noise.normal(3, 4, 4)
        return noise.integers(1000), first, noise(th.zeros(len(indices), 3, 4, 4))

    whole = draw(range(8))
    for batch in (1, 3):
        parts = [draw(range(8)[i : i + batch]) for i in range(0, 8, batch)]
        for k in range(3):
            assert th.equal(th.cat([part[k] for part in parts]), whole[k])
    assert len({tuple(x.flatten().tolist()) for x in whole[1]}) == 8
    assert not th.equal(whole[1], whole[2])
    assert not th.equal(sampling.SeededNoise(8, [0]).normal(3), sampling.SeededNoise(7, [0]).normal(3))
    assert sampling.SeededNoise(0, range(4000)).normal(5).std().item() == pytest.approx(1, abs=0.02)


def test_prediction_is_a_record_that_cannot_be_changed_by_accident():
    pred = Prediction(*[th.zeros(1)] * 4)
    with pytest.raises(AttributeError):
        pred.x0 = th.ones(1)


def test_no_two_samples_share_their_noise_through_a_short_seed():
    """torch's generator on the CPU reads 32 bits of a seed, in which these two met."""
    first, second = sampling.SeededNoise(0, [50699, 55170]).normal(8)
    assert (first - second).abs().min() > 1e-3


def test_guidance_that_draws_random_numbers_leaves_the_noise_of_a_step_as_it_was():
    p = process(50)
    plain = toy.ring().predictor(p, ModelVarType.FIXED_SMALL)
    noisy = classifier_guided(plain, lambda x, t: th.randn_like(x) * 0)
    results = []
    for predict in (plain, noisy):
        th.manual_seed(0)
        step = sampling.Step(p, predict, th.ones(3, 2, dtype=F64), th.full((3,), 20), lambda: th.randn(3, 2, dtype=F64))
        results.append(sampling.ddpm(step)[0])
    assert th.equal(*results)
