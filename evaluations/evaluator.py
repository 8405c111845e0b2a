"""Scores of a set of images against a reference set, each an npz file: the program, and `evaluate` for other code.

    python evaluations/evaluator.py REF.npz SAMPLE.npz [--extractor inception|CLASSIFIER.pt] [--out scores.json]

A file holds images `arr_0` (uint8 [N,H,W,C]), possibly labels `arr_1` [N], possibly Inception moments of a larger set:
`mu, sigma` (pool) and `mu_s, sigma_s` (spatial). Stored moments stand in for those of arr_0 in FID and sFID; the
other scores look at arr_0 always.
"""

import argparse
import os
import sys
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from evaluations import errors, metrics, tables
from evaluations.cache import extract_once
from evaluations.features import InceptionExtractor, extract, make_extractor
from evaluations.per_class import per_class as scores_by_class

NEIGHBOURS = 3  # of precision and recall
MOMENTS = {"mu": "sigma", "mu_s": "sigma_s"}  # the names in a file
LINES = {
    "inception_score": "Inception Score:",
    "fid": "FID:",
    "sfid": "sFID:",
    "precision": "Precision:",
    "recall": "Recall:",
    "label_agreement": "Label agreement:",
}


class ImageSet(NamedTuple):
    """Images to score, by name; moments maps "mu" and "mu_s" to (mean [D], covariance [D,D]) where they are known."""

    name: str
    images: np.ndarray  # uint8 [N,H,W,C]
    labels: np.ndarray | None = None  # [N]
    moments: Mapping = MappingProxyType({})


def main(argv=None):
    """The program. Returns its exit code: 0, or 2 after one line on stderr about bad input."""
    return guarded(run, parse(argv))


