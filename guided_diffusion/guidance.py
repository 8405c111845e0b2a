"""
Guidance: functions from predictor to predictor, so that the order of wrapping is the order of operations.

Three kinds of pieces meet here. Wrappers take predictors and give one (`classifier_guided`, `mix`, `classifier_free`,
`interval`...). Gradient functions `(x, t, **cond) -> like x` are what `classifier_guided` attaches, and have wrappers
of their own (`scaled`, `normalized`, `summed`). Rules of mixing `(a, b, scale, x, t) -> Prediction` say how `mix` goes
from prediction b towards a and beyond (`linear`, `rescaled`, `projected`).

A scale is a number, a tensor [N] with a value for each sample, or a function of the rows t [N] that gives either.
"""

from dataclasses import fields, replace

import torch as th
import torch.nn.functional as F

from .prediction import check_gradient, eps_from_x0, mean_of, row_of, twice

# ---------------------------------------------------------------------------------------------------------- scales


def scale_like(scale, t, x):
    """What a scale is at rows t [N]: a number, or a tensor that broadcasts over x [N, ...]."""
    value = scale(t) if callable(scale) else scale
    if isinstance(value, th.Tensor) and value.ndim:
        return _spread(value.to(x), x)
    return value


def of_sigma(process, function):
    """A scale from a function of sigma = sqrt(1/abar - 1), the noise level of x_t / sqrt(abar), [N] float32."""
    return lambda t: function(process.at("sqrt_recipm1_alphas_cumprod", t, t.float()))


def within(scale, first, last):
    """`scale` at rows first <= t <= last and 1 elsewhere: `interval` without a look at t, both predictors running."""

    def schedule(t):
        value = scale(t) if callable(scale) else scale
        return th.where((first <= t) & (t <= last), value, 1.0)

    return schedule


def ramp(process, start, end):
    """A scale that goes in even steps over the rows, from `start` at the noisiest to `end` at row 0."""
    last = process.num_timesteps - 1
    return lambda t: start + (end - start) * ((last - t) / max(last, 1))


def _spread(values, x):
    return values.reshape(-1, *[1] * (x.ndim - 1))                            # [N] -> [N,1,..]


def _inner(a, b):
    return _spread((a * b).flatten(1).sum(1), a)                              # [N,..] -> [N,1,..]


# -------------------------------------------------------------------------------------------- gradients of log p(y|x)


def classifier_guided(predict, grad_fn):
    """
    Attach a gradient of log p(y | x_t) to each prediction (ADM, arXiv 2105.05233, section 4); the sampler applies
    it: ancestral steps shift the mean by variance x gradient (algorithm 1), ODE steps shift eps (algorithm 2).

    The gradient is taken at x_t and t, as in the original and as its published scales assume, although the
    derivation expands around the mean of x_{t-1}: that is `classifier_guided_at_mean`.

    :param grad_fn: `(x, t, **cond) -> like x`, the scale already inside; t [N] are rows.
    :raises ArithmeticError: if it gives values that are not finite; the error names the row.
    """

    def guided(x, t, **cond):
        return attached(predict(x, t, **cond), differentiable(grad_fn)(x, t, **cond), t)

    return guided


def classifier_guided_at_mean(predict, grad_fn, process):
    """
    `classifier_guided` with the gradient at the mean of x_{t-1} and at row t-1, where ADM's derivation expands
    log p(y | x_{t-1}) (arXiv 2105.05233, section 4.1). For ancestral steps; where log p(y | x_{t-1}) is linear and
    the variance is the true one it is exact. From row 0 there is no next row: the gradient is taken at row 0.
    """

    def guided(x, t, **cond):
        pred = predict(x, t, **cond)
        mean = mean_of(process, x, t, pred)
        return attached(pred, differentiable(grad_fn)(mean, (t - 1).clamp(min=0), **cond), t)

    return guided


def differentiable(grad_fn):
    """
    A gradient function that works within `torch.inference_mode` too, as if that were `torch.no_grad`: tensors that were
    made there cannot enter a graph, so it is given copies. (A walk of the programs is in inference mode but for this.)
    """

    def outside(x, t, **cond):
        if not th.is_inference_mode_enabled():
            return grad_fn(x, t, **cond)
        with th.inference_mode(False), th.no_grad():
            copies = {name: value.clone() if isinstance(value, th.Tensor) else value for name, value in cond.items()}
            return grad_fn(x.clone(), t.clone(), **copies)

    return outside


def attached(pred, grad, t):
    """
    A prediction with a gradient [N, ...] more, added to what it has, so that guidances wrapped in one another add up.

    :raises ArithmeticError: if the gradient is not finite; the error names the row. (See `prediction.check_gradient`.)
    """
    check_gradient(grad, t, pred.x0)
    return replace(pred, grad=grad if pred.grad is None else pred.grad + grad)


