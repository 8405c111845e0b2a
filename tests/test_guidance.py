"""Guidance, condition dropping and inverse problems, against data whose exact answers are known, and end to end."""

import json
import math
import shutil
from collections import deque
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch as th
from test_programs import done, refused, rows, samples

from guided_diffusion import checkpoint, checks, generate, guidance, inverse, logger, sampling, toy
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.guidance import classifier_free, classifier_guided, mix, nulled
from guided_diffusion.pictures import to_uint8
from guided_diffusion.prediction import TARGETS, Prediction, clipped, eps_from_x0, predictor, read
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.respace import space_timesteps
from guided_diffusion.script_util import create_model, open_classifier, open_diffusion
from guided_diffusion.train_util import DiffusionTask, Trainer

F64 = th.float64
SMALL = ModelVarType.FIXED_SMALL


def process(respacing="50", schedule="linear"):
    return Process(get_named_beta_schedule(schedule, 1000)).spaced(space_timesteps(1000, respacing))


def run(p, predict, x, rule=sampling.ddim, noise=th.randn_like, **cond):
    return deque(sampling.sample(p, predict, rule, x, noise=noise, cond=cond), maxlen=1).pop()[0]


@pytest.fixture
def ring():
    """The ring of three classes: data, process, predictor of y (3: no label), start [60,2], labels [60]."""
    data, p = toy.ring(), process()
    exact = data.predictor(p, SMALL)

    def predict(x, t, y):
        known, unknown = exact(x, t, y=y.clamp(max=2)), exact(x, t)
        is_known = (y < 3)[:, None]
        x0, eps = (th.where(is_known, *pair) for pair in ((known.x0, unknown.x0), (known.eps, unknown.eps)))
        return replace(known, x0=x0, eps=eps)

    start = th.randn(60, 2, dtype=F64, generator=th.Generator().manual_seed(0))
    return data, p, predict, start, th.arange(60) % 3


def at(p, row, n):
    """x [n,2] and rows t [n]."""
    return th.randn(n, 2, dtype=F64, generator=th.Generator().manual_seed(row)), th.full((n,), row)


# ------------------------------------------------------------------------------------------------ classifier-free


