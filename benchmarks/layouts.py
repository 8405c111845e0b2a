"""
Times networks with channels last (--channels_last) against the usual layout, and tells how far their outputs differ.

    python benchmarks/layouts.py [--rounds 5] [--precision bf16] [--device cuda]

An evaluation, and the forward and backward pass of a training step, of the demo's network and of two of 32x32. Both
sides take turns. Writes a section of results/layouts.json.
"""

import argparse
import copy
from pathlib import Path

import pairs
import timing
import torch as th

from guided_diffusion.fp16_util import PRECISIONS
from guided_diffusion.layouts import to_channels_last

OUT = Path(__file__).parent / "results" / "layouts.json"


def rows(name, flags, count, args):
    """Rows of an evaluation and of both passes, for `count` images."""
    net, _ = pairs.diffusion_of(flags, args.device)
    net.convert_to(PRECISIONS[args.precision])
    x, t, _ = pairs.batch_of(flags, count, args.device)
    sides = {"usual": net, "channels_last": to_channels_last(copy.deepcopy(net), print)}

    def evaluated(side):
        with th.inference_mode():
            return sides[side].eval()(x, t)

    def both_passes(side):
        sides[side].train()(x, t).square().mean().backward()

    error = timing.difference(evaluated("usual"), evaluated("channels_last"))
    for what, work in (("evaluation", evaluated), ("both passes", both_passes)):
        works = {side: lambda side=side, work=work: work(side) for side in sides}
        row = timing.compared(timing.interleaved(works, args.rounds, args.device), timing.clock_of(args.device))
        yield timing.announced({"what": f"{name}, {count} images, {args.precision}: {what}"} | row | {"error": error})


def main():
    parser = argparse.ArgumentParser(description="Channels last against the usual layout.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="numbers inside the convolutions")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=OUT, help="json file for the results")
    args = parser.parse_args()
    found = [row for name, (flags, count) in pairs.NETWORKS.items() for row in rows(name, flags, count, args)]
    timing.record(args.out, {f"{args.precision} on {args.device}": found}, args.device)


if __name__ == "__main__":
    main()
