"""
The options of the programs, each written once (name, default, help), and the command line made from them.

A program takes a few of the groups below: `args = parse("...", TrainOptions, ModelOptions, DiffusionOptions)`.
A new option of a network or a trainer is one more field here. Standard library only.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import sys
from dataclasses import dataclass


def option(default, help, choices=None):
    """A field of an options dataclass: what a flag of that name needs. The type is that of the default."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def changed(group, name, default):
    """The option `name` of another group with another default."""
    return dataclasses.field(default=default, metadata=group.__dataclass_fields__[name].metadata)


# ---------------------------------------------------------------------------------------------------------- networks


@dataclass
class _ImageSize:
    image_size: int = option(64, "height and width of the images in pixels")


@dataclass
class _Data:
    image_channels: int = option(3, "channels of the images: 3 for colour, 1 for grey")
    num_classes: int = option(1000, "number of classes that the labels name")


@dataclass
class _Network(_Data):
    num_channels: int = option(128, "base width; every level's width is this times its factor in --channel_mult")
    num_res_blocks: int = option(2, "residual blocks a level")
    num_heads: int = option(4, "attention heads, unless --num_head_channels is given")
    num_heads_upsample: int = option(-1, "attention heads in the upward half; -1: as --num_heads")
    num_head_channels: int = option(-1, "channels of an attention head, instead of --num_heads; -1: use --num_heads")
    attention_resolutions: str = option("16,8", "image sides in pixels at which blocks have attention, as 32,16,8")
    channel_mult: str = option(
        "",
        "width factor of each level, as 0.5,1,2; each level halves the side. Empty: the paper's table for sizes 512,"
        " 256, 128 and 64; below 64: 1,2,2,2 cut to the halvings that leave 4 pixels or more, if 8 or fewer are left",
    )
    dropout: float = option(0.0, "probability of dropping a feature in the residual blocks")
    class_cond: bool = option(False, "give the class label to the network")
    class_dropout: float = option(
        0.0,
        "train without the label this often, as 0.1, for classifier-free guidance: the network then has one class"
        " more, numbered num_classes, that stands for no label",
    )
    use_checkpoint: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = option(True, "time and class scale and shift the features instead of adding to them")
    resblock_updown: bool = option(False, "resample inside residual blocks (BigGAN) instead of by a convolution")
    use_fp16: bool = option(False, "16-bit floating point in the body of the network")
    use_new_attention_order: bool = option(
        False, "attention weights split into q, k, v before heads; only the published 64x64 model has it"
    )


@dataclass
class ModelOptions(_Network, _ImageSize):
    """network"""


@dataclass
class SuperResOptions(_Network):
    """super-resolution network"""

    large_size: int = option(256, "height and width of the images that are made, in pixels")
    small_size: int = option(64, "height and width of the images that are enlarged, in pixels")


@dataclass
class ClassifierOptions(_Data, _ImageSize):
    """noise-aware classifier"""

    classifier_use_fp16: bool = option(False, "16-bit floating point in the body of the classifier")
    classifier_width: int = option(128, "base width of the classifier")
    classifier_depth: int = option(2, "residual blocks a level of the classifier")
    classifier_attention_resolutions: str = option(
        "32,16,8", "image sides in pixels at which the classifier has attention"
    )
    classifier_use_scale_shift_norm: bool = option(
        True, "time scales and shifts the classifier's features instead of adding to them"
    )
    classifier_resblock_updown: bool = option(True, "resample inside the classifier's residual blocks (BigGAN)")
    classifier_pool: str = option(
        "attention", "how features become logits", ("adaptive", "attention", "spatial", "spatial_v2")
    )
    classifier_channel_mult: str = option("", "width factor of each level of the classifier; empty: as --channel_mult")
    classifier_num_head_channels: int = option(64, "channels of an attention head of the classifier")
    classifier_dropout: float = option(0.0, "probability of dropping a feature in the classifier's residual blocks")


