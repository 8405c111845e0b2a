"""The same process read by its noise level: x = x_0 + sigma eps, sigma = sqrt(1 / abar - 1).

A sigma model is `model(x, sigma, cond=None)`, like x; sigma is a scalar or [N,1,..,1]. Its x is x_t / sqrt(abar) of the
rest of the project. Schedules are readings of a `Process`, `samples` walks on the one driver, and adapters lead both
ways: `as_sigma_model` and `sigma_predictor`. The view, its names and its sampler family follow Permenter & Yuan
(2023, arXiv 2306.04848).
"""

import copyreg
import warnings
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch as th
from torch import nn

from . import sampling, schedules, solvers
from .prediction import (
    VARIANCES,
    ModelMeanType,
    ModelVarType,
    Prediction,
    split_output,
    x0_from_eps,
    x0_from_previous,
)
from .process import Process


def alpha(sigma):
    """abar at noise level sigma: 1 / (1 + sigma^2)."""
    return 1 / (1 + sigma**2)


def sigma_of(abar):
    """The noise level at abar, the inverse of `alpha`."""
    return (1 / abar - 1) ** 0.5


def positive(sigma):
    """sigma as it is. Raises ValueError unless every noise level is above 0."""
    if not (sigma > 0).all():
        raise ValueError(
            f"a model was asked for noise level {float(sigma.min()):g}: ln(sigma) and 1/sigma need sigma above 0 "
            "(clean data need no prediction; a walk of samples may end at 0, as its last step starts above it)"
        )
    return sigma


def over(sigma, x):
    """sigma, a number, a scalar, [N] or [N,1,..,1], in x's dtype and on its device, as [1 or N, 1, .., 1]."""
    sigma = th.as_tensor(sigma).to(x)
    if sigma.numel() not in (1, len(x)):
        raise ValueError(f"sigma holds {sigma.numel()} noise levels for {len(x)} samples: give one, or one for each")
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


@contextmanager
def evaluating(model):
    """Evaluation mode inside; afterwards each sub-module is in the mode it was in."""
    modes = [(module, module.training) for module in getattr(model, "modules", list)()]
    for module, _ in modes:
        module.training = False
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


# ------------------------------------------------------------------------------------------- what a sigma model is

