"""
The options of the programs, each written once (name, default, help), and the command line made from them.

A program takes a few of the groups below: `args = parse("...", TrainOptions, ModelOptions, DiffusionOptions)`.
A new option of a network or a trainer is one more field here. To be imported, the standard library is enough
(`presets` needs no more).
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import sys
from dataclasses import dataclass

from . import presets


def option(default, help, choices=None, kind=None):
    """
    A field of an options dataclass: what a flag of that name needs. The type is that of the default, or what `kind`, a
    function, makes of the text.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "kind": kind})


def changed(group, name, default, help=None):
    """The option `name` of another group with another default, and other help if given."""
    metadata = group.__dataclass_fields__[name].metadata
    return dataclasses.field(default=default, metadata={**metadata, "help": help or metadata["help"]})


def parse_size(text):
    """A side in pixels, or HEIGHTxWIDTH: an integer, or where the two differ the text "HEIGHTxWIDTH"."""
    height, by, width = str(text).lower().partition("x")
    height, width = parse_int(height), parse_int(width if by else height)
    return height if height == width else f"{height}x{width}"


def sides(size):
    """(height, width) in pixels of what `parse_size` gives."""
    return tuple(map(int, size.split("x"))) if isinstance(size, str) else (size, size)


# ---------------------------------------------------------------------------------------------------------- networks


@dataclass
class _ImageSize:
    image_size: int = option(
        64,
        "height and width of the images in pixels; HEIGHTxWIDTH, as 48x64, for rectangles, whose shorter side then"
        " counts for --attention_resolutions and the default widths",
        kind=parse_size,
    )


@dataclass
class _Channels:
    image_channels: int = option(3, "channels of the images: 3 for colour, 1 for grey")


@dataclass
class _Data(_Channels):
    num_classes: int = option(1000, "number of classes that the labels name")


@dataclass
class _Trunk:
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
    use_checkpoint: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    use_scale_shift_norm: bool = option(True, "time and class scale and shift the features instead of adding to them")
    resblock_updown: bool = option(False, "resample inside residual blocks (BigGAN) instead of by a convolution")
    use_fp16: bool = option(False, "16-bit floating point in the body of the network")
    use_new_attention_order: bool = option(
        False, "attention weights split into q, k, v before heads; only the published 64x64 model has it"
    )


@dataclass
class _Network(_Trunk, _Data):
    class_cond: bool = option(False, "give the class label to the network")
    class_dropout: float = option(
        0.0,
        "train without the label this often, as 0.1, for classifier-free guidance: the network then has one class"
        " more, numbered num_classes, that stands for no label; a vector is dropped with it, zeros standing for none",
    )


@dataclass
class ModelOptions(_Network, _ImageSize):
    """network"""

    network: str = option(
        "adm",
        "the U-Net of the paper, or film: a small one without attention that takes a vector; its widths are"
        " --num_channels and --channel_mult (empty: 1,2,4,8), each factor halves the side, and of the other options of"
        " the network it has --dropout and --vector_channels",
        ("adm", "film"),
    )
    vector_channels: int = option(0, "width of the vector, as an embedded text, that the network takes; 0: none")
    conv_resample: bool = option(True, "without --resblock_updown, resample by convolutions, not by means and copies")
    checkpoint_levels: int = option(
        0,
        "recompute the activations of so many levels only, from the largest feature maps on, which keep the most;"
        " 0: none, or with --use_checkpoint all",
    )
    residual_rescale: bool = option(
        False, "divide the sum of every residual block, and of attention, by sqrt 2: in the paper's table 1, and in no"
        " published model; tensors do not tell it",
    )  # fmt: skip


@dataclass
class SuperResOptions(_Network):
    """super-resolution network"""

    large_size: int = option(256, "height and width of the images that are made, in pixels")
    small_size: int = option(64, "height and width of the images that are enlarged, in pixels")
    conv_resample: bool = changed(ModelOptions, "conv_resample", True)
    checkpoint_levels: int = changed(ModelOptions, "checkpoint_levels", 0)
    residual_rescale: bool = changed(ModelOptions, "residual_rescale", False)


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
    classifier_residual_rescale: bool = changed(ModelOptions, "residual_rescale", False)


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
    sigma_small: bool = option(
        False,
        "without --learn_sigma, ancestral steps have the posterior's variance, right for data at one point, instead of"
        " beta, right for data like noise; sampling may choose it for any such model",
    )
    learned_variance: str = option(
        "range",
        "what the network says of the variance with --learn_sigma: its place between the two fixed ones, as the paper,"
        " or, free, its logarithm, with nothing to hold it; tensors do not tell it",
        ("range", "free"),
    )


