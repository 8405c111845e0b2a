"""The options of the programs that train, and of those that prepare a training or use what it left behind."""

from dataclasses import dataclass

from .config import changed, option


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
class PosthocOptions:
    """averages put together afterwards"""

    sigma_rel: str = option(
        "", "widths of the averages wanted, relative to the length of training, as 0.08 or 0.05,0.1,0.15"
    )
    step: int = option(0, "the update at which they end; 0: the last one with snapshots")
    out: str = option("", "file to write, if one width is wanted; empty: ema_posthocWIDTH_NNNNNN.pt beside the others")


@dataclass
class DoctorOptions:
    """doctor"""

    kind: str = option("diffusion", "kind of the network to look at", ("diffusion", "classifier"))
    write: bool = option(False, "remember the microbatch that fits in doctor.json in --log_dir, for training there")
