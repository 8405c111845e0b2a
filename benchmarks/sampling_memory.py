"""Peak memory of sampling against the number of samples: 500 and 5,000 of 64 x 64 x 3, by a tiny network in one step.

    python benchmarks/sampling_memory.py

Each count is drawn by image_sample.py in a process of its own, in turn, --repeats times; the peak is the largest
resident set that the system saw of it. Beside it stands what holding all samples in memory until the end would take, as
the original does (twice: the list and its concatenation). Writes results/sampling_memory.json.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch as th

ROOT = Path(__file__).parent.parent
NET = "--image_size 64 --network film --num_channels 4 --channel_mult 1 --noise_schedule cosine".split()
# VmHWM is of the program alone; ru_maxrss would begin with what the process held that started it.
PEAK = "import runpy, sys; path = sys.argv[1]; sys.argv = sys.argv[1:];\ntry:\n"
PEAK += " runpy.run_path(path, run_name='__main__')\nfinally:\n"
PEAK += " print('PEAK', *[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line])"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 5000], help="numbers of samples")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each")
    parser.add_argument("--batch_size", type=int, default=100, help="samples at once")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "sampling_memory.json"), help="file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = trained(Path(folder))
        peaks = {count: [] for count in args.counts}
        for repeat in range(args.repeats):
            for count in args.counts:
                peaks[count].append(peak_mib(model, count, args.batch_size, Path(folder) / f"{repeat}_{count}"))
    rows = [{"samples": count, "peak_mib": statistics.median(found), "all_peaks_mib": found,
             "samples_themselves_mib": count * 64 * 64 * 3 / 2**20} for count, found in peaks.items()]  # fmt: skip
    print("samples | peak, MiB (median) | the samples themselves, MiB")
    for row in rows:
        print(f"{row['samples']:7d} | {row['peak_mib']:18.1f} | {row['samples_themselves_mib']:.1f}")
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    result = {"date": str(datetime.date.today()), "torch": th.__version__, "numpy": np.__version__, **machine}
    result["rows"] = rows
    Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


def trained(folder):
    np.savez(folder / "data.npz", arr_0=np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8))
    words = ["--batch_size", 2, "--iterations", 1, "--num_workers", 0, "--log_dir", folder / "model"]
    run("image_train", ["--data_dir", folder / "data.npz", *NET, *words])
    return folder / "model" / "model000001.pt"


def peak_mib(model, count, batch_size, out):
    said = run("image_sample", ["--model_path", model, "--num_samples", count, "--batch_size", batch_size,
                                "--timestep_respacing", 1, "--log_dir", out])  # fmt: skip
    (line,) = [line for line in said.splitlines() if line.startswith("PEAK ")]
    return int(line.split()[1]) / 1024


def run(name, words):
    command = [sys.executable, "-c", PEAK, ROOT / "scripts" / f"{name}.py", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env=env).stdout


if __name__ == "__main__":
    main()
