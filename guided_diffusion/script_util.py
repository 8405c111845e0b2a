"""From options to objects: networks and processes from flags, and from a checkpoint's path alone."""

import functools
import inspect

import torch

from . import checkpoint, checks, config, published, recognition, saves, sizes
from .config import str2bool
from .film_unet import Unet as FilmUnet
from .fp16_util import PRECISIONS
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .identify import identify
from .network_options import ClassifierOptions, DiffusionOptions, ModelOptions, SuperResOptions
from .respace import SpacedDiffusion, space_timesteps
from .schedules import unknown
from .unet import EncoderUNetModel, SuperResModel, UNetModel

__all__ = [
    "NUM_CLASSES",
    "add_dict_to_argparser",
    "args_to_dict",
    "classifier_and_diffusion_defaults",
    "classifier_defaults",
    "create_classifier",
    "create_classifier_and_diffusion",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "diffusion_defaults",
    "model_and_diffusion_defaults",
    "open_classifier",
    "open_diffusion",
    "open_super_res",
    "sr_create_model",
    "sr_create_model_and_diffusion",
    "sr_model_and_diffusion_defaults",
    "str2bool",
]

NUM_CLASSES = ModelOptions.num_classes

# The order of the original's positional parameters. Options that the original lacks follow by keyword.
MODEL_ORDER = (
    "image_size class_cond learn_sigma num_channels num_res_blocks channel_mult num_heads num_head_channels"
    " num_heads_upsample attention_resolutions dropout diffusion_steps noise_schedule timestep_respacing use_kl"
    " predict_xstart rescale_timesteps rescale_learned_sigmas use_checkpoint use_scale_shift_norm resblock_updown"
    " use_fp16 use_new_attention_order"
)
SUPER_RES_ORDER = (
    MODEL_ORDER.replace("image_size", "large_size small_size")
    .replace(" channel_mult", "")
    .replace(" use_new_attention_order", "")
)
PROCESS_ORDER = (
    "learn_sigma diffusion_steps noise_schedule timestep_respacing use_kl predict_xstart rescale_timesteps"
    " rescale_learned_sigmas"
)

PREDICT = {
    "eps": ModelMeanType.EPSILON,
    "x0": ModelMeanType.START_X,
    "v": ModelMeanType.VELOCITY,
    "previous_x": ModelMeanType.PREVIOUS_X,
    "edm": ModelMeanType.EDM,
}

VARIANCES = {"range": ModelVarType.LEARNED_RANGE, "free": ModelVarType.LEARNED}

# ------------------------------------------------------------------------------------------------ defaults and flags


def diffusion_defaults():
    """{name: default} of the options of the process."""
    return config.defaults(DiffusionOptions)


def classifier_defaults():
    """{name: default} of the options of the classifier."""
    return config.defaults(ClassifierOptions)


def model_and_diffusion_defaults():
    """{name: default} of the options of the network and the process."""
    return config.defaults(ModelOptions, DiffusionOptions)


def classifier_and_diffusion_defaults():
    """{name: default} of the options of the classifier and the process."""
    return config.defaults(ClassifierOptions, DiffusionOptions)


def sr_model_and_diffusion_defaults():
    """{name: default} of the options of the super-resolution network and the process."""
    return config.defaults(SuperResOptions, DiffusionOptions)


def add_dict_to_argparser(parser, default_dict):
    """Add a flag for each {name: default}, of the type of its default, to an argparse parser."""
    for name, default in default_dict.items():
        config.add_flag(parser, name, default)
    parser.set_defaults(**default_dict)


def args_to_dict(args, keys):
    """{key: args.key}."""
    return {key: getattr(args, key) for key in keys}


# ---------------------------------------------------------------------------------------------------------- networks