@pytest.mark.parametrize("batched", [False, True])
def test_classifier_free_guidance_is_the_mix_with_the_unconditional_predictor(ring, batched):
    data, p, predict, start, y = ring
    exact = data.predictor(p, SMALL)
    for scale in (0.0, 1.0, 3.0):
        ours = run(p, classifier_free(predict, {"y": 3}, scale, batched=batched), start, y=y)
        known = run(p, mix(exact, lambda x, t, y: exact(x, t), scale), start, y=y)
        th.testing.assert_close(ours, known, rtol=0, atol=1e-12)
    assert th.equal(run(p, classifier_free(predict, {"y": 3}, 1.0, batched=batched), start, y=y),
                    run(p, predict, start, y=y))  # fmt: skip
    plain = run(p, lambda x, t, y: exact(x, t), start, y=y)
    th.testing.assert_close(run(p, classifier_free(predict, {"y": 3}, 0.0), start, y=y), plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batched, sizes", [(False, [60, 60]), (True, [120])])
def test_every_step_is_guided_in_one_call_or_two(ring, batched, sizes):
    _, p, predict, start, y = ring
    calls = []

    def counted(x, t, y):
        calls.append((len(x), int((y == 3).sum())))
        return predict(x, t, y)

    run(p, classifier_free(counted, {"y": 3}, 2.0, batched=batched), start, y=y)
    assert [n for n, _ in calls] == sizes * 50
    assert sum(nulls for _, nulls in calls) == 50 * 60


def test_mixing_means_the_same_in_every_parameterization():
    """Mixed outputs of networks of eps, x_0, v and previous x, and mixed predictions: one result."""
    p, x, t = process(), th.randn(6, 2, dtype=F64), th.arange(6) * 9
    truth = [th.randn_like(x) for _ in range(2)]
    implied = [eps_from_x0(p, x, t, x0) for x0 in truth]
    results = []
    for kind in ModelMeanType:
        a, b = (TARGETS[kind](p, x0, x, t, eps) for x0, eps in zip(truth, implied))
        outputs = read(p, kind, SMALL, b + 2.5 * (a - b), None, x, t)
        predictions = guidance.linear(*(read(p, kind, SMALL, out, None, x, t) for out in (a, b)), 2.5, x, t)
        results += [outputs, predictions]
    for other in results[1:]:
        th.testing.assert_close(other.x0, results[0].x0, rtol=1e-9, atol=1e-9)
        th.testing.assert_close(other.eps, results[0].eps, rtol=1e-9, atol=1e-9)


def test_guidance_of_a_learned_variance_changes_only_the_mean():
    p, y = process(), th.tensor([0, 1, 2, 0])
    weights = th.randn(4, 2, 4, dtype=F64, generator=th.Generator().manual_seed(1))
    predict = predictor(p, lambda x, t, y: th.einsum("nc,nco->no", x, weights[y]).sin(), ModelMeanType.EPSILON,
                        ModelVarType.LEARNED_RANGE)  # fmt: skip
    x, t = at(p, 30, 4)
    plain = predict(x, t, y=y)
    for combine in (guidance.linear, guidance.rescaled(p), guidance.projected(p)):
        for batched in (False, True):
            strong = classifier_free(predict, {"y": 3}, 4.0, combine, batched)(x, t, y=y)
            assert th.equal(strong.variance, plain.variance) and th.equal(strong.log_variance, plain.log_variance)
            assert (strong.x0 - plain.x0).abs().min() > 1e-3
    pushed = classifier_guided(predict, lambda x, t, y: th.ones_like(x))(x, t, y=y)
    assert th.equal(pushed.log_variance, plain.log_variance) and th.equal(pushed.x0, plain.x0)


def test_mixing_a_guided_predictor_mixes_what_its_gradient_stands_for(ring):
    """s (score + g) + (1 - s) score has the gradient s g, by whichever sampler applies it."""
    data, p, predict, start, y = ring
    plain = partial(nulled_label, predict)
    guided = classifier_guided(plain, data.classifier_gradient(p))
    ours = run(p, mix(guided, plain, 2.0), start, y=y)
    th.testing.assert_close(ours, run(p, mix(predict, plain, 2.0), start, y=y), rtol=0, atol=1e-8)


def nulled_label(predict, x, t, y):
    return predict(x, t, y=th.full_like(y, 3))


# ---------------------------------------------------------------------------------------------------------- scales


def test_a_scale_may_differ_by_sample_and_row(ring):
    _, p, predict, start, y = ring
    scales = th.tensor([1.0, 2.0, 4.0], dtype=F64).repeat(20)

    def free(scale):
        return run(p, classifier_free(predict, {"y": 3}, scale), start, y=y)

    mixed, single = free(scales), [free(s) for s in (1.0, 2.0, 4.0)]
    for k in range(60):
        assert th.equal(mixed[k], single[k % 3][k])
    assert th.equal(free(lambda t: scales), mixed)
    assert th.equal(free(lambda t: 2.0), single[1])
    noisy = free(lambda t: th.where(t >= 25, 3.0, 1.0))
    threshold = p.sqrt_recipm1_alphas_cumprod[24:26].mean().item()
    by_sigma = free(guidance.of_sigma(p, lambda sigma: 1 + 2 * (sigma > threshold)))
    assert th.equal(noisy, by_sigma) and not th.equal(noisy, free(3.0))


def test_an_interval_by_schedule_or_by_choice_of_predictor(ring):
    _, p, predict, start, y = ring
    calls = []

    def free(scale):
        return classifier_free(predict, {"y": 3}, scale)

    def counted(x, t, y):
        calls.append(int(t[0]))
        return free(3.0)(x, t, y=y)

    chosen = run(p, guidance.interval(counted, predict, 10, 30), start, y=y)
    assert calls == list(range(10, 31))[::-1]
    assert th.equal(run(p, free(guidance.within(3.0, 10, 30)), start, y=y), chosen)
    assert th.equal(run(p, free(guidance.within(lambda t: 3.0, 0, 49)), start, y=y), run(p, free(3.0), start, y=y))
    assert th.equal(run(p, free(guidance.within(3.0, 60, 70)), start, y=y), run(p, predict, start, y=y))


# ------------------------------------------------------------------------------------------------- rules of mixing


def two_predictions(p, n=5, channels=7):
    x, t = th.randn(n, channels, dtype=F64), th.arange(n) * 7 + 3
    return [read(p, ModelMeanType.START_X, SMALL, th.randn_like(x), None, x, t) for _ in range(2)], x, t


def assert_agree(p, pred, x, t):
    """x_0 and eps say the same thing."""
    by_eps = (x - p.at("sqrt_one_minus_alphas_cumprod", t, x) * pred.eps) / p.at("sqrt_alphas_cumprod", t, x)
    th.testing.assert_close(pred.x0, by_eps, rtol=1e-9, atol=1e-9)


def test_rescaling_brings_back_the_contrast():
    p = process()
    (a, b), x, t = two_predictions(p)
    linear = guidance.linear(a, b, 6.0, x, t)
    whole, half, none = (guidance.rescaled(p, share)(a, b, 6.0, x, t) for share in (1.0, 0.5, 0.0))
    th.testing.assert_close(whole.x0.std(1), a.x0.std(1), rtol=1e-12, atol=0)
    th.testing.assert_close(half.x0, (whole.x0 + linear.x0) / 2, rtol=1e-12, atol=1e-12)
    th.testing.assert_close(none.x0, linear.x0, rtol=1e-12, atol=0)
    assert (linear.x0.std(1) > 2 * a.x0.std(1)).all()
    for pred in (whole, half):
        assert_agree(p, pred, x, t)


def test_projected_guidance_leaves_out_what_is_along_the_prediction():
    p = process()
    (a, b), x, t = two_predictions(p)
    linear = guidance.linear(a, b, 6.0, x, t)
    th.testing.assert_close(guidance.projected(p, parallel=1.0)(a, b, 6.0, x, t).x0, linear.x0, rtol=1e-10, atol=1e-10)
    across = guidance.projected(p)(a, b, 6.0, x, t)
    push, whole = across.x0 - a.x0, linear.x0 - a.x0
    th.testing.assert_close((push * a.x0).sum(1), th.zeros(5, dtype=F64), rtol=0, atol=1e-12)
    rest = whole - push  # nothing is lost but what is parallel to a
    th.testing.assert_close((rest * a.x0).sum(1).abs(), rest.norm(dim=1) * a.x0.norm(dim=1), rtol=1e-10, atol=0)
    short = guidance.projected(p, parallel=1.0, max_norm=0.5)(a, b, 6.0, x, t)
    th.testing.assert_close((short.x0 - a.x0).norm(dim=1), th.full((5,), 2.5, dtype=F64), rtol=1e-10, atol=0)
    long = guidance.projected(p, parallel=1.0, max_norm=100.0)(a, b, 6.0, x, t)
    th.testing.assert_close(long.x0, linear.x0, rtol=1e-10, atol=1e-10)
    assert_agree(p, across, x, t)


def test_autoguidance_undoes_an_error_that_a_worse_predictor_makes_more_of(ring):
    """Errors d and 3 d in x_0: scale 3 / (3 - 1) is the exact predictor."""
    _, p, predict, start, y = ring

    def wrong(size):
        def worse(x, t, y):
            pred = predict(x, t, y)
            x0 = pred.x0 + size * 0.05 * (3 * x).cos()
            return read(p, ModelMeanType.START_X, SMALL, x0, None, x, t)

        return worse

    exact = run(p, predict, start, y=y)
    th.testing.assert_close(run(p, mix(wrong(1), wrong(3), 1.5), start, y=y), exact, rtol=0, atol=1e-9)
    assert (run(p, wrong(1), start, y=y) - exact).abs().max() > 0.01


def test_rules_of_mixing_where_nothing_is_to_mix():
    """An even x_0 has no contrast, and one of zero no direction: mixtures are finite, and plain where they must be."""
    p = Process(get_named_beta_schedule("cosine", 40))
    x, t = th.randn(3, 1, 4, 4, dtype=th.float64), th.tensor([3, 20, 39])

    def at(value):
        x0 = th.full_like(x, value)
        return Prediction(x0, eps_from_x0(p, x, t, x0), x0, x0)

    for rule in (guidance.rescaled(p), guidance.projected(p), guidance.projected(p, max_norm=1.0)):
        for a, b in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.5)):
            assert rule(at(a), at(b), 3.0, x, t).x0.isfinite().all()
    plain = guidance.linear(at(0.2), at(0.1), 3.0, x, t).x0
    th.testing.assert_close(guidance.rescaled(p)(at(0.2), at(0.1), 3.0, x, t).x0, plain)


