"""Scores by several processes, and scores straight from the samplers: the same as by one, from files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluations import evaluator
from evaluations.features import make_extractor
from guided_diffusion import checkpoint, script_util

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
RAMPS = """
import numpy as np
def features(images):
    flat = images.reshape(len(images), -1) / 255.0
    return np.concatenate([flat[:, :10], np.abs(flat[:, 5:15] - 0.5)], axis=1)
"""


def launch(processes, program, *arguments, cwd):
    """A program of the repository in so many processes; what it printed to stdout."""
    head = [sys.executable] if processes == 1 else [str(BIN / "torchrun"), "--nproc_per_node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GD_ARRIVAL_MINUTES": "2"}
    command = [*head, str(ROOT / program), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    """A folder with two sets of images (of the reference two blocks, so that of four ranks two have none) and a module
    of features."""
    (tmp_path / "ramps.py").write_text(RAMPS)
    random = np.random.RandomState(0)
    np.savez(tmp_path / "reference.npz", random.randint(0, 256, (500, 4, 4, 1)).astype(np.uint8))
    np.savez(tmp_path / "sample.npz", (random.randint(0, 256, (1100, 4, 4, 1)) * 0.8).astype(np.uint8))
    return tmp_path


def close(a, b, tolerance):
    """The largest difference of two arrays, relative to the largest value, is within the tolerance."""
    return np.abs(np.asarray(a) - b).max() <= tolerance * np.abs(b).max()


def test_one_two_and_four_processes_and_any_batch_size_give_the_same_scores(folder):
    scores = []
    for processes, batch in ((1, 64), (2, 17), (4, 100)):
        out = folder / f"{processes}.json"
        options = ["--extractor", "ramps:features", "--batch_size", batch, "--out", out, "--device", "cpu"]
        said = launch(processes, "evaluations/evaluator.py", "reference.npz", "sample.npz", *options, cwd=folder)
        scores.append(json.loads(out.read_text()))
        assert said.count("FID:") == 1
    for other in scores[1:]:
        assert {key: other[key] for key in ("precision", "recall", "density", "coverage")} == {
            key: scores[0][key] for key in ("precision", "recall", "density", "coverage")
        }
        assert other["fid"] == pytest.approx(scores[0]["fid"], rel=1e-8)
        assert other["protocol"] == scores[0]["protocol"] and other["sample"] == scores[0]["sample"]
    assert 0 < scores[0]["precision"] < 1 and 0 < scores[0]["recall"] < 1


def test_one_two_and_four_processes_make_the_same_reference(folder):
    made = []
    for processes in (1, 2, 4):
        options = ["--keep", 30, "--extractor", "ramps:features", "--save_every", 300, "--device", "cpu"]
        launch(processes, "evaluations/make_reference.py", "sample.npz", f"{processes}.npz", *options, cwd=folder)
        made.append(np.load(folder / f"{processes}.npz"))
    for other in made[1:]:
        assert close(other["mu"], made[0]["mu"], 1e-10) and close(other["sigma"], made[0]["sigma"], 1e-10)
        np.testing.assert_array_equal(other["arr_0"], made[0]["arr_0"])
        assert str(other["provenance"]) == str(made[0]["provenance"])


# --------------------------------------------------------------------------------------------- straight from a sampler


@pytest.fixture
def networks(folder):
    """A diffusion model and a classifier of 4x4 grey images, drawn at random."""
    noise = {"diffusion_steps": 20, "noise_schedule": "cosine"}
    flags = script_util.model_and_diffusion_defaults() | noise | {
        "image_size": 4, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1",
        "attention_resolutions": "2",
    }  # fmt: skip
    its = script_util.classifier_defaults() | {
        "image_size": 4, "image_channels": 1, "num_classes": 3, "classifier_width": 32, "classifier_depth": 1,
        "classifier_channel_mult": "1", "classifier_attention_resolutions": "4", "classifier_num_head_channels": 32,
    }  # fmt: skip
    model, _ = script_util.create_model_and_diffusion(**flags)
    kinds = {"diffusion": (model, flags), "classifier": (script_util.create_classifier(**its), its | noise)}
    for kind, (network, known) in kinds.items():
        (folder / kind).mkdir()
        checkpoint.save(network.state_dict(), str(folder / kind / "model000001.pt"))
        checkpoint.write_config(str(folder / kind), kind, known)
    return folder


def test_samples_are_scored_as_they_come_as_their_file_is(networks):
    options = [
        "--model_path", "diffusion/model000001.pt", "--num_samples", 30, "--batch_size", 8, "--timestep_respacing", 3,
        "--evaluate", "reference.npz", "--device", "cpu", "--grid", "False",
    ]  # fmt: skip
    steered = ["--classifier_path", "classifier/model000001.pt", "--classes", "all"]
    for name, extractor, more in (
        ("image_sample", "ramps:features", []),
        ("classifier_sample", "classifier/model000001.pt", steered),
    ):
        results = []
        for processes, keep in ((1, True), (2, False)):
            out = networks / f"{name}_{processes}"
            words = [*options, "--extractor", extractor, "--log_dir", out, "--save_samples", keep, *more]
            said = launch(processes, f"scripts/{name}.py", *words, cwd=networks)
            assert said.count("FID:") == 1
            results.append(json.loads((out / "scores.json").read_text()))
            assert len(list(out.glob("samples_*"))) == 2 * keep  # the npz and its plan
        file = next((networks / f"{name}_1").glob("samples_*.npz"))
        os.chdir(networks)
        from_file = evaluator.evaluate("reference.npz", file, make_extractor(extractor))
        numbers = [key for key in evaluator.LINES if key in from_file]
        assert ("label_agreement" in numbers) == ("inception_score" in numbers) == (name == "classifier_sample")
        assert results[0]["sample"]["sha256"] == from_file["sample"]["sha256"]
        assert {key: results[0][key] for key in numbers} == {key: from_file[key] for key in numbers}
        assert {key: results[1][key] for key in numbers} == pytest.approx({k: from_file[k] for k in numbers}, rel=0.02)


@pytest.mark.parametrize("words, message", [
    (["--evaluate", "none.npz"], "none.npz: no such file"),
    (["--evaluate", "reference.npz", "--extractor", "none"], "extractor none is neither"),
    (["--save_samples", "False"], "--save_samples False without --evaluate leaves nothing of the samples"),
])
def test_what_cannot_be_scored_ends_the_program_before_it_samples(networks, words, message):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts/image_sample.py"), "--model_path", "diffusion/model000001.pt"]
    done = subprocess.run([*command, *words, "--log_dir", "out"], cwd=networks, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "sampling" not in done.stderr
