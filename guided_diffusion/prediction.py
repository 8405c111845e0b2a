"""What a network's output means: clean data, noise, velocity, the previous x or EDM's mix; and with which variance.

A `Predictor` is any callable `(x, t, **cond) -> Prediction` with t [N] rows of a `Process`. Samplers and guidance
know predictors only; networks appear here once, in `predictor`.
"""

import enum
from dataclasses import dataclass, replace

import torch as th


class ModelMeanType(enum.Enum):
    """What the network's first C channels predict."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise
    VELOCITY = enum.auto()  # v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, arXiv 2202.00512)
    EDM = enum.auto()  # F, where x_0 = c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, arXiv 2206.00364)


class ModelVarType(enum.Enum):
    """Which variance a reverse step has."""

    LEARNED = enum.auto()  # the network's second C channels are its logarithm
    FIXED_SMALL = enum.auto()  # the posterior's: right for data at one point
    FIXED_LARGE = enum.auto()  # beta: right for data ~ N(0, I)
    LEARNED_RANGE = enum.auto()  # the second C channels place it between the two (Improved DDPM eq. 15)


@dataclass(frozen=True)
class Prediction:
    """
    A belief about x_0 given x_t. Every tensor has x_t's shape; `x0` and `eps` always say the same thing.

    `variance` and `log_variance` are those of the reverse step; both are carried because at row 0 the small
    variance is 0 while its logarithm is the clipped one. `grad` is a scaled gradient of log p(y | x_t), which
    samplers apply. `mean` is set only where a network predicts the mean of x_{t-1} itself.
    """

    x0: th.Tensor
    eps: th.Tensor
    variance: th.Tensor
    log_variance: th.Tensor
    grad: th.Tensor | None = None
    mean: th.Tensor | None = None


# --------------------------------------------------------------------------------- rows that the host knows too

def rows_at(row, count, device, doubts=None):
    """
    t [count] int64, `row` in every place, which also tells the host what it is, so that wrappers that choose by row
    need not wait for a GPU: `t.row`. In a walk it carries `t.doubts` as well, what is to be checked when the walk ends.
    """
    t = th.full((count,), row, dtype=th.int64, device=device)
    t.row, t.doubts = row, doubts
    return t


def twice(t):
    """t [N] -> [2N], each row again, with what the host knows of it."""
    both = th.cat([t, t])
    both.row, both.doubts = getattr(t, "row", None), getattr(t, "doubts", None)
    return both


def row_of(t):
    """The row that stands in every place of t; a GPU is waited for only if t does not come from `rows_at`."""
    row = getattr(t, "row", None)
    return int(t[0]) if row is None else row


def check_gradient(grad, t, x0):
    """
    Raise ArithmeticError, with the row, if a gradient that guides is not finite. On a GPU within a walk, where a look
    would wait for the device, it is noted in `t.doubts`, and `settle` raises when the walk ends.

    :param grad: [N, ...].
    :param t: [N] rows.
    :param x0: [N, ...] what was predicted there; where that is not finite already, the gradient is not to blame.
    :raises ValueError: if the gradient is no tensor of the shape of x_0.
    """
    if getattr(grad, "shape", None) != x0.shape:
        what = f"shape {list(grad.shape)}" if isinstance(grad, th.Tensor) else type(grad).__name__
        raise ValueError(f"the gradient that guides (cond_fn) must be like x, {list(x0.shape)}, not {what}")
    grad = th.where(x0.isfinite(), grad, 0.0)
    good = grad.isfinite().flatten(1).all(1)                                  # [N]
    doubts = getattr(t, "doubts", None)
    if doubts is None or _at_hand(grad):
        settle([(t, good)])
    else:
        doubts.append((t, good))


def _at_hand(tensor):
    return tensor.device.type == "cpu"


def settle(doubts):
    """Raise ArithmeticError for the first of the pairs (t [N], whether each sample's gradient is finite [N])."""
    if not doubts or th.stack([good.all() for _, good in doubts]).all():  # one look at the device
        return
    t, good = next(pair for pair in doubts if not pair[1].all())
    k = int((~good).nonzero()[0])
    raise ArithmeticError(
        f"the gradient that guides (cond_fn) is not finite at row {int(t[k])}, for sample {k} of the batch"
    )


# ------------------------------------------------------------------------------------------------- conversions

def x0_from_eps(process, x, t, eps):
    """x_0 = x_t / sqrt(abar) - sqrt(1/abar - 1) eps (DDPM eq. 4, solved for x_0)."""
    scale, sigma = process.at("sqrt_recip_alphas_cumprod", t, x), process.at("sqrt_recipm1_alphas_cumprod", t, x)
    return scale * x - sigma * eps


def eps_from_x0(process, x, t, x0):
    """The inverse of `x0_from_eps`; where x_t is pure noise (abar = 0) it is x_t."""
    if process.ends_in_noise:  # sigma is infinite there; elsewhere the other form is the original's, to the last digit
        signal = process.at("sqrt_alphas_cumprod", t, x) * x0
        return (x - signal) / process.at("sqrt_one_minus_alphas_cumprod", t, x)
    scale, sigma = process.at("sqrt_recip_alphas_cumprod", t, x), process.at("sqrt_recipm1_alphas_cumprod", t, x)
    return (scale * x - x0) / sigma


def x0_from_velocity(process, x, t, v):
    """x_0 = sqrt(abar) x_t - sqrt(1 - abar) v (Salimans & Ho 2022, appendix D)."""
    return process.at("sqrt_alphas_cumprod", t, x) * x - process.at("sqrt_one_minus_alphas_cumprod", t, x) * v


def velocity(process, x0, t, noise):
    """v = sqrt(abar) eps - sqrt(1 - abar) x_0."""
    return process.at("sqrt_alphas_cumprod", t, x0) * noise - process.at("sqrt_one_minus_alphas_cumprod", t, x0) * x0


def x0_from_previous(process, x, t, previous):
    """The x_0 whose posterior mean is `previous` (DDPM eq. 7, solved for x_0)."""
    c1, c2 = process.at("posterior_mean_coef1", t, x), process.at("posterior_mean_coef2", t, x)
    return (previous - c2 * x) / c1


def snr(process):
    """abar / (1 - abar) of every row: float64 [T]."""
    return process.alphas_cumprod / (1 - process.alphas_cumprod)


def posterior_mean(process, x, t, x0):
    """The mean of q(x_{t-1} | x_t, x_0)."""
    return process.q_posterior_mean_variance(x0, x, t)[0]


def edm_scales(process, x, t):
    """
    (c_skip, c_out, c_in) of Karras et al. 2022, table 1, each like x, for x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.

    The table is written for y = x_0 + sigma eps = x_t / sqrt(abar): c_skip and c_in here are those times 1 /
    sqrt(abar), in forms that stay finite where abar is 0.
    """
    keep, spoil = process.at("sqrt_alphas_cumprod", t, x), process.at("sqrt_one_minus_alphas_cumprod", t, x)
    spread = th.sqrt(spoil**2 + (keep * process.sigma_data) ** 2)  # the standard deviation of x_t
    return keep * (process.sigma_data / spread) ** 2, spoil * process.sigma_data / spread, 1 / spread


def edm_noise(process, x, t):
    """c_noise = log(sigma) / 4: [N], of the precision that tables have beside x."""
    return process.at("sqrt_recipm1_alphas_cumprod", t, x.flatten(1)[:, 0]).log() / 4


def x0_from_edm(process, x, t, output):
    """x_0 = c_skip x_t + c_out F."""
    c_skip, c_out, _ = edm_scales(process, x, t)
    return c_skip * x + c_out * output


def edm_target(process, x, t, x0):
    """The inverse of `x0_from_edm`; for sigma_data 1 it is -v."""
    c_skip, c_out, _ = edm_scales(process, x, t)
    return (x0 - c_skip * x) / c_out


# One row a parameterization: how to read x_0 off the network's output, what to train it on, and how its squared error
# compares with that of x_0.
TO_X0 = {
    ModelMeanType.EPSILON: x0_from_eps,
    ModelMeanType.START_X: lambda process, x, t, x0: x0,
    ModelMeanType.VELOCITY: x0_from_velocity,
    ModelMeanType.PREVIOUS_X: x0_from_previous,
    ModelMeanType.EDM: x0_from_edm,
}
TARGETS = {
    ModelMeanType.EPSILON: lambda process, x0, x, t, noise: noise,
    ModelMeanType.START_X: lambda process, x0, x, t, noise: x0,
    ModelMeanType.VELOCITY: lambda process, x0, x, t, noise: velocity(process, x0, t, noise),
    ModelMeanType.PREVIOUS_X: lambda process, x0, x, t, noise: posterior_mean(process, x, t, x0),
    ModelMeanType.EDM: lambda process, x0, x, t, noise: edm_target(process, x, t, x0),
}
# process -> float64 [T]: the squared error of the output for a squared error 1 of x_0.
ERRORS = {
    ModelMeanType.EPSILON: snr,
    ModelMeanType.START_X: lambda process: process.alphas_cumprod**0,
    ModelMeanType.VELOCITY: lambda process: 1 / (1 - process.alphas_cumprod),  # SNR + 1
    ModelMeanType.PREVIOUS_X: lambda process: process.posterior_mean_coef1**2,
    ModelMeanType.EDM: lambda process: snr(process) + process.sigma_data**-2,  # 1 / c_out^2
}


def convert(process, x, t, output, source, target):
    """
    What a network of kind `target` would have to say for the x_0 that `output`, of kind `source`, says.

    :param x: [N, ...] x_t.
    :param t: [N] rows.
    :param output: like x.
    :param source, target: ModelMeanType.
    :raises ValueError: where a kind does not suit the process.
    """
    for kind in (source, target):
        check_fit(process, kind)
    x0 = TO_X0[source](process, x, t, output)
    return TARGETS[target](process, x0, x, t, eps_from_x0(process, x, t, x0))


def check_fit(process, mean_type):
    """
    :raises ValueError: if the last row is pure noise and the kind has no finite meaning there: x_0 from eps divides
        by sqrt(abar) = 0, and EDM's c_noise is the logarithm of an infinite sigma.
    """
    if process.ends_in_noise and mean_type in (ModelMeanType.EPSILON, ModelMeanType.EDM):
        raise ValueError(
            f"{mean_type.name} prediction cannot start from pure noise (abar = 0 at row {process.num_timesteps - 1}):"
            " it does not determine the clean data there; predict v or x0 (--predict v), or drop zero_snr"
        )


# ---------------------------------------------------------------------------------------------------- variances

def _between(process, x, t, v):
    """v = -1 is the small variance, v = +1 the large one, geometric in between; not clamped, as in the original."""
    share = (v + 1) / 2
    low = process.at("posterior_log_variance_clipped", t, x)
    log_variance = share * process.at("log_betas", t, x) + (1 - share) * low
    return th.exp(log_variance), log_variance


def _tables(variance, log_variance):
    return lambda process, x, t, v: (process.at(variance, t, x), process.at(log_variance, t, x))


# One row a kind: (process, x, t, v) -> (variance, log_variance).
VARIANCES = {
    ModelVarType.FIXED_SMALL: _tables("posterior_variance", "posterior_log_variance_clipped"),
    ModelVarType.FIXED_LARGE: _tables("large_variance", "log_large_variance"),
    ModelVarType.LEARNED: lambda process, x, t, v: (th.exp(v), v),
    ModelVarType.LEARNED_RANGE: _between,
}


def is_learned(var_type):
    """Whether the network has C more channels, for its variance."""
    return var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


# --------------------------------------------------------------------------------------------------- predictors

def split_output(output, x, var_type):
    """
    Part a network's output [N, C or 2C, ...] into (guess [N, C, ...], v [N, C, ...] or None).

    :raises ValueError: if the number of channels does not suit the variance type.
    """
    factor = 2 if is_learned(var_type) else 1
    expected = (x.shape[0], factor * x.shape[1], *x.shape[2:])
    if output.shape != expected:
        raise ValueError(
            f"the network gave {tuple(output.shape)} where {var_type.name} variance needs {expected}: "
            f"learn_sigma must be {factor == 2} both when it was built and in the diffusion"
        )
    return output.chunk(2, dim=1) if factor == 2 else (output, None)


def read(process, mean_type, var_type, guess, v, x, t):
    """The `Prediction` that a network's output (guess, v) at (x, t) stands for."""
    variance, log_variance = VARIANCES[var_type](process, x, t, v)
    x0 = TO_X0[mean_type](process, x, t, guess)
    eps = guess if mean_type is ModelMeanType.EPSILON else eps_from_x0(process, x, t, x0)
    mean = guess if mean_type is ModelMeanType.PREVIOUS_X else None
    return Prediction(x0, eps, variance, log_variance, mean=mean)


def ask(process, net, mean_type, var_type, x, t, cond):
    """
    A network's answer at (x, t), in the parts of `split_output`; for EDM it is shown c_in x and told c_noise. What it
    is told knows its row, as t does (`rows_at`): a network may keep something from row to row.
    """
    if mean_type is ModelMeanType.EDM:
        shown, told = edm_scales(process, x, t)[2] * x, edm_noise(process, x, t)
    else:
        shown, told = x, process.clock(t)
    told.row = getattr(t, "row", None)
    return split_output(net(shown, told, **cond), x, var_type)


def predictor(process, net, mean_type, var_type):
    """
    A network as a predictor.

    :param net: `(x, clock, **cond) -> [N, C or 2C, ...]`; it is told `process.clock(t)`, or see `ask`.
    :raises ValueError: if the kind does not suit the process.
    """
    check_fit(process, mean_type)

    def predict(x, t, **cond):
        guess, v = ask(process, net, mean_type, var_type, x, t, cond)
        return read(process, mean_type, var_type, guess, v, x, t)

    return predict


def clipped(predict, process, clip_denoised=True, denoised_fn=None):
    """
    A predictor whose x_0 goes through `denoised_fn` and is then clamped to [-1, 1]; eps follows x_0.

    Clipping is a wrapper of its own so that the order of operations is the order of writing: mix first, then clip.
    """
    if not clip_denoised and denoised_fn is None:
        return predict

    def limited(x, t, **cond):
        pred = predict(x, t, **cond)
        x0 = pred.x0 if denoised_fn is None else denoised_fn(pred.x0)
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        return replace(pred, x0=x0, eps=eps_from_x0(process, x, t, x0))

    return limited


def mean_of(process, x, t, pred):
    """The mean of the reverse step p(x_{t-1} | x_t) that a prediction stands for, without guidance."""
    return posterior_mean(process, x, t, pred.x0) if pred.mean is None else pred.mean
