"""The training loop. What is trained is a task: a network and its loss; the loop knows neither noise nor labels."""

import contextlib
import copy
import os
import signal
import threading
import time

import numpy as np
import torch as th
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, dist_util, logger
from .checkpoint import parse_resume_step_from_filename as parse_resume_step_from_filename  # the original's place
from .fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from .nn import update_ema
from .resample import LossAwareSampler, UniformSampler

# -------------------------------------------------------------------------------------------------------------- tasks


class DiffusionTask:
    """
    Denoising at sampled timesteps.

    A task has a `net`, the number of rows `num_timesteps` (for the log), a `prefix` for its log keys, and two methods:
    `draw(n, device, rng) -> (t [n], weights [n])` and `loss(net, x0, cond, t, noise) -> {name: [n], "loss": [n]}`,
    where `net` is the network as the loop wrapped it and noise is N(0, I) like x0.
    """

    prefix = ""

    def __init__(self, model, diffusion, schedule_sampler=None):
        self.net = model
        self.diffusion = diffusion
        self.num_timesteps = diffusion.num_timesteps
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)

    def draw(self, n, device, rng):
        return self.schedule_sampler.sample(n, device, rng)

    def loss(self, net, x0, cond, t, noise):
        terms = self.diffusion.training_losses(net, x0, t, model_kwargs=cond, noise=noise)
        if isinstance(self.schedule_sampler, LossAwareSampler) and th.is_grad_enabled():
            self.schedule_sampler.update_with_local_losses(t, terms["loss"].detach())
        return terms


class ClassifierTask:
    """Classification of noised images (or clean ones, at t = 0); see `DiffusionTask` for the methods."""

    prefix = "train_"

    def __init__(self, classifier, diffusion, schedule_sampler=None, noised=True):
        self.net = classifier
        self.diffusion = diffusion
        self.num_timesteps = diffusion.num_timesteps
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.noised = noised

    def draw(self, n, device, rng):
        if not self.noised:
            return th.zeros(n, dtype=th.int64, device=device), th.ones(n, device=device)
        t, weights = self.schedule_sampler.sample(n, device, rng)
        return t, th.ones_like(weights)  # as the original: accuracy, not a bound, is the aim

    def loss(self, net, x0, cond, t, noise):
        x = self.diffusion.q_sample(x0, t, noise) if self.noised else x0
        logits = net(x, self.diffusion.clock(t))
        terms = {"loss": F.cross_entropy(logits, cond["y"], reduction="none")}
        for k in (1, min(5, logits.shape[1])):
            terms[f"acc@{k}"] = compute_top_k(logits, cond["y"], k, reduction="none")
        return terms


def compute_top_k(logits, labels, k, reduction="mean"):
    """Whether the label is among the k largest logits: its mean, or [N] with reduction "none"."""
    hits = (logits.topk(k, dim=-1).indices == labels[:, None]).any(-1).float()
    return hits.mean() if reduction == "mean" else hits


# ----------------------------------------------------------------------------------------------------------- the loop