class ModelMixin:
    """
    What a sigma model can do besides `forward(x, sigma, cond=None)`, whose output is by default the noise.

    `input_dims` is the shape of one sample. A conditional model has `cond_embed`, with either `null(cond)`, the
    condition that stands for none, like cond, or `null_cond`, the label that does.
    """

    def rand_input(self, batchsize, generator=None):
        """N(0, I): [batchsize, *input_dims], in the dtype and on the device of the model's first tensor."""
        if not hasattr(self, "input_dims"):
            raise ValueError(f"{type(self).__name__} has no input_dims: set it to the shape of one sample, e.g. (2,)")
        like = next((p for p in [*self.parameters(), *self.buffers()] if p.is_floating_point()), th.empty(0))
        return th.randn(batchsize, *self.input_dims, dtype=like.dtype, device=like.device, generator=generator)

    def target(self, x0, sigma, eps):
        """What forward is trained to give at x_0 + sigma eps."""
        return eps

    def read_eps(self, x, sigma, output):
        """The noise that forward's output at (x, sigma) stands for."""
        return output

    def get_loss(self, x0, sigma, eps, cond=None, loss=nn.MSELoss, weight=None):
        """
        The training loss: a scalar.

        Unweighted, each model's loss is in its own space. A square there is the square in eps times sigma^2 for PredX0,
        times 1 + sigma^2 for PredV: `weight` makes another choice.

        :param loss: a class of torch's losses.
        :param weight: `sigma -> weights` like sigma, or None for 1.
        """
        if cond is not None and hasattr(getattr(self, "cond_embed", None), "check_data"):
            self.cond_embed.check_data(cond)
        sigma = over(sigma, x0)
        output, target = self(x0 + sigma * eps, sigma, cond=cond), self.target(x0, sigma, eps)
        if weight is None:
            return loss()(output, target)
        return (weight(sigma) * loss(reduction="none")(output, target)).mean()

    def predict_eps(self, x, sigma, cond=None):
        """The noise in x, like x."""
        return self.read_eps(x, sigma, self(x, sigma, cond=cond))

    def null_like(self, cond):
        """The condition that stands for none, in place of each of cond. Raises ValueError if the model has none."""
        embed = getattr(self, "cond_embed", None)
        if hasattr(embed, "null"):
            return embed.null(cond)
        if hasattr(embed, "null_cond"):
            return th.full_like(cond, embed.null_cond)
        raise ValueError(
            f"classifier-free guidance needs an unconditional branch, and {type(self).__name__} has no null condition: "
            "give it a cond_embed with null_cond, or use cfg_scale 0"
        )

    def predict_eps_cfg(self, x, sigma, cond=None, cfg_scale=0.0):
        """
        eps_c + w (eps_c - eps_u) in one call with twice the batch (Ho & Salimans 2022, arXiv 2207.12598, eq. 6).

        Conditions are not dropped, in whichever mode the model is.

        :param sigma: scalar or [N,1,..,1].
        :param cfg_scale: w; 0, or no condition, is plain `predict_eps`.
        """
        with evaluating(getattr(self, "cond_embed", None)):
            if cond is None or cfg_scale == 0:
                return self.predict_eps(x, sigma, cond=cond)
            twice = over(sigma, x).expand(len(x), *[1] * (x.ndim - 1)).repeat(2, *[1] * (x.ndim - 1))
            eps = self.predict_eps(th.cat([x, x]), twice, cond=_joined(cond, self.null_like(cond)))
        given, free = eps.chunk(2)
        return given + cfg_scale * (given - free)


def _joined(cond, null):
    if isinstance(cond, dict):
        return {name: th.cat([value, null[name]]) for name, value in cond.items()}
    return th.cat([cond, null])


# ------------------------------------------------------------------------------------------------------- modifiers

class Modified(type):
    """The type of modified classes; it lets pickle find them, and their instances, by their recipe."""


def _recipe(cls):
    return (cls.modifier, (cls.original,)) if "modifier" in vars(cls) else cls.__qualname__


copyreg.pickle(Modified, _recipe)


def _modified(modifier, methods, cls, excluded):
    """The class `cls` with `methods` in front, named as cls with the modifier's name behind it."""
    if issubclass(cls, excluded):
        raise TypeError(f"{modifier.__name__} of {cls.__name__}: it already has {excluded.__doc__.lower()}")
    suffix = modifier.__name__
    space = {"__module__": cls.__module__, "__qualname__": cls.__qualname__ + suffix, "__doc__": methods.__doc__}
    space.update(modifier=staticmethod(modifier), original=cls)
    return Modified(cls.__name__ + suffix, (methods, cls), space)


class _HasScale:
    """A scale of its input"""


class _Scaled(_HasScale):
    """Its network sees x / sqrt(1 + sigma^2), which has the variance of data of variance 1; its callers see x."""

    def forward(self, x, sigma, cond=None):
        return super().forward(x * alpha(over(sigma, x)).sqrt(), sigma, cond=cond)


class _HasReading:
    """A reading of its output"""


class _PredX0(_HasReading):
    """Its output is the clean x_0."""

    def target(self, x0, sigma, eps):
        return x0

    def read_eps(self, x, sigma, output):
        return (x - output) / positive(over(sigma, x))


class _PredV(_HasReading):
    """Its output is v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, arXiv 2202.00512)."""

    def target(self, x0, sigma, eps):
        return alpha(sigma).sqrt() * (eps - sigma * x0)

    def read_eps(self, x, sigma, output):
        sigma = over(sigma, x)
        keep = alpha(sigma).sqrt()
        return keep * (output + sigma * keep * x)


