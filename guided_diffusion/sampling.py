"""Samplers: the table of step rules, the one driver, and noise that belongs to the sample rather than to the batch.

To add a sampler, write a rule `(step, **options) -> (x at the row it lands on, Prediction)` and name it in SAMPLERS.
"""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch as th

from . import solvers
from .prediction import Prediction, rows_at, settle
from .solvers import Step, ddim, ddim_reverse, ddpm, dpmpp_2m, guided_score, heun
from .spacing import SPACINGS, pick, spaced_rows

__all__ = [
    "SAMPLERS", "SPACINGS", "BrownianNoise", "Sampler", "SeededNoise", "Step", "ddim", "ddim_reverse", "ddpm",
    "dpmpp_2m", "guided_score", "heun", "invert", "plan", "sample",
]  # fmt: skip


@dataclass(frozen=True)
class Sampler:
    """
    A row of SAMPLERS; calling it is calling its rule.

    :param spacing: the rows it prefers, a name in SPACINGS.
    :param evaluations: of the network, for each row kept (None: it depends on the data).
    :param stochastic: whether it adds noise on the way; the others can be walked backwards by `invert`.
    :param one_prediction: whether a step looks at a single prediction, so that guidance may come and go from row to row
        and rows may be walked again.
    """

    rule: Callable
    spacing: str = "log_snr"
    evaluations: int | None = 1
    stochastic: bool = False
    one_prediction: bool = False

    def __call__(self, step, **options):
        return self.rule(step, **options)


SAMPLERS = {
    "ddpm": Sampler(ddpm, "uniform", stochastic=True, one_prediction=True),
    "ddim": Sampler(ddim, "uniform", one_prediction=True),
    "heun": Sampler(heun, "log_snr", evaluations=2),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "dpmpp_2m_sde": Sampler(partial(dpmpp_2m, eta=1.0), stochastic=True),
    "dpmpp_2s": Sampler(solvers.dpmpp_2s),
    "dpmpp_3m": Sampler(solvers.dpmpp_3m),
    "dpm_1": Sampler(solvers.dpm_1, one_prediction=True),
    "dpm_2": Sampler(solvers.dpm_2),
    "dpm_3": Sampler(solvers.dpm_3),
    "unipc": Sampler(solvers.unipc),
    "deis": Sampler(solvers.deis),
    "plms": Sampler(solvers.plms, "quadratic"),
    "euler": Sampler(solvers.euler, "karras", one_prediction=True),
    "euler_ancestral": Sampler(partial(solvers.euler, eta=1.0), "karras", stochastic=True, one_prediction=True),
    "edm": Sampler(solvers.edm, "karras", stochastic=True),
    "gam_mu": Sampler(solvers.gam_mu),
    "adaptive": Sampler(solvers.adaptive, evaluations=None),
}


def plan(process, name, steps=None, spacing=None, **options):
    """
    What a named sampler needs: (step rule, rows of the process to keep with `process.spaced(rows)`, ascending).

    :param steps: how many rows; None keeps all.
    :param spacing: a name in SPACINGS; None takes the sampler's own.
    :param options: of the rule, e.g. eta=0.5.
    :raises ValueError: for unknown names or options, and for a number of steps that the process does not have.
    """
    sampler = pick(SAMPLERS, name, "sampler")
    known = [each for each in inspect.signature(sampler.rule).parameters if each != "step"]
    for option in options:
        if not known:
            raise ValueError(f"the sampler {name} has no options, and so no {option}")
        pick(dict.fromkeys(known), option, f"option of {name}")
    rows = spaced_rows(process, spacing or sampler.spacing, process.num_timesteps if steps is None else steps)
    return partial(sampler.rule, **options), rows


# --------------------------------------------------------------------------------------------------------- driver

def sample(process, predict, rule, x, *, noise=th.randn_like, cond=None, rows=None, upward=False):
    """
    Walk the rows and yield `(x, Prediction)` after each step. Consumers save, plot, measure and show progress.

    :param predict: a predictor `(x, t, **cond) -> Prediction`.
    :param rule: a step rule, e.g. `ddpm` or `functools.partial(ddim, eta=0.5)`.
    :param x: [N, ...] the start, usually N(0, I).
    :param noise: `(x) -> N(0, I)` like x, or a `BrownianNoise`.
    :param cond: what the predictor needs to know besides (x, t), e.g. `{"y": labels}`; never changed.
    :param rows: the rows to visit, default T-1 .. 0; those that a rule takes in one step with others are passed over.
    :param upward: the rows ascend, towards noise: see `invert`.
    :raises ArithmeticError: if a gradient that guides is not finite; on a GPU, which is not waited for at every step,
        only when the walk has ended.
    """
    cond = dict(cond or {})
    history: list[Prediction] = []
    doubts, used, passed = [], 1, 0
    for row in reversed(range(process.num_timesteps)) if rows is None else rows:
        if passed:
            passed -= 1
            continue
        t = rows_at(row, len(x), x.device, doubts)
        draw = _source(noise, process, row, x)
        with th.no_grad():
            now = Step(process, lambda x, t: predict(x, t, **cond), x, t, draw, row, history, upward, used)
            x, pred = rule(now)
        used, passed = now.rows_used, now.rows_used - 1
        history = [*history[-2:], pred]
        yield x, pred
    settle(doubts)


