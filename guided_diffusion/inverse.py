"""
Inverse problems: samples of p(x_0 | y) for a measurement y = A(x_0) + noise, with a model that never saw y.

Any differentiable A will do for `measured`; `repaint` is for known and unknown pixels and needs no gradient.
"""

from dataclasses import fields, replace

import torch as th

from . import sampling
from .guidance import attached


def measured(predict, log_likelihood):
    """
    Attach the gradient, with respect to x_t and through the predictor, of log p(y | x_0) at the predicted x_0
    (diffusion posterior sampling, Chung et al. 2022, arXiv 2209.14687, eq. 15); the sampler applies it.

    :param log_likelihood: `(x0 [N, ...], t [N]) -> [N]`, such as `gaussian_measurement`; the scale already inside.
    :raises ArithmeticError: if the gradient is not finite; the error names the row.
    """

    def guided(x, t, **cond):
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            pred = predict(x, t, **cond)
            grad = th.autograd.grad(log_likelihood(pred.x0, t).sum(), x)[0]
        tensors = {f.name: getattr(pred, f.name) for f in fields(pred) if getattr(pred, f.name) is not None}
        pred = replace(pred, **{name: value.detach() for name, value in tensors.items()})
        return attached(pred, grad, t)

    return guided


def gaussian_measurement(operator, y, std):
    """
    The log-likelihood `-|y - A(x0)|^2 / (2 std^2)`, a value for each sample, for `measured`.

    The belief about x_0 is uncertain, so what y tells about x_t has more spread than the measurement's noise:
    `spread_of` gives the std that accounts for it. With the noise alone, as in DPS, guidance at high noise is too
    strong: on Gaussian data the samples' mean is off and they vary too little (a tenth of the variance in the test).

    :param operator: A, `(x0 [N, ...]) -> like y`, differentiable.
    :param y: [N, ...] what was measured.
    :param std: standard deviation of y given x_t: a number, or a function `(t [N]) -> [N]`.
    """

    def log_likelihood(x0, t):
        error = (y - operator(x0)).flatten(1).square().sum(1)                 # [N]
        return -error / (2 * (std(t) if callable(std) else std) ** 2)

    return log_likelihood


def spread_of(process, noise_std=0.0, data_std=1.0, gain=1.0):
    """
    The std of y given x_t, a function of rows t [N], for data that are N(m, data_std^2) in every pixel: exact there,
    an estimate elsewhere (as in PiGDM, Song et al. 2023, "Pseudoinverse-guided diffusion models", section 3).

    :param noise_std: standard deviation of the measurement's noise.
    :param gain: A A^T of the linear A, as a number: 1 for a choice of pixels, 1/n for means over n pixels.
    """

    def std(t):
        sigma = process.at("sqrt_recipm1_alphas_cumprod", t, t.float())       # [N]
        unknown = 1 / (1 / sigma**2 + 1 / data_std**2)                        # variance of x_0 given x_t
        return (noise_std**2 + gain * unknown).sqrt()

    return std


def repaint(process, predict, rule, x, known, mask, *, jump=10, times=10, noise=th.randn_like, cond=None):
    """
    Inpainting by resampling (RePaint, Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1): after each step the known
    part is replaced by the data noised to that row; every `jump` rows are walked `times` times, noised back between,
    so that the unknown part can come to agree with the known one. It comes near p(unknown | known) without being exact:
    modes that differ little in the known part stay mixed up. Yields `(x, Prediction)` as `sampling.sample`.

    :param rule: a step rule; `sampling.ddpm` in the paper.
    :param x: [N, ...] the start, N(0, I).
    :param known: [N, ...] clean data, read where mask is 1.
    :param mask: broadcastable over x, 1 where known, 0 where to paint.
    :param noise: `(x) -> N(0, I)` like x.
    :raises ValueError: if jump or times is below 1.
    """
    if jump < 1 or times < 1:
        raise ValueError(f"repaint walks 1 row or more once or more, not {jump} rows {times} times")

    def level(row):
        return 1.0 if row < 0 else process.alphas_cumprod[row]

    def painted(step):
        x, pred = rule(step)
        abar = level(step.row - 1)
        data = abar**0.5 * known + (1 - abar) ** 0.5 * step.noise()
        return mask * data + (1 - mask) * x, pred

    rows = list(range(process.num_timesteps))[::-1]
    for start in range(0, len(rows), jump):
        part = rows[start : start + jump]
        for again in range(times):
            if again:  # from the row after the part's last back up to its first
                keep = level(part[0]) / level(part[-1] - 1)
                x = keep**0.5 * x + (1 - keep) ** 0.5 * noise(x)
            walk = sampling.sample(process, predict, painted, x, noise=noise, cond=cond, rows=part)
            for x, pred in walk:
                yield x, pred
