"""Super-resolution from end to end: the task, the base samples, and the two programs."""

import json

import numpy as np
import pytest
import torch as th
from PIL import Image
from test_programs import MPIEXEC, done, names, refused, samples, stranger

from guided_diffusion import checkpoint, pictures, sampling, super_res
from guided_diffusion.script_util import open_super_res
from guided_diffusion.train_util import DiffusionTask, SuperResTask, Trainer

NET = (
    "--large_size 8 --small_size 4 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1"
    " --attention_resolutions 4 --noise_schedule cosine --class_cond True --num_classes 3"
)
TRAIN = "--batch_size 8 --lr 1e-2 --log_interval 1 --random_flip False --num_workers 0 --iterations 6 --ema_rate 0.5"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("super_res")


@pytest.fixture(scope="module")
def data(home):
    """24 images of three classes, 8 x 8, as an npz."""
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
    np.savez(home / "data.npz", arr_0=images, arr_1=np.arange(24) % 3)
    return home / "data.npz"


@pytest.fixture(scope="module")
def model(home, data):
    done("super_res_train", f"--data_dir {data} {NET} {TRAIN} --low_res_noise 0.2 --log_dir {home}/model")
    return home / "model" / "model000006.pt"


@pytest.fixture(scope="module")
def base(home):
    """Ten base samples 4 x 4 with labels, as an npz and as a folder of pictures."""
    images, labels = np.random.default_rng(1).integers(0, 256, (10, 4, 4, 1), np.uint8), np.arange(10) % 3
    np.savez(home / "base.npz", arr_0=images, arr_1=labels)
    (home / "base").mkdir()
    for i, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image[..., 0]).save(home / "base" / f"{label}_{i}.png")
    return home / "base.npz"


def enlarged(model, base, folder, more=""):
    words = f"--model_path {model} --base_samples {base} --timestep_respacing 4 --log_dir {folder} {more}"
    done("super_res_sample", words)
    return samples(folder)


# ------------------------------------------------------------------------------------------------------------ the task


