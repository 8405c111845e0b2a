"""A classifier's guidance from the command line, its joint and conditional scales, and what it costs on a GPU."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from test_guidance import F64, SMALL, at, run
from test_programs import done, edited, refused, samples

from guided_diffusion import checks, config, generate, guidance, prediction, program, sampling, toy
from guided_diffusion.guidance import classifier_gradient, classifier_guided
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.respace import space_timesteps
from guided_diffusion.sampling_options import ClassifierSampleOptions
from guided_diffusion.script_util import create_gaussian_diffusion, open_classifier, open_diffusion


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


@pytest.mark.parametrize("words", [
    ["--use_ddim", "True"], ["--sampler", "ddpm"], ["--sampler", "dpmpp_2m"], ["--sampler", "ddim"],
    ["--sampler", "ddim", "--clip_denoised", "False"],
])  # fmt: skip
def test_named_samplers_keep_guided_images_in_range(words):
    """
    On the last row of the cosine schedule 1 / sqrt(abar) is 2.0e4, so that the gradient 1e-3, where the exact denoiser
    says x_0 = 0, asks for x_0 = 20 with eps = -1e-3; clipped, x_0 is 1 and eps = -sqrt(abar) / sqrt(1 - abar). On the
    row in the middle, sigma = 1, nothing is clipped: x_0 = sigma^2 / sqrt(1 + sigma^2) grad = grad / sqrt(2) = .0007.
    """
    p = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    args = config.parse("", ClassifierSampleOptions, argv=words)
    steer = program.steer_of(args, p, lambda x, t, y=None: th.full_like(x, 1e-3))

    def predict(x, t):
        return prediction.Prediction(th.zeros_like(x), th.zeros_like(x), th.ones_like(x), th.zeros_like(x))

    x = th.zeros(2, 1, 2, 2, dtype=F64)
    top = 999
    abar = p.alphas_cumprod[top]
    assert 1.9e4 < 1 / math.sqrt(abar) < 2.2e4
    pred = steer(predict)(x, th.full((2,), top))
    if words[-1] in ("dpmpp_2m", "ddim"):
        assert pred.grad is None
        th.testing.assert_close(pred.x0, th.ones_like(x))
        th.testing.assert_close(pred.eps, th.full_like(x, -math.sqrt(abar / (1 - abar))))
    else:
        th.testing.assert_close(pred.grad, th.full_like(x, 1e-3))
        unclipped = sampling.guided_score(p, x, th.full((2,), top), pred).x0
        th.testing.assert_close(unclipped, th.full_like(x, 1e-3 * (1 - abar) / math.sqrt(abar)))
    row = int(np.abs(p.sqrt_recipm1_alphas_cumprod - 1).argmin())
    t = th.full((2,), row)
    below = sampling.guided_score(p, x, t, steer(predict)(x, t)).x0
    th.testing.assert_close(below, th.full_like(x, 1e-3 / math.sqrt(2)), rtol=0.01, atol=0)


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


# ------------------------------------------------------------------------------------------------- the command line

NET = ("--image_size 8 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --num_classes 3"
       " --attention_resolutions 4 --noise_schedule cosine")  # fmt: skip
CLASSIFIER = ("--image_size 8 --image_channels 1 --num_classes 3 --classifier_width 32 --classifier_depth 1"
              " --classifier_channel_mult 1 --classifier_attention_resolutions 4 --classifier_num_head_channels 16"
              " --noise_schedule cosine")  # fmt: skip
TRAIN = "--batch_size 12 --lr 1e-2 --log_interval 1 --random_flip False --num_workers 0"
SAMPLE = "--num_samples 6 --batch_size 6 --classes all --grid False"
SIGMAS = [0.0064, 0.33, 0.73, 1.38, 3.1, 20000]  # of 6 rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three classes of brightness; a model that knows a null class, another worse one; two classifiers."""
    folder = tmp_path_factory.mktemp("home")
    y = np.arange(24) % 3
    noise = np.random.default_rng(0).integers(0, 40, (24, 8, 8, 1))
    np.savez(folder / "data.npz", arr_0=(y[:, None, None, None] * 100 + noise).astype(np.uint8), arr_1=y)
    words = f"--data_dir {folder}/data.npz {TRAIN}"
    for name, steps in (("free", 30), ("worse", 1)):
        done("image_train", f"{words} {NET} --class_cond True --class_dropout 0.3 --ema_rate 0.9 --iterations {steps}"
             f" --log_dir {folder}/{name}")  # fmt: skip
    for name, seed in (("a", 0), ("b", 1)):
        done("classifier_train", f"{words} {CLASSIFIER} --iterations 6 --seed {seed} --log_dir {folder}/{name}")
    return folder


