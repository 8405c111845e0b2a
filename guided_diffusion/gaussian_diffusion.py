"""The process with one way of predicting, under the method names the field knows; the work is done next door."""

from collections import deque
from functools import partial, wraps

import torch as th

from . import guidance, losses, prediction, sampling
from .losses import LossType
from .prediction import ModelMeanType, ModelVarType, Prediction
from .process import Process, betas_for_alpha_bar, get_named_beta_schedule

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
]


def _last_sample_of(progressive):
    @wraps(progressive)
    def loop(self, *args, **kwargs):
        steps = getattr(self, progressive.__name__)(*args, **kwargs)
        return deque(steps, maxlen=1).pop()["sample"]

    loop.__name__ = progressive.__name__.removesuffix("_progressive")
    loop.__doc__ = f"The last `sample` [N, ...] of `{progressive.__name__}`, with the same arguments."
    return loop


class GaussianDiffusion(Process):
    """
    Training and sampling of a diffusion model.

    Throughout: `model(x, timesteps, **model_kwargs)` is the network; t [N] are rows of this process; a `cond_fn(x,
    timesteps, **model_kwargs)` returns a scaled gradient of log p(y | x_t), like x; `denoised_fn` maps a predicted
    x_0 before it is clipped to [-1, 1].

    :param betas: [T] variances of the steps, in (0, 1].
    :param model_mean_type: a ModelMeanType.
    :param model_var_type: a ModelVarType.
    :param loss_type: a LossType.
    :param rescale_timesteps: tell the network timesteps on the scale 0..1000, whatever T is.
    :param loss_weight: a row of losses.LOSS_WEIGHTS, which multiplies the squared error of training.
    :param sigma_data: the standard deviation of the data, for EDM's prediction and weight.
    :raises ValueError: if the prediction does not suit the process, or the weight is unknown or has nothing to weigh.
    """

    def __init__(
        self, *, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False, timesteps=None,
        loss_weight="unit", sigma_data=Process.sigma_data,
    ):
        super().__init__(betas, timesteps)
        if not sigma_data > 0:
            raise ValueError(f"sigma_data, the standard deviation of the data, must be positive, not {sigma_data}")
        self.sigma_data = sigma_data
        self.loss_weights = losses.loss_weights(self, loss_weight, model_mean_type)
        if loss_type.is_vb() and loss_weight != "unit":
            raise ValueError(
                f"loss_weight {loss_weight} weighs the squared error, and the variational bound has none: "
                "use the weight unit, or train on the squared error (use_kl False)"
            )
        self.loss_weight = loss_weight
        if rescale_timesteps and timesteps is None:
            self.timesteps = self.timesteps * (1000.0 / self.num_timesteps)
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps

    def spaced(self, rows):
        """The same process and prediction with only some of the rows; networks are told the same step numbers."""
        return GaussianDiffusion(
            betas=self._spaced_betas(rows),
            model_mean_type=self.model_mean_type,
            model_var_type=self.model_var_type,
            loss_type=self.loss_type,
            rescale_timesteps=self.rescale_timesteps,
            timesteps=self.timesteps[sorted(rows)],
            loss_weight=self.loss_weight,
            sigma_data=self.sigma_data,
        )

    def predictor(self, model, clip_denoised=True, denoised_fn=None, cond_fn=None, guide=None, steer=None):
        """
        The network as a predictor `(x, t, **model_kwargs) -> Prediction`: read, then mixed by `guide` (a function from
        predictor to predictor, such as classifier-free guidance), then clipped, then guided by the gradient cond_fn,
        then by `steer` (another such function, for gradients that are more than a cond_fn).
        """
        predict = prediction.predictor(self, model, self.model_mean_type, self.model_var_type)
        predict = predict if guide is None else guide(predict)
        predict = prediction.clipped(predict, self, clip_denoised, denoised_fn)
        if cond_fn is not None:
            predict = guidance.classifier_guided(predict, self.told_rows(cond_fn))
        return predict if steer is None else steer(predict)

    def told_rows(self, cond_fn):
        """A cond_fn, which is told the network's timesteps, as a function of rows: `(x, t, **cond) -> like x`."""
        return lambda x, t, **cond: cond_fn(x, self.clock(t), **cond)

    # ------------------------------------------------------------------------------------------ one reverse step

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """p(x_{t-1} | x_t) and the x_0 behind it: dict of mean, variance, log_variance, pred_xstart, all like x."""
        _check_rows(t, x)
        pred = self.predictor(model, clip_denoised, denoised_fn)(x, t, **(model_kwargs or {}))
        return {
            "mean": prediction.mean_of(self, x, t, pred),
            "variance": pred.variance,
            "log_variance": pred.log_variance,
            "pred_xstart": pred.x0,
        }

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """The mean shifted by variance x gradient (ADM algorithm 1); the gradient is taken at x and t."""
        gradient = cond_fn(x, self.clock(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """`p_mean_var` with the gradient applied to eps (ADM algorithm 2), x_0 and mean following; not re-clipped."""
        eps = prediction.eps_from_x0(self, x, t, p_mean_var["pred_xstart"])
        gradient = cond_fn(x, self.clock(t), **(model_kwargs or {}))
        pred = Prediction(p_mean_var["pred_xstart"], eps, p_mean_var["variance"], p_mean_var["log_variance"], gradient)
        x0 = sampling.guided_score(self, x, t, pred).x0
        return {**p_mean_var, "pred_xstart": x0, "mean": prediction.posterior_mean(self, x, t, x0)}

    def _step(self, rule, predict, x, t, model_kwargs):
        _check_rows(t, x)
        now = sampling.Step(self, lambda x, t: predict(x, t, **(model_kwargs or {})), x, t, lambda: th.randn_like(x))
        return _named(*rule(now))

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        """One ancestral step: dict of `sample` (x at row t-1) and `pred_xstart` (before guidance)."""
        predict = self.predictor(model, clip_denoised, denoised_fn, cond_fn)
        return self._step(sampling.ddpm, predict, x, t, model_kwargs)

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0
    ):
        """One DDIM step: dict of `sample` (x at row t-1) and `pred_xstart` (after guidance)."""
        predict = self.predictor(model, clip_denoised, denoised_fn, cond_fn)
        return self._step(partial(sampling.ddim, eta=eta), predict, x, t, model_kwargs)

    def ddim_reverse_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0
    ):
        """One step of the DDIM ODE towards noise: dict of `sample` (x at row t+1) and `pred_xstart`."""
        if eta != 0.0:
            raise ValueError(f"the reversed ODE is deterministic: eta must be 0, not {eta}")
        predict = self.predictor(model, clip_denoised, denoised_fn)
        return self._step(sampling.ddim_reverse, predict, x, t, model_kwargs)

    # ------------------------------------------------------------------------------------------------ whole walks

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False,
    ):
        """
        Ancestral sampling from T-1 to 0; yields the dict of `p_sample` after each step.

        :param shape: of the samples, (N, C, H, W).
        :param noise: where to start, in place of N(0, I).
        :param device: default that of `noise`, else of the model's parameters, else the CPU.
        :param progress: show a progress bar.
        """
        predict = self.predictor(model, clip_denoised, denoised_fn, cond_fn)
        return self._walk(sampling.ddpm, predict, model, shape, noise, model_kwargs, device, progress)

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0,
    ):
        """DDIM sampling, as `p_sample_loop_progressive`; eta 0 is deterministic given the start."""
        predict = self.predictor(model, clip_denoised, denoised_fn, cond_fn)
        rule = partial(sampling.ddim, eta=eta)
        return self._walk(rule, predict, model, shape, noise, model_kwargs, device, progress)

    p_sample_loop = _last_sample_of(p_sample_loop_progressive)
    ddim_sample_loop = _last_sample_of(ddim_sample_loop_progressive)

    def _walk(self, rule, predict, model, shape, noise, model_kwargs, device, progress):
        if not isinstance(shape, (tuple, list)):
            raise TypeError(f"shape must be a tuple such as (N, C, H, W), not {shape!r}")
        if device is None:
            parameters = getattr(model, "parameters", lambda: iter(()))()
            device = noise.device if noise is not None else getattr(next(parameters, None), "device", "cpu")
        start = th.randn(*shape, device=device) if noise is None else noise
        rows = list(range(self.num_timesteps))[::-1]
        if progress:
            from tqdm.auto import tqdm

            rows = tqdm(rows, desc="sampling", unit="step")
        for x, pred in sampling.sample(self, predict, rule, start, cond=model_kwargs, rows=rows):
            yield _named(x, pred)

    # ----------------------------------------------------------------------------------------------------- losses

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The terms of the training loss at rows t: dict of [N], always with `loss`."""
        kinds = self.model_mean_type, self.model_var_type, self.loss_type
        weights = None if self.loss_weight == "unit" else "loss_weights"
        return losses.training_losses(self, model, x_start, t, noise, model_kwargs or {}, *kinds, weights)

    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        """Bits per dimension, term by term: see `losses.bits_per_dimension`."""
        predict = self.predictor(model, clip_denoised)
        return losses.bits_per_dimension(self, lambda x, t: predict(x, t, **(model_kwargs or {})), x_start)

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        pred = self.predictor(model, clip_denoised)(x_t, t, **(model_kwargs or {}))
        return {"output": losses.vb_terms_bpd(self, pred, x_start, x_t, t), "pred_xstart": pred.x0}

    def _prior_bpd(self, x_start):
        return losses.prior_bpd(self, x_start)

    # The original's private conversions, which projects built on it call.

    def _predict_xstart_from_eps(self, x_t, t, eps):
        return prediction.x0_from_eps(self, x_t, t, eps)

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        return prediction.x0_from_previous(self, x_t, t, xprev)

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        return prediction.eps_from_x0(self, x_t, t, pred_xstart)

    def _scale_timesteps(self, t):
        return self.clock(t)


def _check_rows(t, x):
    if t.shape != (len(x),):
        raise ValueError(f"t must hold one row for each of the {len(x)} samples, not shape {tuple(t.shape)}")


def _named(x, pred):
    return {"sample": x, "pred_xstart": pred.x0}

