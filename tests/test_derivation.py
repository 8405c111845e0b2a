"""
The derivation of DDPM (Ho et al. 2020, arXiv 2006.11239), each step of it as a test: from the walk that adds noise to
the squared error of the noise that networks are trained on.
"""

import math

import numpy as np
import pytest
import torch as th

from guided_diffusion import losses
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.prediction import predictor, x0_from_eps
from guided_diffusion.process import Process, get_named_beta_schedule

F64 = th.float64
PATHS = 200_000
LINEAR = Process(get_named_beta_schedule("linear", 1000))


def rows(*t):
    return th.tensor(t)


def walk(step, steps, start=0.7):
    """Where PATHS walkers are after `steps`, all from one place."""
    x, noise = th.full((PATHS,), start, dtype=F64), th.Generator().manual_seed(0)
    for t in range(steps):
        x = step(x, t, th.randn(PATHS, dtype=F64, generator=noise))
    return x


def check_moments(x, mean, variance):
    """Within four standard errors of a Gaussian's sample mean and variance; the walks are seeded."""
    assert abs(x.mean() - mean) < 4 * math.sqrt(variance / PATHS)
    assert abs(x.var() - variance) < 4 * variance * math.sqrt(2 / PATHS)


# ------------------------------------------------------------------------------------------------------ adding noise


def test_noise_alone_keeps_the_mean_and_has_variance_t():
    """Why x is not simply x + noise: nothing is forgotten, and there is no limit."""
    check_moments(walk(lambda x, t, noise: x + noise, 40), mean=0.7, variance=40)