@pytest.mark.parametrize("given, message", [
    (lambda x: None, "must be like x, .5, 2., not NoneType"),
    (lambda x: x[:1], "must be like x, .5, 2., not shape .1, 2."),
    (lambda x: x.sum(), "must be like x, .5, 2., not shape .."),
])  # fmt: skip
def test_a_gradient_of_another_kind_is_named(given, message):
    p = Process(get_named_beta_schedule("cosine", 40))
    guided = guidance.classifier_guided(toy.ring().predictor(p), lambda x, t: given(x))
    with pytest.raises(ValueError, match=message):
        guided(th.randn(5, 2, dtype=th.float64), th.full((5,), 3))


def test_dynamic_thresholding_clamps_at_the_quantile_and_rescales():
    x0 = th.stack([th.linspace(-4, 4, 101), th.linspace(-0.5, 0.5, 101)]).reshape(2, 1, 101)
    out = guidance.dynamic_threshold(0.9)(x0)
    s = np.quantile(x0[0].abs().numpy(), 0.9)
    th.testing.assert_close(out[0], x0[0].clamp(-s, s) / s)
    assert th.equal(out[1], x0[1])  # a sample inside the range is left alone
    p = process()
    (a, _), x, t = two_predictions(p)
    pred = clipped(lambda x, t: replace(a, x0=3 * a.x0), p, True, guidance.dynamic_threshold())(x, t)
    assert pred.x0.abs().max() <= 1
    assert_agree(p, pred, x, t)


# ------------------------------------------------------------------------------------------------ classifier gradients


@pytest.mark.parametrize("steps", [10, 100])
def test_the_gradient_at_the_mean_is_exact_where_that_at_x_t_is_not(steps):
    """
    p(y | x_0) proportional to exp(a x_0) shifts the mean of N(m, s^2) by a s^2. log p(y | x_{t-1}) is then linear, and
    an ancestral step with the true variance, shifted by variance x its gradient, is the true conditional step.
    """
    a, s, p = 1.3, 0.5, process(f"{steps}")
    predict = toy.Mixture(th.tensor([[0.3]], dtype=F64), s).predictor(p)

    def grad_fn(x, t):  # a times the slope of E[x_0 | x_t]
        abar = p.at("alphas_cumprod", t, x)
        return a * abar.sqrt() * s**2 / (abar * s**2 + 1 - abar)

    def shift(guided):
        x = th.zeros(1, 1, dtype=F64)
        ends = [run(p, each, x, sampling.ddpm, noise=th.zeros_like).item() for each in (predict, guided)]
        return ends[1] - ends[0]

    at_mean = shift(guidance.classifier_guided_at_mean(predict, grad_fn, p))
    at_x = shift(classifier_guided(predict, grad_fn))
    assert at_mean == pytest.approx(a * s**2, rel=0.002)  # the start and row 0 are not exact
    assert abs(at_x - a * s**2) > 5 * abs(at_mean - a * s**2)
    if steps == 10:
        assert at_x < 0.93 * at_mean


def test_every_kth_row_does_a_kth_of_the_work_at_k_times_the_scale(ring):
    data, _, _, start, y = ring
    p = process("200")
    exact = data.predictor(p, SMALL)
    calls = []

    def guided(scale):
        def grad_fn(x, t, y):
            calls.append(int(t[0]))
            return data.classifier_gradient(p, scale)(x, t, y)

        return classifier_guided(plain, grad_fn)

    def plain(x, t, y):
        return exact(x, t)

    whole = run(p, guided(1.0), start, y=y)
    assert len(calls) == 200
    assert th.equal(run(p, guidance.every(guided(1.0), plain, 1), start, y=y), whole)
    calls.clear()
    half = run(p, guidance.every(guided(2.0), plain, 2), start, y=y)
    assert calls == list(range(0, 200, 2))[::-1]
    nearest = data.labels[th.cdist(half, data.means).argmin(1)]
    assert (nearest == y).all() and (half - whole).norm(dim=1).median() < 0.02
    assert (run(p, plain, start, y=y) - whole).norm(dim=1).median() > 0.3


def two_by_three():
    """A mixture on a 2 x 3 grid: the first coordinate depends on i, the second on j, and they are independent."""
    i, j = th.arange(6) // 3, th.arange(6) % 3
    means = th.stack([i * 1.2 - 0.6, j * 0.8 - 0.8], 1).double()
    return [toy.Mixture(means, 0.1, labels=labels) for labels in (i, j, th.arange(6))]


