"""What the process, its losses and its steps do, statement by statement."""

import inspect
import math

import numpy as np
import pytest
import torch as th

from guided_diffusion import losses, resample
from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.guidance import classifier_gradient
from guided_diffusion.process import Process
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.script_util import create_gaussian_diffusion


def make(steps=1000, respacing=None, schedule="linear", mean="EPSILON", var="LEARNED_RANGE", loss="MSE", rescale=False):
    return SpacedDiffusion(
        space_timesteps(steps, respacing or [steps]),
        betas=get_named_beta_schedule(schedule, steps),
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[var],
        loss_type=LossType[loss],
        rescale_timesteps=rescale,
    )


def constant_eps(x, t, v=0.0, **_):
    """eps = 0.1 everywhere, and v for the variance."""
    return th.cat([th.full_like(x, 0.1), th.full_like(x, v)], 1)


def rows(*t):
    return th.tensor(t)


ONE = th.full((1, 1, 1, 1), 0.5)


# --------------------------------------------------------------------------------------------- known numbers

def test_schedule_numbers():
    linear, cosine = make(var="FIXED_LARGE"), make(schedule="cosine", var="FIXED_LARGE")
    known = [
        (linear.betas, {0: 1e-4, 1: 1.1991992e-4, 999: 0.02}),
        (linear.alphas_cumprod, {0: 0.9999, 499: 0.0785872429, 999: 4.03582977e-05}),
        (linear.posterior_variance, {1: 5.453187661e-05}),
        (linear.posterior_log_variance_clipped, {0: -9.81672514, 1: -9.81672514}),
        (cosine.betas, {0: 4.12842248e-05, 1: 4.61417527e-05, 500: 3.15569144e-03, 998: 0.749999393, 999: 0.999}),
        (cosine.alphas_cumprod, {499: 0.493843590, 998: 2.42876691e-06, 999: 2.42876691e-09}),
    ]
    for table, values in known:
        for row, value in values.items():
            assert table[row] == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("clip, mean, x0", [(True, 0.50011021, 1.0), (False, 0.50148124, 1.44832861)])
def test_known_reverse_step(clip, mean, x0):
    out = make().p_mean_variance(constant_eps, ONE, rows(500), clip_denoised=clip)
    assert out["mean"].item() == pytest.approx(mean, abs=2e-7)
    assert out["pred_xstart"].item() == pytest.approx(x0, abs=1e-6)
    assert out["variance"].item() == pytest.approx(0.01005564816, rel=1e-6)
    assert out["log_variance"].item() == pytest.approx(-4.59962082, rel=1e-7)


def test_known_losses():
    diffusion, x0, noise = make(), th.full((1, 1, 1, 1), -0.2), th.full((1, 1, 1, 1), 0.3)
    for t, vb in {0: 1.54369855, 10: 0.00612098537, 500: 3.18176957e-4}.items():
        terms = diffusion.training_losses(constant_eps, x0, rows(t), noise=noise)
        assert terms["mse"].item() == pytest.approx(0.04, rel=1e-5)
        assert terms["vb"].item() == pytest.approx(vb, rel=2e-4)
    rescaled = make(loss="RESCALED_KL").training_losses(constant_eps, x0, rows(10), noise=noise)
    assert rescaled["loss"].item() == pytest.approx(6.12098551, rel=2e-4)
    assert diffusion._prior_bpd(x0).item() == pytest.approx(1.1644943e-06, rel=1e-3)


def test_known_likelihoods():
    for x, cdf in {1.0: 0.84119201, -1.0: 0.15880799, 0.5: 0.69142801}.items():
        assert losses.approx_standard_normal_cdf(th.tensor(x)).item() == pytest.approx(cdf, abs=1e-7)
    table = [(0, 0, 0, -5.76704979), (0, 0, -3, -2.76809359), (-1, 0, 0, -1.83409512), (1, 0, 0, -1.83409524),
             (0.5, 0.4, -4, -27.63102)]  # fmt: skip
    for x, mean, log_scale, value in table:
        x, mean, log_scale = (th.tensor([float(v)]) for v in (x, mean, log_scale))
        ours = losses.discretized_gaussian_log_likelihood(x, means=mean, log_scales=log_scale)
        assert ours.item() == pytest.approx(value, abs=5e-5)
    zero, one = th.zeros(1), th.ones(1)
    assert losses.normal_kl(one, 0.0, 0.0, 0.0).item() == 0.5
    assert losses.normal_kl(zero, one, zero, zero).item() == pytest.approx(0.35914087, abs=1e-7)
    with pytest.raises(TypeError, match="tensor"):
        losses.normal_kl(0.0, 0.0, 0.0, 0.0)