@dataclass
class DiffusionOptions:
    """diffusion process"""

    learn_sigma: bool = option(False, "the network also predicts the variance of each step")
    diffusion_steps: int = option(1000, "steps of the noising process")
    noise_schedule: str = option(
        "linear",
        "how noise grows over the steps: linear (21 steps or more), cosine, sigmoid, sigmoid_beta, sqrt_linear,"
        " log_linear or karras; and after a +, changes of it: zero_snr ends in pure noise, shift2 doubles the noise as"
        " for images of twice the side; as cosine+shift4",
    )
    timestep_respacing: str = option(
        "", "keep fewer steps: a count (250), counts for equal sections (10,15,20), or ddim25 for a fixed stride"
    )
    use_kl: bool = option(False, "train on the variational bound instead of the squared error")
    predict_xstart: bool = option(False, "the network predicts the clean image instead of the noise")
    rescale_timesteps: bool = option(
        False,
        "tell the network time on a scale of 1000 whatever the number of steps; True was the default of"
        " improved-diffusion, and matters only if --diffusion_steps is not 1000",
    )
    rescale_learned_sigmas: bool = option(
        False,
        "weigh the variational term of a learned variance by steps/1000; True was the default of improved-diffusion,"
        " and matters only if --diffusion_steps is not 1000",
    )
    predict: str = option(
        "",
        "what the network predicts: the noise, the clean image, the velocity, the previous image, or EDM's mix of noise"
        " and clean image; empty: as --predict_xstart says",
        ("eps", "x0", "v", "previous_x", "edm"),
    )
    loss_weight: str = option(
        "unit",
        "weight of the squared error by noise level: unit, snr, snr_plus_one, truncated_snr, min_snr, soft_min_snr, p2"
        " or edm; all but unit weigh the clean image's error alike whatever is predicted",
    )
    sigma_data: float = option(0.5, "standard deviation of the data, for --predict edm and --loss_weight edm")


# ---------------------------------------------------------------------------------------------------------- programs


@dataclass
class RunOptions:
    """run"""

    seed: int = option(0, "seed of everything random: the same seed and options give the same run")
    device: str = option("", "cpu, cuda, cuda:1, mps...; empty: a GPU if there is one")
    log_dir: str = option("", "folder for everything written; empty: $OPENAI_LOGDIR, else a new temporary folder")


@dataclass
class _Training:
    data_dir: str = option("", "folder or file of training images")
    schedule_sampler: str = option("uniform", "which timesteps to train on", ("uniform", "loss-second-moment"))
    lr: float = option(1e-4, "learning rate of AdamW")
    weight_decay: float = option(0.0, "weight decay of AdamW, on every parameter")
    iterations: int = option(0, "stop after this many updates in all; 0: no such limit")
    batch_size: int = option(1, "images at once in each process")
    microbatch: int = option(-1, "images in memory at once, gradients averaged over the batch; -1: the whole batch")
    log_interval: int = option(10, "updates between two lines of the log")
    save_interval: int = option(10000, "updates between two checkpoints")
    resume_checkpoint: str = option(
        "", "modelNNNNNN.pt of another folder to go on from; its ema_*, opt* and state* are found beside it"
    )
    resume: str = option(
        "auto",
        "auto: the same command goes on from the newest whole checkpoint in --log_dir; never: start anew, in a folder"
        " without checkpoints",
        ("auto", "never"),
    )
    force: bool = option(False, "go on from checkpoints though the seed or the data are not those they were made with")
    lr_schedule: str = option(
        "linear",
        "how the rate falls to 0 over the updates of annealing: linear, cosine, or constant until they are done",
        ("linear", "cosine", "constant"),
    )
    lr_warmup: int = option(0, "let the rate rise linearly over the first so many updates")
    keep_last: int = option(0, "keep only so many of the newest checkpoints; 0: all")
    keep_every: int = option(0, "of the older ones, keep those whose update this divides; 0: none of them")
    keep_best: bool = option(False, "keep the checkpoint of the least validation loss as well")
    background_save: bool = option(True, "write checkpoints beside the next updates instead of waiting for the disk")
    max_minutes: float = option(
        0.0, "save and leave with exit code 75 after so many minutes, as for a queue's time slot; 0: no limit"
    )
    val_data_dir: str = option("", "folder or file of held-out images for validation; empty: none")
    eval_interval: int = option(100, "updates between two validations")
    grad_clip: float = option(0.0, "largest norm of the gradient, scaled down to it if larger; 0: no limit")
    max_bad_steps: int = option(100, "stop after this many updates in a row whose loss or gradient is not finite")
    num_workers: int = option(1, "processes that load images; 0: the training process itself")
    random_flip: bool = option(True, "mirror half of the training images")
    random_crop: bool = option(False, "crop training images at random scale and place instead of the centre")
    skip_bad_images: bool = option(False, "pass over images that cannot be read, and count them, instead of stopping")
    label_from: str = option(
        "auto",
        "where a file's class is written: in the start of its name up to the first _ (prefix), in its sub-folder, or"
        " auto: by prefix if the names allow it, else by folder",
        ("auto", "prefix", "folder"),
    )


