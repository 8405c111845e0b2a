"""
Checkpoints from one form to another: ours (a .pt file with config.json beside it), one safetensors file with the
config inside, and a folder of Hugging Face diffusers (a UNet2DModel with the config of its scheduler).
"""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from . import checkpoint, config, published, recognition, sizes
from . import diffusers_format as theirs
from .identify import GROUPS, TOLD_GROUPS, identify
from .script_util import build


class Model(NamedTuple):
    """A checkpoint's kind, {name: value} of all its flags, its state dict, and what else its config.json holds."""

    kind: str
    flags: dict
    state: dict
    more: dict


def convert(source, target, explicit=None, build=build):
    """
    Write the checkpoint `source` as `target`.

    :param source: a file, as for `script_util.open_diffusion`, or a folder of diffusers.
    :param target: NAME.pt, NAME.safetensors, or a new folder for diffusers.
    :param explicit: {name: value} of flags that the source does not tell, `preset` among them.
    :param build: `(kind, flags) -> network`, for kinds that `script_util.build` does not know.
    :return: the Model that was written.
    :raises ValueError: if the source does not tell or is not what it should be, or if the target's form cannot hold it.
    :raises FileExistsError: if there is a target already.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists: give another name, or delete it")
    model = read(source, explicit or {}, build)
    checkpoint.check_writable(target.parent)
    writers = {".pt": write_pt, ".safetensors": write_safetensors, "": write_diffusers}
    if target.suffix not in writers:
        raise ValueError(f"{target}: give NAME.pt, NAME.safetensors, or the name of a new folder for diffusers")
    writers[target.suffix](model, target)
    return model


def read(source, explicit, build=build):
    """The Model of a file or of a folder of diffusers; as `convert`."""
    if os.path.isdir(source):
        return read_diffusers(Path(source), explicit)
    path = published.locate(source)
    state = checkpoint.load(path)
    content = checkpoint.read_config(path) or {}
    kind = content.get("kind")
    if kind not in TOLD_GROUPS:  # tensors tell of all others, and whether the file is any of ours
        inferred = recognition.infer_flags(state, image_channels=explicit.get("image_channels"), path=path)
        kind = kind or inferred["kind"]
    flags = identify(path, kind, state, explicit, explicit.get("preset", ""))
    more = {name: value for name, value in content.items() if name not in ("format", "kind", "flags")}
    return Model(kind, flags, _checked(path, kind, flags, state, build), more)


def _checked(path, kind, flags, state, build=build):
    """The state dict in the network's order, once it is known to fit."""
    with torch.device("meta"):
        network = build(kind, flags)
    recognition.load_weights(network, state, path=path, flags=flags)
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def write_pt(model, target):
    """NAME.pt, and config.json beside it, which must not describe other files there."""
    content = checkpoint.config_content(model.kind, model.flags, **model.more)
    there = checkpoint.read_config(target)
    if there not in (None, content):
        raise ValueError(
            f"{target.parent} has a config.json of other checkpoints: choose another folder, or NAME.safetensors"
        )
    checkpoint.save(model.state, target)
    checkpoint.write_config(target.parent, model.kind, model.flags, **model.more)


def write_safetensors(model, target):
    """NAME.safetensors with the config inside."""
    content = checkpoint.config_content(model.kind, model.flags, **model.more)
    checkpoint.save_safetensors(model.state, target, content)


# --------------------------------------------------------------------------------------------------------- diffusers


def write_diffusers(model, folder):
    """A folder of diffusers with unet/ and scheduler/, whole or not at all; unconditional ones are a DDPMPipeline."""
    if model.kind != "diffusion":
        raise ValueError(f"diffusers has no {model.kind} network like ours: only diffusion models can be converted")
    attention = recognition.infer_flags(model.state)["attention_downsampling"]
    written = {
        "unet/config.json": theirs.unet_config(model.flags, attention),
        "scheduler/scheduler_config.json": theirs.scheduler_config(model.flags),
    }
    if not model.flags["class_cond"]:
        parts = {"unet": ["diffusers", theirs.UNET], "scheduler": ["diffusers", theirs.SCHEDULER]}
        written["model_index.json"] = {"_class_name": "DDPMPipeline", **parts}
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        for name, content in written.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(json.dumps(content, indent=2) + "\n")
        tensors = theirs.exported(model.state, model.flags, attention)
        checkpoint.save_safetensors(tensors, partial / "unet" / theirs.WEIGHTS)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_diffusers(folder, explicit):
    """
    The Model of a folder of diffusers: of a pipeline, with unet/ and scheduler/, or of the UNet2DModel alone.

    :raises ValueError: if it is none, has what our networks have not, or tells no process and neither does `explicit`.
    """
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    beside = unet.parent / "scheduler" / "scheduler_config.json"
    inside = unet / "scheduler_config.json"
    scheduler = next((_json(path) for path in (beside, inside) if path.exists()), None)
    told, sines_first = theirs.flags_of(_json(unet / "config.json"), scheduler, folder)
    defaults = config.defaults(*GROUPS["diffusion"])
    told |= {name: value for name, value in explicit.items() if name in defaults}
    open_flags = [f"--{name}" for name in ("noise_schedule", "diffusion_steps") if name not in told]
    if open_flags:
        raise ValueError(f"{folder} does not tell {' and '.join(open_flags)}: type them")
    flags = defaults | told | {"use_new_attention_order": False}
    attention = sizes.attention_downsampling(flags["attention_resolutions"], flags["image_size"])
    try:
        state = theirs.imported(_tensors(unet), flags, attention, sines_first)
    except (LookupError, RuntimeError) as error:
        raise ValueError(f"the tensors of {unet} are not those of its config.json ({error})") from error
    return Model("diffusion", flags, _checked(unet, "diffusion", flags, state), {})


def _json(path):
    if not path.exists():
        raise FileNotFoundError(f"no {path}: give a folder of diffusers, with unet/config.json or config.json in it")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid json ({error})") from error


def _tensors(unet):
    found = next((unet / name for name in (theirs.WEIGHTS, "diffusion_pytorch_model.bin") if (unet / name).exists()),
                 None)  # fmt: skip
    if found is None:
        raise FileNotFoundError(f"no {theirs.WEIGHTS} and no diffusion_pytorch_model.bin in {unet}")
    return checkpoint.load(found)
