"""The likelihood along the probability-flow ODE and the variational bound, where the density is known."""

import math

import numpy as np
import pytest
import torch as th

from guided_diffusion import losses, toy
from guided_diffusion.guidance import classifier_guided
from guided_diffusion.likelihood import bits_per_dim, log_density, variational_bound
from guided_diffusion.prediction import ModelMeanType, ModelVarType, predictor
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.schedules import betas_from_abar, log_linear
from guided_diffusion.spacing import spaced_rows

F64 = th.float64
M, S = 0.3, 0.5
GAUSS = toy.Mixture(th.tensor([[M]], dtype=F64), S)
MIX = toy.Mixture(th.tensor([[-0.6, 0.2], [0.5, 0.5], [0.1, -0.7]], dtype=F64), 0.3, [0.5, 0.3, 0.2])


def process(steps, name="log_linear+zero_snr"):
    """Ends in pure noise by default, so that N(0, I) is the distribution there exactly."""
    return Process(get_named_beta_schedule(name, steps))


def exact(data, p, x):
    return data.log_density(p, x, th.zeros(len(x), dtype=th.int64))


def points(data, count=20):
    return data.draw(count, th.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("data", [GAUSS, MIX], ids=["gaussian", "mixture"])
def test_the_error_falls_as_the_square_of_the_steps(data):
    x, counts, errors = points(data), (60, 120, 240), []
    for count in counts:
        p = process(count)
        errors.append((log_density(p, data.predictor(p), x).nats - exact(data, p, x)).abs().mean().item())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.2), errors
    assert errors[-1] < 4e-4


def test_any_schedule_and_some_rows_will_do():
    x = points(MIX)
    for name, bound in (("karras+zero_snr", 2e-3), ("cosine", 2e-3), ("linear", 4e-3)):
        p = process(400, name)
        out = log_density(p, MIX.predictor(p), x)
        assert (out.nats - exact(MIX, p, x)).abs().max() < bound
    p = process(400, "cosine")
    rows = spaced_rows(p, "log_snr", 60)
    some, kept = log_density(p, MIX.predictor(p), x, rows=rows), p.spaced(rows)
    th.testing.assert_close(some.nats, log_density(kept, MIX.predictor(kept), x).nats, rtol=0, atol=1e-9)


def test_the_first_row_is_the_data_as_its_noise_goes_to_zero():
    """log p at the level of row 0 differs from the data's by O(sigma^2)."""
    x, z = points(GAUSS), (points(GAUSS) - M) / S
    of_data = (-0.5 * (z**2 + math.log(2 * math.pi)) - math.log(S)).squeeze(1)
    for sigma in (0.02, 0.01):
        p = Process(log_linear(300, sigma, 500.0))
        gap = log_density(p, GAUSS.predictor(p), x * p.sqrt_alphas_cumprod[0]).nats - of_data
        assert gap.abs().max() < 30 * sigma**2 + 3e-4


def test_the_latent_is_where_the_flow_comes_from():
    """On Gaussian data the flow keeps quantiles."""
    p, x = process(800), points(GAUSS)
    abar = p.alphas_cumprod[0]
    quantile = (x - math.sqrt(abar) * M) / math.sqrt(abar * S**2 + 1 - abar)
    th.testing.assert_close(log_density(p, GAUSS.predictor(p), x).latent, quantile, rtol=0, atol=1e-4)


def linear_flow(p, matrix):
    """A network whose velocity is x A^T: log p(x) = log N(latent) + trace(A) x the angle, without any error."""

    def net(x, t):
        return x @ matrix.T

    return predictor(p, net, ModelMeanType.VELOCITY, ModelVarType.FIXED_SMALL)


