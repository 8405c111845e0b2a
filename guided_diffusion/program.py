"""What every program does first: find its processes and device, its folder and its log."""

import argparse
import math
import os
import sys
from functools import partial

import numpy as np
import torch as th

from . import checkpoint, checks, config, dist_util, ema, guidance, health, logger, memory, published, runs, text
from .compiling import compile_blocks
from .fp16_util import PRECISIONS
from .generate import evaluated, planned, sample_stream, save_class_grid, save_frames
from .identify import identify
from .image_datasets import load_data
from .inverse import applied
from .layouts import to_channels_last
from .network_options import ClassifierOptions, DiffusionOptions, ModelOptions, SuperResOptions
from .pace import convolution_rate
from .prediction import clipped
from .reuse import Reusing
from .sample_store import SampleStore, drain, parse_kinds, plan_of
from .script_util import open_diffusion, open_super_res
from .signals import end_with_parent
from .sizes import size_of

LARGEST_BATCH = 256  # that --batch_size 0 takes: more is no faster
# What a classifier and the model that it guides must share, or it reads a noise level that is not there.
SHARED = ("image_size", "image_channels", "noise_schedule", "diffusion_steps", "rescale_timesteps")
PATHS = "model_path classifier_path guide_path resume_checkpoint clip_path prior_path super_res_path".split()


def start(args, *settled_later):
    """
    Set up processes, device, output folder and log from RunOptions, and log every option.

    :param settled_later: groups of options that a checkpoint's config.json will settle: logged only if typed.
    :return: (device, folder), the folder being the same for all ranks and known to be writable. Of a training run it is
        that of the checkpoints, this run's alone, and `args.resume_checkpoint` is what it goes on from.
    """
    end_with_parent()
    if args.seed < 0:
        raise ValueError(f"--seed must be 0 or more, not {args.seed}")
    dist_util.setup_dist(args.device or None)
    for name in vars(args).keys() & set(PATHS):
        paths = getattr(args, name)
        found = [published.locate(path) for path in (paths.split(",") if name == "classifier_path" else [paths])]
        setattr(args, name, ",".join(found))
    wanted = os.path.expanduser(args.log_dir) or os.environ.get("OPENAI_LOGDIR") or logger.default_dir()
    folder = dist_util.gather_objects(wanted)[0]
    checkpoint.check_writable(folder)
    said = []
    if hasattr(args, "resume"):
        log_dir, folder = folder, args.checkpoint_dir or folder
        checkpoint.check_writable(folder)
        taken = dist_util.from_main(runs.take_up, log_dir, folder, args.resume, args.resume_checkpoint)
        args.resume_checkpoint, said = taken
        logger.configure(dir=log_dir, format_strs=config.log_formats(args, dist_util.is_main()))
    else:
        logger.configure(dir=folder, format_strs=config.log_formats(args, dist_util.is_main()))
    for line in said:
        logger.warn(line)
    th.manual_seed(args.seed)  # of the weights that training starts from; all else has generators of its own
    later = config.options(*settled_later).keys() - args.explicit
    shown = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in later})
    logger.log("options (* typed):\n" + config.describe(shown))
    for name, usual in config.from_preset(vars(args), vars(args)).items():
        if name in args.explicit and getattr(args, name) != usual:
            logger.log(f"--{name} {getattr(args, name)}, as typed, instead of the {usual} of --preset {args.preset}")
    return dist_util.dev(), folder


def network_flags(args, folder, kind, *groups):
    """
    The options of a network to train: as typed, else from the config.json beside the checkpoint to go on from, or what
    `identify` finds where there is none, else default.

    :param kind: of network, as in config.json.
    :raises ValueError: if the checkpoint is of another kind; if the run goes on in its own folder and typed options
        differ, unless `args.force`.
    """
    flags, path = config.flags_of(args, *groups), args.resume_checkpoint
    if not path:
        return flags
    content = checkpoint.read_config(path)
    if content is None:
        state = checkpoint.load(path, map_location="meta")
        found = identify(path, kind, state, config.explicit_flags(args), args.preset)
        precision = {name: flags[name] for name in flags if name.endswith("use_fp16")}  # of a run, not of a file
        return flags | found | precision
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


