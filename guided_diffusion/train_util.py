"""The training loop. What is trained is a task: a network and its loss; the loop knows neither noise nor labels."""

import contextlib
import copy
import math
import os
import time

import numpy as np
import torch as th
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, dist_util, ema, health, layouts, logger, recognition, saves
from .checkpoint import parse_resume_step_from_filename as parse_resume_step_from_filename  # the original's place
from .compiling import compile_blocks
from .fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer, global_norm, make_adamw
from .nn import update_ema
from .sampling import sent
from .sharding import shard
from .tally import Tally, merged
from .tasks import ClassifierTask as ClassifierTask
from .tasks import DiffusionTask as DiffusionTask
from .tasks import SuperResTask as SuperResTask
from .tasks import compute_top_k as compute_top_k

STATE_FORMAT = 1
# First words of seeds, which keep the families of random numbers apart: of training, of validation, and of what either
# is conditioned on.
_TRAIN, _VALIDATE, _CONDITION = 0, 1, 2


def check_options(given):
    """
    Raise ValueError for options, {name: value}, that no loop can have.

    :param given: with the arguments of `Trainer` and precision settled; val_data None: there is none.
    """
    for name in ("batch_size", "log_interval", "save_interval"):
        if given[name] < 1:
            raise ValueError(f"{name} must be 1 or more, not {given[name]}")
    sharding, precision, lr, lr_min = (given[name] for name in ("sharding", "precision", "lr", "lr_min"))
    if sharding not in ("none", "fsdp") or (sharding == "fsdp" and precision != "fp32"):
        raise ValueError(f"sharding is none, or, in precision fp32, fsdp; not {sharding} in {precision}")
    for name in ("compile", "channels_last"):
        if given[name] and sharding != "none":
            raise ValueError(f"--{name} True is for whole networks: not with --sharding {sharding}")
    if given["lr_schedule"] not in LR_SCHEDULES:
        raise ValueError(f"unknown lr_schedule {given['lr_schedule']!r}: choose from {', '.join(LR_SCHEDULES)}")
    if given["keep_best"] and given["val_data"] is None:
        raise ValueError("keep_best needs held-out images: give --val_data_dir")
    if not 0 <= given["beta2"] < 1:
        raise ValueError(f"beta2 is a decay in [0, 1), as 0.999, not {given['beta2']}")
    if not 0 <= lr_min <= lr:
        raise ValueError(f"lr_min is a rate from 0 to lr {lr}, not {lr_min}")
    for name in ("weight_decay", "grad_clip", "lr_warmup"):
        if given[name] < 0:
            raise ValueError(f"{name} must be 0 or more, not {given[name]}")