def create_model(image_size, num_channels, num_res_blocks, channel_mult="", learn_sigma=False, class_cond=False,
                 use_checkpoint=False, attention_resolutions="16", num_heads=1, num_head_channels=-1,
                 num_heads_upsample=-1, use_scale_shift_norm=False, dropout=0, resblock_updown=False, use_fp16=False,
                 use_new_attention_order=False, image_channels=3, num_classes=NUM_CLASSES, class_dropout=0.0,
                 network="adm", vector_channels=0, conv_resample=True, checkpoint_levels=0, residual_rescale=False):
    """
    The UNetModel, or for network "film" the film_unet.Unet, that the options of the same names describe (see
    network_options.ModelOptions).

    With class_dropout, label_emb has a last row more, for the label num_classes: the null class.

    Raises ValueError if the network is unknown, if the image size, the widths or the heads do not divide as it needs,
    if it cannot do what is asked of it, or if class_dropout is no probability below 1 or has nothing to drop.
    """
    flags = dict(locals())
    if network not in NETWORKS:
        raise ValueError(unknown("network", network, NETWORKS))
    if vector_channels < 0:
        raise ValueError(f"--vector_channels is the width of the vectors, or 0 for none, not {vector_channels}")
    return NETWORKS[flags.pop("network")](**flags)


def sr_create_model(large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
                    attention_resolutions, num_heads, num_head_channels, num_heads_upsample, use_scale_shift_norm,
                    dropout, resblock_updown, use_fp16, channel_mult="", use_new_attention_order=False,
                    image_channels=3, num_classes=NUM_CLASSES, class_dropout=0.0, conv_resample=True,
                    checkpoint_levels=0, residual_rescale=False):
    """The SuperResModel for images of large_size; as the network takes any low_res, small_size changes nothing."""
    flags = dict(locals())
    del flags["small_size"]
    return _unet(SuperResModel, image_size=flags.pop("large_size"), **flags)


def _unet(network, *, image_size, num_channels, channel_mult, learn_sigma, class_cond, attention_resolutions,
          image_channels, num_classes, class_dropout, vector_channels=0, **same_name):
    null = checks.nulls({"class_cond": class_cond, "num_classes": num_classes, "class_dropout": class_dropout,
                         "vector_channels": vector_channels})  # fmt: skip
    return network(
        image_size=_as_built(image_size),
        in_channels=image_channels,
        model_channels=num_channels,
        out_channels=image_channels * (2 if learn_sigma else 1),
        attention_resolutions=sizes.attention_downsampling(attention_resolutions, image_size),
        channel_mult=sizes.levels(channel_mult, image_size, super_res=network is SuperResModel),
        num_classes=(num_classes + ("y" in null)) if class_cond else None,
        vector_channels=vector_channels or None,
        **same_name,
    )


def _film(*, image_size, num_channels, channel_mult, learn_sigma, image_channels, dropout, vector_channels, **flags):
    checks.nulls(flags | {"vector_channels": vector_channels})
    if flags["class_cond"]:
        raise ValueError(
            "--network film takes no labels (--class_cond True): give it vectors, by --vector_channels, or take"
            " --network adm"
        )
    model = FilmUnet(
        num_channels,
        vector_channels,
        sizes.levels(channel_mult, image_size, film=True),
        image_channels,
        flags["class_dropout"],
        dropout=dropout,
        learn_sigma=learn_sigma,
    )
    model.check_size(*sizes.sides(image_size))
    return model


def _as_built(image_size):
    """What the networks take for an --image_size: a side, or (height, width)."""
    return sizes.sides(image_size) if isinstance(image_size, str) else image_size


NETWORKS = {"adm": functools.partial(_unet, UNetModel), "film": _film}


