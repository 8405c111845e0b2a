"""The programs from end to end at tiny size: what they write, what they draw, and what they say to bad input."""

import contextlib
import csv
import functools
import importlib.util
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from PIL import Image
from test_config import MODULES

from guided_diffusion import checkpoint, config, dist_util, ema, generate, logger, program, sampling, train_util
from guided_diffusion.image_datasets import load_data
from guided_diffusion.network_options import DiffusionOptions, ModelOptions
from guided_diffusion.script_util import create_model_and_diffusion, open_classifier, open_diffusion
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.unet import EncoderUNetModel, UNetModel

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
MPIEXEC = shutil.which("mpiexec", path=f"{BIN}:{os.environ.get('PATH', '')}")
PROGRAMS = ["image_train", "image_sample", "image_nll", "classifier_train", "classifier_sample", "super_res_train",
            "super_res_sample", "clip_train", "prior_train", "decoder_train", "text_to_image_sample"]  # fmt: skip

NET = (
    "--image_size 8 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1"
    " --attention_resolutions 4 --noise_schedule cosine"
)
CLASSIFIER = (
    "--image_size 8 --image_channels 1 --classifier_width 32 --classifier_depth 1 --classifier_channel_mult 1,1"
    " --classifier_attention_resolutions 4 --classifier_num_head_channels 16 --noise_schedule cosine"
)
# A few large steps, so that networks that begin by returning zeros have something to say.
TRAIN = "--batch_size 8 --lr 1e-2 --log_interval 1 --random_flip False --num_workers 0"


# ------------------------------------------------------------------------------------------------- running a program


@functools.cache
def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, words, **env):
    """A program in this process, with more in its environment: SimpleNamespace of exit code, out and err."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *shlex.split(words)])
        patch.setattr(logger.Logger, "CURRENT", None)
        for variable in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "GD_DEBUG", "DIFFUSION_TRAINING_TEST"):
            patch.delenv(variable, raising=False)
        for variable, value in env.items():
            patch.setenv(variable, value)
        try:
            program.run(script(name).main)
        except SystemExit as end:
            code = end.code
        finally:
            dist_util.finish()
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def done(name, words, **env):
    result = run(name, words, **env)
    assert result.code == 0, result.err
    return result


def refused(name, words, *patterns):
    """The program ends with code 2 and, progress bars aside, one line on stderr, in which the patterns are found."""
    result = run(name, words)
    bars = r"training:|sampling:|measuring |\s*$"
    lines = [line for line in re.split(r"[\r\n]+", result.err) if not re.match(bars, line)]
    assert result.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.err
    for pattern in patterns:
        assert re.search(pattern, lines[0]), lines[0]
    return result


def shell(words, folder, launcher=()):
    """A command as a stranger runs it: from another folder, with an environment that knows nothing of the project."""
    env = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [*launcher, *([] if "torchrun" in launcher else [sys.executable]), *map(str, words)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def stranger(name, words, folder, launcher=()):
    result = shell([ROOT / name, *shlex.split(words)], folder, launcher)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result


def same(a, b):
    """Whether nested dicts, lists and tensors are equal, bit for bit."""
    if isinstance(a, th.Tensor):
        return th.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def rows(folder):
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def samples(folder):
    """(name, uint8 images, labels or None) of the one npz in a folder."""
    (path,) = folder.glob("*.npz")
    with np.load(path, allow_pickle=False) as npz:
        assert set(npz.files) <= {"arr_0", "arr_1"}
        return path.name, npz["arr_0"], npz["arr_1"] if "arr_1" in npz.files else None


def edited(folder, target, **flags):
    """A copy of a trained folder with other flags in its config.json; class_names stand beside the flags."""
    shutil.copytree(folder, target)
    content = json.loads((target / "config.json").read_text())
    content["class_names"] = flags.pop("class_names", content["class_names"])
    content["flags"].update(flags)
    (target / "config.json").write_text(json.dumps(content))
    return target


# ------------------------------------------------------------------------------------------------------ what to run on


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def digits(home):
    said = stranger("datasets/digits.py", "digits", home).stdout
    assert said == "wrote 1438 images to digits/train and 359 to digits/val\n"
    return home / "digits"


@pytest.fixture(scope="module")
def pets(digits):
    """48 real digits under the names of three classes, and 24 more to validate on."""
    folder = digits.parent / "pets"
    for split, first, count in (("train", 0, 16), ("val", 16, 8)):
        (folder / split).mkdir(parents=True)
        for digit, name in enumerate(("ant", "bee", "cat")):
            files = sorted((digits / "train").glob(f"{digit}_*.png"))[first : first + count]
            for file in files:
                shutil.copy(file, folder / split / f"{name}_{file.name}")
    return folder


@pytest.fixture(scope="module")
def plain(home, digits):
    """An unconditional model of digits."""
    stranger("scripts/image_train.py", f"--data_dir digits/train {NET} {TRAIN} --iterations 8 --log_dir plain", home)
    return home / "plain"


@pytest.fixture(scope="module")
def cond(home, pets):
    """A model of three classes, in a network with room for the default of 1,000, with a learned variance."""
    done("image_train", f"--data_dir {pets}/train {NET} {TRAIN} --class_cond True --learn_sigma --iterations 8"
         f" --save_interval 5 --ema_rate 0.5,0.9 --log_dir {home}/cond")  # fmt: skip
    return home / "cond"


@pytest.fixture(scope="module")
def classifier(home, pets):
    words = f"--data_dir pets/train --val_data_dir pets/val --num_classes 3 {CLASSIFIER} {TRAIN}"
    stranger("scripts/classifier_train.py", f"{words} --iterations 10 --eval_interval 5 --log_dir classifier", home)
    return home / "classifier"


def model_of(folder):
    return checkpoint.latest(folder)


# ------------------------------------------------------------------------------------------------------------ training


def test_training_writes_checkpoints_options_and_a_log(cond, pets):
    kinds = ("commit", "ema_0.5_", "ema_0.9_", "model", "opt", "state")
    files = [f"{kind}{step}.{'json' if kind == 'commit' else 'pt'}" for kind in kinds for step in ("000005", "000008")]
    assert names(cond) == sorted(["config.json", "log.txt", "progress.csv", "run.json", *files])
    content = json.loads((cond / "config.json").read_text())
    assert (content["kind"], content["class_names"]) == ("diffusion", ["ant", "bee", "cat"])
    typed = {"image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1",
             "attention_resolutions": "4", "noise_schedule": "cosine"}  # fmt: skip
    typed |= {"class_cond": True, "learn_sigma": True}
    usual = config.defaults(ModelOptions, DiffusionOptions)
    assert content["flags"] == usual | typed
    table = rows(cond)
    assert [row["step"] for row in table] == [str(n) for n in range(1, 9)]
    assert [row["samples"] for row in table] == [str(8 * n) for n in range(1, 9)]
    assert {"loss", "mse", "vb", "loss_q0", "mse_q3", "grad_norm", "param_norm", "lr", "seconds"} <= set(table[0])
    assert float(table[0]["mse"]) == pytest.approx(1, abs=0.3)  # a new network returns zeros, the noise has variance 1
    assert float(table[-1]["mse"]) < float(table[0]["mse"]) - 0.1
    log = (cond / "log.txt").read_text()
    assert "* num_channels             32" in log and f"48 images in {pets}/train, labels: file-name prefix" in log
    assert "num_classes is 1000 but the data have 3: --num_classes 3 would do" in log


def test_a_classifier_of_three_classes_trains_on_a_cpu(classifier):
    files = ["commit000010.json", "model000010.pt", "opt000010.pt", "state000010.pt"]
    assert names(classifier) == sorted(["config.json", "log.txt", "progress.csv", "run.json", *files])
    content = json.loads((classifier / "config.json").read_text())
    assert (content["kind"], content["class_names"]) == ("classifier", ["ant", "bee", "cat"])
    assert content["flags"]["classifier_width"] == 32 and content["flags"]["noise_schedule"] == "cosine"
    assert "num_channels" not in content["flags"]
    table = rows(classifier)
    assert [row["step"] for row in table if row["val_loss"]] == ["5", "10"]
    for row in table:
        assert float(row["train_acc@3"]) == 1 and 0 <= float(row["train_acc@1"]) <= 1  # top 3 of 3; top 5 do not exist
    assert {float(row["val_acc@3"]) for row in table if row["val_loss"]} == {1}
    assert checkpoint.load(model_of(classifier))["out.2.c_proj.weight"].shape[0] == 3


def test_a_classifier_of_clean_images_learns_them(pets, tmp_path):
    done("classifier_train", f"--data_dir {pets}/train --val_data_dir {pets}/val --num_classes 3 {CLASSIFIER} {TRAIN}"
         f" --noised False --random_crop False --lr 2e-3 --batch_size 24 --eval_interval 20 --iterations 40"
         f" --log_dir {tmp_path}")  # fmt: skip
    assert float(rows(tmp_path)[-1]["val_acc@1"]) >= 0.8  # chance is 1/3


@pytest.mark.parametrize("name, network, training", [
    ("image_train", f"{NET} --class_cond True --dropout 0.1", "--random_flip True --ema_rate 0.9"),
    ("classifier_train", f"{CLASSIFIER} --classifier_dropout 0.1", "--random_flip True --random_crop True"),
])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(name, network, training, pets, tmp_path):
    """Images, noise, averages and optimizer go on as if nothing had been; the network's options are in config.json."""
    words = f"--data_dir {pets}/train {TRAIN} {training}"
    done(name, f"{words} {network} --num_classes 3 --iterations 9 --log_dir {tmp_path}/whole")
    done(name, f"{words} {network} --num_classes 3 --iterations 4 --log_dir {tmp_path}/half")
    said = done(name, f"{words} --resume_checkpoint {tmp_path}/half/model000004.pt"
                f" --iterations 9 --log_dir {tmp_path}/rest").out  # fmt: skip
    assert f"going on from {tmp_path}/half/model000004.pt at update 4" in said
    files = [path.name for path in (tmp_path / "whole").glob("*000009.pt")]
    assert len(files) == (4 if name == "image_train" else 3)
    for file in files:
        assert same(*(checkpoint.load(tmp_path / folder / file) for folder in ("rest", "whole")))
    assert (tmp_path / "rest/config.json").read_text() == (tmp_path / "whole/config.json").read_text()
    ours, whole = rows(tmp_path / "rest"), rows(tmp_path / "whole")
    assert [row["step"] for row in ours] == ["5", "6", "7", "8", "9"]
    assert all(ours[-1][key] == whole[-1][key] for key in ours[-1] if key != "seconds")


