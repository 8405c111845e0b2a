"""Schedules and their changes, the readings of a noise level, EDM's prediction, conversions, loss weights."""

import math
from collections import deque

import numpy as np
import pytest
import torch as th

from guided_diffusion import config, losses, sampling, script_util, toy
from guided_diffusion import schedules as sch
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.losses import LOSS_WEIGHTS, loss_weights
from guided_diffusion.network_options import DiffusionOptions
from guided_diffusion.prediction import ERRORS, TARGETS, convert, edm_noise, edm_scales, predictor
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.spacing import spaced_rows

F64 = th.float64
KINDS = list(ModelMeanType)
# As they are at first: the pages of docs/ that other tests run add rows of their own.
SCHEDULES, WEIGHTS = tuple(sch.SCHEDULES), tuple(LOSS_WEIGHTS)
NAMES = [*SCHEDULES, "linear+zero_snr", "cosine+shift4", "sigmoid+shift0.5+zero_snr"]


def process(name, steps=1000):
    return Process(get_named_beta_schedule(name, steps))


def make(name="linear", kind=ModelMeanType.VELOCITY, steps=1000, var=ModelVarType.FIXED_SMALL, **options):
    betas = get_named_beta_schedule(name, steps)
    options = {"loss_type": LossType.MSE} | options
    return GaussianDiffusion(betas=betas, model_mean_type=kind, model_var_type=var, **options)


# ------------------------------------------------------------------------------------------------ named schedules

