"""A network shared by two processes trains, saves and goes on as one that each of them holds whole."""

import json
import os

import pytest
import torch as th
from test_programs import ROOT, done, refused, rows, samples, stranger
from test_world import MPIEXEC, TORCHRUN, assert_same_run, digits, words  # noqa: F401  (digits is a fixture)

from guided_diffusion import checkpoint

TWO = [*TORCHRUN, "2"]
MORE = "--ema_rate 0.5,0.9 --grad_clip 0.5 --microbatch 2 --weight_decay 0.01 --num_heads 2"


def line(digits, folder, kind, *, batch=4, iterations=20, name="image_train"):  # noqa: F811
    more = MORE if name == "image_train" else "--microbatch 2"
    more += f" --sharding {kind} --val_data_dir {digits}/digits/train --eval_interval 5 --save_interval 10"
    return words(name, digits, folder, batch=batch, iterations=iterations, more=more)


def train(*args, launcher=TWO, name="image_train", **how):
    digits, *_ = args  # noqa: F811
    return stranger(f"scripts/{name}.py", line(*args, name=name, **how), digits, launcher).stdout


@pytest.fixture(scope="module")
def alone(digits):  # noqa: F811
    """The run of one process."""
    train(digits, digits / "alone", "fsdp", batch=8, launcher=[])  # nothing to share: as without
    return digits / "alone"


def assert_same_files(ours, theirs):
    """The same names, and within them the same keys, shapes and types; whole numbers are equal."""

    def form(value):
        if isinstance(value, th.Tensor):
            return (value.shape, value.dtype)
        if isinstance(value, dict):
            return {key: form(each) for key, each in value.items()}
        return [form(each) for each in value] if isinstance(value, (list, tuple)) else value

    names = [sorted(path.name for path in folder.glob("*.pt")) for folder in (ours, theirs)]
    assert names[0] == names[1] and len(names[0]) >= 4
    for name in names[0]:
        found, expected = (checkpoint.load(folder / name) for folder in (ours, theirs))
        if not name.startswith("state"):
            assert form(found) == form(expected), name


def distance(ours, theirs, name):
    found, expected = (th.cat([value.flatten() for value in checkpoint.load(folder / name).values()])
                       for folder in (ours, theirs))  # fmt: skip
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["image_train", "classifier_train"])
def test_shared_and_whole_networks_train_alike(name, digits):  # noqa: F811
    whole, shared = digits / f"whole_{name}", digits / f"shared_{name}"
    train(digits, whole, "none", name=name)
    train(digits, shared, "fsdp", name=name)
    assert_same_run(whole, shared)
    assert_same_files(whole, shared)
    for ours, theirs in zip(rows(shared), rows(whole), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds"}:
            tolerance = {"rel": 1e-4, "abs": 1e-5}
            assert float(ours[key] or 0) == pytest.approx(float(theirs[key] or 0), **tolerance), key
    for path in shared.glob("ema*020.pt"):
        assert distance(shared, whole, path.name) < 1e-4
