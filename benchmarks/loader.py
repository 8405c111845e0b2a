"""Times the loader: 64x64 images from a folder of 500x375 JPEG files, from a packed zip and from a packed npy.

    python benchmarks/loader.py

The JPEG files (quality 90) are cuts of the two photographs that scikit-learn ships. The three take turns, so that a
busy machine slows all alike; images per second of one process, medians of the rounds. Writes results/loader.json.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from guided_diffusion.image_datasets import load_data

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "loader.json"
WIDTH, HEIGHT, SIDE, BATCH = 500, 375, 64, 50
IMAGES, ROUNDS = 400, 7
BATCHES = {"jpeg folder": 2, "packed zip": 16, "packed npy": 32}  # a round of each takes about as long


def write_photographs(folder, count, seed=0):
    """`count` JPEG files 500x375, cuts of real photographs, in two classes."""
    from sklearn.datasets import load_sample_images

    rng, photographs = np.random.default_rng(seed), load_sample_images().images
    for number in range(count):
        photograph = photographs[number % 2]
        top = rng.integers(photograph.shape[0] - HEIGHT + 1)
        left = rng.integers(photograph.shape[1] - WIDTH + 1)
        cut = photograph[top : top + HEIGHT, left : left + WIDTH][:, :: rng.choice((-1, 1))]
        Image.fromarray(np.ascontiguousarray(cut)).save(folder / f"{number % 2}_{number:05d}.jpg", quality=90)


def packing():
    """The function `pack` of datasets/pack.py."""
    spec = importlib.util.spec_from_file_location("packing", ROOT / "datasets" / "pack.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pack


def measure(sources, rounds=ROUNDS, batch=BATCH):
    """{name: images per second in each round} of {name: path}; the sources take turns."""
    how = {"batch_size": batch, "image_size": SIDE, "class_cond": True, "num_workers": 0}
    streams = {name: load_data(data_dir=str(path), **how) for name, path in sources.items()}
    found = {name: [] for name in sources}
    for stream in streams.values():
        next(stream)
    for _ in range(rounds):
        for name, stream in streams.items():
            start = time.perf_counter()
            for _ in range(BATCHES[name]):
                next(stream)
            found[name].append(BATCHES[name] * batch / (time.perf_counter() - start))
    return found


def machine():
    """What the numbers were measured on."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "numpy": np.__version__,
        "date": datetime.date.today().isoformat(),
    }


def run(images=IMAGES, rounds=ROUNDS, batch=BATCH):
    """The whole measurement, as it is written."""
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: Path(folder) / end for name, end in zip(BATCHES, ("jpg", "pack.zip", "pack.npy"))}
        sources["jpeg folder"].mkdir()
        write_photographs(sources["jpeg folder"], images)
        sizes = [path.stat().st_size for path in sources["jpeg folder"].iterdir()]
        for name in ("packed zip", "packed npy"):
            packing()(str(sources["jpeg folder"]), str(sources[name]), SIDE, progress=False)
        found = measure(sources, rounds, batch)
    base = found["jpeg folder"]
    rows = [
        {
            "source": name,
            "images_per_s": statistics.median(rates),
            "times_jpeg": statistics.median(rate / slow for rate, slow in zip(rates, base)),
            "rounds": rates,
        }
        for name, rates in found.items()
    ]
    return {"machine": machine(), "images": images, "jpeg_bytes": statistics.mean(sizes), "side": SIDE, "median": rows}


def main():
    """Prints the table and writes it."""
    argparse.ArgumentParser(description=__doc__.strip().splitlines()[0]).parse_args()
    result = run()
    for row in result["median"]:
        print(f"{row['source']:12}{row['images_per_s']:10.0f} images/s{row['times_jpeg']:8.1f} x")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