def create_classifier(image_size, classifier_use_fp16, classifier_width, classifier_depth,
                      classifier_attention_resolutions, classifier_use_scale_shift_norm, classifier_resblock_updown,
                      classifier_pool, classifier_channel_mult="", classifier_num_head_channels=64,
                      classifier_dropout=0.0, image_channels=3, num_classes=NUM_CLASSES,
                      classifier_residual_rescale=False):
    """
    The EncoderUNetModel that the options of the same names describe (see network_options.ClassifierOptions).

    Raises ValueError if the image size, the widths or the heads do not divide as the network needs.
    """
    return EncoderUNetModel(
        image_size=_as_built(image_size),
        in_channels=image_channels,
        model_channels=classifier_width,
        out_channels=num_classes,
        num_res_blocks=classifier_depth,
        attention_resolutions=sizes.attention_downsampling(classifier_attention_resolutions, image_size),
        dropout=classifier_dropout,
        channel_mult=sizes.levels(classifier_channel_mult, image_size),
        use_fp16=classifier_use_fp16,
        num_head_channels=classifier_num_head_channels,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
        residual_rescale=classifier_residual_rescale,
    )


def create_gaussian_diffusion(*, steps=1000, learn_sigma=False, sigma_small=False, noise_schedule="linear",
                              use_kl=False, predict_xstart=False, rescale_timesteps=False,
                              rescale_learned_sigmas=False, timestep_respacing="", predict="", loss_weight="unit",
                              sigma_data=DiffusionOptions.sigma_data, learned_variance="range"):
    """
    The SpacedDiffusion that the options of the same names describe (see network_options.DiffusionOptions).

    :param sigma_small: without learn_sigma, the posterior's variance instead of beta.
    :raises ValueError: for too few steps, a respacing that cannot be, an unknown prediction or weight, or a prediction
        that contradicts predict_xstart or does not suit the schedule.
    :raises NotImplementedError: for an unknown schedule.
    """
    if steps < 1:
        raise ValueError(f"a process needs at least one step, not --diffusion_steps {steps}")
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    if learn_sigma:
        var_type = VARIANCES[learned_variance]
    else:
        var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=_mean_type(predict, predict_xstart),
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        loss_weight=loss_weight,
        sigma_data=sigma_data,
    )


def _mean_type(predict, predict_xstart):
    if predict and predict not in PREDICT:
        raise ValueError(unknown("prediction", predict, PREDICT))
    if predict_xstart and predict not in ("", "x0"):
        raise ValueError(f"--predict_xstart True means --predict x0, but --predict is {predict}: drop one of them")
    return PREDICT[predict or ("x0" if predict_xstart else "eps")]


# ------------------------------------------------------------------------------------------- a network and a process


def _builder(order, *groups):
    """
    Give a function of one dict of flags the signature of the original's builders: the names in the text `order`
    required, every other option of the groups a keyword with its default. TypeError names what is missing or unknown.
    """
    order = order.split()
    extra = {name: default for name, default in config.defaults(*groups).items() if name not in order}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(name, kind) for name in order]
        + [inspect.Parameter(name, kind, default=default) for name, default in extra.items()]
    )

    def decorate(function):
        @functools.wraps(function)
        def build(*args, **kwargs):
            names = list(signature.parameters)
            for name in kwargs:
                if name not in names:
                    raise TypeError(f"{function.__name__}: unknown option {name}{config.nearest(name, names)}")
            missing = [name for name in order[len(args) :] if name not in kwargs]
            if missing:
                raise TypeError(f"{function.__name__}: missing options {', '.join(missing)}")
            return function(extra | signature.bind(*args, **kwargs).arguments)

        build.__signature__ = signature
        return build

    return decorate


def _call(function, flags):
    """Call a function with those of the flags that it takes."""
    return function(**{name: flags[name] for name in inspect.signature(function).parameters if name in flags})


def process_of(flags):
    """The SpacedDiffusion of {name: value} of all options of the process."""
    if flags["learn_sigma"] and flags["sigma_small"]:
        raise ValueError("--sigma_small True: the model has a variance of its own (learn_sigma True): drop the flag")
    if flags["learned_variance"] != "range" and not flags["learn_sigma"]:
        raise ValueError("--learned_variance free has no effect without --learn_sigma True: give both or neither")
    return _call(create_gaussian_diffusion, flags | {"steps": flags["diffusion_steps"]})


