"""The three networks of the cascade from their options, and from a checkpoint's path."""

import hashlib
import os

import torch as th

from .. import checkpoint, script_util, sizes
from ..script_util import open_network, process_of
from . import hugging_face
from .clip import CLIP
from .decoder import Decoder
from .prior import Prior


def create_clip(flags):
    """The CLIP of {name: value} of ClipOptions."""
    if isinstance(flags["image_size"], str):
        raise ValueError(f"CLIP takes square images, not --image_size {flags['image_size']}")
    return CLIP(
        flags["image_size"],
        flags["image_channels"],
        size=flags["clip_size"],
        length=flags["context_length"],
        **_of(flags, "patch_size image_width image_layers image_heads text_width text_layers text_heads dropout"
              " image_mean image_std"),
    )  # fmt: skip


def create_prior(flags):
    """The Prior of {name: value} of PriorOptions, CaptionOptions and ClipSizes."""
    return Prior(
        flags["clip_size"],
        flags["token_size"],
        flags["context_length"],
        width=flags["prior_width"],
        layers=flags["prior_layers"],
        heads=flags["prior_heads"],
        dropout=flags["prior_dropout"],
    )


def create_decoder(flags):
    """The Decoder of {name: value} of DecoderOptions and ClipSizes, and of learn_sigma of its process."""
    size, channels = flags["image_size"], flags["image_channels"]
    return Decoder(
        sizes.sides(size) if isinstance(size, str) else size,
        channels,
        flags["num_channels"],
        channels * (2 if flags["learn_sigma"] else 1),
        flags["num_res_blocks"],
        sizes.attention_downsampling(flags["attention_resolutions"], size),
        channel_mult=sizes.levels(flags["channel_mult"], size),
        length=flags["context_length"],
        **_of(flags, "clip_size image_tokens text_width text_layers text_heads text_dropout"),
        **_of(flags, "dropout conv_resample use_checkpoint checkpoint_levels use_fp16 num_heads num_head_channels"
              " num_heads_upsample use_scale_shift_norm resblock_updown use_new_attention_order"),
    )  # fmt: skip


def _of(flags, names):
    return {name: flags[name] for name in names.split()}


BUILDERS = {"clip": create_clip, "prior": create_prior, "decoder": create_decoder}


def build(kind, flags):
    """The network of any kind, of the cascade or not, as config.json names it, from {name: value} of its options."""
    return BUILDERS[kind](flags) if kind in BUILDERS else script_util.build(kind, flags)


def open_clip(path, device="cpu"):
    """
    The CLIP of a checkpoint of clip_train.py, or of a folder as `hugging_face` takes it, frozen and in evaluation mode.

    :raises ValueError, FileNotFoundError: if there is none, or its weights do not fit its config.json.
    :raises ImportError: for such a folder, without the package transformers.
    """
    if not path:
        raise ValueError("no CLIP given: --clip_path is empty")
    if hugging_face.is_folder(path):
        return hugging_face.open_folder(path).to(device)
    return open_network(path, "clip", "", {}, device, build)[0].requires_grad_(False)


def open_prior(path, explicit_flags=None, device="cpu"):
    """(Prior, its process, its flags) of a checkpoint of prior_train.py; as `script_util.open_diffusion`."""
    network, flags = open_network(path, "prior", "", explicit_flags or {}, device, build)
    return network, process_of(flags), flags


def open_decoder(path, explicit_flags=None, device="cpu"):
    """(Decoder, its process, its flags) of a checkpoint of decoder_train.py; as `script_util.open_diffusion`."""
    network, flags = open_network(path, "decoder", "use_fp16", explicit_flags or {}, device, build)
    return network, process_of(flags), flags


def fingerprint(clip):
    """A text that a CLIP of other weights would not have."""
    digest = hashlib.sha256()
    for name, value in sorted(clip.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", th.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def clip_sizes(clip):
    """{name: value} of ClipSizes that a CLIP settles."""
    return {"clip_size": clip.size, "token_size": clip.token_size}


def trained_with(path):
    """{"path", "fingerprint"} of the CLIP that a prior or decoder was trained with, {} where nothing tells."""
    told = _noted(path, "clip") if path else {}
    if told and not told.keys() >= {"path", "fingerprint"}:
        raise ValueError(f"{checkpoint.where_config(path)}: clip lacks a path or a fingerprint: mend it")
    return told


def path_of_clip(typed, path):
    """
    Where the CLIP of a prior or decoder is: as typed, or else where it was when that was trained; "" if nothing tells.

    :raises FileNotFoundError: if it is there no longer.
    """
    known = trained_with(path).get("path", "")
    if typed or not known:
        return typed
    if not (checkpoint.exists(known) or hugging_face.is_folder(known)):
        raise FileNotFoundError(
            f"{path} was trained with the CLIP {known}, which is not there (seen from {os.getcwd()}): tell where it is"
            " by --clip_path"
        )
    return known


def check_clip(clip, clip_path, path, force=False):
    """
    Raise ValueError unless a prior or decoder was trained with this CLIP; of another of the same size `force` takes it.
    """
    told = (checkpoint.read_config(path) or {}).get("flags", {})
    if told.get("clip_size", clip.size) != clip.size:
        raise ValueError(
            f"{path} takes embeddings of {told['clip_size']} numbers, and the CLIP {clip_path} makes {clip.size}: give"
            " the CLIP that it was trained with"
        )
    if told.get("token_size", clip.token_size) != clip.token_size and "prior_width" in told:
        raise ValueError(
            f"{path} takes captions of {told['token_size']} features, and the CLIP {clip_path} makes"
            f" {clip.token_size}: give the CLIP that it was trained with"
        )
    known = trained_with(path)
    if known and known["fingerprint"] != fingerprint(clip) and not force:
        raise ValueError(
            f"{path} was trained with another CLIP than {clip_path}, with {known['path']}: give that one by --clip_path"
            " (or --force True to try this one)"
        )


def dropped(path):
    """{"embedding": rate, "caption": rate} of what was dropped in training, as far as config.json tells."""
    return _noted(path, "dropped")


def _noted(path, name):
    noted = (checkpoint.read_config(path) or {}).get(name, {})
    if not isinstance(noted, dict):
        raise ValueError(f"{checkpoint.where_config(path)}: {name} must be a table, not {noted!r}: mend it")
    return noted