def text_encoder(path):
    """The encoder of the captions that a checkpoint was trained on, or None where nothing tells."""
    return (checkpoint.read_config(path) or {}).get("text_encoder") if path else None


def log_network(path, flags):
    """Log what a checkpoint turned out to be: its options that are not the defaults."""
    groups = ModelOptions, SuperResOptions, ClassifierOptions, DiffusionOptions
    usual = config.defaults(*groups)
    told = [f"{name} {value}" for name, value in flags.items() if value != usual[name]]
    logger.log(f"{path}: {', '.join(told) or 'all options at their defaults'}")


def open_training_data(args, flags, class_cond, captions=False):
    """The stream of training images; of a resumed run, from where it stopped and with the labels that it had."""
    batch = max(args.batch_size, 1) * dist_util.world_size()
    data = open_data(
        args,
        flags,
        args.data_dir,
        class_cond=class_cond,
        random_crop=args.random_crop,
        random_flip=args.random_flip,
        class_names=class_names(args.resume_checkpoint),
        vector_channels=flags.get("vector_channels", 0),
        first_batch=runs.images_seen(args.resume_checkpoint, batch) // batch,
        captions=captions,
    )
    known = text_encoder(args.resume_checkpoint)
    if known and data.text_encoder != known:
        raise ValueError(
            f"{args.resume_checkpoint} was trained on vectors made by {known}, and those of {args.data_dir} are made by"
            f" {data.text_encoder}: give data with vectors of the same kind"
        )
    return data


def open_validation_data(args, flags, class_cond, names, captions=False):
    """The stream of held-out images, from where a resumed run stopped, or None without --val_data_dir."""
    if not args.val_data_dir:
        return None
    if args.eval_interval < 1:
        raise ValueError(f"--eval_interval must be 1 or more, not {args.eval_interval}")
    done = checkpoint.parse_resume_step_from_filename(args.resume_checkpoint) // args.eval_interval
    return open_data(
        args, flags, args.val_data_dir, class_cond=class_cond, random_flip=False, class_names=names,
        vector_channels=flags.get("vector_channels", 0), first_batch=done, captions=captions,
    )  # fmt: skip


def begin_run(args, folder, kind, flags, data, **extra):
    """Write config.json and run.json, once it is known that all options fit. Collective."""

    def write():
        runs.record(folder, args, data, args.resume_checkpoint if runs.is_own(folder, args.resume_checkpoint) else None)
        checkpoint.write_config(folder, kind, flags, class_names=data.class_names, **extra)

    dist_util.from_main(write)


def open_data(args, flags, data_dir, **how):
    """The stream of images that a program's options ask for, and a line of the log that says what it is."""
    data = load_data(
        data_dir=data_dir,
        batch_size=args.batch_size,
        image_size=size_of(flags),
        image_channels=flags["image_channels"],
        num_classes=flags.get("num_classes"),
        num_workers=args.num_workers,
        skip_bad_images=getattr(args, "skip_bad_images", False),  # who counts each image once has no such option
        label_from=args.label_from,
        background=args.background,
        seed=args.seed,
        rank=dist_util.rank(),
        num_ranks=dist_util.world_size(),
        **how,
    )
    names = data.class_names
    what = f"different captions: {len(data.texts)}" if data.texts else f"labels: {data.label_rule}"
    logger.log(f"{data.num_images} images in {data_dir}, {what}")
    if names and len(names) < flags.get("num_classes", 0):
        logger.warn(
            f"num_classes is {flags['num_classes']} but the data have {len(names)}: --num_classes {len(names)} would do"
        )
    return data


