"""
The other side of every comparison of speed: training step and guided steps written in the most literal way.

Tables of the process go from numpy to the device at each use; averages, norms and the log are loops over parameters and
samples that read numbers on the host; gradients of the classifier and evaluations of the network follow one another.
The networks are in plain.py.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def extract(table, t, shape):
    """Entries t of a numpy table on the device of t, spread over a shape: the table travels at each use."""
    values = torch.from_numpy(table).to(device=t.device)[t].float()
    while len(values.shape) < len(shape):
        values = values[..., None]
    return values.expand(shape)


class PlainDiffusion:
    """
    Training loss and steps of a process that predicts the noise, with tables of its own from the betas of another.

    :param like: a GaussianDiffusion: its betas, clock and kind of variance.
    """

    def __init__(self, like):
        self.betas = np.array(like.betas, dtype=np.float64)
        self.timesteps, self.kind = [float(step) for step in like.timesteps], like.model_var_type.name
        if like.model_mean_type.name != "EPSILON" or self.kind == "LEARNED":
            raise ValueError(f"no plain form of {like.model_mean_type} with {self.kind}")
        self.steps, self.whole_clock = len(self.betas), like.timesteps.dtype.kind == "i"
        abar = np.cumprod(1 - self.betas)
        before = np.append(1.0, abar[:-1])
        self.sqrt_abar, self.sqrt_rest = np.sqrt(abar), np.sqrt(1 - abar)
        self.recip, self.recipm1 = np.sqrt(1 / abar), np.sqrt(1 / abar - 1)
        self.posterior = self.betas * (1 - before) / (1 - abar)
        self.posterior_log = np.log(np.append(self.posterior[1:2], self.posterior[1:]))
        self.coef1 = self.betas * np.sqrt(before) / (1 - abar)
        self.coef2 = (1 - before) * np.sqrt(1 - self.betas) / (1 - abar)
        self.abar, self.before = abar, before

    def clock(self, t):
        """What the network is told at rows t."""
        dtype = torch.int64 if self.whole_clock else torch.float32
        return torch.tensor(self.timesteps, device=t.device).to(dtype)[t]

    def variance(self, v, t, x):
        """(variance, its logarithm) of the reverse step, given the network's second half where it has one."""
        if self.kind == "LEARNED_RANGE":
            low, high = extract(self.posterior_log, t, x.shape), extract(np.log(self.betas), t, x.shape)
            share = (v + 1) / 2
            log_variance = share * high + (1 - share) * low
            return torch.exp(log_variance), log_variance
        if self.kind == "FIXED_LARGE":
            table = np.append(self.posterior[1], self.betas[1:])
            return extract(table, t, x.shape), extract(np.log(table), t, x.shape)
        return extract(self.posterior, t, x.shape), extract(self.posterior_log, t, x.shape)

    def told(self, model, x, t, y, clip):
        """(x_0, variance, its logarithm) that the network tells of x_t."""
        output = model(x, self.clock(t), **({} if y is None else {"y": y}))
        eps, v = torch.split(output, x.shape[1], dim=1) if output.shape[1] > x.shape[1] else (output, None)
        x0 = extract(self.recip, t, x.shape) * x - extract(self.recipm1, t, x.shape) * eps
        return (x0.clamp(-1, 1) if clip else x0), *self.variance(v, t, x)

    def mean(self, x0, x, t):
        """Of q(x_{t-1} | x_t, x_0)."""
        return extract(self.coef1, t, x.shape) * x0 + extract(self.coef2, t, x.shape) * x

    def losses(self, model, x0, t, noise, y=None):
        """{name: [N]} of the mean square and, with a learned variance, of the bound; `loss` is their sum."""
        x = extract(self.sqrt_abar, t, x0.shape) * x0 + extract(self.sqrt_rest, t, x0.shape) * noise
        output = model(x, self.clock(t), **({} if y is None else {"y": y}))
        terms = {}
        if self.kind == "LEARNED_RANGE":
            output, v = torch.split(output, x.shape[1], dim=1)
            frozen = torch.cat([output.detach(), v], dim=1)
            guess, _, log_variance = self.told(lambda *_, **__: frozen, x, t, None, clip=False)
            terms["vb"] = self.bound(x0, x, t, self.mean(guess, x, t), log_variance)
        terms["mse"] = ((noise - output) ** 2).mean(dim=(1, 2, 3))
        return terms | {"loss": terms["mse"] + terms.get("vb", 0)}

    def bound(self, x0, x, t, mean, log_variance):
        """A term of the variational bound in bits a dimension: KL, and at row 0 that of 256 levels."""
        true, true_log = self.mean(x0, x, t), extract(self.posterior_log, t, x.shape)
        kl = log_variance - true_log - 1 + torch.exp(true_log - log_variance)
        kl = 0.5 * (kl + (true - mean) ** 2 * torch.exp(-log_variance))
        inverse = torch.exp(-0.5 * log_variance)
        above, below = (tanh_cdf(inverse * (x0 - mean + step)) for step in (1 / 255, -1 / 255))
        inside = torch.where(x0 > 0.999, 1 - below, above - below)
        nll = -torch.log(torch.where(x0 < -0.999, above, inside).clamp(min=1e-12))
        each = torch.where(t == 0, nll.mean(dim=(1, 2, 3)), kl.mean(dim=(1, 2, 3)))
        return each / math.log(2.0)

    def ancestral(self, model, x, t, noise, y=None, cond_fn=None):
        """One ancestral step, its mean shifted by variance x gradient if there is a cond_fn(x, clock, y)."""
        with torch.no_grad():
            x0, variance, log_variance = self.told(model, x, t, y if cond_fn is None or labelled(model) else None, True)
            mean = self.mean(x0, x, t)
            if cond_fn is not None:
                mean = mean.float() + variance * cond_fn(x, self.clock(t), y).float()
            nonzero = (t != 0).float().view(-1, *([1] * (len(x.shape) - 1)))
            return mean + nonzero * torch.exp(0.5 * log_variance) * noise

    def ddim(self, model, x, t, y=None, cond_fn=None):
        """One step of DDIM without noise, its eps shifted by the gradient if there is a cond_fn(x, clock, y)."""
        with torch.no_grad():
            x0, _, _ = self.told(model, x, t, y if cond_fn is None or labelled(model) else None, True)
            recip, recipm1 = extract(self.recip, t, x.shape), extract(self.recipm1, t, x.shape)
            if cond_fn is not None:
                eps = (recip * x - x0) / recipm1
                eps = eps - (1 - extract(self.abar, t, x.shape)).sqrt() * cond_fn(x, self.clock(t), y)
                x0 = recip * x - recipm1 * eps
            eps = (recip * x - x0) / recipm1
            before = extract(self.before, t, x.shape)
            return x0 * torch.sqrt(before) + torch.sqrt(1 - before) * eps


