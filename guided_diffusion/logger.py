"""
Key-value and text logging to the terminal, log.txt, progress.csv, progress.json (one object a line, as progress.jsonl
is under its usual name), TensorBoard and Weights & Biases.

The interface is that of the OpenAI baselines logger. Files are appended to, never truncated: a run that comes back to
its folder goes on with its own log.
"""

import contextlib
import csv
import datetime
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import defaultdict

from . import checkpoint, dist_util

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50

# ---------------------------------------------------------------------------------------------------------------------
# Writers


class _Writer:
    def close(self):
        """Release what the writer holds; most open their file for each row only."""


class KVWriter(_Writer):
    def writekvs(self, kvs):
        """Write one row {name: number or text}."""
        raise NotImplementedError


class SeqWriter(_Writer):
    def writeseq(self, seq):
        """Write one line of words."""
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """Tables and lines for people. `filename_or_file`: a path to append to, or an open file."""

    def __init__(self, filename_or_file):
        self.target = filename_or_file

    def writekvs(self, kvs):
        rows = [(_truncate(name), _truncate(_number_text(kvs[name]))) for name in sorted(kvs, key=str.lower)]
        if not rows:
            print("WARNING: tried to write an empty row", file=sys.stderr)
            return
        name_width = max(len(name) for name, _ in rows)
        value_width = max(len(value) for _, value in rows)
        rule = "-" * (name_width + value_width + 7)
        lines = [f"| {name:<{name_width}} | {value:<{value_width}} |" for name, value in rows]
        self._write("\n".join([rule, *lines, rule]))

    def writeseq(self, seq):
        self._write(" ".join(seq))

    def _write(self, text):
        if hasattr(self.target, "write"):
            self.target.write(text + "\n")
            self.target.flush()
        else:
            _append(self.target, text)


class JSONOutputFormat(KVWriter):
    def __init__(self, filename):
        self.filename = filename
        _drop_unfinished_line(filename)

    def writekvs(self, kvs):
        _append(self.filename, json.dumps(dict(sorted(kvs.items()))))


class CSVOutputFormat(KVWriter):
    """A new name adds a column: the header grows and the older rows get empty cells."""

    def __init__(self, filename):
        self.filename = filename
        _drop_unfinished_line(filename)
        self.keys = next(iter(self._rows()), [])

    def writekvs(self, kvs):
        new = sorted(kvs.keys() - set(self.keys))
        if new:
            self._add_columns(new)
        with _appending(self.filename) as file:
            self._writer(file).writerow([kvs.get(key) for key in self.keys])

    def _add_columns(self, new):
        self.keys += new
        older = [row + [""] * (len(self.keys) - len(row)) for row in self._rows()[1:]]
        beside = f"{self.filename}.tmp"
        with open(beside, "w", encoding="utf-8", newline="") as file:
            self._writer(file).writerows([self.keys, *older])
        os.replace(beside, self.filename)  # at no moment is the history missing

    def _rows(self):
        if not os.path.exists(self.filename):
            return []
        with open(self.filename, encoding="utf-8", newline="") as file:
            return list(csv.reader(file))

    @staticmethod
    def _writer(file):
        return csv.writer(file, lineterminator="\n")


class TensorBoardOutputFormat(KVWriter):
    """Numbers as scalars, at the row's own `step` if it has one, else at the count of rows."""

    def __init__(self, dir):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("log format tensorboard needs the package tensorboard: pip install tensorboard") from None
        self.writer = SummaryWriter(dir)
        self.rows = 0

    def writekvs(self, kvs):
        self.rows += 1
        step = int(kvs.get("step", self.rows))
        for name, value in kvs.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def writeimage(self, name, path, step):
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self):
        self.writer.close()


class WandbOutputFormat(KVWriter):
    """
    A run of Weights & Biases, of the project $WANDB_PROJECT or guided-diffusion; the same again for the same folder, so
    that a run which goes on does so there too. WANDB_MODE=offline writes it to the folder only.
    """

    def __init__(self, dir):
        try:
            import wandb
        except ImportError:
            raise ValueError("log format wandb needs the package wandb: pip install wandb") from None
        self.wandb, dir = wandb, os.path.abspath(dir)
        self.run = wandb.init(
            dir=dir, name=os.path.basename(dir), id=hashlib.sha256(dir.encode()).hexdigest()[:16], resume="allow",
            project=os.environ.get("WANDB_PROJECT", "guided-diffusion"),
        )  # fmt: skip

    def writekvs(self, kvs):
        row = {name: value for name, value in kvs.items() if isinstance(value, (int, float))}
        self.run.log(row, step=int(kvs["step"]) if "step" in kvs else None)

    def writeimage(self, name, path, step):
        self.run.log({name: self.wandb.Image(path)}, step=step)

    def close(self):
        self.run.finish()


