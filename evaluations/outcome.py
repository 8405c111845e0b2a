"""
What a study of arms found: the differences to the base, paired by seed, as json, csv, and a page with curves and grids.

The json and csv hold only what equal runs repeat exactly; measured speeds stand on the page.
"""

import csv
import io
import json
import math

import numpy as np

from evaluations import claims, gallery, pages, paired, report, tables

GRID = 40  # images of each arm
HEAD = "arm metric seeds mean standard_error against difference difference_error low high apart".split()
DISTANCES = "fid", "sfid"
TRADES = {"precision": "recall", "density": "coverage", "label_agreement": "coverage"}  # what guidance buys, and pays


def write(out, study, arms, speeds=None, notes=()):
    """
    Write results.json, results.csv, report.html and report.md with pictures into the folder `out` (a Path).

    :param study: a dict with title; axis, what arms have a place on, or ""; and claims, as evaluations/claims.py has
        them.
    :param arms: the base first, each a dict: name; changes, a text; parameters, operations, evaluations, iterations;
        near, a text; against, names of the arms it is compared with; at, its place on the axis, or None, and line, the
        curve that it is a point of; and runs, {seed: {"failed": why, or "", "scores": result of the evaluator as a dict
        or None, "samples": npz or None, "log": {column: (images seen, values)}}}.
    :param speeds: {name: images a second in training}, measured. :param notes: lines that stand on the page.
    :return: the content of results.json.
    """
    found = results(arms)
    judged = claims.judged(study["claims"], {arm["name"]: arm["scores"] for arm in found})
    content = {"title": study["title"], "claims": judged, "arms": found}
    gallery.write(out / "results.json", json.dumps(content, indent=2) + "\n")
    gallery.write(out / "results.csv", to_csv(found))
    report.write(out, page(study, arms, found, judged, speeds or {}, notes))
    return content


def results(arms):
    """The arms without their runs' files, and with what these found, as a list of dicts of plain values."""
    every = {arm["name"]: scores_of(arm) for arm in arms}
    found = []
    for arm in arms:
        scores, compared = every[arm["name"]], {}
        for name, values in scores.items():
            others = {other: paired.difference(values, every[other].get(name, {})) for other in arm["against"]}
            differences = {other: paired.plain(each) for other, each in others.items() if each}
            compared[name] = {"mean": paired.plain(paired.mean(list(values.values()))), "differences": differences}
        failed = {seed: run["failed"] for seed, run in arm["runs"].items() if run["failed"]}
        told = {key: value for key, value in arm.items() if key != "runs"}
        curves = {seed: run["log"] for seed, run in arm["runs"].items() if run["log"]}
        found.append({**told, "failed": failed, "scores": scores, "compared": compared, "curves": curves})
    return found


def scores_of(arm):
    """{score: {seed: value}} of the runs of an arm that came to an end."""
    done = {seed: run["scores"] for seed, run in arm["runs"].items() if run["scores"]}
    scores = {name: {seed: each[name] for seed, each in done.items() if name in each} for name in tables.NAMES}
    return {name: values for name, values in scores.items() if values}