@cache
def Scaled(cls):
    """The class of models like `cls` whose network sees x / sqrt(1 + sigma^2), of about unit variance."""
    return _modified(Scaled, _Scaled, cls, _HasScale)


@cache
def PredX0(cls):
    """The class of models like `cls` that put out x_0."""
    return _modified(PredX0, _PredX0, cls, _HasReading)


@cache
def PredV(cls):
    """The class of models like `cls` that put out v. It reads the unscaled x, so Scaled may come before or after."""
    return _modified(PredV, _PredV, cls, _HasReading)


# ------------------------------------------------------------------------------------------------------- schedules

def process_of(sigmas):
    """
    The process whose rows have these noise levels.

    :param sigmas: [T] ascending, above 0.
    :raises ValueError: if they are not.
    """
    sigmas = np.asarray(th.as_tensor(sigmas).detach().cpu(), dtype=np.float64)
    if sigmas.ndim != 1 or not len(sigmas) or not sigmas[0] > 0 or not (np.diff(sigmas) > 0).all():
        raise ValueError(f"noise levels must ascend from above 0, unlike {sigmas.ravel()[:5]}")
    return Process(schedules.betas_from_abar(schedules.abar_from_sigma(sigmas)))


def levels_of(process):
    """The noise levels of a process's rows: float64 numpy [T]. Raises ValueError if one of them is infinite."""
    levels = process.sqrt_recipm1_alphas_cumprod
    if not np.isfinite(levels).all():
        raise ValueError("a process that ends in pure noise (abar 0) has an infinite sigma: leave out its last row")
    return levels


class Schedule:
    """
    The noise levels of a process, ascending: `schedule[i]`, `len(schedule)`, `schedule.sigmas` (float32 [N]).

    :param source: a Process (any of our diffusions is one), or the noise levels, ascending, above 0.
    """

    def __init__(self, source):
        self.process = source if isinstance(source, Process) else process_of(source)
        self.sigmas = th.as_tensor(levels_of(self.process)).float()

    def __getitem__(self, i):
        return self.sigmas[i]

    def __len__(self):
        return len(self.sigmas)

    def sample_sigmas(self, steps, to_zero=False):
        """
        The noise levels of a walk of `steps` steps, from the largest down, with trailing spacing: [steps+1].

        :param to_zero: end at clean data instead of at the smallest noise level.
        :raises ValueError: unless 1 <= steps <= len(self).
        """
        if not 1 <= steps <= len(self):
            raise ValueError(f"a walk over {len(self)} noise levels has 1..{len(self)} steps, not {steps}")
        rows = (len(self) * (1 - np.arange(steps) / steps)).round().astype(np.int64) - 1
        last = th.zeros(1) if to_zero else self.sigmas[:1]
        return th.cat([self.sigmas[rows], last])

    def sample_batch(self, x0):
        """Noise levels drawn uniformly from the schedule for training on x0 [N, ...]: [N], like x0."""
        return self.sigmas[th.randint(len(self), (len(x0),))].to(x0)


def _as_given(rule, N, beta_start, beta_end):
    """A process whose betas have these very ends; the named schedules scale theirs from 1000 steps to N."""
    return Process(rule(N, beta_start * N / 1000, beta_end * N / 1000))


class ScheduleLogLinear(Schedule):
    """N noise levels at even steps of their logarithm."""

    def __init__(self, N, sigma_min=0.02, sigma_max=10):
        super().__init__(Process(schedules.log_linear(N, sigma_min, sigma_max)))


class ScheduleDDPM(Schedule):
    """The linear betas of DDPM (Ho et al. 2020, arXiv 2006.11239)."""

    def __init__(self, N=1000, beta_start=1e-4, beta_end=0.02):
        super().__init__(_as_given(schedules.linear, N, beta_start, beta_end))