def test_resumed_training_keeps_the_labels(cond, pets, tmp_path):
    """A folder that lacks the first class would else number the others anew."""
    (tmp_path / "data").mkdir()
    for path in (pets / "train").glob("[bc]*.png"):
        shutil.copy(path, tmp_path / "data")
    resume = f"--data_dir {tmp_path}/data {TRAIN} --resume_checkpoint {model_of(cond)} --iterations 9"
    done("image_train", f"{resume} --log_dir {tmp_path}/more")
    assert checkpoint.read_config(tmp_path / "more/model.pt")["class_names"] == ["ant", "bee", "cat"]
    shutil.copy(path, tmp_path / "data/dog_1.png")
    refused("image_train", f"{resume} --log_dir {tmp_path}/dogs", "class 'dog'.*not one of the 3 known.*ant, bee, cat")


def test_options_of_training_arrive(pets, tmp_path):
    """The annealed rate ends the run; clipping shows in the weights alone; the log goes where OPENAI_LOGDIR says."""
    words = f"--data_dir {pets}/train {NET} {TRAIN} --lr_anneal_steps 4 --microbatch 3 --use_checkpoint True"
    words += " --schedule_sampler loss-second-moment --weight_decay 0.1 --save_interval 3"
    said = done("image_train", words, OPENAI_LOGDIR=str(tmp_path / "log"), OPENAI_LOG_FORMAT="csv,json,stdout").out
    assert f"Logging to {tmp_path}/log" in said
    assert [float(row["lr"]) for row in rows(tmp_path / "log")] == [1e-2, 7.5e-3, 5e-3, 2.5e-3]
    assert {"model000003.pt", "model000004.pt", "progress.json"} < set(names(tmp_path / "log"))
    for name, clip in (("free", 0), ("clipped", 1e-9)):  # far below the 1e-8 that AdamW adds to its denominator
        done("image_train", f"{words} --weight_decay 0 --save_interval 1 --grad_clip {clip}"
             f" --log_dir {tmp_path}/{name}")  # fmt: skip
        first, second = (checkpoint.load(tmp_path / name / f"model00000{n}.pt")["out.2.bias"] for n in (1, 2))
        assert (abs(second - first).item() < 1e-3) == (name == "clipped")
        assert float(rows(tmp_path / name)[0]["grad_norm"]) > 1


def test_the_seed_decides_all_from_the_first_weights_on(pets, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        done("image_train", f"--data_dir {pets}/train {NET} {TRAIN} --seed {seed} --iterations 2"
             f" --lr 1e-9 --log_dir {tmp_path}/{name}")  # fmt: skip
    a, b, c = (checkpoint.load(tmp_path / name / "model000002.pt")["input_blocks.0.0.weight"] for name in "abc")
    assert th.equal(a, b) and (a - c).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------- several processes


def mean_gradient_of_two(data_dir):
    """What two ranks must arrive at after 3 updates: each one's gradient on its own images and noise, averaged."""
    th.manual_seed(0)
    flags = config.flags_of(config.parse("", ModelOptions, DiffusionOptions, argv=NET.split()),
                            ModelOptions, DiffusionOptions)  # fmt: skip
    model, diffusion = create_model_and_diffusion(**flags)
    loop = TrainLoop(model=model, diffusion=diffusion, data=None, batch_size=8, microbatch=-1, lr=1e-2, ema_rate="",
                     log_interval=1, save_interval=1, resume_checkpoint="")  # fmt: skip
    streams = [load_data(data_dir=data_dir, batch_size=8, image_size=8, image_channels=1, random_flip=False,
                         num_workers=0, rank=rank, num_ranks=2) for rank in (0, 1)]  # fmt: skip
    for step in range(3):
        loop.step = step
        gradients = []
        for rank in (0, 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist_util, "rank", lambda rank=rank: rank)
                patch.setattr(dist_util, "world_size", lambda: 2)
                loop.forward_backward(*next(streams[rank]))
            gradients.append([p.grad for p in model.parameters()])
        for p, *both in zip(model.parameters(), *gradients):
            p.grad = sum(both) / 2
        loop.opt.step()
    return model.state_dict()


def test_s08_46_two_processes_share_one_training(digits, home):
    """However they are launched: the mean gradient of both on every rank, and samples that count both."""
    words = f"--data_dir digits/train {NET} {TRAIN} --iterations 3"
    stranger("scripts/image_train.py", f"{words} --log_dir torchrun", home,
             ("torchrun", "--standalone", "--nproc_per_node", "2"))  # fmt: skip
    assert [row["samples"] for row in rows(home / "torchrun")] == ["16", "32", "48"]
    expected = mean_gradient_of_two(str(digits / "train"))
    ours = checkpoint.load(home / "torchrun/model000003.pt")
    assert list(ours) == list(expected)
    for key, value in expected.items():
        th.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)
    if MPIEXEC is None:
        pytest.skip("no mpiexec")
    stranger("scripts/image_train.py", f"{words} --log_dir mpi", home, (MPIEXEC, "-n", "2"))
    theirs = checkpoint.load(home / "mpi/model000003.pt")
    assert all(th.equal(ours[key], theirs[key]) for key in ours)
    assert "training: 100%" not in (home / "mpi/log-rank001.txt").read_text()


@pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec")
def test_two_processes_draw_the_bytes_of_one(cond, home):
    words = "--model_path cond/ema_0.5_000008.pt --num_samples 8 --batch_size 2 --timestep_respacing 4"
    stranger("scripts/image_sample.py", f"{words} --log_dir drawn_by_two", home, (MPIEXEC, "-n", "2"))
    done("image_sample", words.replace("cond/", f"{cond}/") + f" --log_dir {home}/drawn_by_one")
    one, two = samples(home / "drawn_by_one"), samples(home / "drawn_by_two")
    assert one[0] == two[0] == "samples_8x8x8x1.npz"
    assert np.array_equal(one[1], two[1]) and np.array_equal(one[2], two[2])
    assert len(np.unique(one[1], axis=0)) == 8


LEAVE = """
import os, torch
from guided_diffusion import dist_util

def train():
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    net(torch.ones(1, 2)).sum().backward()

def threads():
    return sum("gloo" in open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task"))

dist_util.setup_dist("cpu")
train()
before = threads()
dist_util.finish()
assert before > 0 == threads(), (before, threads())
"""


@pytest.mark.skipif(MPIEXEC is None or not os.path.isdir("/proc/self/task"), reason="no mpiexec, or not Linux")
def test_no_thread_of_the_group_outlives_it(home):
    """One that still wants the interpreter's lock when Python is gone aborts the process, after all work is done."""
    result = shell(["-c", LEAVE], home, (MPIEXEC, "-n", "2"))
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec")
def test_bad_input_ends_two_processes(pets, home):
    result = shell([ROOT / "scripts/image_train.py", *f"--data_dir pets/train {NET} {TRAIN} --batch_size 25".split()],
                   home, (MPIEXEC, "-n", "2"))  # fmt: skip
    assert result.returncode == 2 and "48 images, 24 for each of 2 rank(s)" in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------------------------- drawing


def test_a_path_is_enough_to_sample(plain, home):
    """An unconditional model: no labels, and a name that tells the shape."""
    said = stranger("scripts/image_sample.py",
                    "--model_path plain/ema_0.9999_000008.pt --num_samples 5 --batch_size 3 --timestep_respacing 4"
                    " --log_dir path_is_enough", home)  # fmt: skip
    assert re.search(r"sampling: 100%.* 8/8 \[00:\d\d<00:00, +[\d.]+step/s, images=5/5\]", said.stderr)
    assert "samples: path_is_enough/samples_5x8x8x1.npz" in said.stdout
    folder = home / "path_is_enough"
    assert names(folder) == ["log.txt", *(f"samples_5x8x8x1.{kind}" for kind in ("json", "npz", "png"))]
    _, images, labels = samples(folder)
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8 and labels is None
    assert min(Image.open(folder / "samples_5x8x8x1.png").size) > 40


def test_s08_34_pixels_are_truncated_and_the_name_tells_how_many(cond, tmp_path):
    """7 images in batches of 4: the program's bytes are those of the stream of floats, and no more than asked for."""
    path = f"{cond}/ema_0.9_000008.pt"
    done("image_sample", f"--model_path {path} --num_samples 7 --batch_size 4 --seed 5 --timestep_respacing 3"
         f" --grid False --log_dir {tmp_path}")  # fmt: skip
    name, images, labels = samples(tmp_path)
    assert name == "samples_7x8x8x1.npz" and names(tmp_path) == ["log.txt", "samples_7x8x8x1.json", name]
    assert images.dtype == np.uint8 and labels.dtype == np.int64 and labels.shape == (7,)
    model, diffusion, _ = open_diffusion(path, {"timestep_respacing": "3"})
    stream = generate.sample_stream(
        diffusion, model, shape=(1, 8, 8), num_samples=7, batch_size=4, seed=5, num_classes=3
    )
    parts = [(x.numpy(), y.numpy()) for _, x, y in stream]
    x, y = (np.concatenate(part) for part in zip(*parts))  # [N,C,H,W], [N]
    levels = np.floor(np.clip((x + 1) * 127.5, 0, 255))
    assert np.array_equal(images, levels.transpose(0, 2, 3, 1)) and np.array_equal(labels, y)
    assert len(np.unique(images)) > 50


def test_s08_36_random_labels_are_of_the_classes_that_were_trained(cond, tmp_path):
    done("image_sample", f"--model_path {model_of(cond)} --num_samples 60 --batch_size 60 --timestep_respacing 1"
         f" --log_dir {tmp_path}")  # fmt: skip
    counts = np.bincount(samples(tmp_path)[2], minlength=3)
    assert len(counts) == 3 and counts.min() >= 10  # and not evenly: the original's labels are random too
    assert len(set(counts)) > 1


def test_labels_without_names_are_numbered(tmp_path, digits):
    """An npz names no classes; yet no label is drawn that it does not have."""
    files = sorted((digits / "val").glob("[0-2]_*.png"))
    images = np.stack([np.array(Image.open(file)) for file in files])[..., None]
    np.savez(tmp_path / "data.npz", arr_0=images, arr_1=[int(file.name[0]) for file in files])
    done("image_train", f"--data_dir {tmp_path}/data.npz {NET} {TRAIN} --class_cond True --iterations 1"
         f" --log_dir {tmp_path}/model")  # fmt: skip
    done("image_sample", f"--model_path {tmp_path}/model/model000001.pt --num_samples 40 --batch_size 40"
         f" --timestep_respacing 1 --log_dir {tmp_path}/drawn")  # fmt: skip
    assert set(samples(tmp_path / "drawn")[2]) == {0, 1, 2}


@pytest.mark.parametrize("asked, labels", [
    ("all", [0, 1, 2, 0, 1, 2, 0]), ("0,2", [0, 2, 0, 2, 0, 2, 0]), ("bee", [1] * 7), ("cat,0", [2, 0, 2, 0, 2, 0, 2]),
])  # fmt: skip
def test_classes_are_drawn_in_turn(cond, tmp_path, asked, labels):
    done("image_sample", f"--model_path {model_of(cond)} --num_samples 7 --batch_size 3 --timestep_respacing 1"
         f" --classes {asked} --log_dir {tmp_path}")  # fmt: skip
    assert samples(tmp_path)[2].tolist() == labels


