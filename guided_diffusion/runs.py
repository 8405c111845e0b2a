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

from . import checkpoint, config, dist_util, logger, saves, sizes
from .image_datasets import load_data

FORMAT = 1
CAPSULE_NAME = "run.json"
_START = {"command": list, "options": dict, "folder": str, "ranks": int, "packages": dict, "machine": dict}
PACKAGES = "torch numpy scipy blobfile tqdm pillow mpi4py torch-fidelity".split()


def take_up(log_dir, folder, resume, resume_checkpoint):
    """
    Take the folders for this run until its process ends, clear away saves that were cut short, and choose the
    checkpoint to go on from; the log then ends at its step. For rank 0.

    :param folder: of the checkpoints.
    :param resume: "auto": the newest whole checkpoint of the folder, if there is one; "never": none.
    :param resume_checkpoint: what to begin from otherwise, or "".
    :return: (path or "", lines for the log).
    :raises ValueError: with "never", if the folder holds a run; if all that were written whole are damaged; if
        `resume_checkpoint` is.
    :raises OSError: if another run is in the folder.
    """
    for each in dict.fromkeys((log_dir, folder)):
        _locks.append(saves.Lock(each).acquire())
    saves.sweep(folder)
    held, problems = saves.newest(folder)
    if resume == "never" and (held or problems or checkpoint.exists(os.path.join(folder, CAPSULE_NAME))):
        raise ValueError(
            f"{folder} holds the checkpoints of a run, or its {CAPSULE_NAME}, and --resume is never: choose another"
            " --log_dir, or leave --resume away to go on"
        )
    if not (held or resume_checkpoint) and saves.committed(checkpoint.names_in(folder)):
        raise ValueError(
            f"no checkpoint of {folder} is whole ({'; '.join(problems)}): to begin anew, move them away or choose"
            " another --log_dir"
        )
    said = [f"passed over: {problem}" for problem in problems]
    step = checkpoint.parse_resume_step_from_filename
    if held and step(held) >= step(resume_checkpoint):
        if resume_checkpoint and os.path.abspath(resume_checkpoint) != os.path.abspath(held):
            said.append(f"{held} is at least as far as --resume_checkpoint {resume_checkpoint}: going on from it")
        resume_checkpoint = held
    elif resume_checkpoint:
        _refuse_damaged(resume_checkpoint)
    logger.rewind(log_dir, step(resume_checkpoint))  # a run that died before its first save left rows as well
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
    _check_same(folder, earlier, identity, args.data_dir, args.force)
    starts = (earlier or {"starts": []})["starts"]
    options = {name: value for name, value in vars(args).items() if name != "explicit"}
    now = surroundings()
    if starts:
        for line in changes(starts[-1]["options"], options) + differences(starts[-1], now):
            logger.log(f"changed since the last start: {line}")
    starts = [*starts, {"command": command_line(), "resumed_from": resumed_from, "options": options, **now}]
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
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
        if not content["starts"] or not isinstance(content["identity"], dict):
            raise ValueError("it tells of no start")
        for start in content["starts"]:
            absent = [name for name, kind in _START.items() if not isinstance(start[name], kind)]
            if absent or not start["command"]:
                raise ValueError(f"it does not tell {', '.join(absent) or 'the command'}")
        return content
    except (ValueError, KeyError, TypeError) as error:
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise ValueError(f"{path} cannot be read ({lacks}{error}): mend it, or move it away") from error


def _check_same(folder, earlier, identity, data_dir, force):
    if not earlier:
        return
    then = {**identity, **earlier["identity"]}
    differing = []
    if then["seed"] != identity["seed"]:
        differing.append(("seed", then["seed"], identity["seed"]))
    if (then["data"], then["num_images"]) != (identity["data"], identity["num_images"]):
        dirs = earlier["starts"][-1]["options"].get("data_dir"), data_dir
        differing.append(("data", *(f"{each['num_images']} images in {where} ({each['data']})"
                                    for each, where in zip((then, identity), dirs))))  # fmt: skip
    for name, before, now in differing:
        told = f"the checkpoints of {folder} come from a run with {name} {before}, this one has {now}"
        if not force:
            raise ValueError(
                f"{told}: it would be neither run; choose another --log_dir, or go on all the same by --force True"
            )
        logger.warn(f"{told}; going on by --force")


def changes(before, now):
    """The options, but for those of where and how a run starts, that differ between two starts: lines of text."""
    passing = {"resume_checkpoint", "resume", "force", "log_dir"}
    names = sorted(before.keys() & now.keys() - passing)
    return [f"{name} {before[name]!r} -> {now[name]!r}" for name in names if before[name] != now[name]]


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


def versions(names=PACKAGES):
    """{package: version} of those that are installed."""
    from importlib import metadata

    found = {}
    for name in names:
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


