"""Data whose ideal denoiser is known exactly: samplers and guidance are proved against it."""

import math

import torch as th
from torch.utils.data import Dataset

from .prediction import VARIANCES, Prediction, eps_from_x0

ANY = -1  # the class that stands for every class


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
        like = {"dtype": means.dtype, "device": means.device}
        self.var = th.as_tensor(std, **like).expand(means.shape) ** 2
        weights = th.ones(len(means), **like) if weights is None else th.as_tensor(weights, **like)
        self.log_weights = (weights / weights.sum()).log()
        labels = th.arange(len(means)) if labels is None else th.as_tensor(labels)
        self.labels = labels.to(means.device)

    def draw(self, count, generator=None):
        """(x_0 [count, ...], labels [count])."""
        k = th.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = th.randn(count, *self.means.shape[1:], dtype=self.means.dtype, generator=generator)
        return self.means[k] + self.var[k].sqrt() * noise, self.labels[k]

    def log_density(self, process, x, t, y=None):
        """log p(x_t), or log p(x_t, y): [N]."""
        _, var = noise = self._noise(process, x, t)
        return self._log_joint(*noise, x, y).logsumexp(1) - x[0].numel() / 2 * (2 * math.pi * var.flatten()).log()

    @staticmethod
    def _noise(process, x, t):
        """x_t = keep x_0 + sqrt(var) eps: (keep, var), each [N,1]."""
        like = x.flatten(1)[:, :1]
        return process.at("sqrt_alphas_cumprod", t, like), 1 - process.at("alphas_cumprod", t, like)

    def _log_joint(self, keep, var, x, y):
        """
        log p(x_t, component) + D/2 log(2 pi var): [N, K], -inf for components of other classes than y.

        The constant drops out of every share; left in, it would cost the shares of float32 data their digits.
        """
        return th.cat([self._log_part(part, keep, var, x, y) for part in self._parts(x)], 1)

    def _log_part(self, part, keep, var, x, y):
        gap = self._gap(part, keep, x)  # [N,k,D]
        spread = (keep**2).unsqueeze(2) * self.var[part].flatten(1) + var.unsqueeze(2)  # [N,k,D]
        log_p = -0.5 * (gap**2 / spread + (spread / var.unsqueeze(2)).log()).sum(2) + self.log_weights[part]
        if y is None:
            return log_p
        y = y.unsqueeze(1)  # [N,1]
        return log_p.masked_fill((self.labels[part] != y) & (y != ANY), -math.inf)

    def _gap(self, part, keep, x):
        """x - keep mean, subtracted directly, since |x|^2 - 2 x mean + |mean|^2 cancels: [N, k, D]."""
        return x.flatten(1).unsqueeze(1) - keep.unsqueeze(2) * self.means[part].flatten(1)

    def _parts(self, x):
        """Slices of the components, few enough at a time for [N, k, D] to have at most 2^24 elements."""
        size = max(1, 2**24 // max(1, x.numel()))
        return [slice(first, first + size) for first in range(0, len(self.means), size)]

    def noise_at(self, sigma, x, y=None):
        """
        E[eps | x] where x = x_0 + sigma eps: like x. Its memory does not grow with the number of components.

        :param sigma: [N], above 0.
        :param y: [N] classes; -1 stands for any.
        """
        keep, var = th.ones_like(sigma).unsqueeze(1), (sigma**2).unsqueeze(1)  # [N,1]
        share = self._log_joint(keep, var, x, y).softmax(1)  # [N,K]
        total = 0
        for part in self._parts(x):
            noise = self._gap(part, keep, x) / (self.var[part].flatten(1) + var.unsqueeze(2))  # [N,k,D], E[eps] / sigma
            total = total + th.einsum("nk,nkd->nd", share[:, part], noise)
        return (sigma.unsqueeze(1) * total).view_as(x)

    def denoise(self, process, x, t, y=None):
        """The mean and variance of p(x_0 | x_t), or of p(x_0 | x_t, y): two tensors like x."""
        share = self._log_joint(*self._noise(process, x, t), x, y).softmax(1)  # [N,K]
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
        joint = [self.log_density(process, x, t, th.full((len(x),), y, device=x.device)) for y in range(classes)]
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


# ----------------------------------------------------------------------------------------------- points in the plane

class Points(Dataset):
    """
    A finite data set: items are points `vals[i]`, or pairs (point, label) where there are labels.

    :param vals: [N, ...].
    :param labels: [N], or None.
    """

    def __init__(self, vals, labels=None):
        self.vals, self.labels = vals, labels

    def __len__(self):
        return len(self.vals)

    def __getitem__(self, i):
        return self.vals[i] if self.labels is None else (self.vals[i], self.labels[i])


class Swissroll(Points):
    """
    N points on the spiral (t cos t, t sin t) / tmax, at even steps of the angle t.

    :param tmin, tmax: the first and the last angle, in radians; the roll ends at radius `scale`.
    :param center: where the spiral winds out of.
    """

    def __init__(self, tmin, tmax, N, center=(0.0, 0.0), scale=1.0):
        t = th.linspace(tmin, tmax, N)
        roll = th.stack([t * t.cos(), t * t.sin()], 1) / tmax  # [N,2]
        super().__init__(scale * roll + th.tensor(center))


class TreeDataset(Points):
    """
    A tree seen from above: branches leave the origin in every direction and divide; each level is shorter than the last
    and fans out less. A point's label is its first branch.

    :param branching_factor: branches at each fork, and so the number of classes.
    :param depth: levels.
    :param num_samples_per_path: points on each branch, evenly spaced.
    :param shrink: length of a branch over that of its parent; the first has length 1 - shrink, so that all stay
        within radius 1.
    """

    def __init__(self, branching_factor=4, depth=3, num_samples_per_path=30, shrink=0.5):
        share = th.linspace(0, 1, num_samples_per_path + 1)[1:]  # along a branch, without its root
        points, labels = [], []
        tips, angle, fan = th.zeros(1, 2), th.zeros(1), 2 * math.pi
        for level in range(depth):
            turn = (th.arange(branching_factor) - (branching_factor - 1) / 2) * fan / branching_factor
            angle = (angle[:, None] + turn).flatten()  # [branches]
            reach = (1 - shrink) * shrink**level * th.stack([angle.cos(), angle.sin()], 1)  # [branches,2]
            roots = tips.repeat_interleave(branching_factor, 0)
            points.append((roots[:, None] + share[:, None] * reach[:, None]).flatten(0, 1))
            label = th.arange(len(angle)) // branching_factor**level
            labels.append(label.repeat_interleave(num_samples_per_path))
            tips, fan = roots + reach, fan / 2
        super().__init__(th.cat(points), th.cat(labels))


# Our own drawing of a long-necked dinosaur, from the snout along the back to the tail and home under the belly.
SAUROPOD = (
    (-98, 62), (-94, 71), (-83, 76), (-73, 71), (-68, 58), (-63, 38), (-54, 20), (-38, 14), (-18, 20), (4, 21),
    (26, 13), (43, 0), (62, -12), (83, -17), (100, -16), (84, -25), (62, -25), (42, -21), (37, -34), (37, -56),
    (25, -56), (24, -36), (16, -26), (-8, -27), (-24, -24), (-28, -36), (-28, -56), (-40, -56), (-41, -34),
    (-48, -14), (-62, 0), (-73, 20), (-78, 42), (-82, 57),
)  # fmt: skip


class Sauropod(Points):
    """N points on the outline of a dinosaur, evenly spaced along it, within [-1, 1]."""

    def __init__(self, N=400):
        corners = th.tensor(SAUROPOD) / 100  # [V,2]
        sides = corners.roll(-1, 0) - corners
        ends = sides.norm(dim=1).cumsum(0)  # [V] length of the outline up to the end of each side
        place = th.arange(N) * ends[-1] / N
        side = th.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)
        left = (ends[side] - place) / sides[side].norm(dim=1)  # share of the side still to go
        super().__init__(corners[side] + (1 - left)[:, None] * sides[side])