def test_gradients_of_several_classifiers_add_up():
    """p(i, j | x_t) = p(i | x_t) p(j | x_t) here, so that two classifiers together are the conditional model."""
    first, second, both = two_by_three()
    p = process()
    start, y = th.randn(60, 2, dtype=F64, generator=th.Generator().manual_seed(0)), th.arange(60) % 6
    plain, conditional = both.predictor(p, SMALL), both.predictor(p, SMALL)

    def by(data, number):
        gradient = data.classifier_gradient(p)
        return lambda x, t, y: gradient(x, t, number(y))

    fns = by(first, lambda y: y // 3), by(second, lambda y: y % 3)
    wanted = run(p, conditional, start, y=y)

    def unlabelled(x, t, y):
        return plain(x, t)

    ours = run(p, classifier_guided(unlabelled, guidance.summed(*fns)), start, y=y)
    th.testing.assert_close(ours, wanted, rtol=0, atol=1e-8)
    nested = classifier_guided(classifier_guided(unlabelled, fns[0]), fns[1])
    th.testing.assert_close(run(p, nested, start, y=y), wanted, rtol=0, atol=1e-8)
    one = run(p, classifier_guided(unlabelled, fns[0]), start, y=y)
    assert ((one[:, 0] > 0) == (y // 3 > 0)).all() and (one - wanted).abs().max() > 0.3


def test_scaled_and_normalized_gradients(ring):
    data, p, _, _, y = ring
    x, t = at(p, 20, 60)
    fn, strength = data.classifier_gradient(p), th.arange(60.0, dtype=F64)
    grad = fn(x, t, y)
    assert th.equal(guidance.scaled(fn, 2.0)(x, t, y=y), 2 * grad)
    assert th.equal(guidance.scaled(fn, strength)(x, t, y=y), strength[:, None] * grad)
    assert th.equal(guidance.scaled(fn, lambda t: t / 10)(x, t, y=y), 2 * grad)
    unit = guidance.normalized(fn, 0.7)(x, t, y=y)
    th.testing.assert_close(unit, 0.7 * grad / grad.norm(dim=1, keepdim=True), rtol=1e-12, atol=0)
    flat = guidance.normalized(lambda x, t: th.zeros_like(x))(x, t)
    assert th.equal(flat, th.zeros_like(x))


@pytest.mark.parametrize("kind", ["at x_t", "at the mean", "measured"])
def test_a_gradient_that_is_no_number_names_its_row(ring, kind):
    data, p, _, start, _ = ring
    exact = data.predictor(p, SMALL)

    def broken(x, t, **cond):
        out = th.zeros_like(x)
        out[7] = th.where(t[7] == 33, math.nan, 0.0)
        return out

    predict = {
        "at x_t": classifier_guided(exact, broken),
        "at the mean": guidance.classifier_guided_at_mean(exact, lambda x, t: broken(x, t + 1), p),
        "measured": inverse.measured(exact, lambda x0, t: (x0 * broken(x0, t)).sum(1)),
    }[kind]
    walk, reached = sampling.sample(p, predict, sampling.ddpm, start), []
    with pytest.raises(ArithmeticError, match="row 33, for sample 7"):
        reached.extend(x for x, _ in walk)
    assert len(reached) == 49 - 33


# ---------------------------------------------------------------------------------------------------- conditions


def test_nulls_replace_labels_vectors_and_tokens():
    learned = th.randn(4, requires_grad=True)
    cond = {"y": th.arange(6), "vector": th.ones(6, 4), "tokens": th.ones(6, 3, 4), "low_res": th.ones(6, 1, 2, 2)}
    null = {"y": 9, "vector": learned, "tokens": 0.0}
    where = th.tensor([True, False, False, True, False, False])
    out = nulled(cond, null, where)
    assert out["y"].tolist() == [9, 1, 2, 9, 4, 5] and out["y"].dtype == th.int64
    assert th.equal(out["vector"][0], learned) and th.equal(out["vector"][1], th.ones(4))
    assert out["tokens"].sum((1, 2)).tolist() == [0, 12, 12, 0, 12, 12]
    assert out["low_res"] is cond["low_res"] and cond["y"].tolist() == list(range(6))
    out["vector"].sum().backward()
    assert learned.grad.tolist() == [2.0] * 4
    assert nulled(cond, null)["y"].tolist() == [9] * 6
    with pytest.raises(ValueError, match="condition text is missing"):
        nulled(cond, {"text": 0})


def test_labels_are_dropped_at_their_rate_and_by_the_generator_alone():
    y = th.arange(20000) % 10

    def drop(seed, rate=0.1):
        return guidance.dropped({"y": y}, np.random.default_rng(seed), {"y": 10}, rate)["y"]

    gone = drop(0) == 10
    assert gone.float().mean().item() == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 20000) ** 0.5)
    assert th.equal(drop(0)[~gone], y[~gone])
    for label in range(10):  # whatever the label
        assert gone[y == label].float().mean().item() == pytest.approx(0.1, abs=5 * (0.09 / 2000) ** 0.5)
    th.manual_seed(5)
    assert th.equal(drop(0), drop(0)) and not th.equal(drop(0), drop(1))
    assert th.equal(drop(0, 0.0), y)


class Watching(th.nn.Module):
    """A network on vectors that keeps the labels it saw, and whether it was training."""

    def __init__(self):
        super().__init__()
        th.manual_seed(0)
        self.body, self.seen = th.nn.Linear(4, 4), []

    def forward(self, x, t, y):
        self.seen.append((y.tolist(), self.training))
        return self.body(x) * (1 + y[:, None])


@pytest.mark.parametrize("microbatch", [-1, 3])
def test_the_training_step_decides_what_is_dropped(tmp_path, microbatch):
    """Not train/eval mode, not the microbatch, not a resume: (seed, step) alone. Validation drops nothing."""
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("linear", 40), model_mean_type=ModelMeanType.EPSILON,
                                  model_var_type=SMALL, loss_type=LossType.MSE)  # fmt: skip

    def batches():
        while True:
            yield th.ones(8, 4), {"y": th.arange(8) % 3}

    dropping = partial(guidance.dropped, null={"y": 3}, rate=0.4)

    def train(steps, drop=dropping, training=True, **options):
        net = Watching().train(training)
        with logger.scoped_configure(dir=str(tmp_path), format_strs=["csv"]):
            Trainer(DiffusionTask(net, diffusion), batches(), batch_size=8, lr=1e-2, iterations=steps, drop=drop,
                    microbatch=microbatch, **options).run_loop()  # fmt: skip
        labels = [label for part, _ in net.seen for label in part]
        return np.array(labels).reshape(-1, 8)

    seen = train(6)
    assert seen.shape == (6, 8) and len({tuple(row == 3) for row in seen}) > 3  # each step its own
    for step, row in enumerate(seen):
        rng = np.random.default_rng((0, 0, step))
        rng.integers(2**63)
        rng.choice(40, size=(8,), p=np.ones(40) / 40)
        assert (row == np.where(rng.random(8) < 0.4, 3, np.arange(8) % 3)).all()
    assert (train(6, training=False) == seen).all()
    train(3)
    assert (train(6, resume_checkpoint=str(tmp_path / "model000003.pt")) == seen[3:]).all()
    assert not (train(6, seed=1) == seen).all()
    assert (train(2, drop=None) == np.arange(8) % 3).all()
    validated = train(2, val_data=batches(), eval_interval=1)
    assert (validated[1] == np.arange(8) % 3).all() and (validated[0] == seen[0]).all()