class Trainer:
    """
    load -> loop { step, log, validate, save }.

    `step` counts updates: modelNNNNNN.pt holds exactly NNNNNN of them.

    :param task: what to train; see `DiffusionTask`.
    :param data: iterator of (x0 [N,C,H,W], cond dict).
    :param batch_size: images a step in each process; `microbatch` of them at a time are in memory (-1: all).
    :param beta2: decay of AdamW's mean of squared gradients.
    :param ema_rates: decay of each averaged copy of the weights.
    :param ema_warmup: limit the decay to (1 + step) / (10 + step), so that early averages forget the random start.
    :param iterations: stop after so many updates in all (0: no such limit).
    :param lr_anneal_steps: let the rate fall linearly to 0 over so many updates, and stop there (0: constant).
    :param grad_clip: largest gradient norm (0: no limit).
    :param max_bad_steps: stop after so many steps in a row whose gradient was not finite.
    :param val_data: iterator for validation every `eval_interval` steps, or None.
    :param seed: of the timesteps and noise.
    :param progress: show a progress bar.
    :param drop: `(cond, rng) -> cond`, which may replace conditions of a training batch by null ones, as
        `guidance.dropped` does; rng is the step's numpy generator. Validation drops nothing.
    :param flags: {name: value} that built the network, for the error of a checkpoint that does not fit it.
    """

    def __init__(
        self,
        task,
        data,
        *,
        batch_size,
        microbatch=-1,
        lr=1e-4,
        weight_decay=0.0,
        beta2=0.999,
        ema_rates=(),
        ema_warmup=True,
        iterations=0,
        lr_anneal_steps=0,
        log_interval=10,
        save_interval=10000,
        resume_checkpoint="",
        use_fp16=False,
        fp16_scale_growth=1e-3,
        initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
        grad_clip=0.0,
        max_bad_steps=100,
        val_data=None,
        eval_interval=0,
        seed=0,
        progress=False,
        drop=None,
        flags=None,
    ):
        counts = {"batch_size": batch_size, "log_interval": log_interval, "save_interval": save_interval}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        if not all(0 <= rate < 1 for rate in ema_rates):
            raise ValueError(f"an ema_rate is a decay in [0, 1), as 0.9999, not {', '.join(map(str, ema_rates))}")
        self.task, self.data = task, data
        self.batch_size = batch_size
        self.microbatch = min(microbatch, batch_size) if microbatch > 0 else batch_size
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 is a decay in [0, 1), as 0.999, not {beta2}")
        self.lr, self.lr_anneal_steps, self.weight_decay = lr, lr_anneal_steps, weight_decay
        self.betas = 0.9, beta2
        self.total = min([steps for steps in (iterations, lr_anneal_steps) if steps > 0], default=0)
        self.ema_rates, self.ema_warmup = list(ema_rates), ema_warmup
        self.log_interval, self.save_interval, self.eval_interval = log_interval, save_interval, eval_interval
        self.max_bad_steps, self.val_data = max_bad_steps, val_data
        self.seed, self.progress, self.drop = seed, progress, drop
        self.step = self.saved_at = 0
        self.stop_asked = False
        self.device = next(task.net.parameters()).device

        if resume_checkpoint:
            self._load_weights(resume_checkpoint, flags or {})
        dist_util.sync_params(task.net.parameters())
        self.mp_trainer = MixedPrecisionTrainer(
            model=task.net,
            use_fp16=use_fp16,
            fp16_scale_growth=fp16_scale_growth,
            initial_lg_loss_scale=initial_lg_loss_scale,
            grad_clip=grad_clip,
        )
        self.opt = th.optim.AdamW(self.mp_trainer.master_params, lr=lr, betas=self.betas, weight_decay=weight_decay)
        self.ema_params = [copy.deepcopy(self.mp_trainer.master_params) for _ in self.ema_rates]
        if resume_checkpoint:
            self._load_companions(resume_checkpoint)
        self.net = self._parallel(task.net)
        self._terms = []  # (key prefix, t, {name: [n]}) since the last log, still on the device
        self._seconds = time.monotonic()

    @staticmethod
    def _parallel(net):
        if dist_util.world_size() == 1:
            return net
        device = next(net.parameters()).device
        return DistributedDataParallel(
            net,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=128,
            gradient_as_bucket_view=True,
        )

    # --------------------------------------------------------------------------------------------------------- walk

    def run_loop(self):
        """Train until the last update is done and saved; without a limit, for ever."""
        with self._bar() as bar, self._interruptible():
            while not self.total or self.step < self.total:
                x0, cond = self._next_of(self.data)
                self.run_step(x0, cond)
                bar.update()
                if self.val_data is not None and self.eval_interval and self.step % self.eval_interval == 0:
                    self.validate()
                if self.step == 1 or self.step % self.log_interval == 0:
                    bar.set_postfix(loss=f"{self.dump_log():.4g}")
                if self.step % self.save_interval == 0:
                    self.save()
                    if os.environ.get("DIFFUSION_TRAINING_TEST"):
                        return
                if self.stop_asked:
                    self._stop()
        if self._terms:
            self.dump_log()
        if self.saved_at != self.step:
            self.save()

    @contextlib.contextmanager
    def _interruptible(self):
        """In a single process, Ctrl-C and SIGTERM let the update under way end, save it and say how to go on."""
        if dist_util.world_size() > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _ask_to_stop(self, number, frame):
        self.stop_asked = True

    def _stop(self):
        if self.saved_at != self.step:
            self.save()
        name = os.path.join(logger.get_dir(), checkpoint.model_name(self.step))
        logger.log(f"stopped at update {self.step}; go on by the same command with --resume_checkpoint {name}")
        raise KeyboardInterrupt

    def _next_of(self, batches):
        """A batch; if an image of it cannot be read, the updates so far are saved before the run stops."""
        try:
            return next(batches)
        except ValueError:
            if self.saved_at != self.step:
                self._write_files()
            raise

    def _bar(self):
        from tqdm.auto import tqdm

        return tqdm(
            total=self.total or None,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not (self.progress and dist_util.is_main()),
            mininterval=0.5,
        )

    def run_step(self, x0, cond):
        """One update from a batch x0 [N,C,H,W]; skipped, and counted, if its gradient is not finite."""
        self._set_lr()
        self.forward_backward(x0, cond)
        took_step = self.mp_trainer.optimize(self.opt)
        self.step += 1
        if took_step:
            self._update_ema()
        elif self.mp_trainer.bad_steps >= self.max_bad_steps:
            raise ArithmeticError(
                f"the loss or its gradient was not finite in {self.mp_trainer.bad_steps} updates in a row, up to "
                f"update {self.step}: stopped, and the last checkpoint (update {self.saved_at}) left as it is; lower "
                "--lr, set --grad_clip 1, or look for bad values in the data"
            )

    def forward_backward(self, x0, cond):
        """
        Gradients of the batch's mean loss, summed over microbatches by their share of the batch, so that the
        microbatch changes memory and nothing else. (The original adds up the microbatches' means.)
        """
        self.mp_trainer.zero_grad()
        rng = np.random.default_rng((self.seed, self.step, dist_util.rank()))
        th.manual_seed(int(rng.integers(2**63)))
        x0 = x0.to(self.device, non_blocking=True)
        cond = {name: value.to(self.device, non_blocking=True) for name, value in cond.items()}
        t, weights = self.task.draw(len(x0), self.device, rng)
        cond = self.drop(cond, rng) if self.drop else cond
        noise = th.randn_like(x0)
        starts = range(0, len(x0), self.microbatch)
        for start in starts:
            part = slice(start, start + self.microbatch)
            last = start == starts[-1]
            wait = contextlib.nullcontext() if last or self.net is self.task.net else self.net.no_sync()
            with wait:
                part_cond = {name: value[part] for name, value in cond.items()}
                terms = self.task.loss(self.net, x0[part], part_cond, t[part], noise[part])
                weighted = {name: value * weights[part] for name, value in terms.items()}
                self._terms.append((self.task.prefix, t[part], {k: v.detach() for k, v in weighted.items()}))
                self.mp_trainer.backward(weighted["loss"].sum() / len(x0))

    def _set_lr(self):
        share = self.step / self.lr_anneal_steps if self.lr_anneal_steps else 0.0
        for group in self.opt.param_groups:  # as asked for now, whatever a resumed optimizer remembers
            group.update(lr=self.lr * (1 - share), weight_decay=self.weight_decay, betas=self.betas)

    def _update_ema(self):
        ceiling = self.step / (9 + self.step) if self.ema_warmup else 1.0
        for rate, params in zip(self.ema_rates, self.ema_params):
            update_ema(params, self.mp_trainer.master_params, rate=min(rate, ceiling))

    # ----------------------------------------------------------------------------------------- validation and the log

    @th.no_grad()
    def validate(self):
        """Log the loss of one held-out batch under val_*."""
        x0, cond = self._next_of(self.val_data)
        cond = {name: value.to(self.device) for name, value in cond.items()}
        training = self.task.net.training
        self.task.net.eval()
        rng = np.random.default_rng((self.seed, self.step, dist_util.rank(), 1))
        t, _ = self.task.draw(len(x0), self.device, rng)
        x0 = x0.to(self.device)
        terms = self.task.loss(self.task.net, x0, cond, t, th.randn_like(x0))
        self._terms.append(("val_", t, terms))
        self.task.net.train(training)

    def dump_log(self):
        """Write a row of the log: means over all processes since the last one. Returns the training loss."""
        means = self._reduced_terms()
        now = time.monotonic()
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.batch_size * dist_util.world_size())
        logger.logkv("lr", self.opt.param_groups[0]["lr"])
        logger.logkv("param_norm", self.mp_trainer.param_norm())
        if self.mp_trainer.skipped:
            logger.logkv("skipped_steps", self.mp_trainer.skipped)
        for name, value in means.items():
            logger.logkv(name, value)
        logger.logkv("seconds", now - self._seconds)
        self._seconds = now
        logger.dumpkvs()
        return means.get(self.task.prefix + "loss", float("nan"))

    def _reduced_terms(self):
        """Means of every term, over all t and by quartile of t (_q0 the least noise), over all processes."""
        rows = {}
        for prefix, t, terms in self._terms:
            for name, values in terms.items():
                rows.setdefault(prefix + name, []).append(th.stack([values.float(), t.float()]))
        self._terms = []
        sums = {}
        for name, parts in rows.items():
            values, t = th.cat(parts, 1).cpu().double().numpy()  # one transfer a term and log interval
            values, t = values[np.isfinite(values)], t[np.isfinite(values)]  # skipped steps are counted, not averaged
            quartile = (4 * t / self.task.num_timesteps).astype(int)
            for key, chosen in [(name, values), *((f"{name}_q{q}", values[quartile == q]) for q in range(4))]:
                if len(chosen):
                    sums[key] = (chosen.sum(), len(chosen))
        total = {}
        for part in dist_util.gather_objects(sums):
            for key, (value, count) in part.items():
                before = total.get(key, (0.0, 0))
                total[key] = (before[0] + value, before[1] + count)
        return {key: value / count for key, (value, count) in total.items()}

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(self):
        """Write a checkpoint, and let no process go on before it is there."""
        self._write_files()
        self.saved_at = self.step
        dist_util.barrier()

    def _write_files(self):
        """On rank 0: the averaged weights and the optimizer, then the model, whose presence says that all is there."""
        if not dist_util.is_main():
            return
        folder = logger.get_dir()
        for rate, params in zip(self.ema_rates, self.ema_params):
            state = self.mp_trainer.master_params_to_state_dict(params)
            checkpoint.save(state, os.path.join(folder, checkpoint.ema_name(rate, self.step)))
        checkpoint.save(self.opt.state_dict(), os.path.join(folder, checkpoint.opt_name(self.step)))
        state = self.mp_trainer.master_params_to_state_dict(self.mp_trainer.master_params)
        checkpoint.save(state, os.path.join(folder, checkpoint.model_name(self.step)))

    def _load_weights(self, path, flags):
        self.step = self.saved_at = checkpoint.parse_resume_step_from_filename(path)
        logger.log(f"going on from {path} at update {self.step}")
        checkpoint.load_weights(self.task.net, checkpoint.load(path), path=path, flags=flags)

    def _load_companions(self, path):
        """The averaged weights and the optimizer that belong to the model file `path`; said if one is missing."""
        folder = os.path.dirname(path)
        for i, rate in enumerate(self.ema_rates):
            state = self._companion(os.path.join(folder, checkpoint.ema_name(rate, self.step)))
            if state is not None:
                self.ema_params[i] = self.mp_trainer.state_dict_to_master_params(state)
        state = self._companion(os.path.join(folder, checkpoint.opt_name(self.step)))
        if state is not None:
            try:
                self.opt.load_state_dict(state)
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"the optimizer state beside {path} does not fit this network ({error}); move "
                    f"{checkpoint.opt_name(self.step)} away to start the optimizer anew"
                ) from error

    def _companion(self, path):
        if os.path.exists(path) or "://" in path:
            return checkpoint.load(path, map_location=self.device)
        logger.warn(f"{path} is missing: starting it anew from the loaded weights")
        return None