class ScheduleLDM(Schedule):
    """The betas of latent diffusion, linear in their root (Rombach et al. 2022, arXiv 2112.10752)."""

    def __init__(self, N=1000, beta_start=0.00085, beta_end=0.012):
        super().__init__(_as_given(schedules.sqrt_linear, N, beta_start, beta_end))


class ScheduleCosine(Schedule):
    """The cosine schedule of Improved DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672)."""

    def __init__(self, N=1000):
        super().__init__(Process(schedules.cosine(N)))


class ScheduleSigmoid(Schedule):
    """Betas along a sigmoid from -6 to 6, as in GeoDiff (Xu et al. 2022, arXiv 2203.02923)."""

    def __init__(self, N=1000, beta_start=1e-4, beta_end=0.02):
        super().__init__(_as_given(schedules.sigmoid_beta, N, beta_start, beta_end))


def check_embeddings(model, sigmas):
    """Warn if a model embeds noise so that two levels within the range of sigmas look the same to it."""
    low, high = float(sigmas[sigmas > 0].min()), float(sigmas.max())
    for module in getattr(model, "modules", list)():
        usable = module.largest_scaling(low, high) if hasattr(module, "largest_scaling") else float("inf")
        if usable <= getattr(module, "scaling_factor", 0):
            warnings.warn(
                f"the embedding of sigma repeats itself within {low:.3g} .. {high:.3g}: with scaling_factor "
                f"{module.scaling_factor:g} different noise levels look the same; use one below {usable:.3g}",
                stacklevel=3,
            )


# -------------------------------------------------------------------------------------------------------- adapters

def sigma_predictor(process, model, cfg_scale=0.0, var_type=ModelVarType.FIXED_SMALL):
    """
    A sigma model as a predictor `(x, t, **cond) -> Prediction`, for every sampler and guidance of the project.

    The condition is `cond` or the labels `y`; other names reach the model as a dict. The model is in evaluation mode
    while it is asked, and in its own before and after.

    :param cfg_scale: as in `predict_eps_cfg`.
    :param var_type: a fixed ModelVarType.
    """

    def predict(x, t, cond=None, **named):
        if named:
            cond = named["y"] if set(named) == {"y"} else named
        sigma = process.at("sqrt_recipm1_alphas_cumprod", t, over(t, x))  # [N,1,..,1]
        with evaluating(model):
            eps = model.predict_eps_cfg(x * process.at("sqrt_recip_alphas_cumprod", t, x), sigma, cond, cfg_scale)
        return Prediction(x0_from_eps(process, x, t, eps), eps, *VARIANCES[var_type](process, x, t, None))

    return predict


# What a network's output says about the noise in x at level sigma.
_READ_EPS = {
    ModelMeanType.EPSILON: ModelMixin.read_eps,
    ModelMeanType.START_X: _PredX0.read_eps,
    ModelMeanType.VELOCITY: _PredV.read_eps,
}


