"""How far features in 16 bits are from those in float32, and the Frechet distances that are made of them.

    python benchmarks/precision.py [--weights FILE] [--images 16] [--device cuda] [--dtypes bfloat16,float16]

Without --weights the network is Inception with random ones of the usual spread, which keep the size of activations as
trained ones do. Two sets of made-up pictures, one of them bluer and smoother. Writes results/precision.json.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import timing
import torch as th
import torch.nn.functional as F

from evaluations import features, metrics
from evaluations.inception import Inception

OUT = Path(__file__).parent / "results" / "precision.json"


def random_weights(path):
    """Save Inception with normal weights of variance 2 / inputs (He et al. 2015, arXiv 1502.01852)."""
    th.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, (th.nn.Conv2d, th.nn.Linear)):
            th.nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()))
    th.save(network.state_dict(), path)


def pictures(seed, count, coarse, blue):
    """uint8 [count,64,64,3]: noise of `coarse` squared values a channel, stretched; `blue` is added to the last."""
    noise = th.rand(count, 3, coarse, coarse, generator=th.Generator().manual_seed(seed))
    x = F.interpolate(noise, size=(64, 64), mode="bicubic", align_corners=False)            # [N,3,64,64]
    x[:, 2] += blue
    return (255 * x).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def error(got, want):
    """Size of a difference over the size of what is wanted."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def row(dtype, weights, sets, device, full=None):
    """(what a type gives, its features): against `full`, the features in float32, if there are any."""
    extractor = features.InceptionExtractor(weights, device, dtype=dtype, allow_other_weights=True)
    extractor(sets[0][:1])  # the first call prepares kernels
    said = []
    wall, _ = timing.once(lambda: said.extend(features.extract(extractor, each) for each in sets), device)
    distance = metrics.frechet_distance_from_features(*(each.pool for each in said))
    told = {"dtype": dtype, "frechet": distance, "ms_per_image": 1000 * wall / sum(map(len, sets))}
    if full:
        told |= {f"{name}_error": max(error(getattr(a, name), getattr(b, name)) for a, b in zip(said, full))
                 for name in features.Features._fields}  # fmt: skip
        told["frechet_error"] = distance / metrics.frechet_distance_from_features(*(each.pool for each in full)) - 1
        told["frechet_of_mixed_types"] = metrics.frechet_distance_from_features(said[0].pool, full[0].pool)
    return told, said


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", help="file of the Inception weights (None: random ones)")
    parser.add_argument("--images", type=int, default=16, help="pictures in either set")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtypes", default="bfloat16,float16", help="types to compare with float32")
    parser.add_argument("--out", default=str(OUT), help="json file for the results")
    args = parser.parse_args()
    sets = [pictures(1, args.images, 16, 0.0), pictures(2, args.images, 10, 0.1)]
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or f"{folder}/random.pth"
        if not args.weights:
            random_weights(weights)
        told, full = row("float32", weights, sets, args.device)
        rows = [told, *(row(dtype, weights, sets, args.device, full)[0] for dtype in args.dtypes.split(","))]
    for each in rows:
        print({name: value if isinstance(value, str) else float(f"{value:.4g}") for name, value in each.items()})
    content = {"images": args.images, "weights": "of a file" if args.weights else "random", "rows": rows}
    Path(args.out).write_text(json.dumps(timing.machine(args.device) | content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
