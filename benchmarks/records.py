"""What programs of this folder have recorded, each in a line of numbers: for the table of benchmarks/speed.py."""

import json


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