def test_the_trace_of_a_linear_flow_is_exact():
    matrix = th.tensor([[0.4, 1.0, -0.3], [-0.2, -0.7, 0.5], [0.1, 0.9, 0.8]], dtype=F64)
    p = process(50)
    x = th.randn(5, 3, dtype=F64, generator=th.Generator().manual_seed(1))
    out = log_density(p, linear_flow(p, matrix), x)
    normal = -0.5 * (out.latent**2 + math.log(2 * math.pi)).sum(1)
    angle = math.pi / 2 - math.atan(p.sqrt_recipm1_alphas_cumprod[0])
    th.testing.assert_close(out.nats, normal + 0.5 * angle, rtol=0, atol=1e-12)
    assert (out.error == 0).all()
    skew = matrix - matrix.T  # z A z = 0 for every z, and the diagonal is all that random signs see of a diagonal one
    for each, trace in ((skew, 0.0), (th.diag(matrix.diagonal()), 0.5)):
        flow = log_density(p, linear_flow(p, each), x, probes=2)
        normal = -0.5 * (flow.latent**2 + math.log(2 * math.pi)).sum(1)
        th.testing.assert_close(flow.nats, normal + trace * angle, rtol=0, atol=1e-12)
        assert (flow.error < 1e-12).all()


def test_random_probes_are_within_their_stated_error():
    p = process(30)
    data = toy.Mixture(th.randn(5, 6, dtype=F64, generator=th.Generator().manual_seed(3)), 0.4)
    x = points(data, 100)
    truth, guess = (log_density(p, data.predictor(p), x, probes=probes) for probes in (None, 40))
    score = (guess.nats - truth.nats) / guess.error
    assert 0.85 < score.std() < 1.2 and score.mean().abs() < 0.3
    assert 0.9 <= (score.abs() < 2).double().mean() <= 0.99  # Student's t with 39 degrees: 0.948
    assert th.equal(guess.latent, truth.latent)
    more = log_density(p, data.predictor(p), x, probes=160).error.mean() / guess.error.mean()
    assert more == pytest.approx(0.5, abs=0.05)


def test_probes_belong_to_the_sample_and_to_the_seed():
    p, x = process(10), points(MIX, 4)
    whole = log_density(p, MIX.predictor(p), x, probes=3).nats
    assert th.equal(log_density(p, MIX.predictor(p), x[:2], probes=3).nats, whole[:2])
    assert not th.equal(log_density(p, MIX.predictor(p), x, probes=3, seed=1).nats, whole)


def test_conditions_reach_the_predictor():
    p, x = process(240), points(MIX, 6)
    y = th.tensor([0, 1, 2, 0, 1, 2])
    out = log_density(p, MIX.predictor(p), x, cond={"y": y}).nats
    joint = MIX.log_density(p, x, th.zeros(6, dtype=th.int64), y)
    th.testing.assert_close(out, joint - MIX.log_weights[y], rtol=0, atol=4e-3)


# ---------------------------------------------------------------------------------------------------- the bound

def expected_bound(p, predict):
    """The exact mean of the bound over N(M, S^2) and noise: it is quadratic in both, so 3 x 3 nodes are enough."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    u, z = (th.from_numpy(grid.reshape(9, 1)) for grid in np.meshgrid(nodes, nodes, indexing="ij"))
    mass = th.from_numpy(np.outer(weights, weights).reshape(9)) / (2 * math.pi)
    return (mass * variational_bound(p, predict, M + S * u, noise=lambda x: z)).sum().item()


ENTROPY = 0.5 * math.log(2 * math.pi * math.e * S**2)  # the mean of -log p(x_0)


@pytest.mark.parametrize("steps, name", [(1, "cosine"), (2, "cosine"), (10, "sigmoid"), (100, "linear"),
                                         (30, "cosine+zero_snr")])  # fmt: skip
def test_the_bound_of_the_exact_way_back_misses_only_the_prior(steps, name):
    """
    On Gaussian data p(x_{t-1} | x_t) is Gaussian, and the ideal predictor is it: the bound is the entropy and KL(q(x_T)
    || N(0, 1)), whatever the number of steps.
    """
    p = process(steps, name)
    abar = p.alphas_cumprod[-1]
    mean, var = math.sqrt(abar) * M, abar * S**2 + 1 - abar
    prior = 0.5 * (var + mean**2 - 1 - math.log(var))
    assert expected_bound(p, GAUSS.predictor(p)) == pytest.approx(ENTROPY + prior, abs=1e-9)
    assert prior >= 0 and (prior == 0) == name.endswith("zero_snr")


@pytest.mark.parametrize("steps, small, large", [(25, 0.866, 0.0533), (100, 0.793, 0.0640)])
def test_the_bound_of_fixed_variances_lies_above(steps, small, large):
    """Here the large one, right for N(0, I), is nearly right; the small one is right for data at one point."""
    p = process(steps, "cosine")
    for var_type, gap in ((ModelVarType.FIXED_SMALL, small), (ModelVarType.FIXED_LARGE, large)):
        assert expected_bound(p, GAUSS.predictor(p, var_type)) - ENTROPY == pytest.approx(gap, rel=2e-3)


def test_the_exact_likelihood_lies_between_the_truth_and_the_bound():
    """One Gaussian: -log p from the ODE at the data's level is the entropy in the mean, the bound above it."""
    p = process(400)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    abar = p.alphas_cumprod[0]
    mean, std = math.sqrt(abar) * M, math.sqrt(abar * S**2 + 1 - abar)
    x = th.from_numpy(mean + std * nodes).unsqueeze(1)
    nats = log_density(p, GAUSS.predictor(p), x).nats.numpy()
    nll = -(weights * nats).sum() / math.sqrt(2 * math.pi) + 0.5 * math.log(abar)  # as a density of x_0 + sigma eps
    assert nll == pytest.approx(ENTROPY, abs=3e-4)
    assert expected_bound(p, GAUSS.predictor(p, ModelVarType.FIXED_SMALL)) > nll


