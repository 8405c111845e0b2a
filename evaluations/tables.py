"""Tables and lines of results: each number to the digits that its error supports, with its interval."""

import math
from pathlib import Path

from evaluations import intervals, pages

NAMES = {
    "inception_score": "Inception score", "fid": "FID", "sfid": "sFID", "kid": "KID", "precision": "Precision",
    "recall": "Recall", "density": "Density", "coverage": "Coverage", "label_agreement": "Label agreement",
}  # fmt: skip


def names(paths):
    """A short name for each path, as far as it takes to tell them apart: its stem, that of its folder, or all of it."""
    for short in ([Path(path).stem for path in paths], [Path(path).parent.name for path in paths]):
        if len(set(short)) == len(short):
            return short
    return list(map(str, paths))


def error_table(result):
    """The table of scores with standard errors, where these come from, the bias, and the interval without it."""
    rows = []
    for name in NAMES:
        if name not in result:
            continue
        error, (low, high), bias = errors(result, name)
        source = (result.get("error_sources") or {}).get(name) or {}
        parts = [_plain(source.get(key), error) for key in ("sample", "reference")]
        bias = _plain(bias, error) if bias else "-"
        rows.append([NAMES[name], score(result, name), *parts, bias, intervals.shown_interval(low, high, error)])
    head = ["", "± standard error", "from samples", "from reference", "bias", "95 % interval, bias taken off"]
    return pages.Table(head, rows)


def error_lines(result):
    """What the program prints below the five lines: each score to the digits that its error supports."""
    table = error_table(result)
    columns = [[row[k] for row in (table.head, *table.rows)] for k in (0, 1, 5)]
    widths = [max(map(len, column)) for column in columns]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in zip(*columns)]


def remark(result):
    """How to read the table, with the limit by halves where it is known."""
    text = (
        "± is the standard error of the number as it stands. Finite sets make Frechet distances too large on average, "
        "by about the bias; the interval is for endless sets. Of scores without a bias here none is known."
    )
    fixed = [what for what, each in (result.get("fixed_classes") or {}).items() if each]
    if fixed:
        text += (f" The counts of classes in the {' and the '.join(fixed)} are more even than chance leaves them, so "
                 "they count as fixed: errors and bias are those within the classes.")  # fmt: skip
    limit = result.get("fid_infinity")
    if limit:
        text += (f" FID of endless sets by halves of these (seed {limit['seed']}): "
                 f"{intervals.shown(limit['value'], limit['standard_error'])}.")  # fmt: skip
    return text


def score(result, name):
    """A score with its standard error, as text; "-" where it is missing."""
    return intervals.shown(result.get(name), errors(result, name)[0])


def class_table(classes):
    """The table of `per_class` scores."""
    names = [name for name in NAMES if any(name in each for each in classes.values())]
    rows = [[str(c), str(each["images"]), *(
        intervals.shown(each[name]["value"], each[name]["standard_error"]) if name in each else "-" for name in names
    )] for c, each in classes.items()]  # fmt: skip
    return pages.Table(["class", "images", *(NAMES[name] for name in names)], rows)


def errors(result, name):
    """(standard error, (low, high), bias) of a score in a result; nan where they are not known."""
    error, ends = ((result.get(key) or {}).get(name) for key in ("standard_errors", "intervals"))
    low, high = (math.nan if end is None else end for end in ends or (None, None))
    return math.nan if error is None else error, (low, high), (result.get("bias") or {}).get(name, 0.0)


def _plain(value, error):
    """A number to as many decimals as an error supports, for a column of its own."""
    if value is None or not math.isfinite(error):
        return "-"
    places = intervals.decimals(error)
    return f"{value:.3g}" if places is None else f"{value:.{max(places, 0)}f}"
