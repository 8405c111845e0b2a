"""What the three training programs of the cascade share: their CLIP, their checks, and what they show on the way."""

from itertools import islice

import torch as th

from .. import checks, dist_util, logger, presets, sizes
from ..image_datasets import load_data
from ..watch import COLUMNS, ROWS, Watch
from . import models
from .clip import classify
from .tasks import with_embeddings


def clip_of(args, device):
    """
    The CLIP of --clip_path, or of the run that is gone on with: (frozen network, what config.json says of it: {"path",
    "fingerprint"}).

    :raises ValueError: if there is none, or another than that run had, unless --force.
    :raises FileNotFoundError: if it is not where it was.
    """
    path = models.path_of_clip(args.clip_path, args.resume_checkpoint)
    clip = models.open_clip(path, device)
    if args.resume_checkpoint:
        models.check_clip(clip, path, args.resume_checkpoint, args.force)
    return clip, {"path": path, "fingerprint": models.fingerprint(clip)}


# ------------------------------------------------------------------------------------------------------------- checks


def check_preset(args):
    """Raise ValueError for a --preset that is a published model and no recipe."""
    if args.preset and args.preset not in presets.RECIPES:
        raise ValueError(f"--preset {args.preset} is no recipe for this program: choose {', '.join(presets.RECIPES)}")


def check_fp32(args):
    """Raise ValueError for a --precision that these transformers do not have."""
    if args.precision not in ("", "fp32"):
        raise ValueError(f"--precision {args.precision}: this network, a small transformer, trains in fp32: drop it")


def check_whole(args):
    """
    Raise ValueError for parts of a batch, which CLIP contrasts as a whole, for a batch without contrasts, and for parts
    of the network. After `program.start`, which counts the processes.
    """
    if args.batch_size == 1 == dist_util.world_size():
        raise ValueError("--batch_size 1: CLIP learns from the contrasts of a batch, and one pair has none: give more")
    if args.sharding != "none":
        raise ValueError(f"--sharding {args.sharding}: CLIP is trained in one piece: drop it")
    if 0 < args.microbatch < args.batch_size:
        raise ValueError(
            f"--microbatch {args.microbatch}: CLIP contrasts each pair with all others of a batch, which must be in"
            " memory together: lower --batch_size, or take more processes"
        )


def check_fixed_variance(flags):
    """Raise ValueError if the prior is to learn a variance."""
    if flags["learn_sigma"]:
        raise ValueError("--learn_sigma True: the prior predicts embeddings and no variance: drop it")


# ------------------------------------------------------------------------------------------------------- on the way


def picture_watchers(args, flags, diffusion, clip):
    """
    Pictures drawn of the embeddings and captions of the first held-out images, or else training images, as `Trainer`
    takes them.
    """
    checks.check_watching(args)
    if not args.sample_interval:
        return []
    source = with_embeddings(_once(args, flags, captions=True), clip, flags["context_length"])
    batches = list(islice(source, COLUMNS * ROWS))
    table = {name: th.cat([cond[name] for _, cond in batches]) for name in ("vector", "caption")}
    given = {name: lambda indices, rows=rows: rows[[i % len(rows) for i in indices]] for name, rows in table.items()}
    how = {"given": given, "steps": args.sample_steps, "batch_size": args.batch_size, "seed": args.seed}
    return [(args.sample_interval, Watch(diffusion, flags, logger.get_dir(), **how).picture)]


def zero_shot_watchers(args, flags):
    """
    The share of the held-out images whose class CLIP tells by its captions, with every checkpoint, as `Trainer` takes
    it; nothing without labels there.
    """
    if not args.val_data_dir:
        return []
    try:
        data = _once(args, flags, captions=True, class_cond=True)
    except ValueError:
        return []
    batches = list(data)
    x, y, numbers = th.cat([x for x, _ in batches]), *(th.cat([c[n] for _, c in batches]) for n in ("y", "text"))
    texts = captions_of_classes(y.tolist(), [data.texts[number] for number in numbers.tolist()])
    if texts is None:
        return []

    def watch(trainer):
        if dist_util.is_main():
            with trainer.averaged() as clip:
                logger.logkv("zero_shot", (classify(clip, x, texts).cpu() == y).float().mean().item())

    return [(args.save_interval, watch)]


def captions_of_classes(labels, texts):
    """[the texts of images of class 0, of class 1, ...]; None if a text is of two classes, or a class has none."""
    found = [sorted({text for y, text in zip(labels, texts) if y == k}) for k in range(max(labels) + 1)]
    alone = sum(map(len, found)) == len({text for each in found for text in each})
    return found if alone and all(found) else None


def _once(args, flags, **how):
    return load_data(
        data_dir=args.val_data_dir or args.data_dir,
        batch_size=1,
        image_size=sizes.size_of(flags),
        image_channels=flags["image_channels"],
        deterministic=True,
        random_flip=False,
        num_workers=0,
        once=True,
        background=args.background,
        seed=args.seed,
        **how,
    )
