"""
Training in 16 bits: float32 master weights, a loss scale that adapts, and steps that are skipped, not poisoned.

Nothing here waits for the device: whether a step was taken, the scale and the counts are tensors on it, which the loop
reads when it writes a row of its log.
"""

import torch as th

from . import logger, sharding
from .nn import convert_module_to_f16 as convert_module_to_f16  # the original's place
from .nn import convert_module_to_f32 as convert_module_to_f32
from .nn import laid_out

INITIAL_LOG_LOSS_SCALE = 20.0
PRECISIONS = {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}


class MixedPrecisionTrainer:
    """
    Owns the weights that the optimizer sees, `master_params`: the model's own, except that those in half precision
    have float32 copies, and of a sharded model they are this process's parts. There is one for each of the model's
    parameters, so optimizer files fit all of these.

    :param model: with `convert_to(dtype)` for other precisions than fp32, which a sharded one cannot have.
    :param precision: a row of PRECISIONS; "": fp16 if use_fp16, else fp32. Only fp16, whose numbers end at 65504 and
        6e-8, needs a loss scale.
    :param fp16_scale_growth: what each good step adds to log2 of the loss scale.
    :param initial_lg_loss_scale: log2 of the first loss scale.
    :param grad_clip: the largest gradient norm; larger gradients are scaled down to it. 0: no limit.
    """

    def __init__(
        self,
        *,
        model,
        use_fp16=False,
        precision="",
        fp16_scale_growth=1e-3,
        initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
        grad_clip=0.0,
    ):
        self.model, self.sharded = model, sharding.is_sharded(model)
        precision = precision or ("fp16" if use_fp16 else "fp32")
        self.use_fp16 = precision == "fp16"
        self.fp16_scale_growth = fp16_scale_growth
        self.grad_clip = grad_clip
        full = [(name, p.detach().clone()) for name, p in model.named_parameters()] if precision != "fp32" else []
        if precision != "fp32":
            model.convert_to(PRECISIONS[precision])
        self.names, self.model_params = map(list, zip(*model.named_parameters()))
        masters = dict(full)
        self.master_params = [
            p if p.dtype == th.float32 else th.nn.Parameter(masters[name])
            for name, p in zip(self.names, self.model_params)
        ]
        if self.sharded:
            self.master_params = [th.nn.Parameter(sharding.local(p)) for p in self.model_params]
            held, whole = (sum(p.numel() for p in params) for params in (self.master_params, self.model_params))
            logger.log(f"the network is shared: {held} of its {whole} weights are held by this process")
        self._copies = [(p, m) for p, m in zip(self.model_params, self.master_params) if p is not m]
        device = self.model_params[0].device
        precise = th.float32 if device.type == "mps" else th.float64
        self._lg_loss_scale = th.tensor(initial_lg_loss_scale if self.use_fp16 else 0.0, dtype=precise, device=device)
        self._counts = th.zeros(2, dtype=th.int64, device=device)  # of skipped steps: in a row, in all

    @property
    def lg_loss_scale(self):
        """log2 of the loss scale; reading it waits for the device, as do the two below."""
        return self._lg_loss_scale.item()

    @property
    def bad_steps(self):
        """Skipped steps in a row."""
        return self._counts.tolist()[0]

    @property
    def skipped(self):
        """Skipped steps in all."""
        return self._counts.tolist()[1]

    def state(self):
        """What to keep for a resumed run, as tensors."""
        return {"lg_loss_scale": self._lg_loss_scale, "counts": self._counts}

    def load_state(self, state):
        """Take up what `state` gave; a run in full precision keeps its scale of 1."""
        self._counts.copy_(state["counts"])
        if self.use_fp16:
            self._lg_loss_scale.copy_(state["lg_loss_scale"])

    def zero_grad(self):
        for p in self.model_params + self.master_params:
            p.grad = None

    def backward(self, loss):
        (loss * 2**self._lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt):
        """
        Take a step, unless the gradient is not finite.

        :return: (whether the step was taken, norm of the gradient before clipping): tensors of no axes, on the device.
        """
        for p, master in self._copies:
            master.grad = None if p.grad is None else sharding.local(p.grad).float()
        grads = [m.grad for m in self.master_params if m.grad is not None]
        norm = self.norm(grads)
        if self.use_fp16:
            norm = norm / 2**self._lg_loss_scale
        good = norm.isfinite()
        self._scale(grads, norm)
        _step(opt, good)
        if self._copies and not self.sharded:  # parts of a sharded model lie in its own memory
            with th.no_grad():
                th._foreach_copy_(*zip(*self._copies))
        self._count(good)
        return good, norm

    def _scale(self, grads, norm):
        factor = (self.grad_clip / norm).clamp(max=1) if self.grad_clip else None  # a norm of 0 gives inf, clamped
        if self.use_fp16:
            factor = (1 if factor is None else factor) / 2**self._lg_loss_scale
        if factor is not None:
            th._foreach_mul_(grads, factor.float())

    def _count(self, good):
        bad = (~good).long()
        self._counts.copy_(th.stack([(self._counts[0] + 1) * bad, self._counts[1] + bad]))
        if self.use_fp16:
            grown, shrunk = self._lg_loss_scale + self.fp16_scale_growth, (self._lg_loss_scale - 1).clamp(min=0)
            self._lg_loss_scale.copy_(th.where(good, grown, shrunk))

    def norm(self, tensors):
        """L2 norm over tensors like the master weights, of all processes where these hold parts; on the device."""
        norm = global_norm(tensors)
        return sharding.total_norm(norm) if self.sharded else norm

    def param_norm(self):
        """L2 norm of all weights: one host synchronization."""
        return self.norm(self.master_params).item()

    def master_params_to_state_dict(self, master_params):
        """
        A float32 state dict of the model in which `master_params` stand for its parameters (EMA weights do too), all
        of it contiguous. Of a sharded model it is whole on rank 0; collective then, as the three below are.
        """
        state = {name: value.float() for name, value in self.model.state_dict().items()}
        named = zip(self.names, master_params, self.model_params)
        state |= {name: sharding.whole(m.detach(), p) for name, m, p in named}
        return {name: _plain(value) for name, value in state.items()}

    def state_dict_to_master_params(self, state_dict):
        """The inverse: a list of parameters in the order of `master_params`."""
        named = zip(self.names, self.master_params, self.model_params)
        return [th.nn.Parameter(laid_out(sharding.part_of(state_dict[name], p).to(m), m)) for name, m, p in named]

    def optimizer_to_state_dict(self, opt):
        """The state of an optimizer of the master weights, one entry a parameter, as it is without sharding."""
        return sharding.moments(lambda *each: _plain(sharding.whole(*each)), opt.state_dict(), self.model_params)

    def load_optimizer(self, opt, state_dict):
        """The inverse. Raises ValueError or KeyError if it does not fit."""

        def fitted(value, like):  # fused steps take a moment for laid out as its parameter is
            return laid_out(sharding.part_of(value, like), like)

        opt.load_state_dict(sharding.moments(fitted, state_dict, self.model_params))


def _plain(tensor):
    """A tensor laid out as usual, for a file; None, of the ranks that hold no whole one, as it is."""
    return None if tensor is None else tensor.contiguous()


@th.no_grad()
def global_norm(tensors):
    """L2 norm over all tensors together, float32 on their device."""
    return th.linalg.vector_norm(th.stack(th._foreach_norm(tensors, dtype=th.float32)))  # of 16 bits, it may pass 65504


def make_adamw(params, **options):
    """AdamW in its fused form where the device has one: faster, and able to skip a step without asking the host."""
    params = list(params)
    fused = params[0].device.type in ("cpu", "cuda")
    return th.optim.AdamW(params, fused=fused, **options)


def _step(opt, good):
    """`opt.step()` where `good` (a tensor) is true. Fused optimizers look at it on the device, others on the host."""
    if getattr(opt, "_step_supports_amp_scaling", False):
        opt.grad_scale, opt.found_inf = None, (~good).float()
        opt.step()
        del opt.grad_scale, opt.found_inf
    elif good:
        opt.step()
