"""
What a checkpoint is: every flag of its network and process, from whoever tells it.

The user's flags come first, then --preset, then config.json, then a published model of that file name or of those
tensors. What the tensors determine is read off them; it is an error if the first three contradict it. What nobody
tells is asked for.
"""

import math
import re

from . import checkpoint, config, logger, presets, recognition, sizes
from .network_options import (
    CaptionOptions,
    ClassifierOptions,
    ClipOptions,
    ClipSizes,
    DecoderOptions,
    DecoderProcessOptions,
    DiffusionOptions,
    ModelOptions,
    PriorOptions,
    PriorProcessOptions,
    SuperResOptions,
)

GROUPS = {
    "diffusion": (ModelOptions, DiffusionOptions),
    "super_res": (SuperResOptions, DiffusionOptions),
    "classifier": (ClassifierOptions, DiffusionOptions),
}
TOLD_GROUPS = {  # of networks that only their config.json tells of
    "clip": (ClipOptions,),
    "prior": (PriorOptions, PriorProcessOptions, CaptionOptions, ClipSizes),
    "decoder": (DecoderOptions, DecoderProcessOptions, ClipSizes),
}
SIZES = {"diffusion": "image_size", "super_res": "large_size", "classifier": "image_size"}
# Whoever types others of the flags that tensors tell does it the original's way, where all others have defaults.
NEUTRAL = {"image_size", "image_channels", "num_classes", "network", "vector_channels"}
# Tensors do not tell these either, but other values than the usual ones are rare; they are named, and not asked for.
USUAL = "predict num_heads_upsample class_dropout rescale_timesteps residual_rescale learned_variance".split()


def identify(path, kind, state, explicit=None, preset=""):
    """
    Every flag of a checkpoint's network and process. Where there is no config.json the log says who told them.

    :param kind: the kind of network that is needed, as in config.json.
    :param state: {name: anything with a shape}, the content of the file.
    :param explicit: {name: value} that the user wants; names of other kinds are passed over.
    :param preset: name of the preset that the user wants, or "".
    :return: {name: value}; of a classifier's process, which need not be known, only what is told.
    :raises ValueError: if these are no weights of such a network, if what is told contradicts them, or if flags remain
        open: which, and what would do.
    """
    if kind in TOLD_GROUPS:
        return _told(path, kind, explicit or {})
    defaults = config.defaults(*GROUPS[kind])
    content = checkpoint.read_config(path)
    sources = _sources(path, kind, content, explicit or {}, preset, defaults)
    told = {name: value for _, flags in reversed(sources) for name, value in flags.items()}
    inferred = _inferred(path, kind, state, told)
    if inferred["kind"] != kind:
        raise ValueError(f"{path} holds a {inferred['kind']} network, but a {kind} one is needed")
    the_originals_way = bool(sources[0][1].keys() & inferred.keys() - NEUTRAL)
    guessed, notes = {}, []
    if len(sources) == 1:  # the user's word alone
        guessed, notes = _published(path, kind, state, by_tensors=not the_originals_way)
    known = guessed | told
    open_flags = _open_flags(kind, state, _inferred(path, kind, state, known), known)
    if open_flags and not the_originals_way:
        raise ValueError(_question(path, kind, state, open_flags, known))
    flags = defaults | known
    inferred = _inferred(path, kind, state, flags)
    wrong = recognition.misfits(flags, inferred)
    for source, names in sources:
        for name in (name for name in wrong if name in names):
            what = f"{source}{name} {names[name]}"
            raise ValueError(f"{what} contradicts the weights of {path}, which say {name} {wrong[name]}")
    if not content:
        _say(notes + _account(path, inferred | wrong, told, open_flags, defaults))
    process = config.defaults(DiffusionOptions)
    flags = flags | wrong
    return {name: flags[name] for name in flags if kind != "classifier" or name in known or name not in process}


def _told(path, kind, explicit):
    defaults, content = config.defaults(*TOLD_GROUPS[kind]), checkpoint.read_config(path)
    if content is None:
        raise ValueError(f"nothing tells what {path} is: put the config.json of the run that made it beside it")
    explicit = {name: value for name, value in explicit.items() if name in defaults}
    return defaults | _flags_of_config(checkpoint.where_config(path), kind, content, defaults) | explicit


def _sources(path, kind, content, explicit, preset, defaults):
    """[(what stands before the flag in an error, {name: value})] of those whose word counts, first the user."""
    found = [("--", {name: value for name, value in explicit.items() if name in defaults})]
    model = presets.for_kind(preset, kind) if preset else None
    if model:
        found.append((f"--preset {preset} with ", ({} if content else defaults) | model.flags))
    if content:
        where = checkpoint.where_config(path)
        found.append((f"{where} with ", _flags_of_config(where, kind, content, defaults)))
    return found


def _flags_of_config(where, kind, content, known):
    if content["kind"] != kind:
        raise ValueError(f"{where} describes a {content['kind']} network, but a {kind} one is needed")
    for name, value in content["flags"].items():
        if name not in known:
            raise ValueError(f"{where} has an unknown option {name}{config.nearest(name, known)}")
        kinds = (int, float) if type(known[name]) is float else (type(known[name]),)
        if type(value) not in kinds and not (name == "image_size" and _is_rectangle(value)):
            raise ValueError(f"{where}: {name} must be {kinds[-1].__name__}, not {value!r}")
    return content["flags"]


def _is_rectangle(value):
    return isinstance(value, str) and bool(re.fullmatch(r"[1-9]\d*x[1-9]\d*", value))


def _inferred(path, kind, state, known):
    return recognition.infer_flags(
        state, known.get(SIZES[kind]), known.get("image_channels"), path, known.get("classifier_depth")
    )


