"""Training losses and likelihood terms. Terms are per sample [N]; variational terms are in bits per dimension."""

import enum
import math

import torch as th

from .prediction import TARGETS, is_learned, mean_of, read, split_output


class LossType(enum.Enum):
    """What `loss` is made of."""

    MSE = enum.auto()  # mean square, plus the variational term where the variance is learned
    RESCALED_MSE = enum.auto()  # the same, with the variational term times T / 1000
    KL = enum.auto()  # the variational term alone
    RESCALED_KL = enum.auto()  # the variational term times T: an estimate of the whole bound

    def is_vb(self):
        return self in (LossType.KL, LossType.RESCALED_KL)


def flat_mean(values):
    """[N, ...] -> [N]."""
    return values.flatten(1).mean(1)


def normal_kl(mean1, logvar1, mean2, logvar2):
    """
    KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)) in nats, element by element, with broadcasting.

    :raises TypeError: if no argument is a tensor.
    """
    tensors = [value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, th.Tensor)]
    if not tensors:
        raise TypeError("at least one argument of normal_kl must be a tensor")
    logvar1, logvar2 = (th.as_tensor(value).to(tensors[0]) for value in (logvar1, logvar2))
    square = (mean1 - mean2) ** 2 * th.exp(-logvar2)
    return 0.5 * (-1.0 + logvar2 - logvar1 + th.exp(logvar1 - logvar2) + square)


def approx_standard_normal_cdf(x):
    """A tanh approximation of the standard normal's distribution function (Page 1977); within 2e-4 of it."""
    return 0.5 * (1.0 + th.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x, *, means, log_scales):
    """
    Log-probability, in nats per element, of the 1/127.5-wide bin around x under a Gaussian (DDPM eq. 13).

    The outermost bins reach to infinity. No value is below log 1e-12.

    :param x: data in [-1, 1], on the grid of 8-bit images.
    :param means, log_scales: like x; the logarithm is of the standard deviation.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(f"x, means and log_scales differ in shape: {x.shape}, {means.shape}, {log_scales.shape}")
    per_scale = th.exp(-log_scales)
    above = approx_standard_normal_cdf(per_scale * (x - means + 1 / 255))
    below = approx_standard_normal_cdf(per_scale * (x - means - 1 / 255))
    mass = th.where(x < -0.999, above, th.where(x > 0.999, 1 - below, above - below))
    return th.log(mass.clamp(min=1e-12))


def vb_terms_bpd(process, pred, x_start, x_t, t):
    """
    One term of the variational bound: [N], bits per dimension (DDPM eq. 5).

    At row 0 the negative log-likelihood of the decoder, elsewhere KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)).
    """
    true_mean, _, true_log_variance = process.q_posterior_mean_variance(x_start, x_t, t)
    mean = mean_of(process, x_t, t, pred)
    kl = normal_kl(true_mean, true_log_variance, mean, pred.log_variance)
    nll = -discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * pred.log_variance)
    return th.where(t == 0, flat_mean(nll), flat_mean(kl)) / math.log(2.0)


def prior_bpd(process, x_start):
    """KL(q(x_T | x_0) || N(0, I)): [N], bits per dimension. No training changes it."""
    t = th.full((len(x_start),), process.num_timesteps - 1, dtype=th.int64, device=x_start.device)
    mean, _, log_variance = process.q_mean_variance(x_start, t)
    return flat_mean(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)


def training_losses(process, net, x_start, t, noise, cond, mean_type, var_type, loss_type):
    """
    The terms of the training loss, each [N], always with `loss`.

    With a learned variance the mean square trains the mean and the variational term trains only the variance: its
    mean is detached (Improved DDPM, section 3.1). In it x_0 is never clipped.

    :param net: `(x_t, clock, **cond) -> [N, C or 2C, ...]`.
    :param t: [N] rows.
    :param noise: like x_start, or None to draw it.
    """
    noise = th.randn_like(x_start) if noise is None else noise
    x_t = process.q_sample(x_start, t, noise)
    guess, v = split_output(net(x_t, process.clock(t), **cond), x_t, var_type)

    def bound(guess):
        return vb_terms_bpd(process, read(process, mean_type, var_type, guess, v, x_t, t), x_start, x_t, t)

    if loss_type.is_vb():
        return {"loss": bound(guess) * (process.num_timesteps if loss_type is LossType.RESCALED_KL else 1)}
    target = TARGETS[mean_type](process, x_start, x_t, t, noise)
    terms = {"mse": flat_mean((target - guess) ** 2)}
    if is_learned(var_type):
        share = process.num_timesteps / 1000 if loss_type is LossType.RESCALED_MSE else 1
        terms["vb"] = bound(guess.detach()) * share
    return {**terms, "loss": sum(terms.values())}


def bits_per_dimension(process, predict, x_start, noise=th.randn_like):
    """
    The whole variational bound on -log2 p(x_0), per dimension.

    :param predict: a predictor.
    :return: dict of `total_bpd` [N], `prior_bpd` [N], and `vb`, `xstart_mse`, `mse`, each [N, T], whose columns run
        from the noisiest step t = T-1 to t = 0.
    """
    columns = {"vb": [], "xstart_mse": [], "mse": []}
    for row in reversed(range(process.num_timesteps)):
        t = th.full((len(x_start),), row, dtype=th.int64, device=x_start.device)
        with th.no_grad():
            eps = noise(x_start)
            x_t = process.q_sample(x_start, t, eps)
            pred = predict(x_t, t)
            columns["vb"].append(vb_terms_bpd(process, pred, x_start, x_t, t))
            columns["xstart_mse"].append(flat_mean((pred.x0 - x_start) ** 2))
            columns["mse"].append(flat_mean((pred.eps - eps) ** 2))
    terms = {name: th.stack(values, dim=1) for name, values in columns.items()}
    prior = prior_bpd(process, x_start)
    return {"total_bpd": terms["vb"].sum(1) + prior, "prior_bpd": prior, **terms}
