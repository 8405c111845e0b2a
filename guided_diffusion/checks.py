"""
Options that must suit one another or the model, checked before work is lost, and options whose text says more than one
thing: classes, an interval, the numbers of a sampler.
"""

import argparse
import contextlib
import math
import os

from .config import nearest, parse_float
from .sampling_options import ClassifierSampleOptions, SampleOptions


def precision_of(precision, use_fp16, name="use_fp16"):
    """
    fp32, bf16 or fp16, as --precision says or, where that is empty, the flag `name` of a network.

    :raises ValueError: if --precision fp32 or bf16 contradicts the flag.
    """
    if precision and use_fp16 and precision != "fp16":
        raise ValueError(f"--precision {precision} and --{name} True are two precisions: drop --{name}")
    return precision or ("fp16" if use_fp16 else "fp32")


def check_counts(args, batch=1):
    """Raise ValueError unless there is an image to draw or score, and `batch` at a time at least."""
    for name, least in (("num_samples", 1), ("batch_size", batch)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be {least} or more, not {getattr(args, name)}")


def check_watching(args):
    """Raise ValueError if WatchOptions, or PictureOptions, are out of range or contradict the other options."""
    for name, least in (("sample_interval", 0), ("eval_every", 0), ("eval_samples", 2), ("sample_steps", 1)):
        if getattr(args, name, least) < least:
            raise ValueError(f"--{name} must be {least} or more, not {getattr(args, name)}")
    if args.sharding != "none" and (args.sample_interval or getattr(args, "eval_every", 0)):
        raise ValueError("--sample_interval and --eval_every draw with a whole network: not with --sharding fsdp")


def parse_classes(text, num_classes, count, class_names=None):
    """
    The labels of `count` images from --classes.

    :param text: '' for random labels; 'all' for 0..num_classes-1 in turn; labels in turn, as '3,7'; or with how
        many of each, as '3:100,7:50'.
    :param class_names: names by label; with them a word that is no number may be a name.
    :return: list of `count` labels, or None for random ones.
    :raises ValueError: for a label out of range or an unknown name.
    """
    if not text:
        return None
    if text == "all":
        wanted = range(num_classes)
    elif ":" in text:
        return _quotas(text, num_classes, count, class_names or [])
    else:
        wanted = [_label(word.strip(), num_classes, class_names or []) for word in text.split(",")]
    return [wanted[i % len(wanted)] for i in range(count)]


def _quotas(text, num_classes, count, class_names):
    labels = []
    for part in text.split(","):
        word, colon, number = part.rpartition(":")
        if not colon or not number.strip().isdigit():
            raise ValueError(f"cannot read {part!r} in --classes {text}: give each class a number, as 3:100,7:50")
        labels += [_label(word.strip(), num_classes, class_names)] * int(number)
    if len(labels) != count:
        raise ValueError(f"--classes {text} are {len(labels)} images: give --num_samples {len(labels)}, not {count}")
    return labels


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


def check_prompts(args, flags):
    """Raise ValueError if SampleOptions' prompts, or the lack of them, do not suit a model of these flags."""
    asked = args.prompts or args.prompt_vectors
    if asked and not flags["vector_channels"]:
        raise ValueError("--prompts and --prompt_vectors need a model of captions, trained with --vector_channels")
    if flags["vector_channels"] and not asked and not nulls(flags):
        raise ValueError(
            "the model takes the vector of a text and, trained without --class_dropout, cannot do without: give"
            " --prompts or --prompt_vectors"
        )


def nulls(flags):
    """
    What stands for none in a diffusion network of these flags: {name of a condition: its null}, as `guidance.nulled`
    takes it, of all its conditions, or {} if it was trained without dropping them.

    :raises ValueError: if class_dropout is no probability below 1, or there are no conditions to drop.
    """
    rate = flags["class_dropout"]
    if not 0 <= rate < 1:
        raise ValueError(f"--class_dropout is how often the label is dropped, from 0 to below 1, not {rate}")
    found = {"y": flags["num_classes"]} if flags["class_cond"] else {}
    found |= {"vector": 0.0} if flags.get("vector_channels") else {}
    if rate and not found:
        raise ValueError(
            f"--class_dropout {rate}: there are no labels to drop without --class_cond True, and no vectors without"
            " --vector_channels"
        )
    return found if rate else {}


def check_guidance(args, null):
    """
    Raise ValueError if SampleOptions ask a model for guidance that it cannot give.

    :param null: what stands for no condition, as `nulls` tells.
    """
    if args.guidance_scale != 1 and not null and not args.guide_path:
        raise ValueError(
            f"--guidance_scale {args.guidance_scale}: the model was trained without --class_dropout and cannot predict"
            " without a condition: keep 1, train with --class_dropout 0.1, give a worse model by --guide_path, or guide"
            " by a classifier (classifier_sample.py)"
        )
    for name in ("guidance_rescale", "guidance_projected", "dynamic_threshold"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} is a share from 0 to 1, not {getattr(args, name)}")
    if args.guide_path and not args.guidance_batched:
        raise ValueError("--guidance_batched False: the model and that of --guide_path run in turn anyway: drop it")
    if args.guidance_rescale and args.guidance_projected != 1:
        raise ValueError(
            f"--guidance_rescale {args.guidance_rescale} and --guidance_projected {args.guidance_projected} are two"
            " rules for the same thing: drop one of them"
        )
    for name in ("guide_path", "guidance_interval", "guidance_rescale", "guidance_projected"):
        if args.guidance_scale == 1 and getattr(args, name) != getattr(SampleOptions, name):
            raise ValueError(f"--{name} has no effect at --guidance_scale 1: give another scale, as 2")


def check_reuse(args):
    """Raise ValueError if the options of sampling ask for a reuse of features that cannot be."""
    for name in ("reuse_every", "reuse_depth"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, not {getattr(args, name)}")
    if args.reuse_every == 1 and args.reuse_depth != SampleOptions.reuse_depth:
        raise ValueError("--reuse_depth has no effect at --reuse_every 1: give another number of steps, as 3")
    if args.reuse_every > 1 and args.guidance_scale != 1 and not (args.guidance_batched or args.guide_path):
        raise ValueError(
            "--guidance_batched False: the conditional and the unconditional prediction in turn would take each other's"
            f" features at --reuse_every {args.reuse_every}: drop one of the two"
        )


def one_prediction():
    """Names of the samplers whose step looks at one prediction only."""
    from .sampling import SAMPLERS

    return [name for name, sampler in SAMPLERS.items() if sampler.one_prediction]


def check_classifier_guidance(args):
    """
    Raise ValueError if ClassifierSampleOptions contradict one another or are out of range.

    :return: (the strength at the first step, that at the last).
    """
    start, end = args.classifier_scale, classifier_scale_end(args)
    sampler = args.sampler or ("ddim" if args.use_ddim else "ddpm")
    if args.guidance_at == "mean" and sampler != "ddpm":
        raise ValueError(
            f"--guidance_at mean: {sampler} takes its step from the score and has no mean to guide at, only ancestral"
            " sampling has (--sampler ddpm): keep x_t"
        )
    if args.classifier_every < 1:
        raise ValueError(f"--classifier_every must be 1 or more, not {args.classifier_every}")
    if args.classifier_every > 1 and sampler not in one_prediction():
        raise ValueError(
            f"--classifier_every {args.classifier_every}: {sampler} compares the predictions of several rows, and would"
            f" take guidance that comes and goes for their slope: keep 1, or use {', '.join(one_prediction())}"
        )
    for name in ("classifier_normalize", "classifier_marginal"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, not {getattr(args, name)}")
    parse_interval(args.classifier_interval)
    how = "classifier_marginal", "classifier_normalize", "classifier_interval", "classifier_every", "guidance_at"
    for name in how:
        if not (start or end) and getattr(args, name) != getattr(ClassifierSampleOptions, name):
            raise ValueError(f"--{name} has no effect at --classifier_scale 0: give another scale, as 1")
    return start, end


def classifier_scale_end(args):
    """--classifier_scale_end as a number; where it is empty, --classifier_scale. Raises ValueError for other text."""
    try:
        return parse_float(args.classifier_scale_end) if args.classifier_scale_end else args.classifier_scale
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--classifier_scale_end: {error}") from None


def parse_interval(text):
    """'0.2,5' -> (0.2, 5.0), '' -> (0, inf). Raises ValueError unless these are two numbers, the larger one last."""
    if not text:
        return 0.0, math.inf
    with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
        low, high = map(parse_float, text.split(","))
        if 0 <= low < high:
            return low, high
    raise ValueError(f"cannot read the interval {text!r}: give two noise levels, the larger one last, as 0.2,5")


def parse_sampler_options(text):
    """'gam=1.5,order=2' -> {"gam": 1.5, "order": 2}, '' -> {}. Raises ValueError for anything else."""
    found = {}
    for part in text.split(",") if text else []:
        name, _, number = part.partition("=")
        try:
            value = parse_float(number)
        except argparse.ArgumentTypeError:
            raise ValueError(f"cannot read {part!r} in --sampler_options: give name=number, as gam=1.5") from None
        found[name.strip()] = int(value) if number.strip().lstrip("-").isdigit() else value
    return found


def check_restoration(args):
    """Raise ValueError if InpaintOptions contradict one another or are out of range."""
    if args.method == "repaint" and args.task != "inpaint":
        raise ValueError(f"--method repaint puts known pixels in place, and {args.task} has none: use --method dps")
    if args.method == "repaint" and args.noise_std:
        raise ValueError(
            f"--method repaint takes the known pixels as they are: keep --noise_std 0, not {args.noise_std}, or use"
            " --method dps"
        )
    if args.method == "repaint" and args.sampler not in one_prediction():
        raise ValueError(
            f"--method repaint goes back and forth between rows, which {args.sampler} cannot: use"
            f" {', '.join(one_prediction())}"
        )
    smallest = {"repaint_jump": 1, "repaint_times": 1, "num_samples": 1, "noise_std": 0, "dps_scale": 0}
    for name, least in smallest.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be {least} or more, not {getattr(args, name)}")
    share_of_mask(args.mask)


def share_of_mask(text):
    """
    The share of unknown pixels in --mask random:SHARE, or None for the other kinds of mask.

    :raises ValueError: if it is no number from 0 to 1, or the mask is no kind and no file.
    """
    kind, colon, share = text.partition(":")
    if kind == "random" and colon:
        with contextlib.suppress(argparse.ArgumentTypeError):
            if 0 <= parse_float(share) <= 1:
                return float(share)
        raise ValueError(f"cannot read --mask {text}: give a share from 0 to 1, as random:0.5")
    if text not in ("half", "box") and not os.path.isfile(text):
        raise ValueError(f"--mask {text} is no file and none of half, box and random:SHARE")
    return None