class SigmaModel(nn.Module, ModelMixin):
    """One of our networks as a sigma model; built by `as_sigma_model`."""

    def __init__(self, model, diffusion, clock, null_cond, input_dims):
        super().__init__()
        self.model, self.diffusion, self.clock = model, diffusion, clock
        if null_cond is not None:
            self.cond_embed = SimpleNamespace(null_cond=null_cond)
        if input_dims is not None:
            self.input_dims = tuple(input_dims)
        self._log_sigma = np.log(levels_of(diffusion))

    def rows(self, sigma):
        """The row of each noise level [N], between rows where it lies between theirs, 0 or T-1 beyond: float64 [N]."""
        log_sigma = np.log(sigma.detach().double().cpu().numpy())
        where = np.interp(log_sigma, self._log_sigma, np.arange(len(self._log_sigma)))
        nearest = where.round()
        # A float32 sigma of a row is that row.
        at_row = (np.abs(where - nearest) < 1e-3) | (self.clock == "nearest")
        return np.where(at_row, nearest, where)

    def forward(self, x, sigma, cond=None):
        """The noise in x, like x. cond: labels, which the network knows as y, or a dict of what it is to be given."""
        sigma = positive(over(sigma, x)).expand(len(x), *[1] * (x.ndim - 1))  # [N,1,..,1]
        rows = self.rows(sigma.flatten())
        cond = cond if isinstance(cond, dict) else {} if cond is None else {"y": cond}
        if self.diffusion.model_mean_type is ModelMeanType.EDM:
            return self._edm_eps(x, sigma, cond)
        scaled = x * alpha(sigma).sqrt()
        output = self.model(scaled, self._told(rows, x.device), **cond)
        guess, _ = split_output(output, x, self.diffusion.model_var_type)
        mean_type = self.diffusion.model_mean_type
        if mean_type is ModelMeanType.PREVIOUS_X:
            x0 = x0_from_previous(self.diffusion, scaled, th.as_tensor(rows, device=x.device).long(), guess)
            return (x - x0) / sigma
        return _READ_EPS[mean_type](self, x, sigma, guess)

    def _edm_eps(self, x, sigma, cond):
        """EDM's network knows noise levels, not rows (Karras et al. 2022, table 1)."""
        data = self.diffusion.sigma_data
        spread = (sigma**2 + data**2).sqrt()
        output = self.model(x / spread, sigma.flatten().log() / 4, **cond)
        guess, _ = split_output(output, x, self.diffusion.model_var_type)
        x0 = (data / spread) ** 2 * x + sigma * data / spread * guess
        return (x - x0) / sigma

    def _told(self, rows, device):
        """The network's clock at rows: its own numbers, interpolated (float32) unless each of them is a row."""
        if (rows == rows.round()).all():
            return self.diffusion.clock(th.as_tensor(rows, device=device).long())
        steps = np.interp(rows, np.arange(self.diffusion.num_timesteps), self.diffusion.timesteps)
        return th.as_tensor(steps, device=device, dtype=th.float32)


def as_sigma_model(model, diffusion, clock="interpolated", null_cond=None, input_dims=None):
    """
    One of our networks as a sigma model, for anything that speaks `(x, sigma, cond)`. It shares the network's weights.

    :param diffusion: a GaussianDiffusion: the rows the network was trained on, and what it predicts.
    :param clock: what the network is told between rows: "interpolated" in log sigma, or the "nearest" row.
        Beyond the first and last row it is told those.
    :param null_cond: the label that means no label, for classifier-free guidance.
    :param input_dims: shape of a sample; read off a U-Net, and otherwise needed only by `rand_input`.
    :raises ValueError: for another clock, or between-row clocks for a network that predicts the previous x, whose
        output has a meaning at rows only.
    """
    if clock not in ("interpolated", "nearest"):
        raise ValueError(f"unknown clock {clock!r} (choose interpolated or nearest)")
    if diffusion.model_mean_type is ModelMeanType.PREVIOUS_X and clock != "nearest":
        raise ValueError("a network that predicts the previous x knows its rows only: use clock='nearest'")
    if input_dims is None and hasattr(model, "image_size"):
        size = model.image_size
        input_dims = (model.in_channels, *(size if isinstance(size, tuple) else [size] * model.dims))
    return SigmaModel(model, diffusion, clock, null_cond, input_dims)


# -------------------------------------------------------------------------------------------------------- sampling

def _falling(sigmas):
    levels = th.as_tensor(sigmas).detach().double().cpu()
    if levels.ndim == 1 and len(levels) > 1 and (levels.diff()[:-1] < 0).all() and 0 <= levels[-1] <= levels[-2] != 0:
        return levels
    raise ValueError(f"noise levels must fall from the first to the last, at least two of them: {levels.tolist()}")