@pytest.mark.parametrize("name, steps, first, middle, last", [
    ("sigmoid", 1000, 0.99969971, 0.49834281, 3.0e-7), ("sigmoid", 100, 0.99692273, 0.4834331, 3.08e-6),
    ("linear", 1000, 0.99989998, 0.07779666, 4.036e-5), ("linear", 100, 0.999, 0.06666563, 2.039e-5),
    ("cosine", 1000, 0.99995869, 0.49228516, 2.4e-9), ("cosine", 100, 0.99936873, 0.47826463, 2.4e-7),
])  # fmt: skip
def test_abar_has_the_values_seen_in_other_implementations(name, steps, first, middle, last):
    """They compute in float32 here and there, hence the digits."""
    abar = process(name, steps).alphas_cumprod
    assert abar[[0, steps // 2]] == pytest.approx([first, middle], rel=4e-5 if name == "linear" else 3e-7, abs=3e-8)
    assert abar[-1] == pytest.approx(last, rel=0.015)


def test_sigmoid_depends_on_its_ends_over_tau():
    np.testing.assert_allclose(sch.sigmoid(50, -6, 4, tau=2.0), sch.sigmoid(50, -3, 2), rtol=1e-9)
    abar = Process(sch.sigmoid(50, -3, 2)).alphas_cumprod[24]  # by hand, half way at -1/2
    low, high, here = (math.tanh(v / 2) for v in (-3, 2, -0.5))
    assert abar == pytest.approx((high - here) / (high - low), rel=1e-12)


def test_sigmoid_beta_is_a_sigmoid_between_the_ends_of_linear():
    beta = get_named_beta_schedule("sigmoid_beta", 1000)
    logit = np.log((beta - 1e-4) / (0.02 - beta))
    np.testing.assert_allclose(logit, np.linspace(-6, 6, 1000), rtol=1e-9, atol=1e-9)
    assert 10 * beta[[0, -1]] == pytest.approx(get_named_beta_schedule("sigmoid_beta", 100)[[0, -1]], rel=1e-12)


def test_sqrt_linear_has_the_levels_of_stable_diffusion():
    beta = get_named_beta_schedule("sqrt_linear", 1000)
    assert beta[[0, -1]] == pytest.approx([0.00085, 0.012], rel=1e-12)
    assert np.ptp(np.diff(np.sqrt(beta))) < 1e-15
    sigma = Process(beta).sqrt_recipm1_alphas_cumprod
    assert sigma[[0, -1]] == pytest.approx([0.0292, 14.6146], abs=5e-5)


def test_log_linear_and_karras_are_even_in_their_own_measure():
    for name, measure in (("log_linear", np.log), ("karras", lambda sigma: sigma ** (1 / 7))):
        sigma = process(name, 200).sqrt_recipm1_alphas_cumprod
        assert sigma[[0, -1]] == pytest.approx([0.002, 80], rel=1e-9)
        gaps = np.diff(measure(sigma))
        np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-6)
        assert process(name, 1).sqrt_recipm1_alphas_cumprod == pytest.approx([80])
    sigma = Process(sch.karras(40, 0.1, 10, rho=1)).sqrt_recipm1_alphas_cumprod
    np.testing.assert_allclose(sigma, np.linspace(0.1, 10, 40), rtol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [22, 1000])
def test_every_schedule_is_a_process_and_makes_noise_of_data(name, steps):
    p = process(name, steps)
    assert p.betas.dtype == np.float64 and len(p.betas) == steps
    assert (np.diff(p.alphas_cumprod) < 0).all() and p.alphas_cumprod[-1] < 0.06
    for table in ("posterior_variance", "posterior_mean_coef1", "posterior_mean_coef2", "log_large_variance"):
        assert np.isfinite(getattr(p, table)).all()


def test_zero_snr_stretches_sqrt_abar_to_zero():
    before, after = (np.sqrt(process(f"sqrt_linear{change}").alphas_cumprod) for change in ("", "+zero_snr"))
    assert after[-1] == 0 and after[0] == pytest.approx(before[0], rel=1e-12)
    slope = (after[0] - after[-1]) / (before[0] - before[-1])
    np.testing.assert_allclose(after, before[0] + slope * (before - before[0]), rtol=0, atol=1e-12)
    assert process("sqrt_linear+zero_snr").betas[-1] == 1


def test_shift_moves_the_log_snr():
    plain, wide = (sch.log_snr_from_abar(process(name).alphas_cumprod) for name in ("cosine", "cosine+shift4"))
    np.testing.assert_allclose(wide - plain, -2 * math.log(4), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        get_named_beta_schedule("cosine+shift4+shift0.25", 100), get_named_beta_schedule("cosine", 100), rtol=1e-6
    )
    times = [sigma / (1 + sigma) for sigma in map(sch.sigma_from_log_snr, (plain, wide))]  # of a straight flow
    np.testing.assert_allclose(times[1], 4 * times[0] / (1 + 3 * times[0]), rtol=1e-6)
    rows = [0, 300, 999]
    shifted = Process(sch.shift(process("linear").spaced(rows).betas, 2.0)).alphas_cumprod
    np.testing.assert_allclose(shifted, process("linear+shift2").spaced(rows).alphas_cumprod, rtol=1e-9)


@pytest.mark.parametrize("name, steps, error, message", [
    ("sigmod", 100, NotImplementedError, "schedule: sigmod .*linear, cosine.*did you mean sigmoid"),
    ("cosine+zero", 100, NotImplementedError, "change of a schedule: zero .*zero_snr, shift; did you mean zero_snr"),
    ("cosine+shift2x", 100, NotImplementedError, "change of a schedule: shift2x .*did you mean shift"),
    ("cosine+", 100, NotImplementedError, "change of a schedule"),
    ("cosine+shift", 100, ValueError, "positive factor.*cosine.shift2, not None"),
    ("cosine+shift0", 100, ValueError, "positive factor.* not 0"),
    ("cosine+zero_snr2", 100, ValueError, "takes no number, but was given 2"),
    ("cosine+zero_snr", 1, ValueError, "two steps or more"),
    ("karras", 0, ValueError, "one step or more, not 0"),
    ("sigmoid_beta", 20, ValueError, "sigmoid_beta schedule of 20 steps.*beta of 1.*use 21"),
    ("sqrt_linear", 12, ValueError, "sqrt_linear schedule of 12 steps.*use 13"),
])  # fmt: skip
def test_schedules_that_cannot_be(name, steps, error, message):
    with pytest.raises(error, match=message):
        get_named_beta_schedule(name, steps)


def test_the_help_names_every_schedule_change_and_weight():
    fields = config.options(DiffusionOptions)
    for option, names in (("noise_schedule", [*SCHEDULES, *sch.CHANGES]), ("loss_weight", WEIGHTS)):
        text = fields[option].metadata["help"]
        assert all(name in text for name in names)
    assert fields["predict"].metadata["choices"] == tuple(script_util.PREDICT)
    assert set(script_util.PREDICT.values()) == set(ModelMeanType)


# ------------------------------------------------------------------------------------------------------- readings

def test_readings_of_a_level_are_inverse_to_one_another():
    sigma = np.geomspace(1e-3, 1e3, 50)
    abar, log_snr = sch.abar_from_sigma(sigma), sch.log_snr_from_sigma(sigma)
    np.testing.assert_allclose(sch.sigma_from_abar(abar), sigma, rtol=1e-9)
    np.testing.assert_allclose(sch.sigma_from_log_snr(log_snr), sigma, rtol=1e-13)
    np.testing.assert_allclose(sch.abar_from_log_snr(log_snr), abar, rtol=1e-12)
    np.testing.assert_allclose(sch.log_snr_from_abar(abar), np.log(abar / (1 - abar)), rtol=1e-9, atol=1e-12)
    assert (sch.sigma_from_abar(0.0), sch.abar_from_sigma(np.inf), sch.log_snr_from_abar(0.0)) == (np.inf, 0, -np.inf)


@pytest.mark.parametrize("name", NAMES)
def test_rows_to_levels_and_back(name):
    """t -> log-SNR -> sigma -> abar -> log-SNR -> t, at the rows to 1e-9 and between them."""
    p = process(name)
    rows = np.arange(1000.0)
    sigma = sch.sigma_from_log_snr(p.log_snr(rows))
    finite = np.isfinite(sigma)
    np.testing.assert_allclose(sigma[finite], p.sqrt_recipm1_alphas_cumprod[finite], rtol=1e-9)
    abar = sch.abar_from_sigma(sigma)
    np.testing.assert_allclose(abar, p.alphas_cumprod, rtol=1e-9)
    assert np.abs(p.row(sch.log_snr_from_sigma(sigma)) - rows).max() < 1e-9
    tight = p.sqrt_recipm1_alphas_cumprod > 0.01  # below, 1 - abar has too few digits left
    assert np.abs(p.row(sch.log_snr_from_abar(abar)) - rows)[tight].max() < 1e-9
    between = np.linspace(0, 998, 777)
    assert np.abs(p.row(p.log_snr(between)) - between).max() < 1e-9
    assert p.log_snr(500.5) == pytest.approx((p.log_snr(500) + p.log_snr(501)) / 2, rel=1e-12)


def test_levels_that_are_not_there():
    p, noise = process("linear"), process("linear+zero_snr")
    for call, message in (
        (lambda: p.log_snr([0, 999.5]), r"0\.\.999, but they span 0 \.\. 999.5"),
        (lambda: p.row(20.0), "log-SNR must lie in -10.1.* 9.2"),
        (lambda: p.row(-np.inf), "log-SNR must lie in"),
        (lambda: p.row(np.nan), "log-SNR must lie in"),
        (lambda: noise.log_snr(998.5), "row 998 and row 999.* pure noise"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert noise.log_snr(999) == -np.inf and noise.row(-np.inf) == 999 and noise.row(noise.log_snr(998)) == 998
    assert spaced_rows(noise, "log_snr", 10)[-1] == 999


# ------------------------------------------------------------------------------------------------- pure noise at T

@pytest.mark.parametrize("kind", [ModelMeanType.EPSILON, ModelMeanType.EDM])
def test_kinds_that_cannot_start_from_pure_noise_are_refused(kind):
    message = f"{kind.name} prediction cannot start from pure noise.*row 999.*predict v or x0"
    p = process("linear+zero_snr")
    for call in (
        lambda: make("linear+zero_snr", kind),
        lambda: predictor(p, None, kind, ModelVarType.FIXED_SMALL),
        lambda: loss_weights(p, "unit", kind),
        lambda: convert(p, None, None, None, ModelMeanType.VELOCITY, kind),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    spaced = p.spaced(range(0, 999, 10))  # without the last row nothing is wrong
    predictor(spaced, None, kind, ModelVarType.FIXED_SMALL)


@pytest.mark.parametrize("kind", [ModelMeanType.START_X, ModelMeanType.VELOCITY, ModelMeanType.PREVIOUS_X])
def test_other_kinds_start_from_pure_noise_without_error(kind):
    """On Gaussian data with the exact variance the whole walk, from N(0, 1), has no error but the last step's."""
    m, s = 0.3, 0.5
    data, d = toy.Mixture(th.tensor([[m]], dtype=F64), s), make("linear+zero_snr", kind, 50)

    def net(x, t):
        x0 = data.denoise(d, x, t)[0]
        return TARGETS[kind](d, x0, x, t, data.predictor(d)(x, t).eps)

    ask = predictor(d, net, kind, ModelVarType.FIXED_SMALL)
    ideal = data.predictor(d)

    def predict(x, t):
        pred, exact = ask(x, t), ideal(x, t)
        th.testing.assert_close(pred.x0, exact.x0, rtol=0, atol=1e-12)
        th.testing.assert_close(pred.eps, exact.eps, rtol=0, atol=1e-9)
        return exact

    sources = th.cat([th.zeros(1, 51, dtype=F64), th.eye(51, dtype=F64)])
    draws = iter(range(1, 51))
    walk = sampling.sample(d, predict, sampling.ddpm, sources[:, :1], noise=lambda x: sources[:, [next(draws)]])
    out, abar = deque(walk, maxlen=1).pop()[0], d.alphas_cumprod[0]
    assert out[0].item() == pytest.approx(m, abs=1e-12)
    assert ((out[1:] - m) ** 2).sum().item() == pytest.approx(abar * s**4 / (abar * s**2 + 1 - abar), rel=1e-10)
    x0 = th.randn(4, 1, dtype=F64)
    loss = d.training_losses(net, x0, th.tensor([0, 10, 48, 49]))["loss"]
    assert loss.isfinite().all()
    ddim = deque(sampling.sample(d, ask, sampling.ddim, th.randn(5, 1, dtype=F64)), maxlen=1).pop()[0]
    assert ddim.isfinite().all()


# ---------------------------------------------------------------------------------------------------- predictions

def noised(p, count=64, dtype=F64):
    g = th.Generator().manual_seed(0)
    x0, noise = (th.randn(count, 3, generator=g, dtype=F64).to(dtype) for _ in range(2))
    t = th.linspace(0, p.num_timesteps - 1, count).long()
    return x0, p.q_sample(x0, t, noise), t, noise


@pytest.mark.parametrize("name", [name for name in NAMES if "zero" not in name])
@pytest.mark.parametrize("source", KINDS)
def test_kinds_convert_into_one_another(source, name):
    """To 1e-12, times what a rounding of the source must become in the target: x_0 from eps, say, by sigma."""
    p = process(name)
    x0, x, t, noise = noised(p, 1000)
    said = {kind: TARGETS[kind](p, x0, x, t, noise) for kind in KINDS}
    for target in KINDS:
        gain = np.sqrt(ERRORS[target](p) / ERRORS[source](p))
        error = (convert(p, x, t, said[source], source, target) - said[target]).abs().amax(1)
        assert (error.numpy() <= 1e-12 * np.maximum(1, gain)).all(), (target, error.max())


@pytest.mark.parametrize("source", [ModelMeanType.START_X, ModelMeanType.VELOCITY, ModelMeanType.PREVIOUS_X])
def test_kinds_convert_at_pure_noise(source):
    """There v is -x_0 and eps is x_t."""
    p = process("sqrt_linear+zero_snr")
    x0, x, t, noise = noised(p)
    said = TARGETS[source](p, x0, x, t, noise)
    v = convert(p, x, t, said, source, ModelMeanType.VELOCITY)
    th.testing.assert_close(v, TARGETS[ModelMeanType.VELOCITY](p, x0, x, t, noise), rtol=0, atol=1e-12)
    assert t[-1] == 999 and th.equal(v[-1], -x0[-1]) and th.equal(x[-1], noise[-1])


def test_edm_scales_are_those_of_the_table():
    """Table 1 is for y = x_0 + sigma eps; network input and target have variance 1 if the data have sigma_data."""
    p = process("karras")
    for p.sigma_data in (0.5, 1.3):
        sd, sigma = p.sigma_data, th.from_numpy(p.sqrt_recipm1_alphas_cumprod)
        t, ones = th.arange(1000), th.ones(1000, 1, dtype=F64)
        y_scale = (1 + sigma**2).sqrt()  # y = y_scale x
        c_skip, c_out, c_in = (value[:, 0] for value in edm_scales(p, ones, t))
        root = (sigma**2 + sd**2).sqrt()
        th.testing.assert_close(c_skip, y_scale * sd**2 / root**2, rtol=1e-9, atol=0)
        th.testing.assert_close(c_out, sigma * sd / root, rtol=1e-9, atol=0)
        th.testing.assert_close(c_in, y_scale / root, rtol=1e-9, atol=0)
        th.testing.assert_close(edm_noise(p, ones, t), sigma.log() / 4, rtol=1e-12, atol=0)
        keep, spoil = (th.from_numpy(v) for v in (p.sqrt_alphas_cumprod, p.sqrt_one_minus_alphas_cumprod))
        variance = keep**2 * sd**2 + spoil**2
        th.testing.assert_close(c_in**2 * variance, ones[:, 0])
        target = ((1 - c_skip * keep) * sd / c_out) ** 2 + (c_skip * spoil / c_out) ** 2
        th.testing.assert_close(target, ones[:, 0], rtol=1e-9, atol=0)
    single = edm_scales(p, ones.float(), t)  # float32 keeps its digits down to the smallest sigma
    th.testing.assert_close(single[1][:, 0].double(), c_out, rtol=1e-6, atol=0)


def test_edm_with_unit_data_is_minus_v():
    p = process("linear")
    p.sigma_data = 1.0
    x0, x, t, noise = noised(p)
    edm, v = (TARGETS[kind](p, x0, x, t, noise) for kind in (ModelMeanType.EDM, ModelMeanType.VELOCITY))
    th.testing.assert_close(edm, -v, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [th.float32, F64])
def test_an_edm_network_is_shown_the_scaled_input_and_told_the_noise(dtype):
    d = make("karras", ModelMeanType.EDM, 100, sigma_data=0.7)
    x0, x, t, noise = noised(d, 20, dtype)
    shown = []

    def net(scaled, c_noise, y):
        shown.append((scaled, c_noise, y))
        return scaled * 0

    pred = d.predictor(net, clip_denoised=False)(x, t, y="label")
    d.training_losses(net, x0, t, {"y": "label"}, noise)
    c_skip, c_out, c_in = edm_scales(d, x, t)
    for scaled, c_noise, y in shown:
        th.testing.assert_close(scaled, c_in * x)
        th.testing.assert_close(c_noise, th.from_numpy(np.log(d.sqrt_recipm1_alphas_cumprod) / 4)[t].to(dtype))
        assert (c_noise.shape, c_noise.dtype, y) == ((20,), dtype, "label")
    th.testing.assert_close(pred.x0, c_skip * x)
    loss = d.training_losses(net, x0, t, {"y": 0}, noise)["mse"]
    th.testing.assert_close(loss, (((x0 - c_skip * x) / c_out) ** 2).mean(1), rtol=1e-5, atol=1e-6)
    assert d.spaced(range(0, 100, 5)).sigma_data == 0.7


# --------------------------------------------------------------------------------------------------- loss weights

@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_weights_say_the_same_of_x0_whatever_is_predicted(sigma_data):
    """Through training_losses: the same wrong x_0 costs the same, but under `unit`."""
    betas = {"name": "karras", "steps": 60, "sigma_data": sigma_data}
    wrong, costs = 0.3, {}
    for weight in WEIGHTS:
        for kind in KINDS:
            d = make(kind=kind, loss_weight=weight, **betas)
            x0, x, t, noise = noised(d, 60)
            answer = convert(d, x, t, x0 + wrong, ModelMeanType.START_X, kind)
            costs[weight, kind] = d.training_losses(lambda x, t, answer=answer: answer, x0, t, noise=noise)["mse"]
    sigma = th.from_numpy(d.sqrt_recipm1_alphas_cumprod)
    expected = {
        "snr": sigma**-2,
        "snr_plus_one": sigma**-2 + 1,
        "truncated_snr": (sigma**-2).clamp(min=1),
        "min_snr": (sigma**-2).clamp(max=5),
        "soft_min_snr": 1 / (sigma**2 + 1 / 4),
        "p2": 1 / (1 + sigma**2),
        "edm": (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2,
    }
    assert {*expected, "unit"} == set(WEIGHTS)
    for weight, on_x0 in expected.items():
        for kind in KINDS:
            th.testing.assert_close(costs[weight, kind], on_x0 * wrong**2, rtol=1e-6, atol=0)
    own = {ModelMeanType.EPSILON: "snr", ModelMeanType.VELOCITY: "snr_plus_one", ModelMeanType.EDM: "edm"}
    for kind, weight in own.items():  # what a kind does of itself
        th.testing.assert_close(costs["unit", kind], costs[weight, kind], rtol=1e-9, atol=0)
        np.testing.assert_allclose(loss_weights(d, weight, kind), 1, rtol=1e-12)
    th.testing.assert_close(costs["unit", ModelMeanType.START_X], th.full((60,), wrong**2, dtype=F64))


def test_weights_in_the_forms_of_their_papers():
    p = process("linear")
    snr = p.alphas_cumprod / (1 - p.alphas_cumprod)
    eps, v = ModelMeanType.EPSILON, ModelMeanType.VELOCITY
    for weight, kind, form in (
        ("min_snr", eps, np.minimum(1, 5 / snr)), ("min_snr", v, np.minimum(snr, 5) / (snr + 1)),
        ("p2", eps, 1 / (1 + snr)), ("truncated_snr", eps, np.maximum(1, 1 / snr)),
        ("truncated_snr", v, np.maximum(snr, 1) / (snr + 1)), ("snr", v, p.alphas_cumprod),
    ):  # fmt: skip
        np.testing.assert_allclose(loss_weights(p, weight, kind), form, rtol=1e-12)
    hard, soft = losses.min_snr(snr, 4.0), losses.soft_min_snr(snr, 4.0)
    assert (soft < hard).all() and (soft >= hard / 2 - 1e-12).all()  # they meet far from the corner, half at it
    p.sigma_data = 0.5  # then 1 / gamma = sigma_data^2, and the weight of F is c_out^2 / (sigma^2 + sigma_data^2)
    sigma = snr**-0.5
    np.testing.assert_allclose(
        loss_weights(p, "soft_min_snr", ModelMeanType.EDM), (sigma * 0.5 / (sigma**2 + 0.25)) ** 2, rtol=1e-9
    )
    np.testing.assert_array_equal(losses.p2(snr, k=2.0, gamma=0.0), snr)


def test_weights_leave_the_variational_term_alone():
    terms = {}
    for weight in ("unit", "min_snr"):
        d = make("cosine", ModelMeanType.EPSILON, 50, ModelVarType.LEARNED_RANGE, loss_weight=weight)
        x0, _, t, noise = noised(d, 50)
        terms[weight] = d.training_losses(lambda x, t: th.cat([x.sin(), x.cos()], 1), x0, t, noise=noise)
    unit, other = terms["unit"], terms["min_snr"]
    assert th.equal(unit["vb"], other["vb"])
    weight = th.from_numpy(loss_weights(d, "min_snr", ModelMeanType.EPSILON))[t]
    assert weight.min() < 0.1 and weight.max() == 1
    th.testing.assert_close(other["mse"], weight * unit["mse"], rtol=1e-12, atol=0)
    th.testing.assert_close(other["loss"], other["mse"] + other["vb"], rtol=1e-12, atol=0)


def test_weights_at_pure_noise_are_finite():
    for kind in (ModelMeanType.START_X, ModelMeanType.VELOCITY, ModelMeanType.PREVIOUS_X):
        for weight in WEIGHTS:
            assert np.isfinite(loss_weights(process("cosine+zero_snr"), weight, kind)).all()


def test_a_weight_with_nothing_to_weigh_is_refused():
    with pytest.raises(ValueError, match=r"loss_weight p2 .* variational bound has none"):
        make(loss_type=LossType.KL, loss_weight="p2")
    with pytest.raises(ValueError, match=r"unknown loss weight: soft_snr .*did you mean soft_min_snr"):
        make(loss_weight="soft_snr")


# ------------------------------------------------------------------------------------------------- with a network

@pytest.mark.parametrize("flags", [
    {"predict": "edm", "noise_schedule": "karras", "loss_weight": "edm"},
    {"predict": "edm", "noise_schedule": "log_linear", "learn_sigma": True, "class_cond": True, "num_classes": 3},
    {"predict": "v", "noise_schedule": "sqrt_linear+zero_snr", "loss_weight": "min_snr", "rescale_timesteps": True},
    {"predict": "x0", "noise_schedule": "sigmoid+shift2", "loss_weight": "soft_min_snr", "learn_sigma": True},
])  # fmt: skip
def test_a_unet_trains_and_draws(flags):
    small = {"image_size": 8, "image_channels": 1, "num_channels": 32, "num_heads": 1, "num_res_blocks": 1}
    options = script_util.model_and_diffusion_defaults() | small | {"diffusion_steps": 40, **flags}
    th.manual_seed(0)
    net, d = script_util.create_model_and_diffusion(**options)
    cond = {"y": th.arange(4) % 3} if flags.get("class_cond") else {}
    x0, t = th.rand(4, 1, 8, 8) * 2 - 1, th.tensor([0, 13, 27, 39])
    optimizer = th.optim.Adam(net.parameters(), lr=1e-3)
    noise, seen = th.randn(4, 1, 8, 8), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = d.training_losses(net, x0, t, cond, noise)["loss"].mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.9 * seen[0]
    for loop in (d.p_sample_loop, d.ddim_sample_loop):
        x = loop(net.eval(), (4, 1, 8, 8), model_kwargs=cond)
        assert x.isfinite().all() and x.abs().max() < 1.5
