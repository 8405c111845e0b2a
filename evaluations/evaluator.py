"""Scores of a set of images against a reference set: the program, and `evaluate` for other code.

    python evaluations/evaluator.py REF SAMPLE [--extractor inception|CLASSIFIER.pt|module:function] [--out scores.json]

REF and SAMPLE are npz files, folders, zips or tars of pictures, whatever else training reads, or names of published
files. An npz holds images `arr_0`
(uint8 [N,H,W,C]), possibly labels `arr_1` [N], possibly Inception moments of a larger set: `mu, sigma` (pool) and
`mu_s, sigma_s` (spatial). Stored moments stand in for those of the images in FID and sFID; the other scores look at the
images always. Several processes (torchrun, mpiexec, srun) share the work.
"""

import argparse
import sys

from evaluations import door, options
from evaluations.options import Settings


def parse(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description="Inception score, FID, sFID, precision, recall, density and coverage of one set of images against "
        "another.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("reference", metavar="REF", help="images of the data set: npz, folder, zip or published name")
    parser.add_argument("sample", metavar="SAMPLE", help="images to score, likewise")
    options.add_extractor_options(parser)
    usual = Settings()
    switches = parser.add_argument_group("deviations from the published protocol")
    switches.add_argument("--k", type=int, default=usual.k, help="neighbours of precision and recall")
    switches.add_argument("--density_k", type=int, default=usual.density_k, help="neighbours of density and coverage")
    switches.add_argument(
        "--distances", default=usual.distances, choices=options.DISTANCES,
        help="of precision and recall: float32 products with every open decision settled in float64, float64 products, "
        "or float16 as the original rounded them",
    )  # fmt: skip
    switches.add_argument("--split_size", type=int, default=usual.split_size, help="images in a split of the "
                          "inception score")  # fmt: skip
    switches.add_argument("--splits", type=int, help="so many equal splits in place of those of --split_size")
    switches.add_argument("--shuffle", type=int, help="seed of an order to draw before splitting (None: file order)")
    parser.add_argument("--cache", help="folder for features, which later runs, of more images too, find again")
    parser.add_argument("--no_errors", action="store_true", help="leave out KID and all errors, which take the time of "
                        "precision and recall again, and more")  # fmt: skip
    parser.add_argument("--per_class", action="store_true", help="also score each class; both sets must have labels")
    parser.add_argument("--out", help="json file to write the scores to; what each image has in them goes beside "
                        "NAME.json as NAME.parts.npz")  # fmt: skip
    return parser.parse_args(argv)


door.help_first(__name__, parse)  # before what takes seconds to import

import functools
from pathlib import Path

import numpy as np

from evaluations import (
    collect,
    errors,
    metrics,
    neighbours,
    protocol,
    reference_files,
    sources,
    tables,
)
from evaluations.cache import Cache
from evaluations.features import OPTIONS, InceptionExtractor, identity_of, make_extractor
from evaluations.per_class import no_labels
from evaluations.per_class import per_class as scores_by_class
from evaluations.sources import ImageSet

__all__ = ["ImageSet", "Scorer", "Settings", "evaluate"]

LINES = {
    "inception_score": "Inception Score:",
    "fid": "FID:",
    "sfid": "sFID:",
    "precision": "Precision:",
    "recall": "Recall:",
    "density": "Density:",
    "coverage": "Coverage:",
    "kid": "KID:",
    "label_agreement": "Label agreement:",
}


def main(argv=None):
    """The program. Returns its exit code: 0, or 2 after one line on stderr about bad input."""
    return guarded(run, parse(argv))


def guarded(work, args):
    """Calls work(args). Returns an exit code: 0, 130 for an interrupt, or 2 after a line on stderr about bad input."""
    return door.exit_code(lambda: work(args))


def extractor_of(args, device):
    """The extractor that the options ask for."""
    return make_extractor(args.extractor, device, args.weights, **{name: getattr(args, name) for name in OPTIONS})


def run(args):
    """Evaluates as the command line says; prints the scores and writes them to args.out."""
    ranks, device = door.start(args.device or None)
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: no such folder; make it first")
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    make = functools.partial(extractor_of, args, device)
    sets, extractor = open_sets((args.reference, args.sample), make, ranks, args.image_size)
    parts, how = {}, {"per_class": args.per_class, "with_errors": not args.no_errors}
    scores = evaluate(*sets, extractor, args.batch_size, True, settings, args.cache, ranks, device, parts, **how)
    if scores:
        report(scores)
        if args.out:
            write(args.out, scores, parts)


def write(path, scores, parts):
    """Write a result as json and, beside it, its estimates, if there are any."""
    if parts:
        with door.writing(errors.parts_path(path)) as file:
            errors.save(file, parts)
    with door.writing(path) as file:
        file.write((errors.to_json(scores) + "\n").encode())


def report(scores):
    """Print a result: a line a score, in the original's order, then the errors; on stderr what else is to be said."""
    for key, label in LINES.items():
        if key in scores:
            print(label, scores[key])
    if "standard_errors" in scores:
        print(*tables.error_lines(scores), sep="\n")
    for note in scores["notes"]:
        print("note:", note, file=sys.stderr)


def evaluate(
    reference, sample, extractor, batch_size=64, progress=False, settings=None, cache=None, ranks=None, device="cpu",
    parts=None, per_class=False, with_errors=True,
):  # fmt: skip
    """Scores of sample against reference: each a path, a published name, an array, an ImageSet, a stream of batches or
    a Source (see `sources.open_source`).

    Returns a dict: inception_score (of an extractor with classes), fid, sfid (with spatial features), precision,
    recall, density, coverage (with images on both sides), label_agreement (with a classifier and labels); what they
    were computed from: extractor, reference, sample; `protocol`, all that must agree before the scores compare;
    `notes`, what else there is to know, a list of lines; kid and the errors of the scores, as errors.errors_of tells
    them. On other ranks than 0 it returns None.

    :param parts: a dict that receives {score: Estimate}. :param with_errors: False leaves out kid and all errors.
    :param per_class: also tell under "per_class" the scores of each class (evaluations/per_class.py).

    :param settings: Settings. :param cache: folder of a Cache, or None. :param ranks: door.Ranks that share the work.
    :param device: of the distances.
    :raises FileNotFoundError, ValueError: for input that has no scores, naming the file.
    """
    settings, channels = settings or Settings(), getattr(extractor, "channels", 3)
    reference, source = (_opened(reference_files.find(each), channels) for each in (reference, sample))
    _check_sample(source, extractor, settings)
    if per_class:
        _check_classes(reference, source)
    scorer = Scorer(reference, extractor, batch_size, progress, settings, cache, ranks, device)
    return scorer.scores(source, scorer.look_at(source, "sample features"), parts, per_class, with_errors)


def open_sets(given, make, ranks, image_size=None):
    """(the Sources of what was given, the extractor that make() returns). Files are seen to be there before weights are
    sought, and read as far as that is quick before any image is looked at. Collective."""
    given = [ranks.from_main(reference_files.find, each) for each in given]
    for each in given:
        sources.open_source(each, 3, image_size)
    made = []
    ranks.from_main(lambda: made.append(make()))  # first on one rank: it may fetch weights
    extractor = made[0] if made else make()
    return [_opened(each, getattr(extractor, "channels", 3), image_size) for each in given], extractor


def _opened(given, channels, image_size=None):
    """The Source of what was given, looked at as far as that is quick."""
    source = sources.open_source(given, channels, image_size)
    source.check()
    return source


def _check_sample(source, extractor, settings):
    """Raise ValueError for samples that will have no scores, before the network looks at the reference."""
    if source.count == 0:
        raise ValueError(f"{source.name} has no array arr_0: save the images as np.savez(path, images)")
    if source.label_problem and extractor.name != InceptionExtractor.name:
        raise ValueError(source.label_problem)
    if source.count is not None and source.count <= settings.k:
        raise _too_few(f"{source.name}, arr_0", source.count, settings.k)


def _check_classes(reference, sample):
    """Raise ValueError where it is known beforehand that there are no scores of each class."""
    if reference.count == 0:
        raise ValueError(f"{reference.name} holds no images: the scores of each class need them")
    for whose, source in (("reference", reference), ("sample", sample)):
        if source.count is not None and source.labels is None:
            raise no_labels(f"{whose} {source.name}")


class Scorer:
    """A reference, looked at, against which samples are scored as they come: `for batch in scorer.through(stream)`.

    Parameters are those of `evaluate`.
    """

    def __init__(
        self, reference, extractor, batch_size=64, progress=False, settings=None, cache=None, ranks=None, device="cpu"
    ):
        self.extractor, self.batch_size, self.progress = extractor, batch_size, progress
        self.settings, self.ranks = settings or Settings(), ranks or door.Ranks()
        self.device = "cpu" if str(device).startswith("mps") else str(device)  # which has no float64
        self.cache = Cache(cache, identity_of(extractor)) if cache else None
        self.reference = _opened(reference_files.find(reference), getattr(extractor, "channels", 3))
        statistics_alone = self.reference.count == 0
        self.seen = None if statistics_alone else self.look_at(self.reference, "reference features")

    def look_at(self, source, title):
        """What this rank collects of a Source. Collective."""
        if source.count is not None and source.count <= self.settings.k:
            raise _too_few(f"{source.name}, arr_0", source.count, self.settings.k)
        with sources.blaming(source.name):
            return collect.collect(
                source, self.extractor, self.ranks, self.batch_size, self.cache, title if self.progress else None
            )

    def through(self, stream):
        """
        Yields the batches (indices, x, labels or None) of a stream, and looks at them; x is float [n,C,H,W] in [-1,1],
        or already uint8 [n,H,W,C].
        """
        self._collector = collect.Collector(self.extractor, self.batch_size, self.cache)
        for indices, x, labels in stream:
            known = None if labels is None else labels.cpu().numpy()
            images = door.to_uint8(x) if x.is_floating_point() else x.numpy()
            self._collector.add(sources.Block(np.array(list(indices)), images, known))
            yield indices, x, labels

    def finish(self, name="samples", parts=None):
        """The scores of what came `through`. Collective."""
        return self.scores(sources.Source(name), collect.complete(self._collector, self.ranks, name), parts)

    def scores(self, source, seen, parts=None, per_class=False, with_errors=True):
        """The result of `evaluate` for what `collect` saw of a source on this rank. Collective."""
        described = {"reference": self.reference, "sample": source}
        notes = list(_notes(described, self.extractor))
        neighbours_said = self._neighbours(seen, notes)
        whole = [None if each is None else collect.gathered(each, self.ranks) for each in (self.seen, seen)]
        if not self.ranks.is_main:
            return None
        moments = [_stored(each, self.extractor, whose, notes) for whose, each in described.items()]
        notes += _notes_of_images(whole)
        scores = _scores(whole, moments, self.settings, self.extractor, source, notes) | neighbours_said
        labels = [_labels(*each) for each in zip(whole, described.values())]
        parts = {} if parts is None else parts
        more = self._errors(whole, moments, labels, parts) if with_errors else {}
        if "kid" in parts:
            scores["kid"] = parts["kid"].value
        if per_class:
            more["per_class"] = self._of_classes(whole, labels)
        order = {key: scores[key] for key in LINES if key in scores}
        hashes = [protocol.hash_of(_digests(each), stored) for each, stored in zip(whole, moments)]
        counts = {whose: len(_digests(each)) for whose, each in zip(described, whole)}
        used = {whose: sorted(each) for whose, each in zip(described, moments)}
        told = {
            whose: {"file": each.name, "images": counts[whose], "stored_moments": used[whose], "sha256": digest}
            for (whose, each), digest in zip(described.items(), hashes)
        }
        return {
            **order,
            "extractor": self.extractor.name,
            **told,
            "protocol": protocol.protocol(self.extractor, self.settings, hashes[0], counts, used),
            "notes": notes,
            **more,
        }

    def _errors(self, whole, moments, labels, parts):
        """What errors.errors_of tells of the Collected of (reference or None, sample); fills `parts`."""
        reference, sample = (None if each is None else each.features for each in whole)
        fixed = {score: moments[0].get(key) for score, key in (("fid", "mu"), ("sfid", "mu_s"))}
        asked = {} if self.extractor.name == InceptionExtractor.name else {"labels": labels[1]}
        how = {name: getattr(self.settings, name) for name in ("k", "split_size", "splits", "shuffle")}
        stored = {"fid", "sfid"} if moments[1] else ()  # not of these features
        return errors.errors_of(reference, sample, fixed={name: each for name, each in fixed.items() if each},
                                classes=labels, parts=parts, leave=stored, **asked, **how)  # fmt: skip

    def _of_classes(self, whole, labels):
        agreement = self.extractor.name != InceptionExtractor.name
        return scores_by_class(*(each.features for each in whole), *labels, self.settings.k, agreement)

    def _neighbours(self, seen, notes):
        """Precision, recall, density and coverage, as far as there are images for them. Collective."""
        if self.seen is None:
            notes.append(f"{self.reference.name} holds no images: no precision, recall, density and coverage")
            return {}
        from tqdm import tqdm

        k, wide = self.settings.k, self.settings.density_k
        counts = [sum(self.ranks.share(len(each.indices))) for each in (self.seen, seen)]
        if counts[1] <= k:
            raise _too_few("the samples", counts[1], k)
        if counts[0] <= wide:
            notes.append(f"{counts[0]} reference images are too few for density and coverage with {wide} neighbours")
            wide = None
        work = (sum(counts) ** 2 - counts[0] * counts[1]) // self.ranks.size
        hidden = not (self.progress and self.ranks.is_main)
        with tqdm(desc="distances", total=work, unit_scale=True, disable=hidden) as bar:
            return neighbours.neighbourhood_scores(
                self.seen.features.pool, seen.features.pool, k, wide, self.settings.distances, self.device, self.ranks,
                bar.update,
            )  # fmt: skip


def _scores(whole, moments, settings, extractor, source, notes):
    """The scores that rank 0 computes from the Collected of (reference or None, sample) and their stored moments."""
    sample, scores = whole[1], {}
    if sample.features.probabilities is not None:
        splits = settings.split_size, settings.splits, settings.shuffle
        scores["inception_score"] = metrics.inception_score(sample.features.probabilities, *splits)
    for name, key in (("fid", "mu"), ("sfid", "mu_s")):
        what = collect.PARTS[key]
        if getattr(sample.features, what) is None:
            notes.append("no spatial features, so no sFID")
        elif (moments[0] and key not in moments[0]) or (moments[1] and key not in moments[1]):
            notes.append(f"stored statistics without {key}: {name} left out")
        else:
            scores[name] = _frechet_distance(whole, moments, key, what)
    labels = _labels(sample, source)
    if labels is not None and sample.features.probabilities is not None and extractor.name != InceptionExtractor.name:
        with sources.blaming(f"{source.name}, arr_1"):
            scores["label_agreement"] = metrics.label_agreement(sample.features.probabilities, labels)
    return scores


def _labels(collected, source):
    """Labels [N] of what was collected, or of its source; None if neither knows."""
    return source.labels if collected is None or collected.labels is None else collected.labels


def _frechet_distance(whole, moments, key, what):
    """Of (reference, sample), each by its stored moments if it has them, else by what was collected: below full rank
    from the features themselves, where that form is exact, else from the running moments."""
    if not any(moments):
        features = [getattr(each.features, what) for each in whole]
        if min(map(len, features)) <= features[0].shape[1]:
            return metrics.frechet_distance_from_features(*features)
    pairs = [stored[key] if stored else each.moments[key].statistics() for each, stored in zip(whole, moments)]
    with sources.blaming(f"{key} of the reference and the sample"):
        return metrics.frechet_distance(*pairs[0], *pairs[1])


def _too_few(name, count, k):
    return ValueError(f"{name}: {count} images are too few: give at least {k + 1}, for their neighbours")


def _stored(source, extractor, whose, notes):
    """The stored moments of a source, if they are of this extractor's features."""
    if not source.moments:
        return {}
    maker = source.provenance.get("extractor")
    mine = identity_of(extractor)
    usual = extractor.name == InceptionExtractor.name and all(mine.get(n, v) == v for n, v in list(OPTIONS.items())[:2])
    if usual if maker is None else maker == mine:
        return dict(source.moments)
    notes.append(f"stored statistics of the {whose}, {source.name}, are of other features and were not used")
    return {}


def _digests(collected):
    return np.zeros((0, 32), np.uint8) if collected is None else collected.digests


def _notes(described, extractor):
    """What the kinds of files give to say."""
    if extractor.name != InceptionExtractor.name:
        yield f"features: {extractor.dim} of {extractor.name}; compare only with scores by this network"
    dtype = identity_of(extractor).get("dtype", OPTIONS["dtype"])
    if dtype != OPTIONS["dtype"]:
        yield f"features: computed in {dtype}; compare only with scores of --dtype {dtype}"
    lossy = {whose: each.lossy for whose, each in described.items()}
    if True in lossy.values() and len(set(lossy.values())) > 1:
        touched, other = sorted(lossy, key=lambda whose: not lossy[whose])
        yield (
            f"warning: the {touched} is JPEG or another lossy format and the {other} is not, as far as is known: "
            "compression alone moves FID by more than models differ"
        )


def _notes_of_images(whole):
    """What the images themselves give to say."""
    counts = [len(each.digests) for each in whole if each is not None]
    if len(set(counts)) > 1:
        yield f"{counts[0]} reference images against {counts[1]} samples"
    shapes = [sorted(each.shapes)[0] for each in whole if each is not None]
    if len(set(shapes)) > 1:
        sizes = " and ".join(f"{height}x{width}x{channels}" for height, width, channels in shapes)
        yield f"reference and sample are of different sizes, {sizes} (height x width x channels)"
    for whose, each in zip(("reference", "sample"), whole):
        repeats = 0 if each is None else len(each.digests) - len(np.unique(each.digests, axis=0))
        if repeats:
            yield f"{repeats} images of the {whose} are exact copies of others in it"


if __name__ == "__main__":
    sys.exit(main())