def test_the_bound_lies_above_on_a_mixture_and_comes_down_with_steps():
    """There p(x_{t-1} | x_t) is no Gaussian, but nearly so for small steps. Monte Carlo: five standard errors."""
    x, gaps = points(MIX, 20000), []
    truth = MIX.log_density(Process([1e-12]), x, th.zeros(len(x), dtype=th.int64))
    for steps in (2, 4, 8):
        p, g = process(steps, "cosine"), th.Generator().manual_seed(4)
        noise = lambda x, g=g: th.randn(x.shape, generator=g, dtype=F64)  # noqa: E731
        gap = variational_bound(p, MIX.predictor(p), x, noise=noise) + truth
        assert gap.mean() > 5 * gap.std() / math.sqrt(len(x))
        gaps.append(gap.mean().item())
    assert gaps[0] > 1.5 * gaps[1] > 2 * gaps[2]


def test_probability_of_a_bin_and_density_differ_by_its_width():
    """Where the decoder is wide, its mass of a bin is its density times 2/255; the tanh form is within 2e-3 there."""
    p = Process(betas_from_abar([0.9, 0.5, 0.01]))
    x = (th.randint(0, 256, (50, 4), generator=th.Generator().manual_seed(0)).double() / 127.5 - 1) * 0.98
    z = th.zeros_like(x)
    predict = GAUSS.predictor(p, ModelVarType.FIXED_SMALL)
    mass = losses.bits_per_dimension(p, predict, x, noise=lambda x: z)["total_bpd"]
    density = bits_per_dim(-variational_bound(p, predict, x, noise=lambda x: z), 4)
    inside = x.abs().max(1).values < 0.9
    th.testing.assert_close(mass[inside], density[inside], rtol=0, atol=5e-3)
    assert bits_per_dim(-math.log(2), 1) == pytest.approx(math.log2(255))  # uniform on [-1, 1]: 255 bins


@pytest.mark.parametrize("change, message", [
    ({"rows": [3]}, "two or more, ascending"), ({"rows": [3, 1]}, "two or more, ascending"),
    ({"rows": [1, 1]}, "ascending"), ({"probes": 1}, "two probes or more, not 1"),
])  # fmt: skip
def test_bad_input_is_named(change, message):
    p = process(10)
    with pytest.raises(ValueError, match=message):
        log_density(p, MIX.predictor(p), points(MIX, 2), **change)


def test_a_gradient_that_the_trace_cannot_see_is_refused():
    p = process(10)
    guided = classifier_guided(MIX.predictor(p), MIX.classifier_gradient(p))
    with pytest.raises(ValueError, match="pass it unguided"):
        log_density(p, guided, points(MIX, 2), cond={"y": th.zeros(2, dtype=th.int64)})
