"""
Which timesteps to train on: uniform, more often where the loss is large (Improved DDPM, section 3.3), or as EDM does.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch as th
import torch.distributed as dist


def create_named_schedule_sampler(name, diffusion):
    """
    :param name: a row of SCHEDULE_SAMPLERS.
    :param diffusion: a process; all but lognormal look at its `num_timesteps` only.
    :raises NotImplementedError: for another name.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise NotImplementedError(f"unknown schedule sampler: {name} (choose from {', '.join(SCHEDULE_SAMPLERS)})")
    return SCHEDULE_SAMPLERS[name](diffusion)


class ScheduleSampler(ABC):
    """A distribution over rows; importance weights keep the mean of the loss what uniform sampling gives."""

    @abstractmethod
    def weights(self):
        """[T] weights, none negative, not necessarily normalized."""

    def sample(self, batch_size, device, rng=None):
        """
        :param rng: a numpy Generator; numpy's global one if None.
        :return: (rows int64 [N], importance weights 1 / (T p) float32 [N]).
        """
        weights = self.weights()
        p = weights / np.sum(weights)
        rows = (np.random if rng is None else rng).choice(len(p), size=(batch_size,), p=p)
        importance = 1 / (len(p) * p[rows])
        return (th.from_numpy(rows).long().to(device, non_blocking=True),
                th.from_numpy(importance).float().to(device, non_blocking=True))  # fmt: skip


class UniformSampler(ScheduleSampler):
    def __init__(self, diffusion):
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self):
        return self._weights


class LognormalSampler(ScheduleSampler):
    """
    Rows by EDM's noise levels in training, ln sigma ~ N(mean, std^2) (Karras et al. 2022, arXiv 2206.00364, table 1):
    each row has the probability of the levels that are nearer to it, in ln sigma, than to other rows.

    The weights it returns are all 1. This is no importance sampling of the uniform objective, which 1 / (T p) would
    restore and so undo: where to train is part of EDM's objective, whose loss is lambda(sigma) times the squared error
    with sigma drawn like this (--loss_weight edm is lambda).

    :param diffusion: a process with `sqrt_recipm1_alphas_cumprod`, its sigmas, ascending.
    """

    def __init__(self, diffusion, mean=-1.2, std=1.2):
        level = np.log(diffusion.sqrt_recipm1_alphas_cumprod)
        between = (level[1:] + level[:-1]) / 2
        below = [0.5 * (1 + math.erf((edge - mean) / (std * math.sqrt(2)))) for edge in between]
        self._weights = np.diff([0.0, *below, 1.0])

    def weights(self):
        return self._weights

    def sample(self, batch_size, device, rng=None):
        rows, weights = super().sample(batch_size, device, rng)
        return rows, th.ones_like(weights)


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses of all processes."""

    def update_with_local_losses(self, local_ts, local_losses):
        """
        Gather (row, loss) pairs over all processes, so that all keep the same history, and learn from them.

        :param local_ts: [N] rows; N may differ between processes.
        :param local_losses: [N].
        """
        pairs = [(local_ts.tolist(), local_losses.tolist())]
        if dist.is_available() and dist.is_initialized():
            mine, pairs = pairs[0], [None] * dist.get_world_size()
            dist.all_gather_object(pairs, mine)
        # In the order of the whole batch, of which rank r has every place k * ranks + r.
        self.update_with_all_losses(*(_interleaved([pair[kind] for pair in pairs]) for kind in (0, 1)))

    @abstractmethod
    def update_with_all_losses(self, ts, losses):
        """Learn from lists of rows and losses; must be deterministic, since every process does it alone."""


class LossSecondMomentResampler(LossAwareSampler):
    """p proportional to sqrt(E[loss^2]) over the last losses of each row, once every row has enough of them."""

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term], dtype=np.float64)
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self):
        if not self._warmed_up():
            return np.ones(len(self._loss_counts), dtype=np.float64)
        weights = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        weights /= np.sum(weights)
        return weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses):
            if not np.isfinite(loss):  # of a step that will be skipped
                continue
            # A ring: the oldest entry makes room. Their order does not matter to the second moment.
            self._loss_history[t, self._loss_counts[t] % self.history_per_term] = loss
            self._loss_counts[t] += 1

    def state(self):
        """What to keep for a resumed run, as tensors."""
        return {"history": th.from_numpy(self._loss_history.copy()), "counts": th.from_numpy(self._loss_counts.copy())}

    def load_state(self, state):
        """
        Take up what `state` gave.

        :raises ValueError: if it is of a process with other steps.
        """
        history, counts = (state[name].cpu().numpy() for name in ("history", "counts"))
        if history.shape != self._loss_history.shape:
            raise ValueError(f"the history of losses has shape {history.shape}, this run's {self._loss_history.shape}")
        self._loss_history, self._loss_counts = history.copy(), counts.copy()

    def _warmed_up(self):
        return (self._loss_counts >= self.history_per_term).all()


def _interleaved(lists):
    """[[a0, a1], [b0, b1]] -> [a0, b0, a1, b1]; shorter lists end earlier."""
    return [part[k] for k in range(max(map(len, lists))) for part in lists if k < len(part)]


SCHEDULE_SAMPLERS = {
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentResampler,
    "lognormal": LognormalSampler,
}
