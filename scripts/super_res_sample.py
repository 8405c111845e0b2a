"""Enlarge images, the samples of a smaller model or any others, by a super-resolution model."""

import os

from guided_diffusion import checks, config
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import DiffusionOptions, SuperResOptions
from guided_diffusion.sampling_options import EvaluateOptions, SuperResSampleOptions

OPTIONS = SuperResSampleOptions, SuperResOptions, DiffusionOptions, EvaluateOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

from evaluations.sampled import scored
from guided_diffusion import dist_util, logger, program, super_res
from guided_diffusion.script_util import open_super_res


def main():
    args = config.parse(__doc__, *OPTIONS)
    checks.check_counts(args, batch=0)
    device, folder = program.start(args, SuperResOptions, DiffusionOptions)
    model, diffusion, flags = open_super_res(args.model_path, config.explicit_flags(args), device)
    model = program.hastened(args, model)
    program.log_network(args.model_path, flags)
    checks.check_classes(flags, args.classes)
    names, conditional = program.class_names(args.model_path), flags["class_cond"]
    base = super_res.read_base_samples(
        args.base_samples, flags["small_size"], flags["image_channels"], conditional and not args.classes, names,
        args.label_from, args.background, args.num_samples, noise_std=args.low_res_noise, seed=args.seed,
    )  # fmt: skip
    count = how_many(args, base)
    labels = labels_of(args, flags, base, names, count)

    def model_fn(x, t, y=None, **cond):
        return model(x, t, y=y if conditional else None, **cond)

    how = {"labels": labels, "given": {"low_res": base.batch}}
    with scored(args, folder, device) as through:
        store = program.draw(args, folder, diffusion, model_fn, flags, count, through=through, **how)
        if dist_util.is_main() and store and not store.finished:
            if args.grid:
                super_res.save_pairs(os.path.join(folder, "enlarged.png"), base, store.images)
            store.finish(names)
            logger.log(f"samples: {', '.join(map(store.path_of, store.kinds))}")
        dist_util.barrier()


def how_many(args, base):
    """Images to draw: --num_samples, but of each base sample no more than one unless --repeat_base says so."""
    if args.num_samples <= len(base) or args.repeat_base:
        return args.num_samples
    if "num_samples" in args.explicit:
        logger.warn(
            f"{args.base_samples} holds {len(base)} base samples: drawing that many, not {args.num_samples};"
            " --repeat_base True draws several of each"
        )
    return len(base)


def labels_of(args, flags, base, names, count):
    """
    A label for each of `count` images, from --classes or the base samples, or None where neither has any.

    :raises ValueError: if the model takes labels, and they are missing or not such as it knows.
    """
    labels = checks.parse_classes(args.classes, len(names or []) or flags["num_classes"], count, names)
    if labels is None and base.labels is not None:
        labels = [int(base.labels[i % len(base)]) for i in range(count)]
    if flags["class_cond"] and labels is None:
        raise ValueError(
            f"the model takes labels, and {args.base_samples} has none (arr_1): give --classes, as 3,7 in turn"
        )
    if flags["class_cond"] and not 0 <= min(labels) <= max(labels) < flags["num_classes"]:
        raise ValueError(
            f"labels of {args.base_samples} go from {min(labels)} to {max(labels)}, and those of the model from 0 to"
            f" {flags['num_classes'] - 1}"
        )
    return labels


if __name__ == "__main__":
    program.run(main)
