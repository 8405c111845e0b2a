"""
The checkpoints of a run's folder: written whole or not at all, verified before they are used, thinned out, and by one
run at a time.

A checkpoint is some files of one update and, written last, commitNNNNNN.json with the size and the SHA-256 of each. A
save that was cut short has no commit file; a file that changed afterwards no longer fits it. Either is named, and the
newest checkpoint that is whole is taken in its place.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time

import torch as th

from . import checkpoint

FORMAT = 1
LOCK_NAME = ".lock"
LOCK_PATIENCE_SEC = 10  # the workers and ranks of a run that was killed take a moment to die


def commit_name(step):
    """File name of the list of the files that belong to `step` updates."""
    return f"commit{step:06d}.json"


def state_name(step):
    """File name of what training needs beside weights, averages and optimizer."""
    return f"state{step:06d}.pt"


# ------------------------------------------------------------------------------------------------------------ writing


class _Hashing:
    """A file that counts and hashes what is written through it."""

    def __init__(self, file):
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data):
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def write(folder, step, files):
    """
    Write a checkpoint: `files` {name: object of tensors and plain values} in their order, then the commit file.

    :raises OSError: if something cannot be written; nothing then says that the checkpoint is whole.
    """
    listed = {}
    for name, obj in files.items():
        with checkpoint.writing(os.path.join(folder, name)) as file:
            hashing = _Hashing(file)
            th.save(obj, hashing)
        listed[name] = {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}
    content = {"format": FORMAT, "step": step, "files": listed}
    with checkpoint.writing(os.path.join(folder, commit_name(step))) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


class Saver:
    """
    Writes checkpoints, in the background if asked to: `submit` then returns when the tensors are copied to the host.

    :param keep_last: how many of the newest checkpoints stay; 0: all.
    :param keep_every: checkpoints whose step this divides stay as well; 0: none for that reason.
    """

    def __init__(self, folder, *, background=True, keep_last=0, keep_every=0):
        self.folder, self.background = folder, background
        self.keep_last, self.keep_every = keep_last, keep_every
        self._thread = self._error = None

    def submit(self, step, files, best=None):
        """
        Begin to write a checkpoint, after the one before has ended.

        :param best: the step of the best checkpoint so far, which stays whatever its age.
        :raises OSError: if this one (not in the background) or the one before could not be written.
        """
        self.wait()
        if not self.background:
            self._write(step, files, best)
            self.check()
            return
        files = {name: _on_host(obj) for name, obj in files.items()}
        self._thread = threading.Thread(target=self._write, args=(step, files, best), name="checkpoint")
        self._thread.start()

    def _write(self, step, files, best):
        try:
            write(self.folder, step, files)
            prune(self.folder, self.keep_last, self.keep_every, best)
        except Exception as error:  # whatever it is, the training thread shall say it
            self._error = error

    def wait(self):
        """Return when nothing is being written. Raises OSError if the last checkpoint could not be."""
        self.__exit__(None, None, None)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Let what is being written be finished; an error of it does not hide one that is on its way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if error is None:
            self.check()

    def check(self):
        """Raise the error of a write that has failed; costs nothing."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _on_host(obj):
    """A copy of nested dicts, lists and tensors in host memory, which later steps do not change."""
    if isinstance(obj, th.Tensor):
        return obj.detach().to("cpu", copy=True)
    if isinstance(obj, dict):
        return {key: _on_host(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return type(obj)(_on_host(value) for value in obj)
    return obj


# ------------------------------------------------------------------------------------------------------------ reading


def newest(folder):
    """
    The newest whole checkpoint of a folder.

    :return: (path of its model file, or None if there is no checkpoint; [what is wrong with each newer one]).
    """
    names = set(checkpoint.names_in(folder))
    problems = []
    for step in sorted(_steps(names), reverse=True):
        wrong = problem(folder, step, names)
        if wrong is None:
            return os.path.join(folder, checkpoint.model_name(step)), problems
        problems.append(wrong)
    return None, problems


def _steps(names):
    """The steps of which there is a model or a commit file or, left by a save that came to neither, any other."""
    found = (re.fullmatch(r"(?:model|opt|state|commit|ema_(?!posthoc).*_)(\d+)\.(?:pt|json)", name) for name in names)
    return {int(match[1]) for match in found if match}


def committed(names):
    """The steps, ascending, of which there is a commit file among the names of a folder."""
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"commit(\d+)\.json", name)))


