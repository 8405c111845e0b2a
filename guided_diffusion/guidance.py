"""Guidance: functions from predictor to predictor, so that the order of wrapping is the order of operations."""

from dataclasses import replace

import torch as th
import torch.nn.functional as F


def classifier_guided(predict, grad_fn):
    """
    Attach a gradient of log p(y | x_t) to each prediction (ADM, arXiv 2105.05233, section 4); the sampler applies
    it: ancestral steps shift the mean by variance x gradient (algorithm 1), ODE steps shift eps (algorithm 2).

    The gradient is taken at x_t and t, as in the original and as its published scales assume, although the
    derivation expands around the mean of x_{t-1}.

    :param grad_fn: `(x, t, **cond) -> like x`, the scale already inside; t [N] are rows.
    """

    def guided(x, t, **cond):
        return replace(predict(x, t, **cond), grad=grad_fn(x, t, **cond))

    return guided


def classifier_gradient(classifier, scale=1.0):
    """
    The usual `cond_fn(x, t, y)`: scale times the gradient of log p(y | x_t) with respect to x_t.

    :param classifier: `(x, t) -> logits [N, K]`, with t what it was trained on.
    :return: `(x [N, ...], t [N], y [N]) -> [N, ...]`; samples do not influence one another.
    """

    def cond_fn(x, t, y=None):
        if y is None:
            raise ValueError("classifier guidance needs the classes to ask for: pass y")
        with th.enable_grad():
            x = x.detach().requires_grad_(True)
            log_p = F.log_softmax(classifier(x, t).float(), dim=-1)  # [N,K]
            chosen = log_p.gather(1, y.view(-1, 1)).sum()
            return th.autograd.grad(chosen, x)[0] * scale

    return cond_fn


def mix(main, other, scale):
    """
    Classifier-free guidance and autoguidance: other + scale (main - other), so scale 1 is `main` alone.

    In the notation of Ho & Salimans (arXiv 2207.12598) scale = 1 + w. Mixing x_0, eps and the mean with weights
    that sum to 1 is the same in every parameterization; the variance is `main`'s.
    """

    def lerp(a, b):
        return None if a is None or b is None else b + scale * (a - b)

    def mixed(x, t, **cond):
        a, b = main(x, t, **cond), other(x, t, **cond)
        return replace(a, x0=lerp(a.x0, b.x0), eps=lerp(a.eps, b.eps), mean=lerp(a.mean, b.mean))

    return mixed


def interval(guided, plain, first, last):
    """Guide only at rows first <= t <= last (Kynkaanniemi et al. 2024, arXiv 2404.07724); t is equal in the batch."""

    def predict(x, t, **cond):
        return (guided if first <= int(t[0]) <= last else plain)(x, t, **cond)

    return predict