@dataclass
class CaptionOptions:
    """captions"""

    context_length: int = option(
        64, "tokens of a caption: its bytes in UTF-8, a start and an end; what is longer is cut, with a warning"
    )


@dataclass
class ClipOptions(CaptionOptions, _Channels, _ImageSize):
    """CLIP"""

    clip_size: int = option(256, "width of the space in which pictures and captions meet")
    patch_size: int = option(4, "side in pixels of the patches that the image encoder sees; it divides --image_size")
    image_width: int = option(256, "width of the image encoder, a transformer")
    image_layers: int = option(6, "layers of the image encoder")
    image_heads: int = option(8, "attention heads of the image encoder")
    text_width: int = option(256, "width of the text encoder, a transformer")
    text_layers: int = option(6, "layers of the text encoder")
    text_heads: int = option(8, "attention heads of the text encoder")
    dropout: float = changed(_Trunk, "dropout", 0.0, "probability of dropping a feature in the transformers")
    image_mean: float = option(0.5, "mean of the data's pixels, which span 0 to 1, by which CLIP normalizes images")
    image_std: float = option(0.5, "standard deviation of the data's pixels, likewise")


@dataclass
class PriorOptions:
    """prior"""

    prior_width: int = option(256, "width of the prior, a transformer")
    prior_layers: int = option(6, "layers of the prior")
    prior_heads: int = option(8, "attention heads of the prior")
    prior_dropout: float = option(0.0, "probability of dropping a feature in the prior")


@dataclass
class DecoderOptions(CaptionOptions, _Trunk, _Channels, _ImageSize):
    """decoder"""

    conv_resample: bool = changed(ModelOptions, "conv_resample", True)
    checkpoint_levels: int = changed(ModelOptions, "checkpoint_levels", 0)
    image_tokens: int = option(4, "tokens that the embedding of the picture makes for every attention")
    text_width: int = changed(
        ClipOptions, "text_width", 128, "width of the tokens, and of the decoder's own text encoder"
    )
    text_layers: int = changed(
        ClipOptions, "text_layers", 4, "layers of that text encoder; 0: captions are not looked at"
    )
    text_heads: int = changed(ClipOptions, "text_heads", 8, "attention heads of that text encoder")
    text_dropout: float = option(0.0, "probability of dropping a feature in that text encoder")


@dataclass
class ClipSizes:
    """what its CLIP settles of a prior or a decoder; in config.json, and no flags"""

    clip_size: int = changed(ClipOptions, "clip_size", 256)
    token_size: int = option(256, "width of the features of captions")


@dataclass
class DecoderProcessOptions(DiffusionOptions):
    """diffusion process"""

    noise_schedule: str = changed(DiffusionOptions, "noise_schedule", "cosine")


@dataclass
class PriorProcessOptions(DecoderProcessOptions):
    """diffusion process"""

    predict: str = changed(
        DiffusionOptions, "predict", "x0", "what the network predicts of an embedding; as for images, the clean one"
        " being that of unCLIP",
    )  # fmt: skip
    sigma_small: bool = changed(DiffusionOptions, "sigma_small", True)


# ---------------------------------------------------------------------------------------------------------- programs


@dataclass
class RunOptions:
    """run"""

    seed: int = option(0, "seed of everything random: the same seed and options give the same run")
    preset: str = option(
        "",
        "take the flags of a published model, but for those typed: of its network and its process; in sampling also its"
        " files, which are downloaded once, its steps and its scale of guidance; in training a cascade from text to"
        " image, those of a recipe",
        (*presets.PRESETS, *presets.RECIPES),
    )
    device: str = option("", "cpu, cuda, cuda:1, mps...; empty: a GPU if there is one")
    precision: str = option(
        "",
        "arithmetic in the bodies of the networks; their norms, embeddings, softmaxes and ends, and all checkpoints,"
        " are fp32 always; empty: as --use_fp16 and --classifier_use_fp16 say",
        ("", "fp32", "bf16", "fp16"),
    )
    log_dir: str = option("", "folder for everything written; empty: $OPENAI_LOGDIR, else a new temporary folder")
    log_formats: str = option(
        "",
        "where the log goes: stdout, log, csv, json, jsonl, tensorboard, wandb, with commas between; empty:"
        " $OPENAI_LOG_FORMAT, else stdout,log,csv",
    )