# -------------------------------------------------------------------------------------------------- published models


def whole(preset):
    """{name: value} of every flag of a published model."""
    return config.defaults(*GROUPS[preset.kind]) | preset.flags


def fits(preset, path, state):
    """Whether a published model has tensors of these names and shapes."""
    inferred = _inferred(path, preset.kind, state, whole(preset))
    return inferred["kind"] == preset.kind and not recognition.misfits(whole(preset), inferred)


def _published(path, kind, state, by_tensors):
    """({name: value}, lines for the log) of the published model that this is by name, or may be by its tensors."""
    named = presets.by_name(path)
    if named and named.kind == kind:
        if fits(named, path, state):
            return whole(named), [f"{path}: the published {named.file}, by its name and its tensors"]
        notes = [f"warning: {path} has the name of a published model, and other tensors: the name tells nothing"]
    else:
        notes = []
    same = {name: preset for name, preset in presets.PRESETS.items() if preset.kind == kind
            and fits(preset, path, state)}  # fmt: skip
    if not same or not by_tensors:
        return {}, notes
    # Those of equal shapes differ in dropout alone, which changes nothing but training.
    shared = set.intersection(*(set(whole(preset).items()) for preset in same.values()))
    files = ", ".join(preset.file for preset in same.values())
    notes.append(
        f"{path}: taken for a published model, as it has the tensors of {files}; if it was trained otherwise, type"
        f" what differs, as --{SIZES[kind]} or the heads"
    )
    return dict(shared), notes


# --------------------------------------------------------------------------------------------------- what is not told


def _open_flags(kind, state, inferred, known):
    """{flags to type, one or another: values that would do} of what neither the tensors nor anybody tells."""
    shapes = recognition.shapes_of(state)
    widths = [shape[1] for name, shape in shapes.items() if name.endswith(".qkv.weight")]
    wanted = {}
    if "classifier_depth" not in inferred | known and kind == "classifier":
        depths = (entries - 1 for entries in recognition.possible_entries(shapes))
        wanted["--classifier_depth"] = ", ".join(map(str, depths))
    if SIZES[kind] not in inferred | known:
        wanted[f"--{SIZES[kind]}"] = _sizes(kind, inferred)
    if kind == "super_res" and "small_size" not in known:
        wanted["--small_size"] = "the side of the images to enlarge"
    if kind == "classifier":
        pool = [shape[0] for name, shape in shapes.items() if name.endswith("positional_embedding")]
        if "classifier_num_head_channels" not in known:
            wanted["--classifier_num_head_channels"] = _divisors(widths + pool)
        return wanted
    if widths and not {"num_heads", "num_head_channels"} & known.keys():
        wanted["--num_heads or --num_head_channels"] = f"both of {_divisors(widths)}"
    if widths and "use_new_attention_order" not in known and not _single_heads(widths, known):
        wanted["--use_new_attention_order"] = "False for all published models but 64x64_diffusion.pt"
    wanted |= {f"--{name}": usual for name, usual in
               {"noise_schedule": "linear, cosine...", "diffusion_steps": "1000, 4000..."}.items()
               if name not in known}  # fmt: skip
    return wanted


def _single_heads(widths, known):
    """Whether all attention has one head, as far as is known: then its order does not matter."""
    if known.get("num_head_channels", -1) != -1:
        return all(width == known["num_head_channels"] for width in widths)
    return known.get("num_heads") == 1 and known.get("num_heads_upsample", -1) in (-1, 1)


def _divisors(widths):
    whole = math.gcd(*widths)
    return ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)


def _sizes(kind, inferred):
    name = "classifier_channel_mult" if kind == "classifier" else "channel_mult"
    if name not in inferred:
        return "the side of its images"
    mult = sizes.parse_channel_mult(inferred[name])
    film = inferred.get("network") == "film"
    multiple = f"a multiple of {2 ** (len(mult) - (not film))}"
    usual = [side for side in (512, 256, 128, 64, 32, 16, 8)
             if sizes.default_channel_mult(side, kind == "super_res") == mult and not film]  # fmt: skip
    return multiple + (f", by its widths {' or '.join(map(str, usual))}" if usual else "")


def _question(path, kind, state, open_flags, known):
    asked = "; ".join(f"{names} ({values})" for names, values in open_flags.items())
    alike = [name for name, preset in presets.PARENT.items() if preset.kind == kind and fits(preset, path, state)]
    hint = f" Its tensors could be those of {', '.join(alike)}: a file of that name is recognised." if alike else ""
    return (
        f"{path}: its tensors leave these flags open, and neither {checkpoint.CONFIG_NAME} nor a published model tells:"
        f" {asked}. Type them{_as_usual(kind, known)}.{hint}"
    )


def _as_usual(kind, known):
    names = [f"--{name}" for name in USUAL if name not in known] if kind != "classifier" else []
    return f", and {', '.join(names)} if not as usual" if names else ""


def _account(path, inferred, told, open_flags, defaults):
    """Lines for the log: what the tensors told, and what nobody did."""
    read = [f"{name} {inferred[name]}" for name in inferred if name in defaults and name not in told]
    notes = [f"{path}: read off its tensors: {', '.join(read)}"] if read else []
    if open_flags:
        names = [name.strip("-") for flags in open_flags for name in flags.split(" or ")]
        usual = ", ".join(f"{name} {defaults[name]}" for name in names)
        notes.append(f"warning: nothing tells these flags of {path}, so they have their defaults: {usual}")
    return notes


def _say(notes):
    for note in notes:
        if logger.Logger.CURRENT:
            logger.log(note)
        else:
            print(note)