class TrainLoop(Trainer):
    """The loop for diffusion models, under the original's name and arguments; further ones go to `Trainer`."""

    def __init__(
        self,
        *,
        model,
        diffusion,
        data,
        batch_size,
        microbatch,
        lr,
        ema_rate,
        log_interval,
        save_interval,
        resume_checkpoint,
        use_fp16=False,
        fp16_scale_growth=1e-3,
        schedule_sampler=None,
        weight_decay=0.0,
        lr_anneal_steps=0,
        **more,
    ):
        super().__init__(
            DiffusionTask(model, diffusion, schedule_sampler),
            data,
            batch_size=batch_size,
            microbatch=microbatch,
            lr=lr,
            ema_rates=parse_ema_rates(ema_rate),
            log_interval=log_interval,
            save_interval=save_interval,
            resume_checkpoint=resume_checkpoint,
            use_fp16=use_fp16,
            fp16_scale_growth=fp16_scale_growth,
            weight_decay=weight_decay,
            lr_anneal_steps=lr_anneal_steps,
            **more,
        )


def parse_ema_rates(ema_rate):
    """0.9999 or "0.999,0.9999" -> list of floats; "" -> none. Raises ValueError for anything else."""
    if isinstance(ema_rate, float):
        return [ema_rate]
    try:
        return [float(part) for part in ema_rate.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"cannot read ema_rate {ema_rate!r}: give decays as 0.9999 or 0.999,0.9999") from None