def path(home, name):
    return home / name / {"free": "model000030.pt", "worse": "model000001.pt"}.get(name, "model000006.pt")


@pytest.fixture
def steer(home, tmp_path):
    """classifier_sample.py: int [6,8,8,1] of the words; by classifier a unless they say otherwise."""
    def draw(words="", classifier="{a}"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        classifier = classifier.format(**{name: path(home, name) for name in "ab"})
        respacing = "" if "--steps" in words else "--timestep_respacing 6"
        done("classifier_sample", f"--model_path {path(home, 'free')} --classifier_path {classifier} {SAMPLE}"
             f" {respacing} {words} --log_dir {tmp_path}/out")  # fmt: skip
        return samples(tmp_path / "out")[1].astype(int)

    return draw


def by_hand(home, rule, gradient):
    """Samples of the same seed with a gradient `(x, row, y, classifiers, mean, x_0) -> like x` of the prediction."""
    network, diffusion, _ = open_diffusion(path(home, "free"), {"timestep_respacing": "6"})
    nets = [open_classifier(path(home, name))[0] for name in "ab"]

    def slope(net, x, row, y, marginal=1.0):
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            logits = net(x, th.full((6,), diffusion.timestep_map[row]))
            value = logits.gather(1, y[:, None]).sum() - marginal * logits.logsumexp(1).sum()
            return th.autograd.grad(value, x)[0]

    plain = diffusion.predictor(network)

    def guided(x, t, y):
        pred = plain(x, t, y=y)
        mean = diffusion.q_posterior_mean_variance(pred.x0, x, t)[0]
        return replace(pred, grad=gradient(x, int(t[0]), y, nets, mean, slope))

    noise = sampling.SeededNoise(0, range(6))
    y = noise.integers(3) * 0 + th.arange(6) % 3
    x = run(diffusion, guided, noise.normal(1, 8, 8), rule, noise=noise, y=y)
    return generate.pictures.to_uint8(x).numpy().astype(int)


@pytest.mark.parametrize("walk", ["", "--use_ddim True", "--sampler dpmpp_2m"])
def test_flags_that_change_nothing_change_nothing(steer, walk):
    """Every second, wide, constant or unit setting is the plain guidance, bit for bit; no interval is scale 0."""
    plain = steer(f"{walk} --classifier_scale 20")
    words = ("--classifier_every 1 --classifier_interval 0,1e6 --classifier_scale_end 20 --classifier_marginal 1"
             " --guidance_at x_t")  # fmt: skip
    assert (steer(f"{walk} --classifier_scale 20 {words}") == plain).all()
    none = steer(f"{walk} --classifier_scale 0")
    assert (steer(f"{walk} --classifier_scale 20 --classifier_interval 0.4,0.5") == none).all()
    assert np.abs(plain - none).mean() > 0.5


def test_two_equal_classifiers_are_one_of_double_scale(steer, home):
    twice = steer("--classifier_scale 10", "{a},{a}")
    assert (twice == steer("--classifier_scale 20")).all()
    both = steer("--classifier_scale 10", "{a},{b}")
    known = by_hand(home, sampling.ddpm, lambda x, row, y, nets, mean, slope: 10 * sum(slope(net, x, row, y)
                                                                                       for net in nets))  # fmt: skip
    assert np.abs(both - known).max() <= 1 and np.abs(both - twice).mean() > 0.1


def unit(gradient):
    return gradient / gradient.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


GRADIENTS = {
    "--classifier_scale 20 --classifier_every 2":
        lambda x, row, y, nets, mean, slope: 20 * slope(nets[0], x, row, y) if row in (0, 2, 4) else 0 * x,
    "--classifier_scale 20 --classifier_interval 0.3,2":
        lambda x, row, y, nets, mean, slope: 20 * slope(nets[0], x, row, y) if row in (1, 2, 3) else 0 * x,
    "--classifier_scale 20 --classifier_marginal 0.25":
        lambda x, row, y, nets, mean, slope: 20 * slope(nets[0], x, row, y, 0.25),
    "--classifier_scale 2 --classifier_normalize 3":
        lambda x, row, y, nets, mean, slope: 6 * unit(slope(nets[0], x, row, y)),
    "--classifier_scale 40 --classifier_scale_end 10":
        lambda x, row, y, nets, mean, slope: (10 + 6 * row) * slope(nets[0], x, row, y),
    "--classifier_scale 0 --classifier_scale_end 60 --classifier_every 2 --classifier_interval 0.2,1":  # 36 at row 2
        lambda x, row, y, nets, mean, slope: 36 * slope(nets[0], x, row, y) if row == 2 else 0 * x,
}  # fmt: skip


@pytest.mark.parametrize("words", GRADIENTS)
@pytest.mark.parametrize("walk", ["", "--use_ddim True"])
def test_flags_of_the_gradient_against_the_gradient_written_out(steer, home, words, walk):
    rule = sampling.ddim if walk else sampling.ddpm
    drawn = steer(f"{walk} {words}")
    assert np.abs(drawn - by_hand(home, rule, GRADIENTS[words])).max() <= 1
    assert np.abs(drawn - steer(f"{walk} --classifier_scale 0")).max() > 3


def test_guidance_at_the_mean(steer, home):
    def gradient(x, row, y, nets, mean, slope):
        return 20 * slope(nets[0], mean, max(row - 1, 0), y)

    drawn = steer("--classifier_scale 20 --guidance_at mean")
    assert np.abs(drawn - by_hand(home, sampling.ddpm, gradient)).max() <= 1
    assert np.abs(drawn - steer("--classifier_scale 20")).mean() > 0.1


@pytest.mark.parametrize("words, pattern", [
    ("--guidance_at mean --use_ddim True", "ddim takes its step from the score .*--sampler ddpm"),
    ("--guidance_at mean --sampler dpmpp_2m_sde", "dpmpp_2m_sde takes its step from the score"),
    ("--guidance_at middle", "invalid choice: 'middle' .*x_t.*mean"),
    ("--classifier_every 0", "--classifier_every must be 1 or more, not 0"),
    ("--classifier_every 2 --sampler heun", "--classifier_every 2: heun compares .*ddpm, ddim, dpm_1"),
    ("--classifier_interval 2,1", "cannot read the interval '2,1'"),
    ("--classifier_normalize -1", "--classifier_normalize must be 0 or more, not -1"),
    ("--classifier_marginal -0.5", "--classifier_marginal must be 0 or more, not -0.5"),
    ("--classifier_scale_end more", "--classifier_scale_end: number expected, got 'more'"),
    ("--classifier_scale_end nan", "--classifier_scale_end: number expected, got 'nan'"),
    ("--classifier_scale 0 --classifier_every 2", "--classifier_every has no effect at --classifier_scale 0"),
    ("--classifier_scale 0 --classifier_normalize 2", "--classifier_normalize has no effect at --classifier_scale 0"),
    ("--classifier_path {a},{other}", "other.* tells 3 classes .*'x', 'y', 'z'.*the one before it 3 .*'0', '1', '2'"),
    ("--classifier_path {a},{linear}", "noise_schedule cosine and the classifier noise_schedule linear .*linear/mod"),
    ("--classifier_path {a},", "no checkpoint given"),
    ("--dynamic_threshold 1.5", "--dynamic_threshold is a share from 0 to 1, not 1.5"),
    ("--guidance_projected -1 --guidance_scale 2", "--guidance_projected is a share from 0 to 1, not -1"),
    ("--guidance_projected 0", "--guidance_projected has no effect at --guidance_scale 1"),
    ("--guidance_projected 0 --guidance_rescale 0.5 --guidance_scale 2", "two rules for the same thing"),
])  # fmt: skip
def test_steering_that_cannot_be_is_refused(home, tmp_path, words, pattern):
    model = home / "free"
    paths = {"a": path(home, "a")}
    for name, flags in (("other", {"class_names": ["x", "y", "z"]}), ("linear", {"noise_schedule": "linear"})):
        if name in words:
            paths[name] = edited(home / "a", tmp_path / name, **flags) / "model000006.pt"
            model = edited(home / "free", tmp_path / "model", class_names=None)
    words = words.format(**paths)
    words = words if "--classifier_path" in words else f"--classifier_path {path(home, 'a')} {words}"
    refused("classifier_sample", f"--model_path {model}/model000030.pt {SAMPLE} {words} --log_dir {tmp_path}", pattern)


# ------------------------------------------------------------------------------------- guidance of the model by itself


def draw(home, folder, words):
    done("image_sample", f"--model_path {path(home, 'free')} {SAMPLE} {words} --log_dir {folder}")
    return samples(folder)[1].astype(int)


@pytest.mark.parametrize("words", [
    "--guidance_scale 3", "--guidance_scale 3 --guidance_interval 0.5,2", "--guidance_scale 3 --guidance_rescale 0.7",
    "--guidance_scale 3 --guidance_projected 0", "--guidance_scale 2 --guide_path {worse}",
])  # fmt: skip
def test_guidance_knows_the_rows_that_a_sampler_keeps(home, tmp_path, words):
    """--steps of a sampler or the original's respacing: the same rows, so the same samples."""
    words = words.format(worse=path(home, "worse"))
    respaced = draw(home, tmp_path / "a", f"{words} --timestep_respacing 6 --sampler ddim")
    kept = draw(home, tmp_path / "b", f"{words} --sampler ddim --steps 6 --spacing uniform")
    assert (respaced == kept).all()
    assert np.abs(kept - draw(home, tmp_path / "c", "--timestep_respacing 6 --sampler ddim")).mean() > 0.5


def test_a_classifier_guides_at_the_rows_that_a_sampler_keeps(steer):
    words = "--classifier_scale 20 --classifier_scale_end 5 --classifier_interval 0.5,2 --sampler ddim"
    assert (steer(words) == steer(f"{words} --steps 6 --spacing uniform")).all()


@pytest.mark.parametrize("words, how", [
    ("--guidance_scale 4 --guidance_projected 0.3", {"projected": 0.3}),
    ("--guidance_scale 4 --guidance_rescale 0.4", {"rescaled": 0.4}),
    ("--guidance_scale 4 --dynamic_threshold 0.8", {"quantile": 0.8}),
    ("--guidance_scale 4 --dynamic_threshold 0.8 --clip_denoised False", {"quantile": 0.8, "clip": False}),
    ("--guidance_scale 4 --clip_denoised False", {"clip": False}),
])  # fmt: skip
def test_projection_and_threshold_against_the_wrappers_written_out(home, tmp_path, words, how):
    drawn = draw(home, tmp_path / "out", f"{words} --timestep_respacing 6 --use_ddim True")
    network, diffusion, _ = open_diffusion(path(home, "free"), {"timestep_respacing": "6"})
    rules = {name: getattr(guidance, name)(diffusion, how[name]) for name in ("projected", "rescaled") if name in how}
    rule = next(iter(rules.values()), guidance.linear)
    predict = prediction.predictor(diffusion, network, diffusion.model_mean_type, diffusion.model_var_type)
    predict = guidance.classifier_free(predict, {"y": 3}, 4.0, rule, batched=True)
    fn = guidance.dynamic_threshold(how["quantile"]) if "quantile" in how else None
    predict = prediction.clipped(predict, diffusion, how.get("clip", True), fn)
    noise = sampling.SeededNoise(0, range(6))
    y = noise.integers(3) * 0 + th.arange(6) % 3
    x = run(diffusion, predict, noise.normal(1, 8, 8), y=y)
    assert (generate.pictures.to_uint8(x).numpy() == drawn).all()
    assert np.abs(drawn - draw(home, tmp_path / "plain", "--guidance_scale 4 --timestep_respacing 6 --use_ddim True"
                               )).max() > 1  # fmt: skip


def test_the_largest_quantile_leaves_data_in_range_alone():
    """At quantile 1 nothing is clipped: in range all stays to the last bit, beyond it the whole image shrinks."""
    diffusion = create_gaussian_diffusion(predict_xstart=True, timestep_respacing="8")
    draws = {}
    for size in (0.9, 3.0):
        for fn in (None, guidance.dynamic_threshold(1.0)):
            stream = generate.sample_stream(diffusion, lambda x, t: size * x.tanh(), shape=(1, 4, 4), num_samples=5,  # noqa: B023
                                            batch_size=5, denoised_fn=fn)  # fmt: skip
            draws[size, fn is None] = next(stream)[1]
    assert th.equal(draws[0.9, True], draws[0.9, False]) and draws[0.9, True].abs().max() < 1
    largest = draws[3.0, False].abs().flatten(1).max(1).values
    th.testing.assert_close(largest, th.ones(5), rtol=0, atol=1e-6)
    assert (draws[3.0, True].abs() == 1).float().mean() > 2 * (draws[3.0, False].abs() > 0.999999).float().mean()


def test_defaults_are_those_of_the_plain_guidance():
    args = config.parse("", ClassifierSampleOptions, argv=[])
    assert checks.check_classifier_guidance(args) == (1, 1)
    args.classifier_scale_end = "0"
    assert checks.check_classifier_guidance(args) == (1, 0)


# ------------------------------------------------------------------------------------------- the process's own options


def test_the_small_variance_can_be_had(home, tmp_path):
    """Typed, or from config.json: ancestral steps with the posterior's variance, and DDIM does not care."""
    words = "--timestep_respacing 6"
    small = draw(home, tmp_path / "small", f"{words} --sigma_small True")
    large = draw(home, tmp_path / "large", words)
    assert (draw(home, tmp_path / "false", f"{words} --sigma_small False") == large).all()
    assert np.abs(small - large).mean() > 1
    network, diffusion, _ = open_diffusion(path(home, "free"), {"timestep_respacing": "6"})
    predict = prediction.clipped(prediction.predictor(diffusion, network, diffusion.model_mean_type, SMALL), diffusion)
    noise = sampling.SeededNoise(0, range(6))
    y = noise.integers(3) * 0 + th.arange(6) % 3
    x = run(diffusion, predict, noise.normal(1, 8, 8), sampling.ddpm, noise=noise, y=y)
    assert (generate.pictures.to_uint8(x).numpy() == small).all()
    told = edited(home / "free", tmp_path / "told", sigma_small=True, class_names=None) / "model000030.pt"
    done("image_sample", f"--model_path {told} {SAMPLE} {words} --log_dir {tmp_path}/by_config")
    assert (samples(tmp_path / "by_config")[1] == small).all()
    ddim = [draw(home, tmp_path / f"ddim{value}", f"{words} --use_ddim True --sigma_small {value}") for value in (0, 1)]
    assert (ddim[0] == ddim[1]).all()


def test_a_learned_variance_leaves_no_choice(home, tmp_path):
    words = f"--data_dir {home}/data.npz {TRAIN} {NET} --learn_sigma True --iterations 1"
    refused("image_train", f"{words} --sigma_small True --log_dir {tmp_path}/a", "has a variance of its own .*drop the")
    done("image_train", f"{words} --log_dir {tmp_path}/b")
    refused("image_sample", f"--model_path {tmp_path}/b/model000001.pt --num_samples 2 --sigma_small True --log_dir"
            f" {tmp_path}/c", "--sigma_small True: the model has a variance of its own")  # fmt: skip


def test_edms_noise_levels_in_training(home, tmp_path):
    """Half the rows drawn have ln sigma below -1.2, and the loss is logged as it is, unweighted by 1 / (T p)."""
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    middle = int(np.searchsorted(np.log(diffusion.sqrt_recipm1_alphas_cumprod), -1.2))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        losses = type(diffusion).training_losses
        patch.setattr(type(diffusion), "training_losses", lambda self, model, x, t, *a, **k: (
            seen.extend(t.tolist()), losses(self, model, x, t, *a, **k))[1])  # fmt: skip
        done("image_train", f"--data_dir {home}/data.npz {TRAIN} {NET} --schedule_sampler lognormal --iterations 20"
             f" --log_dir {tmp_path}/a")  # fmt: skip
    assert len(seen) == 240
    assert np.mean(np.array(seen) < middle) == pytest.approx(0.5, abs=4 * 0.5 / 240**0.5)
    assert np.mean(np.array(seen) < 500) > 0.8  # sigma 1 is the middle of the cosine's rows