def guarded(run, args):
    """Calls run(args). Returns an exit code: 0, 130 for an interrupt, or 2 after one line on stderr about bad input."""
    try:
        run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("GD_DEBUG") == "1":
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def parse(argv=None):
    """The command line: a namespace of reference, sample, extractor, weights, batch_size, device, out."""
    parser = argparse.ArgumentParser(
        description="Inception score, FID, sFID, precision and recall of one set of images against another.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("reference", metavar="REF.npz", help="images of the data set")
    parser.add_argument("sample", metavar="SAMPLE.npz", help="images to score")
    parser.add_argument(
        "--extractor", default="inception", help="inception, or a classifier checkpoint whose features are to be used"
    )
    parser.add_argument("--weights", help="file of the Inception weights (None: $GD_INCEPTION_WEIGHTS, else download)")
    parser.add_argument("--batch_size", type=int, default=64, help="images a forward pass; no score depends on it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--out", help="json file to write the scores to")
    return parser.parse_args(argv)


def run(args):
    """Evaluates as the command line says; prints the scores and writes them to args.out."""
    _check_device(args.device)
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: no such folder; make it first")
    reference, sample = read_image_set(args.reference), read_image_set(args.sample)
    extractor = make_extractor(args.extractor, args.device, args.weights)
    parts = {}
    scores = evaluate(reference, sample, extractor, args.batch_size, progress=True, parts=parts)
    if extractor.name != InceptionExtractor.name:
        print(f"Features: {extractor.dim} of {extractor.name}; compare only with scores by this network")
    if "sfid" not in scores:
        print("No spatial features, so no sFID")
    for key, label in LINES.items():
        if key in scores:
            print(label, scores[key])
    print(*tables.error_lines(scores), sep="\n")
    if args.out:
        Path(args.out).write_text(errors.to_json(scores) + "\n", encoding="utf-8")
        errors.save(errors.parts_path(args.out), parts)


def evaluate(reference, sample, extractor, batch_size=64, progress=False, parts=None, per_class=False, cache=None):
    """Scores of sample against reference, each the path of an npz file or an ImageSet.

    Returns a dict: inception_score, fid, sfid (with spatial features), precision, recall, label_agreement (with a
    classifier and labels), and what they were computed from: extractor, reference, sample; and their errors, as
    errors.errors_of tells them. Raises FileNotFoundError and ValueError for input that has no scores, naming the file.

    :param parts: a dict that receives {score: Estimate}, of which errors.save makes a file.
    :param per_class: also tell, under "per_class", the scores of each class; both sets must have labels.
    :param cache: a folder that keeps features under the content of their images (evaluations/cache.py).
    """
    sets = [given if isinstance(given, ImageSet) else read_image_set(given) for given in (reference, sample)]
    features = []
    for given, bar in zip(sets, ("reference features", "sample features")):
        with _blaming(given.name):
            how = {"batch_size": batch_size, "progress": bar if progress else None}
            features.append(extract_once(cache, extractor, given.images, **how) if cache
                            else extract(extractor, given.images, **how))  # fmt: skip
    described = {
        key: {"file": given.name, "images": len(given.images), "stored_moments": sorted(given.moments)}
        for key, given in zip(("reference", "sample"), sets)
    }
    scores = _scores(sets, features, extractor.name)
    own = extractor.name == InceptionExtractor.name  # then moments are of its features, and labels of other classes
    fixed = {score: sets[0].moments[key] for score, key in (("fid", "mu"), ("sfid", "mu_s"))
             if own and key in sets[0].moments}  # fmt: skip
    labels, parts = [given.labels for given in sets], {} if parts is None else parts
    leave = [score for score, key in (("fid", "mu"), ("sfid", "mu_s")) if own and key in sets[1].moments]
    scores |= errors.errors_of(*features, labels=None if own else labels[1], fixed=fixed, k=NEIGHBOURS, classes=labels,
                               parts=parts, leave=leave)  # fmt: skip
    scores["kid"] = parts["kid"].value
    if per_class:
        scores["per_class"] = scores_by_class(*features, *labels, NEIGHBOURS, agreement=not own)
    return {"extractor": extractor.name, **described, **scores}


def _scores(sets, features, extractor_name):
    """The numbers, from the ImageSets and the Features of (reference, sample)."""
    reference, sample = features
    labels = sets[1].labels
    if extractor_name == InceptionExtractor.name:  # its classes are not those of the labels
        labels = None
    else:  # stored moments are not of its features
        sets = [given._replace(moments={}) for given in sets]
    scores = {
        "inception_score": metrics.inception_score(sample.probabilities),
        "fid": _frechet_distance(sets, "mu", reference.pool, sample.pool),
    }
    if reference.spatial is not None:
        scores["sfid"] = _frechet_distance(sets, "mu_s", reference.spatial, sample.spatial)
    scores["precision"], scores["recall"] = metrics.precision_recall(reference.pool, sample.pool, NEIGHBOURS)
    if labels is not None:
        with _blaming(f"{sets[1].name}, arr_1"):
            scores["label_agreement"] = metrics.label_agreement(sample.probabilities, labels)
    return scores


def _frechet_distance(sets, key, *features):
    """Of (reference, sample), each by its stored moments of that key if it has them, else by its features [N,D]."""
    if not any(key in given.moments for given in sets):
        return metrics.frechet_distance_from_features(*features)
    moments = [given.moments[key] if key in given.moments else metrics.moments(f) for given, f in zip(sets, features)]
    with _blaming(f"{key} of {sets[0].name}, {sets[1].name}"):
        return metrics.frechet_distance(*moments[0], *moments[1])


def read_image_set(path):
    """The ImageSet of an npz file. FileNotFoundError without the file; ValueError for what is not scorable in it."""
    arrays = _read_arrays(path, ["arr_0", "arr_1", *MOMENTS.keys(), *MOMENTS.values()])
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has no array arr_0: save the images as np.savez(path, images)")
    with _blaming(f"{path}, arr_0"):
        images = _as_uint8(arrays["arr_0"])
    moments = {}
    for mu, sigma in MOMENTS.items():
        if mu not in arrays:
            continue
        if sigma not in arrays:
            raise ValueError(f"{path} has {mu} but not {sigma}: store both or neither")
        with _blaming(f"{path}, {mu} and {sigma}"):
            moments[mu] = metrics.checked_moments(arrays[mu], arrays[sigma])
    return ImageSet(str(path), images, arrays.get("arr_1"), moments)


def _read_arrays(path, keys):
    """The arrays of an npz file that go by one of keys. Files are data: nothing in them is unpickled."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an npz file of images")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an npz file: write it with np.savez(path, images)")
    try:
        with np.load(path, allow_pickle=False) as npz:
            return {key: np.asarray(npz[key]) for key in keys if key in npz.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}; it must be an intact file of arrays of numbers, by np.savez") from error


def _as_uint8(images):
    """Images [N,H,W,C] of any number type as uint8, if they hold whole numbers 0..255 (ValueError otherwise)."""
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"shape {list(images.shape)}: images must be [N,H,W,C] with C 3 or 1; transpose those of torch, and give "
            "grey ones a last axis"
        )
    if len(images) <= NEIGHBOURS:
        raise ValueError(f"{len(images)} images are too few: give at least {NEIGHBOURS + 1}, for their neighbours")
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "iuf":
        raise ValueError(f"values of type {images.dtype}: images must be uint8")
    if not np.isfinite(images).all():
        raise ValueError(f"{np.sum(~np.isfinite(images))} NaN or infinite values: images must be uint8")
    if images.min() < 0 or images.max() > 255:
        raise ValueError(f"values {images.min()}..{images.max()}: images must be uint8, 0..255")
    if (images != np.rint(images)).any():
        raise ValueError("fractional values: images must be uint8, whole numbers 0..255, scaled before they are saved")
    return images.astype(np.uint8)


def _check_device(name):
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not a device: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no GPU here; use --device cpu")


@contextmanager
def _blaming(what):
    """Puts the name of what is at fault before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
