"""What the errors of scores cost, in time and memory, beside what they cover, on synthetic features.

    python benchmarks/errors.py [--images 10000] [--reference 10000] [--width 2048] [--out benchmarks/results]
    python benchmarks/errors.py --coverage 200 [--images 2000] [--reference 2000] [--width 128]

Features are rectified and correlated, as a network's are. The first prints and records (errors.json) seconds and peak
memory of each error; the second how often the 95 % intervals of the Frechet distance hold the distance of a million
images (errors_coverage.json).
"""

import argparse
import datetime
import json
import os
import platform
import resource
import time
from pathlib import Path

import numpy as np
import torch as th

from evaluations import halves, influence, intervals, kernel, metrics


def world(width, seed=0):
    """A function (count, rng, shift) -> features [count,width]."""
    rng = np.random.RandomState(seed)
    mix = (rng.standard_normal((width, width)) / np.sqrt(width * np.arange(1, width + 1))).astype(np.float32)
    offset = (0.3 * rng.standard_normal(width)).astype(np.float32)

    def draw(count, rng, shift=0.0):
        z = rng.standard_normal((count, width), dtype=np.float32)
        return np.maximum(z @ mix + offset + np.float32(shift), 0)

    return draw


def measure(args):
    """{what: seconds} of each error for sets of the sizes asked for."""
    draw, rng = world(args.width), np.random.default_rng(0)
    sample, reference = draw(args.images, rng, 0.05), draw(args.reference, rng)
    probabilities = np.exp(4 * sample[:, :1008])
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    fixed, seconds = metrics.moments(reference), {}
    for name, work in {
        "frechet, stored moments": lambda: influence.frechet(None, sample, fixed),
        "frechet, two sets": lambda: influence.frechet(reference, sample),
        "kernel distance": lambda: kernel.kid(reference, sample),
        "precision and recall": lambda: halves.precision_recall(reference, sample),
        "inception score": lambda: influence.inception_score(probabilities),
        "fid_infinity, 2 splits": lambda: halves.fid_infinity(reference, sample),
    }.items():
        begun = time.perf_counter()
        work()
        seconds[name] = round(time.perf_counter() - begun, 2)
        print(f"{name}: {seconds[name]} s", flush=True)
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def coverage(args):
    """How often intervals of the Frechet distance hold the truth, and errors against the spread of replicates."""
    draw, rng, rows = world(args.width), np.random.default_rng(0), []
    moments = []
    for shift in (0.05, 0.0):
        sums = squares = 0.0
        for _ in range(50):
            x = draw(20000, rng, shift).astype(np.float64)
            sums, squares = sums + x.sum(axis=0), squares + x.T @ x
        mean = sums / 10**6
        moments.append((mean, squares / 10**6 - np.outer(mean, mean)))
    truth = metrics.frechet_distance(*moments[0], *moments[1])
    for _ in range(args.coverage):
        found = influence.frechet(draw(args.reference, rng), draw(args.images, rng, 0.05))
        low, high = intervals.interval(found)
        rows.append((found.value, found.bias, intervals.standard_error(found), low <= truth <= high))
    value, bias, error, held = np.array(rows, float).T
    return {
        "replicates": args.coverage, "truth": truth, "mean": value.mean(), "mean_without_bias": (value - bias).mean(),
        "spread": (value - bias).std(ddof=1), "standard_error": error.mean(), "coverage": held.mean(),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000, help="samples")
    parser.add_argument("--reference", type=int, default=10000, help="reference images")
    parser.add_argument("--width", type=int, default=2048, help="features of an image, 1008 or more but for --coverage")
    parser.add_argument("--coverage", type=int, default=0, help="replicates; 0: measure time and memory instead")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args()
    facts = coverage(args) if args.coverage else measure(args)
    facts |= {
        "images": args.images, "reference": args.reference, "width": args.width, "cpu": platform.machine(),
        "cores": os.cpu_count(), "threads": th.get_num_threads(), "load_average": os.getloadavg()[0],
        "numpy": np.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("errors_coverage.json" if args.coverage else "errors.json")
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