def test_dropping_leaves_the_other_random_numbers_of_a_step_alone(tmp_path):
    """Timesteps and noise are those of a run without dropping, so that runs differ by the labels alone."""
    diffusion = GaussianDiffusion(betas=get_named_beta_schedule("linear", 40), model_mean_type=ModelMeanType.EPSILON,
                                  model_var_type=SMALL, loss_type=LossType.MSE)  # fmt: skip
    seen = []

    class Task(DiffusionTask):
        def loss(self, net, x0, cond, t, noise):
            seen.append((t, noise))
            return super().loss(net, x0, cond, t, noise)

    for drop in (None, partial(guidance.dropped, null={"y": 3}, rate=0.5)):
        with logger.scoped_configure(dir=str(tmp_path), format_strs=["csv"]):
            data = iter([(th.ones(8, 4), {"y": th.arange(8) % 3})])
            Trainer(Task(Watching(), diffusion), data, batch_size=8, iterations=1, drop=drop).run_loop()
    assert th.equal(seen[0][0], seen[1][0]) and th.equal(seen[0][1], seen[1][1])


# ------------------------------------------------------------------------------------------------------ end to end

NET = ("--image_size 8 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --class_cond True"
       " --num_classes 3 --attention_resolutions 4 --noise_schedule cosine --learn_sigma")  # fmt: skip
