"""How time and memory grow: with images, steps, batch, resolution, classes; a figure, and exponents of log-log lines.

    python benchmarks/growth.py

CPU seconds, least of --repeats rounds in turns: other programs only ever add. `exponent` is the slope between the last
two points: 1 is linear, 0 is no growth; attention over all pixels of an image would have 2 against their number. Memory
is the peak of image_sample.py in processes of its own (benchmarks/sampling_memory.py). Writes results/growth.json and
growth.png.
"""

import argparse
import math
import tempfile
from pathlib import Path

import pairs
import sampling_memory
import timing
import torch as th

from guided_diffusion import generate, pictures

RESULTS = Path(__file__).parent / "results"
COUNTS = {"images": [50, 100, 200, 400, 800], "steps": [5, 10, 20, 40, 80], "batch": [1, 4, 16, 64, 256],
          "pixels": [8, 16, 32, 64], "classes": [10, 100, 1000, 10000], "memory": [500, 1000, 2000, 4000]}  # fmt: skip
SMALL = {"images": [4, 8], "steps": [1, 2], "batch": [1, 2], "pixels": [8, 16], "classes": [2, 4], "memory": []}
LABELS = {"images": ("images drawn, in 5 steps", "CPU s"), "steps": ("steps, of 50 images", "CPU s"),
          "batch": ("images at a time", "CPU s an evaluation"), "pixels": ("side of 2 images", "CPU s an evaluation"),
          "classes": ("classes", "CPU s an evaluation of 16"), "memory": ("images drawn", "peak MiB")}  # fmt: skip

FLAT = ("classes", "memory")  # drawn from zero


def walk(images, steps, batch=50):
    """A work that draws images in so many steps with the demo's network."""
    net, process, _ = pairs.demo_networks()

    def work():
        stream = generate.sample_stream(
            process, lambda x, t, y=None: net(x, t), shape=(1, 8, 8), num_samples=images, batch_size=min(batch, images),
            sampler="ddim", steps=steps,
        )  # fmt: skip
        for _ in stream:
            pass

    return work


def evaluation(flags, count):
    """A work that evaluates a network of these flags."""
    net, _ = pairs.diffusion_of(flags)
    batch = [each for each in pairs.batch_of(flags, count) if each is not None]

    def work():
        with th.inference_mode():
            net(*batch)

    return work


def works(counts):
    """{panel: {line: {number: work}}}."""
    demo, heavy = pairs.NETWORKS["demo"][0], pairs.NETWORKS["attention-heavy"][0]
    sized = {f"attention at 1/{factor}": {
        side: evaluation(heavy | {"image_size": side, "attention_resolutions": str(side // factor)}, 2)
        for side in counts["pixels"]} for factor in (1, 4)}  # fmt: skip
    return {
        "images": {"": {n: walk(n, 5) for n in counts["images"]}},
        "steps": {"": {n: walk(50, n) for n in counts["steps"]}},
        "batch": {"": {n: evaluation(demo, n) for n in counts["batch"]}},
        "pixels": sized,
        "classes": {"": {n: evaluation(demo | {"class_cond": True, "num_classes": n}, 16) for n in counts["classes"]}},
    }


def measured(counts, repeats):
    """Rows of results: {"what", "line", "numbers", "values", "exponent"}."""
    rows = []
    for what, lines in works(counts).items():
        for line, each in lines.items():
            rounds = timing.interleaved(each, repeats)
            best = {number: min(cpu for _, cpu in rounds[number]) for number in each}
            rows.append(grown(what, line, best))
    if counts["memory"]:
        with tempfile.TemporaryDirectory() as folder:
            model = sampling_memory.trained(Path(folder))
            peaks = {n: sampling_memory.peak_mib(model, n, 100, Path(folder) / str(n)) for n in counts["memory"]}
        rows.append(grown("memory", "", peaks))
    return rows


def grown(what, line, values):
    (a, b), (u, v) = list(values)[-2:], list(values.values())[-2:]
    a, b = (a**2, b**2) if what == "pixels" else (a, b)
    row = {"what": what, "line": line, "numbers": list(values), "values": list(values.values()),
           "exponent": math.log(v / u) / math.log(b / a)}  # fmt: skip
    print(f"{what:8} {line:18} exponent {row['exponent']:.2f}  " + "  ".join(
        f"{number}: {value:.4g}" for number, value in values.items()), flush=True)  # fmt: skip
    return row


def figure(rows, path):
    """A panel for each of what grows, both axes logarithmic but those of what does not."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["what"] for row in rows))
    fig = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    panels = fig.subplots(2, 3, squeeze=False).ravel()
    for panel, name in zip(panels, names):
        for colour, row in zip(pictures.LINE_COLOURS, [row for row in rows if row["what"] == name]):
            label = f"{row['line']} exponent {row['exponent']:.2f}".strip()
            panel.plot(row["numbers"], row["values"], marker="o", ms=4, lw=1.6, color=colour, label=label)
        ticks = next(row["numbers"] for row in rows if row["what"] == name)
        panel.set(xlabel=LABELS[name][0], ylabel=LABELS[name][1], xscale="log")
        panel.set_xticks(ticks, [str(number) for number in ticks])
        panel.minorticks_off()
        if name in FLAT:
            panel.set_ylim(0, 1.4 * max(max(row["values"]) for row in rows if row["what"] == name))
        else:
            panel.set_yscale("log")
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each point (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="two small points each, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    args = parser.parse_args(argv)
    th.set_num_threads(args.threads)
    rows = measured(SMALL if args.tiny else COUNTS, args.repeats)
    timing.record(args.out / "growth.json", {"growth": rows}, "cpu")
    figure(rows, args.out / "growth.png")


if __name__ == "__main__":
    main()