class Tiny(th.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = th.nn.Parameter(th.zeros(1))
        self.seen = []

    def forward(self, x, t, low_res):
        self.seen.append(low_res.detach().clone())
        return self.weight * x


def condition(noise, n=6, rank=0, ranks=1, micro=-1):
    """What a training step tells the network of a batch, and the batch."""
    from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType

    diffusion = GaussianDiffusion(betas=np.linspace(0.01, 0.5, 5), model_mean_type=ModelMeanType.EPSILON,
                                  model_var_type=ModelVarType.FIXED_LARGE, loss_type=LossType.MSE)  # fmt: skip
    net = Tiny()
    x0 = th.randn(n, 2, 8, 8, generator=th.Generator().manual_seed(0))[rank::ranks]
    task = SuperResTask(net, diffusion, small_size=4, low_res_noise=noise)
    trainer = Trainer(task, iter([(x0, {})]), batch_size=len(x0), microbatch=micro, iterations=1, folder="unused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guided_diffusion.dist_util.rank", lambda: rank)
        patch.setattr("guided_diffusion.dist_util.world_size", lambda: ranks)
        trainer.forward_backward(x0, {})
    return th.cat(net.seen), x0


def test_the_small_image_holds_the_means_of_blocks():
    seen, x0 = condition(0.0)
    assert th.allclose(seen, x0.reshape(6, 2, 4, 2, 4, 2).mean((3, 5)), atol=1e-6)


def test_its_noise_has_a_level_for_each_image_and_is_the_same_however_the_batch_is_shared():
    clean, noisy = condition(0.0, 400)[0], condition(0.5, 400)[0]
    levels = (noisy - clean).flatten(1).std(1)                                # of 32 numbers each
    # Uniform in [0, 0.5]: mean 0.25, standard deviation 0.144; errors of 400 draws, four of them.
    assert levels.mean().item() == pytest.approx(0.25, abs=4 * 0.144 / 20)
    assert levels.square().mean().item() == pytest.approx(0.25 / 3, rel=0.2) and levels.max() < 0.5 * 1.6
    assert th.equal(condition(0.5, 6, micro=2)[0], condition(0.5, 6)[0])
    shares = [condition(0.5, 6, rank, 2)[0] for rank in (0, 1)]
    assert th.equal(th.stack(shares, 1).flatten(0, 1), condition(0.5, 6)[0])


def test_a_task_without_conditions_of_its_own_is_as_before():
    assert not hasattr(DiffusionTask, "condition")


# ---------------------------------------------------------------------------------------------------------- the pixels


def test_pixels_there_and_back():
    every = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    x = pictures.from_uint8(every)
    assert x.shape == (4, 1, 8, 8) and x.min() == -1 and x.max() == 1
    assert np.array_equal(pictures.nearest_uint8(x).numpy(), every)


def test_base_samples_are_taken_in_turn_with_noise_of_their_own():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
    plain, noisy = super_res.BaseSamples(images), super_res.BaseSamples(images, noise_std=0.1, seed=5)
    assert th.equal(plain.batch([4, 0]), pictures.from_uint8(images[[1, 0]]))
    assert th.equal(noisy.batch(range(300))[7:9], noisy.batch([7, 8]))
    added = noisy.batch(range(300)) - plain.batch(range(300))
    assert added.std().item() == pytest.approx(0.1, rel=0.05) and not th.equal(added[0], added[3])


# -------------------------------------------------------------------------------------------------------- the programs


def test_training_writes_what_sampling_needs(model, home):
    content = json.loads((home / "model" / "config.json").read_text())
    assert content["kind"] == "super_res" and content["class_names"] == ["0", "1", "2"]
    assert {"ema_0.5_000006.pt", "opt000006.pt", "progress.csv", "run.json"} <= set(names(home / "model"))
    _, _, flags = open_super_res(str(model))
    assert (flags["large_size"], flags["small_size"], flags["num_classes"]) == (8, 4, 3)


def test_training_goes_on_where_it_stopped(model, home, data):
    for steps in (3, 6):
        done("super_res_train", f"--data_dir {data} {NET} {TRAIN} --low_res_noise 0.2 --iterations {steps}"
             f" --log_dir {home}/broken")  # fmt: skip
    whole, broken = checkpoint.load(model), checkpoint.load(home / "broken" / "model000006.pt")
    assert all(th.equal(whole[name], broken[name]) for name in whole)


def test_each_base_sample_is_enlarged_in_its_place_by_the_sampler_that_was_asked_for(model, base, home, tmp_path):
    name, images, labels = enlarged(model, base, tmp_path / "ddim", "--use_ddim True --batch_size 4 --num_samples 6")
    assert name == "samples_6x8x8x1.npz" and labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (tmp_path / "ddim" / "enlarged.png").stat().st_size > 300
    network, diffusion, _ = open_super_res(str(model), {"timestep_respacing": "4"})
    with np.load(base) as npz:
        cond = {"low_res": pictures.from_uint8(npz["arr_0"][:6]), "y": th.from_numpy(npz["arr_1"][:6])}
    start = sampling.SeededNoise(0, range(6)).normal(1, 8, 8)
    x = diffusion.ddim_sample_loop(network, (6, 1, 8, 8), noise=start, model_kwargs=cond)
    assert np.abs(pictures.to_uint8(x).numpy().astype(int) - images).max() <= 1
    ancestral = enlarged(model, base, tmp_path / "ddpm", "--num_samples 6")[1]
    assert not np.array_equal(ancestral, images)


def test_no_more_images_than_base_samples_unless_asked(model, base, tmp_path):
    first = enlarged(model, base, tmp_path / "a")
    assert first[0] == "samples_10x8x8x1.npz"
    more = enlarged(model, base, tmp_path / "b", "--num_samples 13 --repeat_base True --batch_size 5")
    assert more[0] == "samples_13x8x8x1.npz" and more[2].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 1, 2]
    assert np.array_equal(more[1][:10], first[1]) and not np.array_equal(more[1][10], first[1][0])
    said = done("super_res_sample", f"--model_path {model} --base_samples {base} --timestep_respacing 4"
                f" --num_samples 11 --log_dir {tmp_path}/c")  # fmt: skip
    assert "holds 10 base samples: drawing that many, not 11" in said.out