def problem(folder, step, names):
    """What is wrong with the checkpoint of a step, or None. A folder without any commit file is another program's."""
    name = commit_name(step)
    if name not in names:
        if checkpoint.model_name(step) in names and not committed(names):
            return None
        return f"update {step} has no {name}: its save was cut short"
    try:
        listed = _read_commit(os.path.join(folder, name))
    except ValueError as error:
        return str(error)
    for name, expected in listed.items():
        wrong = _misfit(os.path.join(folder, name), expected) if name in names else f"{name} is missing"
        if wrong:
            return wrong
    return None


def _misfit(path, expected):
    """In which way a file is not the one that a commit file lists, or None."""
    name, (size, digest) = os.path.basename(path), measure(path)
    if size != expected["bytes"]:
        return f"{name} has {size} bytes instead of {expected['bytes']}"
    if digest != expected["sha256"]:
        return f"{name} is damaged: its SHA-256 is not the one that was written"
    return None


def check_file(path):
    """
    Look at one file of a checkpoint before it is used. One that no commit file beside it lists passes.

    :raises ValueError: if it is not what its commit file lists, or that cannot be read.
    """
    folder, name = os.path.split(os.fspath(path))
    step = re.search(r"(\d+)\.pt$", name)
    commit = step and os.path.join(folder, commit_name(int(step[1])))
    if commit and checkpoint.exists(commit) and checkpoint.exists(path):
        expected = _read_commit(commit).get(name)
        if wrong := expected and _misfit(path, expected):
            raise ValueError(f"{path}: {wrong}; take another, or, if it was changed on purpose, delete {commit}")


def _read_commit(path):
    """{file name: {"bytes", "sha256"}}; ValueError if the commit file cannot be read."""
    try:
        with checkpoint.reading(path) as file:
            content = json.loads(file.read())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return {str(name): {"bytes": int(each["bytes"]), "sha256": str(each["sha256"])}
                for name, each in content["files"].items()}  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.path.basename(path)} cannot be read ({error})") from error


def measure(path):
    """(bytes, SHA-256 in hex) of a file."""
    digest, size = hashlib.sha256(), 0
    with checkpoint.reading(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def prune(folder, keep_last, keep_every=0, best=None):
    """
    Delete committed checkpoints but for the `keep_last` newest (0: delete none), those whose step `keep_every` divides
    and the one of step `best`; the commit file goes first, so that no commit lists a file that is gone.
    """
    if not keep_last:
        return
    for step in committed(checkpoint.names_in(folder))[:-keep_last]:
        if step == best or (keep_every and step % keep_every == 0):
            continue
        commit = os.path.join(folder, commit_name(step))
        with contextlib.suppress(ValueError):
            listed = list(_read_commit(commit))
            for path in [commit, *(os.path.join(folder, name) for name in listed)]:
                checkpoint.remove(path)


# ----------------------------------------------------------------------------------------------------- one at a time


class Lock:
    """
    The right to write in a folder, held from `acquire` until `release` or the end of the process, however it ends: the
    operating system keeps it, so that none is left behind. Folders elsewhere than on a disk have none.

    :param option: the flag that names the folder, for the error.
    """

    def __init__(self, folder, option="--log_dir"):
        self.option = option
        self.path = None if checkpoint.is_remote(folder) else os.path.join(folder, LOCK_NAME)
        self.file = None

    def acquire(self, patience_sec=LOCK_PATIENCE_SEC):
        """Raises OSError, naming the process that holds the lock, if it is not free within `patience_sec`."""
        try:
            import fcntl
        except ImportError:  # Windows
            return self
        if self.path is None:
            return self
        self.file = open(self.path, "a+")  # noqa: SIM115  (kept open: that is the lock)
        for _ in range(max(1, round(patience_sec / 0.25))):
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers, unlike flock
                break
            except OSError:
                time.sleep(0.25)
        else:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            self.file = None
            raise OSError(
                f"{os.path.dirname(self.path)} is in use by {holder}: wait for it, stop it, or choose another "
                f"{self.option}"
            )
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n")
        self.file.flush()
        return self

    def release(self):
        if self.file is not None:
            self.file.close()
            self.file = None


def sweep(folder):
    """Delete what saves that were cut short left behind. Only the holder of the folder's lock may call it."""
    if not checkpoint.is_remote(folder):
        for name in checkpoint.names_in(folder):
            if re.fullmatch(r"\w[\w.]*\.\d+\.tmp", name):
                checkpoint.remove(os.path.join(folder, name))