def test_the_bins_of_an_image_share_all_probability():
    levels = (th.arange(256, dtype=th.float64) / 127.5 - 1).view(-1, 1)
    for mean, log_scale in [(0.0, -1.0), (0.9, -3.0), (-1.2, 0.5)]:
        log_p = losses.discretized_gaussian_log_likelihood(
            levels, means=th.full_like(levels, mean), log_scales=th.full_like(levels, log_scale)
        )
        # Neighbouring bins meet at the 1/255 half-widths, so their sum telescopes to one (but for the 1e-12 floor).
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


# --------------------------------------------------------------------------------------- statements, by number

def test_s08_17_tables_are_float64_and_only_gathered_values_are_cast():
    process = Process(get_named_beta_schedule("cosine", 50))
    tables = [v for v in vars(process).values() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
    assert len(tables) >= 15 and all(table.dtype == np.float64 for table in tables)
    t, x = rows(3, 40), th.randn(2, 4)
    ours = process.at("betas", t, x)
    assert ours.dtype == th.float32 and ours.shape == x.shape
    assert (ours[:, 0].numpy() == process.betas[[3, 40]].astype(np.float32)).all()
    exact = process.q_sample(x.double(), t, x.double())
    abar = process.alphas_cumprod[[3, 40]][:, None]
    np.testing.assert_allclose(exact, (np.sqrt(abar) + np.sqrt(1 - abar)) * x.double().numpy(), rtol=1e-14)


def test_s08_18_learned_range_between_small_and_large_without_clamp():
    diffusion = make(100)
    x = th.zeros(3, 1, 2, 2)
    t = rows(0, 1, 50)
    low = diffusion.p_mean_variance(lambda x, t: constant_eps(x, t, -1.0), x, t)["log_variance"][:, 0, 0, 0]
    high = diffusion.p_mean_variance(lambda x, t: constant_eps(x, t, 1.0), x, t)["log_variance"][:, 0, 0, 0]
    np.testing.assert_allclose(low, np.log(diffusion.posterior_variance[[1, 1, 50]]), rtol=1e-6)
    np.testing.assert_allclose(high, np.log(diffusion.betas[[0, 1, 50]]), rtol=1e-6)
    beyond = diffusion.p_mean_variance(lambda x, t: constant_eps(x, t, 3.0), x, t)["variance"][2, 0, 0, 0]
    assert beyond.item() == pytest.approx(0.10233, abs=5e-6) and diffusion.betas[50] < 0.10152


def test_s08_19_fixed_large_uses_row_1_at_row_0():
    diffusion = make(100, var="FIXED_LARGE")
    out = diffusion.p_mean_variance(lambda x, t: x * 0, th.zeros(2, 1, 2, 2), rows(0, 7))
    expected = [diffusion.posterior_variance[1], diffusion.betas[7]]
    np.testing.assert_allclose(out["variance"][:, 0, 0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(out["log_variance"][:, 0, 0, 0], np.log(expected), rtol=1e-6)


def test_fixed_small_is_zero_at_row_0_but_its_logarithm_is_clipped():
    diffusion = make(100, var="FIXED_SMALL")
    out = diffusion.p_mean_variance(lambda x, t: x * 0, th.zeros(1, 1, 2, 2), rows(0))
    assert (out["variance"] == 0).all()
    np.testing.assert_allclose(out["log_variance"], np.log(diffusion.posterior_variance[1]), rtol=1e-6)


def test_s08_20_loss_is_mse_plus_vb_and_rescaled_mse_weighs_vb_by_T():
    x0, noise, t = th.rand(2, 1, 4, 4), th.randn(2, 1, 4, 4), rows(7, 100)
    for steps in (1000, 4000):
        plain = make(steps).training_losses(constant_eps, x0, t, noise=noise)
        scaled = make(steps, loss="RESCALED_MSE").training_losses(constant_eps, x0, t, noise=noise)
        th.testing.assert_close(plain["loss"], plain["mse"] + plain["vb"])
        th.testing.assert_close(scaled["vb"], plain["vb"] * steps / 1000)
        th.testing.assert_close(scaled["loss"], plain["mse"] + plain["vb"] * steps / 1000)


def test_s08_21_vb_trains_only_the_variance_and_mse_only_the_mean():
    output = th.randn(2, 2, 4, 4, requires_grad=True)
    for loss, mean_moves, variance_moves in [("mse", True, False), ("vb", False, True)]:
        terms = make().training_losses(lambda x, t: output, th.rand(2, 1, 4, 4), rows(5, 700))
        (gradient,) = th.autograd.grad(terms[loss].sum(), output)
        assert bool(gradient[:, :1].any()) == mean_moves and bool(gradient[:, 1:].any()) == variance_moves
    whole = make(loss="KL").training_losses(lambda x, t: output, th.rand(2, 1, 4, 4), rows(5, 700))
    (gradient,) = th.autograd.grad(whole["loss"].sum(), output)
    assert gradient[:, :1].any() and gradient[:, 1:].any()


def test_s08_22_training_never_clips_and_likelihood_does():
    diffusion, x0, noise = make(), th.rand(1, 1, 4, 4), th.randn(1, 1, 4, 4)

    def wild(x, t):
        return th.cat([x * 0 - 30.0, x * 0], 1)  # an x_0 far outside [-1, 1]

    x_t = diffusion.q_sample(x0, rows(400), noise)
    clipped = diffusion._vb_terms_bpd(wild, x0, x_t, rows(400))["output"]
    free = diffusion._vb_terms_bpd(wild, x0, x_t, rows(400), clip_denoised=False)["output"]
    assert free > 10 * clipped
    trained = diffusion.training_losses(wild, x0, rows(400), noise=noise)["vb"]
    th.testing.assert_close(trained, free)
    assert inspect.signature(diffusion.calc_bpd_loop).parameters["clip_denoised"].default is True


def test_s08_23_rescaled_kl_counts_the_kept_steps():
    x0, noise, t = th.rand(2, 1, 4, 4), th.randn(2, 1, 4, 4), rows(0, 9)
    plain = make(respacing="25", loss="KL").training_losses(constant_eps, x0, t, noise=noise)["loss"]
    scaled = make(respacing="25", loss="RESCALED_KL").training_losses(constant_eps, x0, t, noise=noise)["loss"]
    th.testing.assert_close(scaled, 25 * plain)


def test_s08_24_networks_and_classifiers_are_told_original_steps():
    for rescale, told in [(False, 90), (True, 900.0)]:
        diffusion = make(100, "ddim10", var="FIXED_LARGE", rescale=rescale)
        seen = []

        def model(x, t, seen=seen):
            seen.append(t)
            return x * 0

        def cond_fn(x, t, seen=seen):
            seen.append(t)
            return x * 0

        diffusion.p_sample(model, th.zeros(1, 1, 2, 2), rows(9), cond_fn=cond_fn)
        diffusion.training_losses(model, th.zeros(1, 1, 2, 2), rows(9))
        assert [t.item() for t in seen] == [told] * 3
        assert {t.dtype for t in seen} == {th.float32 if rescale else th.int64}
    base = make(1000, var="FIXED_LARGE")
    few = make(1000, "ddim25", var="FIXED_LARGE")
    np.testing.assert_allclose(few.alphas_cumprod, base.alphas_cumprod[::40], rtol=1e-12)
    np.testing.assert_allclose(few.betas[[0, 1, 24]], [1e-4, 0.0201350895, 0.532601823], rtol=1e-8)
    np.testing.assert_allclose(make(respacing="250").betas[[1, 249]], [5.99065564e-04, 0.0775193450], rtol=1e-8)


def test_s08_25_kept_rows():
    assert sorted(space_timesteps(1000, "25")) == [
        0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666, 708, 749, 791, 832, 874,
        916, 957, 999,
    ]  # fmt: skip
    assert space_timesteps(1000, "ddim250") == set(range(0, 1000, 4))
    assert space_timesteps(1000, "ddim25") == set(range(0, 1000, 40))
    assert sorted(space_timesteps(1000, "ddim30"))[:3] == [0, 34, 68] and len(space_timesteps(1000, "ddim30")) == 30
    kept = space_timesteps(1000, "250")
    assert len(kept) == 250 and {0, 999} <= kept


def test_s08_26_sections_run_from_clean_to_noisy():
    assert sorted(space_timesteps(300, "10,15,20")) == [
        0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 100, 107, 114, 121, 128, 135, 142, 149, 157, 164, 171, 178, 185, 192,
        199, 200, 205, 210, 216, 221, 226, 231, 236, 242, 247, 252, 257, 263, 268, 273, 278, 283, 289, 294, 299,
    ]  # fmt: skip
    assert space_timesteps(300, [10, 15, 20]) == space_timesteps(300, "10,15,20")
    assert [len({t for t in space_timesteps(1000, "90,60,60,20,20") if t // 200 == k}) for k in range(5)] == [
        90, 60, 60, 20, 20,
    ]  # fmt: skip
    assert sorted(space_timesteps(10, [2, 1, 0])) == [0, 3, 4]  # 10 = 4 + 3 + 3


def test_s08_27_respaced_training_stays_on_the_kept_rows():
    diffusion = make(1000, "10", var="FIXED_LARGE")
    sampler = resample.create_named_schedule_sampler("uniform", diffusion)
    t, _ = sampler.sample(200, "cpu")
    seen = []
    diffusion.training_losses(lambda x, t: (seen.append(t), x * 0)[1], th.zeros(200, 1, 1, 1), t)
    assert set(seen[0].tolist()) == space_timesteps(1000, "10")


def test_s08_28_ancestral_guidance_shifts_the_mean_also_at_row_0():
    diffusion = make(100)
    th.manual_seed(0)
    free = diffusion.p_sample(constant_eps, ONE, rows(0))["sample"]
    guided = diffusion.p_sample(constant_eps, ONE, rows(0), cond_fn=lambda x, t: th.ones_like(x))["sample"]
    assert (guided - free).item() == pytest.approx(8.6671e-4, rel=1e-3)
    both = 0.5 * (math.log(diffusion.betas[0]) + math.log(diffusion.posterior_variance[1]))
    assert math.exp(both) == pytest.approx(8.6671e-4, rel=1e-4)
    mean_var = diffusion.p_mean_variance(constant_eps, ONE, rows(60))
    shifted = diffusion.condition_mean(lambda x, t: 2 * th.ones_like(x), mean_var, ONE, rows(60))
    th.testing.assert_close(shifted, mean_var["mean"] + 2 * mean_var["variance"])


def test_s08_29_ddim_guidance_moves_eps_and_does_not_clip_again():
    out = make().ddim_sample(constant_eps, ONE, rows(500), cond_fn=lambda x, t: 0.2 * th.ones_like(x))
    assert out["sample"].item() == pytest.approx(0.50233275, abs=3e-7)
    assert out["pred_xstart"].item() == pytest.approx(1.66126609, abs=2e-6)
    mean_var = make().p_mean_variance(constant_eps, ONE, rows(500))
    scored = make().condition_score(lambda x, t: 0.2 * th.ones_like(x), mean_var, ONE, rows(500))
    assert scored["pred_xstart"].item() == pytest.approx(1.66126609, abs=2e-6)
    assert scored["variance"] is mean_var["variance"]
    expected = make().q_posterior_mean_variance(scored["pred_xstart"], ONE, rows(500))[0]
    th.testing.assert_close(scored["mean"], expected)


def test_s08_30_ddim_rederives_eps_from_the_clipped_x0():
    assert make().ddim_sample(constant_eps, ONE, rows(500))["sample"].item() == pytest.approx(0.50131881, abs=2e-7)
    reverse = make().ddim_reverse_sample(constant_eps, ONE, rows(500))["sample"]
    assert reverse.item() == pytest.approx(0.49868467, abs=2e-7)


def test_s08_31_guidance_needs_no_model_kwargs():
    """The original raised TypeError here."""
    for step in (make().p_sample, make().ddim_sample):
        assert step(constant_eps, ONE, rows(5), cond_fn=lambda x, t: x * 0)["sample"].isfinite().all()


def test_s08_32_every_step_draws_noise():
    for name in ("p_sample_loop", "ddim_sample_loop"):
        diffusion = make(30, var="FIXED_SMALL")
        th.manual_seed(3)
        getattr(diffusion, name)(lambda x, t: x * 0, (2, 1, 2, 2))
        after = th.rand(1)
        th.manual_seed(3)
        for _ in range(31):  # the start, then one draw a step, the last included
            th.randn(2, 1, 2, 2)
        assert after == th.rand(1)


def test_s08_33_pred_xstart_ignores_guidance_in_p_sample_only():
    x, t = th.randn(1, 1, 2, 2), rows(300)
    for step, same in [(make().p_sample, True), (make().ddim_sample, False)]:
        plain = step(constant_eps, x, t)["pred_xstart"]
        guided = step(constant_eps, x, t, cond_fn=lambda x, t: th.ones_like(x))["pred_xstart"]
        assert th.equal(plain, guided) == same


def test_s08_37_classifier_gradient_is_of_the_sum_of_chosen_log_probabilities():
    th.manual_seed(0)
    weight = th.randn(5, 12)

    def classifier(x, t):
        return x.flatten(1) @ weight.T * (1 + t.view(-1, 1) / 10)

    x, t, y = th.randn(3, 3, 2, 2), rows(1, 5, 9), rows(0, 4, 2)
    gradient = classifier_gradient(classifier, 2.5)(x, t, y)
    for i in range(3):
        alone = classifier_gradient(classifier, 2.5)(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        th.testing.assert_close(gradient[i : i + 1], alone)
        # d log softmax_y / d logits = onehot - p, by hand
        p = classifier(x[i : i + 1], t[i : i + 1]).softmax(1)[0]
        by_hand = 2.5 * (1 + t[i] / 10) * (th.eye(5)[y[i]] - p) @ weight
        th.testing.assert_close(gradient[i].flatten(), by_hand, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="pass y"):
        classifier_gradient(classifier)(x, t)


def test_s08_57_likelihood_columns_run_from_noisy_to_clean_and_58_sum_to_the_total():
    diffusion = make(40, loss="KL")
    x0 = th.rand(3, 1, 4, 4) * 2 - 1
    terms = diffusion.calc_bpd_loop(lambda x, t: th.cat([x * 0, x * 0], 1), x0)
    assert terms["vb"].shape == (3, 40)
    # eps = 0 predicts x_0 = x_t / sqrt(abar), clipped: nearly right only for the last column, t = 0.
    assert (terms["xstart_mse"][:, 0] > 20 * terms["xstart_mse"][:, -1]).all()
    th.testing.assert_close(terms["total_bpd"], terms["vb"].sum(1) + terms["prior_bpd"])
    abar = diffusion.alphas_cumprod[39]
    kl = 0.5 * (abar * x0.double() ** 2 - abar - math.log1p(-abar)).flatten(1).mean(1) / math.log(2)
    th.testing.assert_close(diffusion._prior_bpd(x0.double()), kl, rtol=1e-9, atol=0)


# --------------------------------------------------------------------------------------------- timestep samplers

def test_importance_weights_keep_the_mean_of_the_loss():
    diffusion = make(50, var="FIXED_LARGE")
    sampler = resample.create_named_schedule_sampler("loss-second-moment", diffusion)
    assert (sampler.weights() == 1).all()
    loss = np.linspace(0.1, 5, 50)
    for _ in range(10):
        sampler.update_with_local_losses(th.arange(50), th.from_numpy(loss))
    p = sampler.weights() / sampler.weights().sum()
    np.testing.assert_allclose(p, 0.999 * loss / loss.sum() + 0.001 / 50, rtol=1e-12)
    t, weights = sampler.sample(20000, "cpu", np.random.default_rng(0))
    np.testing.assert_allclose(weights, 1 / (50 * p[t]), rtol=1e-6)
    assert (weights * th.from_numpy(loss)[t]).mean().item() == pytest.approx(loss.mean(), rel=1e-3)
    for _ in range(10):  # a history of ten: the old losses are forgotten
        sampler.update_with_local_losses(th.arange(50), th.ones(50))
    np.testing.assert_allclose(sampler.weights(), 1 / 50, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "karras"])
def test_lognormal_rows_have_the_normal_mass_between_midpoints(schedule):
    """Against the normal distribution function at the midpoints of log sigma; the tails go outside."""
    diffusion = create_gaussian_diffusion(noise_schedule=schedule)
    sampler = resample.create_named_schedule_sampler("lognormal", diffusion)
    level = th.from_numpy(diffusion.alphas_cumprod)
    level = ((1 - level) / level).log() / 2  # [T]
    edges = th.cat([th.tensor([-math.inf]), (level[1:] + level[:-1]) / 2, th.tensor([math.inf])])
    wanted = th.special.ndtr((edges + 1.2) / 1.2).diff()
    np.testing.assert_allclose(sampler.weights(), wanted, rtol=1e-7, atol=1e-15)
    assert sampler.weights().sum() == pytest.approx(1, abs=1e-12)
    t, weights = sampler.sample(40000, "cpu", np.random.default_rng(0))
    assert (weights == 1).all() and weights.dtype == th.float32
    drawn = level[t].numpy()
    low = level[0].item()  # what lies below the least noise is drawn there
    z = th.distributions.Normal(0.0, 1.0)
    expected = (-1.2 + 1.2 * z.sample((400000,))).clamp(low, level[-1].item()).double()
    assert drawn.mean() == pytest.approx(expected.mean().item(), abs=4 * 1.2 / 200 + 0.01)
    assert drawn.std() == pytest.approx(expected.std().item(), rel=0.02)
    other = resample.LognormalSampler(diffusion, mean=0.0, std=0.5).weights()
    half = np.searchsorted(level.numpy(), 0.0)
    assert other[:half].sum() == pytest.approx(0.5, abs=other.max())


def test_lognormal_rows_end_where_the_noise_does():
    """A last row of pure noise has no log sigma, and is never drawn."""
    sampler = resample.LognormalSampler(create_gaussian_diffusion(noise_schedule="cosine+zero_snr", predict="v"))
    assert sampler.weights()[-1] == 0 and sampler.weights().sum() == pytest.approx(1, abs=1e-12)
    assert sampler.sample(2000, "cpu", np.random.default_rng(0))[0].max() < 999
    single = resample.LognormalSampler(create_gaussian_diffusion(timestep_respacing="1"))
    assert single.weights().tolist() == [1]


def test_uniform_sampler_covers_all_rows_with_weight_one():
    t, weights = resample.UniformSampler(make(50)).sample(5000, "cpu", np.random.default_rng(0))
    assert set(t.tolist()) == set(range(50)) and (weights == 1).all() and t.dtype == th.int64


# --------------------------------------------------------------------------------------------------- small cases

@pytest.mark.parametrize("respacing", ["1", "ddim1"])
def test_a_single_step_works(respacing):
    diffusion = make(1000, respacing)
    out = diffusion.p_sample_loop(constant_eps, (2, 1, 2, 2))
    assert out.isfinite().all()
    assert make(1, schedule="cosine").p_sample_loop(constant_eps, (2, 1, 2, 2)).isfinite().all()


def test_vectors_and_points_are_data_too():
    diffusion = make(30, var="FIXED_SMALL")
    assert diffusion.ddim_sample_loop(lambda x, t: x * 0, (5, 2)).shape == (5, 2)


def test_loops_keep_the_original_signatures():
    expected = [
        "model", "shape", "noise", "clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "device", "progress",
    ]  # fmt: skip
    for name in ("p_sample_loop", "p_sample_loop_progressive"):
        assert list(inspect.signature(getattr(GaussianDiffusion, name)).parameters)[1:] == expected
    for name in ("ddim_sample_loop", "ddim_sample_loop_progressive"):
        assert list(inspect.signature(getattr(GaussianDiffusion, name)).parameters)[1:] == [*expected, "eta"]
    assert "ddim_sample_loop_progressive" in GaussianDiffusion.ddim_sample_loop.__doc__


SIGNATURES = {
    "q_mean_variance": "x_start t",
    "q_sample": "x_start t noise",
    "q_posterior_mean_variance": "x_start x_t t",
    "p_mean_variance": "model x t clip_denoised denoised_fn model_kwargs",
    "condition_mean": "cond_fn p_mean_var x t model_kwargs",
    "condition_score": "cond_fn p_mean_var x t model_kwargs",
    "p_sample": "model x t clip_denoised denoised_fn cond_fn model_kwargs",
    "ddim_sample": "model x t clip_denoised denoised_fn cond_fn model_kwargs eta",
    "ddim_reverse_sample": "model x t clip_denoised denoised_fn model_kwargs eta",
    "training_losses": "model x_start t model_kwargs noise",
    "calc_bpd_loop": "model x_start clip_denoised model_kwargs",
    "_vb_terms_bpd": "model x_start x_t t clip_denoised model_kwargs",
}
DEFAULTS = {"clip_denoised": True, "eta": 0.0} | dict.fromkeys(["denoised_fn", "cond_fn", "model_kwargs", "noise"])


@pytest.mark.parametrize("name", SIGNATURES)
def test_methods_keep_the_original_signatures(name):
    parameters = inspect.signature(getattr(SpacedDiffusion, name)).parameters
    assert " ".join(list(parameters)[1:]) == SIGNATURES[name]
    for parameter in list(parameters.values())[1:]:
        if not (name.startswith("condition") and parameter.name == "cond_fn"):
            assert parameter.default == DEFAULTS.get(parameter.name, parameter.empty), parameter.name


def test_progress_bar_and_start_noise(capsys):
    start = th.randn(1, 1, 2, 2)
    steps = list(make(25).ddim_sample_loop_progressive(constant_eps, (1, 1, 2, 2), noise=start, progress=True))
    assert len(steps) == 25 and "25/25" in capsys.readouterr().err
    first = make(25).ddim_sample(constant_eps, start, rows(24))
    th.testing.assert_close(steps[0]["sample"], first["sample"])


def test_denoised_fn_comes_before_the_clip():
    out = make().p_mean_variance(constant_eps, ONE, rows(500), denoised_fn=lambda x0: x0 * 3)
    assert out["pred_xstart"].item() == 1.0
    out = make().p_mean_variance(constant_eps, ONE, rows(500), denoised_fn=lambda x0: x0 / 3)
    assert out["pred_xstart"].item() == pytest.approx(1.44832861 / 3, abs=1e-6)


def test_per_sample_rows_mask_noise_one_by_one():
    th.manual_seed(1)
    diffusion = make(100, var="FIXED_SMALL")
    x = th.zeros(2, 1, 64, 64)
    sample = diffusion.p_sample(lambda x, t: x * 0, x, rows(0, 50))["sample"]
    assert (sample[0] == 0).all()
    assert sample[1].std().item() == pytest.approx(diffusion.posterior_variance[50] ** 0.5, rel=0.05)


# ------------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: get_named_beta_schedule("quadratic", 10), "quadratic.*linear, cosine"),
        (lambda: get_named_beta_schedule("linear", 20), "20 steps.*beta of 1.*21"),
        (lambda: get_named_beta_schedule("linear", 5), "beta of 4"),
        (lambda: space_timesteps(1000, "ddim300"), "exactly 300 of 1000.*ddim250.*ddim334"),
        (lambda: space_timesteps(100, "10,80"), "section of 50 steps into 80"),
        (lambda: space_timesteps(100, "ten"), "'ten'.*ddim25"),
        (lambda: space_timesteps(100, "ddimten"), "'ddimten'"),
        (lambda: space_timesteps(100, "-5"), "'-5'"),
        (lambda: space_timesteps(100, "0"), "keeps no step"),
        (lambda: Process([0.5, 1.5]), r"\(0, 1\].*0.5 .. 1.5"),
        (lambda: Process([[0.1]]), r"shape \(1, 1\)"),
        (lambda: Process([0.1, 0.2]).spaced([0, 2]), "0..1"),
        (lambda: resample.create_named_schedule_sampler("fancy", make(30)), "fancy.*uniform, loss-second-moment"),
        (lambda: make().p_sample_loop(lambda x, t: x, (1, 1, 2, 2)), "learn_sigma must be True"),
        (lambda: make(var="FIXED_LARGE").p_sample_loop(constant_eps, (1, 1, 2, 2)), "learn_sigma must be False"),
        (lambda: make().p_mean_variance(constant_eps, ONE, rows(1, 2)), "one row for each of the 1"),
        (lambda: make().q_sample(ONE, rows(1), th.zeros(2, 1, 1, 1)), "noise has shape"),
        (lambda: make().ddim_reverse_sample(constant_eps, ONE, rows(1), eta=0.5), "eta must be 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        call()
