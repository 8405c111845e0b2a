"""What the doctor says is so: memory counted exactly, a microbatch that is remembered, and parts that fail alone."""

import json
import os
import re
import time

import pytest
import test_programs
import torch as th
from test_programs import CLASSIFIER, MPIEXEC, NET, TRAIN, done, refused, rows, run, shell, stranger
from torch import nn

from guided_diffusion import config, doctor, memory, rehearsal
from guided_diffusion.network_options import ClassifierOptions, DiffusionOptions, ModelOptions
from guided_diffusion.training_options import TrainOptions

CPU = th.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    stranger("datasets/digits.py", "digits", folder)
    return folder / "digits"


@pytest.fixture
def quick(monkeypatch):
    """The doctor in place of a script, measuring for an instant."""
    paced = doctor.paced
    monkeypatch.setattr(doctor, "paced", lambda *args, **how: paced(*args, **{**how, "seconds": 0.01}))
    monkeypatch.setattr(test_programs, "script", lambda name: doctor)


def options(*words):
    return config.parse("a test", TrainOptions, ModelOptions, DiffusionOptions, argv=[*NET.split(), *words])


def flags_of(*words):
    return config.flags_of(options(*words), ModelOptions, DiffusionOptions)


# ------------------------------------------------------------------------------------------------------------ memory


