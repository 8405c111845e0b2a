"""What only a GPU can show: training in 16 bits, steps that the host does not wait for, and the memory they take.

    python benchmarks/gpu_checks.py

Trains a small network on synthetic images in each precision that programs have; then repeats steps of each, and of
guided walks, with torch's error for whatever synchronizes host and device (torch.cuda.set_sync_debug_mode). Writes
results/gpu_checks.json, and ends with exit code 1 if a check failed. On a CPU it runs too, and says of what it cannot
check that it did not.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch as th

from guided_diffusion import config, dist_util, ema, guidance, logger, sampling
from guided_diffusion.fp16_util import PRECISIONS
from guided_diffusion.network_options import ClassifierOptions, DiffusionOptions, ModelOptions
from guided_diffusion.script_util import create_classifier_and_diffusion, create_model_and_diffusion
from guided_diffusion.train_util import DiffusionTask, Trainer

OUT = Path(__file__).parent / "results" / "gpu_checks.json"
CLASSES = 4
SAMPLERS = ["ddpm", "ddim", "heun", "dpmpp_2m"]


def network_flags(args):
    own = {"image_size": args.image_size, "num_channels": args.num_channels, "num_res_blocks": 1, "class_cond": True,
           "channel_mult": "1,2", "num_classes": CLASSES, "num_head_channels": 32, "learn_sigma": True,
           "attention_resolutions": str(args.image_size // 2), "noise_schedule": "cosine"}  # fmt: skip
    return config.defaults(ModelOptions, DiffusionOptions) | own


def classifier_of(args, device):
    own = {"image_size": args.image_size, "classifier_width": args.num_channels, "classifier_depth": 1,
           "classifier_channel_mult": "1,2", "classifier_attention_resolutions": str(args.image_size // 2),
           "classifier_num_head_channels": 32, "num_classes": CLASSES, "noise_schedule": "cosine"}  # fmt: skip
    return create_classifier_and_diffusion(**config.defaults(ClassifierOptions, DiffusionOptions) | own)[0].to(device)


def waves(batch_size, image_size):
    """Batches of plane waves in three colours, whose direction is their class; on the host, as a loader's are."""
    rng = th.Generator().manual_seed(0)
    place = th.linspace(-math.pi, math.pi, image_size)
    while True:
        y = th.randint(CLASSES, (batch_size,), generator=rng)
        angle, phase = y * math.pi / CLASSES, 2 * math.pi * th.rand(batch_size, generator=rng)
        along = place * angle.cos()[:, None, None] + (place * angle.sin()[:, None])[:, :, None]    # [N,H,W]
        colours = [th.sin(2 * along + phase[:, None, None] + colour) for colour in range(3)]
        yield th.stack(colours, 1), {"y": y}


@contextlib.contextmanager
def no_waiting(device):
    """An error for whatever makes the host wait for a GPU."""
    if device.type == "cuda":
        th.cuda.synchronize()
        th.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            th.cuda.set_sync_debug_mode("default")


def trained(args, device, precision):
    """Train from the same start in one precision: what was lost, how fast, how much memory, whether a step waited."""
    th.manual_seed(0)
    net, diffusion = create_model_and_diffusion(**network_flags(args))
    forget_peak_memory(device)
    data = waves(args.batch_size, args.image_size)
    trainer = Trainer(DiffusionTask(net.to(device), diffusion), data, batch_size=args.batch_size, lr=1e-3,
                      precision=precision, averages=ema.parse("0.99,0.999"), grad_clip=1.0)  # fmt: skip
    rows, began = [], None
    for step in range(1, args.steps + 1):
        trainer.run_step(*next(data))
        if step % args.log_interval == 0:
            rows.append({"step": step, "loss": trainer.dump_log()})  # waits for the device
            began = began or (time.perf_counter(), step)
    seconds, timed = time.perf_counter() - began[0], rows[-1]["step"] - began[1]
    result = {"losses": rows, "images_per_second": args.batch_size * timed / seconds if timed else None,
              "skipped_steps": trainer.mp_trainer.skipped, "lg_loss_scale": trainer.mp_trainer.lg_loss_scale,
              "peak_memory_mib": peak_memory(device)}  # fmt: skip
    batches = [next(data) for _ in range(args.log_interval)]
    return result | checked("no_step_waits", device, lambda: [trainer.run_step(*batch) for batch in batches])


def walked(args, device, name):
    """A walk guided by a classifier and without it: whether one of its steps waited."""
    th.manual_seed(0)
    forget_peak_memory(device)
    model, diffusion = create_model_and_diffusion(**network_flags(args))
    model, classifier = model.to(device).eval(), classifier_of(args, device)
    rule, rows = sampling.plan(diffusion, name, args.walk)
    diffusion = diffusion.spaced(rows)
    predict = diffusion.predictor(model, cond_fn=guidance.classifier_gradient(classifier, 2.0))
    noise = sampling.SeededNoise(0, range(args.batch_size), device)
    cond = {"y": noise.integers(CLASSES)}
    shape = 3, args.image_size, args.image_size
    steps = sampling.sample(diffusion, predict, rule, noise.normal(*shape), noise=noise, cond=cond)
    next(steps)  # brings the tables of the process
    result = checked("no_step_waits", device, lambda: list(itertools.islice(steps, args.walk - 2)))
    ends = [x for x, _ in steps]  # the end looks at all gradients at once; a walk that failed has none
    finite = bool(ends) and bool(ends[-1].isfinite().all())
    return result | {"finite": finite, "peak_memory_mib": peak_memory(device)}


def checked(name, device, function):
    """{name: whether `function()` ran without waiting for a GPU, or why not; None without one}."""
    try:
        with no_waiting(device):
            function()
    except RuntimeError as error:
        return {name: f"failed: {str(error).splitlines()[0]}"}
    return {name: True if device.type == "cuda" else None}


def forget_peak_memory(device):
    if device.type == "cuda":
        th.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    return th.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def machine(device):
    """What the numbers were measured on."""
    gpu = th.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"gpu": gpu, "cuda": th.version.cuda, "torch": th.__version__, "python": platform.python_version(),
            "platform": platform.platform(), "date": datetime.date.today().isoformat()}  # fmt: skip


def problems(result):
    """What went wrong, in words."""
    found = []
    for precision, told in result["training"].items():
        losses = [row["loss"] for row in told["losses"]]
        if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
            found.append(f"{precision}: the loss went from {losses[0]} to {losses[-1]}")
        reference = result["training"]["fp32"]["losses"][-1]["loss"]
        if not abs(losses[-1] - reference) < 0.1 * reference:
            found.append(f"{precision}: the loss ended at {losses[-1]}, in fp32 at {reference}")
    for name, told in {**result["training"], **result["walks"]}.items():
        if told["no_step_waits"] not in (True, None):
            found.append(f"{name}: a step waited for the device ({told['no_step_waits']})")
        if not told.get("finite", True):
            found.append(f"{name}: samples are not finite")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"steps": 200, "log_interval": 20, "batch_size": 32, "image_size": 64, "num_channels": 64,
                        "walk": 20}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    dist_util.setup_dist(args.device or None)
    device = dist_util.dev()
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, format_strs=["log"]):
        result = {"machine": machine(device), "options": {k: v for k, v in vars(args).items() if k != "out"},
                  "training": {name: trained(args, device, name) for name in PRECISIONS},
                  "walks": {name: walked(args, device, name) for name in SAMPLERS}}  # fmt: skip
    result["problems"] = problems(result)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
