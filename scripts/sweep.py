"""
Samplers x steps x guidance scales x averages of one checkpoint: draw, score with intervals, and compare on one page.

The same command goes on where it was broken off: a case that was drawn, or scored, is not done again.
"""

import itertools
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion import config
from guided_diffusion.config import option


@dataclass
class SweepOptions:
    """sweep"""

    model_path: str = option("", "checkpoint of the diffusion model, modelNNNNNN.pt or an average of it")
    classifier_path: str = option("", "classifier that guides; empty: the scales are of classifier-free guidance")
    reference: str = option("", "npz of real images to score against")
    samplers: str = option("ddpm", "samplers by name, as ddpm,ddim,dpmpp_2m")
    steps: str = option("50", "numbers of steps, as 10,20,50")
    scales: str = option("1", "guidance scales, as 0,1,3; without a classifier 1 is no guidance")
    emas: str = option("", "rates of averages beside the checkpoint, as 0.9999,0.999; model: it as it is; empty: that")
    num_samples: int = option(1000, "images to draw in each case")
    batch_size: int = option(100, "images at once")
    classes: str = option("", "labels or class names to draw in turn; all: every class in turn; empty: random")
    more: str = option("", "more flags of the sampling program, alike in all cases, in quotes: '--eta 0.5'")
    extractor: str = option("inception", "what the scores look with: inception, or a classifier checkpoint")
    weights: str = option("", "file of the Inception weights; empty: $GD_INCEPTION_WEIGHTS, else download")
    device: str = option("", "cpu, cuda, cuda:1, mps...; empty: a GPU if there is one")
    seed: int = option(0, "seed of the samples, alike in all cases, so that differences show (evaluations/compare.py)")
    out: str = option("runs/sweep", "folder of the cases, the features and the page")


OPTIONS = (SweepOptions,)
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import torch as th

from evaluations import cases, report, tables
from evaluations.features import make_extractor
from guided_diffusion import checkpoint, generate, published, sampling, study
from guided_diffusion.script_util import open_diffusion


def cases_of(args):
    """The cases in order, each a dict: sampler, steps, scale, ema, and path, the checkpoint of that average."""
    for name in args.samplers.split(","):
        if name not in sampling.SAMPLERS or name == "adaptive":
            raise ValueError(f"unknown sampler {name!r} in --samplers{config.nearest(name, sampling.SAMPLERS)}")
    steps = study.numbers("steps", args.steps)
    if any(count != int(count) or count < 1 for count in steps):
        raise ValueError(f"--steps {args.steps!r}: give whole numbers of 1 or more, as 10,20")
    paths = {Path(args.model_path).stem: args.model_path}
    if args.emas:
        paths = {rate: beside(args.model_path, rate) for rate in args.emas.split(",")}
    every = itertools.product(paths, args.samplers.split(","), map(int, steps), study.numbers("scales", args.scales))
    return [{"sampler": name, "steps": count, "scale": scale, "ema": rate, "path": paths[rate]}
            for rate, name, count, scale in every]  # fmt: skip


def beside(path, rate):
    """The checkpoint of an average of that rate, of the same update as the one at path. FileNotFoundError if none."""
    if rate == "model":
        return path
    step = int(Path(path).stem.split("_")[-1].removeprefix("model"))
    found = Path(path).parent / checkpoint.ema_name(rate, step)
    if not found.is_file():
        raise FileNotFoundError(f"{found}: no average of the rate {rate} (--emas) beside {path}")
    return str(found)


def draw(work, args, case, folder):
    """(npz of a case's samples, what drawn.json tells of them), drawn unless the folder holds them as asked for."""
    guided = ["--classifier_path", args.classifier_path, "--classifier_scale"] if args.classifier_path else []
    words = [
        f"scripts/{'classifier' if guided else 'image'}_sample.py", "--model_path", case["path"],
        *(guided or ["--guidance_scale"]), f"{case['scale']:g}", "--sampler", case["sampler"], "--steps", case["steps"],
        "--num_samples", args.num_samples, "--batch_size", args.batch_size, "--seed", args.seed,
        *(["--classes", args.classes] if args.classes else []), *(["--device", args.device] if args.device else []),
        *shlex.split(args.more),
    ]  # fmt: skip
    files = case["path"], args.classifier_path
    return cases.draw(work.run, words, files, folder, evaluations=evaluations(case, guided))


def evaluations(case, guided):
    """How often the diffusion network looks at each image: counted on one pixel, twice for classifier-free guidance."""
    _, diffusion, _ = open_diffusion(case["path"])
    count = generate.count_evaluations(diffusion, sampler=case["sampler"], steps=case["steps"])
    return count * (1 if guided or case["scale"] == 1 else 2)


def check(args):
    """Raise ValueError or FileNotFoundError for options that would fail only after minutes of work."""
    for name in ("model_path", "reference"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing")
    for name in ("model_path", "classifier_path"):
        setattr(args, name, vars(args)[name] and published.locate(vars(args)[name]))
    for name in ("model_path", "reference", "classifier_path"):
        path = getattr(args, name)
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"--{name} {path}: no such file")
    study.check_least(args, num_samples=4, batch_size=1, seed=0)


def main():
    args = config.parse(__doc__, *OPTIONS)
    check(args)
    wanted, made = cases_of(args), []
    device = args.device or ("cuda" if th.cuda.is_available() else "cpu")

    def extractor():
        if not made:
            made.append(make_extractor(args.extractor, device, args.weights or None))
        return made[0]

    extractor()  # what it needs must be there before hours of drawing
    work = study.Study(Path(__file__).resolve().parent.parent, Path(args.out), args.seed)
    work.begin()
    paths = []
    for number, case in enumerate(wanted, 1):
        name = "_".join(f"{case[key]:g}" if key == "scale" else str(case[key]) for key in report.SETTINGS)
        folder = work.out / "cases" / name
        samples, drawn = draw(work, args, case, folder)
        settings = {**{key: case[key] for key in report.SETTINGS}, "evaluations": drawn["evaluations"]}
        paths.append(cases.score(args, samples, settings, extractor))
        found = json.loads(paths[-1].read_text())
        told = ", ".join(f"{tables.NAMES[key]} {tables.score(found, key)}" for key in ("fid", "precision", "recall"))
        print(f"case {number} of {len(wanted)}, {name}: {told}", flush=True)
    report.write(work.out, report.page(paths, f"Sweep of {args.model_path}"))
    print(f"report: {work.out / 'report.html'}")


if __name__ == "__main__":
    config.run_program(main)