def test_what_a_step_holds_is_counted_exactly():
    """Against the tensors that stand there after a step."""
    args = options("--ema_rate", "0.9,0.99", "--ema_power", "0.1", "--class_cond", "--num_classes", "3")
    step = rehearsal.Step("diffusion", args, config.flags_of(args, ModelOptions, DiffusionOptions), CPU)
    step(4, 2)
    params, masters = step.precision.model_params, step.precision.master_params

    def count(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    moments = [each[name] for each in step.opt.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert memory.fixed_bytes(params, masters, len(step.averages)) == {
        "weights": 4 * sum(p.numel() for p in step.task.net.parameters()),
        "gradients": count(p.grad for p in params),
        "moments of AdamW": count(moments),
        "averages": count(p for params in step.ema_params for p in params),
    }


def test_half_precision_has_copies_of_what_it_halves():
    full, half = nn.Parameter(th.zeros(10)), nn.Parameter(th.zeros(100, dtype=th.float16))
    copy = nn.Parameter(th.zeros(100))
    weights = 40 + 200 + 400
    assert memory.fixed_bytes([full, half], [full, copy], 1) == {
        "weights": weights, "gradients": weights, "moments of AdamW": 2 * 440, "averages": 440,
    }  # fmt: skip


def test_activations_of_a_layer_that_is_known_by_hand():
    layer, x = nn.Linear(3, 5, bias=False), th.randn(7, 3)
    # The layer keeps its input [7,3] for the weight's gradient, the square its own [7,5].
    assert memory.activation_bytes(lambda: layer(x).square().sum(), but=layer.parameters()) == 4 * (21 + 35)

    def twice():  # the product keeps the input of both layers and, once, the two factors of the product
        a, b = layer(x), layer(x)
        return (a * b).sum() + (a * b).sum()

    assert memory.activation_bytes(twice, but=layer.parameters()) == 4 * (21 + 2 * 35)
    second = nn.Linear(5, 2, bias=False)
    both = [*layer.parameters(), *second.parameters()]
    assert memory.activation_bytes(lambda: second(layer(x)).sum(), but=both) == 4 * (21 + 35)
    assert memory.activation_bytes(lambda: second(layer(x)).sum()) == 4 * (21 + 35 + 10)


def test_activations_grow_with_the_images_and_fall_when_recomputed():
    def count(n, *words):
        step = rehearsal.Step("diffusion", options(*words), flags_of(*words), CPU)
        return memory.activation_bytes(lambda: step.loss(*step.batch(n)), but=step.precision.model_params)

    assert count(6) - count(4) == count(4) - count(2) and count(4) > 1.9 * count(2)
    assert count(4, "--use_checkpoint") < 0.5 * count(4)


@pytest.mark.parametrize("most", [1, 2, 6, 64])
@pytest.mark.parametrize("room", [0, 1, 3, 4, 63, 1000])
@pytest.mark.parametrize("error", [th.OutOfMemoryError("no room"), RuntimeError("MPS backend out of memory")])
def test_the_largest_microbatch_is_found_by_trying(most, room, error):
    tried = []

    def attempt(n):
        tried.append(n)
        if n > room:
            raise error

    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < most] + [most]
    assert memory.largest_that_fits(attempt, most) == max([n for n in sizes if n <= room], default=0)
    assert tried == sizes[: len(tried)] and max(tried[:-1], default=0) <= room


def test_another_error_while_trying_is_not_taken_for_a_lack_of_room():
    def attempt(n):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        memory.largest_that_fits(attempt, 4)


@pytest.mark.parametrize("free, fits", [(1000, 6), (900, 4), (200, 0), (299, 1), (0, 0)])
def test_the_estimated_microbatch(free, fits):
    """0.7 of what is free, less 107, in images of 100: 593 -> 6 (all); 523 -> 5 -> 4; 33 -> 0; 102 -> 1."""
    assert memory.estimated_fit(free, 107, 100, 6 if free != 1000 else 5) == (5 if free == 1000 else fits)


def test_the_note_is_for_one_device_and_network(tmp_path):
    flags = flags_of()
    assert memory.recall(tmp_path, CPU, flags) == (-1, "")
    memory.remember(tmp_path, CPU, flags, 4, batch_size=8)
    fits, said = memory.recall(tmp_path, CPU, flags)
    assert fits == 4 and said.startswith("--microbatch 4")
    assert memory.recall(tmp_path, CPU, flags | {"noise_schedule": "linear"})[0] == 4  # takes no memory
    for other in ({"num_channels": 64}, {"use_checkpoint": True}, {"learn_sigma": True}):
        fits, said = memory.recall(tmp_path, CPU, flags | other)
        assert fits == -1 and "another device or network: not used" in said
    assert memory.recall(tmp_path, th.device("mps"), flags)[0] == -1
    for text in ("{", "[]", '{"format": 2}', '{"format": 1, "device": "cpu"}'):
        (tmp_path / "doctor.json").write_text(text)
        with pytest.raises(ValueError, match=r"doctor.json cannot be read .*delete it, or give --microbatch"):
            memory.recall(tmp_path, CPU, flags)


# ------------------------------------------------------------------------------------------------------- the program


def test_a_whole_examination_and_training_that_heeds_it(quick, digits, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    said = done("doctor", f"{NET} --data_dir {digits}/train --batch_size 8 --num_workers 0 --ema_rate 0.9,0.99"
                f" --log_dir {folder} --write True").out  # fmt: skip
    parts = [line.split(":")[0] for line in said.splitlines()]
    assert list(dict.fromkeys(part for part in parts if part in doctor.PARTS)) == list(doctor.PARTS)
    assert "not found out" not in said and "renaming over a file is atomic" in said
    flags = flags_of()
    count = sum(p.numel() for p in rehearsal.Step("diffusion", options(), flags, CPU).precision.model_params)
    assert f"network: {count:,} parameters, 2 average(s)" in said
    for name, times in {"weights": 1, "gradients": 1, "moments of AdamW": 2, "averages": 2}.items():
        assert f"network: {name}: {4 * times * count / 2**20:.1f} MiB" in said
    trained, read = (float(re.search(rf"{part}: (\S+) images a second", said)[1]) for part in ("training", "loader"))
    slower = "training; the data come" if read > trained else "the data ("
    assert trained > 0 and f"bottleneck: {slower}" in said
    note = json.loads((folder / "doctor.json").read_text())
    assert (note["microbatch"], note["device"]) == (8, "cpu") and note["bytes"]["weights"] == 4 * count
    assert sorted(path.name for path in folder.iterdir()) == ["doctor.json"]

    (folder / "doctor.json").write_text(json.dumps(note | {"microbatch": 2}))
    monkeypatch.undo()
    words = f"{NET} --data_dir {digits}/train {TRAIN} --iterations 2 --log_dir"
    told = done("image_train", f"{words} {folder}").out
    assert f"--microbatch 2, which {folder}/doctor.json says fits" in told
    assert "grad_noise_scale" in rows(folder)[0]  # which only a batch in parts can tell
    (tmp_path / "typed").mkdir()
    (tmp_path / "typed/doctor.json").write_text((folder / "doctor.json").read_text())
    told = done("image_train", f"{words} {tmp_path}/typed --microbatch 8").out
    assert "doctor.json" not in told and "grad_noise_scale" not in rows(tmp_path / "typed")[0]
    (folder / "doctor.json").write_text("{")
    refused("image_train", f"{words} {folder} --iterations 3", "doctor.json cannot be read")


def test_one_part_that_fails_leaves_the_others_alone(quick, digits, tmp_path, monkeypatch):
    def broken(found):
        yield "so far"
        raise RuntimeError("the disk\nis gone")

    monkeypatch.setitem(doctor.PARTS, "disk", broken)
    result = refused("doctor", f"{NET} --batch_size 2 --log_dir {tmp_path}", "for the reasons above: disk$")
    assert "disk: so far\ndisk: not found out: the disk is gone\npackages: torch" in result.out
    assert "bottleneck: not known without both" in result.out


@pytest.mark.parametrize("words, failing, reason", [
    ("--data_dir nowhere", ["loader"], "loader: not found out: .*nowhere"),
    ("--channel_mult 1,x", ["network", "training"], "network: not found out: cannot read channel_mult '1,x'"),
    ("--ema_power 0.5", ["network", "training"], "network: not found out: the relative width"),
])  # fmt: skip
def test_bad_options_are_named_by_the_parts_that_need_them(quick, tmp_path, words, failing, reason):
    result = refused("doctor", f"{NET} --log_dir {tmp_path} {words}", f"for the reasons above: {', '.join(failing)}$")
    assert re.search(reason, result.out) and "packages: torch" in result.out


@pytest.mark.parametrize("words, message", [
    ("--write True", "--write True needs --log_dir"),
    ("--device cuda:99", "device 'cuda:99' is not available here"),
    ("--batch_size 0", "--batch_size must be 1 or more"),
    ("--data_dri x", "unknown flag --data_dri; did you mean --data_dir"),
    ("--batch_size many", "invalid|whole number"),
])  # fmt: skip
def test_what_cannot_be_is_refused_at_once(quick, words, message):
    assert not refused("doctor", words, message).out


def test_without_a_network_it_is_quick_and_says_what_to_give(quick, tmp_path):
    said = run("doctor", f"--log_dir {tmp_path}").out
    assert "network: give the flags of the network" in said and "parameters" not in said and "packages: torch" in said


def test_a_rename_in_two_parts_is_noticed(tmp_path, monkeypatch):
    assert doctor.atomic_renames(str(tmp_path / "file"))

    def in_parts(source, target):
        with open(source, "rb") as file:
            content = file.read()
        with open(target, "wb") as file:
            file.write(content[:100])
            file.flush()
            time.sleep(0.001)
            file.write(content[100:])

    monkeypatch.setattr(os, "replace", in_parts)
    assert not doctor.atomic_renames(str(tmp_path / "file2"), times=20)


def test_a_classifier_is_looked_at_and_trained_as_remembered(quick, digits, tmp_path, monkeypatch):
    words = f"{CLASSIFIER} --num_classes 10 --data_dir {digits}/train --batch_size 8 --num_workers 0"
    said = done("doctor", f"--kind classifier {words} --log_dir {tmp_path} --write True").out
    args = config.parse("a test", TrainOptions, ClassifierOptions, DiffusionOptions,
                        argv=[*CLASSIFIER.split(), "--num_classes", "10"])  # fmt: skip
    flags = config.flags_of(args, ClassifierOptions, DiffusionOptions)
    count = sum(p.numel() for p in rehearsal.Step("classifier", args, flags, CPU).precision.model_params)
    assert f"network: {count:,} parameters, 0 average(s)" in said and "not found out" not in said
    assert "averages: 0.0 MiB" in said and "bottleneck: " in said
    note = json.loads((tmp_path / "doctor.json").read_text())
    assert note["microbatch"] == 8 and note["network"]["classifier_width"] == 32
    (tmp_path / "doctor.json").write_text(json.dumps(note | {"microbatch": 4}))
    monkeypatch.undo()
    told = done("classifier_train", f"{words} --iterations 1 --save_interval 9 --log_dir {tmp_path}").out
    assert f"--microbatch 4, which {tmp_path}/doctor.json says fits" in told
    assert memory.recall(tmp_path, CPU, flags_of())[0] == -1  # a diffusion model is another network


def test_processes_that_differ_from_the_first_are_named(monkeypatch):
    def place(**how):
        return doctor.SimpleNamespace(**{"host": "a", "device": "cpu", "software": {"torch": "2.13", "numpy": "2"},
                                         "sees_folder": True, **how})  # fmt: skip

    alike = doctor.SimpleNamespace(places=[place(), place()], exchange_seconds=0.5, folder="/runs")
    said = list(doctor.launcher(alike))
    assert said[1:] == ["rank 0 on a, device cpu", "rank 1 on a, device cpu", "128 MiB/s from rank 0 to all others"]
    alike.places.append(place(host="b", software={"torch": "2.6", "numpy": "2"}, sees_folder=False))
    assert list(doctor.launcher(alike))[3:-1] == [
        "rank 2 on b, device cpu",
        "rank 2 does not see /runs, where checkpoints to go on from must lie: choose another",
        "rank 2 has other software than rank 0: torch 2.13 -> 2.6",
    ]


def test_too_many_threads_are_named(monkeypatch):
    here = doctor.SimpleNamespace(host=doctor.socket.gethostname())
    found = doctor.SimpleNamespace(places=[here] * 4)
    monkeypatch.setattr(doctor, "_cores", lambda: range(4))
    monkeypatch.setattr(th, "get_num_threads", lambda: 2)
    said = list(doctor.threads(found))
    assert said[1:] == ["the processes here want 8 threads for 4 cores: export OMP_NUM_THREADS=1"]
    monkeypatch.setattr(th, "get_num_threads", lambda: 1)
    assert len(list(doctor.threads(found))) == 1


@pytest.mark.skipif(not MPIEXEC, reason="no mpiexec")
def test_two_processes_are_named_once(tmp_path):
    result = shell(["-m", "guided_diffusion.doctor", "--log_dir", tmp_path], tmp_path, [MPIEXEC, "-n", "2"])
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("launcher")]
    assert re.fullmatch(r"launcher: (Open )?MPI, 2 process\(es\)", lines[0])
    assert [line.split(" on ")[0] for line in lines[1:3]] == ["launcher: rank 0", "launcher: rank 1"]
    assert re.fullmatch(r"launcher: \d+ MiB/s from rank 0 to all others", lines[3]) and len(lines) == 4
    assert result.stdout.count("packages: torch") == 1
