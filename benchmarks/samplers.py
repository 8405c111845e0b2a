"""Samplers x steps x guidance, where the truth is known exactly and on the demo's digits.

    python benchmarks/samplers.py [--out benchmarks/results] [--quick]
    python benchmarks/samplers.py --demo runs/demo [--seeds 10]

The first: a ring of nine Gaussians in three classes, float64, a cosine process of 1000 steps without its last 20. Every
sampler takes the rows of its own spacing. Two errors, against evaluations of the network:

- `flow`, for deterministic samplers: the root mean square distance, over the same 2000 starts, from where the flow
  takes them: DPM-Solver++(3M) with all 980 rows. The first line of each scale is the gap between that and
  DPM-Solver-3 with all rows; below that gap (1e-4) a distance says little, least of all for 3M itself.
- `frechet`: the squared Frechet distance of mean and covariance, averaged over the classes asked for, from those same
  ends of the flow; at scale 1, where the guided density is the data's, from as many draws of the data, so that the
  two finite sets leave a floor of 0.001 .. 0.004 under every sampler (under the stochastic ones at every scale).

Scale 0 is the unconditional model. Scales are of exact classifier guidance. Writes samplers.csv, samplers.png and
samplers.json (machine, versions, date).

The second: the network and the classifier that `make demo` left in a folder. `frechet` is the Frechet distance, in the
features of the demo's judge, of 500 samples a seed from the training digits, as in the demo's report; its mean over the
seeds, with the standard error of that mean. The seed decides starts and noise, alike for every sampler, so differences
are taken seed by seed: those of a few cases to ancestral sampling with 250 steps go into samplers_digits.json with a
95 % interval of Student's t; the other cases have two seeds, and those that are compared half as many with guidance.
Writes samplers_digits.csv, .png and .json.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch as th

from evaluations import metrics
from evaluations.features import ClassifierExtractor, extract
from guided_diffusion import generate, sampling, toy
from guided_diffusion.guidance import classifier_gradient, classifier_guided
from guided_diffusion.prediction import ModelVarType
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.script_util import open_classifier, open_diffusion

STEPS = (5, 8, 10, 15, 20, 30, 50, 100, 250)
SCALES = (0.0, 1.0, 3.0)
COUNT = 2000
ADAPTIVE = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # rtol in place of steps
DIGITS_STEPS = (10, 20)
DIGITS_SCALES = (0.0, 3.0)
REFERENCE = ("ddpm", 250, "")  # what the others are compared with on the digits: sampler, steps, spacing (own)
COMPARED = [REFERENCE, *(("dpmpp_2m", 15, spacing) for spacing in ("", "trailing")),
            *((name, 15, "") for name in ("dpmpp_2m_sde", "unipc", "ddpm", "ddim"))]  # fmt: skip
MARKS = "osv^D<>ph*XPd8+x1234"


def full_process():
    return Process(get_named_beta_schedule("cosine", 1000)).spaced(range(980))


def guided(data, process, scale):
    """The predictor of a guidance scale, and how often it was asked."""
    exact, calls = data.predictor(process, ModelVarType.FIXED_SMALL), Counter()

    def unconditional(x, t, y=None):
        calls["evaluations"] += 1
        return exact(x, t)

    return classifier_guided(unconditional, data.classifier_gradient(process, scale)) if scale else unconditional, calls


def draw(data, name, steps, scale, start, y, **options):
    """(samples [N,2], evaluations, seconds) of one sampler."""
    full = full_process()
    rule, rows = sampling.plan(full, name, steps, **options)
    process = full.spaced(rows)
    predict, calls = guided(data, process, scale)
    th.manual_seed(1)
    begun = time.process_time()
    x = deque(sampling.sample(process, predict, rule, start, cond={"y": y}), maxlen=1).pop()[0]
    return x, calls["evaluations"], time.process_time() - begun


def frechet(x, reference):
    """Squared Frechet distance of two sets [N,2] by their means and covariances."""
    a, b = np.cov(x.T), np.cov(reference.T)
    values = np.linalg.eigvals(a @ b).real.clip(0)
    return float(((x.mean(0) - reference.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.sqrt(values).sum())


def by_class(x, reference, y, scale):
    classes = [y >= 0] if not scale else [y == k for k in range(3)]
    return float(np.mean([frechet(x[each].numpy(), reference[each].numpy()) for each in classes]))


def measure(quick):
    """The rows of the csv: dicts."""
    data, count = toy.ring(), 200 if quick else COUNT
    start = th.randn(count, 2, dtype=th.float64, generator=th.Generator().manual_seed(0))
    y = th.arange(count) % 3
    result = []
    for scale in (1.0,) if quick else SCALES:
        flow = draw(data, "dpmpp_3m", None, scale, start, y)[0]
        other = draw(data, "dpm_3", None, scale, start, y)[0]
        gap = float((flow - other).square().sum(1).mean().sqrt())
        print(f"scale {scale:g}: reference, gap of two solvers with all rows {gap:.2e}", flush=True)
        result.append(row("reference gap", 980, scale, 980, gap, by_class(other, flow, y, scale), 0.0))
        target = flow
        if scale == 1:
            points, labels = data.draw(4 * count, th.Generator().manual_seed(7))
            target = th.stack([points[labels == k][: count // 3 + 1] for k in range(3)], 1).flatten(0, 1)[:count]
        for name, sampler in sampling.SAMPLERS.items():
            for setting in settings(name, quick):
                x, evaluations, seconds = draw(data, name, scale=scale, start=start, y=y, **setting)
                error = None if sampler.stochastic else float((x - flow).square().sum(1).mean().sqrt())
                label = setting["steps"] or f"rtol {setting['rtol']:g}"
                result.append(row(name, label, scale, evaluations, error, by_class(x, target, y, scale), seconds))
    return result


def settings(name, quick):
    if name == "adaptive":
        return [{"steps": None, "rtol": rtol, "atol": rtol / 10} for rtol in (ADAPTIVE[:1] if quick else ADAPTIVE)]
    return [{"steps": steps} for steps in (STEPS[:2] if quick else STEPS)]


def row(name, steps, scale, evaluations, error, distance, seconds):
    shown = "" if error is None else f"{error:.4g}"
    print(f"{name:16}{steps!s:>12}{scale:6g}{evaluations:6d}{shown:>11}{distance:12.4g}{seconds:8.2f} s", flush=True)
    return {"sampler": name, "steps": steps, "scale": scale, "evaluations": evaluations, "flow": shown,
            "frechet": f"{distance:.4g}", "cpu_s": f"{seconds:.2f}"}  # fmt: skip


# ------------------------------------------------------------------------------------------------- the demo's digits


class Digits:
    """The networks and the training digits of a demo's folder, and the score of a sampler on them."""

    def __init__(self, folder, count):
        self.count = count
        self.judge = ClassifierExtractor(str(newest(folder / "judge", "model*.pt")))
        self.model, self.diffusion, flags = open_diffusion(str(newest(folder / "model", "ema_*.pt")))
        self.classifier, _ = open_classifier(str(newest(folder / "classifier", "model*.pt")))
        self.shape = (flags["image_channels"], flags["image_size"], flags["image_size"])
        self.reference = self.features(np.load(folder / "reference.npz", allow_pickle=False)["arr_0"])

    def features(self, images):
        return extract(self.judge, images).pool

    def score(self, name, steps, spacing, scale, seed):
        """(Frechet distance, evaluations, seconds) of one sampler and seed."""
        calls, begun = Counter(), time.process_time()

        def network(x, t, y=None):
            calls["evaluations"] += 1
            return self.model(x, t)

        stream = generate.sample_stream(
            self.diffusion, network, shape=self.shape, num_samples=self.count, batch_size=self.count, seed=seed,
            labels=[i % 10 for i in range(self.count)], sampler=name, steps=steps,
            spacing=spacing, cond_fn=classifier_gradient(self.classifier, scale) if scale else None,
        )  # fmt: skip
        images, _ = generate.collect(stream)
        seconds = time.process_time() - begun
        distance = metrics.frechet_distance_from_features(self.reference, self.features(images))
        return distance, calls["evaluations"], seconds


