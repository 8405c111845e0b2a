"""
The stream of samples, and the file they end in. Image i is a function of the seed and i, for any batch size and any
number of processes.
"""

import os
from functools import partial

import numpy as np
import torch as th

from . import checkpoint, dist_util, pictures, sampling
from .prediction import Prediction, rows_at


def in_batches(count, batch_size):
    """The indices of `count` samples, a range for each batch of consecutive ones."""
    return [range(count)[first : first + batch_size] for first in range(0, count, batch_size)]


def planned(diffusion, use_ddim=False, eta=None, sampler="", steps=0, spacing="", sampler_options=None):
    """
    The walk that options ask for: (step rule, the process with the rows that it keeps).

    :param eta: noise of DDIM and other samplers that have it, from 0 to 1; None: the sampler's own.
    :param sampler, steps, spacing: as `sampling.plan` takes them, in place of use_ddim; empty or 0: the usual ones.
    :param sampler_options: {name: number} of the sampler's rule.
    :raises ValueError: as `sampling.plan`, and for options that belong to no or to another sampler.
    """
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"--eta is the noise of DDIM, from 0 (none) to 1 (as much as DDPM), not {eta}")
    if sampler:
        if use_ddim:
            raise ValueError(f"--sampler {sampler} and --use_ddim True are two samplers: give one of them")
        options = dict(sampler_options or {}) | ({} if eta is None else {"eta": eta})
        rule, rows = sampling.plan(diffusion, sampler, steps or None, spacing or None, **options)
        return rule, diffusion.spaced(rows)
    if steps or spacing or sampler_options:
        raise ValueError(
            "--steps, --spacing and --sampler_options belong to a sampler: name one by --sampler, or use"
            " --timestep_respacing"
        )
    if eta and not use_ddim:
        raise ValueError(f"--eta {eta} belongs to DDIM: add --use_ddim True, or name a --sampler that has it")
    return partial(sampling.ddim, eta=eta or 0.0) if use_ddim else sampling.ddpm, diffusion


def count_evaluations(diffusion, **walk):
    """How often the network looks at each sample of a walk, by walking one pixel; `walk` goes to `planned`."""
    rule, process = planned(diffusion, **walk)
    asked = []

    def predict(x, t, **cond):
        asked.append(t)
        return Prediction(x, x, th.ones_like(x), th.zeros_like(x))

    for _ in sampling.sample(process, predict, rule, th.zeros(1, 1, 1, 1)):
        pass
    return len(asked)