def open_images(args, flags, labelled):
    """
    The images that a program is asked to work on: (x [N,C,H,W] in [-1,1], labels [N] or None).

    :param labelled: whether labels are needed; --classes gives them, else the data.
    :raises ValueError: for fewer images than --num_images, besides what `load_data` refuses.
    """
    names = class_names(args.model_path) or class_names(getattr(args, "classifier_path", ""))
    data = load_data(
        data_dir=args.data_dir,
        batch_size=1,
        image_size=size_of(flags),
        image_channels=flags["image_channels"],
        class_cond=labelled and not args.classes,
        class_names=names,
        random_flip=False,
        num_workers=0,
        label_from=args.label_from,
        background=args.background,
        seed=args.seed,
    )
    if not 1 <= args.num_images <= data.num_images:
        raise ValueError(
            f"--num_images must be from 1 to the {data.num_images} in {args.data_dir}, not {args.num_images}"
        )
    x, cond = zip(*(next(data) for _ in range(args.num_images)))
    labels = checks.parse_classes(args.classes, flags["num_classes"], args.num_images, names)
    if labels is None and labelled:
        labels = [each["y"].item() for each in cond]
    return th.cat(x).to(dist_util.dev()), None if labels is None else th.tensor(labels, device=dist_util.dev())


def precision_of(args, flags, name):
    """
    The precision of a network to train, by --precision or its flag `name`, which counts beside that only if typed and
    not of the run that is gone on with; said if it is slow here.
    """
    counts = name in args.explicit or not args.precision
    precision = checks.precision_of(args.precision, flags[name] and counts, name)
    if precision != "fp32":
        rate = {each: convolution_rate(PRECISIONS[each], dist_util.dev()) for each in ("fp32", precision)}
        if rate[precision] < 0.8 * rate["fp32"]:
            logger.warn(
                f"{precision} is {rate['fp32'] / rate[precision]:.1f} times slower than fp32 on this device, by its"
                " convolutions: fp32 will do better, unless memory counts most"
            )
    return precision


def dropping(flags):
    """What training does with the conditions of a network of these flags: `Trainer`'s drop, or None."""
    null = checks.nulls(flags)
    return partial(guidance.dropped, null=null, rate=flags["class_dropout"]) if null else None


def averaging(args):
    """What the loop of a network with averaged weights takes besides `loop_options`, from TrainOptions."""
    averages = ema.parse(args.ema_rate, args.ema_halflife, args.ema_power, args.ema_warmup)
    return {"averages": averages, "lr_anneal_steps": args.lr_anneal_steps}


def alone():
    """Raise ValueError if several processes run a program that does its work in one."""
    if dist_util.world_size() > 1:
        raise ValueError(f"this program runs in one process, not in {dist_util.world_size()}: use no launcher")


def loop_options(args, flags):
    """What the training loop takes from the options of every training program; `flags` are those of the network."""
    names = "batch_size microbatch lr weight_decay beta2 iterations log_interval save_interval resume_checkpoint"
    names += " grad_clip max_bad_steps seed lr_schedule lr_min lr_warmup eval_interval keep_last keep_every keep_best"
    names += " background_save max_minutes sharding compile channels_last"
    options = {name: getattr(args, name) for name in names.split()}
    options |= {"progress": True, "flags": flags, "folder": args.checkpoint_dir or None}
    if args.microbatch == -1:
        options["microbatch"], said = dist_util.from_main(memory.recall, logger.get_dir(), dist_util.dev(), flags)
        if said:
            logger.log(said)
    return options


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

    with dist_util.leaving():
        config.run_program(leave_together)


def guide_of(args, flags, diffusion, null=None):
    """
    The guidance that SampleOptions ask for before clipping, classifier-free or by a worse model: a function from
    predictor to predictor, or None. Raises ValueError where the model, or the two, cannot give it.

    :param diffusion: the process that is walked.
    :param null: what stands for no condition; None: as the flags say.
    """
    null = checks.nulls(flags) if null is None else null
    checks.check_guidance(args, null)
    first, last = rows_between(diffusion, args.guidance_interval)
    if args.guidance_scale == 1:
        return None
    how = {"scale": args.guidance_scale, "combine": guidance.linear}
    if args.guidance_rescale:
        how["combine"] = guidance.rescaled(diffusion, args.guidance_rescale)
    if args.guidance_projected != 1:
        how["combine"] = guidance.projected(diffusion, args.guidance_projected)
    worse = worse_model(args, flags) if args.guide_path else None

    def guide(predict):
        if worse:
            guided = guidance.mix(predict, worse, **how)
        else:
            guided = guidance.classifier_free(predict, null, batched=args.guidance_batched, **how)
        return guidance.interval(guided, predict, first, last) if args.guidance_interval else guided

    return guide


