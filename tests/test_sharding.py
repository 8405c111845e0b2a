"""A network shared by two processes trains, saves and goes on as one that each of them holds whole."""

import re
import shutil

import pytest
import torch as th
from test_programs import done, refused, rows, same, shell, stranger
from test_world import MPIEXEC, TORCHRUN, assert_same_run, end, start, words

from guided_diffusion import checkpoint

TWO = [*TORCHRUN, "2"]
MORE = "--ema_rate 0.5,0.9 --grad_clip 3 --microbatch 2 --weight_decay 0.01 --num_heads 2"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    stranger("datasets/digits.py", "digits", folder)
    return folder


def line(digits, folder, kind, *, batch=4, iterations=20, name="image_train"):
    more = MORE if name == "image_train" else "--microbatch 2"
    more += f" --sharding {kind} --val_data_dir {digits}/digits/train --eval_interval 5 --save_interval 10"
    return words(name, digits, folder, batch=batch, iterations=iterations, more=more)


def train(*args, launcher=TWO, name="image_train", **how):
    digits, *_ = args
    return stranger(f"scripts/{name}.py", line(*args, name=name, **how), digits, launcher).stdout


@pytest.fixture(scope="module")
def alone(digits):
    """The run of one process."""
    done("image_train", line(digits, digits / "alone", "fsdp", batch=8))  # nothing to share: as without
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
    configs = [checkpoint.read_config(folder / "model000020.pt") for folder in (ours, theirs)]
    assert configs[0] == configs[1]


def distance(ours, theirs, name="model000020.pt"):
    found, expected = (th.cat([value.flatten() for value in checkpoint.load(folder / name).values()])
                       for folder in (ours, theirs))  # fmt: skip
    return ((found - expected).norm() / expected.norm()).item()


def assert_same_rows(ours, theirs):
    for found, expected in zip(rows(ours), rows(theirs), strict=True):
        keys = found.keys() - {"seconds"}
        assert keys == expected.keys() - {"seconds", "grad_noise_scale"}  # which shared networks do not tell
        for key in keys:
            tolerance = {"rel": 1e-4, "abs": 1e-6} if "norm" in key or "distance" in key else {"rel": 1e-5, "abs": 1e-6}
            assert float(found[key] or 0) == pytest.approx(float(expected[key] or 0), **tolerance), key


@pytest.mark.parametrize("name", ["image_train", pytest.param("classifier_train", marks=pytest.mark.slow)])
def test_shared_and_whole_networks_train_alike(name, digits):
    """The same rows of the log, weights, averages, moments and samples, in files of the same form."""
    whole, shared = (trained(digits, kind, name) for kind in ("none", "fsdp"))
    found = re.search(r"is shared: (\d+) of its (\d+) weights are held", (shared / "log.txt").read_text())
    assert 0.5 <= int(found[1]) / int(found[2]) < 0.51
    assert_same_rows(shared, whole)
    assert_same_files(whole, shared)
    for path in [shared / "model000020.pt", *shared.glob("ema*020.pt")]:
        assert distance(shared, whole, path.name) < 1e-5
    found, expected = (checkpoint.load(folder / "opt000020.pt")["state"] for folder in (shared, whole))
    for i, held in expected.items():
        for key, value in held.items():
            th.testing.assert_close(found[i][key], value, rtol=1e-4, atol=1e-7)


def test_a_shared_network_trains_as_one_process_does(digits, alone):
    assert_same_run(alone, trained(digits, "fsdp"))


def trained(digits, kind, name="image_train"):
    """The run of two processes, made when it is first asked for."""
    folder = digits / f"{kind}_{name}"
    if not folder.exists():
        train(digits, folder, kind, name=name)
    return folder


def half(run, folder):
    """A copy of a run as it was after ten updates."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*000020*", ".lock"))
    return folder


def test_a_shared_run_goes_on_bit_for_bit(digits, tmp_path):
    shared = trained(digits, "fsdp")
    run = half(shared, tmp_path / "run")
    train(digits, run, "fsdp")
    for path in shared.glob("*000020.pt"):
        assert same(checkpoint.load(run / path.name), checkpoint.load(path)), path.name
    assert_same_rows(run, shared)


@pytest.mark.slow
@pytest.mark.parametrize("turn", ["shared, then one process", "one process, then shared"])
def test_a_run_goes_on_shared_or_not(turn, digits, alone, tmp_path):
    if turn.startswith("shared"):
        run = half(trained(digits, "fsdp"), tmp_path / "run")
        train(digits, run, "none", batch=8, launcher=[])
    else:
        run = half(alone, tmp_path / "run")
        train(digits, run, "fsdp", launcher=[MPIEXEC, "-n", "2"] if MPIEXEC else TWO)
    assert_same_run(alone, run)
    assert_same_files(run, alone)


@pytest.mark.slow
def test_a_shared_run_stops_where_nothing_is_finite(digits, tmp_path):
    """Both processes say so, whichever of them has the weight, and none waits for the other."""
    run = half(trained(digits, "fsdp"), tmp_path / "run")
    weights = checkpoint.load(run / "model000010.pt")
    weights["input_blocks.0.0.weight"][0] = th.nan
    checkpoint.save(weights, run / "model000010.pt")
    (run / "commit000010.json").unlink()
    code, out = end(start("image_train", f"{line(digits, run, 'fsdp')} --max_bad_steps 5", digits, TWO))
    assert code != 0 and "not finite in 5 updates in a row" in out
    assert "first not finite: the weight input_blocks.0.0.weight" in out and "lost another process" not in out


def test_what_cannot_be_shared(digits, tmp_path):
    words = line(digits, tmp_path / "run", "fsdp")
    refused("image_train", f"{words} --use_fp16 True", "none, or, in precision fp32, fsdp; not fsdp in fp16")
    refused("image_train", f"{words} --sharding zero", "choose from .none., .fsdp.")


WORKER = """
import sys
import torch
import torch.distributed as dist
from guided_diffusion import dist_util, sharding
from guided_diffusion.unet import UNetModel

def main():
    dist_util.setup_dist("cpu")
    torch.manual_seed(0)
    net = UNetModel(8, 1, 32, 1, 1, (1,), channel_mult=(1, 2), num_classes=3)
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    whole = {name: value.clone() for name, value in net.state_dict().items()}
    sharding.shard(net)
    named = dict(net.named_parameters())
    parts = {name: sharding.local(p) for name, p in named.items()}
    share = sum(part.numel() for part in parts.values()) / sum(value.numel() for value in whole.values())
    assert abs(share - 0.5) < 0.01, share
    assert len(sharding.blocks(net)) == 9
    for name, part in parts.items():
        back = sharding.whole(part, named[name])
        assert (back is None) == (dist.get_rank() == 1)
        assert back is None or torch.equal(back, whole[name])
        assert torch.equal(sharding.part_of(whole[name], named[name]), part)
    norm = torch.linalg.vector_norm(torch.stack([part.norm() for part in parts.values()]))
    expected = torch.linalg.vector_norm(torch.stack([value.norm() for value in whole.values()]))
    torch.testing.assert_close(sharding.total_norm(norm), expected)
    try:
        sharding.part_of(torch.zeros(7, 3), named["label_emb.weight"])
    except ValueError as error:
        assert "of shape (7, 3) where (3, 128) is needed" in str(error)
    else:
        raise AssertionError
    dist_util.finish()

with dist_util.leaving():
    main()
"""


@pytest.mark.slow
def test_each_process_holds_a_part(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    result = shell(["worker.py"], tmp_path, TWO)
    assert result.returncode == 0, result.stderr