def sample_stream(
    diffusion,
    model,
    *,
    shape,
    num_samples,
    batch_size,
    seed=0,
    labels=None,
    num_classes=0,
    given=None,
    rule=None,
    path=None,
    clip_denoised=True,
    denoised_fn=None,
    cond_fn=None,
    guide=None,
    steer=None,
    device="cpu",
    rank=0,
    num_ranks=1,
    progress=False,
    on_step=None,
    skip=None,
    noise_of=None,
    **walk,
):
    """
    Draw this rank's samples batch by batch and yield `(indices, x [n,C,H,W] in [-1,1], labels [n] or None)`. Batches
    are of consecutive samples and go to the ranks in turn, so that how many ranks there are changes no sample.

    :param model: `(x, timesteps, y=None, **given)`; without classes it is called without y.
    :param shape: of one sample, (C, H, W).
    :param labels: [num_samples] classes to draw; None draws them at random from num_classes (0: no classes at all).
    :param given: {name: function of the indices} of what else the model is told of the samples, each [n, ...].
    :param rule: a step rule, which walks all rows of the process; None: what `planned` makes of `walk`.
    :param path: the process of all rows whose Brownian paths are the noise, so that it does not depend on the number of
        steps (`sampling.BrownianNoise`); None: fresh noise in every step.
    :param denoised_fn, cond_fn, guide, steer: as `GaussianDiffusion.predictor` takes them; rows are those of the walk.
    :param walk: what else `planned` takes.
    :param skip: says of the indices of a batch whether it is to be left out.
    :param noise_of: the number whose noise a sample has, by its index; None: the index itself.
    :param on_step: called with `(indices, t, x, Prediction)` after each step, for whoever wants to watch.
    :raises ValueError: for no samples or no batch.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be 1 or more, not {num_samples} and {batch_size}")
    if rule is None:
        rule, diffusion = planned(diffusion, **walk)
    predict = diffusion.predictor(model, clip_denoised, denoised_fn, cond_fn, guide, steer)
    mine = in_batches(num_samples, batch_size)[rank::num_ranks]
    batches = [indices for indices in mine if not (skip and skip(indices))]
    with progress_bar(len(batches) * diffusion.num_timesteps, progress and rank == 0) as bar:
        for number, indices in enumerate(batches):
            numbers = indices if noise_of is None else [noise_of(i) for i in indices]
            noise = sampling.SeededNoise(seed, numbers, device)
            y, cond = _told(indices, noise, labels, num_classes, given or {}, device)
            start = noise.normal(*shape)
            noise = sampling.BrownianNoise(seed, numbers, path, device) if path else noise
            steps = sampling.sample(diffusion, predict, rule, start, noise=noise, cond=cond)
            for step, (x, pred) in enumerate(inferred(steps), 1):
                bar.update()
                if on_step:
                    on_step(indices, diffusion.num_timesteps - step, x, pred)
            bar.update((number + 1) * diffusion.num_timesteps - bar.n)  # a step may take several rows
            x = x.clone()  # what was made in inference mode cannot enter a graph
            _check_finite(x, indices)
            bar.set_postfix(images=f"{min(indices[0] + num_ranks * batch_size, num_samples)}/{num_samples}")
            yield indices, x, y


def _told(indices, noise, labels, num_classes, given, device):
    """(labels [n] of the samples of these indices or None, all that the model is told of them)."""
    y = noise.integers(num_classes) if num_classes else None
    if labels is not None:
        y = th.tensor([labels[i] for i in indices], device=device)
    return y, ({} if y is None else {"y": y}) | {name: of(indices).to(device) for name, of in given.items()}


def evaluated(
    n, diffusion, model, *, shape, labels=None, num_classes=0, given=None, device="cpu", clip_denoised=True,
    denoised_fn=None, guide=None, steer=None, **_
):  # fmt: skip
    """
    What a walk of n samples asks of the memory: the prediction, with its guidance, at the first, the middle and the
    last row, on noise. The arguments are those of `sample_stream`.
    """
    predict = diffusion.predictor(model, clip_denoised, denoised_fn, None, guide, steer)
    noise, last = sampling.SeededNoise(0, range(n), device), diffusion.num_timesteps - 1
    with th.inference_mode():
        _, cond = _told(range(n), noise, labels, num_classes, given or {}, device)
        x = noise.normal(*shape)
        for row in (last, last // 2, 0):
            predict(x, rows_at(row, n, x.device, []), **cond)


def inferred(iterator):
    """The items of an iterator, each made in `torch.inference_mode`, which spares what autograd notes of tensors."""
    while True:
        with th.inference_mode():
            item = next(iterator, None)
        if item is None:
            return
        yield item


def reverse_process(diffusion, model, shape, count, frames=10, **how):
    """
    Samples on their way from noise to picture: (after how many steps, as texts; uint8 [count,H,W,C] at each).

    :param shape: of one sample, (C, H, W).
    :param frames: how many steps to show, equidistant from the first to the last.
    :param how: goes to `sample_stream`.
    """
    steps = diffusion.num_timesteps
    wanted = {round(step) for step in np.linspace(steps - 1, 0, frames)}
    seen = []

    def watch(indices, t, x, pred):
        if t in wanted:
            seen.append((t, pictures.to_uint8(x)))

    stream = sample_stream(
        diffusion, model, shape=shape, num_samples=count, batch_size=count, on_step=watch, **how
    )
    list(stream)
    return [f"{steps - t}" for t, _ in seen], [x for _, x in seen]


def save_frames(name, diffusion, model, count, frames, row_labels=None, **how):
    """
    NAME_frames.png, a strip with a row for each of the first samples, and NAME_frames.gif, a film of them; the other
    arguments are those of `reverse_process`.
    """
    after, seen = reverse_process(diffusion, model, count=count, frames=frames, **how)
    pictures.strip(seen, column_labels=after, row_labels=row_labels).save(f"{name}_frames.png")
    pictures.save_film(f"{name}_frames.gif", seen, columns=min(count, 4))


def through(walk, count, batch_size, steps):
    """
    Where walks end, for `count` samples in batches, with a progress bar: [count, ...].

    :param walk: `(range of indices) -> iterable of (x, Prediction)`, a step each.
    :param steps: how many steps each has.
    :raises ArithmeticError: if samples are not finite.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"there must be 1 image or more, in batches of 1 or more, not {count} and {batch_size}")
    batches, ends = in_batches(count, batch_size), []
    with progress_bar(len(batches) * steps) as bar:
        for indices in batches:
            for each, _ in walk(indices):
                x = each
                bar.update()
            _check_finite(x, indices)
            ends.append(x)
    return th.cat(ends)