def test_s08_35_guided_samples_have_labels_though_the_model_is_unconditional(plain, classifier, home):
    words = "--model_path plain/model000008.pt --classifier_path classifier/model000010.pt --classifier_scale 2"
    words += " --timestep_respacing 4 --num_samples 6 --batch_size 4 --classes all --log_dir guided"
    stranger("scripts/classifier_sample.py", words, home)
    name, images, labels = samples(home / "guided")
    assert name == "samples_6x8x8x1.npz" and images.shape == (6, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2] and labels.dtype == np.int64
    assert (home / "guided/samples_6x8x8x1.png").exists()


@pytest.fixture
def floats(monkeypatch):
    """The samples [N,C,H,W] of each program that runs, before they become bytes."""
    seen = []

    def watched(stream, *where):
        def copied():
            for indices, x, y in stream:
                parts.append(x)
                yield indices, x, y

        parts = []
        drain(copied(), *where)
        seen.append(th.cat(parts))

    drain = program.drain
    monkeypatch.setattr(program, "drain", watched)
    return seen


HOW = {
    "ddpm": ("image_sample", "cond", ""),
    "ddim": ("image_sample", "cond", "--use_ddim True"),
    "reused": ("image_sample", "cond", "--reuse_every 2 --reuse_depth 2"),
    "guided ddpm": ("classifier_sample", "plain", "--classifier_scale 5"),
    "guided ddim": ("classifier_sample", "plain", "--classifier_scale 5 --use_ddim True"),
}


def draw_words(request, name, model, extra):
    words = f"--model_path {model_of(request.getfixturevalue(model))} {extra} --timestep_respacing 5"
    if name == "classifier_sample":
        words += f" --classifier_path {model_of(request.getfixturevalue('classifier'))}"
    return words


@pytest.mark.parametrize("how", HOW)
def test_image_i_depends_on_the_seed_and_i_alone(how, request, tmp_path, floats):
    """
    Sums are rounded in an order that depends on the shape of a batch, so floats agree to 2e-5 only; truncation makes
    one level of such a difference where a pixel lies that near to the next level. (The last row, which is
    nearly pure noise, is left out: there x_0 is eps times a thousand, rounding included.)
    """
    name, model, extra = HOW[how]
    words = draw_words(request, name, model, extra).replace("respacing 5", "respacing ddim5") + " --num_samples 8"
    for run_name, more in {"1": "--batch_size 1", "3": "--batch_size 3", "8": "--batch_size 8",
                           "other": "--batch_size 8 --seed 1"}.items():  # fmt: skip
        done(name, f"{words} {more} --log_dir {tmp_path}/{run_name}")
    one, three, eight, other = floats
    th.testing.assert_close(three, one, rtol=0, atol=2e-5)
    th.testing.assert_close(eight, one, rtol=0, atol=2e-5)
    assert (one.flatten(1)[:, None] - one.flatten(1)).abs().amax(-1)[~th.eye(8, dtype=bool)].min() > 0.1
    assert (eight - other).abs().flatten(1).amax(1).min() > 0.1
    (_, first, labels), *rest = (samples(tmp_path / size) for size in ("1", "3", "8"))
    for _, images, same in rest:
        assert np.array_equal(same, labels)
        apart = np.abs(images.astype(int) - first.astype(int))
        assert apart.max() <= 1 and (apart > 0).sum() <= 3


@pytest.fixture
def calls(monkeypatch):
    """Timesteps that each network is told, call by call."""
    seen = {UNetModel: [], EncoderUNetModel: []}
    for kind, told in seen.items():
        def forward(self, x, timesteps, *args, _forward=kind.forward, _told=told, **more):
            _told.append((len(x), *timesteps.unique().tolist()))
            return _forward(self, x, timesteps, *args, **more)

        monkeypatch.setattr(kind, "forward", forward)
    return seen


@pytest.mark.parametrize("extra, whole", [("", 5), ("--reuse_every 2", 3), ("--reuse_every 3 --reuse_depth 2", 3)])
def test_features_are_reused_as_asked(plain, classifier, tmp_path, floats, monkeypatch, extra, whole):
    """Of 5 rows, 4 to 0, the first is whole and those that the number divides; the gradient is new at each."""
    runs, forward = [], UNetModel._encode
    spy = lambda self, *args: (runs.append(len(args) < 4 or args[3] is None), forward(self, *args))[1]  # noqa: E731
    monkeypatch.setattr(UNetModel, "_encode", spy)
    words = f"--model_path {model_of(plain)} --classifier_path {model_of(classifier)} --timestep_respacing 5"
    words += f" --num_samples 2 --batch_size 2 --classifier_scale 3 --log_dir {tmp_path}"
    done("classifier_sample", f"{words}/a")
    runs.clear()
    done("classifier_sample", f"{words}/b {extra}")
    assert sum(runs) == whole and len(runs) == 5
    assert th.equal(*floats) == (not extra)


def test_scale_0_does_not_run_the_classifier(plain, classifier, tmp_path, calls, floats):
    words = f"--model_path {model_of(plain)} --classifier_path {model_of(classifier)} --timestep_respacing 5"
    words += " --num_samples 7 --batch_size 4"
    done("classifier_sample", f"{words} --classifier_scale 20 --log_dir {tmp_path}/guided")
    steps = [(4, t) for t in (999, 749, 500, 250, 0)] + [(3, t) for t in (999, 749, 500, 250, 0)]
    assert calls[UNetModel] == steps and calls[EncoderUNetModel] == steps
    done("classifier_sample", f"{words} --classifier_scale 0 --log_dir {tmp_path}/free")
    assert calls[UNetModel] == steps * 2 and calls[EncoderUNetModel] == steps
    (_, _, labels), (_, _, also) = samples(tmp_path / "guided"), samples(tmp_path / "free")
    assert np.array_equal(labels, also) and set(labels) <= {0, 1, 2}
    assert (floats[0] - floats[1]).abs().max() > 0.01


@pytest.mark.parametrize("respacing, steps", [
    ("5", (999, 749, 500, 250, 0)), ("ddim5", (800, 600, 400, 200, 0)), ("2,1", (500, 499, 0)), ("1", (0,)),
])  # fmt: skip
def test_respacing_is_obeyed(plain, tmp_path, calls, respacing, steps):
    done("image_sample", f"--model_path {model_of(plain)} --timestep_respacing {respacing} --num_samples 2"
         f" --log_dir {tmp_path}")  # fmt: skip
    assert calls[UNetModel] == [(2, t) for t in steps]


def test_use_ddim_is_obeyed(plain, tmp_path, floats):
    """DDIM with eta 0 is a function of the start; with noise, or ancestral, the images are others."""
    words = f"--model_path {model_of(plain)} --timestep_respacing ddim4 --num_samples 3 --batch_size 3"
    for k, extra in enumerate(("--use_ddim True", "--use_ddim", "--use_ddim True --eta 0.7", "--use_ddim False", "")):
        done("image_sample", f"{words} {extra} --log_dir {tmp_path}/{k}")
    model, diffusion, _ = open_diffusion(model_of(plain), {"timestep_respacing": "ddim4"})
    start = sampling.SeededNoise(0, range(3)).normal(1, 8, 8)
    expected = diffusion.ddim_sample_loop(model, start.shape, noise=start)
    for x in floats[:2]:
        th.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    assert all((x - expected).abs().max() > 0.05 for x in floats[2:])
    assert th.equal(floats[3], floats[4]) and not th.equal(floats[2], floats[3])


