"""
How probable data are under a model: exactly, along the probability-flow ODE, and the variational bound as a density.

The variational bound of `losses.bits_per_dimension` has a decoder that gives probability to the 2/255-wide bins of
8-bit images, so its first term is a mass. A density is per unit length: the two differ by log(2/255) a dimension as
long as the density hardly changes within a bin. `bits_per_dim` makes that change; `variational_bound` takes the
decoder's Gaussian itself, so that it bounds -log p(x_0) where the data are not on a grid.
"""

import math
from dataclasses import dataclass

import torch as th

from .losses import bits_per_dimension
from .prediction import mean_of, velocity
from .sampling import SeededNoise

BIN = 2 / 255  # the distance of neighbouring values of 8-bit images in [-1, 1]


@dataclass(frozen=True)
class LogDensity:
    """
    What the probability-flow ODE says about x.

    :param nats: [N] log p(x).
    :param error: [N] standard error of `nats` from random probes; 0 with the exact trace.
    :param latent: [N, ...] where x comes from: the sampler's start, which N(0, I) holds to be likely.
    """

    nats: th.Tensor
    error: th.Tensor
    latent: th.Tensor


def log_density(process, predict, x, *, rows=None, probes=None, seed=0, cond=None):
    """
    log p(x) of a model, by the change of variables along its ODE (Song et al. 2021, arXiv 2011.13456, appendix D).

    With the angle phi = atan(sigma), from 0 at the data to pi/2 at pure noise, the ODE is dx/d phi = v(x, phi) and
    d log p / d phi = -div v. It is integrated by Heun's second-order steps on rows of the process, upwards. x is
    taken as a sample of the first row, the level where samplers stop asking the network; log p(x) is the density of
    that level, which is as far from the data's as its sigma is from 0.

    :param predict: `(x, t, **cond) -> Prediction`, differentiable in x, without guidance by a gradient.
    :param x: [N, ...]; float64 where small errors matter.
    :param rows: ascending rows to visit, at least two; default all.
    :param probes: how many random signs (Rademacher) estimate the trace (Hutchinson 1990), at least two; None takes
        the exact trace, one backward pass a dimension in place of one a probe.
    :param seed: of the probes, which belong to the sample and not to the batch.
    :raises ValueError: for rows that do not ascend, too few probes, or a guided predictor.
    """
    rows = list(range(process.num_timesteps)) if rows is None else list(rows)
    if len(rows) < 2 or rows != sorted(set(rows)):
        raise ValueError(f"rows to integrate over must be two or more, ascending, not {rows}")
    angles = [math.atan(process.sqrt_recipm1_alphas_cumprod[row]) for row in rows]
    directions = _directions(x, probes, seed)  # [K,N,...]

    def slope(x, row):
        return _slope(process, predict, x, row, directions, cond or {})

    change = 0.0  # of log p from the data to the noise, as each probe sees it: [K,N]
    here, (v, div) = x.detach(), slope(x, rows[0])
    for k in range(1, len(rows)):
        h = angles[k] - angles[k - 1]
        v_end, div_end = slope(here + h * v, rows[k])
        here = here + h / 2 * (v + v_end)
        change = change - h / 2 * (div + div_end)
        if k + 1 < len(rows):
            v, div = slope(here, rows[k])
    normal = -0.5 * (here**2 + math.log(2 * math.pi)).flatten(1).sum(1)
    if probes is None:
        return LogDensity(normal - change.sum(0), th.zeros_like(normal), here)
    return LogDensity(normal - change.mean(0), change.std(0) / math.sqrt(probes), here)


def _directions(x, probes, seed):
    """[K, N, ...]: the axes, whose terms add up to the trace, or random signs, whose terms average to it."""
    if probes is None:
        axes = th.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, 1, *x.shape[1:])
        return axes.expand(-1, *x.shape)
    if probes < 2:
        raise ValueError(f"the error of the trace is estimated from two probes or more, not {probes}")
    normal = SeededNoise(seed, range(len(x)), x.device).normal(probes, *x.shape[1:])  # [N,K,...]
    return normal.sign().to(x.dtype).transpose(0, 1)


def _slope(process, predict, x, row, directions, cond):
    """(v like x, z . dv/dx z for each direction z: [K, N])."""
    t = th.full((len(x),), row, dtype=th.int64, device=x.device)
    with th.enable_grad():
        x = x.detach().requires_grad_(True)
        pred = predict(x, t, **cond)
        if pred.grad is not None:
            raise ValueError("the likelihood of a model guided by a gradient is not defined here: pass it unguided")
        v = velocity(process, pred.x0, t, pred.eps)
        along = [th.autograd.grad(v, x, z, retain_graph=True)[0] * z for z in directions]
    return v.detach(), th.stack(along).flatten(2).sum(2)


def bits_per_dim(nats, dims, bin_width=BIN):
    """
    -log2 of the probability of a bin around x, a dimension, from a log-density that hardly changes within the bin.

    :param nats: log p(x), of any shape.
    :param dims: dimensions of x, e.g. 3 * 64 * 64.
    :param bin_width: side of a bin.
    """
    return -nats / (dims * math.log(2)) - math.log2(bin_width)


def variational_bound(process, predict, x_start, noise=th.randn_like):
    """
    The variational bound on -log p(x_0), a density: [N], nats (DDPM eq. 5).

    As `losses.bits_per_dimension`, whose last term, the probability of a bin, gives way to the density of the same
    Gaussian. Its mean over noise lies above -log p(x_0) by the KL between the model's way back and the true one.

    :param predict: a predictor, best not clipped, as data need not lie in [-1, 1].
    """
    terms = bits_per_dimension(process, predict, x_start, noise)
    bits = terms["vb"][:, :-1].sum(1) + terms["prior_bpd"]
    t = th.zeros(len(x_start), dtype=th.int64, device=x_start.device)
    with th.no_grad():
        x = process.q_sample(x_start, t, noise(x_start))
        pred = predict(x, t)
    gap = x_start - mean_of(process, x, t, pred)
    decoder = 0.5 * (gap**2 * th.exp(-pred.log_variance) + pred.log_variance + math.log(2 * math.pi))
    return bits * math.log(2) * x_start[0].numel() + decoder.flatten(1).sum(1)