def vectors_of(args, flags):
    """
    The vectors that --prompts and --prompt_vectors ask a model of these flags for, float32 [P,D]: of the prompts, or of
    the file, or one of zeros, which stands for none; None if it takes none.

    :raises ValueError: if they cannot be had, or do not fit the model.
    """
    checks.check_prompts(args, flags)
    size = flags["vector_channels"]
    if not size:
        return None
    if args.prompt_vectors:
        vectors = text.read_vectors(args.prompt_vectors)
        if vectors.shape != (len(vectors), size):
            raise ValueError(f"{args.prompt_vectors} holds vectors {list(vectors.shape)}; the model takes [P,{size}]")
        if len(args.prompts) not in (0, len(vectors)):
            raise ValueError(
                f"{args.prompt_vectors} holds {len(vectors)} vectors, and there are {len(args.prompts)} --prompts to"
                " name them: give as many, or none"
            )
        return th.from_numpy(vectors)
    if not args.prompts:
        return th.zeros(1, size)
    encoder = text_encoder(args.model_path)
    if not encoder:
        raise ValueError(f"nothing beside {args.model_path} tells how its texts were encoded: give --prompt_vectors")
    return th.from_numpy(text.encode(encoder, args.prompts))


def conditions_of(args, flags, y, count):
    """
    What a model of these flags is told of each of `count` images: {"y": [count], "vector": [count,D]}, as far as it
    takes them; the vectors are given in turn. Raises ValueError as `vectors_of`.

    :param y: labels [count], or None.
    """
    cond, vectors = {"y": y} if flags["class_cond"] else {}, vectors_of(args, flags)
    if vectors is not None:
        cond["vector"] = vectors[[i % len(vectors) for i in range(count)]].to(dist_util.dev())
    return cond


def rows_between(diffusion, interval):
    """The first and the last row whose sigma lies in an interval of the options; where none does, last < first."""
    low, high = checks.parse_interval(interval)
    sigmas = diffusion.sqrt_recipm1_alphas_cumprod                            # ascending
    first, last = np.searchsorted(sigmas, low), np.searchsorted(sigmas, high, "right") - 1
    if last < first:
        logger.warn(
            f"no step lies in the interval {interval}, so nothing is guided by it: the steps' noise levels go from"
            f" {sigmas[0]:.3g} to {sigmas[-1]:.3g}"
        )
    return first, last


def rows_up_to(diffusion, sigma):
    """The rows whose noise level is at most sigma, ascending. Raises ValueError where these are fewer than two."""
    rows = range(int(np.searchsorted(diffusion.sqrt_recipm1_alphas_cumprod, sigma, "right")))
    if len(rows) < 2:
        raise ValueError(f"--max_sigma {sigma}: the process has {len(rows)} rows of so little noise, and needs two")
    return rows


def steer_of(args, diffusion, cond_fn):
    """
    What ClassifierSampleOptions make of a gradient: a function from predictor to predictor, or None without one.

    :param diffusion: the process that is walked.
    :param cond_fn: of scale 1, as `classifier_gradient`; None: no guidance.
    """
    if cond_fn is None:
        return None
    grad_fn = diffusion.told_rows(cond_fn)
    if args.classifier_normalize:
        grad_fn = guidance.normalized(grad_fn, args.classifier_normalize)
    grad_fn = guidance.scaled(grad_fn, guidance.ramp(diffusion, *checks.check_classifier_guidance(args)))
    first, last = rows_between(diffusion, args.classifier_interval)

    def steer(predict):
        if args.guidance_at == "mean":
            guided = guidance.classifier_guided_at_mean(predict, grad_fn, diffusion)
        else:
            guided = guidance.classifier_guided(predict, grad_fn)
        guided = guidance.interval(guidance.every(guided, predict, args.classifier_every), predict, first, last)
        # Near pure noise x_0 follows a classifier's gradient times sigma^2 / sqrt(1 + sigma^2), far out of the range of
        # images. The original lets it; the named samplers, which begin at such rows, do not.
        by_score = args.sampler not in ("", "ddpm") and args.clip_denoised
        return clipped(applied(guided, diffusion), diffusion) if by_score else guided

    return steer


