"""Do samples repeat training images, or one another? Nearest neighbours, with real images as the measure of near.

    python evaluations/memorisation.py TRAINING.npz SAMPLE.npz --out FOLDER [--held_out REAL.npz] [--extractor ...]

A sample copies if it lies closer to a training image than that one's own nearest other training image does (Alaa et al.
2022 call samples for which this fails authentic). Held-out real images pass or fail the same test, and say how many
would by chance.
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from evaluations import errors, evaluator, gallery, influence, intervals, pages, report
from evaluations.cache import extract_once
from evaluations.features import make_extractor
from evaluations.nearest import nearest

REAL_QUANTILE = 0.01  # of the distances among real images: what is closer counts as a repetition

SHOWN = 10  # samples, closest first


class Neighbours(NamedTuple):
    """Of N samples: the distance to the K nearest training images [N,K], whose they are [N,K], and the ratio [N] of the
    first to that training image's own distance to its nearest other; below 1 the sample is suspect, 0 is a copy."""

    distances: np.ndarray
    owners: np.ndarray
    ratios: np.ndarray

    def closest(self, count):
        """The samples of the smallest ratios, smallest first."""
        return np.argsort(self.ratios, kind="stable")[:count]


def main(argv=None):
    """The program. Returns its exit code: 0, or 2 after one line on stderr about bad input."""
    parser = argparse.ArgumentParser(
        description="Nearest training images of samples, copies and repetitions, on a page with pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("training", metavar="TRAINING.npz", help="images that the model was trained on")
    parser.add_argument("sample", metavar="SAMPLE.npz", help="images to look at")
    parser.add_argument("--held_out", metavar="REAL.npz", help="real images of no training, for comparison")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for page, json and features")
    parser.add_argument("--extractor", default="inception", help="inception, or a classifier checkpoint")
    parser.add_argument("--weights", help="file of the Inception weights (None: $GD_INCEPTION_WEIGHTS, else download)")
    parser.add_argument("--batch_size", type=int, default=64, help="images a forward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    return evaluator.guarded(run, parser.parse_args(argv))


def run(args):
    """Looks as the command line says; writes memorisation.json, report.html, report.md and pictures."""
    sets = [path and evaluator.read_image_set(path) for path in (args.training, args.sample, args.held_out)]
    extractor = make_extractor(args.extractor, args.device, args.weights)
    folder, pools = Path(args.out) / "features", [None] * len(sets)
    for k, given in enumerate(sets):
        if given:
            pools[k] = extract_once(folder, extractor, given.images, args.batch_size, f"features of {given.name}").pool
    told = summary(pools[0], pools[1], sets[1].images, sets[0].images, pools[2])
    report.write(args.out, page(told, sets[0].images, sets[1].images))
    gallery.write(Path(args.out) / "memorisation.json", errors.to_json(told) + "\n")
    print(*lines(told), f"report: {Path(args.out) / 'report.html'}", sep="\n")


def lines(told):
    """What a summary says, in a few lines."""
    shares = {"samples": told["copies"], "held-out real images": told.get("copies_held_out")}
    for what, each in shares.items():
        if each:
            yield (f"{what} closer to a training image than its nearest other one: "
                   f"{intervals.shown(each['share'], each['standard_error'])}")  # fmt: skip
    close = told["repetitions"]
    yield (f"samples closer to one another than all but {close['expected']:.0%} of real images: "
           f"{intervals.shown(close['share'], close['standard_error'])}")  # fmt: skip
    for key, what in (("copied_pixels", "samples with the pixels of a training image"),
                      ("same_pixels", "groups of samples with the same pixels")):  # fmt: skip
        if key in told:
            yield f"{what}: {len(told[key])}"


def page(told, training_images, images):
    """The blocks of a page about a summary, with the images [M,H,W,C] and [N,H,W,C] that it is of."""
    closest = told["closest"]
    rows = [np.concatenate([images[each["sample"]][None], training_images[each["training"]]]) for each in closest]
    columns = ["sample", *(f"training {k}" for k in range(1, len(rows[0])))]
    labels = [f"{each['ratio']:.2f}" for each in closest]
    blocks = [
        pages.Heading("Memorisation", 1),
        pages.Lines(list(lines(told))),
        pages.Text("Each row: a sample, and the training images nearest to it. The number is the ratio of its distance "
                   "to that training image's distance to its nearest other; below 1 it is suspect, 0 is a copy."),
        pages.Picture("closest", "The samples that are closest to training images", gallery.grid(
            np.concatenate(rows), len(columns), row_labels=labels, column_labels=columns, tile=64)),
    ]  # fmt: skip
    pairs = told["repetitions"]["pairs"][:SHOWN]
    if pairs:
        both = images[[i for pair in pairs for i in pair]]
        blocks.append(pages.Picture("repetitions", "Samples that repeat one another, two by two", gallery.grid(
            both, 2, row_labels=[f"{i}, {j}" for i, j in pairs], tile=64)))  # fmt: skip
    return blocks


def neighbours(training, sample, k=3):
    """The Neighbours of sample features [N,D] among training features [M,D], M >= 2; Euclidean distances."""
    if len(training) < 2:
        raise ValueError(f"{len(training)} training images: their distances among one another need 2 or more")
    squares, owners = nearest(sample, training, k)
    known = np.unique(owners[:, 0])
    own = np.empty(len(training))
    own[known] = np.sqrt(nearest(training[known], training, 2)[0][:, 1])  # the first is itself, or one just like it
    distances, own = np.sqrt(squares), own[owners[:, 0]]
    ratios = np.divide(distances[:, 0], own, out=np.where(distances[:, 0] > 0, np.inf, 0.0), where=own > 0)
    return Neighbours(distances, owners, ratios)


def repeated_pixels(images, others=None):
    """Groups of rows of images [N,...] whose pixels are the same: lists of two rows or more. With others [M,...]: the
    pairs (row, row of others), the first of several."""
    if others is None:
        rows = {}
        for row, digest in enumerate(map(_digest, images)):
            rows.setdefault(digest, []).append(row)
        return [group for group in rows.values() if len(group) > 1]
    known = {digest: row for row, digest in reversed(list(enumerate(map(_digest, others))))}
    return [(row, known[digest]) for row, digest in enumerate(map(_digest, images)) if digest in known]


def repetitions(training, sample, seed=0):
    """(which samples [n] are closer to another one than all but 1 % of real images are to another, the closest pairs).

    Distances among fewer images are larger, so as many of both sets are looked at, drawn at random from the larger.
    The pairs are rows (i, j) of the samples, closest first, one for each image that is too close to another.
    """
    count, rng = min(len(training), len(sample)), np.random.default_rng(seed)
    real, drawn = (np.sort(rng.permutation(len(each))[:count]) for each in (training, sample))
    if count < 2:
        raise ValueError(f"{count} images have no distances among one another: give 2 or more of both sets")
    among_real = nearest(training[real], training[real], 1, itself=0)[0][:, 0]
    among_samples, owners = nearest(sample[drawn], sample[drawn], 1, itself=0)
    close = among_samples[:, 0] < np.quantile(among_real, REAL_QUANTILE)
    close |= (among_samples[:, 0] == 0) & (np.quantile(among_real, REAL_QUANTILE) == 0)
    order = np.flatnonzero(close)[np.argsort(among_samples[close, 0], kind="stable")]
    pairs = {tuple(sorted((drawn[i], drawn[owners[i, 0]]))): None for i in order}
    return close, [tuple(map(int, pair)) for pair in pairs]


def summary(training, sample, images=None, training_images=None, held_out=None):
    """What a report says, of features (training [M,D], sample [N,D], held-out real ones or None) and their images.

    Returns a dict of json's types: samples, training, copies (share of samples with a ratio below 1, standard error and
    interval; of the held-out images too), closest (the smallest ratios: sample, training images, ratio), repetitions
    (share, expected, pairs), and with images the exact copies: same_pixels (among samples), copied_pixels.
    """
    found = neighbours(training, sample)
    close, pairs = repetitions(training, sample)
    told = {
        "samples": len(sample),
        "training": len(training),
        "copies": _share(found.ratios < 1),
        "closest": [{"sample": int(i), "training": found.owners[i].tolist(), "ratio": float(found.ratios[i])}
                    for i in found.closest(SHOWN)],
        "repetitions": {**_share(close), "expected": REAL_QUANTILE, "pairs": pairs[:SHOWN]},
    }  # fmt: skip
    if held_out is not None:
        told["copies_held_out"] = _share(neighbours(training, held_out).ratios < 1)
    if images is not None:
        told["same_pixels"] = repeated_pixels(images)
    if images is not None and training_images is not None:
        told["copied_pixels"] = repeated_pixels(images, training_images)
    return told


def _share(hits):
    found = influence.share(hits)
    return {"share": found.value, "standard_error": intervals.standard_error(found),
            "interval": list(intervals.interval(found))}  # fmt: skip


def _digest(image):
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()


if __name__ == "__main__":
    sys.exit(main())
