"""Makes a reference file of a set of images: the statistics of all of them, and some of the images themselves.

    python evaluations/make_reference.py IMAGES OUT.npz [--count 50000] [--keep 10000] [--image_size 64]

IMAGES is an npz, a folder or a zip. OUT.npz holds what the original's references hold: `arr_0`, a seeded choice of the
images (and their labels `arr_1`), and `mu sigma mu_s sigma_s` of everything; besides `provenance`, a json text. Work
that was broken off goes on where it was last saved, and a finished file grows to a larger --count by looking at the new
images only. Several processes (torchrun, mpiexec, srun) share the work.
"""

import argparse

from evaluations import door, options


def parse(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description=" ".join(__doc__.split("\n")[0].split()), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("images", metavar="IMAGES", help="npz, folder or zip")
    parser.add_argument("out", metavar="OUT.npz", help="file to write, or to go on with")
    parser.add_argument("--count", type=int, help="only the first so many images (None: all)")
    parser.add_argument("--keep", type=int, default=10000, help="images to keep for precision and recall, 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="seed of their choice")
    parser.add_argument("--save_every", type=int, default=10000, help="images after which what is done is saved")
    options.add_extractor_options(parser)
    return parser.parse_args(argv)


door.help_first(__name__, parse)  # before what takes seconds to import

import functools
import json
import sys
from pathlib import Path

import numpy as np

from evaluations import collect, evaluator, reference_files, sources
from evaluations.features import identity_of
from evaluations.moments import Moments


def main(argv=None):
    """The program. Returns its exit code."""
    return evaluator.guarded(run, parse(argv))


def run(args):
    """Make the file that the command line asks for."""
    ranks, device = door.start(args.device or None)
    out = Path(args.out)
    if out.suffix != ".npz" or not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: give a file OUT.npz in a folder that exists")
    make = functools.partial(evaluator.extractor_of, args, device)
    (source,), extractor = evaluator.open_sets([args.images], make, ranks, args.image_size)
    build(source, extractor, out, args.count, args.keep, args.seed, args.save_every, args.batch_size, ranks, True)
    if ranks.is_main:
        print(f"{out}: statistics of {args.count or source.count} images of {source.name}, {args.keep} of them kept")


def build(
    source, extractor, out, count=None, keep=10000, seed=0, save_every=10000, batch_size=64, ranks=None, progress=False
):
    """Write the reference file `out` of the first `count` images of a Source. Collective.

    :raises ValueError: if there are not so many, or `out` is there and of other images or features: it is not touched.
    """
    ranks, out = ranks or door.Ranks(), Path(out)
    count = source.count if count is None else count
    if source.count is None or not 2 <= count <= source.count:
        raise ValueError(f"{source.name} has {source.count} images: count must be from 2 to that, not {count}")
    if keep < 0 or save_every < 2:
        raise ValueError(f"keep is {keep} and save_every {save_every}: they must be at least 0 and 2")
    partial = out.with_name(f"{out.name}.partial.npz")
    begun = ranks.from_main(_begun, (partial, out), source, extractor, count)
    done, moments = begun or (0, {})
    with _bar(count, done, progress and ranks.is_main) as bar:
        for start in range(done, count, save_every):
            stop = min(start + save_every, count)
            collector = collect.Collector(extractor, batch_size, keep_rows=False)
            for block in source.blocks(ranks.rank, ranks.size, start, stop):
                collector.add(block)
                bar.update(len(block.indices) * ranks.size)
            collector.flush()
            for part in ranks.to_main(collector.moments) or ():
                for key, each in part.items():
                    moments.setdefault(key, Moments(len(each.mean))).merge(each)
            if ranks.is_main and stop < count:
                _save_progress(partial, moments, provenance(source, extractor, stop))
    ranks.from_main(_write, out, partial, source, extractor, moments, count, min(keep, count), seed)


def provenance(source, extractor, count, **more):
    """What a file was made of, as a dict."""
    told = {"format": reference_files.FORMAT, "source": source.name, "count": count}
    return told | {"extractor": identity_of(extractor), "fingerprint": source.fingerprint(count), **more}


def _begun(paths, source, extractor, count):
    """(images done, {key: Moments}) of the first of these files that is there, or None; ValueError if it is of other
    images or features, or of more images."""
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    known = reference_files.look_into(path)
    told = known.provenance
    remedy = "choose another OUT.npz, or delete that one"
    if "fingerprint" not in told:
        raise ValueError(f"{path} is there and was not made by this program: {remedy}")
    done = told["count"]
    if told["extractor"] != identity_of(extractor):
        raise ValueError(f"{path} is there and has the features of {told['extractor']}: {remedy}")
    if done > count:
        raise ValueError(f"{path} is there and has the statistics of {done} images, more than {count}: {remedy}")
    if told["fingerprint"] != source.fingerprint(done):
        raise ValueError(f"{path} is there and of other images than the first {done} of {source.name}: {remedy}")
    stored = reference_files.moments_of(path, known)
    return done, {key: Moments.of(done, *each) for key, each in stored.items()}


def _save_progress(path, moments, told):
    try:
        _savez(path, _arrays(moments, told))
    except OSError as error:
        sources.warn(f"{error}; the work goes on, but cannot be resumed beyond what was saved before")


def _write(out, partial, source, extractor, moments, count, keep, seed):
    arrays = _arrays(moments, provenance(source, extractor, count, keep=keep, seed=seed))
    if keep:
        rows = np.sort(np.random.RandomState(seed).choice(count, keep, replace=False))
        images, labels = source.take(rows)
        arrays |= {"arr_0": images} if labels is None else {"arr_0": images, "arr_1": labels}
    _savez(out, arrays)
    partial.unlink(missing_ok=True)


def _arrays(moments, told):
    arrays = {"provenance": np.array(json.dumps(told))}
    for mu, sigma in reference_files.MOMENTS.items():
        if mu in moments:
            arrays[mu], arrays[sigma] = moments[mu].statistics()
    return arrays


def _savez(path, arrays):
    with door.writing(str(path)) as file:
        np.savez(file, **arrays)


def _bar(count, done, show):
    from tqdm import tqdm

    return tqdm(desc="statistics", total=count, initial=done, unit="img", disable=not show)


if __name__ == "__main__":
    sys.exit(main())
