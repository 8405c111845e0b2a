"""Checkpoints that are whole or passed over, the lock of a folder, and averages put together afterwards."""

import errno
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch as th
from test_programs import NET, done, same

from guided_diffusion import checkpoint, ema, logger, runs, saves


def files(step, value=1.0):
    return {f"ema_0.9_{step:06d}.pt": {"w": th.full((50,), value / 2)}, f"opt{step:06d}.pt": {"lr": 0.1},
            f"state{step:06d}.pt": {"step": step}, f"model{step:06d}.pt": {"w": th.full((50,), value)}}  # fmt: skip


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_lists_its_files_with_their_sizes_and_checksums(tmp_path):
    saves.write(tmp_path, 7, files(7))
    listed = json.loads((tmp_path / "commit000007.json").read_text())["files"]
    assert set(listed) == set(files(7)) == set(names(tmp_path)) - {"commit000007.json"}
    for name, each in listed.items():
        content = (tmp_path / name).read_bytes()
        assert each == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert th.equal(checkpoint.load(tmp_path / "model000007.pt")["w"], th.ones(50))
    assert saves.newest(tmp_path) == (str(tmp_path / "model000007.pt"), [])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm, said", [
    (lambda folder: flip(folder / "model000009.pt"), "model000009.pt is damaged: its SHA-256"),
    (lambda folder: flip(folder / "ema_0.9_000009.pt"), "ema_0.9_000009.pt is damaged"),
    (lambda folder: (folder / "opt000009.pt").write_bytes(b"short"), r"opt000009.pt has 5 bytes instead of \d+"),
    (lambda folder: (folder / "state000009.pt").unlink(), "state000009.pt is missing"),
    (lambda folder: (folder / "model000009.pt").unlink(), "model000009.pt is missing"),
    (lambda folder: (folder / "commit000009.json").unlink(), "update 9 has no commit000009.json: .*cut short"),
    (lambda folder: (folder / "commit000009.json").write_text("{"), "commit000009.json cannot be read"),
    (lambda folder: (folder / "commit000009.json").write_text("[]"), "commit000009.json cannot be read"),
])  # fmt: skip
def test_the_newest_whole_checkpoint_is_used_and_broken_ones_are_named(tmp_path, harm, said):
    saves.write(tmp_path, 5, files(5))
    saves.write(tmp_path, 9, files(9))
    harm(tmp_path)
    path, problems = saves.newest(str(tmp_path))
    assert path == str(tmp_path / "model000005.pt")
    assert len(problems) == 1
    assert re.search(said, problems[0])


def test_a_save_that_came_to_no_model_is_named(tmp_path):
    for name in ("ema_0.9_000004.pt", "opt000004.pt", "ema_posthoc0.1_000009.pt", "notes000009.pt"):
        checkpoint.save({}, tmp_path / name)
    said = ["update 4 has no commit000004.json: its save was cut short"]
    assert saves.newest(tmp_path) == (None, said)
    saves.write(tmp_path, 3, files(3))
    assert saves.newest(tmp_path) == (str(tmp_path / "model000003.pt"), said)


def test_where_every_checkpoint_is_damaged_nothing_begins_anew_unasked(tmp_path):
    for step in (5, 9):
        saves.write(tmp_path, step, files(step))
        flip(tmp_path / f"opt{step:06d}.pt")
    before = names(tmp_path)
    told = r"no checkpoint of .* is whole \(opt000009.pt is damaged.*; opt000005.pt is damaged.*move them away"
    with pytest.raises(ValueError, match=told):
        runs.take_up(str(tmp_path), str(tmp_path), "auto", "")
    runs.leave()
    assert names(tmp_path) == sorted([*before, ".lock"])


def test_one_file_is_held_against_its_commit_file(tmp_path):
    saves.write(tmp_path, 9, files(9))
    for name in files(9):
        saves.check_file(tmp_path / name)
    saves.check_file(tmp_path / "nothing000009.pt")  # whoever opens it will say so
    flip(tmp_path / "ema_0.9_000009.pt")
    saves.check_file(tmp_path / "model000009.pt")
    with pytest.raises(ValueError, match=r"ema_0.9_000009.pt is damaged: .*on purpose, delete .*commit000009.json"):
        saves.check_file(tmp_path / "ema_0.9_000009.pt")
    (tmp_path / "commit000009.json").unlink()
    saves.check_file(tmp_path / "ema_0.9_000009.pt")


def test_a_folder_of_the_original_has_no_commit_files_and_its_newest_model_is_taken(tmp_path):
    for step in (3, 4):
        checkpoint.save({"w": th.ones(2)}, tmp_path / f"model{step:06d}.pt")
    assert saves.newest(tmp_path) == (str(tmp_path / "model000004.pt"), [])
    assert saves.newest(tmp_path / "nowhere") == (None, [])


