"""Measurements of images and the latents of images: operators, what the programs write, and what they refuse."""

import math
import re

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from PIL import Image
from test_guidance import PRIOR_MEAN, PRIOR_STD, A, Y, measurement, process
from test_programs import NET, TRAIN, done, refused, rows

from guided_diffusion import config, generate, inverse, pictures, sampling, toy
from guided_diffusion.image_datasets import load_data
from guided_diffusion.network_options import DiffusionOptions, ModelOptions
from guided_diffusion.prediction import clipped
from guided_diffusion.sampling_options import InpaintOptions, InvertOptions
from guided_diffusion.script_util import open_diffusion

F64 = th.float64


def images(*shape, seed=0):
    return th.randn(*shape, dtype=F64, generator=th.Generator().manual_seed(seed))


MASK = (images(1, 1, 8, 6, seed=5) > 0).double()
OPERATORS = {
    "pixels": (inverse.pixels(MASK), (8, 6)),
    "block means": (inverse.block_means(8, 6, 2), (4, 3)),
    "blur": (inverse.gaussian_blur(8, 6, 1.3), (8, 6)),
    "separable": (inverse.separable(images(5, 8).numpy(), images(2, 6).numpy()), (5, 2)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_adjoint_and_the_gain_the_largest_eigenvalue(name):
    """<A x, y> = <x, A^T y>, and A A^T written out as a matrix, column by column."""
    operator, small = OPERATORS[name]
    x, y = images(3, 2, 8, 6), images(3, 2, *small, seed=1)
    assert (operator(x) * y).sum().item() == pytest.approx((x * operator.adjoint(y)).sum().item(), rel=1e-12)
    basis = th.eye(small[0] * small[1], dtype=F64).view(-1, 1, *small)
    square = operator(operator.adjoint(basis)).flatten(1)
    assert th.linalg.eigvalsh(square).max().item() == pytest.approx(operator.gain, rel=1e-10)
    if name == "block means":
        th.testing.assert_close(square, th.eye(12, dtype=F64) / 4, rtol=0, atol=1e-15)


def test_block_means_and_their_simplest_inverse():
    x = images(2, 3, 12, 9)
    operator = inverse.block_means(12, 9, 3)
    th.testing.assert_close(operator(x), F.avg_pool2d(x, 3), rtol=0, atol=1e-14)
    up = operator.adjoint(operator(x)) / operator.gain
    th.testing.assert_close(up, F.interpolate(F.avg_pool2d(x, 3), scale_factor=3), rtol=0, atol=1e-14)
    assert operator(x.float()).dtype == th.float32
    for factor in (1, 2, 5):
        with pytest.raises(ValueError, match=f"no blocks of {factor} x {factor}"):
            inverse.block_means(12, 9, factor)


def test_a_blur_keeps_the_brightness_and_spreads_a_point_as_a_gaussian():
    operator = inverse.gaussian_blur(21, 15, 1.5)
    assert (operator(th.full((1, 1, 21, 15), 0.3, dtype=F64)) - 0.3).abs().max() < 1e-15
    point = th.zeros(1, 1, 21, 15, dtype=F64)
    point[0, 0, 10, 7] = 1
    out = operator(point)[0, 0]
    assert (out[10, 8] / out[10, 7]).item() == pytest.approx(math.exp(-1 / (2 * 1.5**2)), rel=1e-3)
    assert (out[12, 9] / out[10, 7]).item() == pytest.approx(math.exp(-8 / (2 * 1.5**2)), rel=1e-2)
    with pytest.raises(ValueError, match="deviation above 0, not 0"):
        inverse.gaussian_blur(8, 8, 0)


def test_a_gradient_applied_at_once_is_what_ode_samplers_apply():
    p = process("20", "cosine")
    guided = measurement(p, inverse.spread_of(p, 0.2, PRIOR_STD, 1.36))
    start = images(9, 2)
    ends = [list(sampling.sample(p, predict, sampling.SAMPLERS["heun"], start))[-1][0]
            for predict in (guided, inverse.applied(guided, p))]  # fmt: skip
    th.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-9)
    pred = inverse.applied(guided, p)(start, th.full((9,), 7))
    assert pred.grad is None and not th.equal(pred.x0, guided(start, th.full((9,), 7)).x0)


def test_by_measurement_is_the_wrappers_in_this_order():
    """On Gaussian data within the range nothing is clipped, and the chain is measured() with the right spread."""
    p = process("20", "cosine")
    prior = toy.Mixture(PRIOR_MEAN[None], PRIOR_STD).predictor(p)
    operator = inverse.Operator(lambda x: x @ A.T, lambda y: y @ A, (A @ A.T).item())
    x, t = images(400, 2), th.full((400,), 7)
    for scale in (1.0, 2.5, 0.0):
        ours = inverse.by_measurement(p, prior, operator, Y, noise_std=0.3, data_std=PRIOR_STD, scale=scale)(x, t)
        exact = measurement(p, inverse.spread_of(p, 0.3, PRIOR_STD, (A @ A.T).item()))(x, t)
        abar = p.alphas_cumprod[7]
        x0 = exact.x0 + scale * (1 - abar) / abar**0.5 * exact.grad
        th.testing.assert_close(ours.x0, x0.clamp(-1, 1), rtol=1e-9, atol=1e-9)
        assert (ours.x0.abs() == 1).any() and (ours.x0.abs() < 1).any()
    free = clipped(prior, p)(x, t)
    th.testing.assert_close(ours.x0, free.x0, rtol=0, atol=1e-12)


def test_slerp_keeps_the_length_and_goes_at_even_angles():
    a, b = th.tensor([[3.0, 0, 0], [1, 1, 0]]), th.tensor([[0, 3.0, 0], [2, 2, 0]])
    th.testing.assert_close(inverse.slerp(a, b, 0.0), a)
    th.testing.assert_close(inverse.slerp(a, b, 1.0), b)
    third = inverse.slerp(a, b, 1 / 3)
    th.testing.assert_close(third[0], th.tensor([3 * math.cos(math.pi / 6), 1.5, 0]))
    th.testing.assert_close(third[1], th.tensor([4 / 3, 4 / 3, 0]))  # the same direction: a straight line
    x, y = images(2, 5, 3, 8, 8)
    middle = inverse.slerp(x, y, 0.5)
    wanted = (x.flatten(1).norm(dim=1) + y.flatten(1).norm(dim=1)) / 2
    th.testing.assert_close(middle.flatten(1).norm(dim=1), wanted)


def test_normality_of_what_is_known():
    noise = inverse.normality(images(50, 3, 16, 16))
    assert abs(noise["mean"]) < 4 / 38400**0.5 and noise["variance"] == pytest.approx(1, abs=4 * (2 / 38400) ** 0.5)
    assert abs(noise["neighbour_correlation"]) < 4 / 72000**0.5
    checks = (th.arange(16)[:, None] + th.arange(16)) % 2 * 2.0 + 4  # 4 and 6
    assert inverse.normality(checks[None, None]) == {"mean": 5, "variance": 1, "neighbour_correlation": -1}
    stripes = (th.arange(16) % 2 * 2.0 - 1).expand(1, 1, 16, 16)  # -1 across, +1 along
    assert inverse.normality(stripes)["neighbour_correlation"] == 0


def test_psnr_and_masks_from_pictures(tmp_path):
    x = th.zeros(2, 3, 4, 4)
    assert pictures.psnr(x + 0.2, x).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert pictures.psnr(x, x).tolist() == [math.inf] * 2
    pixels = np.zeros((4, 6), np.uint8)
    pixels[1, 2], pixels[0, 0], pixels[3, 5] = 128, 127, 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert pictures.read_mask(tmp_path / "mask.png", 4, 6).nonzero().tolist() == [[1, 2], [3, 5]]
    with pytest.raises(ValueError, match="4 x 6 pixels, the images 8 x 8"):
        pictures.read_mask(tmp_path / "mask.png", 8, 8)


# ------------------------------------------------------------------------------------------------------- the programs

JUDGE = ("--image_size 8 --image_channels 1 --num_classes 10 --classifier_width 32 --classifier_depth 1"
         " --classifier_channel_mult 1 --classifier_attention_resolutions 4 --classifier_num_head_channels 16"
         " --noise_schedule cosine --noised False")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Blurred random pictures of three classes; an unconditional model, a conditional one, and a judge."""
    folder = tmp_path_factory.mktemp("home")
    x = inverse.gaussian_blur(8, 8, 1.5)(images(48, 1, 8, 8)) * 2.5
    x = pictures.to_uint8(x).numpy()
    np.savez(folder / "data.npz", arr_0=x, arr_1=np.arange(48) % 3)
    words = f"--data_dir {folder}/data.npz {TRAIN} --iterations 40"
    done("image_train", f"{words} {NET} --log_dir {folder}/plain")
    done("image_train", f"{words} {NET} --class_cond True --num_classes 3 --log_dir {folder}/cond")
    done("classifier_train", f"{words} {JUDGE} --num_classes 3 --iterations 3 --log_dir {folder}/judge")
    return folder


def path(home, name="plain"):
    return home / name / ("model000003.pt" if name == "judge" else "model000040.pt")


def restored(home, folder, words, model="plain"):
    """(samples as numbers in [-1,1] [N,k,C,H,W], the row of the log) of inpaint.py with 4 images, 2 samples each."""
    done("inpaint", f"--model_path {path(home, model)} --data_dir {home}/data.npz --num_images 4 --num_samples 2"
         f" --steps 12 {words} --log_dir {folder}")  # fmt: skip
    with np.load(folder / "samples_8x8x8x1.npz") as npz:
        x = th.from_numpy(npz["arr_0"]).permute(0, 3, 1, 2)
    return x.reshape(4, 2, 1, 8, 8).float() / 127.5 - 1, {k: float(v) for k, v in rows(folder)[-1].items()}


def truth(home, count=4):
    data = load_data(data_dir=f"{home}/data.npz", batch_size=1, image_size=8, image_channels=1, random_flip=False,
                     num_workers=0)  # fmt: skip
    return th.cat([next(data)[0] for _ in range(count)])


def arrays(folder, name):
    (path,) = folder.glob(f"{name}_*.npz")
    with np.load(path) as npz:
        return [npz[key] for key in sorted(npz.files)]


@pytest.mark.parametrize("words", ["--method repaint --mask random:0", "--mask {white} --method repaint"])
def test_what_is_known_everywhere_comes_back_exactly(home, tmp_path, words):
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "white.png")
    words = words.format(white=tmp_path / "white.png")
    x, row = restored(home, tmp_path / "out", f"{words} --repaint_times 2")
    known = truth(home)
    pixels = pictures.to_uint8(known).permute(0, 3, 1, 2)[:, None].float() / 127.5 - 1
    assert (x == pixels).all()
    assert row["psnr"] == math.inf and row["measurement_rms"] == 0 and row["psnr_of_simplest"] == math.inf


@pytest.mark.parametrize("task", ["inpaint", "inpaint --mask box", "super_res", "blur"])
def test_guidance_brings_samples_to_the_measurement(home, tmp_path, task):
    """Far nearer than samples of the same noise without guidance, and than the truth is to a noisy measurement."""
    _, free = restored(home, tmp_path / "free", f"--task {task} --dps_scale 0")
    _, guided = restored(home, tmp_path / "guided", f"--task {task}")
    assert guided["measurement_rms"] < 0.15 * free["measurement_rms"]
    assert guided["psnr"] > free["psnr"] + 2
    assert guided["measurement_rms_of_truth"] < 1e-6 and free["psnr_of_simplest"] == guided["psnr_of_simplest"]
    _, noisy = restored(home, tmp_path / "noisy", f"--task {task} --noise_std 0.2")
    draws = {"inpaint": 128, "inpaint --mask box": 192, "super_res": 64, "blur": 256}[task]
    assert noisy["measurement_rms_of_truth"] == pytest.approx(0.2, rel=4 / (2 * draws) ** 0.5)
    assert noisy["measurement_rms"] > guided["measurement_rms"]


def test_the_numbers_of_the_log_are_those_of_the_samples(home, tmp_path):
    x, row = restored(home, tmp_path, f"--task super_res --classifier_path {path(home, 'judge')}")
    known = truth(home)
    small = F.avg_pool2d(known, 2)
    (measured,) = arrays(tmp_path, "measurement")
    np.testing.assert_allclose(measured, small, atol=1e-6)
    up = F.interpolate(small, scale_factor=2)
    assert row["psnr_of_simplest"] == pytest.approx(pictures.psnr(up, known).mean().item(), abs=1e-3)
    each = th.stack([pictures.psnr(x[:, k], known) for k in (0, 1)])
    assert row["psnr"] == pytest.approx(each.mean().item(), abs=0.1)  # the file's pixels are truncated
    assert row["psnr_of_mean"] == pytest.approx(pictures.psnr(x.mean(1), known).mean().item(), abs=0.1)
    assert row["psnr_of_mean"] > row["psnr"]  # the mean square error of a mean is never above the mean of them
    rms = (F.avg_pool2d(x.flatten(0, 1), 2) - small.repeat_interleave(2, 0)).square().mean().sqrt().item()
    assert row["measurement_rms"] == pytest.approx(rms, abs=0.01)
    for name in ("as_labelled", "as_labelled_of_truth", "as_labelled_of_mean", "as_labelled_of_simplest"):
        assert 0 <= row[name] <= 1 and row[name] * 8 % 1 == 0
    assert arrays(tmp_path, "samples")[1].shape == (8,)  # the labels of the truth, for the judge
    picture = Image.open(tmp_path / "restored.png")
    assert picture.width > 4 * 48 and picture.height > 4 * 48


@pytest.mark.parametrize("words, unknown", [("half", 32), ("box", 16), ("random:0.25", 16), ("random:0.97", 62)])
def test_masks(home, tmp_path, words, unknown):
    restored(home, tmp_path, f"--mask {words}")
    measured, mask = arrays(tmp_path, "measurement")
    assert mask.shape == (4, 1, 8, 8) and (mask.reshape(4, 64) == 0).sum(1).tolist() == [unknown] * 4
    np.testing.assert_array_equal(measured, truth(home).numpy() * mask)
    if words == "half":
        assert mask[:, :, :4].all() and not mask[:, :, 4:].any()
    elif words == "box":
        assert not mask[:, :, 2:6, 2:6].any()
    elif unknown == 16:
        assert (mask[0] != mask[1]).any()  # each image its own


def test_the_simplest_answer_is_the_mean_of_what_is_known(home, tmp_path):
    _, row = restored(home, tmp_path, "--mask half")
    known = truth(home)
    filled = known.clone()
    filled[:, :, 4:] = known[:, :, :4].mean((2, 3), keepdim=True)
    assert row["psnr_of_simplest"] == pytest.approx(pictures.psnr(filled, known).mean().item(), abs=1e-3)


def test_restorations_do_not_depend_on_the_batch_but_on_the_seed(home, tmp_path):
    words = "--mask random:0.5 --batch_size"
    whole, _ = restored(home, tmp_path / "whole", f"{words} 64")
    parts, _ = restored(home, tmp_path / "parts", f"{words} 3")
    assert (whole - parts).abs().max() <= 1.01 / 127.5
    assert (whole[:, 0] - whole[:, 1]).abs().mean() > 0.02  # two tries of an image differ
    again, _ = restored(home, tmp_path / "again", f"{words} 3 --method repaint")
    assert (again - parts).abs().mean() > 0.02


def test_a_conditional_model_is_told_the_class(home, tmp_path):
    """Those of the data, or those typed."""
    data = load_data(data_dir=f"{home}/data.npz", batch_size=1, image_size=8, image_channels=1, random_flip=False,
                     num_workers=0, class_cond=True)  # fmt: skip
    labels = [next(data)[1]["y"].item() for _ in range(4)]
    ours, _ = restored(home, tmp_path / "data", "--dps_scale 0", "cond")
    typed, _ = restored(home, tmp_path / "typed", f"--dps_scale 0 --classes {','.join(map(str, labels))}", "cond")
    other, _ = restored(home, tmp_path / "other", f"--dps_scale 0 --classes {(labels[0] + 1) % 3}", "cond")
    assert arrays(tmp_path / "data", "samples")[1].tolist() == np.repeat(labels, 2).tolist()
    assert (ours == typed).all() and (ours != other).any()


@pytest.mark.parametrize("words, pattern", [
    ("--task super_res --method repaint", "puts known pixels in place, and super_res has none: use --method dps"),
    ("--method repaint --noise_std 0.1", "keep --noise_std 0, not 0.1, or use --method dps"),
    ("--method repaint --sampler dpmpp_2m", "which dpmpp_2m cannot: use ddpm, ddim"),
    ("--mask middle", "--mask middle is no file and none of half, box and random:SHARE"),
    ("--mask random:2", "cannot read --mask random:2: give a share from 0 to 1"),
    ("--mask random:much", "cannot read --mask random:much"),
    ("--mask random:1", "--mask random:1 leaves none of the 64 pixels known: .* image_sample.py"),
    ("--mask {black}", "black.png leaves none of the 64 pixels known"),
    ("--task super_res --factor 3", "8 x 8 pixels has no blocks of 3 x 3"),
    ("--task blur --blur_std 0", "deviation above 0, not 0"),
    ("--noise_std -1", "--noise_std must be 0 or more, not -1"),
    ("--dps_scale -1", "--dps_scale must be 0 or more, not -1"),
    ("--repaint_times 0", "--repaint_times must be 1 or more, not 0"),
    ("--num_samples 0", "--num_samples must be 1 or more, not 0"),
    ("--num_images 49", "--num_images must be from 1 to the 48 in .*, not 49"),
    ("--num_images 0", "from 1 to the 48"),
    ("--batch_size 0", "in batches of 1 or more, not 8 and 0"),
    ("--sampler dpmpp", "unknown sampler: dpmpp .*did you mean dpmpp_3m"),
    ("--steps 2000", "from 1 to the 1000 rows .*not 2000"),
    ("--task deblur", "invalid choice: 'deblur'"),
    ("--data_dir ''", "data_dir"),
    ("--classes 3", "model is unconditional"),
])  # fmt: skip
def test_restorations_that_cannot_be_are_refused(home, tmp_path, words, pattern):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    words = words.format(black=tmp_path / "black.png")
    refused("inpaint", f"--model_path {path(home)} --data_dir {home}/data.npz --num_images 4 --num_samples 2 --steps 3"
            f" --log_dir {tmp_path} {words}", pattern)  # fmt: skip


def test_a_judge_of_other_images_is_refused(home, tmp_path):
    done("classifier_train", f"--data_dir {home}/data.npz {TRAIN} {JUDGE} --num_classes 3 --iterations 1"
         f" --image_channels 3 --log_dir {tmp_path}/colour")  # fmt: skip
    refused("inpaint", f"--model_path {path(home)} --data_dir {home}/data.npz --num_images 4 --log_dir {tmp_path}/out"
            f" --classifier_path {tmp_path}/colour/model000001.pt", "has image_channels 1 and .* has 3")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- inversion


def inverted(home, folder, words="", model="plain", of="--num_images 6"):
    return done("invert", f"--model_path {path(home, model)} {of} {words} --log_dir {folder}")


def of(home):
    return f"--data_dir {home}/data.npz --num_images 6"


def test_there_and_back(home, tmp_path):
    """The error falls with the steps, and is below 1e-3 with Heun's method at 150 steps."""
    errors = {}
    for sampler, steps in (("heun", 50), ("heun", 150), ("ddim", 150), ("dpmpp_2m", 150)):
        folder = tmp_path / f"{sampler}{steps}"
        inverted(home, folder, f"--sampler {sampler} --steps {steps}", of=of(home))
        row = rows(folder)[-1]
        errors[sampler, steps] = float(row["rms_error"])
        assert float(row["rms_error_of_255"]) == pytest.approx(127.5 * errors[sampler, steps])
        assert float(row["max_error"]) >= float(row["rms_error"])
    assert errors["heun", 150] < 1e-3 and errors["heun", 150] < 0.5 * errors["heun", 50]
    assert errors["heun", 150] < errors["dpmpp_2m", 150] < errors["ddim", 150]
    x = arrays(tmp_path / "heun150", "samples")[0].astype(int)
    assert np.abs(x - pictures.to_uint8(truth(home, 6)).numpy()).max() <= 2
    picture = Image.open(folder / "inversion.png")
    assert picture.width > 4 * 48 and picture.height > 6 * 48


def test_latents_are_those_of_the_library_and_lead_back(home, tmp_path):
    inverted(home, tmp_path / "there", "--sampler dpmpp_2m --steps 20 --batch_size 4", of=of(home))
    (latents,) = arrays(tmp_path / "there", "latents")
    assert latents.dtype == np.float32 and latents.shape == (6, 1, 8, 8)
    network, diffusion, _ = open_diffusion(path(home))
    below = diffusion.spaced([row for row in range(1000) if diffusion.sqrt_recipm1_alphas_cumprod[row] <= 80])
    rule, p = generate.planned(below, sampler="dpmpp_2m", steps=20)
    predict = p.predictor(network, clip_denoised=False)
    *_, (x, _) = sampling.invert(p, predict, truth(home, 6), rule)
    np.testing.assert_allclose(latents, x, atol=1e-4)
    row = rows(tmp_path / "there")[-1]
    for name, value in inverse.normality(x).items():
        assert float(row[f"latent_{name}"]) == pytest.approx(value, abs=1e-4)

    file = tmp_path / "there" / "latents_6x1x8x8.npz"
    inverted(home, tmp_path / "back", f"--sampler dpmpp_2m --steps 20 --batch_size 4 --latents {file}", of="")
    assert (arrays(tmp_path / "back", "samples")[0] == arrays(tmp_path / "there", "samples")[0]).all()


def test_between_two_images_lie_others(home, tmp_path, monkeypatch):
    shown = []
    strip = pictures.strip
    monkeypatch.setattr(pictures, "strip", lambda frames, **k: (shown.append(frames), strip(frames, **k))[1])
    inverted(home, tmp_path, "--steps 20 --interpolate 3", of=of(home))
    inversion, between = shown
    assert len(inversion) == 4 and len(between) == 5 and (tmp_path / "interpolation.png").stat().st_size > 1000
    first, *_, last = (x.int() for x in between)
    back = inversion[2].int()
    assert (first - back).abs().max() <= 1 and (last - back.roll(-1, 0)).abs().max() <= 1  # the next, the first at last
    assert (between[2].int() - first).abs().float().mean() > 2


def test_labels_go_with_the_latents(home, tmp_path):
    inverted(home, tmp_path / "there", "--steps 20", "cond", of(home))
    latents, labels = arrays(tmp_path / "there", "latents")
    assert labels.shape == (6,) and set(labels) <= {0, 1, 2}
    file = tmp_path / "there" / "latents_6x1x8x8.npz"
    inverted(home, tmp_path / "back", f"--steps 20 --latents {file}", "cond", "")
    images, kept = arrays(tmp_path / "back", "samples")
    assert (images == arrays(tmp_path / "there", "samples")[0]).all() and (kept == labels).all()
    inverted(home, tmp_path / "other", f"--steps 20 --latents {file} --classes {(labels[0] + 1) % 3}", "cond", "")
    assert (arrays(tmp_path / "other", "samples")[0][0] != images[0]).any()
    np.savez(tmp_path / "bare.npz", arr_0=latents)
    refused("invert", f"--model_path {path(home, 'cond')} --latents {tmp_path}/bare.npz --log_dir {tmp_path}/no",
            "has no labels, and the model needs them: give --classes")  # fmt: skip
    for k, wrong in enumerate((["a"] * 6, [0] * 5, [0.5] * 6, [3] * 6, [-1] * 6)):
        np.savez(tmp_path / f"{k}.npz", arr_0=latents, arr_1=wrong)
        refused("invert", f"--model_path {path(home, 'cond')} --latents {tmp_path}/{k}.npz --log_dir {tmp_path}/no",
                "arr_1, .* gives no label 0..2 to each of 6 latents: give --classes")  # fmt: skip


@pytest.mark.parametrize("words, pattern", [
    ("--sampler ddpm", "--sampler ddpm adds noise, .*choose one of ddim, heun, dpmpp_2m, "),
    ("--sampler edm", "--sampler edm adds noise"),
    ("--sampler huen", "unknown sampler: huen .*did you mean heun"),
    ("--steps 1", "two rows or more"),
    ("--steps 5000", "steps must be a whole number from 1"),
    ("--max_sigma 0.0001", "--max_sigma 0.0001: the process has 0 rows"),
    ("--interpolate -1", "--interpolate -1: give 0 or more pictures"),
    ("--latents {bad}", "either images by --data_dir, or --latents"),
    ("--data_dir '' --latents {bad} --interpolate 2", "--interpolate 2: give 0 or more pictures, and images"),
    ("--data_dir ''", "either images by --data_dir, or --latents"),
    ("--data_dir '' --latents {bad}", r"holds int64 \[2, 1, 8, 8\]: the model takes finite numbers \[N, 1, 8, 8\]"),
    ("--data_dir '' --latents {large}", r"holds float32 \[2, 1, 9, 8\]"),
    ("--data_dir '' --latents {nan}", r"the model takes finite numbers"),
    ("--data_dir '' --latents {no}", "cannot read .* as an npz of plain arrays: it is none, or holds objects"),
    ("--data_dir '' --latents {empty}", r"float32 \[0, 1, 8, 8\]: the model takes"),
    ("--data_dir '' --latents {huge}", r"float64 \[1, 1, 8, 8\]: the model takes finite"),
    ("--data_dir '' --latents {other}", "holds no arr_0: the model takes"),
    ("--data_dir '' --latents {missing}", "No such file"),
    ("--classes 1", "model is unconditional"),
])  # fmt: skip
def test_inversions_that_cannot_be_are_refused(home, tmp_path, words, pattern):
    files = {name: tmp_path / f"{name}.npz" for name in "bad large nan no missing empty huge other".split()}
    np.savez(files["empty"], arr_0=np.zeros((0, 1, 8, 8), np.float32))
    np.savez(files["huge"], arr_0=np.full((1, 1, 8, 8), 1e300))
    np.savez(files["other"], x=np.zeros((1, 1, 8, 8)))
    np.savez(files["bad"], arr_0=np.zeros((2, 1, 8, 8), np.int64))
    np.savez(files["large"], arr_0=np.zeros((2, 1, 9, 8), np.float32))
    np.savez(files["nan"], arr_0=np.full((2, 1, 8, 8), np.nan, np.float32))
    files["no"].write_bytes(b"no zip")
    refused("invert", f"--model_path {path(home)} {of(home)} --log_dir {tmp_path} {words.format(**files)}", pattern)


@pytest.mark.parametrize("name", ["invert", "inpaint"])
def test_every_flag_has_help_and_default(name):
    group = {"invert": InvertOptions, "inpaint": InpaintOptions}[name]
    expected = config.options(group, ModelOptions, DiffusionOptions, config.RunOptions)
    found = dict(re.findall(r"^  --(\w+) \S+(.*?)(?=^  --|^\S|\Z)", done(name, "--help").out, re.MULTILINE | re.DOTALL))
    assert found.keys() == expected.keys()
    assert all(re.search(r"\w+ .*\(default: .*\)$", " ".join(said.split())) for said in found.values())


def test_several_processes_are_refused(home, tmp_path, monkeypatch):
    from guided_diffusion import dist_util

    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    for name in ("invert", "inpaint"):
        refused(name, f"--model_path {path(home)} {of(home)} --log_dir {tmp_path}", "runs in one process, not in 2")
