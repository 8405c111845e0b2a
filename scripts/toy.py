"""Diffusion without training, in seconds: a ring of Gaussians whose denoiser and classifier are known exactly."""

import os
from collections import deque
from dataclasses import dataclass

from guided_diffusion import config
from guided_diffusion.config import option


@dataclass
class ToyOptions:
    """toy"""

    out: str = option("runs/toy/toy.png", "the picture to write")
    points: int = option(300, "samples in each panel")
    steps: int = option(30, "steps of each sampler")
    samplers: str = option("ddpm,ddim,heun,dpmpp_2m", "samplers by name, one row each")
    scales: str = option("0,1,4", "scales of classifier guidance, one column each")
    seed: int = option(0, "seed of the start and the noise")


OPTIONS = (ToyOptions,)
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import torch as th

from guided_diffusion import toy
from guided_diffusion.guidance import classifier_guided
from guided_diffusion.prediction import ModelVarType
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.sampling import SAMPLERS, sample
from guided_diffusion.spacing import pick, spaced_rows

COLOURS = ("#0072B2", "#D55E00", "#009E73")


def draw_samples(data, name, scale, args):
    """(points [N,2], the classes asked for [N])."""
    full = Process(get_named_beta_schedule("cosine", 1000)).spaced(range(980))
    process = full.spaced(spaced_rows(full, "log_snr", args.steps))
    exact = data.predictor(process, ModelVarType.FIXED_SMALL)

    def unconditional(x, t, y=None):
        return exact(x, t)

    predict = unconditional
    if scale:
        predict = classifier_guided(unconditional, data.classifier_gradient(process, scale))
    th.manual_seed(args.seed)
    start, y = th.randn(args.points, 2, dtype=th.float64), th.arange(args.points) % 3
    x, _ = deque(sample(process, predict, SAMPLERS[name], start, cond={"y": y}), maxlen=1).pop()
    return x, y


def main():
    args = config.parse(__doc__, *OPTIONS)
    scales = [float(part) for part in args.scales.split(",")]
    data = toy.ring()
    from matplotlib.figure import Figure

    names = [name.strip() for name in args.samplers.split(",")]
    for name in names:
        pick(SAMPLERS, name, "sampler")
    figure = Figure(figsize=(3.1 * len(scales), 3.2 * len(names)), dpi=110, layout="constrained")
    panels = figure.subplots(len(names), len(scales), squeeze=False, sharex=True, sharey=True)
    print(f"{'sampler':<10}{'scale':>6}{'asked class':>13}{'distance to nearest mean':>26}")
    for row, name in zip(panels, names):
        for panel, scale in zip(row, scales):
            x, y = draw_samples(data, name, scale, args)
            distance, nearest = th.cdist(x, data.means).min(1)
            agreement = (data.labels[nearest] == y).double().mean()
            print(f"{name:<10}{scale:>6g}{agreement:>13.1%}{distance.mean():>26.3f}")
            panel.scatter(*x.T, s=5, c=[COLOURS[k] for k in y], linewidths=0, alpha=0.7)
            panel.scatter(*data.means.T, s=90, facecolors="none", edgecolors="0.4", linewidths=0.8)
            panel.set(title=f"{name}, scale {scale:g}: {agreement:.0%} as asked", aspect="equal", xticks=[], yticks=[])
            panel.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
    figure.suptitle(f"{args.steps} steps, exact denoiser; colour = the class asked for, rings = the data")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    figure.savefig(args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    config.run_program(main)
