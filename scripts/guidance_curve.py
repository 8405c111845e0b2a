"""
The trade-off of guidance: classifier guidance, classifier-free guidance and autoguidance over scales and samplers, at
equal cost, with intervals; and, of the classifier, whether it will guide (docs/studies.md).

The same command goes on where it was broken off.
"""

import csv
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion import checks, config, sizes
from guided_diffusion.config import option


@dataclass
class CurveOptions:
    """curve"""

    model_path: str = option("", "checkpoint of a diffusion model of classes; with --class_dropout, guided by itself")
    uncond_path: str = option("", "checkpoint of an unconditional diffusion model, for a classifier to guide")
    classifier_path: str = option("", "checkpoint of the classifier of noised images that guides either of them")
    guide_path: str = option("", "checkpoint of a worse model of classes, for autoguidance of --model_path")
    reference: str = option("", "real images to score against: npz, or a zip of pictures")
    val_data_dir: str = option("", "held-out images to try the classifier on at each noise level; empty: --reference")
    walks: str = option("ddpm:250,ddim:25", "samplers and their steps, as ddpm:250,ddim:25,heun:13")
    scales: str = option("0,0.5,1,2,4,8", "scales of classifier guidance; 0: none")
    free_scales: str = option("1,1.5,2,3,5,9", "scales of classifier-free guidance and autoguidance; 1: none")
    equal_cost: bool = option(
        True, "give every kind of guidance so many steps that a sample costs as much as one without guidance"
    )
    num_samples: int = option(1000, "images to draw in each case, of the classes in turn")
    batch_size: int = option(100, "images at once")
    extractor: str = option("inception", "what the scores look with: inception, or a classifier checkpoint")
    weights: str = option("", "file of the Inception weights; empty: $GD_INCEPTION_WEIGHTS, else download")
    device: str = option("", "cpu, cuda, cuda:1, mps...; empty: a GPU if there is one")
    seed: int = option(0, "seed of the samples, alike in all cases")
    levels: int = option(10, "noise levels at which the classifier is tried")
    level_images: int = option(200, "images at each of them")
    out: str = option("runs/guidance_curve", "folder of the cases, the features and the page")


OPTIONS = (CurveOptions,)
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import numpy as np
import torch as th

from evaluations import cases, gallery, intervals, outcome, pages, report, tables
from evaluations.features import make_extractor
from guided_diffusion import ablation, generate, image_datasets, probe, published, sampling, study
from guided_diffusion.script_util import build, open_classifier, open_diffusion

SHOWN = "fid sfid inception_score precision recall density coverage label_agreement".split()


def check(args):
    """Raise ValueError or FileNotFoundError for options that would fail only after minutes of work."""
    paths = "model_path", "uncond_path", "classifier_path", "guide_path"
    for name in paths:
        setattr(args, name, vars(args)[name] and published.locate(vars(args)[name]))
    for name in (*paths, "reference"):
        if vars(args)[name] and not Path(vars(args)[name]).is_file():
            raise FileNotFoundError(f"--{name} {vars(args)[name]}: no such file")
    if not args.reference:
        raise ValueError("--reference is missing")
    if args.uncond_path and not args.classifier_path:
        raise ValueError("--uncond_path is guided by a classifier: give --classifier_path")
    if args.guide_path and not args.model_path:
        raise ValueError("--guide_path is the worse of two models: give the better one by --model_path")
    study.check_least(args, num_samples=6, batch_size=1, seed=0, levels=2, level_images=2)


def walks_of(text):
    """'ddpm:250,ddim:25' -> [("ddpm", 250), ("ddim", 25)]. Raises ValueError for anything else."""
    found = []
    for part in text.split(","):
        name, _, steps = part.strip().partition(":")
        if name not in sampling.SAMPLERS or name == "adaptive":
            raise ValueError(f"unknown sampler {name!r} in --walks{config.nearest(name, sampling.SAMPLERS)}")
        if not steps.isdigit() or int(steps) < 1:
            raise ValueError(f"--walks {part!r}: give the steps after the sampler, as {name}:25")
        found.append((name, int(steps)))
    return found


# ----------------------------------------------------------------------------------------------------- kinds and cases