class Trainer:
    """
    load -> loop { step, log, validate, save }.

    `step` counts updates: modelNNNNNN.pt holds exactly NNNNNN of them. Everything random is a function of the seed, the
    step and the place of a sample in the whole batch (place k of rank r is k * ranks + r), so that neither microbatches
    nor the way the batch is shared among processes change a run but in the order of sums. Dropout alone is drawn for
    each process and microbatch: it is the same again only for the same shares.

    :param task: what to train; see `tasks.DiffusionTask`.
    :param data: iterator of (x0 [N,C,H,W], cond dict); for a resumed run, from where it stopped.
    :param batch_size: images a step in each process; `microbatch` of them at a time are in memory (-1: all).
    :param beta2: decay of AdamW's mean of squared gradients.
    :param averages: of the weights; see `ema`.
    :param iterations: stop after so many updates in all (0: no such limit).
    :param lr_schedule: a row of LR_SCHEDULES; all but "constant" end with `lr_anneal_steps`.
    :param lr_anneal_steps: let the rate fall to `lr_min` over so many updates, and stop there (0: constant).
    :param lr_warmup: let the rate rise linearly from 0 over so many updates first.
    :param precision: fp32, bf16 or fp16; "": as use_fp16 says.
    :param grad_clip: largest gradient norm (0: no limit).
    :param max_bad_steps: stop when so many steps in a row had no finite gradient; seen when a row of the log is due.
    :param max_minutes: save and stop after so many minutes (0: no limit).
    :param val_data: iterator for validation every `eval_interval` steps, or None.
    :param keep_last, keep_every, keep_best: which checkpoints stay; see `saves.Saver`. The best has the least mean
        validation loss since the save before it.
    :param background_save: write checkpoints beside the next steps.
    :param seed: of everything random.
    :param progress: show a progress bar.
    :param sharding: "none": each of several processes holds the whole network; "fsdp": a part of it, see `sharding`.
    :param compile: have the network's blocks compiled, see `compiling`; not with sharding.
    :param channels_last: have it compute in that layout, see `layouts`; not with sharding.
    :param drop: `(cond, rng) -> cond`, which may replace conditions of a training batch by null ones, as
        `guidance.dropped` does; rng is the step's numpy generator. Validation drops nothing.
    :param flags: {name: value} that built the network, for the error of a checkpoint that does not fit it.
    :param watchers: (interval, function) pairs: after so many updates the function is called with the trainer, on every
        process, and may put numbers into the next row of the log.
    :param folder: of the checkpoints, any path that blobfile writes; None: that of the log.
    """

    def __init__(
        self, task, data, *, batch_size, microbatch=-1, lr=1e-4, weight_decay=0.0, beta2=0.999, averages=(),
        iterations=0, lr_schedule="linear", lr_anneal_steps=0, lr_min=0.0, lr_warmup=0, log_interval=10,
        save_interval=10000, resume_checkpoint="", use_fp16=False, precision="", fp16_scale_growth=1e-3,
        initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE, grad_clip=0.0, max_bad_steps=100, max_minutes=0.0, val_data=None,
        eval_interval=0, keep_last=0, keep_every=0, keep_best=False, background_save=True, seed=0, progress=False,
        sharding="none", compile=False, channels_last=False, drop=None, watchers=(), flags=None, folder=None,
    ):  # fmt: skip
        precision = precision or ("fp16" if use_fp16 else "fp32")
        check_options(locals())
        self.task, self.data, self.val_data = task, data, val_data
        self.batch_size = batch_size
        self.microbatch = min(microbatch, batch_size) if microbatch > 0 else batch_size
        self.lr, self.weight_decay, self.betas = lr, weight_decay, (0.9, beta2)
        self.lr_schedule, self.lr_anneal_steps, self.lr_warmup = lr_schedule, lr_anneal_steps, lr_warmup
        self.lr_min = lr_min
        self.total = min([steps for steps in (iterations, lr_anneal_steps) if steps > 0], default=0)
        self.averages = list(averages)
        self.log_interval, self.save_interval, self.eval_interval = log_interval, save_interval, eval_interval
        self.seed, self.progress, self.drop, self.watchers = seed, progress, drop, watchers
        self.max_bad_steps = max_bad_steps
        self.device = next(task.net.parameters()).device

        self.step = self.saved_at = self.images = 0
        self.best = {"step": None, "val_loss": math.inf} if keep_best else None
        self.stop = health.StopSigns(max_minutes)
        self.tally, self._val_losses = Tally(task.num_timesteps), []

        self._prepare_network(resume_checkpoint, flags or {}, sharding, channels_last)
        self.mp_trainer = MixedPrecisionTrainer(
            model=task.net, precision=precision, fp16_scale_growth=fp16_scale_growth,
            initial_lg_loss_scale=initial_lg_loss_scale, grad_clip=grad_clip,
        )  # fmt: skip
        self.opt = make_adamw(self.mp_trainer.master_params, lr=lr, betas=self.betas, weight_decay=weight_decay)
        self.ema_params = [copy.deepcopy(self.mp_trainer.master_params) for _ in self.averages]
        if resume_checkpoint:
            self._load_companions(resume_checkpoint)
        self.net = self._parallel(compile_blocks(task.net) if compile else task.net)

        self.folder = folder or logger.get_dir()
        self.saver = saves.Saver(self.folder, background=background_save, keep_last=keep_last, keep_every=keep_every)
        self._seconds = time.monotonic()

    def _prepare_network(self, resume_checkpoint, flags, sharding, channels_last):
        """Give the network the weights to start from, the same in all processes, in its places and its layout."""
        if resume_checkpoint:
            self._load_weights(resume_checkpoint, flags)
        dist_util.sync_params(self.task.net.parameters())
        if sharding == "fsdp" and dist_util.world_size() > 1:
            shard(self.task.net)
        if channels_last:
            layouts.to_channels_last(self.task.net, logger.log)

    def _parallel(self, net):
        if dist_util.world_size() == 1 or self.mp_trainer.sharded:
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
        """
        Train until the last update is done and saved; without a limit, for ever.

        :raises health.Stopped: after a save, if a signal or the time asked for the end.
        """
        with self._bar() as bar, self.stop.listening(), self.saver, health.naming_lost_loaders():
            while not self.total or self.step < self.total:
                batch, error = self._next_of(self.data)
                self._agree_to_go_on(error)
                self.run_step(*batch)
                bar.update()
                if self._due(self.eval_interval) and self.val_data is not None:
                    self.validate()
                for interval, watch in self.watchers:
                    if self._due(interval):
                        watch(self)
                if self.step == 1 or self._due(self.log_interval):
                    bar.set_postfix(loss=f"{self.dump_log():.4g}")
                if self._due(self.save_interval):
                    self.save()
                    if os.environ.get("DIFFUSION_TRAINING_TEST"):
                        break
                self.saver.check()
            if self.tally:
                self.dump_log()
            self._save_if_new()

    def _due(self, interval):
        return interval > 0 and self.step % interval == 0

    def _agree_to_go_on(self, error):
        """
        All processes go on, or all save the updates so far and leave: the one that met an error by raising it, the
        others because of it; all, if one of them was asked to stop.
        """
        reason = dist_util.largest(health.FAILED if error else self.stop.asked())
        if not reason:
            return
        self._save_if_new()
        if error:
            raise error
        name = os.path.join(self.folder, checkpoint.model_name(self.step))
        saved = f"at update {self.step}, which is saved in {name}" if self.step else "before the first update"
        raise health.Stopped(reason, f"stopped {saved}: run the same command again to go on")

    def _save_if_new(self):
        if self.saved_at != self.step:
            self.save()
        self.saver.wait()
        dist_util.barrier()

    @staticmethod
    def _next_of(batches):
        """(a batch, None), or (None, the error of an image that cannot be read)."""
        try:
            return next(batches), None
        except (ValueError, OSError) as error:
            return None, error

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

    # --------------------------------------------------------------------------------------------------------- a step

    def run_step(self, x0, cond):
        """One update from a batch x0 [N,C,H,W]; skipped, and counted, if its gradient is not finite."""
        self._set_lr()
        self.forward_backward(x0, cond)
        good, norm = self.mp_trainer.optimize(self.opt)
        self.tally.add(grad_norm=norm)
        if self.mp_trainer.use_fp16:
            self.tally.add(lg_loss_scale=self.mp_trainer._lg_loss_scale)
        self.step += 1
        self.images += self.batch_size * dist_util.world_size()
        for average, params in zip(self.averages, self.ema_params):
            decay = average.decay(self.step, self.batch_size * dist_util.world_size())
            update_ema(params, self.mp_trainer.master_params, rate=decay, where=good)

    def forward_backward(self, x0, cond):
        """
        Gradients of the batch's mean loss, summed over microbatches by their share of the batch, so that the
        microbatch changes memory and nothing else. (The original adds up the microbatches' means.)
        """
        self.mp_trainer.zero_grad()
        x0, cond, t, weights, noise = self._last = self._draws(_TRAIN, x0, cond)
        losses, starts = [], range(0, len(x0), self.microbatch)
        for start in starts:
            part = slice(start, start + self.microbatch)
            last = start == starts[-1]
            with self._synchronizing(last):
                terms = self.task.loss(self.net, x0[part], _part(cond, part), t[part], noise[part])
                losses.append(terms["loss"].detach())
                weighted = {name: value * weights[part] for name, value in terms.items()}
                self.tally.add_terms(weighted, t[part], self.task.prefix)
                self.mp_trainer.backward(weighted["loss"].sum() / len(x0))
            if start == 0 and not last and self._tells_noise_scale:
                self._first_norm = self._gradient_norm()
        if len(starts) > 1 and self._tells_noise_scale:
            self._note_noise_scale(len(x0))
        if hasattr(self.task, "learn"):
            self.task.learn(t, th.cat(losses))

    @contextlib.contextmanager
    def _synchronizing(self, last):
        """Gradients are exchanged between processes after the last microbatch only."""
        if self.mp_trainer.sharded:
            self.net.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or self.net is self.task.net else self.net.no_sync():
            yield

    def _draws(self, family, x0, cond):
        """
        A batch on the device with its timesteps, weights and noise, and its conditions dropped where training drops
        them. All is drawn for the whole batch of all processes, of which this one takes its share.
        """
        ranks, rank = dist_util.world_size(), dist_util.rank()
        rng = np.random.default_rng((family, self.seed, self.step))
        th.manual_seed(int(rng.integers(2**63)) + rank)  # of dropout
        x0, cond = sent(x0, self.device), {name: sent(value, self.device) for name, value in cond.items()}
        t, weights = (each[rank::ranks] for each in self.task.draw(len(x0) * ranks, self.device, rng))
        places, share = range(rank, len(x0) * ranks, ranks), Share(rng, rank, ranks)
        if self.drop and family == _TRAIN:
            cond = self.drop(cond, share)
        if hasattr(self.task, "condition"):
            words = (_CONDITION + family, self.seed, self.step)
            cond = self.task.condition(x0, cond, share, lambda x: noise_like(x, words, places))
        return x0, cond, t, weights, noise_like(x0, (family, self.seed, self.step), places)

    def _gradient_norm(self):
        norm = global_norm([p.grad for p in self.mp_trainer.model_params if p.grad is not None])
        return norm / 2**self.mp_trainer._lg_loss_scale if self.mp_trainer.use_fp16 else norm

    @property
    def _tells_noise_scale(self):
        return not self.mp_trainer.sharded  # whose parts of a gradient are added up over processes at once

    def _note_noise_scale(self, n):
        """
        The two unbiased estimates behind the gradient noise scale tr(S) / |G|^2 (McCandlish et al. 2018, arXiv
        1812.06162, appendix A.1), from the norms of the gradients of the first microbatch, of n images in this process,
        and of all images of all processes. Of the first there is one in each process: the log has their mean.
        """
        b, small = self.microbatch, (self._first_norm * n / self.microbatch).square()
        n, big = n * dist_util.world_size(), self._gradient_norm().square()
        self.tally.add(grad_square=(n * big - b * small) / (n - b), grad_trace=(small - big) / (1 / b - 1 / n))

    def _set_lr(self):
        """As asked for now, whatever a resumed optimizer remembers."""
        done = self.step / self.lr_anneal_steps if self.lr_anneal_steps else 0.0
        lr = self.lr_min + (self.lr - self.lr_min) * LR_SCHEDULES[self.lr_schedule](done)
        lr *= min(1.0, (self.step + 1) / max(self.lr_warmup, 1))
        for group in self.opt.param_groups:
            group.update(lr=lr, weight_decay=self.weight_decay, betas=self.betas)

    # ----------------------------------------------------------------------------------------- validation and the log

    @th.no_grad()
    def validate(self):
        """Add the loss of one held-out batch to the log under val_*."""
        batch, error = self._next_of(self.val_data)
        self._agree_to_go_on(error)
        with health.evaluating(self.task.net):
            x0, cond, t, _, noise = self._draws(_VALIDATE, *batch)
            terms = self.task.loss(self.task.net, x0, cond, t, noise)
        self.tally.add_terms(terms, t, "val_")
        self._val_losses.append(terms["loss"].mean())

    def dump_log(self):
        """Write a row of the log: means over all processes since the last one. Returns the training loss."""
        row = self.tally.means()
        trace, square = row.pop("grad_trace", None), row.pop("grad_square", None)
        if trace is not None and min(trace, square) > 0:
            row["grad_noise_scale"] = trace / square  # images
        row |= self._probe()
        now = time.monotonic()
        row |= {"step": self.step, "samples": self.images, "lr": self.opt.param_groups[0]["lr"],
                "param_norm": self.mp_trainer.param_norm(), "seconds": now - self._seconds}  # fmt: skip
        self._seconds = now
        for average, params in zip(self.averages, self.ema_params):
            gaps = th._foreach_sub(params, self.mp_trainer.master_params)
            row[f"ema_distance_{average.name}"] = self.mp_trainer.norm(gaps).item() / row["param_norm"]
        if self.mp_trainer.skipped:
            row["skipped_steps"] = self.mp_trainer.skipped
        for name, value in row.items():
            logger.logkv(name, value)
        logger.dumpkvs()
        self._check_health()
        return row.get(self.task.prefix + "loss", math.nan)

    @th.no_grad()
    def _probe(self):
        """What the task can tell of its last batch, in this process."""
        if not hasattr(self.task, "probe"):
            return {}
        x0, cond, t, _, noise = self._last
        part = slice(0, self.microbatch)
        with health.evaluating(self.task.net):
            return self.task.probe(x0[part], _part(cond, part), t[part], noise[part])

    def _check_health(self):
        if (bad := self.mp_trainer.bad_steps) and self.mp_trainer.use_fp16:
            logger.log(f"Found NaN, decreased lg_loss_scale to {self.mp_trainer.lg_loss_scale}")
        elif bad:
            logger.warn(f"the loss or its gradient is not finite: step skipped ({self.mp_trainer.skipped} so far)")
        if bad >= self.max_bad_steps:
            x0, cond, t, _, noise = self._last
            where = health.first_not_finite(self.task, x0, cond, t, noise)
            self.saver.wait()
            raise ArithmeticError(
                f"the loss or its gradient was not finite in {bad} updates in a row, up to update {self.step}; first "
                f"not finite: {where}. Stopped, and the last checkpoint (update {self.saved_at}) left as it is; lower "
                "--lr, set --grad_clip 1, or look for bad values in the data"
            )

    @contextlib.contextmanager
    @th.no_grad()
    def averaged(self):
        """The network in evaluation mode, with the first average in place of its weights as long as the block lasts."""
        params = self.mp_trainer.model_params
        kept = [p.detach().clone() for p in params]
        average = self.ema_params[0] if self.ema_params else self.mp_trainer.master_params
        th._foreach_copy_(params, average)
        try:
            with health.evaluating(self.task.net):
                yield self.task.net
        finally:
            th._foreach_copy_(params, kept)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(self):
        """Write a checkpoint, in the background unless told otherwise. Collective."""
        tallies = dist_util.gather_objects(self.tally.state())
        if self.best is not None and self._val_losses:
            losses = dist_util.gather_objects(th.stack(self._val_losses).mean().item())
            if (mean := sum(losses) / len(losses)) < self.best["val_loss"]:
                self.best = {"step": self.step, "val_loss": mean}
                logger.log(f"the least validation loss so far, {mean:.4g}: {checkpoint.model_name(self.step)}")
        self._val_losses = []
        files = self._files(tallies) if dist_util.is_main() or self.mp_trainer.sharded else None
        if dist_util.is_main():
            self.saver.submit(self.step, files, self.best and self.best["step"])
        self.saved_at = self.step

    def _files(self, tallies):
        """{file name: content}, the model last, as whoever watches the folder may wait for it."""
        as_state = self.mp_trainer.master_params_to_state_dict
        files = {checkpoint.ema_name(average.name, self.step): as_state(params)
                 for average, params in zip(self.averages, self.ema_params)}  # fmt: skip
        files[checkpoint.opt_name(self.step)] = self.mp_trainer.optimizer_to_state_dict(self.opt)
        sampler = getattr(self.task, "schedule_sampler", None)
        files[saves.state_name(self.step)] = {
            "format": STATE_FORMAT,
            "step": self.step,
            "images": self.images,
            "batch_size": self.batch_size,
            "ranks": dist_util.world_size(),
            "seed": self.seed,
            "precision": self.mp_trainer.state(),
            "sampler": sampler.state() if hasattr(sampler, "state") else None,
            "tallies": tallies,
            "best": self.best,
        }
        files[checkpoint.model_name(self.step)] = as_state(self.mp_trainer.master_params)
        return files

    def _load_weights(self, path, flags):
        self.step = self.saved_at = checkpoint.parse_resume_step_from_filename(path)
        logger.log(f"going on from {path} at update {self.step}")
        recognition.load_weights(self.task.net, checkpoint.load(path), path=path, flags=flags)

    def _load_companions(self, path):
        """The averages, the optimizer and the rest that belong to the model file `path`; said if one is missing."""
        folder = os.path.dirname(path)
        for i, average in enumerate(self.averages):
            state = self._companion(os.path.join(folder, checkpoint.ema_name(average.name, self.step)))
            if state is not None:
                self.ema_params[i] = self.mp_trainer.state_dict_to_master_params(state)
        state = self._companion(os.path.join(folder, checkpoint.opt_name(self.step)))
        if state is not None:
            try:
                self.mp_trainer.load_optimizer(self.opt, state)
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"the optimizer state beside {path} does not fit this network ({error}); move "
                    f"{checkpoint.opt_name(self.step)} away to start the optimizer anew"
                ) from error
        self.images = self.step * self.batch_size * dist_util.world_size()
        state = self._companion(os.path.join(folder, saves.state_name(self.step)))
        if state is not None:
            self._load_state(state)

    def _load_state(self, state):
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"{saves.state_name(self.step)} has format {state.get('format')}, not {STATE_FORMAT}")
        self.images = state["images"]
        self.mp_trainer.load_state(state["precision"])
        if state["sampler"] is not None and hasattr(self.task.schedule_sampler, "load_state"):
            self.task.schedule_sampler.load_state(state["sampler"])
        if self.best is not None and state["best"]:
            self.best = state["best"]
        tallies, ranks, rank = state["tallies"], dist_util.world_size(), dist_util.rank()
        if len(tallies) == ranks:
            self.tally.load_state(tallies[rank], self.device)
        elif rank == 0:
            self.tally.load_state(merged(tallies), self.device)
        before, now = state["batch_size"] * state["ranks"], self.batch_size * ranks
        if (state["ranks"], state["batch_size"]) != (ranks, self.batch_size):
            same = "the same up to the order of sums" if before == now else "another run from here on"
            logger.log(
                f"the checkpoint was made by {state['ranks']} process(es) with batches of {state['batch_size']}, this "
                f"run has {ranks} with {self.batch_size}: it is {same}"
            )

    def _companion(self, path):
        if checkpoint.exists(path):
            return checkpoint.load(path, map_location=self.device)
        logger.warn(f"{path} is missing: starting it anew from the loaded weights")
        return None


