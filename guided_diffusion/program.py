"""What every program does first: find its processes and device, its folder and its log."""

import argparse
import os
import sys

import numpy as np
import torch as th

from . import checkpoint, config, dist_util, guidance, health, logger, runs
from .generate import collect, sample_stream, save_samples
from .image_datasets import load_data
from .script_util import open_diffusion


def start(args, *settled_later):
    """
    Set up processes, device, output folder and log from RunOptions, and log every option.

    :param settled_later: groups of options that a checkpoint's config.json will settle: logged only if typed.
    :return: (device, folder), the folder being the same for all ranks and known to be writable. A training run's is
        then this run's alone, and `args.resume_checkpoint` is what it goes on from.
    """
    if args.seed < 0:
        raise ValueError(f"--seed must be 0 or more, not {args.seed}")
    dist_util.setup_dist(args.device or None)
    wanted = os.path.expanduser(args.log_dir) or os.environ.get("OPENAI_LOGDIR") or logger.default_dir()
    folder = dist_util.gather_objects(wanted)[0]
    checkpoint.check_writable(folder)
    said = []
    if hasattr(args, "resume"):
        taken = dist_util.from_main(runs.take_up, folder, args.resume, args.resume_checkpoint)
        args.resume_checkpoint, said = taken
    logger.configure(dir=folder)
    for line in said:
        logger.warn(line)
    th.manual_seed(args.seed)  # of the weights that training starts from; all else has generators of its own
    later = config.options(*settled_later).keys() - args.explicit
    shown = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in later})
    logger.log("options (* typed):\n" + config.describe(shown))
    return dist_util.dev(), folder


def network_flags(args, folder, kind, *groups):
    """
    The options of a network to train: as typed, else from the config.json beside the checkpoint to go on from, else
    default.

    :param kind: of network, as in config.json.
    :raises ValueError: if the checkpoint is of another kind; if the run goes on in its own folder and typed options
        differ, unless `args.force`.
    """
    flags, path = config.flags_of(args, *groups), args.resume_checkpoint
    if not path:
        return flags
    content = checkpoint.read_config(path) or {"kind": kind, "flags": {}}
    if content["kind"] != kind:
        raise ValueError(f"{path} holds a {content['kind']} network, not a {kind} one: choose another --log_dir")
    known = content["flags"]
    told = {name: value for name, value in known.items() if name in flags}
    for name in sorted(told.keys() & args.explicit - set(checkpoint.PASSING)):
        if told[name] != flags[name]:
            said = f"--{name} {flags[name]}: the checkpoint to go on from, {path}, has {name} {told[name]}"
            if runs.is_own(folder, path) and not args.force:
                raise ValueError(f"{said}; choose another --log_dir for a new run, or --force True to go on so")
            logger.warn(said)
    return flags | {name: value for name, value in told.items() if name not in args.explicit}


def class_names(path):
    """The names of the classes, by label, that a checkpoint was trained on, or None where nothing tells."""
    return (checkpoint.read_config(path) or {}).get("class_names") if path else None


def log_network(path, flags):
    """Log what a checkpoint turned out to be: its options that are not the defaults."""
    groups = config.ModelOptions, config.ClassifierOptions, config.DiffusionOptions
    usual = config.defaults(*groups)
    told = [f"{name} {value}" for name, value in flags.items() if value != usual[name]]
    logger.log(f"{path}: {', '.join(told) or 'all options at their defaults'}")


def open_training_data(args, flags, class_cond):
    """The stream of training images; of a resumed run, from where it stopped and with the labels that it had."""
    batch = max(args.batch_size, 1) * dist_util.world_size()
    return open_data(
        args,
        flags,
        args.data_dir,
        class_cond=class_cond,
        random_crop=args.random_crop,
        random_flip=args.random_flip,
        class_names=class_names(args.resume_checkpoint),
        first_batch=runs.images_seen(args.resume_checkpoint, batch) // batch,
    )


def open_validation_data(args, flags, class_cond, names):
    """The stream of held-out images, from where a resumed run stopped, or None without --val_data_dir."""
    if not args.val_data_dir:
        return None
    if args.eval_interval < 1:
        raise ValueError(f"--eval_interval must be 1 or more, not {args.eval_interval}")
    done = checkpoint.parse_resume_step_from_filename(args.resume_checkpoint) // args.eval_interval
    return open_data(
        args, flags, args.val_data_dir, class_cond=class_cond, random_flip=False, class_names=names, first_batch=done
    )


def begin_run(args, folder, kind, flags, data):
    """Write config.json and run.json, once it is known that all options fit. Collective."""

    def write():
        runs.record(folder, args, data, args.resume_checkpoint if runs.is_own(folder, args.resume_checkpoint) else None)
        checkpoint.write_config(folder, kind, flags, class_names=data.class_names)

    dist_util.from_main(write)