# --------------------------------------------------------------------------------------------- flags, config, weights


def test_typed_flags_win_over_config_json(plain, tmp_path, calls):
    folder = edited(plain, tmp_path / "model", timestep_respacing="4")
    words = f"--model_path {model_of(folder)} --num_samples 1"
    done("image_sample", f"{words} --log_dir {tmp_path}/as_told")
    assert [t for _, t in calls[UNetModel]] == [999, 666, 333, 0]
    calls[UNetModel].clear()
    done("image_sample", f"{words} --timestep_respacing 2 --log_dir {tmp_path}/as_typed")
    assert [t for _, t in calls[UNetModel]] == [999, 0]


@pytest.mark.parametrize("typed, told", [
    ("--num_channels 64", "num_channels 32"), ("--learn_sigma True", "learn_sigma False"),
    ("--class_cond True", "class_cond False"), ("--image_channels 3", "image_channels 1"),
])  # fmt: skip
def test_flags_that_the_weights_contradict(plain, tmp_path, typed, told):
    path = model_of(plain)
    refused("image_sample", f"--model_path {path} {typed} --num_samples 1 --log_dir {tmp_path}",
            f"{typed} contradicts the weights of {path}, which say {told}")  # fmt: skip


def test_a_config_that_the_weights_contradict(plain, tmp_path):
    path = model_of(edited(plain, tmp_path / "model", num_res_blocks=2))
    refused("image_sample", f"--model_path {path} --num_samples 1 --log_dir {tmp_path}",
            f"config.json beside {path} with num_res_blocks 2 contradicts the weights .* say num_res_blocks 1")


def test_a_classifier_must_fit_the_model(plain, classifier, cond, pets, tmp_path):
    def guide(model, guiding, *patterns):
        return refused("classifier_sample", f"--model_path {model_of(model)} --classifier_path {model_of(guiding)}"
                       f" --num_samples 2 --timestep_respacing 2 --log_dir {tmp_path}/out", *patterns)  # fmt: skip

    guide(plain, edited(classifier, tmp_path / "linear", noise_schedule="linear"),
          "the model has noise_schedule cosine and the classifier noise_schedule linear")  # fmt: skip
    guide(edited(plain, tmp_path / "large", image_size=16, attention_resolutions="8"), classifier,
          "the model has image_size 16 and the classifier image_size 8")  # fmt: skip
    guide(plain, edited(classifier, tmp_path / "steps", diffusion_steps=4000), "diffusion_steps 1000 .* 4000")
    guide(cond, classifier, "the model has num_classes 1000 and the classifier num_classes 3")
    done("image_train", f"--data_dir {pets}/train {NET} {TRAIN} --class_cond True --num_classes 3 --iterations 1"
         f" --log_dir {tmp_path}/three")  # fmt: skip
    guide(tmp_path / "three", edited(classifier, tmp_path / "names", class_names=["ant", "bee", "dog"]), "cat.*dog")
    done("classifier_sample", f"--model_path {model_of(tmp_path / 'three')} --classifier_path {model_of(classifier)}"
         f" --num_samples 2 --timestep_respacing 2 --log_dir {tmp_path}/fits")  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_flag_has_help_and_default(name):
    groups = {
        "image_train": "Train Watch Model Diffusion Run",
        "image_sample": "Sample Evaluate Model Diffusion Run",
        "image_nll": "NLL Model Diffusion Run",
        "super_res_train": "SuperResTrain SuperRes Diffusion Run",
        "super_res_sample": "SuperResSample Evaluate SuperRes Diffusion Run",
        "classifier_train": "ClassifierTrain Classifier Diffusion Run",
        "classifier_sample": "ClassifierSample Evaluate Model Diffusion Classifier Run",
        "clip_train": "ClipTrain Clip Run",
        "prior_train": "PriorTrain Prior PriorProcess Run",
        "decoder_train": "DecoderTrain Picture Decoder DecoderProcess Run",
        "text_to_image_sample": "TextToImage DecoderProcess Evaluate Run",
    }[name]
    every = {group: options for module in MODULES for group, options in vars(module).items()}
    expected = config.options(*(every[f"{group}Options"] for group in groups.split()))
    text = done(name, "--help").out
    found = dict(re.findall(r"^  --(\w+) \S+(.*?)(?=^  --|^\S|\Z)", text, re.MULTILINE | re.DOTALL))
    assert found.keys() == expected.keys()
    for flag, said in found.items():
        words = " ".join(said.split())
        assert re.search(r"\w+ .*\(default: .*\)$", words), f"--{flag} says only {words!r}"


# ----------------------------------------------------------------------------------------------------------- evaluating


def test_the_evaluator_scores_what_was_drawn(pets, classifier, plain, home):
    done("classifier_sample", f"--model_path {model_of(plain)} --classifier_path {model_of(classifier)}"
         f" --num_samples 12 --timestep_respacing 10 --classifier_scale 5 --log_dir {home}/to_score")  # fmt: skip
    files = sorted((pets / "train").glob("*.png"))
    np.savez(home / "reference.npz", arr_0=np.stack([np.array(Image.open(file)) for file in files])[..., None])
    said = stranger("evaluations/evaluator.py", "reference.npz to_score/samples_12x8x8x1.npz"
                    " --extractor classifier/model000010.pt --out scores.json", home).stdout  # fmt: skip
    scores = json.loads((home / "scores.json").read_text())
    network, _ = open_classifier(model_of(classifier))
    _, images, labels = samples(home / "to_score")
    x = th.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with th.no_grad():
        probabilities = network(x, th.zeros(12)).softmax(1)
    assert scores["label_agreement"] == pytest.approx((probabilities.argmax(1).numpy() == labels).mean())
    divergence = (probabilities * (probabilities.log() - probabilities.mean(0).log())).sum(1).mean()
    assert scores["inception_score"] == pytest.approx(divergence.exp().item(), rel=1e-4)
    assert scores["fid"] > 0 and f"FID: {scores['fid']}" in said and f"Recall: {scores['recall']}" in said


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad(home, pets, digits, plain, cond, classifier):
    """A folder of what nobody should have to feed to a program."""
    folder = home / "bad"
    (folder / "empty").mkdir(parents=True)
    (folder / "nameless").mkdir()
    shutil.copytree(pets / "train", folder / "few")
    for file in sorted((folder / "few").iterdir())[5:]:
        file.unlink()
    for k, file in enumerate(sorted((pets / "train").iterdir())):
        shutil.copy(file, folder / "nameless" / f"{k}.png")
    shutil.copy(model_of(plain), folder / "model000008.pt")  # without its config.json
    (folder / "text.pt").write_text("weights, they said")
    (folder / "cut.pt").write_bytes(Path(model_of(plain)).read_bytes()[:50000])
    (folder / "file").write_text("not a folder")
    np.savez(folder / "unlabelled.npz", arr_0=np.zeros((9, 8, 8, 1), np.uint8))
    return folder