def test_thinning_keeps_the_last_the_even_ones_and_the_best(tmp_path):
    for step in range(1, 11):
        saves.write(tmp_path, step, files(step))
    saves.prune(tmp_path, keep_last=0)
    assert len(list(tmp_path.glob("commit*"))) == 10
    saves.prune(tmp_path, keep_last=2, keep_every=4, best=3)
    left = {int(path.stem[-6:]) for path in tmp_path.iterdir()}
    assert left == {3, 4, 8, 9, 10} and len(names(tmp_path)) == 5 * 5
    assert saves.newest(tmp_path)[1] == []


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path, monkeypatch):
    saver = saves.Saver(tmp_path)
    saver.submit(1, files(1))
    saver.wait()
    real = checkpoint.os.fsync

    def full(fd):
        if "model000002" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    saver.submit(2, files(2))
    with pytest.raises(OSError, match=r"cannot write .*model000002\.pt: No space left on device"):
        saver.wait()
    saver.check()  # an error is raised once
    assert saves.newest(tmp_path)[0] == str(tmp_path / "model000001.pt")
    assert not [name for name in names(tmp_path) if "tmp" in name or name == "commit000002.json"]


def test_the_system_refuses_to_write_amid_a_checkpoint_and_a_log(tmp_path):
    """A limit of the system on the size of files, met where a full disk would be: inside torch's writer."""
    resource = pytest.importorskip("resource")
    with saves.Saver(tmp_path) as saver:
        saver.submit(1, files(1))
    before, log = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}, tmp_path / "log.txt"
    log.write_text("x" * 299_999)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*opt000002\.pt: File too large"):
            saves.write(tmp_path, 2, {"ema_0.9_000002.pt": {}, "opt000002.pt": {"w": th.zeros(100_000)}})
        with pytest.raises(OSError, match=r"cannot write .*log\.txt: File too large"):
            logger.HumanOutputFormat(str(log)).writeseq(["more", "words"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == sorted([*before, "ema_0.9_000002.pt", "log.txt"])
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert saves.newest(tmp_path) == (
        str(tmp_path / "model000001.pt"), ["update 2 has no commit000002.json: its save was cut short"]
    )  # fmt: skip


def test_a_background_save_copies_before_it_returns(tmp_path):
    value = {"w": th.zeros(300_000), "nested": [{"v": th.zeros(3)}]}
    with saves.Saver(tmp_path) as saver:
        saver.submit(1, {"model000001.pt": value})
        value["w"] += 1
        value["nested"][0]["v"] += 1
    saved = checkpoint.load(tmp_path / "model000001.pt")
    assert saved["w"].sum() == 0 and saved["nested"][0]["v"].sum() == 0


def test_a_background_save_does_not_wait_for_the_disk_but_the_next_one_does(tmp_path, monkeypatch):
    disk, real = threading.Event(), saves.write
    monkeypatch.setattr(saves, "write", lambda *args: (disk.wait(30), real(*args)))
    saver = saves.Saver(tmp_path)
    saver.submit(1, files(1))
    assert names(tmp_path) == []  # and we are here: steps go on
    second = threading.Thread(target=saver.submit, args=(2, files(2)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    disk.set()
    second.join(30)
    saver.wait()
    assert saves.newest(tmp_path) == (str(tmp_path / "model000002.pt"), [])
    assert saves.committed(names(tmp_path)) == [1, 2]


# ------------------------------------------------------------------------------------------------------------- the lock


HOLD = (
    "import sys, time; from guided_diffusion import saves; lock = saves.Lock(sys.argv[1]).acquire();"
    "print('held', flush=True); time.sleep(60)"
)


def test_one_run_at_a_time_and_no_lock_outlives_its_process(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OSError, match=rf"in use by process {other.pid} on .*another --log_dir"):
            saves.Lock(tmp_path).acquire(patience_sec=0.3)
        other.send_signal(signal.SIGKILL)
        other.wait()
        begun = time.monotonic()
        saves.Lock(tmp_path).acquire().release()
        assert time.monotonic() - begun < 2
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_what_a_save_that_was_cut_short_left_is_swept_away(tmp_path):
    for name in ("model000003.pt.123.tmp", "config.json.9.tmp", "notes.tmp", "model000002.pt"):
        (tmp_path / name).touch()
    saves.sweep(tmp_path)
    assert names(tmp_path) == ["model000002.pt", "notes.tmp"]


# -------------------------------------------------------------------------------------------------------- the averages


def test_decays_follow_their_formulas():
    assert [ema.Rate(0.9).decay(s, 8) for s in (1, 5, 1000)] == pytest.approx([0.1, 5 / 14, 0.9])
    assert ema.Rate(0.9, warmup=False).decay(1, 8) == 0.9
    half = ema.HalfLife(2, rampup=0.05)
    assert half.decay(10**6, 100) ** 20 == pytest.approx(0.5)  # 20 updates of 100 are 2,000 images
    assert half.decay(100, 100) == pytest.approx(0.5 ** (100 / 500))  # 5 % of 10,000 images
    gamma = ema.power_of(0.1)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(0.01, rel=1e-12)
    assert ema.power_of(0.05) == pytest.approx(16.97, abs=0.005) and gamma == pytest.approx(6.94, abs=0.005)  # EDM2


def averaged(values, average):
    """[S] values of a weight by update -> the average after each."""
    out, now = [], 0.0
    for step, value in enumerate(values, 1):
        decay = average.decay(step, 1)
        now = decay * now + (1 - decay) * value
        out.append(now)
    return np.array(out)


def test_the_width_of_a_power_average_is_what_its_name_says():
    """The standard deviation of its weights over time, relative to the length of training."""
    n = 4000
    basis = np.array([averaged(row, ema.Power(0.07))[-1] for row in np.eye(n)[:: n // 100]])
    time_of = np.arange(1, n + 1)[:: n // 100] / n
    weights = basis / basis.sum()
    mean = (weights * time_of).sum()
    assert np.sqrt((weights * (time_of - mean) ** 2).sum()) == pytest.approx(0.07, rel=0.02)


def test_snapshots_of_two_widths_make_the_average_of_a_third():
    """A weight that wanders; snapshots every tenth of the training; against the average kept all along."""
    rng = np.random.default_rng(0)
    n = 2000
    values = np.cumsum(rng.normal(size=n)) / n**0.5
    kept = {width: averaged(values, ema.Power(width)) for width in (0.05, 0.1)}
    snapshots = [(step, width) for step in range(100, n + 1, 100) for width in kept]
    saved = np.array([kept[width][step - 1] for step, width in snapshots])
    for wanted, step in ((0.07, n), (0.12, n), (0.08, 1500)):
        weights = ema.combination(snapshots, step, wanted)
        exact = averaged(values[:step], ema.Power(wanted))[-1]
        assert weights.sum() == pytest.approx(1, abs=5e-3)
        assert abs((weights * saved).sum() - exact) < 0.02 * values.std()
        assert not weights[[each > step for each, _ in snapshots]].any()
    for width in kept:  # one of those that were kept: itself alone
        alone = ema.combination(snapshots, n, width)
        assert alone[snapshots.index((n, width))] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("texts, message", [
    (("fast",), "cannot read ema_rate 'fast'"),
    (("0.9", "x"), "cannot read ema_halflife 'x'"),
    (("1.5",), "ema_rate is a decay in .*not 1.5"),
    (("", "-2"), "ema_halflife .*not -2"),
    (("", "", "0.4"), "relative width.*not 0.4"),
])  # fmt: skip
def test_averages_that_cannot_be_are_named(texts, message):
    with pytest.raises(ValueError, match=message):
        ema.parse(*texts)
    with pytest.raises(ValueError, match="no snapshot ends at update 7; there are those of updates 3, 5"):
        ema.combination([(3, 0.1), (5, 0.1)], 7, 0.1)


# ------------------------------------------------------------------------------------------------------ another place


class Store:
    """What the project asks of blobfile, in memory."""

    def __init__(self):
        self.files = {}

    def BlobFile(self, path, mode):
        store = self

        class File(io.BytesIO):
            def close(self):
                if mode == "wb":
                    store.files[path] = self.getvalue()
                super().close()

        return File(self.files[path] if mode == "rb" else b"")

    def exists(self, path):
        return path in self.files or self.isdir(path)

    def isdir(self, path):
        return any(each.startswith(path.rstrip("/") + "/") for each in self.files)

    def listdir(self, path):
        return sorted({each[len(path.rstrip("/")) + 1 :].split("/")[0] for each in self.files if each.startswith(path)})

    def remove(self, path):
        del self.files[path]


def test_checkpoints_go_to_another_place_and_a_run_goes_on_from_there(tmp_path, monkeypatch):
    store = Store()
    monkeypatch.setitem(sys.modules, "blobfile", store)
    np.savez(tmp_path / "data.npz", arr_0=np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8))
    words = (f"--data_dir {tmp_path}/data.npz {NET} --batch_size 8 --num_workers 0 --log_interval 1 --ema_rate 0.5"
             " --save_interval 2 --keep_last 2")  # fmt: skip
    done("image_train", f"{words} --iterations 7 --log_dir {tmp_path}/whole")
    away = f"{words} --log_dir {tmp_path}/log --checkpoint_dir gs://bucket/run"
    done("image_train", f"{away} --iterations 5")
    said = done("image_train", f"{away} --iterations 7").out
    assert "going on from gs://bucket/run/model000005.pt at update 5" in said
    kinds = ("commit", "ema_0.5_", "model", "opt", "state")
    steps = sorted({int(name.rsplit(".", 1)[0][-6:]) for name in store.files if name.endswith(".pt")})
    assert steps == [6, 7] and len(store.files) == 2 * len(kinds) + 2  # config.json and run.json
    for name in ("model000007.pt", "ema_0.5_000007.pt", "opt000007.pt"):
        ours = th.load(io.BytesIO(store.files[f"gs://bucket/run/{name}"]), weights_only=True)
        assert same(ours, checkpoint.load(tmp_path / "whole" / name))
    done("image_sample", f"--model_path gs://bucket/run/model000007.pt --num_samples 2 --batch_size 2"
         f" --timestep_respacing 2 --log_dir {tmp_path}/samples")  # fmt: skip
