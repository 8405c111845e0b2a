"""The options of the programs that draw images, change them, or tell how likely they are."""

from dataclasses import dataclass

from .config import changed, option
from .training_options import PriorTrainOptions, SuperResTrainOptions, TrainOptions


@dataclass
class _Sampling:
    model_path: str = option(
        "",
        "checkpoint of the diffusion model: a path, an address or a published name, as 64x64_diffusion; config.json"
        " beside it, its name or its tensors spare the network's flags (docs/checkpoints.md)",
    )
    num_samples: int = option(10000, "images to draw")
    batch_size: int = changed(
        TrainOptions,
        "batch_size",
        16,
        "images at once in each process; 0: as many as fit in memory, by trying, up to 256",
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
    compile: bool = changed(TrainOptions, "compile", False)
    channels_last: bool = changed(TrainOptions, "channels_last", False)
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
    label_from: str = changed(TrainOptions, "label_from", "auto")
    background: str = changed(TrainOptions, "background", "white")
    low_res_noise: float = changed(
        SuperResTrainOptions,
        "low_res_noise",
        0.0,
        "standard deviation of the noise added to the base samples, of which pixels span -1 to 1",
    )


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
class TextToImageOptions(_Sampling):
    """sampling"""

    model_path: str = changed(_Sampling, "model_path", "", "checkpoint of the decoder (decoder_train.py)")
    prior_path: str = option(
        "", "checkpoint of the prior (prior_train.py); empty: the decoder is given the embeddings of texts themselves"
    )
    clip_path: str = changed(
        PriorTrainOptions, "clip_path", "", "checkpoint of the CLIP; empty: the one that the decoder was trained with"
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
    force: bool = changed(
        TrainOptions, "force", False, "take a CLIP other than the prior or the decoder was trained with"
    )


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
class _OfImages:
    model_path: str = changed(SampleOptions, "model_path", "")
    data_dir: str = changed(
        TrainOptions, "data_dir", "", "folder or file of images, best such as the model was not trained on"
    )
    label_from: str = changed(TrainOptions, "label_from", "auto")
    background: str = changed(TrainOptions, "background", "white")
    classes: str = changed(
        SampleOptions, "classes", "", "labels or class names of the images in turn, as 3,7; empty: those of the data"
    )
    prompts: tuple = changed(SampleOptions, "prompts", ())
    prompt_vectors: str = changed(SampleOptions, "prompt_vectors", "")
    num_images: int = option(8, "how many of the images to take; --seed decides which")
    batch_size: int = changed(TrainOptions, "batch_size", 64)
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
        TrainOptions, "data_dir", "", "folder or file of images, best such as the model was not trained on"
    )
    label_from: str = changed(TrainOptions, "label_from", "auto")
    background: str = changed(TrainOptions, "background", "white")
    clip_denoised: bool = changed(SampleOptions, "clip_denoised", True)
    num_samples: int = changed(
        SampleOptions, "num_samples", 1000, "images to score, each once; no more than there are"
    )
    batch_size: int = changed(TrainOptions, "batch_size", 1)
    num_workers: int = changed(TrainOptions, "num_workers", 1)
