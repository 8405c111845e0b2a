"""The difference of two results of the evaluator, with its interval, if they were made by the same protocol.

    python evaluations/compare.py A.json B.json [--anyway] [--out difference.json]

Beside NAME.json the evaluator writes NAME.parts.npz, what each image has in each score. With both the two runs are
compared image by image: what equal seeds and the common reference have in common cancels, so that far smaller
differences show than two separate intervals would tell apart.
"""

import argparse

from evaluations import door


def parse(argv=None):
    """The command line: a namespace of first, second, anyway, out."""
    parser = argparse.ArgumentParser(
        description="The difference of two results of the evaluator, with its 95 % interval.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("first", metavar="A.json", help="what the evaluator wrote with --out")
    parser.add_argument("second", metavar="B.json", help="another one, against the same reference")
    parser.add_argument("--anyway", action="store_true", help="compare results of unlike protocols too, and say so")
    parser.add_argument("--out", help="json file to write the differences to")
    return parser.parse_args(argv)


door.help_first(__name__, parse)  # before what takes seconds to import

import json
import math
import sys
from pathlib import Path

from evaluations import errors, gallery, intervals, tables

BETTER = {"inception_score": 1, "fid": -1, "sfid": -1, "kid": -1, "precision": 1, "recall": 1, "density": 1,
          "coverage": 1, "label_agreement": 1}  # fmt: skip
TOLD = "versions"  # the part of a protocol that may differ, and is told of


def main(argv=None):
    """The program. Returns its exit code: 0, or 2 after one line on stderr about bad input or unlike protocols."""
    return door.exit_code(lambda: run(parse(argv)))


def run(args):
    """Compares as the command line says; prints a table."""
    results = [read(path) for path in (args.first, args.second)]
    told = compare(*results, *map(parts_of, (args.first, args.second)), anyway=args.anyway)
    for line in lines(told, *tables.names([args.first, args.second])):
        print(line)
    if args.out:
        gallery.write(args.out, errors.to_json(told) + "\n")


def read(path):
    """A result that the evaluator wrote, as a dict. FileNotFoundError; ValueError for anything else."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a json file that the evaluator wrote by --out")
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not json ({error}): expected what the evaluator wrote by --out") from error
    if not isinstance(result, dict) or not BETTER.keys() & result.keys():
        raise ValueError(f"{path} holds no scores: expected what the evaluator wrote by --out")
    return result


def parts_of(path):
    """{score: Estimate} beside a result, or None if there is none."""
    return errors.load(errors.parts_path(path)) if errors.parts_path(path).is_file() else None


def compare(first, second, first_parts=None, second_parts=None, anyway=False):
    """The differences of two results (dicts), score by score, as a dict: unlike, told, scores.

    Each of scores: first, second, difference (bias taken off), standard_error, interval, paired, better ("first",
    "second" or None if the interval holds 0). Parts are {score: Estimate}; without both, the runs count as independent.

    :raises ValueError: for unlike protocols unless `anyway`, naming what differs.
    """
    unlike, told = differences(first, second)
    if unlike and not anyway:
        raise ValueError(f"unlike protocols: {'; '.join(unlike)}; --anyway compares them all the same")
    scores, counts = {}, [each.get("sample", {}).get("images") for each in (first, second)]
    for name in BETTER:
        if name not in first or name not in second:
            continue
        if first_parts and second_parts and name in first_parts and name in second_parts:
            found = intervals.difference(first_parts[name], second_parts[name])
        else:
            found = _apart(name, first, second)
        low, high = found.interval
        sign = 0 if not low > 0 and not high < 0 else BETTER[name] * math.copysign(1, low)
        scores[name] = {
            "first": first[name], "second": second[name], "difference": found.value,
            "standard_error": _or_none(found.standard_error), "interval": [_or_none(low), _or_none(high)],
            "paired": found.paired and counts[0] == counts[1], "better": {1: "first", -1: "second"}.get(sign),
        }  # fmt: skip
    return {"unlike": unlike, "told": told, "scores": scores}


def differences(first, second):
    """(what makes two results unlike, what else differs in how they were made), lists of texts."""
    one, other = (_flat({"extractor": each.get("extractor"), **each.get("protocol", {})}) for each in (first, second))
    unlike, told = [], []
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            text = f"{key} {one.get(key, 'unknown')} and {other.get(key, 'unknown')}"
            (told if key.startswith(TOLD) else unlike).append(text)
    return unlike, told


def lines(told, first="first", second="second"):
    """The lines of a comparison's table."""
    if told["unlike"]:
        yield f"warning: unlike protocols: {'; '.join(told['unlike'])}"
    if told["told"]:
        yield f"made with other {'; '.join(told['told'])}"
    rows = [("", first, second, "difference", "95 % interval", "better")]
    for name, each in told["scores"].items():
        error = each["standard_error"]
        low, high = (math.nan if end is None else end for end in each["interval"])
        rows.append((
            name + ("" if each["paired"] else " *"), *(intervals.shown(each[key]) for key in ("first", "second")),
            intervals.shown(each["difference"], error), intervals.shown_interval(low, high, error or 0),
            {"first": first, "second": second}.get(each["better"], "-" if error is None else "not told apart"),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    if not all(each["paired"] for each in told["scores"].values()):
        yield "* not image by image: the parts of the images (NAME.parts.npz) are not known, or not of as many images"


def _apart(name, first, second):
    """The Difference of two results without parts: their standard errors as if all were independent."""
    sides = []
    for each in (first, second):
        error = (each.get("standard_errors") or {}).get(name)
        sides.append((each[name] - (each.get("bias") or {}).get(name, 0.0), math.nan if error is None else error))
    value, error = sides[0][0] - sides[1][0], math.hypot(sides[0][1], sides[1][1])
    return intervals.Difference(value, error, (value - intervals.Z * error, value + intervals.Z * error), False)


def _flat(nested, prefix=""):
    """A dict of dicts as one, keys joined by dots."""
    flat = {}
    for key, value in nested.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _or_none(number):
    return number if math.isfinite(number) else None


if __name__ == "__main__":
    sys.exit(main())
