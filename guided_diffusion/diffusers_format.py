"""
The names that Hugging Face diffusers gives the same U-Net (its UNet2DModel) and the same process (its schedulers).

A diffusion network of ours is a UNet2DModel where both have what it takes: `unet_config` and `scheduler_config` say
what diffusers' json files hold, or why there is none; `flags_of` reads such files; `renamed` pairs the tensors. Their
attention keeps q, k and v in three matrices where ours keeps one, in either of two orders of its rows; their embedding
of time may put the sines first.
"""

import torch

from . import config, recognition, sizes
from .network_options import DiffusionOptions, ModelOptions
from .schedules import get_named_beta_schedule

UNET, SCHEDULER, WEIGHTS = "UNet2DModel", "DDPMScheduler", "diffusion_pytorch_model.safetensors"
PRIVATE = "_guided_diffusion"  # a key that diffusers passes over: what its own fields cannot say

# Fields of a UNet2DModel of which our network has one value; and their default where a config.json lacks them.
FIXED = {
    "center_input_sample": (False,), "time_embedding_type": ("positional",), "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2D",), "mid_block_scale_factor": (1,), "downsample_padding": (1,),
    "act_fn": ("silu", "swish"), "norm_num_groups": (32,), "norm_eps": (1e-5,), "add_attention": (True,),
    "class_embed_type": (None,), "resnet_time_scale_shift": ("default", "scale_shift"),
}  # fmt: skip
DEFAULTS = {name: values[0] for name, values in FIXED.items()} | {
    "flip_sin_to_cos": True, "time_embedding_dim": None, "attn_norm_num_groups": None, "num_class_embeds": None,
    "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "attention_head_dim": 8, "in_channels": 3,
    "out_channels": 3, "layers_per_block": 2, "sample_size": None,
}  # fmt: skip
# (attention, residual blocks resample): types of the blocks downward and upward.
BLOCKS = {
    (False, False): ("DownBlock2D", "UpBlock2D"),
    (False, True): ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    (True, False): ("AttnDownBlock2D", "AttnUpBlock2D"),
    (True, True): ("AttnDownBlock2D", "AttnUpBlock2D"),
}
PREDICT = {"": "epsilon", "eps": "epsilon", "x0": "sample", "v": "v_prediction"}
RES_BLOCK = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"norm": "group_norm", "qkv": "", "proj_out": "to_out.0"}
QKV = ("to_q", "to_k", "to_v")
RESAMPLE = {False: "conv", True: "resnet"}
# What the fields there cannot say, and nothing but training, or a name, depends on.
KEPT = ("class_dropout", "use_kl", "rescale_learned_sigmas", "loss_weight", "sigma_data", "noise_schedule")


# ------------------------------------------------------------------------------------------------------------ configs


def unet_config(flags, attention):
    """
    config.json of the UNet2DModel of these flags.

    :param attention: the downsampling factors that have attention, as `recognition.infer_flags` tells them.
    :raises ValueError: naming the option that no UNet2DModel has.
    """
    mult = sizes.levels(flags["channel_mult"], flags["image_size"])
    widths = [int(factor * flags["num_channels"]) for factor in mult]
    refused = {
        "network": flags["network"] != "adm",
        "image_size": isinstance(flags["image_size"], str),  # a rectangle
        "vector_channels": flags["vector_channels"] > 0,
        "conv_resample": not flags["conv_resample"] and not flags["resblock_updown"] and len(widths) > 1,
        "residual_rescale": flags["residual_rescale"],
        "learned_variance": flags["learned_variance"] != "range",
        "channel_mult": mult[0] != 1,  # the embedding of time there has the width of the first level
        "num_heads_upsample": flags["num_head_channels"] == -1 and flags["num_heads_upsample"] not in
        (-1, flags["num_heads"]),
    }  # fmt: skip
    for name in (name for name in refused if refused[name]):
        raise ValueError(f"no {UNET} is as this network: --{name} {flags[name]} has nothing like it there")
    attentive = [2**level in attention for level in range(len(widths))]
    down, up = zip(*(BLOCKS[has, flags["resblock_updown"]] for has in attentive))
    resample = RESAMPLE[flags["resblock_updown"]]
    return {
        "_class_name": UNET,
        **DEFAULTS,
        "sample_size": flags["image_size"],
        "in_channels": flags["image_channels"],
        "out_channels": flags["image_channels"] * (1 + flags["learn_sigma"]),
        "layers_per_block": flags["num_res_blocks"],
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": flags["dropout"],
        "attention_head_dim": _head_dim(flags, {w for w, has in zip(widths, attentive) if has} | {widths[-1]}),
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if flags["use_scale_shift_norm"] else "default",
        "num_class_embeds": flags["num_classes"] + (flags["class_dropout"] > 0) if flags["class_cond"] else None,
        PRIVATE: {name: flags[name] for name in KEPT},
    }