IMAGE_TRAIN = f"image_train --data_dir {{pets}}/train {NET} {TRAIN} --iterations 2"
CLASSIFIER_TRAIN = f"classifier_train --data_dir {{pets}}/train {CLASSIFIER} {TRAIN} --num_classes 3 --iterations 2"
SAMPLE = "image_sample --num_samples 2 --model_path {plain}/model000008.pt"
SAMPLE_CLASS = "image_sample --num_samples 2 --model_path {cond}/model000008.pt"
GUIDE = f"classifier_{SAMPLE.removeprefix('image_')} --classifier_path {{classifier}}/model000010.pt"

# Command, then patterns: the value, the choices, the remedy. Of a flag that is given twice the last one counts.
BAD = [
    # data
    (f"{IMAGE_TRAIN} --data_dir {{bad}}/nowhere", "data_dir .*bad/nowhere does not exist"),
    (f"{IMAGE_TRAIN} --data_dir {{bad}}/empty", r"no images in .*bad/empty.*\*\.jpg.*\*\.png"),
    (f"image_train {NET}", "pass --data_dir"),
    (f"{IMAGE_TRAIN} --data_dir {{bad}}/file", "bad/file is not a folder, an npz, npy, zip"),
    (f"{CLASSIFIER_TRAIN} --val_data_dir {{bad}}/nowhere", "data_dir .*bad/nowhere does not exist"),
    (f"{IMAGE_TRAIN} --data_dir {{bad}}/few", "holds 5 images.*no batch of 8.*batch_size from 1 to 5"),
    (f"{CLASSIFIER_TRAIN} --val_data_dir {{bad}}/few", "bad/few holds 5 images.*batch_size from 1 to 5"),
    (f"{CLASSIFIER_TRAIN} --num_classes 2", r"label 2 \('cat'\).*2 classes, whose labels are 0..1.*num_classes 3"),
    (f"{IMAGE_TRAIN} --class_cond --num_classes 1", r"label 2 \('cat'\).*num_classes 3"),
    (f"{CLASSIFIER_TRAIN} --val_data_dir {{digits}}/val", "class '0', .*not one of the 3 known classes: ant, bee, cat"),
    (f"{IMAGE_TRAIN} --class_cond --data_dir {{bad}}/nameless", "no class labels in .*name the files CLASS_.*folder"),
    (f"{IMAGE_TRAIN} --class_cond --data_dir {{bad}}/unlabelled.npz", "unlabelled.npz has no labels.*arr_1"),
    # labels
    (f"{SAMPLE} --classes 1", "--classes 1: the model is unconditional.*drop --classes.*classifier_sample"),
    (f"{SAMPLE_CLASS} --classes 1,3", "class 3 in --classes is out of range: labels run from 0 to 2"),
    (f"{SAMPLE_CLASS} --classes be", "unknown class 'be' in --classes; did you mean bee"),
    (f"{GUIDE} --classes 3", "class 3 in --classes is out of range: labels run from 0 to 2"),
    # networks
    (f"{IMAGE_TRAIN} --image_size 10 --channel_mult 1,1,1", "image_size 10.*not divisible by 4.*3 levels.*use 8 or 12"),
    (f"{CLASSIFIER_TRAIN} --image_size 10 --classifier_channel_mult 1,1,1", "image_size 10.*not divisible by 4"),
    (f"{IMAGE_TRAIN} --image_size 96 --channel_mult ''", "unsupported image size: 96.*--channel_mult"),
    (f"{IMAGE_TRAIN} --num_channels 48", "num_channels.*48.*multiple of 32: use 32 or 64"),
    (f"{CLASSIFIER_TRAIN} --classifier_width 48", "classifier_width.*48.*multiple of 32: use 32 or 64"),
    (f"{CLASSIFIER_TRAIN} --classifier_pool max", "classifier_pool.*'max'.*adaptive.*attention.*spatial.*spatial_v2"),
    (f"{IMAGE_TRAIN} --image_channels 2", "image_channels is 2; choose 1"),
    # processes
    (f"{IMAGE_TRAIN} --noise_schedule exp", "schedule: exp .*linear, cosine"),
    (f"{SAMPLE} --noise_schedule exp", "schedule: exp .*linear, cosine"),
    (f"{IMAGE_TRAIN} --noise_schedule linear --diffusion_steps 20", "20 steps.*21 steps or more.*cosine"),
    (f"{CLASSIFIER_TRAIN} --noise_schedule linear --diffusion_steps 10", "10 steps.*21 steps or more.*cosine"),
    (f"{IMAGE_TRAIN} --schedule_sampler even", "schedule_sampler.*'even'.*uniform.*loss-second-moment"),
    (f"{IMAGE_TRAIN} --timestep_respacing often", "respacing 'often'.*250.*10,15,20.*ddim25"),
    (f"{SAMPLE} --timestep_respacing fast25", "respacing 'fast25'.*250.*10,15,20.*ddim25"),
    (f"{SAMPLE} --timestep_respacing 1001", "1000 steps into 1001"),
    (f"{SAMPLE} --timestep_respacing ddim300", "300 of 1000 steps; near it are ddim167, ddim200, ddim250, ddim334"),
    (f"{GUIDE} --timestep_respacing ddim300", "near it are ddim167, ddim200, ddim250, ddim334"),
    # checkpoints
    (f"{SAMPLE} --model_path ''", "--model_path"),
    (f"{GUIDE} --classifier_path ''", "--classifier_path"),
    (f"{SAMPLE} --model_path {{plain}}/model00008.pt", "no checkpoint .*model00008.pt; did you mean .*model000008.pt"),
    (f"{SAMPLE} --model_path {{plain}}", "plain is a folder: give the checkpoint in it, .*model000008.pt"),
    (f"{SAMPLE} --model_path {{bad}}/text.pt", "text.pt is not a checkpoint"),
    (f"{SAMPLE} --model_path {{bad}}/cut.pt", "cut.pt is not a checkpoint, or an incomplete one"),
    (f"{IMAGE_TRAIN} --resume_checkpoint {{bad}}/cut.pt", "cut.pt is not a checkpoint, or an incomplete one"),
    (f"{SAMPLE} --model_path {{plain}}/opt000008.pt", "state of an optimizer: give the modelNNNNNN.pt or ema_"),
    (f"{SAMPLE} --model_path {{classifier}}/model000010.pt", "classifier network.*diffusion one is needed"),
    (f"{GUIDE} --classifier_path {{cond}}/model000008.pt", "diffusion network.*classifier one is needed"),
    (f"{SAMPLE} --model_path {{bad}}/model000008.pt --image_size 8 --image_channels 1",
     r"model000008.pt: its tensors leave these flags open.* tells: --num_heads or --num_head_channels \(both of 1, 2,"
     r" 4, 8, 16, 32\); --use_new_attention_order \(.*; --noise_schedule \(linear, .*; --diffusion_steps \(1000, "),
    (f"{IMAGE_TRAIN} --num_channels 64 --resume_checkpoint {{plain}}/model000008.pt",
     r"model000008.pt does not fit: \d+ shapes differ \(time_embed.0.weight: file \[128, 32\], network \[256, 64\]\)"
     ".* would fit at --image_size 8: --num_channels 32, with"),
    (f"{IMAGE_TRAIN} --resume_checkpoint {{classifier}}/model000010.pt",
     "holds a classifier network, not a diffusion one"),
    # the rest
    *[(f"{command} --log_dir {{bad}}/file/below", "cannot write to the folder .*bad/file/below.*another --log_dir")
      for command in (IMAGE_TRAIN, CLASSIFIER_TRAIN, SAMPLE, GUIDE)],
    (f"{IMAGE_TRAIN} --batch_size 0", "batch_size"),
    (f"{IMAGE_TRAIN} --ema_rate fast", "ema_rate 'fast'"),
    (f"{SAMPLE} --num_samples 0", "num_samples.*not 0"),
    (f"{SAMPLE} --device gpu", "device 'gpu' is not available here; choose from cpu"),
    (f"{SAMPLE} --num_sample_count 3", "unknown flag --num_sample_count; did you mean --num_samples"),
]  # fmt: skip


