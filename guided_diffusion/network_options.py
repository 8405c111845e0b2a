"""The options of the networks and of the process that they undo. A new option of a network is one more field here."""

from dataclasses import dataclass

from .config import changed, option
from .sizes import parse_size


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
