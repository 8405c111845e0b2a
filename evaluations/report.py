"""A page about results of the evaluator: the five lines, tables with intervals, curves, grids, the samples that hurt.

    python evaluations/report.py SCORES.json [MORE.json ...] --out FOLDER

writes FOLDER/report.html, which needs no other file, and FOLDER/report.md with FOLDER/pictures.
"""

import argparse

from evaluations import door


def parse(argv=None):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        description="A page about results of the evaluator.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("scores", nargs="+", metavar="SCORES.json", help="what the evaluator wrote with --out")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the page, made if it is not there")
    parser.add_argument("--title", default="Scores", help="heading of the page")
    return parser.parse_args(argv)


door.help_first(__name__, parse)  # before what takes seconds to import

import math
import sys
from pathlib import Path

import numpy as np

from evaluations import evaluator, gallery, pages, sources, tables
from evaluations.compare import BETTER, parts_of, read

SHOWN = 64  # images in a grid
HARMFUL = 10
SETTINGS = ("sampler", "steps", "scale", "ema")  # of a run that a sweep made, which also tells its evaluations


def main(argv=None):
    """The program. Returns its exit code: 0, or 2 after one line on stderr about bad input."""
    return door.exit_code(lambda: run(parse(argv)))


def run(args):
    """Writes the page that the command line asks for."""
    write(args.out, page(args.scores, args.title))
    print(f"report: {Path(args.out) / 'report.html'}")


def write(folder, blocks):
    """Write a page as report.html and report.md, with its pictures, into a folder."""
    (Path(folder) / "pictures").mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, pages.Picture):
            gallery.write(Path(folder) / "pictures" / f"{block.name}.png", block.png)
    gallery.write(Path(folder) / "report.md", pages.to_markdown(blocks))
    gallery.write(Path(folder) / "report.html", pages.to_html(blocks))


def page(paths, title="Scores", pictures=True):
    """The blocks of a page about results, by the paths of their json files; of one result with all that it tells, of
    several an overview with curves first. Without `pictures` the images themselves are left alone."""
    results = [read(path) for path in paths]
    names = _names(paths, results)
    blocks = [pages.Heading(title, 1)]
    if len(results) > 1:
        blocks += overview(names, results)
    for number, (path, name, result) in enumerate(zip(paths, names, results)):
        blocks += [pages.Heading(name), *about(result)]
        if pictures:
            blocks += look(result, parts_of(path), f"{number:02d}")
    return blocks


def about(result):
    """The blocks about one result: the lines of the evaluator, the errors, the protocol, the classes."""
    blocks = [
        pages.Lines([f"{label} {result[key]}" for key, label in evaluator.LINES.items() if key in result]),
        tables.error_table(result),
        pages.Text(tables.remark(result)),
    ]
    if result.get("per_class"):
        blocks += [pages.Heading("Each class", 3), tables.class_table(result["per_class"])]
    if result.get("protocol"):
        flat = [(f"{key} {inner}" if inner else key, str(value)) for key, inner, value in _protocol(result["protocol"])]
        blocks += [pages.Heading("Protocol", 3), pages.Table(["", ""], flat)]
    return blocks


def look(result, parts, prefix):
    """Pictures of the samples, and of the ten that add most to FID, where the file of the samples is still there."""
    file, count = result["sample"]["file"], result["sample"]["images"]
    if not Path(file).exists():
        return [pages.Text(f"No pictures: {file} is not there any more.")]
    first, fid, worst = range(min(count, SHOWN)), (parts or {}).get("fid"), []
    if fid and len(fid.sample) == count:
        worst = most_harmful(fid, HARMFUL)
    images, labels = images_of(file, [*first, *worst])
    order = np.arange(len(first))
    if labels is not None:
        order = np.argsort(labels[: len(first)], kind="stable")
    blocks = [pages.Picture(f"{prefix}_samples", f"The first {len(order)} samples of {file}",
                            gallery.grid(images[order], 16))]  # fmt: skip
    if worst:
        captions = [f"{fid.sample[i]:+.2g}" for i in worst]
        text = f"The {len(worst)} samples that add most to FID: without one of them it would be so much lower"
        blocks.append(pages.Picture(f"{prefix}_harmful", text, gallery.grid(
            images[len(first) :], len(worst), column_labels=captions, tile=64)))  # fmt: skip
        blocks.append(pages.Table(["sample", "adds to FID"], [[str(i), f"{fid.sample[i]:+.3g}"] for i in worst]))
    return blocks