@pytest.mark.parametrize("command, pattern", BAD, ids=[re.sub(r"\{\w+\}/?", "", command)[-60:] for command, _ in BAD])
def test_bad_input_is_one_line_before_any_work(command, pattern, bad, request, tmp_path):
    folders = {name: request.getfixturevalue(name) for name in ("pets", "digits", "plain", "cond", "classifier")}
    name, words = command.format(bad=bad, **folders).split(" ", 1)
    if "--log_dir" not in words:
        words += f" --log_dir {tmp_path}/out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "run_step", lambda *_: pytest.fail("a step was taken"))
        refused(name, words, pattern)
    if (tmp_path / "out").exists():
        assert names(tmp_path / "out") == ["log.txt"]


def test_a_run_that_cannot_begin_leaves_the_folder_as_it_was(plain, digits, pets, tmp_path):
    """Neither a network that does not fit nor a new one of other options may overwrite what config.json tells."""
    folder = tmp_path / "run"
    shutil.copytree(plain, folder)
    (folder / ".lock").touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("log.txt", ".lock")}
    words = f"--data_dir {digits}/train {NET} {TRAIN} --iterations 9 --log_dir {folder}"
    resume = f"--resume_checkpoint {folder}/model000008.pt"
    for way in (resume, ""):  # the same command goes on by itself
        refused("image_train", f"{words} {way} --learn_sigma",
                "--learn_sigma True.*model000008.pt, has learn_sigma False.*another --log_dir")  # fmt: skip
        refused("image_train", f"{words} {way} --noise_schedule linear",
                "--noise_schedule linear.*has noise_schedule cosine.*--force True")  # fmt: skip
        refused("image_train", f"{words} {way} --seed 1", "with seed 0, this one has 1.*--force True")
        refused("image_train", f"{words} {way} --data_dir {pets}/train",
                r"with data \d+ images in .*digits/train \([0-9a-f]{16}\), this one has \d+ images in .*pets",
                )  # fmt: skip
    refused("image_train", f"{words} --learn_sigma --force True", "does not fit")
    refused("image_train", f"{words} --resume never", "holds the checkpoints of a run, .*--resume is never")
    refused("classifier_train", f"--data_dir {digits}/train {CLASSIFIER} {TRAIN} --log_dir {folder}",
            "holds a diffusion network, not a classifier one: choose another --log_dir")  # fmt: skip
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("log.txt", ".lock")}
    assert after == before
    said = done("image_train", f"{words} --dropout 0.1").out
    assert (folder / "model000009.pt").exists() and "changed since the last start: dropout 0.0 -> 0.1" in said
    said = done("image_train", f"{words} --iterations 10 --seed 1 --force True").out
    assert "with seed 0, this one has 1; going on by --force" in said


# Images that cannot be read


@pytest.fixture
def broken(pets, tmp_path):
    """24 images of which one is cut off and one is a text."""
    folder = tmp_path / "data"
    shutil.copytree(pets / "val", folder)
    cut, text = sorted(folder.iterdir())[3], sorted(folder.iterdir())[11]
    cut.write_bytes(cut.read_bytes()[:-40])
    text.write_text("not a picture")
    return SimpleNamespace(folder=folder, cut=cut, text=text)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(broken, tmp_path, workers):
    words = f"--data_dir {broken.folder} {NET} {TRAIN} --batch_size 24 --num_workers {workers} --iterations 1"
    refused("image_train", f"{words} --log_dir {tmp_path}/out",
            f"cannot read image ({broken.cut}|{broken.text}).*repair or remove it.*--skip_bad_images True")  # fmt: skip
    assert not list((tmp_path / "out").glob("*.pt"))
    broken.text.unlink()
    refused("image_train", f"{words} --batch_size 23 --log_dir {tmp_path}/out", f"cannot read image {broken.cut}")


def test_unreadable_images_are_skipped_and_counted_on_demand(broken, tmp_path):
    with pytest.warns(UserWarning, match="cannot read image") as said:
        done("classifier_train", f"--data_dir {broken.folder} {CLASSIFIER} {TRAIN} --num_classes 3 --batch_size 12"
             f" --iterations 6 --skip_bad_images True --log_dir {tmp_path}/out")  # fmt: skip
    first, second = (str(warning.message) for warning in said)
    assert first.endswith("; skipped, 1 so far") and second.endswith("; skipped, 2 so far")
    assert all(f"cannot read image {path}: " in first + second for path in (broken.cut, broken.text))
    assert (tmp_path / "out/model000006.pt").exists()


def test_an_image_that_breaks_a_long_run_costs_no_update(pets, tmp_path):
    """Three updates, then an image that cannot be read: the three are saved, and can be gone on from."""
    folder = tmp_path / "data"
    folder.mkdir()
    for level in range(6):
        Image.new("L", (8, 8), 40 * level).save(folder / f"{level}.png")
    stream = load_data(data_dir=str(folder), batch_size=1, image_size=8, image_channels=1, num_workers=0)
    order = [round((next(stream)[0].mean().item() + 1) * 127.5 / 40) for _ in range(6)]
    path = folder / f"{order[3]}.png"
    path.write_bytes(b"")
    words = f"--data_dir {folder} {NET} {TRAIN} --batch_size 1 --log_dir {tmp_path}/out"
    refused("image_train", f"{words} --iterations 6", f"cannot read image {path}")
    assert {"model000003.pt", "opt000003.pt", "ema_0.9999_000003.pt"} <= set(names(tmp_path / "out"))
    assert rows(tmp_path / "out")[-1]["step"] == "3"
    Image.new("L", (8, 8)).save(path)
    done("image_train", f"{words} --iterations 4 --resume_checkpoint {tmp_path}/out/model000003.pt")


# Files that are not what they say


class Runs:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_and_not_run(form, plain, classifier, pets, tmp_path):
    marker, path = tmp_path / "was run", tmp_path / "model000001.pt"
    content = {"time_embed.0.weight": th.zeros(2, 2), "more": Runs(str(marker))}
    if form == "zip":
        th.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    for name, words in {
        "image_sample": f"--num_samples 1 --model_path {path}",
        "classifier_sample": f"--num_samples 1 --model_path {model_of(plain)} --classifier_path {path}",
        "image_train": f"--data_dir {pets}/train {NET} {TRAIN} --iterations 2 --resume_checkpoint {path}",
        "classifier_train": f"--data_dir {pets}/train {CLASSIFIER} {TRAIN} --iterations 2 --resume_checkpoint {path}",
    }.items():
        refused(name, f"{words} --log_dir {tmp_path}/out", "refused .*mkdir.*nothing in it was executed"
                if form == "zip" else "(refused|not a checkpoint)")  # fmt: skip
    assert not marker.exists()