def _head_dim(flags, widths):
    """Channels of a head; None: one head at each width."""
    if flags["num_head_channels"] != -1:
        return flags["num_head_channels"]
    if flags["num_heads"] == 1:
        return None
    if len(widths) > 1:
        raise ValueError(
            f"no {UNET} is as this network: it has {flags['num_heads']} heads at the widths"
            f" {', '.join(map(str, sorted(widths)))}, and there heads have one number of channels at all widths"
        )
    return min(widths) // flags["num_heads"]


def scheduler_config(flags):
    """scheduler_config.json of the process of these flags. Raises ValueError naming the option that none has."""
    predict = flags["predict"] or ("x0" if flags["predict_xstart"] else "eps")
    steps, schedule = flags["diffusion_steps"], flags["noise_schedule"]
    if predict not in PREDICT:
        raise ValueError(f"no scheduler of diffusers takes a network that predicts {predict} (--predict)")
    if flags["rescale_timesteps"] and steps != 1000:
        raise ValueError(f"no scheduler of diffusers tells time as --rescale_timesteps True with {steps} steps")
    fixed = "fixed_small" if flags["sigma_small"] else "fixed_large"
    found = {
        "_class_name": SCHEDULER,
        "num_train_timesteps": steps,
        "prediction_type": PREDICT[predict],
        "variance_type": "learned_range" if flags["learn_sigma"] else fixed,
        "clip_sample": True,
        "clip_sample_range": 1.0,
    }
    if schedule == "linear":
        return found | {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
    if schedule == "cosine":
        return found | {"beta_schedule": "squaredcos_cap_v2"}
    return found | {"trained_betas": get_named_beta_schedule(schedule, steps).tolist()}


def flags_of(unet, scheduler, path):
    """
    The flags of a UNet2DModel and its scheduler, from their json files.

    :param scheduler: content of scheduler_config.json, or None: then the process is not told.
    :param path: what to call them in errors.
    :return: ({name: value} of what they tell, whether the sines of time come first).
    :raises ValueError: naming the field that no network or process here has.
    """
    if not isinstance(unet, dict) or unet.get("_class_name") != UNET:
        raise ValueError(f"{path} describes no {UNET}: no other network of diffusers can be converted")
    unet = DEFAULTS | {name: value for name, value in unet.items() if not (value is None and name in FIXED)}
    defaults, kept = config.defaults(ModelOptions, DiffusionOptions), unet.get(PRIVATE)
    kept = {name: kept[name] for name in KEPT if type(kept.get(name)) is type(defaults[name])} if kept else {}
    try:
        told = _network_flags(unet, path)
        if scheduler:
            told |= _process_flags(scheduler, kept.pop("noise_schedule", ""), path)
            told["sigma_small"] &= not told["learn_sigma"]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no whole configuration (missing or of another kind: {error})") from error
    if kept.get("class_dropout") and told["class_cond"]:
        told["num_classes"] -= 1
    return told | kept, not unet["flip_sin_to_cos"]


def _refuse(path, name, value):
    raise ValueError(f"{path}: {name} {value!r} is nothing that a network or process here can be")


def _network_flags(unet, path):
    widths, size, heads = unet["block_out_channels"], unet["sample_size"], unet["attention_head_dim"]
    channels, given, classes = unet["in_channels"], unet["out_channels"], unet["num_class_embeds"]
    shift = unet["resnet_time_scale_shift"] == "scale_shift"
    allowed = FIXED | {
        # Without shift the middle's attention has the groups of the blocks, with it none unless told.
        "attn_norm_num_groups": (32,) if shift else (32, None),
        "time_embedding_dim": (None, 4 * widths[0]),
        "out_channels": (channels, 2 * channels),
    }
    for name, values in allowed.items():
        if unet[name] not in values:
            _refuse(path, name, unet[name])
    for name in ("sample_size", "in_channels", "layers_per_block"):
        if type(unet[name]) is not int or unet[name] < 1:
            _refuse(path, name, unet[name])
    attentive, updown = _levels(unet, path)
    if len(attentive) != len(widths):
        _refuse(path, "block_out_channels", widths)
    told = {
        "network": "adm",
        "image_size": size,
        "image_channels": channels,
        "learn_sigma": given == 2 * channels,
        "num_channels": widths[0],
        "channel_mult": ",".join(recognition.factor(width, widths[0]) for width in widths),
        "num_res_blocks": unet["layers_per_block"],
        "attention_resolutions": ",".join(str(size // 2**level) for level, has in enumerate(attentive) if has),
        "dropout": float(unet["dropout"]),
        "class_cond": classes is not None,
        "resblock_updown": updown,
        "use_scale_shift_norm": shift,
    }
    told |= {} if classes is None else {"num_classes": classes}
    return told | ({"num_heads": 1} if heads is None else {"num_head_channels": heads})


def _levels(unet, path):
    """([whether each level has attention], whether residual blocks resample)."""
    found = []
    for down, up in zip(unet["down_block_types"], reversed(unet["up_block_types"])):
        for (has, updown), types in BLOCKS.items():
            named = {unet["downsample_type"], unet["upsample_type"]} if has else {RESAMPLE[updown]}
            last = len(found) + 1 == len(unet["up_block_types"])
            if (down, up) == types and (last or named == {RESAMPLE[updown]}):
                found.append((has, updown))
                break
        else:
            _refuse(path, "the types of blocks and of resampling", f"{down} and {up}")
    ways = {updown for _, updown in found[:-1]}  # the last level does not resample
    if len(ways) > 1:
        _refuse(path, "down_block_types", unet["down_block_types"])
    return [has for has, _ in found], ways == {True}


def _process_flags(scheduler, schedule, path):
    """:param schedule: the name that was kept, believed only if it gives the betas that are told in full."""
    steps, variance = scheduler["num_train_timesteps"], scheduler.get("variance_type", "fixed_small")
    prediction, betas = scheduler.get("prediction_type", "epsilon"), scheduler.get("trained_betas")
    kinds = {"epsilon": "", "sample": "x0", "v_prediction": "v"}
    variances = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range")
    for name, value, values in (("prediction_type", prediction, kinds), ("variance_type", variance, variances)):
        if value not in values:
            _refuse(path, name, value)
    told = {
        "diffusion_steps": steps,
        "predict": kinds[prediction],
        "sigma_small": variance.startswith("fixed_small"),
        "rescale_timesteps": False,
    }
    if betas is not None:
        own = get_named_beta_schedule(schedule, steps).tolist() if schedule else None
        return told | ({"noise_schedule": schedule} if own == betas else {})
    kind = scheduler.get("beta_schedule", "linear")
    ends = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    if kind == "linear" and all(abs(end * steps / usual - 1) < 1e-6 for end, usual in zip(ends, (0.1, 20))):
        return told | {"noise_schedule": "linear"}
    if kind == "squaredcos_cap_v2":
        return told | {"noise_schedule": "cosine"}
    return _refuse(path, "beta_schedule", f"{kind} from {ends[0]} to {ends[1]}")


# ----------------------------------------------------------------------------------------------------------- tensors


def renamed(flags, attention):
    """
    Pairs (our name, its name there) of all modules that hold tensors; of attention the two without those of q, k, v.

    :param flags: of the network, widths in `channel_mult`.
    :param attention: as `unet_config`.
    """
    levels = len(sizes.levels(flags["channel_mult"], flags["image_size"]))
    blocks, updown = flags["num_res_blocks"], flags["resblock_updown"]
    pairs = [("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
             ("label_emb", "class_embedding"), ("input_blocks.0.0", "conv_in")]  # fmt: skip

    def stage(ours, side, number):
        """A residual block and, if the level has attention, that."""
        pairs.extend(_res_block(f"{ours}.0", f"{side}.resnets.{number}"))
        if 2**level in attention:
            pairs.extend(_attention(f"{ours}.1", f"{side}.attentions.{number}"))

    index = 0
    for level in range(levels):
        side = f"down_blocks.{level}"
        for number in range(blocks):
            index += 1
            stage(f"input_blocks.{index}", side, number)
        if level < levels - 1:
            index += 1
            ours, theirs = f"input_blocks.{index}.0", f"{side}.downsamplers.0"
            pairs.extend(_res_block(ours, theirs) if updown else [(f"{ours}.op", f"{theirs}.conv")])
    pairs.extend(_res_block("middle_block.0", "mid_block.resnets.0"))
    pairs.extend(_attention("middle_block.1", "mid_block.attentions.0"))
    pairs.extend(_res_block("middle_block.2", "mid_block.resnets.1"))
    index = -1
    for level in reversed(range(levels)):
        side = f"up_blocks.{levels - 1 - level}"
        for number in range(blocks + 1):
            index += 1
            stage(f"output_blocks.{index}", side, number)
        if level:
            ours, theirs = f"output_blocks.{index}.{1 + (2**level in attention)}", f"{side}.upsamplers.0"
            pairs.extend(_res_block(ours, theirs) if updown else [(f"{ours}.conv", f"{theirs}.conv")])
    return [*pairs, ("out.0", "conv_norm_out"), ("out.2", "conv_out")]


def _res_block(ours, theirs):
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in RES_BLOCK.items()]


def _attention(ours, theirs):
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in ATTENTION.items()]


def exported(state, flags, attention):
    """{name: tensor} of the UNet2DModel that computes what the network of this state dict does."""
    found = {}
    for ours, theirs in renamed(flags, attention):
        for part in (part for part in ("weight", "bias") if f"{ours}.{part}" in state):
            tensor = state[f"{ours}.{part}"]
            if not ours.endswith(".qkv"):
                matrix = ours.endswith(".proj_out") and part == "weight"
                found[f"{theirs}.{part}"] = tensor.flatten(1) if matrix else tensor
                continue
            rows = _split(tensor, _heads(flags, len(tensor) // 3), flags["use_new_attention_order"])
            found |= {f"{theirs}{name}.{part}": row for name, row in zip(QKV, rows)}
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in found.items()}


def imported(tensors, flags, attention, sines_first):
    """Our state dict, in the legacy order of attention, from those of a UNet2DModel: the inverse of `exported`."""
    found = {}
    for ours, theirs in renamed(flags, attention):
        for part in ("weight", "bias"):
            if not ours.endswith(".qkv"):
                if f"{theirs}.{part}" in tensors:
                    found[f"{ours}.{part}"] = tensors[f"{theirs}.{part}"]
                continue
            rows = [tensors[f"{theirs}{name}.{part}"] for name in QKV]
            found[f"{ours}.{part}"] = _join(rows, _heads(flags, len(rows[0])))
    for name in found:
        if name.endswith((".qkv.weight", ".proj_out.weight")):
            found[name] = found[name].reshape(*found[name].shape[:2], 1)
    if sines_first:
        weight = found["time_embed.0.weight"]                             # [4C,C]
        found["time_embed.0.weight"] = weight.roll(weight.shape[1] // 2, 1)
    return found


def _heads(flags, width):
    if flags["num_head_channels"] != -1:
        return width // flags["num_head_channels"]
    return flags["num_heads"]


def _split(rows, heads, new_order):
    """The rows of q, of k and of v, heads outermost, from those of both orders: [3*H*c,...] -> 3 of [H*c,...]."""
    rows = rows.reshape(*((3, heads) if new_order else (heads, 3)), -1, *rows.shape[1:2])
    rows = rows if new_order else rows.transpose(0, 1)                    # [3,H,c,...]
    return rows.reshape(3, -1, *rows.shape[3:]).unbind()


def _join(parts, heads):
    """q, k and v, each [H*c,...], in the legacy order, where each head has its q, k and v: [H*3*c,...]."""
    rows = torch.stack([part.reshape(heads, -1, *part.shape[1:]) for part in parts], dim=1)   # [H,3,c,...]
    return rows.flatten(0, 2)