@dataclass
class TrainOptions(_Training):
    """training"""

    lr_anneal_steps: int = option(
        0, "stop after this many updates, the rate falling to 0 as --lr_schedule says; 0: constant rate"
    )
    ema_rate: str = option("0.9999", "decay of the averaged weights that samples are drawn with; several: 0.999,0.9999")
    ema_halflife: str = option(
        "", "more averages, by half-life in thousands of images, as 500 or 500,2000, whatever the batch"
    )
    ema_power: str = option(
        "",
        "more averages, by relative width of a power function, as 0.05,0.1: their snapshots make averages of any width"
        " afterwards (scripts/posthoc_ema.py)",
    )
    ema_warmup: bool = option(
        True, "limit the decay to (1 + step) / (10 + step), so that averages forget the random start"
    )
    fp16_scale_growth: float = option(1e-3, "growth of log2 of the loss scale after each good update in fp16")


@dataclass
class ClassifierTrainOptions(_Training):
    """training"""

    lr: float = changed(_Training, "lr", 3e-4)
    iterations: int = changed(_Training, "iterations", 150000)
    batch_size: int = changed(_Training, "batch_size", 4)
    random_crop: bool = changed(_Training, "random_crop", True)
    noised: bool = option(True, "train on noised images, as guidance needs")
    anneal_lr: bool = option(False, "let the learning rate fall to 0 over --iterations as --lr_schedule says")
    eval_interval: int = changed(_Training, "eval_interval", 5)


@dataclass
class SampleOptions:
    """sampling"""

    model_path: str = option("", "checkpoint of the diffusion model; config.json beside it spares the network's flags")
    num_samples: int = option(10000, "images to draw")
    batch_size: int = changed(_Training, "batch_size", 16)
    clip_denoised: bool = option(True, "clip each predicted clean image to the range of pixels")
    use_ddim: bool = option(False, "sample by DDIM instead of the ancestral DDPM")
    eta: float = option(0.0, "noise of DDIM, and of other samplers that have it: 0 none, 1 as much as DDPM")
    sampler: str = option("", "a sampler by name, as dpmpp_2m or heun; empty: DDPM, or DDIM with --use_ddim")
    steps: int = option(0, "steps that --sampler keeps, of those that --timestep_respacing leaves; 0: all")
    spacing: str = option("", "spacing of those steps: uniform, leading, trailing, quadratic, log_snr or karras")
    classes: str = option("", "labels or class names to draw in turn, as 3,7; all: every class in turn; empty: random")
    grid: bool = option(True, "also write a picture of the first samples")
    guidance_scale: float = option(
        1.0,
        "classifier-free guidance, from the unconditional prediction towards the conditional one and beyond; 1: the"
        " conditional one; other values need a model trained with --class_dropout, or --guide_path",
    )
    guide_path: str = option(
        "",
        "checkpoint of a worse model, smaller or trained less, to guide away from instead of from the unconditional"
        " prediction (autoguidance); empty: none",
    )
    guidance_interval: str = option(
        "", "noise levels sigma between which --guidance_scale is in force, as 0.2,5; empty: all"
    )
    guidance_batched: bool = option(
        True, "run both predictions of classifier-free guidance in one batch of twice the size, instead of in turn"
    )
    guidance_rescale: float = option(
        0.0, "how far, from 0 to 1, guided predictions are brought back to the contrast of the conditional ones"
    )


@dataclass
class ClassifierSampleOptions(SampleOptions):
    """sampling"""

    classifier_path: str = option("", "checkpoint of the noise-aware classifier")
    classifier_scale: float = option(1.0, "strength of the classifier's guidance; 0: none")


# ------------------------------------------------------------------------------------------------- flags from options


def options(*groups):
    """{name: field} over the groups. Raises ValueError if two groups give one name different defaults."""
    found = {}
    for field in (field for group in groups for field in dataclasses.fields(group)):
        other = found.setdefault(field.name, field)
        if repr(other.default) != repr(field.default):
            raise ValueError(f"option {field.name} has two defaults: {other.default!r} and {field.default!r}")
    return found


def defaults(*groups):
    """{name: default} over the groups."""
    return {name: field.default for name, field in options(*groups).items()}