def test_a_folder_is_as_good_as_an_npz(model, base, home, tmp_path):
    from_npz = enlarged(model, base, tmp_path / "a", "--low_res_noise 0.3 --use_ddim True")
    from_folder = enlarged(model, home / "base", tmp_path / "b", "--low_res_noise 0.3 --use_ddim True")
    order = np.argsort([f"{i % 3}_{i}.png" for i in range(10)])               # a folder's order is that of its names
    assert from_folder[2].tolist() == from_npz[2][order].tolist()
    given = super_res.read_base_samples(str(home / "base"), 4, 1, labelled=True)
    with np.load(base) as npz:
        assert np.array_equal(given.images, npz["arr_0"][order])
    clean = enlarged(model, base, tmp_path / "c", "--use_ddim True")
    assert not np.array_equal(clean[1], from_npz[1])


@pytest.mark.skipif(not MPIEXEC, reason="no mpiexec")
def test_two_processes_draw_what_one_does(model, base, tmp_path):
    words = f"--model_path {model} --base_samples {base} --timestep_respacing 3 --batch_size 2"
    stranger("scripts/super_res_sample.py", f"{words} --log_dir one", tmp_path)
    stranger("scripts/super_res_sample.py", f"{words} --log_dir two", tmp_path, [MPIEXEC, "-n", "2"])
    one, two = samples(tmp_path / "one"), samples(tmp_path / "two")
    assert np.array_equal(one[1], two[1]) and np.array_equal(one[2], two[2])


@pytest.fixture(scope="module")
def bad(home, base):
    with np.load(base) as npz:
        images = npz["arr_0"]
    np.savez(home / "large.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    np.savez(home / "floats.npz", arr_0=images / 255)
    np.savez(home / "bare.npz", arr_0=images)
    np.savez(home / "none.npz", arr_0=images[:0])
    np.savez(home / "nameless.npz", images=images)
    np.savez(home / "beyond.npz", arr_0=images, arr_1=np.arange(10))
    np.savez(home / "few.npz", arr_0=images, arr_1=np.arange(3))
    return home


@pytest.mark.parametrize("words, pattern", [
    ("", "no base samples: give --base_samples"),
    ("--base_samples {}/nowhere.npz", "nowhere.npz"),
    ("--base_samples {}/large.npz", r"arr_0 is uint8 \[3, 8, 8, 1\]; the model enlarges uint8 \[N,4,4,1\]"),
    ("--base_samples {}/floats.npz", r"arr_0 is float64 \[10, 4, 4, 1\]"),
    ("--base_samples {}/none.npz", r"arr_0 is uint8 \[0, 4, 4, 1\]"),
    ("--base_samples {}/nameless.npz", "has no array arr_0"),
    ("--base_samples {}/bare.npz", r"takes labels, and .*bare.npz has none \(arr_1\): give --classes"),
    ("--base_samples {}/beyond.npz", "labels of .*beyond.npz go from 0 to 9, and those of the model from 0 to 2"),
    ("--base_samples {}/few.npz", r"arr_1 is int64 \[3\]; it must hold a label for each image"),
    ("--base_samples {}/base.npz --low_res_noise -1", "--low_res_noise is a standard deviation, 0 or more, not -1"),
    ("--base_samples {}/base.npz --classes 3", "class 3 in --classes is out of range: labels run from 0 to 2"),
    ("--base_samples {}/base.npz --num_samples 0", "--num_samples must be 1 or more, not 0"),
])  # fmt: skip
def test_bad_input_to_sampling(words, pattern, model, bad, tmp_path):
    refused("super_res_sample", f"--model_path {model} {words.format(bad)} --log_dir {tmp_path}", pattern)
    assert not list(tmp_path.glob("*.npz"))


def test_bad_input_to_training(data, model, home, tmp_path):
    words = f"--data_dir {data} {NET} {TRAIN} --log_dir {tmp_path}"
    refused("super_res_train", f"{words} --small_size 8", "--small_size 8 must be from 1 to below --large_size 8")
    refused("super_res_train", f"{words} --low_res_noise -0.1", "standard deviation, 0 or more, not -0.1")
    refused("image_sample", f"--model_path {model} --log_dir {tmp_path}", "super_res network, but a diffusion one")