# Losses that are not numbers


def test_a_rate_that_breaks_the_network_stops_the_run(digits, tmp_path):
    refused("image_train", f"--data_dir {digits}/train {NET} {TRAIN} --lr 1e30 --max_bad_steps 3 --iterations 50"
            f" --log_dir {tmp_path}", "not finite in 3 updates in a row.*lower --lr.*--grad_clip")  # fmt: skip
    assert rows(tmp_path)[-1]["step"] == "4" and rows(tmp_path)[-1]["skipped_steps"] == "3"
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("name, words, task", [
    ("image_train", NET, train_util.DiffusionTask),
    ("classifier_train", f"{CLASSIFIER} --num_classes 3", train_util.ClassifierTask),
])  # fmt: skip
def test_a_loss_that_is_not_a_number_costs_one_update(name, words, task, pets, tmp_path, monkeypatch):
    loss, count = task.loss, []

    def poisoned(self, *args):
        count.append(1)
        terms = loss(self, *args)
        return terms | {"loss": terms["loss"] * (float("nan") if len(count) == 2 else 1)}

    monkeypatch.setattr(task, "loss", poisoned)
    said = done(name, f"--data_dir {pets}/train {words} {TRAIN} --iterations 4 --log_dir {tmp_path}").out
    assert "not finite: step skipped (1 so far)" in said
    assert [row["skipped_steps"] for row in rows(tmp_path)] == ["", "1", "1", "1"]
    assert all(value.isfinite().all() for value in checkpoint.load(tmp_path / "model000004.pt").values())


def test_bf16_from_training_to_samples(pets, cond, tmp_path):
    words = f"--data_dir {pets}/train {NET} {TRAIN} --class_cond True --iterations 2 --precision bf16"
    done("image_train", f"{words} --log_dir {tmp_path}/model")
    path = model_of(tmp_path / "model")
    assert {value.dtype for value in checkpoint.load(path).values()} == {th.float32}
    drawn = []
    for precision in ("fp32", "bf16", "fp16"):
        done("image_sample", f"--model_path {model_of(cond)} --num_samples 4 --batch_size 4 --timestep_respacing 3"
             f" --precision {precision} --log_dir {tmp_path}/{precision}")  # fmt: skip
        drawn.append(samples(tmp_path / precision)[1].astype(float))
    fp32, bf16, fp16 = drawn
    assert 0 < np.abs(fp16 - fp32).mean() < np.abs(bf16 - fp32).mean() < 8
    refused("image_sample", f"--model_path {model_of(cond)} --precision bf16 --use_fp16 True --log_dir {tmp_path}",
            "--precision bf16 and --use_fp16 True are two precisions: drop --use_fp16")  # fmt: skip
    refused("image_train", f"{words} --sharding fsdp --log_dir {tmp_path}/b", "fp32, fsdp; not fsdp in bf16")


def test_a_run_in_fp16_goes_on_in_bf16(pets, tmp_path, monkeypatch):
    words = f"--data_dir {pets}/train {NET} {TRAIN} --log_dir {tmp_path}/model"
    done("image_train", f"{words} --use_fp16 True --iterations 1")
    assert checkpoint.read_config(model_of(tmp_path / "model"))["flags"]["use_fp16"] is True
    loops = []
    monkeypatch.setattr(train_util.Trainer, "run_loop", lambda self: loops.append(self))
    for precision in ("bf16", "fp32"):
        done("image_train", f"{words} --precision {precision} --iterations 2")
    assert [loop.mp_trainer.model.dtype for loop in loops] == [th.bfloat16, th.float32]


def test_a_precision_that_is_slow_here_is_said(pets, tmp_path, monkeypatch):
    words = f"--data_dir {pets}/train {NET} {TRAIN} --iterations 1"
    for rate, said in ((1.0, True), (8.0, False)):
        monkeypatch.setattr(program, "convolution_rate", lambda dtype, device: 5.0 if dtype == th.float32 else rate)  # noqa: B023
        out = done("image_train", f"{words} --precision bf16 --log_dir {tmp_path}/{rate}").out
        assert ("bf16 is 5.0 times slower than fp32 on this device" in out) == said


def test_samples_that_are_not_numbers_are_not_written(plain, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    state = checkpoint.load(model_of(folder))
    state["out.2.bias"][:] = float("nan")
    checkpoint.save(state, model_of(folder))
    refused("image_sample", f"--model_path {model_of(folder)}", r"changed on purpose, delete .*commit000008\.json")
    (folder / "commit000008.json").unlink()
    refused("image_sample", f"--model_path {model_of(folder)} --num_samples 3 --batch_size 2 --timestep_respacing 2"
            f" --log_dir {tmp_path}/out", r"not finite for samples \[0, 1\]")  # fmt: skip
    assert names(tmp_path / "out") == ["log.txt", "samples_3x8x8x1.partial"]


def test_options_of_training_reach_the_loop(pets, tmp_path, monkeypatch):
    loops = []
    monkeypatch.setattr(train_util.Trainer, "run_loop", lambda self: loops.append(self))
    data = f"--data_dir {pets}/train {TRAIN}"
    done("image_train", f"{data} {NET} --use_fp16 --fp16_scale_growth 0.5 --ema_warmup False --ema_rate 0.5"
         f" --grad_clip 2 --max_bad_steps 7 --lr_anneal_steps 9 --weight_decay 0.25 --microbatch 3 --beta2 0.75"
         f" --ema_halflife 2 --ema_power 0.1 --lr_schedule cosine --lr_warmup 4 --keep_last 2 --keep_every 5"
         f" --keep_best --background_save False --max_minutes 9 --val_data_dir {pets}/val --eval_interval 3"
         f" --log_dir {tmp_path}/a")  # fmt: skip
    done("classifier_train", f"{data} {CLASSIFIER} --num_classes 3 --classifier_use_fp16 --anneal_lr"
         f" --iterations 6 --schedule_sampler loss-second-moment --log_dir {tmp_path}/b")  # fmt: skip
    model, guide = loops
    assert model.mp_trainer.use_fp16 and model.mp_trainer.fp16_scale_growth == 0.5 and model.mp_trainer.grad_clip == 2
    assert model.averages == [ema.Rate(0.5, False), ema.HalfLife(2.0), ema.Power(0.1)]
    assert (model.max_bad_steps, model.microbatch, model.lr_schedule, model.lr_warmup) == (7, 3, "cosine", 4)
    assert (model.saver.keep_last, model.saver.keep_every, model.saver.background) == (2, 5, False)
    assert model.best is not None and model.eval_interval == 3 and model.stop.deadline
    assert (model.lr_anneal_steps, model.total, model.weight_decay) == (9, 9, 0.25)
    assert model.opt.param_groups[0]["betas"] == (0.9, 0.75)
    assert guide.mp_trainer.use_fp16 and guide.mp_trainer.lg_loss_scale == 16
    assert (guide.lr_anneal_steps, guide.total) == (6, 6)
    assert type(guide.task.schedule_sampler).__name__ == "LossSecondMomentResampler"
