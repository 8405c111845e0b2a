"""What programs of this folder have recorded, each in a line of numbers: for the table of benchmarks/speed.py."""

import json
from pathlib import Path

import timing


def rows(folder):
    """Rows of results from the json files of a folder that are there."""
    for name, reader in RECORDED.items():
        path = folder / f"{name}.json"
        if path.exists():
            for what, row in reader(json.loads(path.read_text(encoding="utf-8"))):
                yield {"what": f"{what} (benchmarks/{name}.py)"} | row


def _frechet(content):
    for rows in (20000, 1000):
        root, *others = [each for each in content["median"] if each["rows"] == rows]
        for each in others:
            times, error = root["cpu_s"] / each["cpu_s"], abs(each["distance"] / root["distance"] - 1)
            yield f"{each['method']}, {rows} rows", {"times_sqrtm": times, "error": error}


def _neighbours(content):
    for run in content["runs"]:
        yield (f"precision and recall of {content['reference']} against {content['samples']} images",
               {"cpu_s": run["cpu_s"], "peak_gib": run["peak_gib"]})  # fmt: skip


def _loader(content):
    for each in content["median"][1:]:
        yield f"loader: {each['source']} against JPEG files", {"times_as_many_images": each["times_jpeg"]}


def _sampling_memory(content):
    for each in content["rows"]:
        yield f"drawing {each['samples']} images of 64x64", {"peak_mib": each["peak_mib"]}


RECORDED = {"frechet": _frechet, "neighbours": _neighbours, "loader": _loader, "sampling_memory": _sampling_memory}


# ---------------------------------------------------------------------------------------------- lines of docs/speed.md


def lines(content):
    """{section: lines of a table in markdown} of results/speed.json, as docs/speed.md has them."""
    made = {name: [_line(row) for row in content[name]["rows"]]
            for name in ("evaluation", "training", "guided", "updates", "saving", "others")}  # fmt: skip
    made["memory"] = [
        f"| {row['what']} | {row['plain_peak_mib']:.0f} | {row['ours_peak_mib']:.0f} | {row['nothing_peak_mib']:.0f} | "
        f"{row['of_plain']:.2f} |" for row in content["memory"]["rows"]
    ]  # fmt: skip
    for name in ("quality", "shortcuts"):
        made[name] = [
            f"| {row['what']} | {row['cpu_ms_per_image']:.1f} | {row['times_as_fast']['an image']['median']:.1f} | "
            f"{row['frechet']:.3f} | {row['difference_low']:.3f} .. {row['difference_high']:.3f} |"
            for row in content[name]["rows"]
        ]  # fmt: skip
    return made


def _line(row):
    """| what | seconds of the first | of the others | times as fast, with quartiles | error |"""
    first, *others = [timing.seconds(times[f"{row['clock']}_s"]["median"]) for times in row["sides"].values()]
    ratios = [f"{ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})"
              for ratio in row["times_as_fast"].values()]  # fmt: skip
    error = f"{row['error']:.0e}" if row.get("error") is not None else ""
    return f"| {row['what']} | {first} | {', '.join(others)} | {', '.join(ratios)} | {error} |"


if __name__ == "__main__":
    path = Path(__file__).parent / "results" / "speed.json"
    for section, table in lines(json.loads(path.read_text(encoding="utf-8"))).items():
        print(section, *table, "", sep="\n")
