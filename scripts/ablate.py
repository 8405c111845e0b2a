"""
A study of arms: a base and changes to it, from one short file, each trained with several seeds and scored at equal
numbers of images; a table of the differences to the base, paired by seed (docs/studies.md).

The same command goes on where it was broken off, and does nothing twice.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion import config, sizes
from guided_diffusion.config import option


@dataclass
class AblateOptions:
    """study"""

    out: str = option("", "folder of the work and the results; empty: runs/NAME of the study file")
    devices: str = option("", "devices to run arms on side by side, as cuda:0,cuda:1; empty: as the programs choose")
    parallel: int = option(1, "arms at once on each device")
    estimate: bool = option(True, "measure the speed of a few training steps of each arm, to say how long all takes")
    price: float = option(0.0, "cost of an hour of one device, in whatever currency, to be told beforehand")
    recorded: str = option(
        "", "results.json to compare the end with; empty: that in the folder beside the study file that has its name"
    )
    run: bool = option(True, "run the study after its plan is printed; False: the plan alone")


OPTIONS = (AblateOptions,)
POSITIONAL = {"study": "file of the study, TOML or json"}
config.answer_help(__name__, __doc__, *OPTIONS, positional=POSITIONAL)  # before what takes seconds to import

import numpy as np
import torch as th

from evaluations import claims, outcome, reference_files, sources, tables
from evaluations.evaluator import Scorer, Settings, write
from evaluations.features import make_extractor
from guided_diffusion import ablation, dist_util, feasible, kept, pace, recipes, rehearsal, saves, study
from guided_diffusion.network_options import ClassifierOptions, DiffusionOptions

STARTING_SEC = 5  # of a program, until it works
FORWARD_SHARE = 1 / 3  # of a training step's time that a look of the network takes


# ----------------------------------------------------------------------------------------------------------- the plan


class Plan(recipes.Recipes):
    """A study that is known to be possible: its arms, its data, its judge, and the pieces of work of each run."""

    def __init__(self, content, out):
        arms = ablation.arms_of(content)
        claims.check(content["claims"], [arm.name for arm in arms])
        judge = ablation.judge_of(content, arms[0])
        images = feasible.check(content, arms, judge)
        self.images, known = images[ablation.BASE][1], recipes.Known(out / "data.json")
        data = {name: known.name(each[0], content["data"]) for name, each in images.items()}
        reference = reference_files.find(content["evaluation"]["reference"] or content["data"])
        super().__init__(content, out / "work", arms, judge, data, reference, known)
        self._check_metric()
        if content["budget"]["images"]:
            self.set_iterations({})

    def _check_metric(self):
        """Raise ValueError if there are too few images for a neighbourhood, or no network to look at them."""
        usual, asked = Settings(), self.study["evaluation"]
        least = max(usual.k, usual.density_k) + 1
        size, channels = self._look()
        source = sources.open_source(self.reference, channels, size)
        for what, count in (("samples", asked["samples"]), ("reference images", source.count)):
            if count is not None and count < least and (count or what == "samples"):
                raise ValueError(
                    f"{count} {what} are too few for precision, recall, density and coverage: give {least} or more"
                )
        if not self.judge:
            extractor = make_extractor(asked["extractor"], "cpu", asked["weights"] or None)
            height, width = sizes.sides(size)
            extractor(np.zeros((1, height, width, channels), np.uint8))

    def _look(self):
        """(size, as of `sizes.parse_size`, channels) of the images that are scored."""
        flags = self.arms[0].flags()
        return flags["image_size"], flags["image_channels"]

    def scorer(self, extractor, out):
        """The Scorer of samples against the reference."""
        size, _ = self._look()
        source = sources.open_source(self.reference, getattr(extractor, "channels", 3), size)
        return Scorer(source, extractor, self.study["evaluation"]["batch_size"], cache=str(out / "features"))

    def set_iterations(self, speeds):
        ablation.set_iterations(self.study, self.arms, speeds)


# ---------------------------------------------------------------------------------------------------- time and money


def place_of(device):
    """The torch device of that name, or for "" the one that the programs choose."""
    return th.device(device or ("cuda" if th.cuda.is_available() else "cpu"))


def slots_of(args):
    """The device of each place where arms run at once, "" for as the programs choose. ValueError if one is not here."""
    names = [name.strip() for name in args.devices.split(",")] if args.devices else [""]
    for name in names if args.devices else []:
        dist_util.check_device(name)
    return names * args.parallel


def measured(plan, out, device):
    """{arm: images a second in training}, and of "classifier" and "judge"; what was measured before is not again."""
    path, place = out / "speed.json", place_of(device)
    known = json.loads(path.read_text()) if path.is_file() else {}
    speeds = {}
    networks = [(arm.name, "diffusion", arm.args["train"], arm.flags()) for arm in plan.arms]
    others = [("classifier", plan.arms[0].args.get("classifier")), ("judge", plan.judge and plan.judge[1])]
    networks += [(name, "classifier", args, config.flags_of(args, ClassifierOptions, DiffusionOptions))
                 for name, args in others if args]  # fmt: skip
    for name, kind, args, flags in networks:
        precision = {"precision": args.precision} if args.precision else {}
        key = kept.key({"flags": flags, "batch": args.batch_size, "device": str(place), **precision})
        if key not in known:
            # A classifier has no averages.
            rehearsed = argparse.Namespace(**{"ema_rate": "", "ema_halflife": "", "ema_power": ""} | vars(args))
            step, micro = rehearsal.Step(kind, rehearsed, flags, place), args.microbatch
            micro = micro if micro > 0 else args.batch_size
            rate = pace.paced(lambda s=step, n=args.batch_size, m=micro: s(n, m), place, 0.5, what=f"speed of {name}")
            known[key] = rate * args.batch_size
            kept.write_json(path, known)
        speeds[name] = known[key]
    return speeds


def seconds_of(plan, arm, seed, speeds, counted):
    """About how long what is left of a run takes, but for the pieces that are counted already; adds its own to them."""
    images = plan.study["evaluation"]["samples"]
    left = 0.0
    for kind, recipe in plan.pieces(arm, seed):
        failed = kept.told(plan.root, kind, recipe)
        if failed:
            break
        if failed is not None or kept.key(recipe) in counted:
            continue
        counted.add(kept.key(recipe))
        train = arm.args["train"].batch_size
        looks = {"train": arm.iterations * train, "sample": arm.evaluations * images * FORWARD_SHARE, "score": 0}
        if kind == "classifier":
            left += arm.args[kind].iterations * arm.args[kind].batch_size / speeds[kind]
        left += looks.get(kind, 0) / speeds[arm.name] + (STARTING_SEC if kind != "score" else 0)
    return left


def say_plan(plan, args, speeds, slots):
    """Print the arms and what is to be expected."""
    rows = [("arm", "parameters", "GFLOP an image", "updates", "looks a sample", "images/s")]
    for arm in plan.arms:
        speed = f"{speeds[arm.name]:.3g}" if speeds else "-"
        rows.append((arm.name, f"{arm.parameters:,}", f"{arm.operations / 1e9:.3g}", f"{arm.iterations:,}",
                     str(arm.evaluations), speed))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(*("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows), sep="\n")
    for arm in plan.arms:
        if arm.near:
            print(f"{arm.name}: {arm.near}")
    seeds = plan.study["seeds"]
    if len(seeds) < 3:
        print(f"note: with {len(seeds)} seed(s) hardly a difference can be told from chance: give three or more")
    every = plan.all_pieces()
    there = sum(kept.told(plan.root, kind, recipe) is not None for (kind, _), recipe in every.items())
    old = kept.others(plan.root, [kept.folder_of(plan.root, kind, recipe) for (kind, _), recipe in every.items()])
    print(f"{len(plan.arms)} arms x {len(seeds)} seeds: {len(every)} pieces of work, of which {there} are done")
    if old:
        print(f"{len(old)} done pieces in {plan.root} are of another state of the study or its data, and are not used")
    if speeds:
        counted = set()
        left = sum(seconds_of(plan, arm, seed, speeds, counted) for arm, seed in itertools.product(plan.arms, seeds))
        if plan.judge and kept.told(plan.root, "judge", plan.of_judge()) is None:
            judge = plan.judge[1]
            left += judge.iterations * judge.batch_size / speeds["judge"] + STARTING_SEC
        hours = left / len(slots) / 3600
        cost = f", {left / 3600 * args.price:.2f} at {args.price:g} an hour" if args.price else ""
        print(f"left to do: about {hours * 60:.0f} minutes on {len(slots)} at a time{cost} (scoring not counted)")


# ------------------------------------------------------------------------------------------------------------ the work


class Runner:
    """Does the pieces of a plan by the project's own programs."""

    def __init__(self, plan, out):
        self.plan, self.out, self.root = plan, out, plan.root
        self.work = study.Study(Path(__file__).resolve().parent.parent, out, 0)
        self.looking = threading.Lock()  # one at a time scores, by one extractor in this process
        self._scorer = None

    def judge(self, device=""):
        """The checkpoint of the judge, trained if need be; None if the study has none."""
        if not self.plan.judge:
            return None
        typed, args = self.plan.judge

        def work(folder):
            self._classifier(folder, {"noised": False} | typed, ablation.JUDGE_SEED, args.iterations, device)

        folder = kept.do(self.root, "judge", self.plan.of_judge(), work)
        return folder / f"model{args.iterations:06d}.pt"

    def _classifier(self, folder, typed, seed, iterations, device):
        held_out = ["--val_data_dir", self.plan.study["held_out"]] if self.plan.study["held_out"] else []
        self._run(folder, "scripts/classifier_train.py", "--data_dir", self.plan.study["data"], *held_out,
                  "--save_interval", max(1, iterations // 4), "--keep_last", 1, *ablation.words(typed),
                  "--seed", seed, device=device)  # fmt: skip

    def _run(self, folder, script, *words, device):
        place = ["--device", device] if device else []
        self.work.run(script, *words, *place, "--log_dir", folder, output=folder / "output.txt")

    def train(self, arm, seed, device):
        """The folder of an arm's training with a seed."""
        evaluation, n = self.plan.study["evaluation"], arm.iterations
        every, points = max(1, n // 20), evaluation["points"]

        def work(folder):
            watch = ["--eval_every", max(1, n // points), "--eval_samples", evaluation["samples"], "--eval_extractor",
                     self.judge() or evaluation["extractor"]] if points else []  # fmt: skip
            usual = {"log_interval": every, "save_interval": 2 * every, "max_bad_steps": max(1, min(100, n // 2))}
            self._run(folder, "scripts/image_train.py", "--data_dir", self.plan.study["data"],
                      *ablation.words(usual | arm.typed["train"]), *watch, "--keep_last", 1, "--iterations", n,
                      "--seed", seed, device=device)  # fmt: skip

        return kept.do(self.root, "train", self.plan.of_train(arm, seed), work)

    def classifier(self, arm, seed, device):
        """The checkpoint of the classifier that guides an arm's samples, or None."""
        if "classifier" not in arm.args:
            return None
        iterations = arm.args["classifier"].iterations

        def work(folder):
            self._classifier(folder, arm.typed["classifier"], seed, iterations, device)

        return kept.do(self.root, "classifier", self.plan.of_classifier(arm, seed), work) / f"model{iterations:06d}.pt"

    def sample(self, arm, seed, device):
        """The npz of an arm's samples with a seed."""
        model, guide = self.train(arm, seed, device), self.classifier(arm, seed, device)

        def work(folder):
            if list(folder.glob("samples_*.npz")):  # all of them, or it would not have that name
                return
            guiding = ["--classifier_path", guide] if guide else []
            program = f"scripts/{'classifier' if guide else 'image'}_sample.py"
            self._run(folder, program, "--model_path", model / arm.checkpoint, *guiding, "--num_samples",
                      self.plan.study["evaluation"]["samples"], *ablation.words(arm.typed["sample"]), "--seed", seed,
                      device=device)  # fmt: skip

        folder = kept.do(self.root, "sample", self.plan.of_sample(arm, seed), work)
        return next(folder.glob("samples_*.npz"))

    def score(self, arm, seed, device):
        """The scores.json of an arm with a seed."""
        samples = self.sample(arm, seed, device)

        def work(folder):
            with self.looking:
                scorer = self._scoring(device)
                source = sources.open_source(str(samples), getattr(scorer.extractor, "channels", 3))
                parts = {}
                found = scorer.scores(source, scorer.look_at(source, "samples"), parts)
                write(folder / "scores.json", found, parts)

        return kept.do(self.root, "score", self.plan.of_score(arm, seed), work) / "scores.json"

    def _scoring(self, device):
        if self._scorer is None:
            asked, place = self.plan.study["evaluation"], str(place_of(device))
            extractor = make_extractor(str(self.judge() or asked["extractor"]), place, asked["weights"] or None)
            self._scorer = self.plan.scorer(extractor, self.out)
        return self._scorer


def run_all(runner, slots):
    """{(arm, seed): why it came to nothing} of the runs that did, the others being done; several at a time."""
    from tqdm.auto import tqdm

    runs = runner.plan.runs()
    runner.judge(slots[0])
    failed, free = {}, queue.SimpleQueue()
    for slot in slots:
        free.put(slot)

    def one(seed, arm):
        slot = free.get()
        try:
            return runner.score(arm, seed, slot)
        finally:
            free.put(slot)

    with concurrent.futures.ThreadPoolExecutor(len(slots)) as pool, tqdm(total=len(runs), unit="run") as bar:
        going = {pool.submit(one, seed, arm): (arm, seed) for seed, arm in runs}
        try:
            for done in concurrent.futures.as_completed(going):
                arm, seed = going[done]
                try:
                    found = json.loads(done.result().read_text())
                    said = f"Frechet distance {tables.score(found, 'fid')}"
                except (ValueError, ArithmeticError, OSError, RuntimeError) as error:  # the last: torch's, as no memory
                    state = "diverged" if isinstance(error, kept.Diverged) else "failed"
                    failed[arm.name, seed] = said = f"{state}: {' '.join(str(error).split())}"
                bar.update()
                tqdm.write(f"{arm.name}, seed {seed}: {said}")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failed


def told(runner, failed):
    """The arms and what became of their runs, as `outcome.write` takes them."""
    plan, found = runner.plan, []
    for arm in plan.arms:
        runs = {}
        for seed in plan.study["seeds"]:
            where = {kind: kept.folder_of(plan.root, kind, recipe) for kind, recipe in plan.pieces(arm, seed)}
            scores = where["score"] / "scores.json"
            samples = sorted(where["sample"].glob("samples_*.npz"))
            runs[seed] = {
                "failed": failed.get((arm.name, seed), ""),
                "scores": json.loads(scores.read_text()) if scores.is_file() else None,
                "samples": samples[0] if samples else None,
                "log": curves_of(where["train"], arm.args["train"].batch_size),
            }
        changes = ", ".join(" ".join(map(str, each)) for each in ablation.flat(arm.changes)) or "-"
        names = "name parameters operations evaluations iterations near against at line".split()
        found.append({**{name: getattr(arm, name) for name in names}, "changes": changes, "runs": runs})
    return found


def curves_of(folder, batch_size):
    """{column: (images seen, values)} of the log of a training, where it has them."""
    if not (folder / "progress.csv").is_file():
        return {}
    rows, found = study.read_log(folder), {}
    for column in ("loss", "fid"):
        steps, values = study.columns(rows, column)
        if steps:
            found[column] = ([step * batch_size for step in steps], values)
    return found


def notes_of(plan):
    """What the page says of how the study was done."""
    asked, budget = plan.study["evaluation"], plan.study["budget"]
    length = f"{budget['images']:,} images" if budget["images"] else f"{budget['seconds']:g} seconds by measured speed"
    looks = "a classifier trained on the same data (the judge)" if plan.judge else asked["extractor"]
    yield f"Trained on {plan.images:,} images of {plan.study['data']} for {length} an arm; seeds " + (
        ", ".join(map(str, plan.study["seeds"])) + f". {asked['samples']} samples an arm and seed, scored with the "
        f"features of {looks} against {plan.reference}."
    )  # fmt: skip
    if plan.study["match"]:
        yield f"The arms were brought to the base's {plan.study['match']}; how near stands beside the changes."


def recorded_of(args):
    """The path of recorded results to compare with, or None. Raises FileNotFoundError if one is named that is not."""
    path = Path(args.recorded or Path(args.study).with_suffix("") / "results.json")
    if args.recorded and not path.is_file():
        raise FileNotFoundError(f"--recorded {path}: no such file")
    return path if path.is_file() else None


def say_agreement(results, path):
    """Print how results agree with those recorded in a file."""
    count, equal, apart = outcome.agreement(results["arms"], json.loads(path.read_text(encoding="utf-8"))["arms"])
    print(f"of {count} means, {equal} equal those of {path} to the last digit, {len(apart)} differ by their intervals")
    print(*apart, sep="\n", end="\n" if apart else "")


def main():
    args = config.parse(__doc__, *OPTIONS, positional=POSITIONAL)
    study.check_least(args, parallel=1)
    slots = slots_of(args)
    th.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as the programs that it runs: see study.Study
    content = ablation.read(args.study)
    out = Path(args.out or f"runs/{Path(args.study).stem}")
    recorded = recorded_of(args)
    plan = Plan(content, out)
    if content["budget"]["seconds"] and not args.estimate:
        raise ValueError("a budget in seconds needs the measured speed: leave --estimate True, or give images")
    out.mkdir(parents=True, exist_ok=True)
    lock = saves.Lock(out, "--out")
    plan.known.write()
    if args.run:
        lock.acquire(patience_sec=1)
    speeds = measured(plan, out, slots[0]) if args.estimate else {}
    plan.set_iterations(speeds)
    say_plan(plan, args, speeds, slots)
    if not args.run:
        return
    runner = Runner(plan, out)
    failed = run_all(runner, slots)
    content["title"] = content["title"] or f"Study {Path(args.study).stem}"
    results = outcome.write(out, content, told(runner, failed), speeds, notes_of(plan))
    for each in results["claims"]:
        print(f"{each['verdict']}: {each['claim']}")
    if recorded:
        say_agreement(results, recorded)
    print(f"report: {out / 'report.html'}")
    broken = [f"{name}, seed {seed}" for (name, seed), why in failed.items() if why.startswith("failed")]
    if broken:
        raise ValueError(f"came to nothing, and will be tried again by the same command: {'; '.join(broken)}")


if __name__ == "__main__":
    config.run_program(main)
