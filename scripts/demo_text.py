"""
From a caption to a picture on a CPU: real handwritten digits with captions, CLIP, a prior and a decoder, and a report
with pictures and scores. Some phrasings are held out: no network is trained on them.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from guided_diffusion import config
from guided_diffusion.config import option


@dataclass
class DemoTextOptions:
    """demo"""

    out: str = option("runs/demo_text", "folder for data, runs, samples, pictures and the report")
    clip_iterations: int = option(2000, "updates of CLIP")
    prior_iterations: int = option(1500, "updates of the prior")
    decoder_iterations: int = option(1500, "updates of the decoder")
    judge_iterations: int = option(1000, "updates of the judge, a classifier of clean digits")
    num_samples: int = option(400, "digits drawn for each row of the table")
    steps: int = option(15, "steps of the decoder, by DPM-Solver++(2M)")
    prior_steps: int = option(32, "steps of the prior")
    scales: str = option("0,0.5,1,2,4", "guidance scales of the decoder; 0: told nothing, 1: unguided")
    prior_scales: str = option("0,1,4", "guidance scales of the prior")
    usual: str = option("2", "guidance scale of the decoder where others are compared")
    seed: int = option(0, "seed of everything random")


OPTIONS = (DemoTextOptions,)
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import numpy as np
import torch as th

from evaluations import errors, tables
from evaluations.evaluator import write
from evaluations.features import ClassifierExtractor
from evaluations.judge import judged
from guided_diffusion import pictures, study
from guided_diffusion.text_to_image.clip import classify
from guided_diffusion.text_to_image.models import open_clip

TEMPLATES = [
    "{word}", "{class}", "a handwritten {word}", "a {word} written by hand", "the digit {class}", "digit {word}",
    "the number {word}", "number {class}", "a picture of a {word}", "a picture of the digit {class}",
    "an image of the number {class}", "an image of a {word}", "this is a {word}", "this is the number {word}",
    "someone wrote a {word}", "a small {word}", "the handwritten digit {class}", "a drawing of {word}",
    "please write the digit {word}", "draw the number {class}",
]  # fmt: skip
HELD_OUT = [
    "a picture of the number {word}", "the handwritten number {class}", "please draw {word}",
    "an image of the digit {word}",
]  # fmt: skip
WORDS = "zero one two three four five six seven eight nine".split()

IMAGES = "--image_size 8 --image_channels 1".split()
TRAINING = "--random_flip False --num_workers 0 --log_interval 100 --grad_clip 1 --lr 1e-3 --lr_schedule cosine".split()
CLIP = (
    "--clip_size 64 --patch_size 2 --image_width 128 --image_layers 3 --image_heads 4 --text_width 64 --text_layers 2"
    " --text_heads 4 --context_length 32 --dropout 0.1 --crop_padding 1 --random_crop True --batch_size 128"
    " --lr_warmup 50 --weight_decay 0.05 --ema_rate 0.99"
).split()
PRIOR = "--prior_width 64 --prior_layers 2 --prior_heads 4 --batch_size 128 --lr_warmup 50 --ema_rate 0.995".split()
DECODER = (
    "--num_channels 32 --num_res_blocks 2 --attention_resolutions 4 --num_head_channels 32 --text_width 64"
    " --text_layers 1 --text_heads 4 --context_length 32 --batch_size 64 --ema_rate 0.995"
).split()
JUDGE = (
    "--num_classes 10 --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 4"
    " --classifier_num_head_channels 32 --noise_schedule cosine --batch_size 64 --random_flip False --num_workers 0"
).split()


# ----------------------------------------------------------------------------------------------------------- the work


def train(demo, args):
    """Write the digits and their captions; train the judge, CLIP, the prior and the decoder."""
    data = demo.out / "data"
    demo.run("datasets/digits.py", data, "--seed", demo.seed)
    for name in ("train", "val"):
        demo.run(
            "datasets/captions.py", data / name, data / f"{name}.npz", *IMAGES, "--encoder", "none",
            "--templates", *TEMPLATES, "--hold_out", *HELD_OUT,
        )  # fmt: skip
    words = [*IMAGES, *JUDGE]
    demo.train_classifier("judge", data / "train", data / "val", args.judge_iterations, False, demo.seed + 1, words)
    common = ["--data_dir", data / "train.npz", *TRAINING, "--seed", demo.seed]
    held_out = ["--val_data_dir", data / "val.npz", "--eval_interval", 50]
    demo.run("scripts/clip_train.py", *common, *held_out, *IMAGES, *CLIP, *ending(demo, "clip", args))
    clip = ["--clip_path", path_of(demo, args, "clip")]
    demo.run("scripts/prior_train.py", *clip, *common, *PRIOR, *ending(demo, "prior", args))
    demo.run("scripts/decoder_train.py", *clip, *common, *IMAGES, *DECODER, *ending(demo, "decoder", args))


def ending(demo, name, args):
    """The flags that say how long a network is trained, and where it is kept."""
    count = getattr(args, f"{name}_iterations")
    return ["--lr_anneal_steps", count, "--save_interval", count, "--log_dir", demo.out / name]


def path_of(demo, args, name):
    """The averaged weights of a network, or the judge."""
    if name == "judge":
        return demo.out / name / f"model{args.judge_iterations:06d}.pt"
    rate = {"clip": "0.99", "prior": "0.995", "decoder": "0.995"}[name]
    return demo.out / name / f"ema_{rate}_{getattr(args, f'{name}_iterations'):06d}.pt"


def prompts_of(templates):
    """{prompt: digit}, phrasing by phrasing."""
    return {t.replace("{class}", str(y)).replace("{word}", WORDS[y]): y for t in templates for y in range(10)}


def draw(demo, args):
    """One run of text_to_image_sample.py a row of the table: [a dict of what it is, with the path of its npz]."""
    usual, above = args.usual, [scale for scale in args.scales.split(",") if float(scale) >= 1]
    rows = [row("trained", scale) for scale in args.scales.split(",")]
    rows += [row("held out", scale) for scale in above]
    rows += [row(texts, usual, prior=None) for texts in ("trained", "held out")]
    rows += [row("held out", usual, scale, captions=False) for scale in args.prior_scales.split(",")]
    rows += [row("held out", usual, None, captions=False)]
    for number, each in enumerate(rows):
        file = demo.out / f"prompts_{each['texts'].replace(' ', '_')}.txt"
        file.write_text("\n".join(prompts_of(TEMPLATES if each["texts"] == "trained" else HELD_OUT)) + "\n")
        each["path"] = sample(
            demo, args, f"{number:02d}", "--prompts_file", file, "--guidance_scale", each["scale"], "--use_captions",
            each["captions"], *prior_words(demo, args, each),
        )  # fmt: skip
    return rows


def row(texts, scale, prior="1", captions=True):
    """What a row of the table is of: phrasings, the scales of decoder and prior, and whether the decoder sees texts."""
    return {"texts": texts, "scale": float(scale), "prior": prior and float(prior), "captions": captions}


def prior_words(demo, args, each):
    """The flags of the prior, if a row has one."""
    if each["prior"] is None:
        return []
    return ["--prior_path", path_of(demo, args, "prior"), "--prior_scale", each["prior"], "--prior_steps",
            args.prior_steps]  # fmt: skip


def sample(demo, args, name, *words, count=None):
    """The npz of one run of text_to_image_sample.py."""
    folder = demo.out / "samples" / name
    demo.run(
        "scripts/text_to_image_sample.py", "--model_path", path_of(demo, args, "decoder"), *words,
        *(["--num_samples", count or args.num_samples] if count != 0 else []), "--batch_size", 200,
        "--sampler", "dpmpp_2m", "--steps", args.steps, "--seed", demo.seed, "--log_dir", folder,
    )  # fmt: skip
    return next(folder.glob("samples_*.npz"))


# --------------------------------------------------------------------------------------------------------- the scores


def score(demo, args, rows):
    """The rows with their scores; first come real held-out digits, then variations of them."""
    judge = ClassifierExtractor(str(path_of(demo, args, "judge")))
    reference = study.pack(demo.out / "data" / "train", demo.out / "reference.npz", 8)
    held_out = study.pack(demo.out / "data" / "val", demo.out / "held_out.npz", 8)
    table = [{"texts": "real, held out", "path": held_out}, variations(demo, args, held_out), *rows]
    known = prompts_of(TEMPLATES) | prompts_of(HELD_OUT)
    for each in table:
        with np.load(each["path"], allow_pickle=False) as npz:
            arrays = dict(npz)
        if "texts" in arrays:
            arrays["arr_1"] = np.array([known[text] for text in arrays["texts"]])
            each["path"] = each["path"].with_name("labelled.npz")
            np.savez(each["path"], **arrays)
        parts = {}
        scores = judged(reference, each["path"], judge, parts)
        write(each["path"].with_suffix(".json"), scores, parts)
        each |= scores | {"agreement_interval": binomial(scores["label_agreement"], len(arrays["arr_0"]))}
        print(f"{name_of(each):<60} {each['label_agreement']:.3f} {each['spread']:.2f}", flush=True)
    (demo.out / "scores.json").write_text(errors.to_json(table) + "\n")
    return table


def variations(demo, args, held_out):
    """A drawing of each held-out digit from its own CLIP embedding, with its digit as what was asked for."""
    with np.load(held_out, allow_pickle=False) as npz:
        images, labels = npz["arr_0"], npz["arr_1"]
    count = min(args.num_samples, len(images))
    wanted = demo.out / "to_vary.npz"
    np.savez(wanted, arr_0=images[:count], arr_1=labels[:count])
    path = sample(demo, args, "variations", "--images", wanted, count=count)
    labelled = path.with_name("labelled.npz")
    np.savez(labelled, arr_0=np.load(path)["arr_0"], arr_1=labels[:count])
    return {"texts": "variations", "path": labelled}


def binomial(share, count):
    """The 95 % interval of a share of so many independent trials (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(round(share * count), count).proportion_ci(0.95, method="wilson")
    return [found.low, found.high]


def zero_shot(demo, args):
    """{phrasings: (share of held-out digits that CLIP names rightly, its interval)}."""
    clip = open_clip(path_of(demo, args, "clip"))
    with np.load(demo.out / "held_out.npz", allow_pickle=False) as npz:
        x, y = pictures.from_uint8(npz["arr_0"]), th.from_numpy(npz["arr_1"])
    asked = {"all trained phrasings": TEMPLATES, "all held-out phrasings": HELD_OUT, "\"the digit 3\" alone": [
        "the digit {class}"]}  # fmt: skip
    found = {}
    for name, templates in asked.items():
        prompts = prompts_of(templates)
        texts = [[text for text, digit in prompts.items() if digit == k] for k in range(10)]
        share = (classify(clip, x, texts) == y).float().mean().item()
        found[name] = share, binomial(share, len(y))
    return found


# --------------------------------------------------------------------------------------------------------- the report


def name_of(each):
    """A row of the table in words."""
    if "scale" not in each:
        return each["texts"]
    told = "no prior" if each["prior"] is None else f"prior {each['prior']:g}"
    return f"{each['texts']}, {told}, decoder {each['scale']:g}{'' if each['captions'] else ', without the text'}"


def draw_pictures(demo, args):
    """Prompts x samples, the reverse process, variations and interpolations, all under pictures/."""
    folder = demo.out / "pictures"
    folder.mkdir(exist_ok=True)
    prior = [*prior_words(demo, args, row("held out", args.usual)), "--guidance_scale", args.usual]
    shown = [t.replace("{class}", str(y)).replace("{word}", WORDS[y]) for y, t in enumerate((HELD_OUT * 3)[:10])]
    grid = sample(demo, args, "grid", "--prompts", *shown, *prior, "--frames", 10, count=80)
    grid.with_suffix(".png").rename(folder / "prompts.png")
    grid.with_name(f"{grid.stem}_frames.png").rename(folder / "reverse_process.png")
    ends = ["a handwritten three", "a handwritten eight", "the digit 1", "the digit 7", "number 4", "number 9"]
    way = sample(demo, args, "between_texts", "--prompts", *ends, *prior, "--interpolate", 10, count=0)
    way.with_suffix(".png").rename(folder / "between_texts.png")
    few, varied = demo.out / "few.npz", []
    with np.load(demo.out / "held_out.npz", allow_pickle=False) as npz:
        chosen = [int(np.flatnonzero(npz["arr_1"] == y)[0]) for y in range(10)]
        np.savez(few, arr_0=npz["arr_0"][chosen], arr_1=npz["arr_1"][chosen])
    way = sample(demo, args, "between_pictures", "--images", few, "--interpolate", 10, count=0)
    way.with_suffix(".png").rename(folder / "between_pictures.png")
    varied = np.load(sample(demo, args, "few_varied", "--images", few, count=80))["arr_0"]
    rows = np.concatenate([np.stack([real, *varied[k::10]]) for k, real in enumerate(np.load(few)["arr_0"])])
    labels = ["real", *(str(n) for n in range(1, 9))]
    title = "Digits drawn again from their embeddings"
    pictures.save_grid(folder / "variations.png", rows, 9, column_labels=labels, title=title)
    curves = {name: study.columns(study.read_log(demo.out / name), "loss") for name in ("clip", "prior", "decoder")}
    pictures.save_curves(folder / "loss.png", curves, "update", "loss", "Three networks", logy=True)


def write_report(demo, args, table, shots):
    """report.md: what was done, the table, the pictures, the commands."""
    real, varied, *rows = table
    stay = shares(varied["label_agreement"], varied["agreement_interval"])
    lines = [
        "# Handwritten digits, drawn from captions",
        "",
        f"CLIP, a prior and a decoder were trained on {len(np.load(demo.out / 'reference.npz')['arr_0'])} real 8x8 "
        f"digits with {len(TEMPLATES)} phrasings each. {len(HELD_OUT)} more phrasings were shown to none of them. A "
        "judge, a classifier of clean digits that has no part in the drawing, says which digit it sees; on "
        f"{len(np.load(real['path'])['arr_0'])} held-out real digits it is right in {real['label_agreement']:.1%}.",
        "",
        "## CLIP",
        "",
        "Which digit a held-out picture shows, told by the nearest text (zero-shot), with 95 % intervals:",
        "",
        *study.table(["texts", "right"], ([name, shares(share, ends)] for name, (share, ends) in shots.items())),
        "",
        "## As asked",
        "",
        f"{args.num_samples} samples a row in {args.steps} steps, texts in turn. *As asked*: the share in which the "
        "judge sees the digit of the text, with its 95 % binomial interval. *Spread*: variance of the judge's features "
        "within a digit, the diversity that guidance spends. *Recall*: share of real digits that lie among the samples."
        " *FD*: Frechet distance of features to the training digits.",
        "",
        *study.table("texts|embedding of|prior scale|decoder scale|decoder sees the text|as asked|spread|recall|FD"
                     .split("|"), map(cells, rows)),
        "",
        *verdicts(rows, args.num_samples),
        "",
        "![prompts](pictures/prompts.png)",
        "",
        "From noise to picture, a row a text:",
        "",
        "![reverse process](pictures/reverse_process.png)",
        "",
        "## Variations",
        "",
        f"Drawn again from their own embeddings, without a text, {stay} of the held-out digits stay what they are.",
        "",
        "![variations](pictures/variations.png)",
        "",
        "## Between two",
        "",
        "On the great circle between the embeddings of two texts, and of two pictures; the noise of a row is the same.",
        "",
        "![between texts](pictures/between_texts.png)",
        "![between pictures](pictures/between_pictures.png)",
        "",
        "## Training",
        "",
        "![loss](pictures/loss.png)",
    ]
    return demo.report("report.md", lines)


def shares(share, ends):
    """A share with its interval, as text."""
    return f"{share:.1%} ({ends[0]:.1%} to {ends[1]:.1%})"


def cells(each):
    """A row of the table as texts."""
    agreement = shares(each["label_agreement"], each["agreement_interval"])
    scores = [tables.score(each, name) for name in ("spread", "recall", "fid")]
    prior = "" if each["prior"] is None else f"{each['prior']:g}"
    of = "the text itself" if each["prior"] is None else "a picture, by the prior"
    return each["texts"], of, prior, f"{each['scale']:g}", "yes" if each["captions"] else "no", agreement, *scores


def what(each):
    """What a row is of."""
    return [each[name] for name in ("texts", "scale", "prior", "captions")]


def verdicts(rows, count):
    """Whether the prior beats the embedding of the text itself, row against row."""
    lines = []
    for b in (each for each in rows if each["prior"] is None):
        a = next((each for each in rows if what(each) == what(b | {"prior": 1.0})), None)
        if a is None:
            continue
        gap = a["label_agreement"] - b["label_agreement"]
        error = sum(r["label_agreement"] * (1 - r["label_agreement"]) / count for r in (a, b)) ** 0.5
        word = "more" if gap > 1.96 * error else "fewer" if gap < -1.96 * error else "as many, within the error,"
        sees = "sees the text" if b["captions"] else "does not see the text"
        lines.append(
            f"- {b['texts']} phrasings, decoder scale {b['scale']:g}, which {sees}: with the prior {word} digits"
            f" as asked ({gap:+.1%} ± {1.96 * error:.1%}), Frechet distance {a['fid']:.3g} against {b['fid']:.3g},"
            f" spread {a['spread']:.2f} against {b['spread']:.2f}."
        )
    return lines


def check(args):
    """Raise ValueError for options that would fail only after minutes of work."""
    for name in ("scales", "prior_scales", "usual"):
        study.numbers(name, getattr(args, name))
    least = dict.fromkeys(("clip_iterations", "prior_iterations", "decoder_iterations", "judge_iterations"), 1)
    study.check_least(args, **least, num_samples=20, steps=2, prior_steps=2)


def main():
    args = config.parse(__doc__, *OPTIONS)
    start = time.monotonic()
    check(args)
    demo = study.Study(Path(__file__).resolve().parent.parent, Path(args.out), args.seed)
    demo.begin("judge", "clip", "prior", "decoder", "samples", "pictures")
    train(demo, args)
    table = score(demo, args, draw(demo, args))
    shots = zero_shot(demo, args)
    (demo.out / "zero_shot.json").write_text(json.dumps(shots) + "\n")
    draw_pictures(demo, args)
    report = write_report(demo, args, table, shots)
    print(f"\nreport: {report} ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    config.run_program(main)
