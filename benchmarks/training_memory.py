"""Peak memory of one training step, ours against the plain form: 64x64 with attention at 32, as pairs.MEMORY has it.

    python benchmarks/training_memory.py SIDE [--recompute True] [--size 64] [--batch 8]

SIDE is plain, ours or nothing; this process takes one step of it (nothing: it only builds the network) and prints, in
MiB, the largest resident set that the system saw of it and the bytes that autograd kept for the backward pass.
benchmarks/speed.py runs it in fresh processes, in turns, since a peak belongs to a process.
"""

import argparse
from pathlib import Path

import pairs
import plain
import plain_steps
import torch as th

from guided_diffusion import memory

MIB = 2**20


def measured(side, flags, count, device="cpu"):
    """{"kept_mib", "peak_mib"}: of gradients of one loss; the peak is that of the process, or of the GPU."""
    net, process = pairs.diffusion_of(flags, device)
    x, t, _ = pairs.batch_of(flags, count, device)
    if side == "plain":
        net = plain.plain_of(net)
        process = plain_steps.PlainDiffusion(process)
        loss = lambda: process.losses(net, x, t, x)["loss"].mean()                              # noqa: E731
    else:
        loss = lambda: process.training_losses(net, x, t, noise=x)["loss"].mean()               # noqa: E731
    kept = 0
    if side != "nothing":
        loss().backward()
    if th.device(device).type == "cuda":
        peak = th.cuda.max_memory_allocated(device) / MIB
    else:
        peak = resident()
    if side != "nothing":
        kept = memory.activation_bytes(loss, list(net.parameters())) / MIB
    return {"kept_mib": kept, "peak_mib": peak}


def resident():
    """MiB of the largest resident set of this program (ru_maxrss would begin with that of the one that started it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("side", choices=["plain", "ours", "nothing"], help="whose step")
    parser.add_argument("--recompute", default="False", choices=["True", "False"], help="--use_checkpoint of both")
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    flags = pairs.MEMORY | {"image_size": args.size, "use_checkpoint": args.recompute == "True"}
    found = measured(args.side, flags, args.batch, args.device)
    print(f"MEMORY {found['kept_mib']} {found['peak_mib']}")


if __name__ == "__main__":
    main()