def str2bool(text):
    """True for yes, true, t, y, 1; False for no, false, f, n, 0, in any case; else argparse.ArgumentTypeError."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"boolean value expected, got {text!r}")


def parse_int(text):
    """A whole number, also as 1e5 or 100_000; else argparse.ArgumentTypeError."""
    for read in (int, float):
        try:
            number = read(text)
        except ValueError:
            continue
        if number == number // 1:
            return int(number)
    raise argparse.ArgumentTypeError(f"whole number expected, got {text!r}")


def parse_float(text):
    """A finite number; else argparse.ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"number expected, got {text!r}")
    return number


def add_flag(parser, name, default, help=None, choices=None):
    """
    Add --NAME VALUE, of the type of its default (None counts as text; a bare boolean flag means True), to an
    argparse parser. What was not typed is absent from the parsed namespace unless the parser fills it in.
    """
    kind = {bool: str2bool, int: parse_int, float: parse_float}.get(type(default), str)
    bare = {"nargs": "?", "const": True} if kind is str2bool else {}
    metavar = None if choices else type(default).__name__.upper() if default is not None else "STR"
    shown = f"{help or ''} (default: {default if str(default) else repr('')})".replace("%", "%%")
    parser.add_argument(f"--{name}", type=kind, choices=choices, metavar=metavar, help=shown, **bare)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one ValueError, not a page of usage."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def parse(description, *groups, argv=None):
    """
    Parse the command line.

    :param description: one sentence for --help.
    :param groups: options dataclasses; a name in several groups is one flag.
    :param argv: list of words; None takes those of the process.
    :return: argparse.Namespace of every option, and `explicit`: the set of names that were typed.
    :raises ValueError: for an unknown flag (with the nearest names) or a value that cannot be read.
    """
    known = options(*groups)
    parser = _Parser(
        description=description,
        usage="%(prog)s [--name value] ...",
        argument_default=argparse.SUPPRESS,
        epilog="GD_DEBUG=1 in the environment shows the traceback of an error.",
    )
    left = dict(known)
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        for field in dataclasses.fields(group):
            if left.pop(field.name, None):
                add_flag(section, field.name, field.default, **field.metadata)
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        parser.error(f"unknown flag {word}{nearest(word, [f'--{name}' for name in known])}")
    values = {name: field.default for name, field in known.items()} | vars(typed)
    return argparse.Namespace(**values, explicit=set(vars(typed)))


def nearest(word, names):
    """'; did you mean a or b?' for the names most like the word, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def flags_of(args, *groups):
    """{name: value} of the options of the groups, for a builder or a config.json."""
    return {name: getattr(args, name) for name in options(*groups)}


def explicit_flags(args):
    """{name: value} of the options that were typed."""
    return {name: getattr(args, name) for name in args.explicit}


def describe(args):
    """A text with a line for each option, aligned; * marks those that were typed."""
    values = {name: value for name, value in vars(args).items() if name != "explicit"}
    width = max(map(len, values))
    return "\n".join(
        f"{'*' if name in args.explicit else ' '} {name:<{width}}  {value!r}" for name, value in values.items()
    )


def run_program(main):
    """
    Run a program: bad input ends it with one line on stderr and exit code 2, an interrupt with 130.
    GD_DEBUG=1 in the environment lets the traceback through.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError, NotImplementedError, ArithmeticError) as error:
        if os.environ.get("GD_DEBUG") == "1":
            raise
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------ options that hold a list


def _numbers(text, read, what):
    with contextlib.suppress(argparse.ArgumentTypeError):
        numbers = tuple(read(part) for part in text.split(",")) if text else ()
        if all(number > 0 for number in numbers):
            return numbers
    raise ValueError(f"cannot read {what} {text!r}: give positive numbers with commas between, or nothing")


def parse_channel_mult(text):
    """'0.5,1,2' -> (0.5, 1, 2), '' -> None; a sequence passes as it is. Raises ValueError for anything else."""
    if not isinstance(text, str):
        return tuple(text)

    def factor(part):
        return int(part) if part.strip().isdigit() else parse_float(part)

    return _numbers(text, factor, "channel_mult") or None


