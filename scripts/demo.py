"""
The main job from end to end on a CPU: real handwritten digits, an unconditional diffusion model, a classifier of noised
digits that steers it, and a report with pictures and scores. No label ever reaches the diffusion model.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion import config
from guided_diffusion.config import option


@dataclass
class DemoOptions:
    """demo"""

    out: str = option("runs/demo", "folder for data, runs, samples, pictures and the report")
    iterations: int = option(2000, "updates of the diffusion model")
    classifier_iterations: int = option(1000, "updates of the classifier of noised digits, and of the judge")
    num_samples: int = option(500, "digits drawn for each row of the table")
    steps: int = option(50, "steps of ancestral sampling")
    scales: str = option("0,1,3,6,12", "guidance scales of ancestral sampling")
    ddim_scales: str = option("0,3,6", "guidance scales of DDIM, with half as many steps")
    seed: int = option(0, "seed of everything random")


OPTIONS = (DemoOptions,)
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import numpy as np

from evaluations import errors, intervals, tables
from evaluations.evaluator import write
from evaluations.features import ClassifierExtractor
from evaluations.judge import judged
from guided_diffusion import generate, pictures, study
from guided_diffusion.guidance import classifier_gradient
from guided_diffusion.script_util import open_classifier, open_diffusion

IMAGES = ["--image_size", "8", "--image_channels", "1"]
PROCESS = ["--noise_schedule", "cosine"]
NETWORK = "--num_channels 32 --num_res_blocks 2 --attention_resolutions 4 --num_head_channels 32".split()
CLASSIFIER = (
    "--num_classes 10 --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 4"
    " --classifier_num_head_channels 32"
).split()
TRAINING = "--batch_size 64 --random_flip False --num_workers 0".split()


# ----------------------------------------------------------------------------------------------------------- the work


def train(demo, args):
    """Write the digits; train the diffusion model, the classifier that guides and the judge that does not."""
    data = demo.out / "data"
    demo.run("datasets/digits.py", data, "--seed", demo.seed)
    common = [*IMAGES, *PROCESS, *TRAINING, "--seed", demo.seed]
    demo.run(
        "scripts/image_train.py", "--data_dir", data / "train", *common, *NETWORK,
        "--lr", "1e-3", "--ema_rate", "0.995", "--iterations", args.iterations,
        "--log_interval", 100, "--save_interval", args.iterations, "--log_dir", demo.out / "model",
    )  # fmt: skip
    for name, noised, seed in [("classifier", True, demo.seed), ("judge", False, demo.seed + 1)]:
        words = [*common, *CLASSIFIER]
        demo.train_classifier(name, data / "train", data / "val", args.classifier_iterations, noised, seed, words)


def draw(demo, args):
    """One run of classifier_sample.py a row of the table: [(sampler, scale, folder)]."""
    runs = [("DDPM", scale, str(args.steps), []) for scale in args.scales.split(",")]
    runs += [("DDIM", scale, f"ddim{args.steps // 2}", ["--use_ddim", True]) for scale in args.ddim_scales.split(",")]
    rows = []
    for sampler, scale, respacing, extra in runs:
        folder = demo.out / "samples" / f"{sampler.lower()}_scale_{scale}"
        demo.run(
            "scripts/classifier_sample.py", "--model_path", path_of(demo, args, "model"),
            "--classifier_path", path_of(demo, args, "classifier"), "--classifier_scale", scale,
            "--classes", "all", "--num_samples", args.num_samples, "--batch_size", 250,
            "--timestep_respacing", respacing, *extra, "--seed", demo.seed, "--log_dir", folder,
        )  # fmt: skip
        rows.append((f"{sampler} {respacing.removeprefix('ddim')}", float(scale), next(folder.glob("samples_*.npz"))))
    return rows


def path_of(demo, args, name):
    """The checkpoint of one of the three networks; of the diffusion model the averaged weights."""
    if name == "model":
        return demo.out / "model" / f"ema_0.995_{args.iterations:06d}.pt"
    return demo.out / name / f"model{args.classifier_iterations:06d}.pt"


def score(demo, args, rows):
    """The rows of the table, a dict a row, with real held-out digits as its first row."""
    judge = ClassifierExtractor(str(path_of(demo, args, "judge")))
    reference = study.pack(demo.out / "data" / "train", demo.out / "reference.npz", 8)
    held_out = study.pack(demo.out / "data" / "val", demo.out / "held_out.npz", 8)
    table = []
    for name, scale, path in [("real, held out", None, held_out), *rows]:
        parts = {}
        scores = judged(reference, path, judge, parts)
        table.append({"sampler": name, "scale": scale, "path": path, **scores})
        told = demo.out / "held_out.json" if scale is None else path.parent / "scores.json"
        write(told, scores, parts)  # for evaluations/compare.py and report.py
        measures = "label_agreement", "fid", "recall", "spread"
        shown = "  ".join(f"{key} {tables.score(scores, key)}" for key in measures)
        print(f"{name:<16}{'' if scale is None else scale!s:>6}  {shown}", flush=True)
    (demo.out / "scores.json").write_text(errors.to_json(table) + "\n")
    return table


# --------------------------------------------------------------------------------------------------------- the report


def draw_pictures(demo, args, table):
    """Grids by scale, the reverse process, curves and the trade-off, all under pictures/."""
    folder = demo.out / "pictures"
    for row in table:
        name = "real" if row["scale"] is None else f"{row['sampler'].split()[0].lower()}_scale_{row['scale']:g}"
        row["picture"] = f"pictures/{name}.png"
        images = np.load(row["path"])
        asked = "" if row["scale"] is None else f", scale {row['scale']:g}: {row['label_agreement']:.1%} as asked"
        generate.save_class_grid(
            demo.out / row["picture"], images["arr_0"], images["arr_1"], columns=12, title=row["sampler"] + asked
        )
    draw_reverse_process(demo, args, best(table)["scale"], folder / "reverse_process.png")
    loss = study.read_log(demo.out / "model")
    curves = {"training loss": study.columns(loss, "loss")}
    pictures.save_curves(folder / "loss.png", curves, "update", "mean square error", "Diffusion model", logy=True)
    log, clean = study.read_log(demo.out / "classifier"), study.read_log(demo.out / "judge")
    accuracy = {
        "guide, noised held-out digits": study.columns(log, "val_acc@1"),
        "guide, least noise quarter": study.columns(log, "val_acc@1_q0"),
        "guide, most noise quarter": study.columns(log, "val_acc@1_q3"),
        "judge, clean held-out digits": study.columns(clean, "val_acc@1"),
    }
    pictures.save_curves(folder / "accuracy.png", accuracy, "update", "accuracy on held-out digits", "Classifiers")
    for measure, label in {"label_agreement": "share as asked", "recall": "recall"}.items():
        lines = {}
        for sampler in sorted({row["sampler"] for row in table if row["scale"] is not None}):
            chosen = [row for row in table if row["sampler"] == sampler]
            columns = zip(*((row["scale"], row[measure], tables.errors(row, measure)[0]) for row in chosen))
            lines[sampler] = list(map(list, columns))
        pictures.save_curves(folder / f"{measure}.png", lines, "guidance scale", label, f"{label} against scale")


def draw_reverse_process(demo, args, scale, path):
    """One guided digit a class, from noise to picture."""
    model, diffusion, _ = open_diffusion(str(path_of(demo, args, "model")), {"timestep_respacing": str(args.steps)})
    classifier, _ = open_classifier(str(path_of(demo, args, "classifier")))
    title = f"After so many of {args.steps} steps (DDPM, scale {scale:g})"
    gradient = classifier_gradient(classifier, scale)
    study.save_reverse_process(path, diffusion, lambda x, t, y: model(x, t), 8, title, demo.seed, cond_fn=gradient)


def best(table):
    """The row of ancestral sampling that obeys best."""
    rows = [row for row in table if row["scale"] is not None and row["sampler"].startswith("DDPM")]
    return max(rows, key=lambda row: row["label_agreement"])


def write_report(demo, args, table):
    """report.md: what was done, the table, the pictures, the commands."""
    real, top = table[0], best(table)
    free = next((row for row in table if row["scale"] == 0), None)
    lines = [
        "# Handwritten digits, drawn by a diffusion model and steered by a classifier",
        "",
        f"An unconditional U-Net was trained on {len(np.load(demo.out / 'reference.npz')['arr_0'])} real 8x8 digits, "
        "without labels. A separate classifier, trained on noised digits, then steered its samples: each row of the "
        "pictures asks for one class. A third network, the judge, was trained on clean digits and has no part in the "
        f"sampling; on {len(np.load(real['path'])['arr_0'])} held-out real digits it is right in "
        f"{real['label_agreement']:.1%} of cases. Below it says how many samples are of the class asked for.",
        "",
        *([f"Unguided samples are of the asked class in {free['label_agreement']:.1%} of cases, since nothing tells "
           "the model which one that is."] if free else []),
        f"At scale {top['scale']:g}, {top['label_agreement']:.1%} are of the class asked for.",
        "",
        "## Scores",
        "",
        f"{args.num_samples} samples a row; features are the judge's, the reference is the training set. *As asked*: "
        "share that the judge gives the asked class. *FD*: Frechet distance of features, lower is better. *Recall*: "
        "share of real digits that lie among the samples, the diversity that guidance spends to buy obedience. "
        "*Spread*: variance of features within the classes that the judge sees; ambiguous digits raise it, strong "
        "guidance lowers it.",
        "",
        f"± is the standard error of the number as it stands. {args.num_samples} samples make the distance too large; "
        "*FD of endless sets* is its 95 % interval with that bias taken off.",
        "",
        *study.table("sampler|scale|as asked|FD|FD of endless sets|precision|recall|spread".split("|"),
                     map(cells, table)),
        "",
        *[f"![{measure}](pictures/{measure}.png)" for measure in ("label_agreement", "recall")],
        "",
        "## Samples by scale",
        "",
        *[f"![{row['picture']}]({row['picture']})\n" for row in table],
        "## From noise to digit",
        "",
        "![reverse process](pictures/reverse_process.png)",
        "",
        "## Training",
        "",
        "![loss](pictures/loss.png)",
        "![accuracy](pictures/accuracy.png)",
        "",
        "Any row of the table again: `python evaluations/evaluator.py "
        f"{demo.out / 'reference.npz'} {top['path']} --extractor {path_of(demo, args, 'judge')}`",
    ]
    return demo.report("report.md", lines)


def cells(row):
    """A row of the table as texts."""
    scale = "" if row["scale"] is None else f"{row['scale']:g}"
    error, ends, _ = tables.errors(row, "fid")
    shown = [tables.score(row, name) for name in ("label_agreement", "fid", "precision", "recall", "spread")]
    return row["sampler"], scale, *shown[:2], intervals.shown_interval(*ends, error), *shown[2:]


def check(args):
    """Raise ValueError for options that would fail only after minutes of work."""
    for name in ("scales", "ddim_scales"):
        study.numbers(name, getattr(args, name))
    study.check_least(args, iterations=1, classifier_iterations=1, num_samples=20, steps=2)


def main():
    args = config.parse(__doc__, *OPTIONS)
    start = time.monotonic()
    check(args)
    demo = study.Study(Path(__file__).resolve().parent.parent, Path(args.out), args.seed)
    demo.begin("model", "classifier", "judge", "samples", "pictures")
    train(demo, args)
    table = score(demo, args, draw(demo, args))
    draw_pictures(demo, args, table)
    report = write_report(demo, args, table)
    print(f"\nreport: {report} ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    config.run_program(main)
