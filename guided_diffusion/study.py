"""
Studies: the project's programs run one after the other, as a stranger would run them, and what a report says of them.
"""

import csv
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import generate, pictures, signals
from .image_datasets import load_data


@dataclass
class Study:
    """The folder of a study and the commands it ran, in order, with their seconds; `root` holds the programs."""

    root: Path
    out: Path
    seed: int
    commands: list = field(default_factory=list)

    def begin(self, *names):
        """Make the folder, and take out of it what an earlier study left there under these names."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.rmtree(self.out / name, ignore_errors=True)

    def run(self, script, *words, output=None):
        """
        Run a program, which ends if this one does. Raises ValueError if it fails.

        :param output: file to which its output is appended; None: it appears as it comes, after the command.
        """
        words = [script, *map(str, words)]
        start = time.monotonic()
        # So small a network loses little by one thread; with more it stalls whenever another program wants a core.
        how = {"env": {"OMP_NUM_THREADS": "1", **os.environ, signals.END_WITH: str(os.getpid())}}
        command = [sys.executable, str(self.root / script), *words[1:]]
        if output is None:
            print(f"\n$ python {shlex.join(words)}", flush=True)
            done, said = subprocess.run(command, **how), "what it said stands above"
        else:
            with open(output, "ab") as file:
                done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **how)
            said = last_line(output)
        if done.returncode:
            raise ValueError(f"{script} ended with exit code {done.returncode}; {said}")
        self.commands.append((f"python {shlex.join(words)}", time.monotonic() - start))

    def train_classifier(self, name, train, held_out, iterations, noised, seed, words):
        """The checkpoint of a classifier, trained into the folder `name`: a guide by noised images, or a judge."""
        self.run(
            "scripts/classifier_train.py", "--data_dir", train, "--val_data_dir", held_out, *words, "--noised", noised,
            "--seed", seed, "--lr", "1e-3", "--weight_decay", "0.05", "--anneal_lr", True, "--iterations", iterations,
            "--eval_interval", 20, "--log_interval", 100, "--save_interval", iterations, "--log_dir", self.out / name,
        )  # fmt: skip
        return self.out / name / f"model{iterations:06d}.pt"

    def report(self, name, lines):
        """Write the lines and, after them, the commands, as the file `name`; return its path."""
        made = ["## How it was made", "", "```"]
        made += [f"{command}   # {seconds:.0f} s" for command, seconds in self.commands]
        path = self.out / name
        path.write_text("\n".join([*lines, "", *made, "```", ""]), encoding="utf-8")
        return path


def last_line(path):
    """The last line with anything in it of the text file at path, from its last `error:` on if that has one."""
    lines = [line for line in Path(path).read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1].strip().rpartition("error: ")[2] if lines else "it said nothing"


def pack(data, path, image_size, most=10000):
    """
    Write the first grey images of a folder or npz as the loader shows them, `most` or fewer, as an npz that the
    evaluator reads: arr_0 uint8 [N,S,S,1], arr_1 labels [N]. Return its path.
    """
    how = {"data_dir": str(data), "image_size": image_size, "image_channels": 1, "class_cond": True, "num_workers": 0}
    count = min(most, load_data(**how, batch_size=1, deterministic=True).num_images)
    x, cond = next(load_data(**how, batch_size=count, deterministic=True, random_flip=False))
    np.savez(path, arr_0=pictures.nearest_uint8(x).numpy(), arr_1=cond["y"].numpy())
    return path


def pick(path, picked, count, seed):
    """Write `count` of the images of an npz (all if it has fewer), drawn at random, to `picked`; return that path."""
    with np.load(path, allow_pickle=False) as npz:
        images, labels = npz["arr_0"], npz["arr_1"]
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    np.savez(picked, arr_0=images[chosen], arr_1=labels[chosen])
    return picked


def save_noising(path, diffusion, images, frames=10):
    """A strip of images [N,C,H,W] in [-1,1], as rows, at so many equidistant t from first to last."""
    import torch as th

    rows = np.linspace(0, diffusion.num_timesteps - 1, frames).round().astype(int).tolist()
    noise = th.randn(images.shape, generator=th.Generator().manual_seed(0))
    steps = [pictures.to_uint8(diffusion.q_sample(images, th.full((len(images),), t), noise)) for t in rows]
    title = "The same noise, growing with t"
    save_strip(path, steps, column_labels=[f"t={t}" for t in rows], title=title)


def save_reverse_process(path, diffusion, model, image_size, title, seed=0, frames=10, **how):
    """A strip of ten grey images, one a class, from noise to picture; `how` goes to `generate.sample_stream`."""
    shape, labels = (1, image_size, image_size), list(range(10))
    after, seen = generate.reverse_process(diffusion, model, shape, 10, frames, seed=seed, labels=labels, **how)
    save_strip(path, seen, row_labels=list("0123456789"), column_labels=after, title=title)


def save_strip(path, frames, **captions):
    """Write `pictures.strip(frames, **captions)` as the picture file `path`, making its folder if need be."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    pictures.strip(frames, **captions).save(path)


def read_log(folder):
    """The rows of a run's progress.csv, each a dict of text."""
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


def columns(rows, name):
    """(steps, values) of a column, where it has values."""
    chosen = [row for row in rows if row.get(name)]
    return [int(row["step"]) for row in chosen], [float(row[name]) for row in chosen]


def table(head, rows):
    """The lines of a Markdown table of texts."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def numbers(name, text):
    """The numbers in the text of an option. Raises ValueError for what is none, before minutes of work."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"--{name} {text!r}: give numbers, as 0,1,3")
    return found


def check_least(args, **least):
    """Raise ValueError if an option is less than what it is good for."""
    for name, lowest in least.items():
        if getattr(args, name) < lowest:
            raise ValueError(f"--{name} must be {lowest} or more, not {getattr(args, name)}")
