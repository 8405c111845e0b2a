"""Times precision and recall of the published protocol: 10,000 reference rows against 50,000 samples, 2048 dimensions.

    python benchmarks/neighbours.py [--distances float32|float64|float16] [--samples 50000]

Features are made up: rectified, correlated, squared norms of some hundreds, as Inception's. Writes
results/neighbours.json with wall and CPU time, the peak of memory of the whole process, and the scores.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch
from frechet import machine

from evaluations import neighbours

OUT = Path(__file__).parent / "results" / "neighbours.json"
DIMENSIONS, REFERENCE = 2048, 10000


def made_up(seed, rows, shift):
    """float32 [rows,2048], filled by blocks so that making them takes no more memory than having them."""
    random, factors = np.random.default_rng(seed), np.random.default_rng(0)
    mixing = factors.standard_normal((200, DIMENSIONS), np.float32) * (0.06 * np.exp(-np.arange(200) / 60))[:, None]
    x = np.empty((rows, DIMENSIONS), np.float32)
    for start in range(0, rows, 1000):
        block = random.standard_normal((min(1000, rows - start), 200), np.float32)
        noise = random.standard_normal((len(block), DIMENSIONS), np.float32)
        x[start : start + 1000] = np.maximum(0.35 + shift + block @ mixing.astype(np.float32) + 0.25 * noise, 0)
    return x


def main():
    """Prints the numbers and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--distances", nargs="+", default=["float32"], choices=neighbours.DISTANCES)
    parser.add_argument("--samples", type=int, default=50000)
    args = parser.parse_args()
    reference, sample = made_up(1, REFERENCE, 0.0), made_up(2, args.samples, 0.01)
    rows = []
    for distances in args.distances:
        wall, cpu = time.perf_counter(), time.process_time()
        scores = neighbours.neighbourhood_scores(reference, sample, distances=distances)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{distances}: wall {wall:.1f} s, CPU {cpu:.1f} s, peak {peak:.2f} GiB, {scores}", flush=True)
        rows.append({"distances": distances, "wall_s": wall, "cpu_s": cpu, "peak_gib": peak, **scores})
    norms = float(np.square(sample[:1000]).sum(1).mean())
    result = {
        "machine": machine() | {"torch": torch.__version__, "torch_threads": torch.get_num_threads()},
        "reference": REFERENCE, "samples": args.samples, "dimensions": DIMENSIONS, "mean_squared_norm": norms,
        "runs": rows,
    }  # fmt: skip
    if os.environ.get("OMP_NUM_THREADS") is None:
        result["machine"]["threads"] = "all"
    OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
