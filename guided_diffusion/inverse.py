"""
Inverse problems: samples of p(x_0 | y) for a measurement y = A(x_0) + noise, with a model that never saw y.

Any differentiable A will do for `measured`; `repaint` is for known and unknown pixels and needs no gradient. The
latent of an image, the noise that a deterministic sampler turns into it, comes from `sampling.invert`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch as th

from . import sampling
from .guidance import attached
from .prediction import clipped

# ------------------------------------------------------------------------------------------------------- operators


@dataclass(frozen=True)
class Operator:
    """
    A linear measurement A of images; calling it measures.

    :param forward: `(x [N,C,H,W]) -> A x`.
    :param adjoint: `(y like A x) -> A^T y`, like x.
    :param gain: A A^T as a number, for `spread_of`; where that is no multiple of the identity, its largest eigenvalue,
        for which guidance is nowhere too strong.
    """

    forward: Callable
    adjoint: Callable
    gain: float = 1.0

    def __call__(self, x):
        return self.forward(x)


def pixels(mask):
    """The pixels where the mask, broadcastable over x, is 1; the others are measured as 0."""
    return Operator(lambda x: mask * x, lambda y: mask * y)


def separable(rows, columns):
    """
    A x = R x C^T in every channel, for matrices R [h,H] and C [w,W]: [N,C,H,W] -> [N,C,h,w].

    :param rows, columns: float64 arrays.
    """
    r, c = th.from_numpy(rows), th.from_numpy(columns)
    gain = (np.linalg.norm(rows, 2) * np.linalg.norm(columns, 2)) ** 2
    return Operator(lambda x: r.to(x) @ x @ c.to(x).T, lambda y: r.to(y).T @ y @ c.to(y), float(gain))


def block_means(height, width, factor):
    """
    Means over blocks of factor x factor pixels: [N,C,height,width] smaller by that factor.

    :raises ValueError: if the factor is below 2 or does not divide the sides.
    """
    if factor < 2 or height % factor or width % factor:
        raise ValueError(f"a picture of {height} x {width} pixels has no blocks of {factor} x {factor}: give a divisor"
                         " of its sides, 2 or more")  # fmt: skip
    return separable(*(np.kron(np.eye(side // factor), np.ones(factor) / factor) for side in (height, width)))


def gaussian_blur(height, width, std):
    """Weighted means with a Gaussian of `std` pixels, which keep the brightness up to the edges: like x."""
    if not std > 0:
        raise ValueError(f"a blur needs a standard deviation above 0, not {std}")

    def means(side):
        place = np.arange(side)
        weights = np.exp(-(((place[:, None] - place) / std) ** 2) / 2)
        return weights / weights.sum(1, keepdims=True)

    return separable(means(height), means(width))


# -------------------------------------------------------------------------------------------------------- guidance


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


def applied(predict, process):
    """
    A predictor whose gradient is already in its score and its x_0, as ODE samplers would put it there, so that clipping
    can stand outside. Differentiated through at high noise, a network's x_0 asks for far more than images have.
    """
    return lambda x, t, **cond: sampling.guided_score(process, x, t, predict(x, t, **cond))


def by_measurement(process, predict, operator, y, *, noise_std=0.0, data_std=1.0, scale=1.0):
    """
    A predictor of p(x_0 | y) for images: `measured` by y = A(x_0) + noise with the spread of `spread_of`, its gradient
    `applied`, then clipped.

    :param predict: the model's predictor, not clipped, through which the gradient goes.
    :param scale: strength of the gradient; 1 is right for independent pixels of standard deviation data_std, and more
        where pixels tell of one another.
    """
    likelihood = gaussian_measurement(operator, y, spread_of(process, noise_std, data_std, operator.gain))
    guided = measured(predict, lambda x0, t: scale * likelihood(x0, t))
    return clipped(applied(guided, process), process)


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


# ---------------------------------------------------------------------------------------------------------- latents


def slerp(a, b, share):
    """
    Between two latents along the great circle, where mixtures of N(0, I) keep its length (Shoemake 1985, with lengths
    interpolated as well): a at share 0, b at 1.

    :param a, b: [N, ...], none zero; where both point the same way the straight line is taken.
    :param share: a number.
    """
    (u, long), (v, other) = _directed(a), _directed(b)
    cosine = (u * v).flatten(1).sum(1).clamp(-1, 1).reshape(long.shape)       # [N,1,..]
    angle = th.acos(cosine)
    sine = th.sin(angle)
    bent = th.where(sine > 1e-6, sine, 1.0)
    first = th.where(sine > 1e-6, th.sin((1 - share) * angle) / bent, 1 - share)
    second = th.where(sine > 1e-6, th.sin(share * angle) / bent, share)
    return (first * u + second * v) * ((1 - share) * long + share * other)


def _directed(x):
    """(x of length 1, its length [N,1,..])."""
    length = x.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
    return x / length, length


def normality(x):
    """
    How like N(0, I) latents [N,C,H,W] are, as numbers: mean and variance over all pixels, and the correlation of pixels
    with their neighbours to the right and below.
    """
    centred = x - x.mean()
    pairs = [(centred[..., 1:] * centred[..., :-1]).flatten(), (centred[..., 1:, :] * centred[..., :-1, :]).flatten()]
    variance = centred.square().mean()
    return {
        "mean": x.mean().item(),
        "variance": variance.item(),
        "neighbour_correlation": (th.cat(pairs).mean() / variance).item(),
    }