def samples(model, sigmas, gam=1.0, mu=0.0, cfg_scale=0.0, batchsize=1, xt=None, cond=None, noise=th.randn_like):
    """
    Sample a sigma model along falling noise levels: yields x [N, ...] after each step; the last is the sample.

    :param sigmas: [steps+1] falling, e.g. `schedule.sample_sigmas(20)`; only the last may be 0, and only it may repeat
        the one before. A walk that ends above 0 leaves noise of that level in the sample.
    :param gam, mu: the sampler, see `solvers.gam_mu`; noise is drawn once a step if mu > 0, and never if it is 0.
    :param cfg_scale: w of classifier-free guidance, which acts at every step.
    :param batchsize: how many, if `xt` is not given.
    :param xt: where to start, [N, ...], at noise level sigmas[0]; by default sigmas[0] N(0, I).
    :param cond: what the model is conditioned on, [N, ...].
    :param noise: `(x) -> N(0, I)` like x.
    :raises ValueError: for noise levels that do not fall, and for conditions of another number than the samples.
    """
    levels = _falling(sigmas)
    rising = levels.flip(0).unique()  # 0 is no row: from row 0 the next is clean data
    process = process_of(rising[rising > 0])
    x = model.rand_input(batchsize) * float(levels[0]) if xt is None else xt
    if isinstance(cond, th.Tensor):
        if len(cond) != len(x):
            raise ValueError(f"{len(cond)} conditions for {len(x)} samples: give one for each")
        cond = cond.to(x.device)
    check_embeddings(model, levels)
    predict, rule = sigma_predictor(process, model, cfg_scale), partial(solvers.gam_mu, gam=gam, mu=mu)
    start = x * float(alpha(levels[0])) ** 0.5
    walk = sampling.sample(process, predict, rule, start, noise=noise, cond={"cond": cond})
    for level, after in pairwise(levels):
        if after < level:
            x = next(walk)[0] / float(alpha(after)) ** 0.5
        yield x


# -------------------------------------------------------------------------------------------------------- training

def generate_train_sample(batch, schedule, conditional=False):
    """
    What a training step needs: (x_0 [N, ...], sigma [N,1,..,1], eps like x_0, cond or None).

    :param batch: x_0, or (x_0, cond).
    :param conditional: whether the condition is wanted; a batch of pairs may be used without.
    :raises ValueError: if it is wanted and missing.
    """
    paired = isinstance(batch, (tuple, list))
    if conditional and not paired:
        raise ValueError("conditional training needs batches (x0, cond), and the loader gives x0 alone")
    x0, cond = batch[:2] if paired and len(batch) > 1 else (batch[0] if paired else batch, None)
    return x0, over(schedule.sample_batch(x0), x0), th.randn_like(x0), cond if conditional else None


def training_loop(loader, model, schedule, epochs=10000, lr=1e-3, conditional=False, weight=None):
    """
    Train a sigma model with AdamW: yields, after each step, a namespace of step, loss (a detached scalar), x0, sigma,
    eps, cond, model and optimizer. The caller logs, stops and saves.

    :param loader: iterable of batches, gone through `epochs` times.
    :param conditional: train with the condition in each batch (x0, cond).
    :param weight: as in `ModelMixin.get_loss`.
    """
    check_embeddings(model, schedule.sigmas)
    optimizer = th.optim.AdamW(model.parameters(), lr=lr)
    device, step = next(model.parameters()).device, 0
    for _ in range(epochs):
        for batch in loader:
            x0, sigma, eps, cond = generate_train_sample(batch, schedule, conditional)
            x0, sigma, eps = (value.to(device) for value in (x0, sigma, eps))
            cond = cond.to(device) if isinstance(cond, th.Tensor) else cond
            model.train()
            loss = model.get_loss(x0, sigma, eps, cond=cond, weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            yield SimpleNamespace(
                step=step, loss=loss.detach(), x0=x0, sigma=sigma, eps=eps, cond=cond, model=model, optimizer=optimizer
            )