def _check_finite(x, indices):
    if not x.isfinite().all():
        raise ArithmeticError(f"the network gave values that are not finite for samples {list(indices)}")


def progress_bar(total, show=True):
    """A bar of so many steps on stderr."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="sampling", unit="step", disable=not show, mininterval=0.5)


def collect(stream):
    """Drain the streams of all ranks. On rank 0: (uint8 [N,H,W,C], int64 labels [N] or None), in the order of the
    indices; elsewhere None."""
    mine = [(list(indices), pictures.to_uint8(x).cpu().numpy(), None if y is None else y.cpu().numpy())
            for indices, x, y in stream]  # fmt: skip
    parts = [part for rank in dist_util.gather_objects(mine) for part in rank]
    if not dist_util.is_main():
        return None
    order = np.argsort(np.concatenate([indices for indices, _, _ in parts]))
    images = np.concatenate([x for _, x, _ in parts])[order]
    return images, None if parts[0][2] is None else np.concatenate([y for _, _, y in parts])[order].astype(np.int64)


def save_samples(folder, images, labels=None, class_names=None, picture=True, prompts=()):
    """
    Write samples_NxHxWxC.npz with arr_0 (uint8 [N,H,W,C]) and, with labels, arr_1; beside it a picture of some.

    :param prompts: texts that the samples were drawn for in turn: `texts` [N] in the npz, the rows of the picture.
    :return: the path of the npz.
    """
    more = {}
    if prompts:
        class_names, names_of = list(prompts), np.arange(len(images)) % len(prompts)
        more["texts"] = np.array(class_names)[names_of]
    path = save_arrays(folder, "samples", images, labels, **more)
    labels = names_of if prompts else labels
    if picture:
        save_class_grid(path[: -len("npz")] + "png", images, labels, class_names)
    return path


def save_arrays(folder, name, first, second=None, **more):
    """Write NAME_NxCxHxW.npz with arr_0, unless it is None arr_1, and more arrays by name. Returns its path."""
    path = os.path.join(folder, f"{name}_{'x'.join(map(str, first.shape))}.npz")
    arrays = {f"arr_{k}": np.asarray(th.as_tensor(each).cpu()) for k, each in enumerate((first, second))
              if each is not None}  # fmt: skip
    with checkpoint.writing(path) as file:
        np.savez(file, **arrays, **more)
    return path


def save_class_grid(path, images, labels=None, class_names=None, columns=8, rows=10, title=None):
    """A grid with a row for each of the first classes that occur; without labels, just the first images."""
    if labels is None:
        pictures.save_grid(path, images[: columns * rows], columns, title=title)
        return
    classes = np.unique(labels)[:rows]
    columns = min(columns, *(int((labels == y).sum()) for y in classes))
    chosen = np.concatenate([np.flatnonzero(labels == y)[:columns] for y in classes])
    names = [str(y) if class_names is None else str(class_names[y]) for y in classes]
    pictures.save_grid(path, images[chosen], columns, row_labels=names, title=title)