def walk_of(args):
    """
    The options of a walk, as `generate.planned` takes them.

    :raises ValueError: if zero steps or fewer were typed.
    """
    if "steps" in args.explicit and args.steps < 1:
        raise ValueError(f"--steps must be 1 or more, not {args.steps}")
    walk = {name: getattr(args, name) for name in ("use_ddim", "sampler", "steps", "spacing")}
    eta = args.eta if "eta" in args.explicit else None
    return walk | {"eta": eta, "sampler_options": checks.parse_sampler_options(args.sampler_options)}


def hastened(args, model):
    """A diffusion model that was opened, as the options of sampling want it run. Raises ValueError if it cannot."""
    checks.check_reuse(args)
    compiled(args, model)
    return model if args.reuse_every == 1 else Reusing(model, args.reuse_every, args.reuse_depth)


def compiled(args, net):
    """
    A network, with channels last where --channels_last says so, and its blocks compiled where --compile does. Raises
    ValueError if that cannot be.
    """
    net = to_channels_last(net, logger.log) if args.channels_last else net
    return compile_blocks(net) if args.compile else net


def worse_model(args, flags):
    """The predictor of --guide_path, with a network and a way of predicting of its own, on the rows of the model."""
    explicit = {"timestep_respacing": flags["timestep_respacing"], "precision": args.precision}
    opened = open_super_res if "large_size" in flags else open_diffusion
    network, diffusion, its_flags = opened(args.guide_path, explicit, dist_util.dev())
    check_worse(args.guide_path, flags, its_flags)
    return planned(diffusion, **walk_of(args))[1].predictor(network, clip_denoised=False)


def check_worse(path, flags, its_flags):
    """Raise ValueError if the model at path was made for other images, noise or conditions than the one to guide."""
    names = "image_size large_size image_channels noise_schedule diffusion_steps class_cond num_classes vector_channels"
    for name in flags.keys() & set(names.split()):
        if flags[name] != its_flags[name]:
            raise ValueError(
                f"--guide_path: the model has {name} {flags[name]} and {path} has {its_flags[name]}: only a model of"
                " the same images, noise and conditions can guide"
            )


def check_guiding(flags, its_flags, path=""):
    """
    Raise ValueError if a classifier, of its own flags, was made for other images, noise or classes than a model.

    :param path: of the classifier, for the error.
    """
    for name in SHARED + (("num_classes",) if flags["class_cond"] else ()):
        ours, theirs = flags[name], its_flags.get(name, flags[name])
        if ours != theirs:
            raise ValueError(
                f"the model has {name} {ours} and the classifier {name} {theirs}{path and f' ({path})'}: a classifier"
                " guides only a model of the same images, noise and classes"
            )


def write_samples(args, folder, diffusion, model, flags, num_classes, names, cond_fn=None, through=None):
    """
    Draw the samples that SampleOptions ask for and write them; `flags` tell their shape.

    :param cond_fn: see `steer_of`; with one, `args` has ClassifierSampleOptions.
    :param through: who else sees the samples as they come: a function from stream to stream (EvaluateOptions).
    """
    if names:  # a network may have room for more classes than it was shown
        num_classes = len(names)
    labels, vectors = checks.parse_classes(args.classes, num_classes, args.num_samples, names), vectors_of(args, flags)
    given = {} if vectors is None else {"vector": lambda indices: vectors[[i % len(vectors) for i in indices]]}
    how = {"labels": labels, "num_classes": num_classes, "given": given}
    store = draw(args, folder, diffusion, model, flags, args.num_samples, cond_fn, through, prompts=args.prompts, **how)
    finish(args, store, names, args.prompts)