def default_channel_mult(image_size, super_res=False):
    """
    Width factors by image side: the paper's (table 11) for 512, 256, 128 and 64, improved-diffusion's for 32, and
    for any other side below 64 those of 32, cut to the halvings that leave an integer of at least 4 pixels; a side
    that this leaves above 8 pixels has no default, since attention always stands at the lowest level.

    :param super_res: the upsamplers (table 13) have at 512 the factors of 256.
    :raises ValueError: for a side without default.
    """
    if super_res and image_size == 512:
        image_size = 256
    table = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
    if image_size in table:
        return table[image_size]
    side, levels = image_size, 1
    while side % 2 == 0 and side >= 8 and levels < 4:
        side, levels = side // 2, levels + 1
    if not 0 < side <= 8:
        raise ValueError(
            f"unsupported image size: {image_size} has no default width factors; give --channel_mult (for a"
            " classifier --classifier_channel_mult), a factor for each level, as 1,2,2; each level halves the side"
        )
    return (1, 2, 2, 2)[:levels]


def levels(channel_mult, image_size, super_res=False):
    """The width factors of the levels that --channel_mult and the image side give; ValueError as the two above."""
    return parse_channel_mult(channel_mult) or default_channel_mult(image_size, super_res)


def attention_downsampling(text, image_size):
    """
    Sides in pixels -> factors by which the features are smaller than the image: ('32,16,8', 64) -> (2, 4, 8).
    A side that no level of the network has counts for nothing, as in the original.
    """
    return tuple(image_size // side for side in _numbers(text, parse_int, "attention_resolutions"))


def parse_classes(text, num_classes, count, class_names=None):
    """
    The labels of `count` images from --classes.

    :param text: '' for random labels; 'all' for 0..num_classes-1 in turn; or labels in turn, as '3,7'.
    :param class_names: names by label; with them a word that is no number may be a name.
    :return: list of `count` labels, or None for random ones.
    :raises ValueError: for a label out of range or an unknown name.
    """
    if not text:
        return None
    if text == "all":
        wanted = range(num_classes)
    else:
        wanted = [_label(word.strip(), num_classes, class_names or []) for word in text.split(",")]
    return [wanted[i % len(wanted)] for i in range(count)]


def _label(word, num_classes, class_names):
    if word in class_names and not word.isdigit():
        return list(class_names).index(word)
    if not word.isdigit():
        raise ValueError(f"unknown class {word!r} in --classes{nearest(word, class_names)}")
    if int(word) >= num_classes:
        raise ValueError(f"class {word} in --classes is out of range: labels run from 0 to {num_classes - 1}")
    return int(word)


def check_classes(flags, classes):
    """Raise ValueError if --classes asks an unconditional model for classes; flags are the model's."""
    if classes and not flags["class_cond"]:
        raise ValueError(
            f"--classes {classes}: the model is unconditional (class_cond False): drop --classes, use a model trained"
            " with --class_cond True, or guide this one by a classifier (classifier_sample.py)"
        )


def null_class(flags):
    """
    The label that stands for no label in a diffusion network of these flags, or None if it has none.

    :raises ValueError: if class_dropout is no probability below 1, or there are no labels to drop.
    """
    rate = flags["class_dropout"]
    if not 0 <= rate < 1:
        raise ValueError(f"--class_dropout is how often the label is dropped, from 0 to below 1, not {rate}")
    if rate and not flags["class_cond"]:
        raise ValueError(f"--class_dropout {rate}: there are no labels to drop without --class_cond True")
    return flags["num_classes"] if rate else None


def check_guidance(args, flags):
    """Raise ValueError if SampleOptions ask a model of these flags for guidance that it cannot give."""
    if args.guidance_scale != 1 and null_class(flags) is None and not args.guide_path:
        raise ValueError(
            f"--guidance_scale {args.guidance_scale}: the model was trained without --class_dropout and cannot predict"
            " without a label: keep 1, train with --class_dropout 0.1, give a worse model by --guide_path, or guide by"
            " a classifier (classifier_sample.py)"
        )
    if not 0 <= args.guidance_rescale <= 1:
        raise ValueError(f"--guidance_rescale is a share from 0 to 1, not {args.guidance_rescale}")
    for name in ("guide_path", "guidance_interval", "guidance_rescale"):
        if args.guidance_scale == 1 and getattr(args, name):
            raise ValueError(f"--{name} has no effect at --guidance_scale 1: give another scale, as 2")


def parse_interval(text):
    """'0.2,5' -> (0.2, 5.0), '' -> (0, inf). Raises ValueError unless these are two numbers, the larger one last."""
    if not text:
        return 0.0, math.inf
    with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
        low, high = map(parse_float, text.split(","))
        if 0 <= low < high:
            return low, high
    raise ValueError(f"cannot read the interval {text!r}: give two noise levels, the larger one last, as 0.2,5")