# ---------------------------------------------------------------------------------------------------- told and replayed


def open_run(folder):
    """
    (the folder, the content of its run.json); the path of run.json itself will do.

    :raises FileNotFoundError: if there is none; ValueError if it cannot be read.
    """
    folder = os.path.normpath(folder)
    if os.path.basename(folder) == CAPSULE_NAME:
        folder = os.path.dirname(folder) or "."
    content = read(folder)
    if content is None:
        parent, name = os.path.split(os.path.abspath(folder))
        found = checkpoint.names_in(parent)
        others = [other for other in found if checkpoint.exists(os.path.join(parent, other, CAPSULE_NAME))]
        raise FileNotFoundError(f"no {CAPSULE_NAME} in {folder}{config.nearest(name, others)}")
    return folder, content


def told(content):
    """A capsule as a text: what identifies the run, and its starts."""
    told = [f"run of {content['identity']}".replace("'", "")]
    before = None
    for number, start in enumerate(content["starts"], 1):
        by = f" by {start['launcher']}" if start["launcher"] else ""
        resumed = f"going on from {start['resumed_from']}" if start["resumed_from"] else "from the beginning"
        told += [f"start {number}: {start['time']}, {resumed}", f"  command   {shown(start['command'])}"]
        told += [f"  in        {start['folder']}, {start['ranks']} process(es){by}"]
        told += [f"  {name:<9} {value}" for name, value in _flat(start).items()]
        told += [f"  changed   {line}" for line in (changes(before["options"], start["options"]) if before else [])]
        before = start
    return "\n".join(told)


def _flat(start):
    """{a short name: what a start says of its software and machine, in words}."""
    git, machine = start["git"] or {}, start["machine"]
    edited = " with changes not committed" if git.get("changed") else ""
    return {
        "software": ", ".join(f"{k} {v}" for k, v in {"python": start["python"], **start["packages"]}.items()),
        "source": f"commit {git['commit']}{edited}" if git else "no repository",
        "machine": f"{machine['system']}, {machine['cores']} cores, {machine['threads']} threads"
                   + "".join(f", {gpu}" for gpu in machine["gpus"]),
    }  # fmt: skip


def differences(start, now):
    """What of software, source and machine is not as it was at a start: lines for the reader."""
    lines = differing(*({"python": each["python"], **each["packages"]} for each in (start, now)))
    then, today = _flat(start), _flat(now)
    return lines + [f"{k}: {then[k]} -> {today[k]}" for k in ("source", "machine") if then[k] != today[k]]


def differing(before, after):
    """["name version -> other version"] of two {package: version}."""
    return [f"{name} {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
            for name in before | after if before.get(name) != after.get(name)]  # fmt: skip


def fingerprint_now(start):
    """
    The (fingerprint, number of images) of a start's data as they are now.

    :raises ValueError, FileNotFoundError: if they are not there any more, or cannot be read.
    """
    options = start["options"]
    path = options["data_dir"]
    if not checkpoint.is_remote(path):
        path = os.path.join(start["folder"], path)
    if not checkpoint.exists(path):
        raise FileNotFoundError(f"the data of the run, {path}, are not there any more")
    data = load_data(
        data_dir=path,
        batch_size=1,
        image_size=sizes.size_of(options),
        class_cond=options.get("class_cond", True),  # a classifier always is
        label_from=options["label_from"],
        num_workers=0,
    )
    return data.fingerprint, data.num_images


def replay_command(start, log_dir):
    """
    The words that do a start again, into another folder: a launcher if it had several processes, the interpreter, the
    program and its flags. To be run in `start["folder"]`.

    :raises FileNotFoundError: if the program is not there any more.
    """
    program, *words = start["command"]
    if not os.path.exists(program):
        raise FileNotFoundError(f"the program of the run, {program}, is not there any more")
    words = _without(words, "log_dir", "resume", "resume_checkpoint")
    if start["options"].get("resume_checkpoint"):  # of another folder; of its own if run.json is younger than the run
        words += ["--resume_checkpoint", start["options"]["resume_checkpoint"]]
    launcher = [sys.executable]
    if start["ranks"] > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(start["ranks"])]
    return [*launcher, program, *words, "--log_dir", os.path.abspath(log_dir)]


def _without(words, *names):
    """
    Command-line words without these flags and their values, as --flag value, --flag=value, or --flag alone. A value
    may begin with one dash, as numbers below zero do, but not with two: that is the next flag.
    """
    kept, skip = [], False
    for word in words:
        if skip and not word.startswith("--"):
            skip = False
            continue
        name, equals, _ = word.removeprefix("--").partition("=")
        gone = word.startswith("--") and name in names
        skip = gone and not equals
        if not gone:
            kept.append(word)
    return kept


def shown(words):
    """Words as a line for a shell."""
    return shlex.join(words)