@_builder(MODEL_ORDER, ModelOptions, DiffusionOptions)
def create_model_and_diffusion(flags):
    """(UNetModel, SpacedDiffusion) from all options of ModelOptions and DiffusionOptions."""
    return _call(create_model, flags), process_of(flags)


@_builder(SUPER_RES_ORDER, SuperResOptions, DiffusionOptions)
def sr_create_model_and_diffusion(flags):
    """(SuperResModel, SpacedDiffusion) from all options of SuperResOptions and DiffusionOptions."""
    return _call(sr_create_model, flags), process_of(flags)


def _required(function):
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty]


@_builder(" ".join([*_required(create_classifier), PROCESS_ORDER]), ClassifierOptions, DiffusionOptions)
def create_classifier_and_diffusion(flags):
    """
    (EncoderUNetModel, SpacedDiffusion) from all options of ClassifierOptions and DiffusionOptions. What is predicted
    does not matter to a classifier, so a process that ends in pure noise, from which noise cannot be, has another.
    """
    if "zero_snr" in flags["noise_schedule"] and not (flags["predict"] or flags["predict_xstart"]):
        flags = flags | {"predict": "x0"}
    return _call(create_classifier, flags), process_of(flags)


def build(kind, flags):
    """The network of a kind, as config.json names it, from {name: value} of all its options."""
    create = {"diffusion": create_model, "super_res": sr_create_model, "classifier": create_classifier}[kind]
    return _call(create, flags)


# ----------------------------------------------------------------------------------------------- a checkpoint's path


def open_diffusion(path, explicit_flags=None, device="cpu"):
    """
    The diffusion model of a checkpoint and its process.

    :param path: a file, as modelNNNNNN.pt or ema_*.pt or NAME.safetensors, or the name of a published model, which is
        downloaded once (see `published`). Who tells its options: see `identify`.
    :param explicit_flags: {name: value} that win; `preset` names one whose flags come next; names that are no options
        of the model or the process are passed over.
    :param device: where the network shall live. On a CPU it is float32 unless use_fp16 is explicit.
    :return: (network in evaluation mode, SpacedDiffusion, {name: value} of every option of both).
    :raises ValueError: if the file, its config.json, the flags and the weights do not agree, or leave options open.
    """
    network, flags = open_network(path, "diffusion", "use_fp16", explicit_flags or {}, device)
    return network, process_of(flags), flags


def open_super_res(path, explicit_flags=None, device="cpu"):
    """The super-resolution model of a checkpoint and its process: all as open_diffusion."""
    network, flags = open_network(path, "super_res", "use_fp16", explicit_flags or {}, device)
    return network, process_of(flags), flags


def open_classifier(path, explicit_flags=None, device="cpu"):
    """
    The classifier of a checkpoint: (network in evaluation mode, {name: value}); all as open_diffusion. The flags of
    the process it was trained on are among those returned as far as somebody tells them.
    """
    return open_network(path, "classifier", "classifier_use_fp16", explicit_flags or {}, device)


def open_network(path, kind, fp16, explicit, device, build=build):
    """
    The network of a checkpoint of this kind and its flags, as `open_diffusion` and its like.

    :param fp16: the name of its flag for half precision, or "" if it has none.
    :param build: `(kind, flags) -> network`.
    """
    path = published.locate(path)
    saves.check_file(path)
    place = torch.device(device).type
    state = checkpoint.load(path, "meta" if place == "meta" else "cpu")
    flags = identify(path, kind, state, explicit, explicit.get("preset", ""))
    typed = explicit.get("precision", "")
    if fp16 and fp16 not in explicit and (typed or place == "cpu"):  # what is typed wins over what it was trained in
        flags[fp16] = False
    precision = checks.precision_of(typed, flags[fp16], fp16) if fp16 else "fp32"
    with torch.device("meta"):  # nothing is drawn that the file is to replace
        network = build(kind, flags)
    recognition.load_weights(network, state, path=path, flags=flags)
    network.to(device)
    if precision != "fp32":
        network.convert_to(PRECISIONS[precision])
    return network.eval(), flags
