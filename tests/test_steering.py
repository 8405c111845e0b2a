"""A classifier's guidance from the command line, its joint and conditional scales, and what it costs on a GPU."""

import math

import pytest
import torch as th
from test_guidance import F64, SMALL, at, run

from guided_diffusion import guidance, prediction, sampling, toy
from guided_diffusion.guidance import classifier_gradient, classifier_guided
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.respace import space_timesteps


def process(respacing="50"):
    return Process(get_named_beta_schedule("linear", 1000)).spaced(space_timesteps(1000, respacing))


# ------------------------------------------------------------------------------------------- joint and marginal scales


def joint_logits(data, p, classes=3):
    """A classifier whose logits are log p(x_t, y)."""
    return lambda x, t: th.stack([data.log_density(p, x, t, th.full((len(x),), y)) for y in range(classes)], 1)


def mixed_score(p, data, x, t, y, cond, free):
    """eps for the score `cond` x that of p(x_t | y) plus `free` x that of p(x_t), taken from the exact denoiser."""
    predict = data.predictor(p, SMALL)
    return guidance._spread(cond, x) * predict(x, t, y=y).eps + guidance._spread(free, x) * predict(x, t).eps


def ones(value, n=60):
    return th.full((n,), value, dtype=F64)


@pytest.mark.parametrize("scale, marginal", [(1.0, 1.0), (1.0, 0.0), (2.5, 0.4), (0.0, 1.0), (3.0, 1.0)])
def test_exact_joint_logits_weigh_the_joint_and_the_marginal_score(scale, marginal):
    """
    With logits log p(x_t, y) the guided score is (1 - s m) score(x_t) + s score(x_t | y): for m = 1 that is
    classifier-free guidance of scale s, for m = 0 and s = 1 the sum of both scores.
    """
    data, p, y = toy.ring(), process(), th.arange(60) % 3
    for row in (3, 20, 45):
        x, t = at(p, row, 60)
        gradient = classifier_gradient(joint_logits(data, p), scale, marginal)
        guided = classifier_guided(lambda x, t, y: data.predictor(p, SMALL)(x, t), gradient)
        eps = sampling.guided_score(p, x, t, guided(x, t, y=y)).eps
        wanted = mixed_score(p, data, x, t, y, ones(scale), ones(1 - scale * marginal))
        th.testing.assert_close(eps, wanted, rtol=0, atol=1e-10)


def test_joint_and_marginal_scales_may_differ_by_sample_and_row():
    data, p, y = toy.ring(), process(), th.arange(60) % 3
    x, t = at(p, 20, 60)
    scale, marginal = th.linspace(0.5, 3, 60, dtype=F64), th.linspace(-1, 1, 60, dtype=F64)
    for how in ((scale, marginal), (lambda t: scale * t / 20, lambda t: marginal * t / 20)):
        gradient = classifier_gradient(joint_logits(data, p), *how)(x, t, y)
        for k in (0, 7, 59):
            alone = classifier_gradient(joint_logits(data, p), scale[k].item(), marginal[k].item())
            one = alone(x[k : k + 1], t[k : k + 1], y[k : k + 1])
            th.testing.assert_close(gradient[k : k + 1], one, rtol=1e-12, atol=1e-12)


def test_a_classifier_in_float64_is_not_rounded():
    data, p, y = toy.ring(), process(), th.arange(60) % 3
    x, t = at(p, 20, 60)
    ours, exact = classifier_gradient(joint_logits(data, p))(x, t, y), data.classifier_gradient(p)(x, t, y)
    th.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)
    half = classifier_gradient(lambda x, t: (x * 3).bfloat16())(x.float(), t, y % 2)
    assert half.dtype == th.float32 and half.isfinite().all()


def test_a_ramp_goes_in_even_steps_from_noise_to_data():
    p = process()
    ramp, t = guidance.ramp(p, 4.0, 1.0), th.arange(50)
    th.testing.assert_close(ramp(t), 1 + 3 * t / 49)
    assert ramp(t)[[49, 0]].tolist() == [4, 1]
    assert th.equal(guidance.ramp(p, 0.7, 0.7)(t), th.full((50,), 0.7))
    single = Process(get_named_beta_schedule("linear", 1000)).spaced([999])
    assert guidance.ramp(single, 4.0, 1.0)(th.tensor([0])).tolist() == [4]