TRAIN = "--batch_size 12 --lr 1e-2 --log_interval 1 --random_flip False --num_workers 0 --ema_rate 0.9"
SAMPLE = "--num_samples 6 --batch_size 6 --timestep_respacing 6 --classes all --grid False"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with 24 images of three classes of brightness, and a model trained with dropped labels on them."""
    folder = tmp_path_factory.mktemp("home")
    y = np.arange(24) % 3
    noise = np.random.default_rng(0).integers(0, 40, (24, 8, 8, 1))
    np.savez(folder / "data.npz", arr_0=(y[:, None, None, None] * 100 + noise).astype(np.uint8), arr_1=y)
    done("image_train", f"--data_dir {folder}/data.npz {NET} {TRAIN} --iterations 40 --class_dropout 0.3"
         f" --log_dir {folder}/free")  # fmt: skip
    done("image_train", f"--data_dir {folder}/data.npz {NET} {TRAIN} --iterations 1 --log_dir {folder}/plain")
    return folder


def draw(home, folder, words="", run="free"):
    done("image_sample", f"--model_path {home}/{run}/{model(run)} {SAMPLE} {words} --log_dir {folder}")
    return samples(folder)[1].astype(int)


def model(run):
    return {"free": "model000040.pt", "plain": "model000001.pt"}[run]


def test_the_null_class_is_a_row_of_the_embedding_that_only_such_models_have(home):
    free, plain = (checkpoint.load(home / run / model(run)) for run in ("free", "plain"))
    assert free["label_emb.weight"].shape == (4, 128) and plain["label_emb.weight"].shape == (3, 128)
    assert {name: v.shape for name, v in free.items() if "label" not in name} == {
        name: v.shape for name, v in plain.items() if "label" not in name
    }
    flags = json.loads((home / "free" / "config.json").read_text())["flags"]
    assert (flags["class_dropout"], flags["num_classes"]) == (0.3, 3)
    th.manual_seed(0)  # as the program's --seed does before it builds the network
    fresh = create_model(**{name: flags[name] for name in flags if name in create_model.__code__.co_varnames})
    assert not th.equal(fresh.label_emb.weight[3], free["label_emb.weight"][3])  # the null was trained too


def test_guidance_changes_samples_and_scale_1_is_the_conditional_model(home, tmp_path):
    conditional = draw(home, tmp_path / "none")
    network, diffusion, _ = open_diffusion(home / "free" / model("free"), {"timestep_respacing": "6"})
    stream = generate.sample_stream(
        diffusion, network, shape=(1, 8, 8), num_samples=6, batch_size=6, labels=[0, 1, 2, 0, 1, 2], num_classes=3
    )
    assert (generate.collect(stream)[0] == conditional).all()
    assert (draw(home, tmp_path / "one", "--guidance_scale 1") == conditional).all()
    strong = draw(home, tmp_path / "three", "--guidance_scale 3")
    assert np.abs(strong - conditional).mean() > 2
    assert (draw(home, tmp_path / "again", "--guidance_scale 3") == strong).all()
    assert np.abs(draw(home, tmp_path / "two_calls", "--guidance_scale 3 --guidance_batched False") - strong).max() <= 1
    soft = draw(home, tmp_path / "soft", "--guidance_scale 3 --guidance_rescale 0.7")
    assert np.abs(soft - strong).mean() > 1
    # By DDIM, which has no variance to keep from the conditional prediction, scale 0 is the null class.
    unconditional = draw(home, tmp_path / "zero", "--guidance_scale 0 --use_ddim True")
    null = generate.sample_stream(
        diffusion, network, shape=(1, 8, 8), num_samples=6, batch_size=6, labels=[3] * 6, num_classes=3, use_ddim=True
    )
    assert np.abs(generate.collect(null)[0].astype(int) - unconditional).max() <= 1
    assert np.abs(unconditional - conditional).mean() > 2


def test_guidance_only_between_two_noise_levels(home, tmp_path):
    """At 6 of 1000 rows of the cosine schedule sigma is 0.01, .31, .71, 1.34, 3.0 and 20000."""
    words = "--guidance_scale 3 --guidance_interval"
    everywhere = draw(home, tmp_path / "three", "--guidance_scale 3")
    assert (draw(home, tmp_path / "wide", f"{words} 0,1e6") == everywhere).all()
    conditional = draw(home, tmp_path / "none")
    assert (draw(home, tmp_path / "between", f"{words} 0.4,0.5") == conditional).all()
    part = draw(home, tmp_path / "part", f"{words} 0.5,2")
    assert (part != everywhere).any() and (part != conditional).any()
    network, diffusion, _ = open_diffusion(home / "free" / model("free"), {"timestep_respacing": "6"})
    np.testing.assert_allclose(diffusion.sqrt_recipm1_alphas_cumprod[:5], [0.0064, 0.33, 0.73, 1.38, 3.1], rtol=0.05)

    def by_hand(predict):
        strong = classifier_free(predict, {"y": 3}, 3.0, batched=True)
        return lambda x, t, y: (strong if t[0] in (2, 3) else predict)(x, t, y=y)

    stream = generate.sample_stream(diffusion, network, shape=(1, 8, 8), num_samples=6, batch_size=6, guide=by_hand,
                                    labels=[0, 1, 2, 0, 1, 2], num_classes=3)  # fmt: skip
    assert (generate.collect(stream)[0] == part).all()


def test_a_worse_model_guides(home, tmp_path):
    """Away from the model after one update; a model that guides itself is itself."""
    conditional = draw(home, tmp_path / "none")
    itself = draw(home, tmp_path / "itself", f"--guidance_scale 3 --guide_path {home}/free/{model('free')}")
    assert np.abs(itself - conditional).max() <= 1
    auto = draw(home, tmp_path / "auto", f"--guidance_scale 1.5 --guide_path {home}/plain/{model('plain')}")
    nets = [open_diffusion(home / run / model(run), {"timestep_respacing": "6"}) for run in ("free", "plain")]
    worse = nets[1][1].predictor(nets[1][0], clip_denoised=False)
    stream = generate.sample_stream(nets[0][1], nets[0][0], shape=(1, 8, 8), num_samples=6, batch_size=6,
                                    guide=lambda predict: mix(predict, worse, 1.5), labels=[0, 1, 2, 0, 1, 2],
                                    num_classes=3)  # fmt: skip
    assert (generate.collect(stream)[0] == auto).all() and np.abs(auto - conditional).mean() > 1


def test_a_classifier_guides_what_was_mixed_and_clipped(home, tmp_path):
    """classifier_sample.py with both guidances, against the wrappers written out."""
    done("classifier_train", f"--data_dir {home}/data.npz --image_size 8 --image_channels 1 --num_classes 3"
         " --classifier_width 32 --classifier_depth 1 --classifier_channel_mult 1 --classifier_attention_resolutions 4"
         " --classifier_num_head_channels 16 --noise_schedule cosine --batch_size 12 --iterations 2 --num_workers 0"
         f" --log_dir {tmp_path}/classifier")  # fmt: skip
    path = tmp_path / "classifier" / "model000002.pt"
    words = f"--model_path {home}/free/{model('free')} --classifier_path {path} {SAMPLE} --guidance_scale 3"
    drawn = {}
    for scale in (0, 20):
        done("classifier_sample", f"{words} --classifier_scale {scale} --log_dir {tmp_path}/{scale}")
        drawn[scale] = samples(tmp_path / str(scale))[1].astype(int)
    assert (drawn[0] == draw(home, tmp_path / "three", "--guidance_scale 3")).all()

    network, diffusion, _ = open_diffusion(home / "free" / model("free"), {"timestep_respacing": "6"})
    gradient = guidance.classifier_gradient(open_classifier(path)[0], 20.0)
    predict = predictor(diffusion, network, diffusion.model_mean_type, diffusion.model_var_type)
    predict = clipped(classifier_free(predict, {"y": 3}, 3.0, batched=True), diffusion)
    predict = classifier_guided(predict, lambda x, t, y: gradient(x, diffusion.clock(t), y))
    noise = sampling.SeededNoise(0, range(6))
    y = noise.integers(3) * 0 + th.arange(6) % 3
    x = run(diffusion, predict, noise.normal(1, 8, 8), sampling.ddpm, noise=noise, y=y)
    assert (to_uint8(x).numpy() == drawn[20]).all() and np.abs(drawn[20] - drawn[0]).mean() > 0.5


def test_guidance_does_not_depend_on_the_batch(home, tmp_path):
    whole = draw(home, tmp_path / "whole", "--guidance_scale 2")
    parts = draw(home, tmp_path / "parts", "--guidance_scale 2 --batch_size 4")
    assert np.abs(whole - parts).max() <= 1


def test_training_with_dropout_is_reproducible_and_resumes(home, tmp_path):
    words = f"--data_dir {home}/data.npz {NET} {TRAIN} --class_dropout 0.3"
    done("image_train", f"{words} --iterations 4 --save_interval 2 --log_dir {tmp_path}/a")
    done("image_train", f"{words} --iterations 4 --log_dir {tmp_path}/b")
    # The rate comes from config.json with the rest of the network.
    (tmp_path / "c").mkdir()
    for name in ("config.json", "model000002.pt", "opt000002.pt", "ema_0.9_000002.pt"):
        shutil.copy(tmp_path / "a" / name, tmp_path / "c")
    done("image_train", f"--data_dir {home}/data.npz {TRAIN} --iterations 4 --log_dir {tmp_path}/c --resume_checkpoint"
         f" {tmp_path}/c/model000002.pt")  # fmt: skip
    weights = [checkpoint.load(tmp_path / run / "model000004.pt") for run in "abc"]
    for name, value in weights[0].items():
        assert th.equal(weights[1][name], value)
        th.testing.assert_close(weights[2][name], value, rtol=0, atol=1e-6)
    losses = [[row["loss"] for row in rows(tmp_path / run)] for run in "ab"]
    assert losses[0] == losses[1]


def test_a_model_without_config_tells_what_it_lacks(home, tmp_path):
    for run in ("free", "plain"):
        shutil.copy(home / run / model(run), tmp_path)
    words = f"{NET} {SAMPLE} --log_dir {tmp_path}"
    said = done("image_sample", f"--model_path {tmp_path}/{model('free')} {words} --guidance_scale 2").out
    assert "class_dropout 0.1" in said  # three classes were typed, and there are four rows of labels
    refused("image_sample", f"--model_path {tmp_path}/{model('plain')} {words} --class_dropout 0.1", "class_dropout",
            "contradicts the weights", r"class_dropout 0\.0")  # fmt: skip
    flags = {"image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1",
             "class_cond": True, "attention_resolutions": "4", "learn_sigma": True}  # fmt: skip
    # Any positive rate says that there is a null class; without one the last row is a class like the others.
    for more in ({"num_classes": 3, "class_dropout": 0.5}, {"num_classes": 4}):
        network, _, _ = open_diffusion(tmp_path / model("free"), flags | more)
        assert network.num_classes == 4
    with pytest.raises(ValueError, match=r"num_classes 7 contradicts .* num_classes 3"):
        open_diffusion(tmp_path / model("free"), flags | {"num_classes": 7, "class_dropout": 0.5})


@pytest.mark.parametrize("words, run, pattern", [
    ("--guidance_scale 3", "plain", "--guidance_scale 3.0: the model was trained without --class_dropout"),
    ("--guidance_scale 0", "plain", "cannot predict without a condition"),
    ("--guidance_scale 2 --guidance_rescale 1.5", "free", "share from 0 to 1, not 1.5"),
    ("--guidance_rescale 0.5", "free", "--guidance_rescale has no effect at --guidance_scale 1"),
    ("--guidance_scale 2 --guide_path other.pt --guidance_batched False", "free", "run in turn anyway: drop it"),
    ("--guide_path {free}", "free", "--guide_path has no effect at --guidance_scale 1"),
    ("--guidance_scale 2 --guide_path {free}x", "free", "no checkpoint .*did you mean"),
    ("--guidance_scale 2 --guide_path {small}", "free", "model has noise_schedule cosine and .* has linear"),
    ("--guidance_scale 2 --guidance_interval 5,1", "free", "cannot read the interval '5,1'"),
    ("--guidance_scale 2 --guidance_interval 1,2,3", "free", "two noise levels"),
    ("--guidance_scale nan", "free", "number expected"),
])  # fmt: skip
def test_guidance_that_cannot_be_is_refused(home, tmp_path, words, run, pattern):
    paths = {"free": home / "free" / model("free"), "small": tmp_path / "small" / model("plain")}
    if "small" in words:
        shutil.copytree(home / "plain", tmp_path / "small")
        content = json.loads((tmp_path / "small" / "config.json").read_text())
        content["flags"]["noise_schedule"] = "linear"
        (tmp_path / "small" / "config.json").write_text(json.dumps(content))
    words = f"--model_path {home}/{run}/{model(run)} {SAMPLE} {words.format(**paths)} --log_dir {tmp_path}"
    refused("image_sample", words, pattern)


@pytest.mark.parametrize("words, pattern", [
    ("--class_dropout 1", "from 0 to below 1, not 1.0"),
    ("--class_dropout -0.1", "from 0 to below 1, not -0.1"),
    ("--class_dropout 0.1 --class_cond False", "no labels to drop without --class_cond True"),
])  # fmt: skip
def test_dropout_that_cannot_be_is_refused(home, tmp_path, words, pattern):
    refused("image_train", f"--data_dir {home}/data.npz {NET} {TRAIN} {words} --log_dir {tmp_path}", pattern)
    flags = {"class_cond": True, "num_classes": 10, "vector_channels": 5}
    assert checks.nulls(flags | {"class_dropout": 0.0}) == {}
    assert checks.nulls(flags | {"class_dropout": 0.1}) == {"y": 10, "vector": 0.0}
    assert checks.nulls(flags | {"class_dropout": 0.1, "class_cond": False}) == {"vector": 0.0}


# ------------------------------------------------------------------------------------------------ inverse problems

PRIOR_MEAN, PRIOR_STD = th.tensor([0.2, -0.4], dtype=F64), 0.5
A, Y = th.tensor([[1.0, -0.6]], dtype=F64), th.tensor([0.8], dtype=F64)
AA = (A @ A.T).item()


def posterior(noise_std):
    """Mean [2] and covariance [2,2] of x_0 given Y = A x_0 + noise, by Bayes' rule for Gaussians."""
    precision = th.eye(2, dtype=F64) / PRIOR_STD**2 + A.T @ A / noise_std**2
    covariance = th.linalg.inv(precision)
    return covariance @ (PRIOR_MEAN / PRIOR_STD**2 + A.T @ Y / noise_std**2), covariance


