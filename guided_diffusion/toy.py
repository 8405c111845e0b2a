"""Data whose ideal denoiser is known exactly: samplers and guidance are proved against it."""

import math

import torch as th

from .prediction import VARIANCES, Prediction, eps_from_x0


class Mixture:
    """
    A mixture of Gaussians with diagonal covariances; with std 0, a finite data set.

    Everything about it is known at every noise level: E[x_0 | x_t], p(y | x_t) and its gradient.

    :param means: [K, ...] one mean a component, or the data themselves.
    :param std: standard deviations, a number or broadcastable to means.
    :param weights: [K] probabilities of the components; equal if None.
    :param labels: [K] class of each component; its own number if None.
    """

    def __init__(self, means, std=0.0, weights=None, labels=None):
        self.means = means
        self.var = th.as_tensor(std, dtype=means.dtype).expand(means.shape) ** 2
        count = len(means)
        weights = th.ones(count, dtype=means.dtype) if weights is None else th.as_tensor(weights, dtype=means.dtype)
        self.log_weights = (weights / weights.sum()).log()
        self.labels = th.arange(count) if labels is None else th.as_tensor(labels)

    def draw(self, count, generator=None):
        """(x_0 [count, ...], labels [count])."""
        k = th.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = th.randn(count, *self.means.shape[1:], dtype=self.means.dtype, generator=generator)
        return self.means[k] + self.var[k].sqrt() * noise, self.labels[k]

    def log_density(self, process, x, t, y=None):
        """log p(x_t), or log p(x_t, y): [N]."""
        return self._log_joint(process, x, t, y).logsumexp(1)

    def _log_joint(self, process, x, t, y):
        """log p(x_t, component): [N, K], -inf for components of other classes than y."""
        flat = x.flatten(1)  # [N,D]
        abar = process.at("alphas_cumprod", t, flat[:, :1]).unsqueeze(2)  # [N,1,1]
        spread = abar * self.var.flatten(1) + 1 - abar  # [N,K,D]
        gap = flat.unsqueeze(1) - abar.sqrt() * self.means.flatten(1)  # [N,K,D]
        log_p = -0.5 * (gap**2 / spread + spread.log() + math.log(2 * math.pi)).sum(2) + self.log_weights  # [N,K]
        return log_p if y is None else log_p.masked_fill(self.labels != y.unsqueeze(1), -math.inf)

    def denoise(self, process, x, t, y=None):
        """The mean and variance of p(x_0 | x_t), or of p(x_0 | x_t, y): two tensors like x."""
        share = self._log_joint(process, x, t, y).softmax(1)  # [N,K]
        abar = process.at("alphas_cumprod", t, x).unsqueeze(1)  # [N,1,...]
        gain = abar.sqrt() * self.var / (abar * self.var + 1 - abar)  # [N,K,...]
        mean = self.means + gain * (x.unsqueeze(1) - abar.sqrt() * self.means)
        var = self.var * (1 - gain * abar.sqrt())
        share = share.reshape(*share.shape, *[1] * (x.ndim - 1))
        mixed = (share * mean).sum(1)
        return mixed, (share * (var + (mean - mixed.unsqueeze(1)) ** 2)).sum(1)

    def predictor(self, process, var_type=None):
        """
        The ideal predictor `(x, t, y=None)`: unconditional, or conditional on the classes y [N].

        :param var_type: a fixed ModelVarType; None takes the variance that makes a reverse step's first two moments
            exact, posterior_variance + coef1^2 Var[x_0 | x_t] (Analytic-DPM, Bao et al. 2022, arXiv 2201.06503).
        """

        def predict(x, t, y=None):
            x0, spread = self.denoise(process, x, t, y)
            if var_type is None:
                variance = process.at("posterior_variance", t, x)
                variance = variance + process.at("posterior_mean_coef1", t, x) ** 2 * spread
                log_variance = variance.clamp(min=1e-30).log()
            else:
                variance, log_variance = VARIANCES[var_type](process, x, t, None)
            return Prediction(x0, eps_from_x0(process, x, t, x0), variance, log_variance)

        return predict

    def posterior(self, process, x, t, classes):
        """p(y | x_t) for y in 0..classes-1: [N, classes]."""
        joint = [self._log_joint(process, x, t, th.full((len(x),), y)).logsumexp(1) for y in range(classes)]
        return th.stack(joint, 1).softmax(1)

    def classifier_gradient(self, process, scale=1.0):
        """The exact `(x, t, y) -> scale * gradient of log p(y | x_t)`, like x, t in rows, by differentiation."""

        def grad_fn(x, t, y):
            with th.enable_grad():
                x = x.detach().requires_grad_(True)
                log_p = self.log_density(process, x, t, y) - self.log_density(process, x, t)
                return th.autograd.grad(log_p.sum(), x)[0] * scale

        return grad_fn


def ideal_denoiser(data, labels=None):
    """The best possible denoiser of a finite data set [M, ...]: softmax-weighted means of its points."""
    return Mixture(data, 0.0, labels=labels)


def ring(classes=3, points=9, radius=1.0, std=0.06, dtype=th.float64):
    """A ring of Gaussians in the plane whose classes alternate, so that no class is one blob."""
    angle = th.arange(points, dtype=dtype) * 2 * math.pi / points
    means = radius * th.stack([angle.cos(), angle.sin()], 1)  # [K,2]
    return Mixture(means, std, labels=th.arange(points) % classes)
