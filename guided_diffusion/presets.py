"""
The published models: the flags that build them, where they lie, and what they score. Data, and ways to look it up.

The 15 of guided-diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233) are presets: `--preset imagenet64` types their
README's flags. Those of its parent, improved-diffusion (Nichol & Dhariwal 2021, arXiv 2102.09672), are known by their
files' names only, since many have trained networks of their shapes on other processes.
"""

import os
from typing import NamedTuple

BASE = "https://openaipublic.blob.core.windows.net/diffusion/"
BYTES_A_NUMBER = 4  # the files hold float32
OVERHEAD = 1000, 2**21  # bytes that a file has besides, at least and at most: names, shapes, padding of each tensor

# flags: those of the README that are not defaults here; all others have their defaults.
_ADM = {"attention_resolutions": "32,16,8", "learn_sigma": True, "resblock_updown": True, "use_fp16": True}
_256 = _ADM | {"image_size": 256, "num_channels": 256, "num_head_channels": 64}
_LSUN = _256 | {"dropout": 0.1}


class Preset(NamedTuple):
    """
    A published model.

    kind: of network, as in config.json. flags: of the network and its process, without defaults. parameters: their
    number, which tells the size of the file; 0: unknown. classifier: the preset of the one that guides it. scale: the
    best --classifier_scale at 250 ancestral steps, and scale_ddim25 that at 25 DDIM steps (table 14). steps: those of
    the score. fid, precision, recall: of 50,000 samples, as published. sha256: of the file, where known.
    """

    kind: str
    file: str
    flags: dict
    parameters: int
    folder: str = "jul-2021/"
    classifier: str = ""
    scale: float | None = None
    scale_ddim25: float | None = None
    steps: str = ""
    fid: float | None = None
    precision: float | None = None
    recall: float | None = None
    sha256: str = ""

    @property
    def url(self):
        """Where the file lies; $GD_MODELS_URL takes the place of the publisher's address, up to the file's name."""
        mirror = os.environ.get("GD_MODELS_URL")
        return f"{mirror.rstrip('/')}/{self.file}" if mirror else f"{BASE}{self.folder}{self.file}"

    @property
    def size(self):
        """(least, most) bytes that the file can have, or None if that is unknown."""
        numbers = BYTES_A_NUMBER * self.parameters
        return (numbers + OVERHEAD[0], numbers + OVERHEAD[1]) if numbers else None


def _classifier(image_size, parameters, **flags):
    return Preset("classifier", f"{image_size}x{image_size}_classifier.pt", {"image_size": image_size} | flags,
                  parameters)  # fmt: skip


