"""The program of bits per dimension: what it averages, what it writes, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch as th
from test_programs import MPIEXEC, done, refused, stranger

from guided_diffusion import losses, sampling
from guided_diffusion.script_util import open_diffusion

NET = (
    "--image_size 8 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions"
    " 4 --noise_schedule cosine --class_cond True --num_classes 3 --learn_sigma True"
)
COUNT, STEPS = 7, 5


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nll")
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 1), np.uint8)
    np.savez(folder / "data.npz", arr_0=images, arr_1=np.arange(COUNT) % 3)
    done("image_train", f"--data_dir {folder}/data.npz {NET} --batch_size 4 --lr 1e-2 --iterations 4 --num_workers 0"
         f" --random_flip False --log_dir {folder}/model")  # fmt: skip
    return folder


def words(home, folder, more=""):
    return (f"--model_path {home}/model/model000004.pt --data_dir {home}/data.npz --timestep_respacing {STEPS}"
            f" --num_workers 0 --log_dir {folder} {more}")  # fmt: skip


def written(folder):
    def array(name):
        with np.load(folder / f"{name}.npz") as npz:
            return npz["arr_0"]

    terms = {name: array(f"{name}_terms") for name in ("vb", "mse", "xstart_mse")}
    return json.loads((folder / "nll.json").read_text()), array("total_bpd"), terms


@pytest.fixture(scope="module")
def expected(home):
    """The bound of each image, unflipped and with noise of its own, by the library."""
    model, diffusion, _ = open_diffusion(f"{home}/model/model000004.pt", {"timestep_respacing": str(STEPS)})
    with np.load(home / "data.npz") as npz:
        x0 = th.from_numpy(npz["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = th.from_numpy(npz["arr_1"])
    predict = diffusion.predictor(model, clip_denoised=True)
    noise = sampling.SeededNoise(0, range(COUNT))
    return losses.bits_per_dimension(diffusion, lambda x, t: predict(x, t, y=y), x0, noise)


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_the_average_is_over_each_image_once_whatever_the_batch(batch, home, expected, tmp_path):
    done("image_nll", words(home, tmp_path, f"--batch_size {batch}"))
    scores, bpd, terms = written(tmp_path)
    assert np.abs(bpd - expected["total_bpd"].numpy()).max() < 1e-4 and scores["images"] == COUNT
    assert scores["bits_per_dim"] == pytest.approx(bpd.mean(), abs=1e-12)
    assert scores["standard_error"] == pytest.approx(bpd.std(ddof=1) / math.sqrt(COUNT), abs=1e-12)
    for name, values in terms.items():
        assert values.dtype == np.float32 and values.shape == (STEPS,)
        assert np.abs(values - expected[name].mean(0).numpy()).max() < 1e-4, name
    assert terms["vb"].sum() + scores["prior_bpd"] == pytest.approx(scores["bits_per_dim"], abs=1e-5)
    assert (tmp_path / "nll.png").stat().st_size > 5000


def test_fewer_images_than_there_are(home, expected, tmp_path):
    said = done("image_nll", words(home, tmp_path, "--num_samples 5 --batch_size 3")).out
    assert f"5 of the {COUNT} images are scored" in said
    assert written(tmp_path)[0]["bits_per_dim"] == pytest.approx(expected["total_bpd"][:5].mean().item(), abs=1e-4)


def test_s08_half_precision_works(home, expected, tmp_path):
    """The original never converted the network, and failed."""
    done("image_nll", words(home, tmp_path, "--use_fp16 True --num_samples 2 --batch_size 2"))
    assert np.abs(written(tmp_path)[1] / expected["total_bpd"][:2].numpy() - 1).max() < 0.02


@pytest.mark.skipif(not MPIEXEC, reason="no mpiexec")
@pytest.mark.parametrize("count", [1, COUNT])
def test_two_processes_share_the_images(count, home, expected, tmp_path):
    stranger("scripts/image_nll.py", words(home, "two", f"--batch_size 2 --num_samples {count}"), tmp_path,
             [MPIEXEC, "-n", "2"])  # fmt: skip
    scores, bpd, terms = written(tmp_path / "two")
    assert np.abs(bpd - expected["total_bpd"][:count].numpy()).max() < 1e-4
    assert np.abs(terms["mse"] - expected["mse"][:count].mean(0).numpy()).max() < 1e-4
    assert (scores["standard_error"] is None) == (count == 1)


def test_bad_input(home, tmp_path):
    refused("image_nll", words(home, tmp_path, "--num_samples 0"), "--num_samples must be 1 or more, not 0")
    refused("image_nll", words(home, tmp_path, "--batch_size -1"), "--batch_size must be 1 or more, not -1")
    refused("image_nll", words(home, tmp_path, f"--data_dir {tmp_path}/no.npz"), "no.npz does not exist")
    refused("image_nll", words(home, tmp_path, "--num_classes 5"), "--num_classes 5 contradicts the weights")