def to_csv(found):
    """The text of a table with a line for each arm, metric and arm that it is compared with."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(HEAD)
    for arm in found:
        for name, both in arm["compared"].items():
            mean = both["mean"]
            for other, difference in (both["differences"] or {"": {}}).items():
                row = [arm["name"], name, mean["seeds"], mean["value"], mean["standard_error"], other]
                row += [difference.get(key) for key in ("value", "standard_error", "low", "high", "apart")]
                lines.writerow(["" if cell is None else cell for cell in row])
    return text.getvalue()


def page(study, arms, found, judged, speeds, notes):
    """The blocks of the page."""
    there = [name for name in tables.NAMES if any(name in arm["compared"] for arm in found)]
    blocks = [pages.Heading(study["title"], 1), *map(pages.Text, notes), summary(found, speeds)]
    blocks.append(pages.Text(
        "Numbers are means over seeds ± their standard error; differences are taken seed by seed. The interval "
        "is Student's, of 95 %: where it holds 0, nothing is claimed. Of twenty intervals about arms without any "
        "effect one leaves 0 out by chance."
    ))  # fmt: skip
    blocks += [pages.Heading("Claims", 3), claims.table(judged)] if judged else []
    blocks += [block for name in there for block in (pages.Heading(tables.NAMES[name], 3), metric_table(name, found))]
    blocks += along(found, there, study["axis"]) if study["axis"] else []
    for arm in found:
        blocks += [pages.Text(f"{arm['name']}, seed {seed}: {why}") for seed, why in arm["failed"].items()]
    for column, label in (("loss", "training loss"), ("fid", "Frechet distance of the average")):
        lines = {arm["name"]: mean_curve(arm["curves"], column) for arm in found}
        lines = {name: line for name, line in lines.items() if line}
        if lines:
            png = gallery.curves(lines, "images seen", label, label, positive(lines))
            blocks.append(pages.Picture(column, f"{label} over training, mean over seeds", png))
    for number, arm in enumerate(arms):
        blocks += grid(number, arm)
    return blocks


def agreement(found, recorded):
    """
    How the results of a study agree with recorded ones: (how many means were compared, how many are equal to the last
    digit, texts that name those whose 95 % intervals do not meet).

    Two intervals of one truth miss each other far more rarely than either misses the truth; so one that is named is
    another result.

    :param found: arms as `results` gives them. :param recorded: the same, read from a results.json.
    """
    before, count, equal, apart = {arm["name"]: arm["compared"] for arm in recorded}, 0, 0, []
    for arm in found:
        for name, both in arm["compared"].items():
            if name not in before.get(arm["name"], {}):
                continue
            new, old = both["mean"], before[arm["name"]][name]["mean"]
            count += 1
            equal += new == old
            if None not in (new["low"], old["low"]) and (new["low"] > old["high"] or new["high"] < old["low"]):
                texts = [" in ".join(paired.texts(each)) for each in (new, old)]
                apart.append(f"{arm['name']}, {tables.NAMES[name]}: {texts[0]}, recorded {texts[1]}")
    return count, equal, apart


def along(found, names, axis):
    """Pictures of the scores along the axis of the study, and of what guidance buys against what it pays."""
    there = [(up, across) for up, across in TRADES.items() if {up, across} <= set(names)]
    return [drawn(found, name, "", axis) for name in names] + [
        drawn(found, up, across, tables.NAMES[across].lower()) for up, across in there
    ]


def drawn(found, up, across, xlabel):
    """The picture of a score of the arms against another, or, if `across` is "", against their places on the axis."""
    lines = {}
    for arm in sorted(found, key=lambda arm: arm["at"]):
        means = {key: each["mean"] for key, each in arm["compared"].items()}
        means[""] = {"value": arm["at"], "standard_error": 0}
        if up in means and across in means:
            x, y = means[across], means[up]
            point = x["value"], y["value"], x["standard_error"] or 0, y["standard_error"] or 0
            lines.setdefault(arm["line"], []).append(point)
    lines = {name: tuple(map(list, zip(*points))) for name, points in lines.items()}
    caption = f"{tables.NAMES[up]} against {xlabel}, mean over seeds"
    name = f"{up}_{across}" if across else f"along_{up}"
    logy = up in DISTANCES and positive(lines)
    return pages.Picture(name, caption, gallery.curves(lines, xlabel, tables.NAMES[up], caption, logy))


def positive(lines):
    """Whether all of {name: (xs, ys, ...)} lies above 0, so that losses and distances can be drawn by their factors."""
    return all(y > 0 for line in lines.values() for y in line[1])


def summary(found, speeds):
    """The table like the paper's: what each arm changes, what it costs, and its Frechet distance."""
    head = "arm|changes|parameters|GFLOP an image|updates|looks a sample|images/s|FID|against|difference|95 % interval"
    rows = []
    for arm in found:
        fid = arm["compared"].get("fid", {})
        other, difference = next(iter(fid.get("differences", {}).items()), ("-", None))
        speed = f"{speeds[arm['name']]:.3g}" if arm["name"] in speeds else "-"
        changes = f"{arm['changes']} ({arm['near']})" if arm["near"] else arm["changes"]
        rows.append([arm["name"], changes, f"{arm['parameters']:,}", f"{arm['operations'] / 1e9:.3g}",
                     f"{arm['iterations']:,}", str(arm["evaluations"]), speed,
                     paired.texts(fid.get("mean"))[0], other, *paired.texts(difference)])  # fmt: skip
        if not fid:
            rows[-1][7] = next((why.split(":")[0] for why in arm["failed"].values()), "-")
    return pages.Table(head.split("|"), rows)


def metric_table(name, found):
    """The table of one metric: a row for each arm, and for each that it is compared with."""
    rows = []
    for arm in found:
        both = arm["compared"].get(name, {})
        mean = both.get("mean", {})
        for other, each in (both.get("differences") or {"-": None}).items():
            apart = {True: "yes", False: "no"}.get(each and each["apart"], "")
            row = [arm["name"], str(mean.get("seeds", 0)), paired.texts(mean)[0], other, *paired.texts(each), apart]
            rows.append(row)
    head = ["arm", "seeds", "mean", "against", "difference", "95 % interval", "told apart"]
    return pages.Table(head, rows)


def mean_curve(curves, column):
    """(images seen, mean over seeds, standard errors or zeros) of {seed: {column: (xs, ys)}}, where all have values."""
    given = [dict(zip(*each[column])) for each in curves.values() if column in each]
    common = sorted(set.intersection(*map(set, given))) if given else []
    if not common:
        return None
    values = np.array([[each[x] for x in common] for each in given], float)          # [seeds,points]
    errors = values.std(0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.zeros(len(common))
    return common, values.mean(0).tolist(), errors.tolist()


def grid(number, arm):
    """A picture of an arm's first samples, of its first seed that has any."""
    for seed, run in arm["runs"].items():
        if run["samples"]:
            with np.load(run["samples"], allow_pickle=False) as npz:
                images = npz["arr_0"][:GRID]
            png = gallery.grid(images, 20)
            return [pages.Picture(f"arm_{number:02d}", f"{arm['name']}: first samples of seed {seed}", png)]
    return []