def _source(noise, process, row, x):
    """The `Step.noise` of one step."""
    if not isinstance(noise, BrownianNoise):
        return lambda like=x: noise(like)
    path = itertools.count()  # a second draw in the same step comes from another path
    return lambda like=x: noise.piece(like, process, row, next(path))


def invert(process, predict, x0, rule=ddim_reverse, *, cond=None, refine=3):
    """
    From data to the noise that a deterministic sampler turns into them (DDIM inversion, arXiv 2010.02502, section 4.3):
    the same driver with ascending rows; yields `(x, Prediction)` for each row above 0.

    The way back ends with the network's x_0 at row 0, so x at row 0 is first sought for which that is the data given:
    `refine` times y <- y + data - x_0(y), an evaluation each. With 0 the data stand at row 0 as they are, as in the
    original.

    :param x0: [N, ...] data.
    :param rule: `ddim`, or any rule that adds no noise; the way back takes the same one.
    :raises ValueError: for a rule that adds noise, or a process of a single row.
    """
    if process.num_timesteps < 2:
        raise ValueError("inversion needs a process of two rows or more: one row has nowhere to go up")
    t = th.zeros(len(x0), dtype=th.int64, device=x0.device)
    alpha = process.at("sqrt_alphas_cumprod", t, x0)
    x = alpha * x0 if refine else x0
    with th.no_grad():
        for _ in range(refine):
            pred = guided_score(process, x, t, predict(x, t, **(cond or {})))
            x = x + alpha * (x0 - pred.x0)
    rows = range(process.num_timesteps - 1)
    yield from sample(process, predict, rule, x, noise=_no_noise, cond=cond, rows=rows, upward=True)


def _no_noise(x):
    raise ValueError("this sampler adds noise, which cannot be walked backwards: choose a deterministic one, e.g. ddim")


# ---------------------------------------------------------------------------------------------------------- noise

def _generator(*numbers):
    """A generator seeded by a tuple of whole numbers; numpy's, since torch's on the CPU reads 32 bits of a seed."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def sent(tensor, device):
    """
    A tensor of the host's on a device. A GPU fetches it from pinned memory when its turn comes; from other memory the
    host would have to wait for that, behind all the work that is queued already.
    """
    device = th.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class SeededNoise:
    """
    N(0, I) that is a function of (seed, sample index, number of the draw): the batch a sample sits in, and the
    process that draws it, change nothing.

    :param indices: the global index of each sample of the batch.
    """

    def __init__(self, seed, indices, device="cpu"):
        self.device = th.device(device)
        self.generators = [_generator(seed, index) for index in indices]

    def normal(self, *shape):
        """[N, *shape]; drawn on the host, so that every device sees the same noise."""
        draws = np.stack([g.standard_normal(shape, dtype=np.float32) for g in self.generators])
        return sent(th.from_numpy(draws), self.device)

    def integers(self, high):
        """[N] int64 in 0..high-1."""
        return th.tensor([int(g.integers(high)) for g in self.generators], device=self.device)

    def __call__(self, x):
        return self.normal(*x.shape[1:]).to(x.dtype)


class BrownianNoise:
    """
    Noise that does not depend on the number of steps: increments of one Brownian motion a sample, whose clock is the
    SNR abar / (1 - abar). With more steps of a sampler of the reverse SDE, a sample converges instead of changing.

    That clock is exact: with x_0 known, x sqrt(abar) / (1 - abar) = SNR x_0 + B(SNR) for every reverse step of `ddpm`,
    `ddim` with eta = 1 and `dpmpp_2m_sde`. The path is a function of (seed, sample index), and has its values at the
    rows of `process`; a step between kept rows takes the sum of the pieces between. Its draws are none of
    `SeededNoise`'s, so the start may come from there with the same seed.

    :param process: the process of all rows; walks are over the same or over `process.spaced(rows)`.
    :param indices: the global index of each sample of the batch.
    """

    def __init__(self, seed, indices, process, device="cpu"):
        self.seed, self.indices = seed, list(indices)
        self.device = th.device(device)
        self.snr = _snr(process)

    def piece(self, like, process, row, path=0):
        """
        The path between row and row - 1 of a (spaced) process, scaled to N(0, I), like `like`; zero below row 0.

        :raises ValueError: if the process has a row that the path's has not.
        """
        if row == 0:
            return th.zeros_like(like)
        first, last = (self._find(_snr(process)[each]) for each in (row, row - 1))
        gaps = np.sqrt(-np.diff(self.snr[last : first + 1]))  # from the cleaner end
        total = 0
        for number, gap in zip(range(last, first), gaps / np.sqrt((gaps**2).sum())):
            draws = [self._normal(index, number, path, like) for index in self.indices]
            total = total + float(gap) * th.stack(draws)
        return total

    def _normal(self, index, number, path, like):
        # The place of a row is never 0: trailing zeros do not change a seed, and SeededNoise's are (seed, index).
        draw = _generator(self.seed, index, number + 1, path).standard_normal(like.shape[1:], dtype=np.float32)
        return sent(th.from_numpy(np.asarray(draw)), self.device).to(like.dtype)

    def _find(self, snr):
        row = int(np.abs(self.snr - snr).argmin())
        if not np.isclose(self.snr[row], snr, rtol=1e-6, atol=0):
            raise ValueError(
                f"the process walked has a row of SNR {snr:.6g} that the path's process does not have: "
                "space the walked process from the one that BrownianNoise was given"
            )
        return row


def _snr(process):
    return process.alphas_cumprod / (1 - process.alphas_cumprod)