def affine(p, predict):
    """The exact mean and covariance of DDIM's samples, which are affine in the start N(0, I)."""
    out = run(p, predict, th.cat([th.zeros(1, 2), th.eye(2)]).double())
    slopes = out[1:] - out[0]
    return out[0], slopes.T @ slopes


def measurement(p, std):
    likelihood = inverse.gaussian_measurement(lambda x0: x0 @ A.T, Y, std)
    return inverse.measured(toy.Mixture(PRIOR_MEAN[None], PRIOR_STD).predictor(p, SMALL), likelihood)


@pytest.mark.parametrize("noise_std", [0.1, 0.3])
def test_measurement_guidance_with_the_right_spread_samples_the_posterior(noise_std):
    wanted, spread = posterior(noise_std)
    errors = []
    for steps in ("250", "500"):
        p = process(steps, "cosine")
        mean, covariance = affine(p, measurement(p, inverse.spread_of(p, noise_std, PRIOR_STD, AA)))
        th.testing.assert_close(mean, wanted, rtol=0, atol=2e-5)
        errors.append((covariance - spread).abs().max().item())
    assert errors[1] < 0.002 and errors[0] / errors[1] == pytest.approx(2, abs=0.1)  # DDIM's error of first order


def test_with_the_noise_alone_guidance_misses_mean_and_spread():
    """What the measurement is told by an uncertain x_0 is uncertain too; without that, one number is believed early."""
    p = process("500", "cosine")
    mean, covariance = affine(p, measurement(p, 0.3))
    wanted, spread = posterior(0.3)
    assert (A @ (mean - wanted)).item() == pytest.approx(0.173, abs=0.001)
    assert (A @ covariance @ A.T / (A @ spread @ A.T)).item() == pytest.approx(0.107, abs=0.001)