def open_data(args, flags, data_dir, **how):
    """The stream of training images that a program's options ask for, and a line of the log that says what it is."""
    data = load_data(
        data_dir=data_dir,
        batch_size=args.batch_size,
        image_size=flags["image_size"],
        image_channels=flags["image_channels"],
        num_classes=flags["num_classes"],
        num_workers=args.num_workers,
        skip_bad_images=args.skip_bad_images,
        label_from=args.label_from,
        seed=args.seed,
        rank=dist_util.rank(),
        num_ranks=dist_util.world_size(),
        **how,
    )
    names = data.class_names
    logger.log(f"{data.num_images} images in {data_dir}, labels: {data.label_rule}")
    if names and len(names) < flags["num_classes"]:
        logger.warn(
            f"num_classes is {flags['num_classes']} but the data have {len(names)}: --num_classes {len(names)} would do"
        )
    return data


def loop_options(args, flags):
    """What the training loop takes from the options of every training program; `flags` are those of the network."""
    names = "batch_size microbatch lr weight_decay iterations log_interval save_interval resume_checkpoint"
    names += " grad_clip max_bad_steps seed lr_schedule lr_warmup eval_interval keep_last keep_every keep_best"
    names += " background_save max_minutes"
    return {name: getattr(args, name) for name in names.split()} | {"progress": True, "flags": flags}


def run(main):
    """
    Run a program's main; see `config.run_program` for its errors. A run that was asked to stop and has saved ends with
    exit code 75; a process that ends since another one failed, with 2 and without a word.
    """

    def leave_together():
        code = 0
        try:
            with dist_util.naming_lost_peers():
                main()
        except health.Stopped as stop:
            code = 2 if stop.reason == health.FAILED else health.EXIT_CODE
            if code != 2:
                logger.log(stop)
        finally:
            runs.leave()
        dist_util.finish()
        if code:
            sys.exit(code)

    config.run_program(leave_together)


def guide_of(args, flags, diffusion):
    """
    The guidance that SampleOptions ask for before clipping, classifier-free or by a worse model: a function from
    predictor to predictor, or None. Raises ValueError where the model, or the two, cannot give it.
    """
    config.check_guidance(args, flags)
    low, high = config.parse_interval(args.guidance_interval)
    if args.guidance_scale == 1:
        return None
    how = {"scale": args.guidance_scale, "combine": guidance.linear}
    if args.guidance_rescale:
        how["combine"] = guidance.rescaled(diffusion, args.guidance_rescale)
    sigmas = diffusion.sqrt_recipm1_alphas_cumprod                            # ascending
    first, last = np.searchsorted(sigmas, low), np.searchsorted(sigmas, high, "right") - 1
    worse = worse_model(args, flags) if args.guide_path else None

    def guide(predict):
        if worse:
            guided = guidance.mix(predict, worse, **how)
        else:
            null = {"y": config.null_class(flags)}
            guided = guidance.classifier_free(predict, null, batched=args.guidance_batched, **how)
        return guidance.interval(guided, predict, first, last) if args.guidance_interval else guided

    return guide


def worse_model(args, flags):
    """The predictor of --guide_path, with a network and a way of predicting of its own, on the rows of the model."""
    explicit = {"timestep_respacing": flags["timestep_respacing"]}
    network, diffusion, its_flags = open_diffusion(args.guide_path, explicit, dist_util.dev())
    for name in ("image_size", "image_channels", "noise_schedule", "diffusion_steps", "class_cond", "num_classes"):
        if flags[name] != its_flags[name]:
            raise ValueError(
                f"--guide_path: the model has {name} {flags[name]} and {args.guide_path} has {its_flags[name]}: only a"
                " model of the same images, noise and classes can guide"
            )
    return diffusion.predictor(network, clip_denoised=False)


def write_samples(args, folder, diffusion, model, flags, num_classes, names, cond_fn=None):
    """Draw the samples that SampleOptions ask for and write them; `flags` tell their shape."""
    if names:  # a network may have room for more classes than it was shown
        num_classes = len(names)
    labels = config.parse_classes(args.classes, num_classes, args.num_samples, names)
    stream = sample_stream(
        diffusion,
        model,
        shape=(flags["image_channels"], flags["image_size"], flags["image_size"]),
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
        labels=labels,
        num_classes=num_classes,
        use_ddim=args.use_ddim,
        eta=args.eta,
        sampler=args.sampler,
        steps=args.steps,
        spacing=args.spacing,
        clip_denoised=args.clip_denoised,
        cond_fn=cond_fn,
        guide=guide_of(args, flags, diffusion),
        device=dist_util.dev(),
        rank=dist_util.rank(),
        num_ranks=dist_util.world_size(),
        progress=True,
    )
    result = collect(stream)
    if result is not None:
        logger.log(f"samples: {save_samples(folder, *result, names, args.grid)}")
    dist_util.barrier()
