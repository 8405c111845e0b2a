"""Says what a file of images or statistics holds, and for which scores it is fit.

    python evaluations/inspect_file.py FILE...

FILE is an npz, a folder or a zip. Nothing is computed by a network and nothing is unpickled.
"""

import argparse

from evaluations import door


def parse(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", metavar="FILE", nargs="+", help="npz, folder or zip")
    return parser.parse_args(argv)


door.help_first(__name__, parse)  # before what takes seconds to import

import sys
from pathlib import Path

import numpy as np

from evaluations import inception, reference_files, sources

WIDTHS = {"mu": 2048, "mu_s": inception.SPATIAL_CHANNELS * 17**2}


def main(argv=None):
    """The program. Returns its exit code."""
    args = parse(argv)

    def show():
        for file in args.files:
            print("\n".join(described(file)))

    return door.exit_code(show)


def described(path):
    """Lines about a file. ValueError, FileNotFoundError for one that holds nothing to score."""
    source = sources.open_source(Path(path))
    source.check()
    yield f"{path}: {_kind(source)}"
    if not isinstance(source, sources.FilesSource):
        known = reference_files.look_into(path)
        for name, header in known.arrays.items():
            yield f"  {name:12} {header.dtype!s:8} {list(header.shape)}"
        for name, value in known.provenance.items():
            yield f"  made of: {name} {value}"
    if source.count:
        block = next(source.blocks())
        height, width, channels = block.images.shape[1:]
        yield (
            f"  {source.count} images, {height}x{width}, {'grey' if channels == 1 else 'RGB'}, values "
            f"{block.images.min()}..{block.images.max()} in the first {len(block.images)}"
        )
        if source.lossy:
            yield "  JPEG or another lossy format: compare only with images of the same compression"
        if len(np.unique(sources.digests(block.images), axis=0)) < len(block.images):
            yield "  exact copies among the first images"
    if source.labels is not None:
        yield f"  labels {source.labels.min()}..{source.labels.max()}, {len(np.unique(source.labels))} different"
    for key, (mean, covariance) in source.moments.items():
        foreign = "" if len(mean) == WIDTHS[key] else f"; Inception's has {WIDTHS[key]}"
        yield f"  {key}: {len(mean)} dimensions, trace of the covariance {np.trace(covariance):.4g}{foreign}"
    yield from _fitness(source)


def _kind(source):
    if isinstance(source, sources.LoaderSource):
        return "images as training reads them"
    if isinstance(source, sources.FilesSource):
        return "a folder of pictures" if source.archive is None else "a zip of pictures"
    if source.provenance:
        return "a reference file of this project"
    if source.count == 0:
        return "statistics alone, as of pytorch-fid, EDM or clean-fid"
    return "images with statistics, as OpenAI's references" if source.moments else "images"


def _fitness(source):
    """For which scores a file is fit, as reference and as samples."""
    count, fit = source.count, []
    fit.append("FID (stored statistics)" if source.moments else f"FID (statistics of its {count} images)")
    if "mu_s" in source.moments or (count and not source.moments):
        fit.append("sFID")
    if count > 5:
        fit.append("precision, recall, density, coverage")
    yield f"  fit as reference for: {', '.join(fit)}"
    if source.moments and "mu_s" not in source.moments:
        yield "  no mu_s, sigma_s: no sFID against it"
    if not count:
        yield "  no images: no precision and recall against it, and not to be scored itself"
        return
    yield f"  fit as samples for: inception score, FID, sFID{', precision, recall' if count > 3 else ''}" + (
        ", label agreement and per-class scores" if source.labels is not None else "; no labels, no per-class scores"
    )
    if count < 50000:
        yield f"  published FIDs are of 50000 samples: with {count} they are larger, by about 1/N"
    if count < 10000 and not source.moments:
        yield f"  published precision and recall are against 10000 reference images, not {count}"


if __name__ == "__main__":
    sys.exit(main())
