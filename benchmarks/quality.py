"""Images of equal quality: 250 ancestral steps of the plain form against samplers of ours with few, on digits.

    python benchmarks/quality.py --demo runs/demo [--seeds 4]

Every sampler draws the same digits from the same starts, 500 a seed, guided at scale 3. The distance is the Frechet
distance, in the features of the demo's judge, from the training digits; `difference` is a sampler's less the plain
form's, image by image, with its bias taken off and its 95 % interval (evaluations/intervals.py). The sides take turns;
times are CPU seconds an image. The answer is the fastest sampler whose difference is not above 0 by its interval, among
those whose error is at most --error. Then the shortcuts, against the exact walk of --steps ancestral steps. Become the
sections `quality` and `shortcuts` of results/speed.json; with --only, one of them.
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


def compared(folder, works, seeds, labels):
    """Rows of results of works `(seed, count) -> x`: times and distances, against the first of them."""
    judge = ClassifierExtractor(str(next((folder / "judge").glob("model*.pt"))))
    data = np.load(folder / "reference.npz", allow_pickle=False)
    reference, result, first = extract(judge, data["arr_0"]), [], None
    for name, (images, seconds) in drawn(works, seeds).items():
        features = extract(judge, images)
        strata = errors.strata_of((reference, features), (data["arr_1"], np.tile(labels, seeds)))
        estimate = influence.frechet(reference.pool, features.pool, strata=strata)
        first = first or (estimate, seconds, images.astype(float))
        gap = intervals.difference(estimate, first[0])
        result.append({
            "what": f"{name}, {len(images)} digits", "cpu_ms_per_image": 1000 * sum(seconds) / len(images),
            "frechet": estimate.value, "standard_error": intervals.standard_error(estimate),
            "difference": gap.value, "difference_low": gap.interval[0], "difference_high": gap.interval[1],
            "difference_error": gap.standard_error,
            "times_as_fast": {"an image": timing.spread([a / b for a, b in zip(first[1], seconds)])},
            "mean_difference_of_pixels": float(np.abs(images - first[2]).mean()),
        })  # fmt: skip
        timing.announced(result[-1])
    return result


def samplers(args):
    """Rows of the plain form, of ours with the same steps, and of samplers with few."""
    net, process, classifier = pairs.demo_networks(args.demo)
    walks, shape = pairs.Walks(net, process, classifier, args.rows, args.scale), (net.in_channels, 8, 8)
    end = f", scale {args.scale:g}"
    works = {f"plain ddpm {args.rows}{end}": lambda seed, n=args.images: walks.literal(n, shape, seed, own_noise=False),
             f"ours ddpm {args.rows}{end}": lambda seed, n=args.images: walks.ours(n, shape, seed)}  # fmt: skip
    for name, steps in CASES[: 2 if args.images < 100 else None]:
        works[f"ours {name} {steps}{end}"] = lambda seed, n=args.images, w=name, s=steps: walks.ours(
            n, shape, seed, sampler=w, steps=s)  # fmt: skip
    rows = compared(args.demo, works, args.seeds, walks.labels(args.images).numpy())
    if chosen := best(rows, args.error):
        rows.append(timing.announced(chosen | {"what": f"the answer: {chosen['what']}"}))
    return rows


def shortcuts(args):
    """Rows of the exact walk and of what makes its steps cheaper."""
    nets = {name: pairs.demo_networks(args.demo) for name in ("exact", "half", "guide")}
    nets["half"][0].convert_to(th.bfloat16)
    for name in ("half", "guide"):
        nets[name][2].convert_to(th.bfloat16)
    shape, works = (nets["exact"][0].in_channels, 8, 8), {}
    walks = {name: pairs.Walks(*each, args.steps, args.scale, literal=(None, each[2])) for name, each in nets.items()}

    def work(name, **how):
        return lambda seed, n=args.images: walks[name].ours(n, shape, seed, **how)

    works["exact"] = work("exact")
    works["the classifier's network in bf16"] = work("guide")
    works["both networks in bf16"] = work("half")
    for k in (2, 4):
        works[f"classifier every {k} steps, {k} times the scale"] = work("exact", every=k)
    for k in (2, 3):
        works[f"deep features every {k} steps"] = work("exact", reuse=k)
    works["bf16, classifier every 2 steps"] = work("half", every=2)
    works["bf16, classifier and deep features every 2 steps"] = work("half", every=2, reuse=2)
    named = {f"{name}, {args.steps} steps of ddpm, scale {args.scale:g}": each for name, each in works.items()}
    return compared(args.demo, named, args.seeds, walks["exact"].labels(args.images).numpy())


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
    parser.add_argument("--steps", type=int, default=50, help="of the walk that shortcuts are tried on (default: 50)")
    parser.add_argument("--only", choices=["quality", "shortcuts"], help="one of the two sections")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.json", help="json file")
    args = parser.parse_args(argv)
    th.set_num_threads(args.threads)
    for name, section in {"quality": samplers, "shortcuts": shortcuts}.items():
        if args.only in (None, name):
            timing.record(args.out, {name: section(args)}, "cpu")


if __name__ == "__main__":
    main()