# fmt: off
PRESETS = {
    # FID, precision, recall of the README. That of 64 is without guidance, which harms there; as the base of 64 to 256
    # it is guided by scale 1. The others are guided by scale and classifier, in 250 steps; LSUN is not, in 1,000.
    "imagenet64": Preset(
        "diffusion", "64x64_diffusion.pt",
        _ADM | {"class_cond": True, "dropout": 0.1, "image_size": 64, "noise_schedule": "cosine", "num_channels": 192,
                "num_head_channels": 64, "num_res_blocks": 3, "use_new_attention_order": True},
        295_904_454, classifier="classifier64", scale=1.0, steps="250", fid=2.07, precision=0.74, recall=0.63),
    "imagenet128": Preset(
        "diffusion", "128x128_diffusion.pt",
        _ADM | {"class_cond": True, "image_size": 128, "num_channels": 256, "num_heads": 4},
        421_529_606, classifier="classifier128", scale=0.5, scale_ddim25=1.25, steps="250",
        fid=2.97, precision=0.78, recall=0.59),
    "imagenet256": Preset(
        "diffusion", "256x256_diffusion.pt", _256 | {"class_cond": True},
        553_838_086, classifier="classifier256", scale=1.0, scale_ddim25=2.5, steps="250",
        fid=4.59, precision=0.82, recall=0.52),
    "imagenet256-uncond": Preset(
        "diffusion", "256x256_diffusion_uncond.pt", _256,
        552_814_086, classifier="classifier256", scale=10.0, steps="250", fid=12.00, precision=0.76, recall=0.44),
    "imagenet512": Preset(
        "diffusion", "512x512_diffusion.pt", _256 | {"class_cond": True, "image_size": 512, "use_fp16": False},
        558_997_638, classifier="classifier512", scale=4.0, scale_ddim25=9.0, steps="250",
        fid=7.72, precision=0.87, recall=0.42),
    # Scores of enlarged samples of the guided base model.
    "upsample64-256": Preset(
        "super_res", "64_256_upsampler.pt",
        _ADM | {"class_cond": True, "large_size": 256, "small_size": 64, "num_channels": 192, "num_heads": 4},
        311_795_910, steps="250", fid=3.94, precision=0.83, recall=0.53),
    "upsample128-512": Preset(
        "super_res", "128_512_upsampler.pt",
        _ADM | {"attention_resolutions": "32,16", "class_cond": True, "large_size": 512, "small_size": 128,
                "num_channels": 192, "num_head_channels": 64},
        308_835_270, steps="250", fid=3.85, precision=0.84, recall=0.53),
    "lsun-bedroom": Preset(
        "diffusion", "lsun_bedroom.pt", _LSUN, 552_814_086, steps="1000", fid=1.90, precision=0.66, recall=0.51),
    "lsun-cat": Preset(
        "diffusion", "lsun_cat.pt", _LSUN, 552_814_086, steps="1000", fid=5.57, precision=0.63, recall=0.52),
    "lsun-horse": Preset(
        "diffusion", "lsun_horse.pt", _LSUN, 552_814_086, steps="1000", fid=2.57, precision=0.71, recall=0.55),
    "lsun-horse-nodropout": Preset(
        "diffusion", "lsun_horse_nodropout.pt", _256, 552_814_086, steps="1000", fid=2.95, precision=0.69, recall=0.55),
    "classifier64": _classifier(64, 65_438_568, classifier_depth=4, noise_schedule="cosine"),
    "classifier128": _classifier(128, 42_568_040),
    "classifier256": _classifier(256, 54_096_360),
    "classifier512": _classifier(512, 54_448_360),
}

# improved-diffusion told the network time on a scale of 1000 and weighed the variance's term, unless told not to.
_4000 = {"diffusion_steps": 4000, "rescale_timesteps": True, "rescale_learned_sigmas": True, "learn_sigma": True}
_IDDPM64 = _4000 | {"image_size": 64, "num_res_blocks": 3, "noise_schedule": "cosine"}
_IDDPM32 = _IDDPM64 | {"image_size": 32, "dropout": 0.3}
_IDDPM_LSUN = {"image_size": 256, "num_heads": 1, "learn_sigma": True, "use_scale_shift_norm": False,
               "attention_resolutions": "16"}
_IDDPM_UP = _4000 | {"num_channels": 192, "class_cond": True, "rescale_timesteps": False,
                     "rescale_learned_sigmas": False}
_PARENT = {
    "imagenet64_uncond_100M_1500K.pt": ("diffusion", _IDDPM64),
    "imagenet64_uncond_vlb_100M_1500K.pt": ("diffusion", _IDDPM64 | {"use_kl": True}),
    "imagenet64_cond_270M_250K.pt": ("diffusion", _IDDPM64 | {"num_channels": 192, "class_cond": True}),
    "cifar10_uncond_50M_500K.pt": ("diffusion", _IDDPM32),
    "cifar10_uncond_vlb_50M_500K.pt": ("diffusion", _IDDPM32 | {"use_kl": True}),
    "lsun_uncond_100M_1200K_bs128.pt": ("diffusion", _IDDPM_LSUN),
    "lsun_uncond_100M_2400K_bs64.pt": ("diffusion", _IDDPM_LSUN),
    "upsample_cond_500K.pt": ("super_res", _IDDPM_UP),
}
# fmt: on
PARENT = {name[: -len(".pt")]: Preset(kind, name, flags, 0, "march-2021/") for name, (kind, flags) in _PARENT.items()}


