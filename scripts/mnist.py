"""
Classifier-free guidance on handwritten digits, end to end on a CPU: one class-conditional diffusion model that also
learns to do without the label, pictures of its two processes, and numbers for what guidance gains and what it costs.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion import checks, config
from guided_diffusion.config import option
from guided_diffusion.network_options import DiffusionOptions


@dataclass
class MnistOptions:
    """study"""

    data: str = option("digits", "digits: those of scikit-learn; or what datasets/mnist.py wrote, or reads")
    image_size: int = option(0, "side in pixels, a multiple of 32 for the DiffUNet; 0: 8 for the digits, 16 for others")
    network: str = option("small", "small, or the configuration of DiffUNet", ("small", "diffunet", "diffunet_large"))
    iterations: int = option(2000, "updates of the diffusion model")
    judge_iterations: int = option(1000, "updates of the judge, a classifier of clean digits")
    batch_size: int = option(64, "images in an update")
    lr: float = option(1e-3, "learning rate of the diffusion model")
    steps: int = option(50, "steps of ancestral sampling")
    scales: str = option("0,1,2,4,8", "guidance scales; 0 draws without the label, 1 with it and no guidance")
    num_samples: int = option(200, "digits drawn for each scale and seed")
    seeds: int = option(3, "runs of sampling for each scale, over which the scores are averaged")
    out: str = option("runs/mnist", "folder for data, runs, samples, pictures and the report")
    seed: int = option(0, "seed of everything random")


OPTIONS = (MnistOptions,)
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import numpy as np

from evaluations import intervals
from evaluations.features import ClassifierExtractor
from evaluations.judge import judged
from guided_diffusion import diffunet, generate, guidance, pictures, study
from guided_diffusion.script_util import open_diffusion

SMALL = "--num_channels 32 --num_res_blocks 1 --attention_resolutions 4 --num_head_channels 32"
JUDGE = (
    "--classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 4 --classifier_num_head_channels 32"
)
MEASURES = {
    "label_agreement": "as asked",
    "spread": "variance within classes",
    "recall": "recall",
    "precision": "precision",
    "fid": "Frechet distance",
}


def prepare(work, args):
    """(data of training, held-out data), written by the programs of the data sets where they are not there yet."""
    data, given = work.out / "data", Path(args.data)
    if args.data == "digits":
        work.run("datasets/digits.py", data, "--seed", work.seed)
        return data / "train", data / "val"
    if not (given / "train.npz").is_file():
        work.run("datasets/mnist.py", data, "--source", given)
        given = data
    if not (given / "test.npz").is_file():
        raise ValueError(f"{args.data} has no test set, which the judge is measured on")
    return given / "train.npz", given / "test.npz"


def train(work, args, train_data, held_out):
    """The diffusion model, whose label is dropped for every tenth image, and the judge; paths of both."""
    images = f"--image_size {args.image_size} --image_channels 1 --num_classes 10 --random_flip False --num_workers 0"
    network = SMALL.split()
    if args.network != "small":
        flags = diffunet.network_flags(args.network, args.image_size)
        network = [word for name, value in flags.items() for word in (f"--{name}", value)]
    work.run(
        "scripts/image_train.py", "--data_dir", train_data, *images.split(), *network,
        "--class_cond", True, "--class_dropout", "0.1", "--batch_size", args.batch_size, "--lr", args.lr,
        "--ema_rate", "0.995", "--iterations", args.iterations, "--log_interval", 100,
        "--save_interval", args.iterations, "--seed", work.seed, "--log_dir", work.out / "model",
    )  # fmt: skip
    words = [*images.split(), *JUDGE.split(), "--batch_size", 64]
    judge = work.train_classifier("judge", train_data, held_out, args.judge_iterations, False, work.seed + 1, words)
    return work.out / "model" / f"ema_0.995_{args.iterations:06d}.pt", judge


def draw(work, args, model):
    """{scale: the npz of each seed}."""
    found = {}
    for scale in args.scales.split(","):
        for seed in range(work.seed, work.seed + args.seeds):
            folder = work.out / "samples" / f"scale_{scale}_seed_{seed}"
            work.run(
                "scripts/image_sample.py", "--model_path", model, "--guidance_scale", scale, "--classes", "all",
                "--num_samples", args.num_samples, "--batch_size", 100, "--timestep_respacing", args.steps,
                "--seed", seed, "--log_dir", folder,
            )  # fmt: skip
            found.setdefault(float(scale), []).append(next(folder.glob("samples_*.npz")))
    return found


def score(work, args, judge, samples, train_data, held_out):
    """The table, {measure: (mean, standard error)} a row: first of real digits, as many at once, then of each scale."""
    judge = ClassifierExtractor(str(judge))
    reference = study.pack(train_data, work.out / "reference.npz", args.image_size, 5000)
    held_out = study.pack(held_out, work.out / "held_out.npz", args.image_size, 5000)
    real = [study.pick(held_out, work.out / f"held_out_{k}.npz", args.num_samples, k) for k in range(args.seeds)]
    rows = []
    for scale, paths in {None: real, **samples}.items():
        runs = [{} for _ in paths]
        for path, parts in zip(paths, runs):
            judged(reference, path, judge, parts)
        row = {name: mean_and_error([parts[name] for parts in runs], scale is not None) for name in MEASURES}
        rows.append({"scale": scale, "paths": list(map(str, paths)), **row})
        told = ", ".join(f"{MEASURES[name]} {show(row[name])}" for name in MEASURES)
        print("real, held out:" if scale is None else f"scale {scale:g}:", told, flush=True)
    (work.out / "scores.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def mean_and_error(runs, independent):
    """The mean of one score's Estimates and its standard error; that of one run if they share images."""
    mean = intervals.mean(runs)
    return mean.value, intervals.standard_error(mean if independent else runs[0])