def test_the_gradient_through_the_predictor_is_the_true_one():
    """log p(y | x_t) of Gaussian data and a linear measurement, differentiated by hand."""
    p = process()
    x, t = at(p, 25, 9)
    std = inverse.spread_of(p, 0.1, PRIOR_STD, AA)
    with th.no_grad():  # as the driver does
        pred = measurement(p, std)(x, t)
    abar = p.alphas_cumprod[25]
    gain = abar**0.5 * PRIOR_STD**2 / (abar * PRIOR_STD**2 + 1 - abar)
    x0 = PRIOR_MEAN + gain * (x - abar**0.5 * PRIOR_MEAN)
    variance = AA * (1 - abar) * PRIOR_STD**2 / (abar * PRIOR_STD**2 + 1 - abar) + 0.1**2
    th.testing.assert_close(pred.grad, gain * (Y - x0 @ A.T) @ A / variance, rtol=1e-6, atol=0)
    th.testing.assert_close(pred.x0, x0, rtol=1e-12, atol=0)
    assert not pred.x0.requires_grad and not pred.grad.requires_grad


def test_resampling_makes_the_painted_part_agree_with_the_known_one():
    """
    Two equal blobs at (0.6, 0.6) and (-0.6, -0.6): given the first coordinate, 0.6, the second is in the first blob.
    Replacement alone paints some samples in the wrong one; walking again and again brings them over.
    """
    data = toy.Mixture(th.tensor([[0.6, 0.6], [-0.6, -0.6]], dtype=F64), 0.15)
    p = process("40", "cosine")
    known, mask = th.tensor([[0.6, 0.0]], dtype=F64), th.tensor([[1.0, 0.0]], dtype=F64)
    right = []
    for times in (1, 10):
        th.manual_seed(0)
        start = th.randn(400, 2, dtype=F64)
        walk = list(inverse.repaint(p, data.predictor(p), sampling.ddpm, start, known, mask, jump=5, times=times))
        x, _ = walk[-1]
        assert len(walk) == 40 * times and th.equal(x[:, 0], known[:, 0].expand(400))
        right.append((x[:, 1] > 0).double().mean().item())
    assert right[0] < 0.97 and right[1] > 0.99
    painted = x[x[:, 1] > 0, 1]
    assert painted.mean().item() == pytest.approx(0.6, abs=4 * 0.15 / 400**0.5 + 0.01)
    assert painted.std().item() == pytest.approx(0.15, abs=0.02)


def test_repainting_noises_back_to_the_level_of_the_row():
    """With nothing known and data N(m, s^2), going back and forth leaves the distribution as it is at every row."""
    data = toy.Mixture(th.tensor([[0.3]], dtype=F64), 0.5)
    p = process("6", "cosine")
    th.manual_seed(0)
    start = th.randn(40000, 1, dtype=F64)
    order = [5, 4, 5, 4, 5, 4, 3, 2, 3, 2, 3, 2, 1, 0, 1, 0, 1, 0]
    walk = inverse.repaint(p, data.predictor(p), sampling.ddpm, start, start, th.zeros(1, 1), jump=2, times=3)
    for row, (x, _) in zip(order, walk, strict=True):
        abar = p.alphas_cumprod_prev[row]
        if row:  # at row 0 the mean is returned, without noise
            assert x.mean().item() == pytest.approx(abar**0.5 * 0.3, abs=0.02)
            assert x.var().item() == pytest.approx(abar * 0.25 + 1 - abar, rel=0.04)
    with pytest.raises(ValueError, match="1 row or more once or more, not 0 rows 3 times"):
        next(inverse.repaint(p, None, None, start, start, 0, jump=0, times=3))