# How the cascade from text to image of a tutorial on Fashion-MNIST is trained, each of its three networks by its own
# program; updates are its epochs of 50,000 images. 0.2855552 and 0.33848408 are of its training images at 32x32.
_RECIPE = {"lr": 5e-4, "lr_min": 1e-5, "lr_schedule": "cosine", "weight_decay": 1e-4, "grad_clip": 1.0}
_FASHION = {"image_size": 32, "image_channels": 1, "context_length": 64}
RECIPES = {
    "fashion-mnist": {
        "clip": _RECIPE | _FASHION | {
            "clip_size": 256, "patch_size": 4, "image_width": 256, "image_layers": 6, "image_heads": 8,
            "text_width": 256, "text_layers": 6, "text_heads": 8, "dropout": 0.2, "image_mean": 0.2855552,
            "image_std": 0.33848408, "random_flip": True, "crop_padding": 4, "batch_size": 128,
            "lr_anneal_steps": 200 * 390, "lr_warmup": 5 * 390},
        "prior": _RECIPE | {
            "diffusion_steps": 1000, "noise_schedule": "cosine", "prior_width": 256, "prior_layers": 6,
            "prior_heads": 8, "prior_dropout": 0.2, "random_flip": False, "batch_size": 128,
            "lr_anneal_steps": 150 * 390, "lr_warmup": 5 * 390},
        "decoder": _RECIPE | _FASHION | {
            "diffusion_steps": 1000, "noise_schedule": "cosine", "num_channels": 32, "channel_mult": "1,2,4,8",
            "num_res_blocks": 2, "attention_resolutions": "16,8", "num_heads": 8, "dropout": 0.1,
            "use_scale_shift_norm": True, "conv_resample": True, "text_width": 256, "text_layers": 4, "text_heads": 8,
            "image_tokens": 4, "random_flip": False, "batch_size": 32, "lr_anneal_steps": 100 * 1562,
            "lr_warmup": 5 * 1562}},
}


def by_name(text):
    """The preset or published file of this name (a path's folder and its .pt count for nothing), or None."""
    name = os.path.basename(os.fspath(text))
    stem = name.removesuffix(".pt").removesuffix(".safetensors")
    known = PRESETS | PARENT | {preset.file[: -len(".pt")]: preset for preset in PRESETS.values()}
    return known.get(stem)


def for_kind(name, kind):
    """The preset of this name, or the classifier that belongs to it, whichever is of this kind; None if neither is."""
    preset = PRESETS[name]
    if preset.kind != kind and preset.classifier:
        preset = PRESETS[preset.classifier]
    return preset if preset.kind == kind else None


def typed_for(name, known):
    """
    The flags that a preset types for a program: {name: value}.

    Sampling programs also get the files, the best scale of guidance and the steps of the published score; training
    programs get no 16-bit flag, which the README has for sampling.

    :param known: names of the program's flags.
    :raises ValueError: for a recipe, if no part of it is for such a program.
    """
    if name in RECIPES:
        for flags in RECIPES[name].values():
            if flags.keys() <= set(known):
                return dict(flags)
        raise ValueError(f"--preset {name} is a recipe for {', '.join(f'{part}_train.py' for part in RECIPES[name])}")
    preset = PRESETS[name]
    kinds = ["classifier"] if preset.kind == "classifier" else [preset.kind, "classifier"]
    told = {}
    for each in (for_kind(name, kind) for kind in reversed(kinds)):
        told |= each.flags if each else {}
    if "lr" in known:
        told.pop("use_fp16", None)
    if "use_ddim" in known:
        more = {"model_path": name, "classifier_path": preset.classifier, "classifier_scale": preset.scale}
        more |= {"timestep_respacing": preset.steps}
        told |= {flag: value for flag, value in more.items() if value and preset.kind != "classifier"}
    return {flag: value for flag, value in told.items() if flag in known}
