"""Does a model of captioned digits draw what a text asks for, and what does guidance do to it?

    python benchmarks/captions.py --model_path runs/captions/ema_0.995_002000.pt --judge runs/judge/model001000.pt

after the commands of docs/captions.md. For phrasings that were trained on and phrasings that were held out, and several
scales of classifier-free guidance: the share of the samples in which an independent classifier, trained on clean
digits, sees the digit of the text; and, against obedience, how much of the training data's variety the samples cover
(recall) and how much they vary within a digit (the spread of the judge's features). Writes results/captions.json and a
picture. With --strips FOLDER it also, or only, draws pictures of the two processes.
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
from guided_diffusion import checks, generate, guidance, pictures, program, study, text
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
    what, how = asked(args, encoder, texts, scale)
    stream = generate.sample_stream(**what, **how, num_samples=num_samples, batch_size=args.batch_size)
    return generate.collect(stream)[0]


def asked(args, encoder, texts, scale):
    """What to sample from, the model, its process and the shape of its images, and how: vectors and guidance."""
    model, diffusion, flags = open_diffusion(args.model_path, {"timestep_respacing": str(args.steps)})
    shape, null = (flags["image_channels"], flags["image_size"], flags["image_size"]), checks.nulls(flags)

    def guide(predict):
        return guidance.classifier_free(predict, null, scale, batched=True) if scale != 1 else predict

    vectors = th.from_numpy(text.encode(encoder, texts))
    given = {"vector": lambda indices: vectors[[i % len(vectors) for i in indices]]}
    return {"diffusion": diffusion, "model": model, "shape": shape}, {"given": given, "guide": guide}


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
            place = chosen(k, texts)
            rows += list(images[place :: len(texts)][:columns])
            names.append(f"{texts[place]}, scale {scale:g}")
    pictures.save_grid(PICTURE, np.stack(rows), columns, row_labels=names, title="Texts that were held out")


def chosen(k, texts):
    """The place of the k-th text to show: another digit and another phrasing each time."""
    return (6 * k + k % 3) % len(texts)


def save_strips(args, encoder, captions, texts, scales):
    """
    Both processes, for five texts: images on their way to noise (noising.png) and, with a row for each text and for the
    least and the greatest scale, from the same noise to images (sampling.png).
    """
    folder, texts, walks = Path(args.strips), [texts[chosen(k, texts)] for k in range(5)], []
    images = th.from_numpy(captions["arr_0"][:: -(-len(captions["arr_0"]) // 5)]).permute(0, 3, 1, 2) / 127.5 - 1
    study.save_noising(folder / "noising.png", open_diffusion(args.model_path)[1], images)
    for scale in (min(scales), max(scales)):
        what, how = asked(args, encoder, texts, scale)
        after, frames = generate.reverse_process(**what, **how, count=len(texts))
        walks.append(np.stack(frames))                                                             # [S,5,H,W,C]
    frames = np.stack(walks, 2).reshape(len(after), -1, *walks[0].shape[2:])                       # [S,10,H,W,C]
    names = [f"{each}, scale {scale:g}" for each in texts for scale in (min(scales), max(scales))]
    title = "After so many steps, each pair from the same noise"
    study.save_strip(folder / "sampling.png", frames, row_labels=names, column_labels=after, title=title)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--judge", help="checkpoint of a classifier of clean digits; without one, only --strips")
    parser.add_argument("--strips", help="folder for pictures of the noising and the sampling process")
    parser.add_argument("--captions", default="data/captions.npz")
    parser.add_argument("--scales", default="1,2,4")
    parser.add_argument("--num_samples", type=int, default=480)
    parser.add_argument("--batch_size", type=int, default=240)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    if not (args.judge or args.strips):
        parser.error("give --judge, --strips or both")
    with np.load(args.captions) as archive:
        captions = dict(archive)
    encoder, scales = program.text_encoder(args.model_path), study.numbers("scales", args.scales)
    if args.strips:
        save_strips(args, encoder, captions, phrasings(captions)["held out"][0], scales)
    if args.judge:
        measure(args, encoder, captions, scales)


def measure(args, encoder, captions, scales):
    """Print the table, write it and the picture of samples."""
    judge = ClassifierExtractor(args.judge)
    reference, table, held_out = judge(captions["arr_0"]).pool, [], {}
    for name, (texts, labels) in phrasings(captions).items():
        wanted = np.array(labels)[np.arange(args.num_samples) % len(labels)]
        for scale in scales:
            start = time.monotonic()
            images = draw(args, encoder, texts, scale, args.num_samples)
            row = {"texts": name, "scale": scale, **score(judge, images, wanted, reference)}
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