def labelled(model):
    """Whether a network takes labels."""
    return getattr(model, "num_classes", None) is not None


def tanh_cdf(x):
    """Of the normal distribution, approximately."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def classifier_gradient(classifier, scale):
    """cond_fn(x, clock, y): scale times the gradient of log p(y | x)."""

    def cond_fn(x, t, y):
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = F.log_softmax(classifier(x_in, t), dim=-1)
            selected = log_probs[range(len(x)), y.view(-1)]
            return torch.autograd.grad(selected.sum(), x_in)[0] * scale

    return cond_fn


def classifier_free(model, null, scale):
    """A network whose first channels are guided without a classifier, by two calls; `null` is the label of none."""

    def guided(x, t, y):
        known, free = model(x, t, y=y), model(x, t, y=torch.full_like(y, null))
        eps = free[:, : x.shape[1]] + scale * (known[:, : x.shape[1]] - free[:, : x.shape[1]])
        return torch.cat([eps, known[:, x.shape[1] :]], dim=1)

    guided.num_classes = null + 1
    return guided


# ------------------------------------------------------------------------------------------------------------ training


class PlainTrainer:
    """
    Training steps: gradients in microbatches, numbers logged for every sample, loops over parameters.

    With fp16 the float32 weights are two flat tensors, of vectors and of the others, and the loss has a scale.
    """

    def __init__(self, model, diffusion, lr=1e-4, rates=(0.9999,), microbatch=-1, fp16=False, weight_decay=0.0):
        self.model, self.diffusion, self.microbatch, self.fp16 = model, diffusion, microbatch, fp16
        self.params, self.rates, self.lg_scale = list(model.parameters()), rates, 20.0
        self.masters, self.log = self.params, {}
        if fp16:
            vectors = [p for p in self.params if p.ndim <= 1]
            self.groups = [vectors, [p for p in self.params if p.ndim > 1]]
            self.masters = [nn.Parameter(flat(group)) for group in self.groups]
            model.to_half()
        options = {"lr": lr, "weight_decay": weight_decay, "foreach": False, "fused": False}
        self.opt = torch.optim.AdamW(self.masters, **options)
        self.averages = [[m.detach().clone() for m in self.masters] for _ in rates]

    def step(self, x0, t, noise, y=None):
        """One update and its averages."""
        for p in self.params:
            if p.grad is not None:
                p.grad.detach_()
                p.grad.zero_()
        size = self.microbatch if self.microbatch > 0 else len(x0)
        for i in range(0, len(x0), size):
            part = slice(i, i + size)
            labels = None if y is None else y[part]
            terms = self.diffusion.losses(self.model, x0[part], t[part], noise[part], labels)
            loss = terms["loss"].mean()
            self.note(terms, t[part])
            (loss * 2**self.lg_scale if self.fp16 else loss).backward()
        self.optimize()

    def optimize(self):
        """Weights and averages from the gradients that are there."""
        if self.fp16:
            for master, group in zip(self.masters, self.groups):
                master.grad = torch.cat([p.grad.detach().reshape(-1).float() for p in group])
        grad_norm = math.sqrt(sum(torch.norm(m.grad, p=2, dtype=torch.float32).item() ** 2 for m in self.masters))
        param_norm = math.sqrt(sum(torch.norm(m, p=2, dtype=torch.float32).item() ** 2 for m in self.masters))
        self.log["grad_norm"], self.log["param_norm"] = grad_norm / (2**self.lg_scale if self.fp16 else 1), param_norm
        if self.fp16 and not math.isfinite(grad_norm):
            self.lg_scale -= 1
            return
        if self.fp16:
            for master in self.masters:
                master.grad.mul_(1 / 2**self.lg_scale)
        self.opt.step()
        if self.fp16:
            self.lg_scale += 1e-3
            for master, group in zip(self.masters, self.groups):
                for p, value in zip(group, master.detach().split([p.numel() for p in group])):
                    p.detach().copy_(value.view_as(p))
        for rate, average in zip(self.rates, self.averages):
            for target, source in zip(average, self.masters):
                target.detach().mul_(rate).add_(source.detach(), alpha=1 - rate)

    def note(self, terms, t):
        """Running means of every term, and of each by quarters of the timesteps, sample by sample."""
        for name, values in terms.items():
            self.mean(name, values.mean().item())
            for row, value in zip(t.cpu().numpy(), values.detach().cpu().numpy()):
                self.mean(f"{name}_q{int(4 * row / self.diffusion.steps)}", value)

    def mean(self, name, value):
        count, old = self.log.get(name, (0, 0.0))
        self.log[name] = count + 1, old * count / (count + 1) + value / (count + 1)


def flat(group):
    """Parameters as one tensor in float32."""
    return torch.cat([p.detach().reshape(-1).float() for p in group])