def make_output_format(format, ev_dir, log_suffix=""):
    """The writer of one of the names below, for files in `ev_dir` with `log_suffix` in the name."""
    makers = {
        "stdout": lambda: HumanOutputFormat(sys.stdout),
        "log": lambda: HumanOutputFormat(os.path.join(ev_dir, f"log{log_suffix}.txt")),
        "json": lambda: JSONOutputFormat(os.path.join(ev_dir, f"progress{log_suffix}.json")),
        "jsonl": lambda: JSONOutputFormat(os.path.join(ev_dir, f"progress{log_suffix}.jsonl")),
        "csv": lambda: CSVOutputFormat(os.path.join(ev_dir, f"progress{log_suffix}.csv")),
        "tensorboard": lambda: TensorBoardOutputFormat(os.path.join(ev_dir, f"tb{log_suffix}")),
        "wandb": lambda: WandbOutputFormat(ev_dir),
    }
    if format not in makers:
        raise ValueError(f"unknown log format {format!r}; choose from {', '.join(makers)}")
    os.makedirs(ev_dir, exist_ok=True)
    return makers[format]()


def _number_text(value):
    return f"{float(value):<8.3g}" if hasattr(value, "__float__") else str(value)


def _truncate(text, longest=30):
    return text[: longest - 3] + "..." if len(text) > longest else text


def _append(filename, line):
    with _appending(filename) as file:
        file.write(line + "\n")