# ---------------------------------------------------------------------------------------------------- waiting for a GPU

ELSEWHERE = th.device("meta")  # a device that cannot be waited for: any look at a value is an error


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun", "dpmpp_2m", "dpm_3", "edm"])
def test_a_guided_step_does_not_wait_for_the_device(name):
    p = process("12")
    rule, rows = sampling.plan(p, name)

    def predict(x, t):
        return prediction.read(p, prediction.ModelMeanType.EPSILON, SMALL, x.tanh(), None, x, t)

    def classifier(x, t):
        assert x.device == t.device == ELSEWHERE
        return x[:, :3]

    gradient = classifier_gradient(classifier, guidance.ramp(p, 1.0, 3.0), 0.5)
    label = th.zeros(4, dtype=th.int64, device=ELSEWHERE)

    def guided(x, t):
        return classifier_guided(lambda x, t, y: predict(x, t), guidance.normalized(gradient))(x, t, y=label)

    guided = guidance.interval(guidance.every(guided, predict, 3), predict, 3, 9)
    walk = sampling.sample(p.spaced(rows), guided, rule, th.zeros(4, 5, device=ELSEWHERE))
    steps = 0
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # one look, when all steps are done
        for x, _ in walk:
            assert x.device == ELSEWHERE
            steps += 1
    assert steps == {"dpm_3": 5, "edm": 7}.get(name, 12)


@pytest.mark.parametrize("sampler", [sampling.ddpm, sampling.ddim, sampling.heun])
def test_on_a_gpu_a_gradient_that_is_no_number_is_named_when_the_walk_ends(monkeypatch, sampler):
    """The device is made to look far away; the first bad row is told, not one that follows from it."""
    monkeypatch.setattr(prediction, "_at_hand", lambda tensor: False)
    p = process()
    predict = toy.ring().predictor(p, SMALL)
    looks = []
    monkeypatch.setattr(sampling, "settle", lambda doubts: (looks.append(len(doubts)), prediction.settle(doubts)))

    def broken(x, t):
        out = x * 0  # what is no number stays so
        out[7] = th.where(t[7] == 33, math.nan, out[7])
        return out

    walk = sampling.sample(p, classifier_guided(predict, broken), sampler, th.zeros(9, 2, dtype=F64))
    with pytest.raises(ArithmeticError, match="row 33, for sample 7"):
        for steps, _ in enumerate(walk, 1):  # noqa: B007
            pass
    assert steps == 50 and looks == [{sampling.heun: 99}.get(sampler, 50)]


def test_rows_from_elsewhere_are_looked_at():
    """Who calls a predictor alone, without the driver, gets the error and the right branch all the same."""
    p = process()
    predict = toy.ring().predictor(p, SMALL)
    x = th.zeros(3, 2, dtype=F64)
    guided = guidance.at_rows(lambda x, t: "guided", lambda x, t: "plain", lambda row: row == 7)
    assert [guided(x, th.full((3,), row)) for row in (7, 8)] == ["guided", "plain"]
    assert [guided(x, prediction.rows_at(row, 3, "cpu")) for row in (7, 8)] == ["guided", "plain"]
    with pytest.raises(ArithmeticError, match="row 8, for sample 0"):
        classifier_guided(predict, lambda x, t: x / 0)(x, th.full((3,), 8))


def test_the_row_that_the_host_knows_is_the_one_in_the_tensor():
    """For each rule, at each evaluation, also those between and ahead."""
    p = process("20")
    predict = toy.ring().predictor(p, SMALL)
    for name, sampler in sampling.SAMPLERS.items():
        rule, _ = sampling.plan(p, name)
        seen = []

        def watched(x, t):
            seen.append((t.row, t.tolist()))  # noqa: B023
            return predict(x, t)

        run(p, watched, th.zeros(2, 2, dtype=F64), rule)
        assert seen and all(row == a == b for row, (a, b) in seen), name
        if not sampler.stochastic:
            list(sampling.sample(p, watched, rule, th.zeros(2, 2, dtype=F64), rows=range(19), upward=True))
            assert all(row == a == b for row, (a, b) in seen), name