class Kinds:
    """The kinds of guidance that the given networks allow, and what a step of each costs, in FLOP of one image."""

    def __init__(self, args):
        self.args, self.diffusion, self.table = args, {}, {}
        classifier = args.classifier_path and gradient_operations(args.classifier_path)
        for role in ("uncond_path", "model_path"):
            path = vars(args)[role]
            if not path:
                continue
            _, self.diffusion[path], flags = open_diffusion(path, device="meta")
            cost = look_operations(flags)
            wanted = role == "model_path"
            if flags["class_cond"] != wanted:
                raise ValueError(f"--{role} {path} was trained with --class_cond {not wanted}: give it as the other")
            if args.classifier_path:
                whose = "conditional" if wanted else "unconditional"
                self._add(f"classifier, {whose}", path, "classifier", cost, cost + classifier)
            if wanted and checks.nulls(flags):
                self._add("classifier-free", path, "free", cost, 2 * cost)
            if wanted and args.guide_path:
                worse = look_operations(open_diffusion(args.guide_path, device="meta")[2])
                self._add("autoguidance", path, "auto", cost, cost + worse)
        if not self.table:
            raise ValueError(
                "nothing guides: give --uncond_path or --model_path with --classifier_path, a --model_path trained"
                " with --class_dropout, or one with --guide_path"
            )

    def _add(self, name, path, how, plain, guided):
        self.table[name] = {"path": path, "how": how, "plain": plain, "guided": guided}

    def cases(self):
        """Each case as a dict: kind, sampler, steps, scale, and words, the flags that ask for it."""
        for (name, kind), (sampler, steps) in itertools.product(self.table.items(), walks_of(self.args.walks)):
            if self.args.equal_cost:
                steps = max(1, round(steps * kind["plain"] / kind["guided"]))
            by_classifier = kind["how"] == "classifier"
            option = "scales" if by_classifier else "free_scales"
            for scale in study.numbers(option, vars(self.args)[option]):
                unguided = scale == (0 if by_classifier else 1)
                looks = generate.count_evaluations(self.diffusion[kind["path"]], sampler=sampler, steps=steps)
                yield {
                    "kind": name, "sampler": sampler, "steps": steps, "scale": scale, "path": kind["path"],
                    "evaluations": looks * (1 if by_classifier or unguided else 2),
                    "gflop": looks * kind["plain" if unguided else "guided"] / 1e9,
                    "words": self._words(kind, scale, unguided),
                }  # fmt: skip

    def _words(self, kind, scale, unguided):
        if kind["how"] == "classifier":
            return ["scripts/classifier_sample.py", "--model_path", kind["path"], "--classifier_path",
                    self.args.classifier_path, "--classifier_scale", f"{scale:g}"]  # fmt: skip
        worse = ["--guide_path", self.args.guide_path] if kind["how"] == "auto" and not unguided else []
        return ["scripts/image_sample.py", "--model_path", kind["path"], *worse, "--guidance_scale", f"{scale:g}"]


def look_operations(flags):
    """FLOP of one look of a diffusion network of these flags at one image."""
    with th.device("meta"):
        return ablation.operations(build("diffusion", flags), flags)