def images_of(file, rows):
    """(images uint8 [n,H,W,C] of those rows of a file, folder or zip, their labels [n] or None)."""
    source, found = sources.open_source(file), {}
    wanted = set(rows)
    for block in source.blocks():
        found |= {i: image for i, image in zip(block.indices.tolist(), block.images) if i in wanted}
    labels = None if source.labels is None else np.asarray(source.labels)[list(rows)]
    return np.stack([found[i] for i in rows]), labels


def most_harmful(estimate, count=HARMFUL):
    """The rows of the samples with the largest parts in an Estimate, largest first."""
    return np.argsort(-estimate.sample, kind="stable")[:count].tolist()


def overview(names, results):
    """The blocks about several results: one table, and the curves that their settings allow."""
    there = [name for name in tables.NAMES if any(name in result for result in results)]
    rows = [[name, *(tables.score(result, each) for each in there)] for name, result in zip(names, results)]
    blocks = [pages.Heading("Overview"), pages.Table(["", *(tables.NAMES[name] for name in there)], rows)]
    ran = [result for result in results if "settings" in result]
    for name, caption, lines, axes in curves(ran):
        blocks.append(pages.Picture(name, caption, gallery.curves(lines, *axes, caption)))
    return blocks


def curves(results):
    """(name, caption, {line: (xs, ys, errors...)}, (label of x, label of y)) of each curve that has two points or more.

    FID against guidance scale, precision against recall (along the scale), FID against network evaluations.
    """
    found = []
    for name, caption, x, y, along in (
        ("fid_scale", "FID against guidance scale", "scale", "fid", "scale"),
        ("precision_recall", "Precision against recall", "recall", "precision", "scale"),
        ("fid_evaluations", "FID against network evaluations", "evaluations", "fid", "evaluations"),
    ):  # fmt: skip
        keys = [key for key in SETTINGS if key != along and not (along == "evaluations" and key == "steps")]
        lines = {}
        for result in sorted(results, key=lambda each: each["settings"].get(along) or 0):
            settings = result["settings"]
            line = ", ".join(_setting(key, settings[key]) for key in keys if len(_values(results, key)) > 1)
            lines.setdefault(line or "all", []).append(
                (_at(result, x), _at(result, y), tables.errors(result, x)[0], tables.errors(result, y)[0])
            )
        columns = {line: _columns(points, x) for line, points in lines.items() if len(points) > 1}
        if columns and len(_values(results, along)) > 1:
            found.append((name, caption, columns, (_axis(x), _axis(y))))
    return found


def _columns(points, x):
    """xs, ys and the bars of points, of those that are known."""
    xs, ys, across, along = (list(column) for column in zip(*points))
    across, along = ([0 if math.isnan(each) else each for each in bars] for bars in (across, along))
    return (xs, ys, across, along) if x in BETTER else (xs, ys, along)


def _at(result, key):
    return result[key] if key in BETTER else result["settings"][key]


def _axis(key):
    return {"scale": "guidance scale", "evaluations": "network evaluations of one image"}.get(key) or tables.NAMES[key]


def _values(results, key):
    return {str(result["settings"].get(key)) for result in results}


def _setting(key, value):
    if isinstance(value, float):
        value = f"{value:g}"
    return f"{value}" if key == "sampler" else f"{value} steps" if key == "steps" else f"{key} {value}"


def _names(paths, results):
    """A short name for each result: its settings, else the file's."""
    if all("settings" in result for result in results):
        shown = [", ".join(_setting(key, result["settings"][key]) for key in SETTINGS) for result in results]
        if len(set(shown)) == len(shown):
            return shown
    return tables.names(paths)


def _protocol(protocol):
    """(key, inner key or None, value), in order."""
    for key, value in protocol.items():
        if isinstance(value, dict):
            yield from ((key, inner, each) for inner, each in value.items())
        else:
            yield key, None, value


if __name__ == "__main__":
    sys.exit(main())