def classifier_gradient(classifier, scale=1.0, marginal=1.0):
    """
    The usual `cond_fn(x, t, y)`: scale times the gradient of log p(y | x_t) with respect to x_t.

    The logits f_y stand for log p(x_t, y) up to a constant, and their logsumexp for log p(x_t): what is differentiated
    is f_y - marginal * logsumexp f, so that the joint and the marginal density can weigh differently (after Ma et al.
    2023, arXiv 2310.11311). With marginal 0 only the joint pulls.

    :param classifier: `(x, t) -> logits [N, K]`, with t what it was trained on.
    :param scale, marginal: scales as this module's head says, functions being told the t of the classifier.
    :return: `(x [N, ...], t [N], y [N]) -> [N, ...]`; samples do not influence one another. A classifier of 16 bits is
        differentiated at a scale of its own for each sample, so that a gradient far below 6e-8 comes through float16.
    """

    def cond_fn(x, t, y=None, **_):
        if y is None:
            raise ValueError("classifier guidance needs the classes to ask for: pass y")
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            logits = classifier(x, t)                                         # [N,K]
            logits = logits.to(th.promote_types(logits.dtype, th.float32))
            log_p = F.log_softmax(logits, dim=-1).gather(1, y.view(-1, 1))[:, 0]
            weight = scale_like(marginal, t, log_p)
            lift = _lift(log_p.detach(), weight)                              # [N]
            log_p = log_p + (1 - weight) * logits.logsumexp(1)
            grad = th.autograd.grad((lift * log_p).sum(), x)[0]               # [N,..]
            return grad / _spread(lift, x) * scale_like(scale, t, x)

    return cond_fn


def _lift(log_p, marginal):
    """
    Powers of two [N] that bring each sample's gradient with respect to its logits, onehot_y - marginal p, to 1 at least
    and below 2 at its largest, as it is where the classifier is unsure. Where it is sure there is little, of which
    float16, ending at 6e-8, would lose the rest on the way to x. Multiplied and divided again, a power of two changes
    no float32 at all.
    """
    rest = -th.expm1(log_p)  # 1 - p_y, and at least as much as any other class has
    size = th.maximum((1 - marginal * log_p.exp()).abs(), (marginal * rest).abs())
    return th.exp2(-size.log2().floor().clamp(min=-60))


def scaled(grad_fn, scale):
    """A gradient function times a scale: a number, [N], or a function of the t that the gradient function is told."""
    return lambda x, t, **cond: scale_like(scale, t, x) * grad_fn(x, t, **cond)


def summed(*grad_fns):
    """Several classifiers at once: the sum of their gradients, right where the y are independent given x_t."""
    return lambda x, t, **cond: sum(grad_fn(x, t, **cond) for grad_fn in grad_fns)


def normalized(grad_fn, norm=1.0):
    """The direction of each sample's gradient with a given L2 norm; a gradient of zero stays zero."""

    def cond_fn(x, t, **cond):
        grad = grad_fn(x, t, **cond)
        length = _inner(grad, grad).sqrt()                                    # [N,1,..]
        return grad * (scale_like(norm, t, x) / th.where(length > 0, length, 1.0))

    return cond_fn


# ----------------------------------------------------------------------------------------------- two predictions in one


def linear(a, b, scale, x, t):
    """
    b + scale (a - b) in x_0, eps, the mean and a gradient, written so that scale 1 is a to the last bit.

    The weights sum to 1, so mixing means the same in every parameterization; the variance is a's.
    """

    def beyond(name):
        u, v = getattr(a, name), getattr(b, name)
        return None if u is None or v is None else u + (scale - 1) * (u - v)

    if a.grad is not None or b.grad is not None:
        a, b = (replace(p, grad=th.zeros_like(x) if p.grad is None else p.grad) for p in (a, b))
    return replace(a, **{name: beyond(name) for name in ("x0", "eps", "mean", "grad")})


def rescaled(process, share=0.7):
    """
    A rule of mixing: `linear`, then x_0 partly back to the standard deviation that a's x_0 has over each sample (Lin
    et al. 2023, arXiv 2305.08891, section 3.4), against the overexposure of large scales. The paper rescales the
    network's output; x_0 is what every parameterization has.

    :param share: phi of the paper: 0 is `linear`, 1 the whole way back.
    """

    def combine(a, b, scale, x, t):
        mixed = linear(a, b, scale, x, t)
        std = [p.x0.flatten(1).std(1) for p in (a, mixed)]                    # [N], [N]
        ratio = th.where(std[1] > 0, std[0] / std[1], 1.0)  # an even x_0 has no contrast to restore
        x0 = mixed.x0 * _spread(share * ratio + 1 - share, x)
        return replace(mixed, x0=x0, eps=eps_from_x0(process, x, t, x0), mean=None)

    return combine