def gradient_operations(path):
    """FLOP of the gradient of a classifier with respect to one image: forwards, and backwards to the image alone."""
    from torch.utils.flop_counter import FlopCounterMode

    classifier, flags = open_classifier(path, device="meta")
    classifier.requires_grad_(False)
    x = th.empty(1, flags["image_channels"], *sizes.size_of(flags), device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        classifier(x, th.zeros(1, device="meta")).sum().backward()
    return counter.get_total_flops()


def try_classifier(args, kinds):
    """(the Levels of the classifier, the verdict in words) or (None, None) if there is none."""
    if not args.classifier_path:
        return None, None
    from tqdm.auto import tqdm

    device = args.device or ("cuda" if th.cuda.is_available() else "cpu")
    classifier, flags = open_classifier(args.classifier_path, device=device)
    data = image_datasets.load_data(
        data_dir=args.val_data_dir or args.reference, batch_size=args.level_images, image_size=sizes.size_of(flags),
        image_channels=flags["image_channels"], class_cond=True, num_classes=flags["num_classes"], random_flip=False,
        num_workers=0, seed=args.seed, once=True,
    )  # fmt: skip
    x, cond = next(data)
    diffusion = next(iter(kinds.diffusion.values()))
    rows = np.linspace(0, diffusion.num_timesteps - 1, args.levels).round().astype(int).tolist()
    tried = probe.levels(diffusion, classifier.requires_grad_(False), x.to(device), cond["y"].to(device), rows)
    found = list(tqdm(tried, total=len(rows), desc="noise levels"))
    return found, probe.verdict(found, [interval_of(each)[0] for each in found], flags["num_classes"])[1]


# ----------------------------------------------------------------------------------------------------------- the page


def page(results, found, verdict):
    """The blocks of the page."""
    blocks = [pages.Heading("The trade-off of guidance", 1)]
    if found:
        blocks += [pages.Heading("Will this classifier guide?"), pages.Text(verdict), level_table(found)]
        bars = [(high - low) / 2 for low, high in map(interval_of, found)]
        lines = {"right": ([each.t for each in found], [each.accuracy for each in found], bars)}
        blocks.append(picture("accuracy", lines, "t", "accuracy", "The classifier at each noise level"))
    blocks += [pages.Heading("Scores"), score_table(results)]
    for name in [name for name in SHOWN if any(name in each for each in results)]:
        lines = curve(results, lambda each: each["settings"]["scale"], name)
        blocks.append(picture(name, lines, "guidance scale", tables.NAMES[name], f"{tables.NAMES[name]} against scale"))
    for up, across in outcome.TRADES.items():
        if all(up in each and across in each for each in results):
            lines = curve(results, lambda each, key=across: each[key], up, across)
            caption = f"{tables.NAMES[up]} against {tables.NAMES[across].lower()}"
            blocks.append(picture(f"{up}_{across}", lines, tables.NAMES[across], tables.NAMES[up], caption))
    return blocks


def interval_of(level):
    """The 95 % interval of a Level's accuracy: of the images, since the noises of one are not independent trials."""
    return intervals.share(level.accuracy, level.images)


def picture(name, lines, xlabel, ylabel, caption):
    return pages.Picture(name, caption, gallery.curves(lines, xlabel, ylabel, caption))


def curve(results, x, y, across=None):
    """{kind, sampler and steps: (xs, ys, bars)} along the scale; with `across` bars of both."""
    lines = {}
    for each in sorted(results, key=lambda each: each["settings"]["scale"]):
        settings = each["settings"]
        point = (x(each), each[y], *([bar(each, across)] if across else []), bar(each, y))
        lines.setdefault(f"{settings['kind']}, {settings['sampler']} {settings['steps']}", []).append(point)
    return {name: tuple(map(list, zip(*points))) for name, points in lines.items()}


def bar(result, name):
    error = tables.errors(result, name)[0]
    return 0.0 if np.isnan(error) else error


def level_table(found):
    """The table of the classifier at each noise level."""
    rows = []
    for each in found:
        low, high = interval_of(each)
        rows.append([str(each.t), f"{each.sigma:.3g}", f"{each.accuracy:.3f}", f"{low:.3f} .. {high:.3f}",
                     f"{each.snr:.3g}"])  # fmt: skip
    return pages.Table(["t", "noise (sigma)", "right", "95 % interval", "gradient's signal to noise"], rows)


def score_table(results):
    """The table of all cases, each score with its interval where there is one."""
    there = [name for name in SHOWN if any(name in each for each in results)]
    rows = []
    for each in results:
        s = each["settings"]
        error, ends, _ = tables.errors(each, "fid")
        rows.append([s["kind"], f"{s['sampler']} {s['steps']}", f"{s['scale']:g}", str(s["evaluations"]),
                     f"{s['gflop']:.3g}", *(tables.score(each, name) for name in there),
                     intervals.shown_interval(*ends, error)])  # fmt: skip
    return pages.Table(["guidance", "walk", "scale", "looks", "GFLOP an image", *(tables.NAMES[n] for n in there),
                        "FID of endless sets, 95 %"], rows)  # fmt: skip


def to_csv(results):
    """The text of a table with a line for each case and score."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow("kind sampler steps scale evaluations gflop score value standard_error low high".split())
    for each, name in itertools.product(results, SHOWN):
        if name in each:
            error, ends, _ = tables.errors(each, name)
            s = each["settings"]
            lines.writerow([*(s[key] for key in "kind sampler steps scale evaluations gflop".split()), name, each[name],
                            error, *ends])  # fmt: skip
    return text.getvalue()


def main():
    args = config.parse(__doc__, *OPTIONS)
    check(args)
    kinds = Kinds(args)
    wanted = list(kinds.cases())
    device, made = args.device or ("cuda" if th.cuda.is_available() else "cpu"), []
    made.append(make_extractor(args.extractor, device, args.weights or None))  # before hours of drawing
    found, verdict = try_classifier(args, kinds)
    if found:
        print(f"will this classifier guide? {verdict}", flush=True)
    work = study.Study(Path(__file__).resolve().parent.parent, Path(args.out), args.seed)
    work.begin()
    results = []
    for number, case in enumerate(wanted, 1):
        words = [*case["words"], "--sampler", case["sampler"], "--steps", case["steps"], "--num_samples",
                 args.num_samples, "--batch_size", args.batch_size, "--seed", args.seed, "--classes", "all",
                 *(["--device", args.device] if args.device else [])]  # fmt: skip
        name = f"{case['kind'].replace(', ', '_')}_{case['sampler']}_{case['steps']}_{case['scale']:g}"
        samples, _ = cases.draw(work.run, words, [case["path"], args.classifier_path, args.guide_path],
                                work.out / "cases" / name)  # fmt: skip
        settings = {key: value for key, value in case.items() if key not in ("words", "path")}
        results.append(json.loads(cases.score(args, samples, settings, lambda: made[0]).read_text()))
        told = ", ".join(f"{tables.NAMES[key]} {tables.score(results[-1], key)}" for key in ("fid", "precision"))
        print(f"case {number} of {len(wanted)}, {name}: {told}", flush=True)
    report.write(work.out, page(results, found, verdict))
    gallery.write(work.out / "results.csv", to_csv(results))
    print(f"report: {work.out / 'report.html'}")


if __name__ == "__main__":
    config.run_program(main)