LR_SCHEDULES = {  # the share of the way from --lr_min to --lr, by the share of --lr_anneal_steps that is done
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}


class Share:
    """A numpy generator as one of several processes sees it: what it draws is this process's part of a common draw."""

    def __init__(self, rng, rank, ranks):
        self.rng, self.rank, self.ranks = rng, rank, ranks

    def random(self, n):
        """[n] uniform in [0, 1)."""
        return self.rng.random(n * self.ranks)[self.rank :: self.ranks]


def noise_like(x, words, places):
    """
    N(0, I) like x [N, ...], sample k a function of the words of a seed and of `places[k]` alone.

    (torch's generator on the CPU reads 32 bits of a seed: two samples in billions of a long training may share theirs.)
    """
    noise, generator = th.empty_like(x), th.Generator(x.device)
    for each, place in zip(noise, places):
        seed = np.random.SeedSequence((*words, place)).generate_state(1, np.uint64)[0]
        each.normal_(generator=generator.manual_seed(int(seed >> 1)))
    return noise


def _part(cond, part):
    return {name: value[part] for name, value in cond.items()}


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
        ema_warmup=True,
        ema_halflife="",
        ema_power="",
        **more,
    ):
        super().__init__(
            DiffusionTask(model, diffusion, schedule_sampler),
            data,
            batch_size=batch_size,
            microbatch=microbatch,
            lr=lr,
            averages=ema.parse(ema_rate, ema_halflife, ema_power, ema_warmup),
            log_interval=log_interval,
            save_interval=save_interval,
            resume_checkpoint=resume_checkpoint,
            use_fp16=use_fp16,
            fp16_scale_growth=fp16_scale_growth,
            weight_decay=weight_decay,
            lr_anneal_steps=lr_anneal_steps,
            **more,
        )
