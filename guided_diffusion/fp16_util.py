"""Training in 16 bits: float32 master weights, a loss scale that adapts, and steps that are skipped, not poisoned."""

import math

import torch as th

from . import logger
from .nn import convert_module_to_f16 as convert_module_to_f16  # the original's place
from .nn import convert_module_to_f32 as convert_module_to_f32

INITIAL_LOG_LOSS_SCALE = 20.0


class MixedPrecisionTrainer:
    """
    Owns the weights that the optimizer sees, `master_params`: the model's own, except that those in half precision
    have float32 copies. There is one for each of the model's parameters, so optimizer files fit both precisions.

    :param model: with `convert_to_fp16()` if use_fp16.
    :param fp16_scale_growth: what each good step adds to log2 of the loss scale.
    :param initial_lg_loss_scale: log2 of the first loss scale.
    :param grad_clip: the largest gradient norm; larger gradients are scaled down to it. 0: no limit.
    """

    def __init__(
        self,
        *,
        model,
        use_fp16=False,
        fp16_scale_growth=1e-3,
        initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
        grad_clip=0.0,
    ):
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale if use_fp16 else 0.0
        self.grad_clip = grad_clip
        self.bad_steps = 0  # in a row
        self.skipped = 0  # in all
        full = [(name, p.detach().clone()) for name, p in model.named_parameters()] if use_fp16 else []
        if use_fp16:
            model.convert_to_fp16()
        self.names, self.model_params = map(list, zip(*model.named_parameters()))
        masters = dict(full)
        self.master_params = [
            p if p.dtype == th.float32 else th.nn.Parameter(masters[name])
            for name, p in zip(self.names, self.model_params)
        ]
        self._halves = [(p, m) for p, m in zip(self.model_params, self.master_params) if p is not m]

    def zero_grad(self):
        for p in self.model_params + self.master_params:
            p.grad = None

    def backward(self, loss):
        (loss * 2**self.lg_loss_scale).backward()

    def optimize(self, opt):
        """
        Take a step, unless the gradient is not finite. The one host synchronization of a training step is here.

        :return: whether the step was taken.
        """
        for p, master in self._halves:
            master.grad = None if p.grad is None else p.grad.float()
        grads = [m.grad for m in self.master_params if m.grad is not None]
        norm = th.linalg.vector_norm(th.stack(th._foreach_norm(grads))).item() / 2**self.lg_loss_scale
        if self.use_fp16:
            logger.logkv_mean("lg_loss_scale", self.lg_loss_scale)
        if not math.isfinite(norm):
            self._skip()
            return False
        self.bad_steps = 0
        clip = min(1.0, self.grad_clip / norm) if self.grad_clip and norm else 1.0
        factor = clip / 2**self.lg_loss_scale
        if factor != 1:
            th._foreach_mul_(grads, factor)
        logger.logkv_mean("grad_norm", norm)
        opt.step()
        if self._halves:
            with th.no_grad():
                th._foreach_copy_([p for p, _ in self._halves], [m for _, m in self._halves])
        self.lg_loss_scale += self.fp16_scale_growth if self.use_fp16 else 0.0
        return True

    def _skip(self):
        self.bad_steps += 1
        self.skipped += 1
        if self.use_fp16:
            self.lg_loss_scale = max(self.lg_loss_scale - 1, 0.0)
            logger.log(f"Found NaN, decreased lg_loss_scale to {self.lg_loss_scale}")
        else:
            logger.warn(f"the loss or its gradient is not finite: step skipped ({self.skipped} so far)")
        self.zero_grad()

    def param_norm(self):
        """L2 norm of all weights: one host synchronization."""
        return th.linalg.vector_norm(th.stack(th._foreach_norm(self.master_params))).item()

    def master_params_to_state_dict(self, master_params):
        """A float32 state dict of the model in which `master_params` stand for its parameters (EMA weights do too)."""
        state = {name: value.float() for name, value in self.model.state_dict().items()}
        return {**state, **{name: p.detach() for name, p in zip(self.names, master_params)}}

    def state_dict_to_master_params(self, state_dict):
        """The inverse: a list of parameters in the order of `master_params`."""
        return [th.nn.Parameter(state_dict[name].to(m)) for name, m in zip(self.names, self.master_params)]