def finish(args, store, names=None, prompts=(), ways=()):
    """
    Make of the samples of a SampleStore, or None, what the options ask for, and a picture of some. Collective.

    :param names: of their classes, or None.
    :param prompts: texts that they were drawn for in turn.
    :param ways: names of ways that they lie on, as many on each; the picture has a row for each.
    """
    if dist_util.is_main() and store and not store.finished:
        labels, more, columns = store.labels, {}, 8
        if ways:
            columns = -(-len(store.images) // len(ways))
            names, labels = list(ways), np.arange(len(store.images)) // columns
        elif prompts:
            names, labels = list(prompts), np.arange(len(store.images)) % len(prompts)
            more["texts"] = np.array(names)[labels]
        if args.grid:
            save_class_grid(f"{store.path}.png", store.images, labels, names, columns)
        store.finish(None if prompts or ways else names, **more)
        logger.log(f"samples: {', '.join(map(store.path_of, store.kinds))}")
    dist_util.barrier()


def fitting_batch(diffusion, model, count, how):
    """How many of `count` samples fit in the memory of every process at once. Collective."""
    most = min(LARGEST_BATCH, math.ceil(count / dist_util.world_size()))
    fits = memory.fitting(dist_util.dev(), lambda n: evaluated(n, diffusion, model, **how), most)
    fits = min(dist_util.gather_objects(fits))
    logger.log(f"--batch_size {fits}, which fits in memory")
    return fits


def draw(args, folder, diffusion, model, flags, count, cond_fn=None, through=None, null=None, prompts=(), **how):
    """
    Draw `count` samples as the options of sampling say, by all processes, beginning where a run that was broken off
    stopped. Returns their SampleStore, `finished` if there was nothing left to do; None with --save_samples False.

    :param cond_fn: see `steer_of`.
    :param through: see `write_samples`.
    :param null: see `guide_of`.
    :param prompts: texts that the samples are drawn for in turn, to name them in the pictures of --frames.
    :param how: what each sample is conditioned on, as `sample_stream` takes it.
    """
    checks.check_counts(args, batch=0)
    if args.frames < 0 or args.frames == 1:
        raise ValueError(f"--frames is how many pictures a walk is shown in, 2 or more, or 0, not {args.frames}")
    full, (height, width) = diffusion, size_of(flags)
    rule, diffusion = planned(full, **walk_of(args))
    how |= {
        "shape": (flags["image_channels"], height, width),
        "seed": args.seed,
        "rule": rule,
        "path": full if args.brownian else None,
        "clip_denoised": args.clip_denoised,
        "denoised_fn": guidance.dynamic_threshold(args.dynamic_threshold) if args.dynamic_threshold else None,
        "guide": guide_of(args, flags, diffusion, null),
        "steer": steer_of(args, diffusion, cond_fn),
        "device": dist_util.dev(),
    }
    batch_size = args.batch_size or fitting_batch(diffusion, model, count, how)
    store = None
    if args.save_samples:
        store = SampleStore(folder, (count, height, width, flags["image_channels"]), plan_of(args, flags),
                            parse_kinds(args.save_as), bool(how["labels"] or how.get("num_classes")))  # fmt: skip
    if store and store.finished:
        logger.log(f"{store.path} is finished already: delete {store.path}.json to draw it again")
        drain((), store, through, batch_size)
        return store
    ranks, batches = dist_util.world_size(), math.ceil(count / batch_size)
    if batches < ranks:
        logger.warn(
            f"{count} samples in batches of {batch_size} give work to {batches} of {ranks} processes: lower"
            f" --batch_size to {math.ceil(count / ranks)}"
        )
    stream = sample_stream(
        diffusion,
        model,
        num_samples=count,
        batch_size=batch_size,
        rank=dist_util.rank(),
        num_ranks=ranks,
        progress=True,
        skip=store and store.has,
        **how,
    )
    drain(stream, store, through, batch_size)
    if args.frames and dist_util.is_main():
        name = store.path if store else os.path.join(folder, "samples")
        rows = min(count, len(prompts) or 8, 16)
        save_frames(name, diffusion, model, rows, args.frames, list(prompts[:rows]) or None, **how)
    return store