def newest(folder, pattern):
    found = sorted(folder.glob(pattern))
    if not found:
        raise SystemExit(f"no {pattern} in {folder}: give --demo the folder that make demo wrote")
    return found[-1]


def measure_digits(folder, seeds, quick):
    """(rows of the csv, {case: [distance of each seed]} of those that are compared)."""
    digits, result, distances = Digits(folder, 40 if quick else 500), [], {}
    grid = [(name, steps, "") for name in sampling.SAMPLERS if name != "adaptive" for steps in DIGITS_STEPS]
    cases = [("ddpm", 6, ""), ("dpmpp_2m", 5, "")] if quick else [*COMPARED, *grid]
    for scale in DIGITS_SCALES:
        for name, steps, spacing in cases:
            compare = quick or (name, steps, spacing) in COMPARED
            drawn = range(max(2, (seeds if compare else 2) // (2 if scale else 1)))
            scores = np.array([digits.score(name, steps, spacing, scale, seed) for seed in drawn])    # [seeds,3]
            if compare:
                distances[f"{name} {steps} {spacing} scale {scale:g}".replace("  ", " ")] = scores[:, 0].tolist()
            mean, evaluations, seconds = scores.mean(0)
            each = row(name, steps, scale, int(evaluations), None, mean, seconds)
            del each["flow"]
            error = scores[:, 0].std(ddof=1) / len(drawn) ** 0.5
            result.append({**each, "spacing": spacing or "own", "seeds": len(drawn), "standard_error": f"{error:.2g}"})
    return result, distances


def compared(distances):
    """Each case minus the reference of its scale, seed by seed: mean and 95 % interval (Student's t)."""
    from scipy import stats

    result = {}
    for key, values in distances.items():
        first = next(other for other in distances if other.endswith(key[key.index(" scale") :]))
        gap = np.array(values) - np.array(distances[first])
        if key != first:
            half = stats.t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / len(gap) ** 0.5
            result[f"{key} minus {first}"] = {"mean": round(gap.mean(), 5), "low": round(gap.mean() - half, 5),
                                              "high": round(gap.mean() + half, 5)}  # fmt: skip
    return result


# --------------------------------------------------------------------------------------------------------- the output


def figure(rows, path, kinds=("flow", "frechet")):
    """A line of panels for each kind of error, one column a scale: the error against evaluations."""
    from matplotlib.figure import Figure

    scales = sorted({each["scale"] for each in rows})
    names = [name for name in dict.fromkeys(each["sampler"] for each in rows) if name in sampling.SAMPLERS]
    fig = Figure(figsize=(4.2 * len(scales) + 1.8, 3.75 * len(kinds)), dpi=90, layout="constrained")
    panels = fig.subplots(len(kinds), len(scales), squeeze=False, sharex=True, sharey="row")
    for line, kind in zip(panels, kinds):
        for panel, scale in zip(line, scales):
            for k, name in enumerate(names):
                chosen = [each for each in rows if each["sampler"] == name and each["scale"] == scale and each[kind]
                          and each.get("spacing", "own") == "own"]  # fmt: skip
                points = sorted((each["evaluations"], max(float(each[kind]), 1e-7)) for each in chosen)
                if points:
                    panel.loglog(*zip(*points), marker=MARKS[k % len(MARKS)], ms=4, lw=1, label=name,
                                 color=f"C{k % 10}", ls="-" if k < 10 else "--")  # fmt: skip
            panel.set(title=f"{kind}, scale {scale:g}")
            panel.grid(alpha=0.3)
        line[0].set_ylabel("distance from the flow" if kind == "flow" else "Frechet distance (squared form)")
    for panel in panels[-1]:
        panel.set_xlabel("network evaluations")
    handles, labels = panels[-1][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", fontsize=8)
    fig.savefig(path)


def machine(count):
    """What the numbers were measured on."""
    return {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0],
        "threads": th.get_num_threads(), "platform": platform.platform(), "python": platform.python_version(),
        "torch": th.__version__, "numpy": np.__version__, "date": datetime.date.today().isoformat(), "samples": count,
    }  # fmt: skip


def write(out, name, rows, facts, kinds=("flow", "frechet")):
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    figure(rows, out / f"{name}.png", kinds)
    (out / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"written: {out}/{name}.csv, .png, .json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a few points only, to see that it runs")
    parser.add_argument("--demo", type=Path, help="folder of a finished make demo: measure on its digits instead")
    parser.add_argument("--seeds", type=int, default=10, help="seeds on the digits, 2 or more (default: 10)")
    args = parser.parse_args()
    if args.demo:
        if args.seeds < 2:
            parser.error(f"--seeds {args.seeds}: an interval needs 2 or more")
        rows, distances = measure_digits(args.demo, args.seeds, args.quick)
        facts = machine(40 if args.quick else 500) | {"seeds": args.seeds, "differences": compared(distances)}
        write(args.out, "samplers_digits", rows, facts, kinds=("frechet",))
    else:
        write(args.out, "samplers", measure(args.quick), machine(200 if args.quick else COUNT))


if __name__ == "__main__":
    main()
