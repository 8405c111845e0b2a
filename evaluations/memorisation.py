"""Do samples repeat training images, or one another? Nearest neighbours, with real images as the measure of near.

    python evaluations/memorisation.py TRAINING.npz SAMPLE.npz --out FOLDER [--held_out REAL.npz] [--extractor ...]

A sample copies if it lies closer to a training image than that one's own nearest other training image does (Alaa et al.
2022 call samples for which this fails authentic). Held-out real images pass or fail the same test, and say how many
would by chance.
"""

import argparse

from evaluations import door, options


def parse(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description="Nearest training images of samples, copies and repetitions, on a page with pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("training", metavar="TRAINING.npz", help="images that the model was trained on")
    parser.add_argument("sample", metavar="SAMPLE.npz", help="images to look at")
    parser.add_argument("--held_out", metavar="REAL.npz", help="real images of no training, for comparison")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for page, json and features")
    options.add_extractor_options(parser)
    return parser.parse_args(argv)


door.help_first(__name__, parse)  # before what takes seconds to import

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluations import errors, evaluator, gallery, influence, intervals, pages, report, sources
from evaluations.cache import Cache
from evaluations.collect import collect
from evaluations.features import identity_of
from evaluations.neighbours import nearest

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
    return door.exit_code(lambda: run(parse(argv)))


def run(args):
    """Looks as the command line says; writes memorisation.json, report.html, report.md and pictures."""
    ranks, device = door.start(args.device or None)
    given = [path for path in (args.training, args.sample, args.held_out) if path]
    make = functools.partial(evaluator.extractor_of, args, device)
    sets, extractor = evaluator.open_sets(given, make, ranks, args.image_size)
    kept, seen = Cache(Path(args.out) / "features", identity_of(extractor)), []
    for source in sets:
        with sources.blaming(source.name):
            seen.append(collect(source, extractor, ranks, args.batch_size, kept, f"features of {source.name}"))
    training, sample, *held_out = (each.features.pool for each in seen)
    told = summary(training, sample, seen[1].digests, seen[0].digests, *held_out)
    report.write(args.out, page(told, args.training, args.sample))
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


def page(told, training, sample):
    """The blocks of a page about a summary, with pictures out of the files of both sets."""
    closest = told["closest"]
    near = [i for each in closest for i in each["training"]]
    mine, theirs = (report.images_of(*each)[0] for each in (
        (sample, [each["sample"] for each in closest]), (training, near)))  # fmt: skip
    rows = np.concatenate([mine[:, None], theirs.reshape(len(closest), -1, *theirs.shape[1:])], axis=1)
    columns = ["sample", *(f"training {k}" for k in range(1, rows.shape[1]))]
    labels = [f"{each['ratio']:.2f}" for each in closest]
    blocks = [
        pages.Heading("Memorisation", 1),
        pages.Lines(list(lines(told))),
        pages.Text("Each row: a sample, and the training images nearest to it. The number is the ratio of its distance "
                   "to that training image's distance to its nearest other; below 1 it is suspect, 0 is a copy."),
        pages.Picture("closest", "The samples that are closest to training images", gallery.grid(
            rows.reshape(-1, *mine.shape[1:]), len(columns), row_labels=labels, column_labels=columns, tile=64)),
    ]  # fmt: skip
    pairs = told["repetitions"]["pairs"][:SHOWN]
    if pairs:
        both = report.images_of(sample, [i for pair in pairs for i in pair])[0]
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


def repeated_pixels(digests, others=None):
    """Groups of images of one digest [N,32] (`sources.digests`): lists of two rows or more. With others [M,32]: the
    pairs (row, row of others), the first of several."""
    if others is None:
        rows = {}
        for row, digest in enumerate(map(bytes, digests)):
            rows.setdefault(digest, []).append(row)
        return [group for group in rows.values() if len(group) > 1]
    known = {digest: row for row, digest in reversed(list(enumerate(map(bytes, others))))}
    return [(row, known[digest]) for row, digest in enumerate(map(bytes, digests)) if digest in known]


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


def summary(training, sample, digests=None, training_digests=None, held_out=None):
    """What a report says, of features (training [M,D], sample [N,D], held-out real ones or None) and their digests.

    Returns a dict of json's types: samples, training, copies (share of samples with a ratio below 1, standard error and
    interval; of the held-out images too), closest (the smallest ratios: sample, training images, ratio), repetitions
    (share, expected, pairs), and with digests the exact copies: same_pixels (among samples), copied_pixels.
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
    if digests is not None:
        told["same_pixels"] = repeated_pixels(digests)
    if digests is not None and training_digests is not None:
        told["copied_pixels"] = repeated_pixels(digests, training_digests)
    return told


def _share(hits):
    found = influence.share(hits)
    return {"share": found.value, "standard_error": intervals.standard_error(found),
            "interval": list(intervals.interval(found))}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