@contextlib.contextmanager
def _appending(filename):
    try:
        with open(filename, "a", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:  # of a write, it does not name the file
        raise OSError(f"cannot write {filename}: {error.strerror or error}") from error


def _drop_unfinished_line(filename):
    """A process that died while writing leaves part of a row, whose last number may be cut: remove it."""
    if os.path.exists(filename):
        with open(filename, "rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def rewind(dir, step):
    """
    Take the rows of later steps than `step` out of the progress files of a folder: a run that goes on from that step
    writes them again. Call it before `configure`.
    """
    for name, parse in (("progress.csv", _csv_steps), ("progress.json", _json_steps), ("progress.jsonl", _json_steps)):
        path = os.path.join(dir, name)
        if os.path.exists(path):
            _drop_unfinished_line(path)
            with open(path, encoding="utf-8", newline="") as file:
                lines = file.readlines()
            kept = [line for line, at in zip(lines, parse(lines)) if at is None or at <= step]
            if kept != lines:
                with checkpoint.writing(path) as file:
                    file.write("".join(kept).encode())


def _csv_steps(lines):
    header, *rows = csv.reader(lines) if lines else [[]]
    place = header.index("step") if "step" in header else None
    return [None, *(None if place is None or not row[place] else float(row[place]) for row in rows)]


def _json_steps(lines):
    return [json.loads(line).get("step") for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# The interface


def logkv(key, val):
    """Set `key` in the row that the next `dumpkvs` writes; a later value replaces an earlier one."""
    get_current().logkv(key, val)


def logkv_mean(key, val):
    """The same, but several values in one row are averaged."""
    get_current().logkv_mean(key, val)


def logkvs(d):
    for key, val in d.items():
        logkv(key, val)


def dumpkvs():
    """Write the row to every output, start an empty one, and return it."""
    return get_current().dumpkvs()


def logimage(name, path, step):
    """Show the picture file `path` under a name in the outputs that have pictures."""
    for writer in get_current().output_formats:
        if hasattr(writer, "writeimage"):
            writer.writeimage(name, path, step)


def getkvs():
    return get_current().name2val


def log(*args, level=INFO):
    """Write the words, separated by spaces, to every text output, if `level` reaches that of the logger."""
    get_current().log(*args, level=level)


def debug(*args):
    log(*args, level=DEBUG)


def info(*args):
    log(*args, level=INFO)


def warn(*args):
    log(*args, level=WARN)


def error(*args):
    log(*args, level=ERROR)


def set_level(level):
    get_current().set_level(level)


def set_comm(comm):
    get_current().set_comm(comm)


def get_dir():
    """The folder of the log files; models and samples are written there too."""
    return get_current().get_dir()


record_tabular = logkv
dump_tabular = dumpkvs


@contextlib.contextmanager
def profile_kv(scopename):
    """Add the seconds spent inside to the value `wait_SCOPENAME` of the row."""
    start = time.time()
    try:
        yield
    finally:
        get_current().name2val[f"wait_{scopename}"] += time.time() - start


def profile(n):
    """Decorator: `profile_kv(n)` around every call."""

    def decorate(function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate


class Logger:
    """
    :param dir: folder of the outputs, or None.
    :param output_formats: writers.
    :param comm: if given, `dumpkvs` averages over its ranks and rank 0 writes; mpi4py's, or anything with `rank` and
        `gather(obj)` (a list on rank 0).
    """

    DEFAULT = None  # made on first use, so that importing writes nothing
    CURRENT = None

    def __init__(self, dir, output_formats, comm=None):
        self.name2val = defaultdict(float)
        self.name2cnt = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm

    def logkv(self, key, val):
        self.name2val[key] = val

    def logkv_mean(self, key, val):
        count = self.name2cnt[key]
        self.name2val[key] = self.name2val[key] * (count / (count + 1)) + val / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self):
        if self.level == DISABLED:
            return {}
        row = {name: val.item() if hasattr(val, "item") else val for name, val in self.name2val.items()}
        if self.comm is not None:
            row = mpi_weighted_mean(self.comm, {name: (val, self.name2cnt.get(name, 1)) for name, val in row.items()})
        if self.comm is None or self.comm.rank == 0:
            for writer in self.output_formats:
                if isinstance(writer, KVWriter):
                    writer.writekvs(dict(row))
        self.name2val.clear()
        self.name2cnt.clear()
        return row

    def log(self, *args, level=INFO):
        if self.level <= level:
            for writer in self.output_formats:
                if isinstance(writer, SeqWriter):
                    writer.writeseq(map(str, args))

    def set_level(self, level):
        self.level = level

    def set_comm(self, comm):
        self.comm = comm

    def get_dir(self):
        return self.dir

    def close(self):
        for writer in self.output_formats:
            writer.close()


def mpi_weighted_mean(comm, local_name2valcount):
    """
    {name: mean over ranks, weighted by count} of {name: (value, count)} on rank 0 of `comm`, {} elsewhere. What is no
    number is left out.
    """
    gathered = comm.gather(local_name2valcount)
    if comm.rank != 0:
        return {}
    totals, counts = defaultdict(float), defaultdict(float)
    for of_rank in gathered:
        for name, (val, count) in of_rank.items():
            with contextlib.suppress(TypeError, ValueError):
                totals[name] += float(val) * count
                counts[name] += count
    return {name: totals[name] / counts[name] for name in totals}


# ---------------------------------------------------------------------------------------------------------------------
# Choosing the outputs


def get_current():
    """The logger in use; without a call to `configure`, one with the default folder and formats."""
    if Logger.CURRENT is None:
        configure()
        Logger.DEFAULT = Logger.CURRENT
    return Logger.CURRENT


def default_dir():
    """A new folder's name, by the time of day, in the temporary folder of the system."""
    name = datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
    return os.path.join(tempfile.gettempdir(), name)


def configure(dir=None, format_strs=None, comm=None, log_suffix=""):
    """
    Log to the folder `dir`, else $OPENAI_LOGDIR, else `default_dir()` as rank 0 names it (so all ranks must call).

    :param format_strs: names of writers; else $OPENAI_LOG_FORMAT (stdout,log,csv) on rank 0 and $OPENAI_LOG_FORMAT_MPI
        (log) on the others, whose files carry the suffix -rankNNN.
    :raises OSError: the folder cannot be written.
    """
    dir = dir or os.environ.get("OPENAI_LOGDIR") or dist_util.gather_objects(default_dir())[0]
    dir = os.path.expanduser(dir)
    checkpoint.check_writable(dir)
    rank = dist_util.rank()
    if rank > 0:
        log_suffix = f"{log_suffix}-rank{rank:03d}"
    if format_strs is None:
        variable, usual = ("OPENAI_LOG_FORMAT_MPI", "log") if rank > 0 else ("OPENAI_LOG_FORMAT", "stdout,log,csv")
        format_strs = os.environ.get(variable, usual).split(",")
    writers = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
    Logger.CURRENT = Logger(dir=dir, output_formats=writers, comm=comm)
    if writers:
        log(f"Logging to {dir}")


def reset():
    """Close the configured logger and go back to the default one."""
    if Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
        Logger.CURRENT = Logger.DEFAULT


@contextlib.contextmanager
def scoped_configure(dir=None, format_strs=None, comm=None):
    """`configure` for the length of a with block."""
    before = Logger.CURRENT
    configure(dir=dir, format_strs=format_strs, comm=comm)
    try:
        yield
    finally:
        Logger.CURRENT.close()
        Logger.CURRENT = before