@dataclass
class _Training:
    data_dir: str = option("", "folder or file of training images")
    schedule_sampler: str = option(
        "uniform",
        "which timesteps to train on: all alike, or more where the loss is large, or normal in log sigma with mean -1.2"
        " and deviation 1.2 as EDM (a change of the objective: best with --loss_weight edm)",
        ("uniform", "loss-second-moment", "lognormal"),
    )
    lr: float = option(1e-4, "learning rate of AdamW")
    weight_decay: float = option(0.0, "weight decay of AdamW, on every parameter")
    beta2: float = option(0.999, "decay of AdamW's mean of squared gradients; 0.99 follows them faster")
    iterations: int = option(0, "stop after this many updates in all; 0: no such limit")
    batch_size: int = option(1, "images at once in each process")
    microbatch: int = option(
        -1,
        "images in memory at once, gradients averaged over the batch; -1: the whole batch, or what doctor.json in"
        " --log_dir remembers",
    )
    log_interval: int = option(10, "updates between two lines of the log")
    save_interval: int = option(10000, "updates between two checkpoints")
    resume_checkpoint: str = option(
        "", "modelNNNNNN.pt of another folder to go on from; its ema_*, opt* and state* are found beside it"
    )
    resume: str = option(
        "auto",
        "auto: the same command goes on from the newest whole checkpoint in --log_dir; never: start anew, in a folder"
        " without a run",
        ("auto", "never"),
    )
    force: bool = option(False, "go on from checkpoints though the seed or the data are not those they were made with")
    lr_schedule: str = option(
        "linear",
        "how the rate falls to --lr_min over the updates of annealing: linear, cosine, or constant until they are done",
        ("linear", "cosine", "constant"),
    )
    lr_min: float = option(0.0, "what the rate falls to instead of 0")
    lr_warmup: int = option(0, "let the rate rise linearly over the first so many updates")
    keep_last: int = option(0, "keep only so many of the newest checkpoints; 0: all")
    keep_every: int = option(0, "of the older ones, keep those whose update this divides; 0: none of them")
    keep_best: bool = option(False, "keep the checkpoint of the least validation loss as well")
    checkpoint_dir: str = option(
        "", "folder of the checkpoints and config.json, any path that blobfile writes, as gs://...; empty: --log_dir"
    )
    background_save: bool = option(True, "write checkpoints beside the next updates instead of waiting for the disk")
    max_minutes: float = option(
        0.0, "save and leave with exit code 75 after so many minutes, as for a queue's time slot; 0: no limit"
    )
    val_data_dir: str = option("", "folder or file of held-out images for validation; empty: none")
    eval_interval: int = option(100, "updates between two validations")
    grad_clip: float = option(0.0, "largest norm of the gradient, scaled down to it if larger; 0: no limit")
    sharding: str = option(
        "none",
        "none: each process holds the whole network; fsdp: each holds a part of it, for networks too large for one"
        " device (not with float16)",
        ("none", "fsdp"),
    )
    compile: bool = option(
        False,
        "run the networks' blocks through torch.compile, after minutes of compiling, each other batch size anew: the"
        " same numbers but for rounding; meant for GPUs, a CPU gains next to nothing",
    )
    channels_last: bool = option(
        False,
        "compute with the channels of a position side by side in memory, for the 16-bit convolutions of GPUs: the same"
        " numbers but for rounding, and the same files; a CPU gains next to nothing, or loses",
    )
    max_bad_steps: int = option(100, "stop after this many updates in a row whose loss or gradient is not finite")
    num_workers: int = option(1, "processes that load images; 0: the training process itself")
    random_flip: bool = option(True, "mirror half of the training images")
    random_crop: bool = option(False, "crop training images at random scale and place instead of the centre")
    skip_bad_images: bool = option(False, "pass over images that cannot be read, and count them, instead of stopping")
    label_from: str = option(
        "auto",
        "where a picture's class is written: in the start of its name up to the first _ (prefix), in its sub-folder, in"
        " labels.csv, in dataset.json, or auto: in one of those files if there, else by prefix if the names allow it,"
        " else by folder",
        ("auto", "prefix", "folder", "csv", "json"),
    )
    background: str = option(
        "white", "colour behind transparent pixels, as black or #ff8000; none: drop the alpha channel, whatever it hid"
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
class PictureOptions:
    """watching"""

    sample_interval: int = option(
        0, "updates between two pictures of samples, drawn with the first of the averaged weights; 0: none"
    )
    sample_steps: int = option(50, "steps of DDIM for these samples")


@dataclass
class WatchOptions(PictureOptions):
    """watching"""

    eval_every: int = option(
        0,
        "updates between two Frechet distances of such samples to the held-out images, or else the training images, in"
        " the log as fid; 0: none",
    )
    eval_samples: int = option(500, "samples, and at most as many images of the data, for --eval_every")
    eval_extractor: str = option(
        "inception", "whose features --eval_every compares: inception, or the checkpoint of a classifier of such images"
    )


@dataclass
class SuperResTrainOptions(TrainOptions):
    """training"""

    low_res_noise: float = option(
        0.0,
        "add noise to the small images, of a standard deviation drawn from 0 to this for each, pixels spanning -1 to 1:"
        " the network then forgives the faults of drawn images (conditioning augmentation); 0: none",
    )


@dataclass
class ClipTrainOptions(TrainOptions):
    """training"""

    crop_padding: int = option(0, "shift training pictures at random by up to so many pixels, black coming in")


@dataclass
class _OfClip:
    clip_path: str = option(
        "", "checkpoint of the CLIP whose embeddings count; empty: the one that the run to go on from was trained with"
    )


@dataclass
class PriorTrainOptions(_OfClip, TrainOptions):
    """training"""

    caption_dropout: float = option(0.1, "train without the caption this often, for --prior_scale")


@dataclass
class DecoderTrainOptions(_OfClip, TrainOptions):
    """training"""

    embedding_dropout: float = option(0.1, "train without the embedding of the picture this often, for guidance")
    caption_dropout: float = changed(
        PriorTrainOptions, "caption_dropout", 0.5, "train without the caption this often, independently"
    )


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
class _Sampling:
    model_path: str = option(
        "",
        "checkpoint of the diffusion model: a path, an address or a published name, as 64x64_diffusion; config.json"
        " beside it, its name or its tensors spare the network's flags (docs/checkpoints.md)",
    )
    num_samples: int = option(10000, "images to draw")
    batch_size: int = changed(
        _Training, "batch_size", 16, "images at once in each process; 0: as many as fit in memory, by trying, up to 256"
    )
    clip_denoised: bool = option(True, "clip each predicted clean image to the range of pixels")
    use_ddim: bool = option(False, "sample by DDIM instead of the ancestral DDPM")
    eta: float = option(0.0, "noise of DDIM, and of other samplers that have it: 0 none, 1 as much as DDPM")
    sampler: str = option("", "a sampler by name, as dpmpp_2m or heun; empty: DDPM, or DDIM with --use_ddim")
    steps: int = option(0, "steps that --sampler keeps, of those that --timestep_respacing leaves; 0: all")
    spacing: str = option("", "spacing of those steps: uniform, leading, trailing, quadratic, log_snr or karras")
    sampler_options: str = option(
        "", "numbers that the rule of --sampler takes, as gam=1.5,mu=0.2 or rtol=0.001 (docs/add_a_sampler.md)"
    )
    brownian: bool = option(
        False, "noise of one Brownian path a sample, the same for any number of steps, in place of fresh noise"
    )
    save_as: str = option(
        "npz", "files for the samples: npz; png, a folder of pictures named CLASS_NUMBER; zip, of the same; or several"
    )
    grid: bool = option(True, "also write a picture of the first samples")
    frames: int = option(
        0, "also write a strip and a film (GIF) of the first samples on their way, in so many frames; 0: none"
    )
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
    guidance_projected: float = option(
        1.0,
        "share, from 0 to 1, that is kept of what guidance adds along the conditional prediction, which saturates"
        " images (APG); 1: all",
    )
    dynamic_threshold: float = option(
        0.0,
        "quantile, as 0.995, of each predicted image's absolute values at which it is clipped and then scaled down to"
        " the range of pixels; 0: clip at that range",
    )
    reuse_every: int = option(
        1,
        "run the whole network at every so many steps only, as 3, and in between its first and last blocks, the deep"
        " features staying as they are (DeepCache): faster, and not the same images (docs/speed.md); 1: always whole",
    )
    compile: bool = changed(_Training, "compile", False)
    channels_last: bool = changed(_Training, "channels_last", False)
    reuse_depth: int = option(1, "how many blocks at either end of the network are run at each step by --reuse_every")


@dataclass
class SampleOptions(_Sampling):
    """sampling"""

    classes: str = option(
        "",
        "labels or class names to draw in turn, as 3,7; all: every class in turn; with numbers of images, as"
        " 3:100,7:50, so many of each, one after the other; empty: random",
    )
    prompts: tuple = option(
        (),
        "texts to draw in turn, each in quotes, from a model of captioned images; encoded as its captions were",
    )
    prompt_vectors: str = option(
        "",
        "npy file of vectors [P,D] to draw in turn, where the texts' vectors were computed elsewhere; as many --prompts"
        " name them",
    )


@dataclass
class SuperResSampleOptions(_Sampling):
    """sampling"""

    base_samples: str = option(
        "",
        "the images to enlarge: npz with arr_0 uint8 [N,h,w,C] of --small_size, and arr_1 their labels; or a folder of"
        " images, which are cropped and brought to that size",
    )
    num_samples: int = changed(
        _Sampling, "num_samples", 10000, "images to draw, of the base samples in their order; no more than there are"
    )
    repeat_base: bool = option(False, "begin again with the first base sample where --num_samples are more than those")
    classes: str = changed(
        SampleOptions, "classes", "", "labels or class names of the base samples in turn, as 3,7; empty: their own"
    )
    label_from: str = changed(_Training, "label_from", "auto")
    background: str = changed(_Training, "background", "white")
    low_res_noise: float = changed(
        SuperResTrainOptions,
        "low_res_noise",
        0.0,
        "standard deviation of the noise added to the base samples, of which pixels span -1 to 1",
    )


@dataclass
class TextToImageOptions(_Sampling):
    """sampling"""

    model_path: str = changed(_Sampling, "model_path", "", "checkpoint of the decoder (decoder_train.py)")
    prior_path: str = option(
        "", "checkpoint of the prior (prior_train.py); empty: the decoder is given the embeddings of texts themselves"
    )
    clip_path: str = changed(
        _OfClip, "clip_path", "", "checkpoint of the CLIP; empty: the one that the decoder was trained with"
    )
    super_res_path: str = option(
        "", "checkpoint of a super-resolution model (super_res_train.py), which enlarges what the decoder draws"
    )
    prompts: tuple = changed(
        SampleOptions, "prompts", (), "texts to draw in turn, each in quotes; an empty one: anything"
    )
    prompts_file: str = option("", "text file of prompts, one a line, in UTF-8, after those of --prompts")
    images: str = option(
        "",
        "folder or file of pictures to draw variations of, in turn, by their embeddings, instead of prompts",
    )
    interpolate: int = option(
        0, "draw so many pictures on the way from each prompt or picture to the next, both included; 0: none"
    )
    num_samples: int = changed(_Sampling, "num_samples", 16)
    guidance_scale: float = changed(
        _Sampling, "guidance_scale", 1.0, "classifier-free guidance of the decoder, away from its prediction without"
        " embedding and text; 1: none; other values need a decoder trained with --embedding_dropout"
    )  # fmt: skip
    guide_path: str = changed(_Sampling, "guide_path", "", "not for decoders: keep it empty")
    prior_scale: float = option(1.0, "classifier-free guidance of the prior; 1: none")
    prior_steps: int = option(64, "steps of the prior, or as many as it has; 0: all")
    prior_candidates: int = option(2, "embeddings drawn for each image, of which the one nearest to the text is kept")
    use_captions: bool = option(True, "show the decoder the text besides the embedding")
    force: bool = changed(_Training, "force", False, "take a CLIP other than the prior or the decoder was trained with")


@dataclass
class EvaluateOptions:
    """evaluation"""

    evaluate: str = option(
        "",
        "score the samples as they come, against this reference: an npz, a folder or zip of pictures, or the name of a"
        " published file; writes scores.json (docs/evaluation.md)",
    )
    extractor: str = option(
        "inception",
        "whose features --evaluate compares: inception, the path or published name of a classifier, or module:function",
    )
    weights: str = option("", "file of the weights of Inception; empty: $GD_INCEPTION_WEIGHTS, else the published file")
    save_samples: bool = option(True, "keep the samples and write them; without, --evaluate needs no room for them")


@dataclass
class ClassifierSampleOptions(SampleOptions):
    """sampling"""

    classifier_path: str = option(
        "", "checkpoint of the noise-aware classifier; of several, with commas between, the gradients are added"
    )
    classifier_scale: float = option(1.0, "strength of the classifier's guidance; 0: none")
    classifier_scale_end: str = option(
        "", "strength at the last step, reached from --classifier_scale in even changes; empty: the same"
    )
    classifier_marginal: float = option(
        1.0, "weight of the marginal density in log p(y|x) = log p(x,y) - log p(x); 0: only the joint density pulls"
    )
    classifier_normalize: float = option(
        0.0, "L2 norm that each image's gradient is given before --classifier_scale multiplies it; 0: as it comes"
    )
    classifier_interval: str = option(
        "", "noise levels sigma between which the classifier guides, as 0.2,5; empty: all"
    )
    classifier_every: int = option(
        1, "guide at every so many steps only, with so much less work; that times the scale keeps the strength"
    )
    guidance_at: str = option(
        "x_t",
        "where the classifier's gradient is taken: at the noisy image, as the published scales assume, or at the mean"
        " of the next one, as the derivation has it (ancestral sampling only)",
        ("x_t", "mean"),
    )


@dataclass
class _OfImages:
    model_path: str = changed(SampleOptions, "model_path", "")
    data_dir: str = changed(
        _Training, "data_dir", "", "folder or file of images, best such as the model was not trained on"
    )
    label_from: str = changed(_Training, "label_from", "auto")
    background: str = changed(_Training, "background", "white")
    classes: str = changed(
        SampleOptions, "classes", "", "labels or class names of the images in turn, as 3,7; empty: those of the data"
    )
    prompts: tuple = changed(SampleOptions, "prompts", ())
    prompt_vectors: str = changed(SampleOptions, "prompt_vectors", "")
    num_images: int = option(8, "how many of the images to take; --seed decides which")
    batch_size: int = changed(_Training, "batch_size", 64)
    sampler: str = changed(SampleOptions, "sampler", "ddpm")
    steps: int = changed(SampleOptions, "steps", 100)
    spacing: str = changed(SampleOptions, "spacing", "")


@dataclass
class InvertOptions(_OfImages):
    """inversion"""

    sampler: str = changed(
        SampleOptions, "sampler", "heun", "the sampler that is walked back and forth, one that adds no noise, as ddim"
    )
    latents: str = option("", "latents_*.npz of an earlier run, to be turned into images instead of --data_dir")
    max_sigma: float = option(
        80.0, "noise level where latents stand; further up, a network that predicts noise says nothing of the image"
    )
    interpolate: int = changed(
        TextToImageOptions, "interpolate", 0, "pictures between the latents of each image and the next; 0: none"
    )


@dataclass
class InpaintOptions(_OfImages):
    """restoration"""

    task: str = option(
        "inpaint", "what is measured: some pixels, means over blocks, or a blur", ("inpaint", "super_res", "blur")
    )
    mask: str = option(
        "half",
        "pixels unknown to inpaint: half (the lower), box (in the middle), random:0.5 (that share), or the file of a"
        " picture that is white where pixels are known",
    )
    factor: int = option(2, "side of the blocks of super_res, in pixels")
    blur_std: float = option(1.0, "standard deviation of the Gaussian of blur, in pixels")
    noise_std: float = option(0.0, "standard deviation of the measurement's noise; pixels span -1 to 1")
    method: str = option(
        "dps", "guidance by the gradient of the measurement, or resampling, for inpaint alone", ("dps", "repaint")
    )
    dps_scale: float = option(
        1.0,
        "strength of dps; 1: right for independent pixels of deviation --sigma_data; where they tell of one another, a"
        " smaller --sigma_data guides more, and does not overshoot as a larger scale does",
    )
    repaint_jump: int = option(10, "steps that repaint walks again")
    repaint_times: int = option(5, "times that it walks them")
    num_samples: int = changed(SampleOptions, "num_samples", 4, "restorations of each image")
    classifier_path: str = changed(
        ClassifierSampleOptions, "classifier_path", "", "checkpoint of a classifier of clean images, which says what is"
        " restored",
    )  # fmt: skip


@dataclass
class NLLOptions:
    """likelihood"""

    model_path: str = changed(SampleOptions, "model_path", "")
    data_dir: str = changed(
        _Training, "data_dir", "", "folder or file of images, best such as the model was not trained on"
    )
    label_from: str = changed(_Training, "label_from", "auto")
    background: str = changed(_Training, "background", "white")
    clip_denoised: bool = changed(SampleOptions, "clip_denoised", True)
    num_samples: int = changed(
        SampleOptions, "num_samples", 1000, "images to score, each once; no more than there are"
    )
    batch_size: int = changed(_Training, "batch_size", 1)
    num_workers: int = changed(_Training, "num_workers", 1)


@dataclass
class ReplayOptions:
    """replay"""

    log_dir: str = changed(RunOptions, "log_dir", "", "folder of the new run; empty: that of the old one with _replay")
    run: bool = option(True, "run the first command again, instead of only telling what it was")


@dataclass
class PosthocOptions:
    """averages put together afterwards"""

    sigma_rel: str = option(
        "", "widths of the averages wanted, relative to the length of training, as 0.08 or 0.05,0.1,0.15"
    )
    step: int = option(0, "the update at which they end; 0: the last one with snapshots")
    out: str = option("", "file to write, if one width is wanted; empty: ema_posthocWIDTH_NNNNNN.pt beside the others")


@dataclass
class ConvertOptions:
    """conversion"""

    preset: str = changed(
        RunOptions, "preset", "", "the source is the published model of that name, whatever its file is called"
    )


@dataclass
class DoctorOptions:
    """doctor"""

    kind: str = option("diffusion", "kind of the network to look at", ("diffusion", "classifier"))
    write: bool = option(False, "remember the microbatch that fits in doctor.json in --log_dir, for training there")


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


def add_flag(parser, name, default, help=None, choices=None, kind=None):
    """
    Add --NAME VALUE, of the type of its default (None counts as text; a bare boolean flag means True; a tuple takes
    one text or more) or as the function `kind` reads it, to an argparse parser. What was not typed is absent from the
    parsed namespace unless the parser fills it in.
    """
    kind = kind or {bool: str2bool, int: parse_int, float: parse_float}.get(type(default), str)
    several = isinstance(default, tuple)
    bare = {"nargs": "?", "const": True} if kind is str2bool else {"nargs": "+"} if several else {}
    metavar = None if choices else "STR" if default is None or several else type(default).__name__.upper()
    shown = f"{help or ''} (default: {default if str(default) else repr('')})".replace("%", "%%")
    parser.add_argument(f"--{name}", type=kind, choices=choices, metavar=metavar, help=shown, **bare)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one ValueError, not a page of usage."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def parse(description, *groups, argv=None, positional=None):
    """
    Parse the command line.

    :param description: one sentence for --help.
    :param groups: options dataclasses; a name in several groups is one flag.
    :param argv: list of words; None takes those of the process.
    :param positional: {name: help} of texts that are typed without a flag.
    :return: argparse.Namespace of every option, and `explicit`: the set of names that were typed.
    :raises ValueError: for an unknown flag (with the nearest names) or a value that cannot be read.
    """
    known = options(*groups)
    positional = positional or {}
    parser = _Parser(
        description=description,
        usage=" ".join(["%(prog)s", *map(str.upper, positional), "[--name value] ..."]),
        argument_default=argparse.SUPPRESS,
        epilog="GD_DEBUG=1 in the environment shows the traceback of an error.",
    )
    for name, help in positional.items():
        parser.add_argument(name, metavar=name.upper(), help=help)
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
    values = {name: field.default for name, field in known.items()} | from_preset(vars(typed), known) | vars(typed)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return argparse.Namespace(**values, explicit=set(vars(typed)) - set(positional))


def answer_help(module, description, *groups, positional=None):
    """
    Where a module named `module` is the program that runs, and --help was typed: answer it and end the process. For
    programs to call before they import what takes seconds. Of a command line with an error, `parse` tells in its turn.
    """
    with contextlib.suppress(ValueError):
        help_first(module, lambda: parse(description, *groups, positional=positional))


def help_first(module, parse):
    """`answer_help` for programs with an argparse parser of their own: parse() is what reads their command line."""
    if module == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
        parse()


def from_preset(typed, known):
    """{name: value} that the --preset among the typed flags gives a program of these flags; {} without one."""
    return presets.typed_for(typed["preset"], known) if typed.get("preset") else {}


def nearest(word, names):
    """'; did you mean a or b?' for the names most like the word, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def flags_of(args, *groups):
    """{name: value} of the options of the groups, for a builder or a config.json."""
    return {name: getattr(args, name) for name in options(*groups)}


def explicit_flags(args):
    """{name: value} of the options that were typed, and the steps to sample in that --preset has."""
    steps = {"timestep_respacing"} & from_preset(vars(args), vars(args)).keys()
    return {name: getattr(args, name) for name in args.explicit | steps}


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


def levels(channel_mult, image_size, super_res=False, film=False):
    """
    The width factors of the levels that --channel_mult and the image side give; ValueError as the two above.

    :param film: of the network film, which has the same default for every side.
    """
    default = (1, 2, 4, 8) if film else None
    return parse_channel_mult(channel_mult) or default or default_channel_mult(min(sides(image_size)), super_res)


def size_of(flags):
    """(height, width) in pixels of the images that a network of these flags makes or reads."""
    return sides(flags["large_size"] if "large_size" in flags else flags["image_size"])


def side_of(flags):
    """The shorter of the two sides of `size_of`."""
    return min(size_of(flags))


def check_watching(args):
    """Raise ValueError if WatchOptions, or PictureOptions, are out of range or contradict the other options."""
    for name, least in (("sample_interval", 0), ("eval_every", 0), ("eval_samples", 2), ("sample_steps", 1)):
        if getattr(args, name, least) < least:
            raise ValueError(f"--{name} must be {least} or more, not {getattr(args, name)}")
    if args.sharding != "none" and (args.sample_interval or getattr(args, "eval_every", 0)):
        raise ValueError("--sample_interval and --eval_every draw with a whole network: not with --sharding fsdp")


def precision_of(precision, use_fp16, name="use_fp16"):
    """
    fp32, bf16 or fp16, as --precision says or, where that is empty, the flag `name` of a network.

    :raises ValueError: if --precision fp32 or bf16 contradicts the flag.
    """
    if precision and use_fp16 and precision != "fp16":
        raise ValueError(f"--precision {precision} and --{name} True are two precisions: drop --{name}")
    return precision or ("fp16" if use_fp16 else "fp32")


def log_formats(args, main):
    """The names of log writers that --log_formats asks for on the main process, or None for the usual ones."""
    return args.log_formats.split(",") if args.log_formats and main else None


def check_counts(args, batch=1):
    """Raise ValueError unless there is an image to draw or score, and `batch` at a time at least."""
    for name, least in (("num_samples", 1), ("batch_size", batch)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be {least} or more, not {getattr(args, name)}")


def check_sides(flags):
    """Raise ValueError unless a super-resolution network of these flags has small images to enlarge."""
    small, large = flags["small_size"], flags["large_size"]
    if not 1 <= small < large:
        raise ValueError(f"--small_size {small} must be from 1 to below --large_size {large}")


def attention_downsampling(text, image_size):
    """
    Sides in pixels -> factors by which the features are smaller than the image: ('32,16,8', 64) -> (2, 4, 8).
    A side that no level of the network has counts for nothing, as in the original.
    """
    return tuple(min(sides(image_size)) // side for side in _numbers(text, parse_int, "attention_resolutions"))


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
    if args.reuse_every == 1 and args.reuse_depth != _Sampling.reuse_depth:
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


def classifier_scale_end(args):
    """--classifier_scale_end as a number; where it is empty, --classifier_scale. Raises ValueError for other text."""
    try:
        return parse_float(args.classifier_scale_end) if args.classifier_scale_end else args.classifier_scale
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--classifier_scale_end: {error}") from None


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


def parse_interval(text):
    """'0.2,5' -> (0.2, 5.0), '' -> (0, inf). Raises ValueError unless these are two numbers, the larger one last."""
    if not text:
        return 0.0, math.inf
    with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
        low, high = map(parse_float, text.split(","))
        if 0 <= low < high:
            return low, high
    raise ValueError(f"cannot read the interval {text!r}: give two noise levels, the larger one last, as 0.2,5")