def test_single_steps_add_up_to_the_closed_form():
    """x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise (eq. 2) is q(x_t | x_0) = N(sqrt(abar) x_0, 1 - abar) (eq. 4)."""
    process = Process(get_named_beta_schedule("linear", 50))
    x = walk(lambda x, t, noise: math.sqrt(1 - process.betas[t]) * x + math.sqrt(process.betas[t]) * noise, 30)
    mean, variance, _ = process.q_mean_variance(th.full((1,), 0.7, dtype=F64), rows(29))
    check_moments(x, float(mean), float(variance))
    check_moments(process.q_sample(th.full((PATHS,), 0.7, dtype=F64), th.full((PATHS,), 29)), float(mean), variance[0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_the_closed_form_is_that_of_the_moments_at_every_step(schedule):
    process = Process(get_named_beta_schedule(schedule, 1000))
    mean, variance, found = 0.7, 0.0, []
    for beta in process.betas:
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        found.append((mean, variance))
    start, t = th.full((1000,), 0.7, dtype=F64), th.arange(1000)
    means, variances, logs = process.q_mean_variance(start, t)
    np.testing.assert_allclose(means, [m for m, _ in found], rtol=0, atol=1e-12)
    np.testing.assert_allclose(variances, [v for _, v in found], rtol=1e-12)
    np.testing.assert_allclose(logs.exp(), variances, rtol=1e-12)


def test_in_the_end_every_image_is_the_same_noise():
    """abar_T = 4.04e-5: KL(q(x_T | x_0) || N(0, 1)) is below 3e-5 bits for any pixel (L_T of eq. 5)."""
    abar = LINEAR.alphas_cumprod[-1]
    assert abar == pytest.approx(4.0358e-5, rel=1e-4)
    x = th.tensor([[-1.0], [0.0], [0.3], [1.0]], dtype=F64)
    by_hand = 0.5 * (abar * x[:, 0] ** 2 + (1 - abar) - 1 - math.log(1 - abar)) / math.log(2)
    prior = losses.prior_bpd(LINEAR, x)
    th.testing.assert_close(prior, by_hand, rtol=1e-6, atol=1e-16)
    assert prior.max() == prior[0] == prior[3] < 3e-5


# ------------------------------------------------------------------------------------------ the bound and its terms


def test_the_divergence_of_equal_variances_is_half_the_squared_distance_over_the_variance():
    mean1, mean2, variance = th.tensor([0.3, -2.0, 5.0], dtype=F64), th.tensor([0.5, 1.0, 5.0], dtype=F64), 0.09
    log_variance = math.log(variance)
    found = losses.normal_kl(mean1, log_variance, mean2, log_variance)
    th.testing.assert_close(found, (mean1 - mean2) ** 2 / (2 * variance), rtol=1e-12, atol=1e-15)
    x = th.linspace(-12, 12, 200_001, dtype=F64)[:, None]
    p = th.exp(-((x - mean1) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    log_ratio = ((x - mean2) ** 2 - (x - mean1) ** 2) / (2 * variance)
    th.testing.assert_close((p * log_ratio).sum(0) * 24 / 200_000, found, rtol=1e-9, atol=1e-12)  # the integral itself


def test_the_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalized: precisions add (eqs. 6 and 7)."""
    t = th.arange(1, 1000)
    x0, x = th.randn(2, 999, dtype=F64, generator=th.Generator().manual_seed(1))
    beta, abar_before = (th.from_numpy(table)[t] for table in (LINEAR.betas, LINEAR.alphas_cumprod_prev))
    likelihood, prior = (1 - beta) / beta, 1 / (1 - abar_before)                         # precisions of x_{t-1}
    mean = (likelihood * x / (1 - beta).sqrt() + prior * abar_before.sqrt() * x0) / (likelihood + prior)
    found, variance, log_variance = LINEAR.q_posterior_mean_variance(x0, x, t)
    th.testing.assert_close(found, mean, rtol=1e-9, atol=1e-12)
    th.testing.assert_close(variance, 1 / (likelihood + prior), rtol=1e-9, atol=0)
    th.testing.assert_close(log_variance.exp(), variance, rtol=1e-12, atol=0)


def test_the_mean_in_terms_of_the_noise():
    """The posterior mean with x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar) is that of algorithm 2 (eq. 11)."""
    t = th.arange(1000)
    x, eps = th.randn(2, 1000, dtype=F64, generator=th.Generator().manual_seed(2))
    beta, abar = th.from_numpy(LINEAR.betas), th.from_numpy(LINEAR.alphas_cumprod)
    found, _, _ = LINEAR.q_posterior_mean_variance(x0_from_eps(LINEAR, x, t, eps), x, t)
    th.testing.assert_close(found, (x - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt(), rtol=1e-9, atol=1e-10)


def guesses(var_type, t):
    """(x_0, x_t, the squared error of a wrong guess of the noise, the Prediction) at rows t, one value each."""
    x0, eps, wrong = th.randn(3, len(t), 1, dtype=F64, generator=th.Generator().manual_seed(3))
    x_t = LINEAR.q_sample(x0, t, eps)
    pred = predictor(LINEAR, lambda x, clock: wrong, ModelMeanType.EPSILON, var_type)(x_t, t)
    return x0, x_t, (eps - wrong)[:, 0] ** 2, pred


def test_a_weight_turns_the_squared_error_of_the_noise_into_a_term_of_the_bound():
    """L_{t-1} = beta^2 / (2 sigma^2 alpha (1 - abar)) (eps - eps')^2 (eq. 12), sigma^2 being the posterior's."""
    t = th.arange(1, 1000)
    x0, x_t, square, pred = guesses(ModelVarType.FIXED_SMALL, t)
    term = losses.vb_terms_bpd(LINEAR, pred, x0, x_t, t) * math.log(2)
    beta, abar = th.from_numpy(LINEAR.betas)[t], th.from_numpy(LINEAR.alphas_cumprod)[t]
    sigma2 = th.from_numpy(LINEAR.posterior_variance)[t]
    th.testing.assert_close(term, beta**2 / (2 * sigma2 * (1 - beta) * (1 - abar)) * square, rtol=1e-8, atol=0)


def test_with_the_large_variance_a_constant_is_added():
    """sigma^2 = beta: the same weight with that sigma, and what the variances differ by, which no training changes."""
    t = th.arange(1, 1000)
    x0, x_t, square, pred = guesses(ModelVarType.FIXED_LARGE, t)
    term = losses.vb_terms_bpd(LINEAR, pred, x0, x_t, t) * math.log(2)
    beta, abar = th.from_numpy(LINEAR.betas)[t], th.from_numpy(LINEAR.alphas_cumprod)[t]
    ratio = th.from_numpy(LINEAR.posterior_variance)[t] / beta
    constant = 0.5 * (ratio - 1 - ratio.log())
    th.testing.assert_close(term, beta / (2 * (1 - beta) * (1 - abar)) * square + constant, rtol=1e-8, atol=1e-12)


def test_one_random_step_stands_for_the_sum():
    """T times a term at a uniform t has the sum of all terms as its mean."""
    process = Process(get_named_beta_schedule("linear", 30))
    x0 = th.randint(0, 256, (2, 1, 3, 3), generator=th.Generator().manual_seed(4)).to(F64) / 127.5 - 1
    noise = th.randn(x0.shape, dtype=F64, generator=th.Generator().manual_seed(5))
    kind = ModelMeanType.EPSILON, ModelVarType.FIXED_LARGE

    def net(x, t):
        return 0.3 * x

    terms = [
        losses.training_losses(process, net, x0, rows(t, t), noise, {}, *kind, LossType.RESCALED_KL)["loss"]
        for t in range(30)
    ]
    whole = losses.bits_per_dimension(process, predictor(process, net, *kind), x0, lambda x: noise)
    th.testing.assert_close(th.stack(terms).mean(0), whole["vb"].sum(1), rtol=1e-12, atol=0)
    th.testing.assert_close(whole["vb"].sum(1) + whole["prior_bpd"], whole["total_bpd"], rtol=1e-12, atol=0)


# -------------------------------------------------------------------------------------------------------------- back


def test_the_way_back_is_the_textbooks_loop():
    """x <- (x - beta / sqrt(1 - abar) eps) / sqrt(alpha) + sqrt(beta) z, the last step without z (algorithm 2)."""
    betas = get_named_beta_schedule("linear", 40)
    diffusion = GaussianDiffusion(betas=betas, model_mean_type=ModelMeanType.EPSILON,
                                  model_var_type=ModelVarType.FIXED_LARGE, loss_type=LossType.MSE)  # fmt: skip
    start = th.randn(3, 1, 4, 4, dtype=F64, generator=th.Generator().manual_seed(6))
    th.manual_seed(7)

    def net(x, t):
        return x.sin() * (t.double() / 40).reshape(-1, 1, 1, 1)

    ours = diffusion.p_sample_loop(net, start.shape, noise=start, clip_denoised=False)
    th.manual_seed(7)
    x, abars = start, np.cumprod(1 - betas)
    for t in reversed(range(40)):
        eps, z = x.sin() * t / 40, th.randn_like(x) * (t > 0)
        x = (x - betas[t] / math.sqrt(1 - abars[t]) * eps) / math.sqrt(1 - betas[t]) + math.sqrt(betas[t]) * z
    th.testing.assert_close(ours, x, rtol=0, atol=1e-10)
