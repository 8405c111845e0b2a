"""Images of equal quality: 250 ancestral steps of the plain form against samplers of ours with few, on digits.

    python benchmarks/quality.py --demo runs/demo [--seeds 4]

Every sampler draws the same digits from the same starts, 500 a seed, guided at scale 3. The distance is the Frechet
distance, in the features of the demo's judge, from the training digits; `difference` is a sampler's less the plain
form's, image by image, with its bias taken off and its 95 % interval (evaluations/intervals.py). The sides take turns;
times are CPU seconds an image. The answer is the fastest sampler whose difference is not above 0 by its interval, among
those whose error is at most --error. Becomes the section `quality` of results/speed.json.
"""

import argparse
from pathlib import Path

import numpy as np
import pairs
import timing
import torch as th

from evaluations import errors, influence, intervals
from evaluations.features import ClassifierExtractor, extract
from guided_diffusion import pictures

CASES = [("ddpm", 20), ("ddpm", 25), ("dpmpp_2m", 10), ("dpmpp_2m", 15), ("dpmpp_2m_sde", 15), ("dpmpp_2m_sde", 20),
         ("dpmpp_2s", 10), ("unipc", 15)]  # fmt: skip


def drawn(works, seeds, clock="cpu"):
    """({name: (uint8 images, seconds of each seed)}) of works `(seed) -> x`, which take turns."""
    number, found = ("wall", "cpu").index(clock), {name: ([], []) for name in works}
    for work in works.values():
        work(0, 2)
    for seed in range(seeds):
        for name, work in works.items():
            kept = []
            found[name][1].append(timing.once(lambda w=work, s=seed, k=kept: k.append(w(s)))[number])
            found[name][0].append(pictures.to_uint8(kept[0]).numpy())
            print(f"seed {seed}, {name}: {found[name][1][-1]:.2f} s", flush=True)
    return {name: (np.concatenate(images), seconds) for name, (images, seconds) in found.items()}


def measured(folder, seeds, count, scale, rows, cases):
    """Rows of results, the plain form first."""
    net, process, classifier = pairs.demo_networks(folder)
    walks, shape = pairs.Walks(net, process, classifier, rows, scale), (net.in_channels, 8, 8)
    works = {f"plain ddpm {rows}": lambda seed, n=count: walks.literal(n, shape, seed, own_noise=False)}
    works[f"ours ddpm {rows}"] = lambda seed, n=count: walks.ours(n, shape, seed)
    for name, steps in cases:
        works[f"ours {name} {steps}"] = lambda seed, n=count, w=name, s=steps: walks.ours(
            n, shape, seed, sampler=w, steps=s)  # fmt: skip
    judge = ClassifierExtractor(str(next((folder / "judge").glob("model*.pt"))))
    data = np.load(folder / "reference.npz", allow_pickle=False)
    reference, labels = extract(judge, data["arr_0"]), np.tile(walks.labels(count).numpy(), seeds)
    result, first = [], None
    for name, (images, seconds) in drawn(works, seeds).items():
        features = extract(judge, images)
        strata = errors.strata_of((reference, features), (data["arr_1"], labels))
        estimate = influence.frechet(reference.pool, features.pool, strata=strata)
        first = first or (estimate, seconds, images)
        gap = intervals.difference(estimate, first[0])
        result.append({
            "what": f"{name}, scale {scale:g}, {len(images)} digits",
            "cpu_ms_per_image": 1000 * sum(seconds) / len(images),
            "frechet": estimate.value, "standard_error": intervals.standard_error(estimate),
            "difference": gap.value, "difference_low": gap.interval[0], "difference_high": gap.interval[1],
            "difference_error": gap.standard_error,
            "times_as_fast": {"an image": timing.spread([a / b for a, b in zip(first[1], seconds)])},
            "pixels_that_differ": float((images != first[2]).mean()),
        })  # fmt: skip
        print(timing.shown(result[-1]), flush=True)
    return result


def best(rows, error):
    """The fastest row that is not worse than the first by its interval, of those that are known so well."""
    equal = [row for row in rows[1:] if row["difference_low"] <= 0 and row["difference_error"] <= error]
    return max(equal, key=lambda row: row["times_as_fast"]["an image"]["median"], default=None)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of a finished make demo")
    parser.add_argument("--seeds", type=int, default=4, help="sets of --images digits (default: 4)")
    parser.add_argument("--images", type=int, default=500, help="digits a set (default: 500)")
    parser.add_argument("--scale", type=float, default=3.0, help="of the guidance (default: 3)")
    parser.add_argument("--rows", type=int, default=250, help="ancestral steps of the plain form (default: 250)")
    parser.add_argument("--error", type=float, default=0.02, help="largest error of a difference (default: 0.02)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.json", help="json file")
    args = parser.parse_args(argv)
    th.set_num_threads(args.threads)
    cases = CASES[: 2 if args.images < 100 else None]
    rows = measured(args.demo, args.seeds, args.images, args.scale, args.rows, cases)
    chosen = best(rows, args.error)
    if chosen:
        rows.append(chosen | {"what": f"the answer: {chosen['what']}"})
        print(timing.shown(rows[-1]))
    timing.record(args.out, {"quality": rows}, "cpu")


if __name__ == "__main__":
    main()
