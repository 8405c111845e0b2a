"""Does a model of captioned digits draw what a text asks for, and what does guidance do to it?

    python benchmarks/captions.py --model_path runs/captions/ema_0.995_002000.pt --judge runs/judge/model001000.pt

after the commands of docs/captions.md. For phrasings that were trained on and phrasings that were held out, and several
scales of classifier-free guidance: the share of the samples in which an independent classifier, trained on clean
digits, sees the digit of the text; and, against obedience, how much of the training data's variety the samples cover
(recall) and how much they vary within a digit (the spread of the judge's features). Writes results/captions.json and a
picture.
"""

import argparse
import datetime
import json
import time
from pathlib import Path

import numpy as np
import torch as th

from evaluations import metrics
from evaluations.features import ClassifierExtractor
from guided_diffusion import config, generate, guidance, pictures, program, text
from guided_diffusion.script_util import open_diffusion

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "captions.json"
PICTURE = ROOT / "docs" / "pictures" / "captions.png"


def phrasings(captions):
    """{"trained" or "held out": (texts, labels)} of the npz of datasets/captions.py."""
    pairs = zip(captions["texts"].ravel(), captions["arr_1"].repeat(captions["texts"].shape[1]))
    trained = sorted(set(map(tuple, pairs)), key=lambda pair: (pair[1], pair[0]))
    held_out = zip(captions["held_out"], captions["held_out_labels"])
    return {"trained": tuple(zip(*trained)), "held out": tuple(zip(*sorted(held_out, key=lambda pair: pair[1])))}


def draw(args, encoder, texts, scale, num_samples):
    """uint8 [N,H,W,C]: samples for the texts in turn, by ancestral sampling; scale as in --guidance_scale."""
    model, diffusion, flags = open_diffusion(args.model_path, {"timestep_respacing": str(args.steps)})
    null = config.nulls(flags)
    stream = generate.sample_stream(
        diffusion,
        model,
        shape=(flags["image_channels"], flags["image_size"], flags["image_size"]),
        num_samples=num_samples,
        batch_size=args.batch_size,
        vectors=th.from_numpy(text.encode(encoder, texts)),
        guide=lambda predict: guidance.classifier_free(predict, null, scale, batched=True) if scale != 1 else predict,
    )
    return generate.collect(stream)[0]


def score(judge, images, labels, reference):
    """{measure: value} of samples [N,H,W,C] that should show labels [N]; reference: features of the training data."""
    features = judge(images)
    seen = features.probabilities.argmax(1)
    several = np.bincount(seen)[seen] > 1
    precision, recall = metrics.precision_recall(reference, features.pool)
    return {
        "agreement": metrics.label_agreement(features.probabilities, labels),
        "precision": precision,
        "recall": recall,
        "spread": metrics.within_class_variance(features.pool[several], seen[several]),
    }


def save_picture(samples, columns=12):
    """Rows of samples {scale: (texts, images)} for five held-out texts, without guidance and with the most of it."""
    columns = min(columns, *(len(images) // len(texts) for texts, images in samples.values()))
    rows, names = [], []
    for k in range(5):
        for scale in (min(samples), max(samples)):
            texts, images = samples[scale]
            place = (6 * k + k % 3) % len(texts)  # another digit and another phrasing each time
            rows += list(images[place :: len(texts)][:columns])
            names.append(f"{texts[place]}, scale {scale:g}")
    pictures.save_grid(PICTURE, np.stack(rows), columns, row_labels=names, title="Texts that were held out")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--captions", default="data/captions.npz")
    parser.add_argument("--scales", default="1,2,4")
    parser.add_argument("--num_samples", type=int, default=480)
    parser.add_argument("--batch_size", type=int, default=240)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    with np.load(args.captions) as archive:
        captions = dict(archive)
    encoder, judge = program.text_encoder(args.model_path), ClassifierExtractor(args.judge)
    reference, table, held_out = judge(captions["arr_0"]).pool, [], {}
    for name, (texts, labels) in phrasings(captions).items():
        asked = np.array(labels)[np.arange(args.num_samples) % len(labels)]
        for scale in map(float, args.scales.split(",")):
            start = time.monotonic()
            images = draw(args, encoder, texts, scale, args.num_samples)
            row = {"texts": name, "scale": scale, **score(judge, images, asked, reference)}
            table.append(row)
            if name == "held out":
                held_out[scale] = texts, images
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if key not in ("texts", "scale"))
            print(f"{name:9} {scale:4g}  {numbers}  ({time.monotonic() - start:.0f} s)", flush=True)
    save_picture(held_out)
    result = {"date": datetime.date.today().isoformat(), **vars(args), "rows": table}
    OUT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
