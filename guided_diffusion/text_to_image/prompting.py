"""What text_to_image_sample.py is asked for: prompts or pictures, and the embeddings that they ask the decoder for."""

import argparse
import os
from itertools import islice

import torch as th

from .. import config, dist_util, program, sizes, super_res
from ..image_datasets import load_data
from ..script_util import open_super_res, process_of
from . import models, pipeline
from .tasks import warn_of_cuts
from .tokenizer import cut


def prompts_of(args):
    """
    The prompts of --prompts and --prompts_file, a list; [] if pictures are asked for.

    :raises ValueError: if there are none, or pictures as well, or other options contradict.
    :raises FileNotFoundError: if the file is missing.
    """
    if args.preset:
        raise ValueError(f"--preset {args.preset}: the checkpoints tell what they are: drop it")
    prompts = list(args.prompts) + (_read_prompts(args.prompts_file) if args.prompts_file else [])
    if bool(prompts) == bool(args.images):
        raise ValueError(
            "give prompts (--prompts \"...\" or --prompts_file) or pictures to vary (--images)"
            + (", not both" if prompts else "")
        )
    if args.images and args.prior_path:
        raise ValueError("--images are drawn again from their own embeddings: drop --prior_path, which is for prompts")
    idle = {"prior_steps", "prior_candidates", "prior_scale"} & args.explicit
    if idle and not args.prior_path:
        raise ValueError(f"--{min(idle)} has no effect without --prior_path: give one")
    if args.guide_path:
        raise ValueError(
            f"--guide_path {args.guide_path}: a decoder is guided away from its own prediction without a condition, and"
            " by no other model: drop it"
        )
    if args.interpolate and len(prompts or [0, 0]) < 2:
        raise ValueError("--interpolate goes from one prompt to the next: give two or more")
    if args.super_res_path and ("npz" not in args.save_as.split(",") or not args.save_samples):
        raise ValueError("--super_res_path enlarges the npz of what the decoder drew: keep npz in --save_as")
    for name in ("prior_steps", "interpolate"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, not {getattr(args, name)}")
    return prompts


def _read_prompts(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file of prompts {path} (--prompts_file): a text file with one a line")
    try:
        with open(path, encoding="utf-8-sig") as file:
            prompts = file.read().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not prompts:
        raise ValueError(f"{path} is empty: give a prompt a line")
    return prompts


def clip_of(args, device):
    """
    The CLIP of --clip_path, or the one that the decoder was trained with.

    :raises ValueError: if the decoder, or the prior, was trained with another, unless --force and its sizes are theirs.
    :raises FileNotFoundError: if it is not where it was.
    """
    path = models.path_of_clip(args.clip_path, args.model_path)
    if not path:
        raise ValueError(f"nothing tells which CLIP {args.model_path} was trained with: give --clip_path")
    clip = models.open_clip(path, device)
    for other in filter(None, (args.model_path, args.prior_path)):
        models.check_clip(clip, path, other, args.force)
    return clip


def embeddings_of(args, clip, prompts, flags, device):
    """
    `(indices) -> [n,D]`, the embeddings that the pictures are drawn from: of the prior, of the texts, or of --images.
    Warns of prompts that CLIP cuts, and of those that a decoder of these flags cuts earlier.
    """
    if args.images:
        return pipeline.ImageEmbeddings(clip, read_images(args, flags))
    shown = args.use_captions and flags["text_layers"] and not args.interpolate
    shortest = (lambda text: min(clip.cut(text), cut(text, flags["context_length"]), key=len)) if shown else clip.cut
    warn_of_cuts(prompts, shortest)
    how = {"candidates": args.prior_candidates, "scale": args.prior_scale, "seed": args.seed}
    if not args.prior_path:
        return pipeline.TextEmbeddings(clip, prompts, **how)
    if args.prior_scale != 1 and not models.dropped(args.prior_path).get("caption"):
        raise ValueError(
            f"--prior_scale {args.prior_scale}: the prior was trained without --caption_dropout and cannot be guided"
        )
    prior, diffusion, its = models.open_prior(args.prior_path, {}, device)
    steps, most = args.prior_steps, its["diffusion_steps"]
    if steps > most and "prior_steps" in args.explicit:
        raise ValueError(f"--prior_steps {steps}: the prior has {most} steps: give at most so many, or 0 for all")
    if steps:
        diffusion = process_of(its | {"timestep_respacing": str(min(steps, most))})
    return pipeline.TextEmbeddings(clip, prompts, prior, diffusion, **how)


def null_of(args, null):
    """
    What guidance takes from the decoder: of its nulls, as `pipeline.conditions` tells them, those that it was trained
    with.

    :raises ValueError: if guidance is asked for and the decoder always had an embedding.
    """
    rates = models.dropped(args.model_path)
    if not rates.get("embedding"):
        if args.guidance_scale != 1:
            raise ValueError(
                f"--guidance_scale {args.guidance_scale}: the decoder was trained without --embedding_dropout and"
                " cannot be guided: keep 1, or train with --embedding_dropout 0.1"
            )
        return {}
    return {name: empty for name, empty in null.items() if name == "vector" or rates.get("caption")}


def read_images(args, flags):
    """The pictures of --images, [P,C,S,S] in [-1,1], in the order of their names, as many as are drawn from."""
    count = args.num_samples
    if args.interpolate:
        count = count // args.interpolate + 1 if "num_samples" in args.explicit else None
    data = load_data(
        data_dir=args.images, batch_size=1, image_size=sizes.size_of(flags), image_channels=flags["image_channels"],
        deterministic=True, random_flip=False, num_workers=0, once=True,
    )  # fmt: skip
    return th.cat([x for x, _ in islice(data, count)])


def ways(args, embeddings, prompts):
    """
    Embeddings between those of prompts or pictures (--interpolate), and names of the ways. Without --num_samples all
    ways are drawn.

    :raises ValueError: if the samples make no whole ways.
    """
    between = pipeline.Between(embeddings, args.interpolate)
    ends = prompts or [f"picture {k + 1}" for k in range(len(embeddings.table))]
    if "num_samples" not in args.explicit:
        args.num_samples = (len(ends) - 1) * args.interpolate
    if args.num_samples < 1 or args.num_samples % args.interpolate:
        raise ValueError(
            f"--num_samples {args.num_samples} make no whole ways of --interpolate {args.interpolate} between"
            f" {len(ends)} ends"
        )
    count = args.num_samples // args.interpolate
    return between, [f"{ends[p % len(ends)]} -> {ends[(p + 1) % len(ends)]}" for p in range(count)]


def larger_of(args, flags, device):
    """
    The network of --super_res_path, its process and its flags; None without.

    :param flags: of the decoder.
    :raises ValueError: if it does not enlarge what the decoder draws.
    """
    if not args.super_res_path:
        return None
    typed = config.explicit_flags(args)
    explicit = {name: typed[name] for name in ("precision", "timestep_respacing") if name in typed}
    model, diffusion, its = open_super_res(args.super_res_path, explicit, device)
    if its["class_cond"]:
        raise ValueError(f"{args.super_res_path} takes labels, and texts have none: give an unconditional one")
    for name, ours in (("small_size", "image_size"), ("image_channels", "image_channels")):
        if its[name] != flags[ours]:
            raise ValueError(
                f"{args.super_res_path} enlarges images of {name} {its[name]}, and the decoder draws {flags[ours]}"
            )
    return model, diffusion, its


def enlarge(args, folder, larger, through, prompts, ways):
    """What the network of `larger_of` makes of the samples that the decoder drew, in the folder `enlarged`."""
    model, diffusion, flags = program.hastened(args, larger[0]), *larger[1:]
    drawn = next(name for name in os.listdir(folder) if name.startswith(f"samples_{args.num_samples}x")
                 and name.endswith(".npz"))  # fmt: skip
    base = super_res.read_base_samples(
        os.path.join(folder, drawn), flags["small_size"], flags["image_channels"], seed=args.seed
    )
    own = {"model_path": args.super_res_path, "guidance_scale": 1.0, "guide_path": "", "guidance_interval": "",
           "guidance_rescale": 0.0, "guidance_projected": 1.0, "frames": 0}  # fmt: skip
    args, target = argparse.Namespace(**{**vars(args), **own}), os.path.join(folder, "enlarged")
    dist_util.from_main(lambda: os.makedirs(target, exist_ok=True))
    how = {"labels": None, "given": {"low_res": base.batch}}
    store = program.draw(args, target, diffusion, model, flags, args.num_samples, through=through, **how)
    program.finish(args, store, prompts=prompts, ways=ways)
