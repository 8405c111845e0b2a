"""Training losses and likelihood terms. Terms are per sample [N]; variational terms are in bits per dimension."""

import enum
import math

import numpy as np
import torch as th

from .prediction import ERRORS, TARGETS, ask, check_fit, is_learned, mean_of, read, snr
from .schedules import unknown


class LossType(enum.Enum):
    """What `loss` is made of."""

    MSE = enum.auto()  # mean square, plus the variational term where the variance is learned
    RESCALED_MSE = enum.auto()  # the same, with the variational term times T / 1000
    KL = enum.auto()  # the variational term alone
    RESCALED_KL = enum.auto()  # the variational term times T: an estimate of the whole bound

    def is_vb(self):
        return self in (LossType.KL, LossType.RESCALED_KL)


# Weights of the squared error of x_0, float64 [T] each. `own` is the squared error of what the network says for a
# squared error 1 of x_0, so that dividing by it gives the weight of the network's own squared error.
LOSS_WEIGHTS = {
    "unit": lambda snr, own, sigma_data: own,
    "snr": lambda snr, own, sigma_data: snr,  # what eps-prediction does of itself
    "snr_plus_one": lambda snr, own, sigma_data: snr + 1,  # what v-prediction does (Salimans & Ho 2022, section 4)
    "truncated_snr": lambda snr, own, sigma_data: np.maximum(snr, 1),  # same place
    "min_snr": lambda snr, own, sigma_data: min_snr(snr),
    "soft_min_snr": lambda snr, own, sigma_data: soft_min_snr(snr),
    "p2": lambda snr, own, sigma_data: p2(snr),
    "edm": lambda snr, own, sigma_data: snr + sigma_data**-2,  # Karras et al. 2022, table 1: 1 / c_out^2
}


def min_snr(snr, gamma=5.0):
    """min(SNR, gamma), on the error of x_0 (Hang et al. 2023, arXiv 2303.09556, eq. 8)."""
    return np.minimum(snr, gamma)


def soft_min_snr(snr, gamma=4.0):
    """1 / (sigma^2 + 1 / gamma), on the error of x_0: min-SNR without its corner (Crowson et al. 2024, 2401.11605)."""
    return gamma * snr / (snr + gamma)


def p2(snr, k=1.0, gamma=1.0):
    """SNR / (k + SNR)^gamma on x_0, which is 1 / (k + SNR)^gamma on eps (Choi et al. 2022, arXiv 2204.00227, eq. 9)."""
    return snr / (k + snr) ** gamma


def loss_weights(process, name, mean_type):
    """
    The weight, at each row, of the squared error of what a network of this kind says: float64 [T].

    :param name: a row of LOSS_WEIGHTS.
    :raises ValueError: for an unknown name (with the nearest), or a kind that does not suit the process.
    """
    if name not in LOSS_WEIGHTS:
        raise ValueError(unknown("loss weight", name, LOSS_WEIGHTS))
    check_fit(process, mean_type)
    own = ERRORS[mean_type](process)
    return LOSS_WEIGHTS[name](snr(process), own, process.sigma_data) / own


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
    like = {"dtype": tensors[0].dtype, "device": tensors[0].device}
    logvar1, logvar2 = (th.as_tensor(value, **like) for value in (logvar1, logvar2))
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


def training_losses(process, net, x_start, t, noise, cond, mean_type, var_type, loss_type, weights=None):
    """
    The terms of the training loss, each [N], always with `loss`.

    With a learned variance the mean square trains the mean and the variational term trains only the variance: its
    mean is detached (Improved DDPM, section 3.1). In it x_0 is never clipped.

    :param net: `(x_t, clock, **cond) -> [N, C or 2C, ...]`.
    :param t: [N] rows.
    :param noise: like x_start, or None to draw it.
    :param weights: the name of a table of the process, [T], that multiplies `mse`; None: 1.
    """
    noise = th.randn_like(x_start) if noise is None else noise
    x_t = process.q_sample(x_start, t, noise)
    guess, v = ask(process, net, mean_type, var_type, x_t, t, cond)

    def bound(guess):
        return vb_terms_bpd(process, read(process, mean_type, var_type, guess, v, x_t, t), x_start, x_t, t)

    if loss_type.is_vb():
        return {"loss": bound(guess) * (process.num_timesteps if loss_type is LossType.RESCALED_KL else 1)}
    target = TARGETS[mean_type](process, x_start, x_t, t, noise)
    terms = {"mse": flat_mean((target - guess) ** 2)}
    if weights:
        terms["mse"] = terms["mse"] * process.at(weights, t, terms["mse"])
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
