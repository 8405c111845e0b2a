"""Times the Frechet distance of 2048 dimensions against the square root of a matrix (scipy.linalg.sqrtm).

    python benchmarks/frechet.py

Above full rank (20000 rows) and below it (1000 rows, where the distance from the features themselves is exact).
The methods take turns, so that a busy machine slows all alike; medians of 5. Writes results/frechet.json.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg

from evaluations import metrics

DIMENSIONS, REPEATS = 2048, 5
OUT = Path(__file__).parent / "results" / "frechet.json"


def rectified_features(seed, rows, shift):
    """float32 features [rows,2048], correlated and never negative, as those of Inception are."""
    random = np.random.RandomState(seed)
    mixing = np.random.RandomState(0).standard_normal((DIMENSIONS, DIMENSIONS)) / DIMENSIONS**0.5
    mixing *= np.linspace(0.1, 1, DIMENSIONS)[:, None]
    return np.maximum(random.standard_normal((rows, DIMENSIONS)) @ mixing + shift, 0).astype(np.float32)


def sqrtm_distance(mu1, sigma1, mu2, sigma2):
    """The form of the original: the root of the product itself, its real part where rounding makes it complex."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def interleaved(methods):
    """{name: (median wall s, median CPU s, value)} of functions without arguments, run in turns."""
    times = {name: [] for name in methods}
    values = {}
    for _ in range(REPEATS):
        for name, method in methods.items():
            wall, cpu = time.perf_counter(), time.process_time()
            values[name] = method()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: (*map(statistics.median, zip(*pairs)), values[name]) for name, pairs in times.items()}


def machine():
    """What the numbers were measured on."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main():
    """Prints the table and writes it."""
    argparse.ArgumentParser(description=__doc__.strip().splitlines()[0]).parse_args()
    rows = []
    print(f"{'rows':>6}  {'method':32}{'wall s':>9}{'CPU s':>9}  distance")
    for count in (20000, 1000):
        x1, x2 = rectified_features(1, count, 0.0), rectified_features(2, count, 0.05)
        moments = *metrics.moments(x1), *metrics.moments(x2)
        methods = {
            "scipy sqrtm of moments": lambda m=moments: sqrtm_distance(*m),
            "frechet_distance of moments": lambda m=moments: metrics.frechet_distance(*m),
        }
        if count <= DIMENSIONS:
            methods["frechet_distance_from_features"] = lambda a=x1, b=x2: metrics.frechet_distance_from_features(a, b)
        for name, (wall, cpu, value) in interleaved(methods).items():
            print(f"{count:6}  {name:32}{wall:9.2f}{cpu:9.2f}  {value:.10f}", flush=True)
            rows.append({"rows": count, "method": name, "wall_s": wall, "cpu_s": cpu, "distance": value})
    OUT.parent.mkdir(exist_ok=True)
    result = {"machine": machine(), "dimensions": DIMENSIONS, "repeats": REPEATS, "median": rows}
    OUT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
