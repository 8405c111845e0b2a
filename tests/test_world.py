"""One run, however it is shared, and however it is broken off: processes, microbatches, workers, kills, signals."""

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch as th
from test_dist_util import AS_ROOT, OPENMPI
from test_programs import BIN, CLASSIFIER, MPIEXEC, NET, ROOT, done, rows, same, samples, shell, stranger

from guided_diffusion import checkpoint, saves, signals

TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node"]
ENV = {"PATH": f"{BIN}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    stranger("datasets/digits.py", "digits", folder)
    return folder


def words(name, digits, log_dir, *, batch, iterations=20, more=""):
    network = f"{NET} --learn_sigma" if name == "image_train" else f"{CLASSIFIER} --num_classes 10"
    return (f"--data_dir {digits}/digits/train {network} --num_workers 0 --batch_size {batch} --log_interval 5"
            f" --iterations {iterations} --save_interval 10 --log_dir {log_dir} {more}")  # fmt: skip


def launched(processes, launcher):
    """The words before a program's name."""
    n = str(processes)
    openmpi = [*AS_ROOT, OPENMPI, "--map-by", ":OVERSUBSCRIBE", "-n", n]
    return {None: [], "mpiexec": [MPIEXEC, "-n", n], "torchrun": [*TORCHRUN, n], "openmpi": openmpi}[launcher]


def share(processes, batch, microbatch, launcher, slow=True):
    name = f"{processes}x{batch} by {microbatch} {launcher or ''}".strip()
    return pytest.param(processes, batch, microbatch, launcher, marks=[pytest.mark.slow] * slow, id=name)


SHARES = [  # processes, images a process, microbatch, launcher
    share(1, 8, 3, None, slow=False),
    share(2, 4, -1, "mpiexec", slow=False),
    share(2, 4, 2, "torchrun", slow=False),
    share(1, 8, 1, None),
    share(1, 8, 2, None),
    *(share(n, 8 // n, -1, "mpiexec") for n in (4, 8)),
    share(4, 2, 1, "torchrun"),
    *(share(n, 8 // n, microbatch, "openmpi") for n, microbatch in ((2, 1), (4, -1)) if OPENMPI),
]
FLIPPED = {"image_train": "--schedule_sampler loss-second-moment", "classifier_train": "--random_crop True"}


@pytest.fixture(scope="module")
def whole(digits):
    """(program) -> the folder of its run in one process with the whole batch."""

    @functools.cache
    def trained(name):
        folder = digits / f"whole_{name}"
        done(name, words(name, digits, folder, batch=8, more=FLIPPED[name]))
        return folder

    return trained


@pytest.mark.parametrize("name", FLIPPED)
@pytest.mark.parametrize("processes, batch, microbatch, launcher", SHARES)
def test_the_same_run_however_the_batch_is_shared(name, processes, batch, microbatch, launcher, digits, whole):
    """Flips, timesteps, noise, losses and weights are those of one process with the whole batch."""
    if launcher == "mpiexec" and not MPIEXEC:
        pytest.skip("no mpiexec")
    folder = digits / f"{name}_{processes}_{microbatch}_{launcher}"
    line = words(name, digits, folder, batch=batch, more=f"{FLIPPED[name]} --microbatch {microbatch}")
    if launcher:
        stranger(f"scripts/{name}.py", line, digits, launched(processes, launcher))
    else:
        done(name, line)
    assert_same_run(whole(name), folder)


def assert_same_run(whole, folder, rtol=1e-5):
    for ours, theirs in zip(rows(folder), rows(whole), strict=True):
        for key in ("step", "samples", "loss", "mse", "grad_norm", "train_loss", "loss_q0", "loss_q3", "train_acc@1"):
            if theirs.get(key):
                assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-4 if key == "grad_norm" else rtol)
    expected, found = (th.cat([value.flatten() for value in checkpoint.load(each / "model000020.pt").values()])
                       for each in (whole, folder))  # fmt: skip
    # AdamW divides by the root of the second moment plus 1e-8: where a gradient is rounding noise below that, as that
    # of a bias before a norm, so is the step, of the size of the rate. Such weights change nothing of the outputs.
    moments = checkpoint.load(whole / "opt000020.pt")["state"].values()
    felt = th.cat([(each["exp_avg_sq"].sqrt() > 1e-8).flatten() for each in moments])
    assert felt.float().mean() > 0.8
    assert ((found - expected)[felt].norm() / expected[felt].norm()).item() < rtol


def test_samples_of_the_two_runs_agree(digits, whole):
    shared = [digits / f"image_train_2_{share}" for share in ("-1_mpiexec", "2_torchrun")]
    if not any(map(Path.exists, shared)):
        pytest.skip("needs the runs of the test above")
    drawn = []
    for folder in (whole("image_train"), next(filter(Path.exists, shared))):
        out = digits / f"samples_{folder.name}"
        done("image_sample", f"--model_path {folder}/model000020.pt --num_samples 8 --batch_size 8"
             f" --timestep_respacing 20 --log_dir {out}")  # fmt: skip
        drawn.append(samples(out)[1].astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


NOISE_SCALE = """
import numpy as np
import torch
from guided_diffusion import dist_util, logger
from guided_diffusion.train_util import Trainer

class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return x @ self.w  # whose gradient is x

class Task:
    prefix, num_timesteps, net = "", 1, Linear()

    def draw(self, n, device, rng):
        return torch.zeros(n, dtype=torch.int64), torch.ones(n)

    def loss(self, net, x0, cond, t, noise):
        return {"loss": net(x0)}

dist_util.setup_dist("cpu")
logger.configure("log", format_strs=[])
images = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32))  # of each process
trainer = Trainer(Task(), None, batch_size=6, microbatch=3)
trainer.forward_backward(images[dist_util.rank()], {})
found = trainer.tally.means()
small, big = images[:, :3].mean(1).square().sum(1).mean(), images.mean((0, 1)).square().sum()
torch.testing.assert_close(found["grad_square"], ((12 * big - 3 * small) / (12 - 3)).item(), rtol=1e-5, atol=0)
torch.testing.assert_close(found["grad_trace"], ((small - big) / (1 / 3 - 1 / 12)).item(), rtol=1e-5, atol=0)
dist_util.finish()
"""


def test_the_gradient_noise_scale_of_two_processes(tmp_path):
    """From gradients of three images in each and of all twelve, known by hand."""
    (tmp_path / "worker.py").write_text(NOISE_SCALE)
    result = shell(["worker.py"], tmp_path, launched(2, "torchrun"))
    assert result.returncode == 0, result.stderr


# -------------------------------------------------------------------------------------------------------- broken off


def start(name, line, folder, launcher=()):
    command = [*launcher, *([] if "torchrun" in launcher else [sys.executable])]
    return subprocess.Popen([*command, str(ROOT / "scripts" / f"{name}.py"), *line.split()], cwd=folder,
                            env={**ENV, "HOME": str(folder)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)  # fmt: skip


def wait_for(folder, pattern, seconds=60):
    until = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < until, f"no {pattern} in {folder}"
        time.sleep(0.01)


def end(process):
    out = process.communicate(timeout=120)[0]
    return process.returncode, out


def logged(folder):
    """The last step of the run's table, 0 before there is one."""
    with contextlib.suppress(OSError, IndexError, ValueError, KeyError):
        return int(float(rows(folder)[-1]["step"]))
    return 0


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_signal_to_all_processes_of_a_run_saves_and_leaves_with_its_own_exit_code(digits, tmp_path):
    """As queues, terminals and launchers send it: to those that load images as well. Each run goes on from the last."""
    line = words("image_train", digits, tmp_path / "run", batch=4, iterations=100000)
    line, before = line.replace("--num_workers 0", "--num_workers 1"), 0
    for number in signals.ASKING:
        process = start("image_train", line, digits)
        while logged(tmp_path / "run") <= before:
            assert process.poll() is None, end(process)[1][-2000:]
            time.sleep(0.01)
        os.killpg(process.pid, number)
        if number != signal.SIGINT:  # said twice, as some launchers do
            os.killpg(process.pid, number)
        code, out = end(process)
        assert code == 75 and "run the same command again to go on" in out, out[-2000:]
        path, problems = saves.newest(tmp_path / "run")
        step = checkpoint.parse_resume_step_from_filename(path)
        assert not problems and step > before
        before = step


@pytest.mark.slow
@pytest.mark.parametrize("launcher, code", [
    pytest.param("mpiexec", 75, marks=pytest.mark.skipif(not MPIEXEC, reason="no mpiexec")), ("torchrun", 1),
])  # fmt: skip
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_launcher_saves_what_both_processes_did(number, launcher, code, digits, tmp_path):
    line = words("image_train", digits, tmp_path / "run", batch=4, iterations=100000)
    process = start("image_train", line.replace("workers 0", "workers 1"), digits, launched(2, launcher))
    while logged(tmp_path / "run") < 10:
        assert process.poll() is None, end(process)[1][-2000:]
        time.sleep(0.01)
    process.send_signal(number)
    found, out = end(process)
    path, problems = saves.newest(tmp_path / "run")
    assert found == code and not problems and f"which is saved in {path}: run the same command again" in out


@pytest.mark.skipif(not MPIEXEC, reason="no mpiexec")
def test_two_processes_killed_at_any_moment_go_on_to_the_same_end(digits, tmp_path):
    kills(digits, tmp_path, count=2, processes=2, seed=0, iterations=40)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_fifty_kills(processes, digits, tmp_path):
    kills(digits, tmp_path, count=50, processes=processes, seed=processes, iterations=400)


def kills(digits, tmp_path, count, processes, seed, iterations):
    """SIGKILL at a random step, half of them while a checkpoint is being written; then to the end undisturbed."""
    launcher, rng = launched(processes, "mpiexec" if processes > 1 else None), random.Random(seed)
    more = "--ema_rate 0.9 --schedule_sampler loss-second-moment --random_flip True"
    folder = tmp_path / "broken"

    def line(name):
        return words("image_train", digits, tmp_path / name, batch=8 // processes, iterations=iterations, more=more)

    stranger("scripts/image_train.py", line("whole"), digits, launcher)
    saved_before = cut_short = 0
    for number in range(count):
        process = start("image_train", line("broken"), digits, launcher)
        share = rng.uniform(0, 1 if number % 2 else 2)  # the last one comes before the last tenth of the run
        last = 0.9 * iterations * (number + share) / (count + 1)
        if last <= logged(folder):  # behind what is done: the kill falls into the start
            time.sleep(rng.uniform(0, 1))
        while process.poll() is None and logged(folder) < last:
            time.sleep(0.005)
        if number % 2:  # a save is under way: its commit file, or any of those before it
            while process.poll() is None and not list(folder.glob("*[0-9].*.*.tmp")):
                time.sleep(0.0005)
            time.sleep(rng.choice([0, rng.uniform(0, 0.01)]))
        assert process.poll() is None, end(process)
        kill(process)
        path, problems = saves.newest(folder) if folder.exists() else (None, [])
        step = checkpoint.parse_resume_step_from_filename(path or "")
        assert step >= saved_before, "a checkpoint was lost"
        saved_before = step
        cut_short += bool(problems or list(folder.glob("*[0-9].*.*.tmp")))
    stranger("scripts/image_train.py", line("broken"), digits, launcher)
    for path in sorted((tmp_path / "whole").glob(f"*{iterations:06d}.pt")):
        assert same(checkpoint.load(path), checkpoint.load(tmp_path / "broken" / path.name)), path.name
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / name)]
            for name in ("whole", "broken")]  # fmt: skip
    assert logs[0] == logs[1]
    print(f"{count} kills, {cut_short} of them amid a save")
    assert cut_short > 0.3 * count  # half of them are aimed; a save of so small a network is over in an instant


@pytest.mark.slow
@pytest.mark.skipif(not MPIEXEC, reason="no mpiexec")
def test_a_run_goes_on_with_other_processes_and_workers(digits, tmp_path):
    """Two processes go on as one and the other way round, exact up to the order of sums, and the log says so."""
    stranger("scripts/image_train.py", words("image_train", digits, tmp_path / "whole", batch=8), digits)
    line = words("image_train", digits, tmp_path / "run", batch=4, iterations=10)
    stranger("scripts/image_train.py", line, digits, launched(2, "mpiexec"))
    line = words("image_train", digits, tmp_path / "run", batch=8).replace("--num_workers 0", "--num_workers 2")
    said = stranger("scripts/image_train.py", line, digits).stdout
    assert "made by 2 process(es) with batches of 4, this run has 1 with 8: it is the same up to the order of" in said
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    starts = json.loads((tmp_path / "run/run.json").read_text())["starts"]
    assert [each["ranks"] for each in starts] == [2, 1] and starts[1]["resumed_from"].endswith("model000010.pt")


@pytest.mark.skipif(not MPIEXEC, reason="no mpiexec")
def test_a_process_that_dies_ends_the_others(digits, tmp_path):
    """One rank of two is killed: the other ends within seconds, with a line that says so, and goes on later."""
    line = words("image_train", digits, tmp_path / "run", batch=4, iterations=100000)
    environment = {**ENV, "HOME": str(tmp_path), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "2"}
    environment["MASTER_PORT"] = str(free_port())
    ranks = [
        subprocess.Popen([sys.executable, str(ROOT / "scripts/image_train.py"), *line.split()], cwd=digits,
                         env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        wait_for(tmp_path / "run", "commit*.json")
        ranks[1].kill()
        _, err = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 2 and "lost another process of this run" in err and "Traceback" not in err
        assert saves.newest(tmp_path / "run")[0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_runs_in_one_folder(digits, tmp_path):
    line = words("image_train", digits, tmp_path / "run", batch=4, iterations=100000)
    first = start("image_train", line, digits)
    try:
        wait_for(tmp_path / "run", "commit*.json")
        second = start("image_train", line, digits)
        code, out = end(second)
        assert code == 2 and f"is in use by process {first.pid} on" in out
    finally:
        kill(first)


def test_an_unreadable_image_costs_two_processes_no_update(digits, tmp_path):
    """Whichever rank meets it: both save and leave, one of them saying what it was."""
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted((digits / "digits/train").glob("*.png"))[:32]:
        (data / path.name).write_bytes(path.read_bytes())
    (data / "9_9999.png").write_bytes(b"no picture")
    line = words("image_train", digits, tmp_path / "run", batch=4, iterations=100)
    line = line.replace(f"{digits}/digits/train", str(data)).replace("--save_interval 10", "--save_interval 1000")
    process = start("image_train", line, digits, launched(2, "torchrun"))
    code, out = end(process)
    assert code != 0 and "cannot read image" in out and "9_9999.png" in out and "Connection" not in out
    path, problems = saves.newest(tmp_path / "run")
    assert path and not problems  # at most eight updates, so it is the save before leaving


@pytest.mark.slow
def test_a_loading_process_that_dies_ends_the_run_in_a_line(digits, tmp_path):
    line = words("image_train", digits, tmp_path / "run", batch=4, iterations=100000)
    process = start("image_train", line.replace("--num_workers 0", "--num_workers 2"), digits)
    try:
        wait_for(tmp_path / "run", "commit*.json")
        children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        code, out = end(process)
        assert code == 2 and "a process that loads images has died" in out and "Traceback" not in out, out[-2000:]
        assert saves.newest(tmp_path / "run")[1] == []
    finally:
        kill(process)
