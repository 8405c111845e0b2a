"""
The folder of a training run: which checkpoint to go on from, whether it is the same run, and run.json, the capsule that
tells what was run, on what, with what data.
"""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys

import torch as th

from . import checkpoint, config, dist_util, logger, saves

FORMAT = 1
CAPSULE_NAME = "run.json"
PACKAGES = "torch numpy scipy blobfile tqdm pillow mpi4py torch-fidelity".split()


def take_up(folder, resume, resume_checkpoint):
    """
    Take the folder for this run until its process ends, clear away saves that were cut short, and choose the checkpoint
    to go on from; the log then ends at its step. For rank 0.

    :param resume: "auto": the newest whole checkpoint of the folder, if there is one; "never": none.
    :param resume_checkpoint: what to begin from otherwise, or "".
    :return: (path or "", lines for the log).
    :raises ValueError: with "never", if the folder holds checkpoints; if `resume_checkpoint` is damaged.
    :raises OSError: if another run is in the folder.
    """
    lock = saves.Lock(folder).acquire()
    saves.sweep(folder)
    held, problems = saves.newest(folder)
    if resume == "never" and (held or problems):
        raise ValueError(
            f"{folder} holds the checkpoints of a run and --resume is never: choose another --log_dir, or leave"
            " --resume away to go on"
        )
    said = [f"passed over: {problem}" for problem in problems]
    step = checkpoint.parse_resume_step_from_filename
    if held and step(held) >= step(resume_checkpoint):
        if resume_checkpoint and os.path.abspath(resume_checkpoint) != os.path.abspath(held):
            said.append(f"{held} is at least as far as --resume_checkpoint {resume_checkpoint}: going on from it")
        resume_checkpoint = held
    elif resume_checkpoint:
        _refuse_damaged(resume_checkpoint)
    logger.rewind(folder, step(resume_checkpoint))  # a run that died before its first save left rows as well
    _locks.append(lock)
    return resume_checkpoint, said


def is_own(folder, path):
    """Whether a checkpoint (a path or "") lies in this folder."""
    return bool(path) and os.path.dirname(os.path.abspath(path)) == os.path.abspath(folder)


_locks = []  # held until the process ends


def leave():
    """Give back the folders that this process has taken up."""
    while _locks:
        _locks.pop().release()


def _refuse_damaged(path):
    folder = os.path.dirname(path)
    names = set(checkpoint.names_in(folder or "."))
    step = checkpoint.parse_resume_step_from_filename(path)
    if saves.commit_name(step) in names:
        problem = saves.problem(folder or ".", step, names)
        if problem:
            raise ValueError(f"--resume_checkpoint {path}: {problem}; use an earlier checkpoint")


def images_seen(path, batch_size):
    """How many images a checkpoint had seen, of all processes; its step times `batch_size` where nothing tells."""
    step = checkpoint.parse_resume_step_from_filename(path)
    beside = os.path.join(os.path.dirname(path), saves.state_name(step))
    return checkpoint.load(beside)["images"] if path and checkpoint.exists(beside) else step * batch_size


# ------------------------------------------------------------------------------------------------------- the capsule


def record(folder, args, data, resumed_from):
    """
    Write run.json, or add this start to it, after a look whether it is the same run. For rank 0.

    :raises ValueError: if the folder's checkpoints come from another seed or other data, unless `args.force`.
    """
    identity = {"seed": args.seed, "data": data.fingerprint, "num_images": data.num_images}
    earlier = read(folder) if resumed_from else None
    _check_same(folder, earlier, identity, args.force)
    starts = (earlier or {"starts": []})["starts"]
    options = {name: value for name, value in vars(args).items() if name != "explicit"}
    if starts:
        _say_changes(starts[-1]["options"], options)
    starts = [*starts, {"command": command_line(), "resumed_from": resumed_from, "options": options, **surroundings()}]
    content = {"format": FORMAT, "identity": identity, "starts": starts}
    with checkpoint.writing(os.path.join(folder, CAPSULE_NAME)) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def read(folder):
    """The content of run.json in a folder, or None. Raises ValueError if it cannot be read."""
    path = os.path.join(folder, CAPSULE_NAME)
    if not checkpoint.exists(path):
        return None
    try:
        with checkpoint.reading(path) as file:
            content = json.loads(file.read())
        if content["format"] != FORMAT or not content["starts"] or not isinstance(content["identity"], dict):
            raise ValueError(f"its format is {content['format']}")
        return content
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): mend it, or move it away") from error


def _check_same(folder, earlier, identity, force):
    for name, now in identity.items():
        before = earlier["identity"].get(name, now) if earlier else now
        if before != now:
            told = (
                f"the checkpoints of {folder} come from a run with {name} {before}, this one has {now}: it would be "
                "neither run"
            )
            if not force:
                raise ValueError(f"{told}; choose another --log_dir, or go on all the same by --force True")
            logger.warn(f"{told}; going on by --force")


def _say_changes(before, now):
    passing = {"resume_checkpoint", "resume", "force", "log_dir"}
    for name in sorted(before.keys() & now.keys() - passing):
        if before[name] != now[name]:
            logger.log(f"changed since the last start: {name} {before[name]!r} -> {now[name]!r}")


def command_line():
    """The words of this process's command, as a list; the interpreter left away."""
    return [os.path.abspath(sys.argv[0]), *sys.argv[1:]]


def surroundings():
    """Where and with what this process runs."""
    place = dist_util.resolve(os.environ)
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "folder": os.getcwd(),
        "ranks": dist_util.world_size(),
        "launcher": place.launcher,
        "python": platform.python_version(),
        "packages": versions(),
        "git": git_state(),
        "machine": machine(),
    }


def versions():
    """{package: version} of those that are installed."""
    from importlib import metadata

    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state():
    """The commit of the source and whether it was changed since; None where there is no repository."""
    source = os.path.dirname(os.path.abspath(__file__))

    def git(*words):
        done = subprocess.run(["git", "-C", source, *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit and {"commit": commit, "changed": bool(changes)}


def machine():
    """Processor, cores, memory and GPUs, in words and numbers."""
    gpus = [th.cuda.get_device_name(i) for i in range(th.cuda.device_count())]
    return {"system": platform.platform(), "cores": os.cpu_count(), "threads": th.get_num_threads(), "gpus": gpus}


def replay_command(content, log_dir):
    """
    The words that run the first start of a capsule again into another folder: a launcher if it had several processes,
    the interpreter, the program and its flags.

    :raises ValueError: if the program is not there any more.
    """
    start = content["starts"][0]
    program, *words = start["command"]
    if not os.path.exists(program):
        raise ValueError(f"the program {program} of the run is not there any more")
    words = _without(words, "log_dir", "resume", "resume_checkpoint" if start["resumed_from"] is None else "log_dir")
    launcher = [sys.executable]
    if start["ranks"] > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(start["ranks"])]
    return [*launcher, program, *words, "--log_dir", log_dir]


def _without(words, *names):
    """Command-line words without these flags and their values, however they are written."""
    kept, skip = [], False
    for word in words:
        if skip and not word.startswith("--"):
            skip = False
            continue
        name = word.removeprefix("--").split("=")[0] if word.startswith("--") else None
        skip = name in names and "=" not in word
        if name not in names:
            kept.append(word)
    return kept


def shown(words):
    """Words as a line for a shell."""
    return shlex.join(words)


def nearest_run(folder):
    """The error for a folder without a capsule."""
    near = config.nearest(os.path.basename(folder), os.listdir(os.path.dirname(os.path.abspath(folder)) or "."))
    return FileNotFoundError(f"no {CAPSULE_NAME} in {folder}{near}")