def projected(process, parallel=0.0, max_norm=None):
    """
    A rule of mixing: APG (Sadat et al. 2024, arXiv 2410.02416, algorithm 1, without its momentum, which would tie a
    prediction to earlier ones). Of x_0's difference a - b, the part along a saturates images: it counts less.

    :param parallel: eta of the paper, the weight of that part; 1 (and no max_norm) is `linear`.
    :param max_norm: r of the paper, the largest L2 norm of the difference in a sample; None: no limit.
    """

    def combine(a, b, scale, x, t):
        diff = a.x0 - b.x0
        if max_norm is not None:
            diff = diff * (max_norm / _inner(diff, diff).sqrt()).clamp(max=1)
        length = _inner(a.x0, a.x0)
        along = _inner(diff, a.x0) / th.where(length > 0, length, 1.0) * a.x0
        x0 = a.x0 + (scale - 1) * (diff - (1 - parallel) * along)
        return replace(linear(a, b, scale, x, t), x0=x0, eps=eps_from_x0(process, x, t, x0), mean=None)

    return combine


def mix(main, other, scale, combine=linear):
    """
    Classifier-free guidance and autoguidance: other + scale (main - other), so scale 1 is `main` alone.

    In the notation of Ho & Salimans (arXiv 2207.12598) scale = 1 + w. With a worse predictor of the same condition
    as `other` (a smaller network, an earlier checkpoint) it is autoguidance (Karras et al. 2024, arXiv 2406.02507).

    :param scale: a scale as this module's head says.
    :param combine: the rule of mixing, default `linear`.
    """

    def mixed(x, t, **cond):
        return combine(main(x, t, **cond), other(x, t, **cond), scale_like(scale, t, x), x, t)

    return mixed


def classifier_free(predict, null, scale, combine=linear, batched=False):
    """
    `mix` of a conditional predictor with itself under null conditions (Ho & Salimans, arXiv 2207.12598).

    :param null: {name of a condition: its null}, as `nulled` takes it.
    :param batched: one call with 2N samples instead of two with N: faster on a GPU, twice the memory.
    """

    def unconditional(x, t, **cond):
        return predict(x, t, **nulled(cond, null))

    def together(x, t, **cond):
        empty = nulled(cond, null)
        both = {name: th.cat([value, empty[name]]) for name, value in cond.items()}
        a, b = _halves(predict(th.cat([x, x]), twice(t), **both))
        return combine(a, b, scale_like(scale, t, x), x, t)

    return together if batched else mix(predict, unconditional, scale, combine)


def _halves(pred):
    parts = {f.name: getattr(pred, f.name) for f in fields(pred) if getattr(pred, f.name) is not None}
    return (replace(pred, **{name: value.chunk(2)[k] for name, value in parts.items()}) for k in (0, 1))


# ----------------------------------------------------------------------------------------------------- where to guide


def at_rows(guided, plain, chosen):
    """
    One predictor at the rows where `chosen(row)` and another elsewhere; only one of them runs.

    t must be equal in the batch, as in the driver, which tells the row without a look at the device.
    """
    return lambda x, t, **cond: (guided if chosen(row_of(t)) else plain)(x, t, **cond)


def interval(guided, plain, first, last):
    """Guide only at rows first <= t <= last (Kynkaanniemi et al. 2024, arXiv 2404.07724)."""
    return at_rows(guided, plain, lambda row: first <= row <= last)


def every(guided, plain, k):
    """Guide only at rows divisible by k: a kth of the work; k times the scale keeps the strength."""
    return at_rows(guided, plain, lambda row: row % k == 0)


# ----------------------------------------------------------------------------------------------------------- clipping


def dynamic_threshold(quantile=0.995):
    """
    A `denoised_fn` for `prediction.clipped`: each sample's x_0 is clamped to [-s, s] and divided by s, where s is
    the quantile of its absolute values, at least 1 (Imagen, Saharia et al. 2022, arXiv 2205.11487, section 2.3).
    """

    def denoised_fn(x0):
        s = th.quantile(x0.flatten(1).abs(), quantile, dim=1).clamp(min=1)    # [N]
        s = _spread(s, x0)
        return x0.clamp(-s, s) / s

    return denoised_fn


# --------------------------------------------------------------------------------------------------------- conditions


def nulled(cond, null, where=None):
    """
    Conditions with their nulls in place: in every sample, or in those `where` [N] is true.

    :param cond: {name: [N, ...]}; not changed.
    :param null: {name: null}, a number (a null label, a zero embedding) or a tensor like one sample's condition (a
        learned embedding, through which gradients pass). Conditions not named stay.
    :raises ValueError: if a condition that has a null is missing.
    """
    out = dict(cond)
    for name, empty in null.items():
        value = cond.get(name)
        if value is None:
            raise ValueError(f"the condition {name} is missing: pass it, [N, ...], to have it replaced by its null")
        empty = empty.to(value) if isinstance(empty, th.Tensor) else value.new_full((), empty)
        out[name] = empty.expand_as(value) if where is None else th.where(_spread(where, value), empty, value)
    return out


def dropped(cond, rng, null, rate):
    """
    Conditions of a training batch, each sample's replaced by its nulls with probability `rate` (arXiv 2207.12598,
    algorithm 1), all of them or none.

    :param rng: numpy generator that decides; on the host, so that every device drops the same.
    """
    first = next(iter(cond.values()))
    where = th.from_numpy(rng.random(len(first)) < rate)
    where = where.to(first.device, non_blocking=True)                         # [N]
    return nulled(cond, null, where)