def show(mean_error):
    return intervals.shown(*mean_error)


def draw_pictures(work, args, model_path, rows):
    """Both processes, a grid for each scale and the trade-off, all under pictures/; their names in order."""
    folder = work.out / "pictures"
    with np.load(work.out / "held_out.npz", allow_pickle=False) as real:
        first = [np.flatnonzero(real["arr_1"] == label)[0] for label in range(10)]
        images = pictures.from_uint8(real["arr_0"][first])                                      # [10,1,S,S]
    _, full, _ = open_diffusion(str(model_path))
    study.save_noising(folder / "noising.png", full, images)
    model, diffusion, flags = open_diffusion(str(model_path), {"timestep_respacing": str(args.steps)})
    middle = sorted(row["scale"] for row in rows[1:])[(len(rows) - 1) // 2]
    null = checks.nulls(flags)
    study.save_reverse_process(
        folder / "sampling.png", diffusion, model, args.image_size, f"After so many steps (guidance scale {middle:g})",
        work.seed, guide=lambda predict: guidance.classifier_free(predict, null, middle),
    )  # fmt: skip
    names = ["noising.png", "sampling.png"]
    for row in rows[1:]:
        names.append(f"scale_{row['scale']:g}.png")
        with np.load(row["paths"][0], allow_pickle=False) as npz:
            title = f"scale {row['scale']:g}: {row['label_agreement'][0]:.1%} as asked"
            generate.save_class_grid(folder / names[-1], npz["arr_0"], npz["arr_1"], columns=12, title=title)
    for name in ("label_agreement", "spread", "recall"):
        line = [list(column) for column in zip(*((row["scale"], *row[name]) for row in rows[1:]))]
        names.append(f"{name}.png")
        pictures.save_curves(folder / names[-1], {name: line}, "guidance scale", MEASURES[name], MEASURES[name])
    loss = {"loss": study.columns(study.read_log(work.out / "model"), "loss")}
    pictures.save_curves(folder / "loss.png", loss, "update", "mean square error of the noise", "Training", logy=True)
    return [*names, "loss.png"]


def write_report(work, args, rows, names):
    """report.md: what was done, the table, the pictures, the commands."""
    names_of_rows = ["real, held out", *(f"{row['scale']:g}" for row in rows[1:])]
    cells = [[name, *(show(row[measure]) for measure in MEASURES)] for name, row in zip(names_of_rows, rows)]
    lines = [
        "# Handwritten digits by classifier-free guidance",
        "",
        f"A class-conditional U-Net ({args.network}) learned {args.image_size}x{args.image_size} digits ({args.data}), "
        f"{args.iterations} updates of {args.batch_size}, with every tenth label dropped. Each scale drew {args.seeds} "
        f"times {args.num_samples} digits, as many of each class, in {args.steps} ancestral steps. A judge, trained on "
        "clean digits and with no part in the sampling, says which digits are as asked; features are the judge's, the "
        "reference is the training set. ± is the standard error, by the images of all runs and those of the reference.",
        "",
        *study.table(["guidance scale", *MEASURES.values()], cells),
        "",
        *[f"![{name}](pictures/{name})" for name in names],
    ]
    return work.report("report.md", lines)


def check(args):
    """Raise ValueError for options that would fail only after minutes of work."""
    scales, longest = study.numbers("scales", args.scales), DiffusionOptions.diffusion_steps
    if len(set(scales)) < len(scales):
        raise ValueError(f"--scales {args.scales!r}: give each scale once")
    study.check_least(
        args, iterations=1, judge_iterations=1, num_samples=20, seeds=1, steps=2, batch_size=1, image_size=0, seed=0
    )
    if args.steps > longest:
        raise ValueError(f"--steps must be {longest} or fewer, all that the process has, not {args.steps}")
    if args.lr <= 0:
        raise ValueError(f"--lr must be above 0, not {args.lr}")


def main():
    args = config.parse(__doc__, *OPTIONS)
    start = time.monotonic()
    check(args)
    args.image_size = args.image_size or (8 if args.data == "digits" else 16)
    if args.network != "small":
        diffunet.network_flags(args.network, args.image_size)  # refuses now what the network cannot be built for
    work = study.Study(Path(__file__).resolve().parent.parent, Path(args.out), args.seed)
    work.begin("model", "judge", "samples", "pictures")
    train_data, held_out = prepare(work, args)
    model, judge = train(work, args, train_data, held_out)
    rows = score(work, args, judge, draw(work, args, model), train_data, held_out)
    report = write_report(work, args, rows, draw_pictures(work, args, model, rows))
    print(f"\nreport: {report} ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    config.run_program(main)
