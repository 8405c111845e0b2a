"""What the names and shapes of a network's tensors tell about the flags that built it."""

import contextlib
import math
import re
import shlex

import torch

from . import sizes

NO_FLAGS = ("kind", "attention_downsampling")  # what infer_flags tells besides flags


def infer_flags(state_dict, image_size=None, image_channels=None, path="this", depth=None):
    """
    What the names and shapes of a network's tensors determine of the flags that built it.

    Heads, attention order, dropout and the process leave no trace there; neither, in rare classifiers, does the
    division into levels. What is not determined is absent. `num_classes` counts the null class, if there is one.

    :param state_dict: {name: anything with a shape}.
    :param image_size: of the images (large_size), as `sizes.parse_size` gives it, if known; it turns factors of
        attention into sides.
    :param image_channels: channels of the images if known; they tell a super-resolution network of C channels with
        learned variance from a plain one of 2C without.
    :param path: what to call the file in errors.
    :param depth: residual blocks a level, if known; only where a classifier's tensors leave that open.
    :return: {flag: value}, also `kind` ("diffusion", "classifier", "super_res") and `attention_downsampling`, the
        factors by which features with attention are smaller than the image.
    :raises ValueError: if these are no weights of such a network.
    """
    shapes = _network_shapes(state_dict, path)
    try:
        return _infer(shapes, image_size and min(sizes.sides(image_size)), image_channels, depth)
    except (LookupError, ArithmeticError) as error:
        raise ValueError(f"{path} holds no whole network (missing or misshapen: {error})") from error


def _infer(shapes, image_size, image_channels, depth):
    if "init_conv.weight" in shapes:
        return _infer_film(shapes)
    if max(_blocks(shapes), default=0) > len(shapes):
        raise LookupError("input_blocks in between")
    is_unet = any(name.startswith("output_blocks.") for name in shapes)
    found = _unet_head(shapes, image_channels) if is_unet else _classifier_head(shapes)
    base, block = shapes["time_embed.0.weight"][1], "input_blocks.1.0."
    scale_shift = shapes[block + "emb_layers.1.weight"][0] == 2 * shapes[block + "in_layers.2.weight"][0]
    trunk = {"num_channels": base, "use_scale_shift_norm": scale_shift}
    entries = entries_per_level(shapes, image_size, depth)
    if entries:
        starts = range(1, _blocks(shapes)[-1] + 1, entries)  # the first residual block of each level
        widths = [shapes[f"input_blocks.{n}.0.in_layers.2.weight"][0] for n in starts]
        trunk["num_res_blocks"] = entries - 1
        trunk["channel_mult"] = ",".join(factor(width, base) for width in widths)
        if len(starts) > 1:
            trunk |= _resampling(shapes, entries, is_unet)
        if _pool_side(shapes):
            image_size = found["image_size"] = _pool_side(shapes) * 2 ** (len(starts) - 1)
        factors = [2**level for level, n in enumerate(starts) if f"input_blocks.{n}.1.qkv.weight" in shapes]
        found["attention_downsampling"] = tuple(factors)
        if image_size:
            trunk["attention_resolutions"] = ",".join(str(image_size // factor) for factor in factors)
    return found | (trunk if is_unet else {_classifier_name(name): value for name, value in trunk.items()})


def _resampling(shapes, entries, is_unet):
    """How sides are halved: residual blocks have norms, convolutions a weight, and means no tensors at all."""
    updown = f"input_blocks.{entries}.0.in_layers.0.weight" in shapes
    conv = updown or f"input_blocks.{entries}.0.op.weight" in shapes
    return {"resblock_updown": updown} | ({"conv_resample": conv} if is_unet and not updown else {})


def _infer_film(shapes):
    base, channels = shapes["init_conv.weight"][:2]
    stages = sorted(int(name.split(".")[1]) for name in shapes if re.fullmatch(r"downs\.\d+\.2\.weight", name))
    return {
        "kind": "diffusion",
        "network": "film",
        "image_channels": channels,
        "learn_sigma": shapes["final_conv.weight"][0] == 2 * channels,
        "class_cond": False,
        "vector_channels": shapes.get("condition_mlp.0.weight", (0, 0))[1],
        "num_channels": base,
        "channel_mult": ",".join(factor(shapes[f"downs.{i}.2.weight"][0], base) for i in stages),
        "attention_downsampling": (),
    }


def _classifier_name(name):
    return {"num_channels": "classifier_width", "num_res_blocks": "classifier_depth"}.get(name, f"classifier_{name}")


def shapes_of(state_dict):
    """{name: shape} of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items() if isinstance(name, str)}


def _network_shapes(state_dict, path):
    names = [name for name in state_dict if isinstance(name, str)] if isinstance(state_dict, dict) else []
    known = {"time_embed.0.weight", "init_conv.weight"} & set(names)
    if known and all(hasattr(state_dict[name], "shape") for name in names):
        return shapes_of(state_dict)
    if set(names) == {"state", "param_groups"}:
        raise ValueError(f"{path} holds the state of an optimizer: give the modelNNNNNN.pt or ema_*.pt beside it")
    held = f"a dict of {', '.join(names[:3])}..." if names else f"a {type(state_dict).__name__}"
    raise ValueError(f"{path} holds no weights of a diffusion model or classifier, but {held}")


def _unet_head(shapes, known_channels):
    taken, given = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
    if known_channels in (taken, taken / 2):
        doubled = taken == 2 * known_channels
    else:
        doubled = taken in (2, 6)
    # A super-resolution network takes the noisy and the enlarged image, and gives C channels, or 2C with a variance.
    super_res = taken == 2 * given or (taken == given and doubled)
    channels = taken // 2 if super_res else taken
    found = {
        "kind": "super_res" if super_res else "diffusion",
        "image_channels": channels,
        "learn_sigma": given == 2 * channels,
        "class_cond": "label_emb.weight" in shapes,
    }
    if found["class_cond"]:
        found["num_classes"] = shapes["label_emb.weight"][0]
    if not super_res:
        found |= {"network": "adm", "vector_channels": shapes.get("vector_emb.0.weight", (0, 0))[1]}
    return found


def _classifier_head(shapes):
    if "out.2.positional_embedding" in shapes:
        pool, logits = "attention", "out.2.c_proj.weight"
    elif "out.2.weight" in shapes:
        pool, logits = "spatial", "out.2.weight"
    else:
        pool, logits = "spatial_v2" if "out.1.weight" in shapes else "adaptive", "out.3.weight"
    return {
        "kind": "classifier",
        "image_channels": shapes["input_blocks.0.0.weight"][1],
        "num_classes": shapes[logits][0],
        "classifier_pool": pool,
    }


def _pool_side(shapes):
    """Side of the features that an attention pool takes, or None: it has an entry for each position and the mean."""
    embedding = shapes.get("out.2.positional_embedding")
    return embedding and math.isqrt(embedding[1] - 1)


def _blocks(shapes, part=""):
    """Indices of the input blocks that have a tensor whose name goes on with `part`, ascending."""
    matches = (re.match(rf"input_blocks\.(\d+)\.{part}", name) for name in shapes)
    return sorted({int(match[1]) for match in matches if match})


def entries_per_level(shapes, image_size=None, depth=None):
    """Entries of input_blocks a level, that which resamples included, or None if the tensors leave a choice."""
    possible = possible_entries(shapes)
    if len(possible) > 1 and image_size and _pool_side(shapes):
        total = _blocks(shapes)[-1] + 1
        possible = [n for n in possible if image_size == _pool_side(shapes) * 2 ** (total // n - 1)]
    if len(possible) > 1 and depth:
        possible = [n for n in possible if n == depth + 1]
    return possible[0] if len(possible) == 1 else None


def possible_entries(shapes):
    """The numbers that entries_per_level could be: one, but for rare classifiers."""
    total = _blocks(shapes)[-1] + 1  # the first convolution stands in for the resampling that the last level lacks
    bare = sorted(set(range(total)) - set(_blocks(shapes)))  # resampling without weights leaves a gap
    convolutions = _blocks(shapes, r"0\.op\.weight") or bare
    if convolutions:
        return [convolutions[0]]
    ups = [name for name in shapes if re.match(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.0)\.weight", name)]
    if ups or "output_blocks.0.0.in_layers.0.weight" in shapes:
        return [total // (len(ups) + 1)]
    # Resampling blocks of a classifier look like others: but they keep the width, and never have attention.
    return [n for n in range(2, total + 1) if total % n == 0 and _could_be_levels(shapes, n, total)]


def _could_be_levels(shapes, entries, total):
    widened, attentive = _blocks(shapes, r"0\.skip_connection"), set(_blocks(shapes, r"1\.qkv"))
    levels = [set(range(start, start + entries - 1)) for start in range(1, total, entries)]
    whole = set().union(*(level for level in levels if level <= attentive))
    return all(n % entries == 1 for n in widened) and attentive == whole


def factor(width, base):
    """The text of --channel_mult for which int(factor * base) is the width."""
    ratio = width / base
    if int(ratio * base) < width:
        ratio = math.nextafter(ratio, math.inf)
    return str(int(ratio) if ratio.is_integer() else ratio)


def _null_apart(inferred, flags):
    """What the tensors tell, num_classes without the null class: only the flags tell whether the last row is one."""
    if not inferred.get("class_cond") or not {"num_classes", "class_dropout"} <= set(flags):
        return inferred
    rows, null = inferred["num_classes"], flags["class_dropout"] > 0
    if rows == flags["num_classes"] + (not null):
        return inferred | {"num_classes": flags["num_classes"], "class_dropout": 0.0 if null else 0.1}
    return inferred | {"num_classes": rows - null}


def misfits(flags, inferred):
    """
    Which flags contradict the tensors: {name: what the tensors tell}.

    :param flags: {name: value} as for the builders.
    :param inferred: what infer_flags returned.
    """
    inferred = _null_apart(inferred, flags)
    wrong = {name: told for name, told in inferred.items() if name in flags and flags[name] != told}
    prefix = "classifier_" if inferred["kind"] == "classifier" else ""
    mult_name, attention_name = f"{prefix}channel_mult", f"{prefix}attention_resolutions"
    if "attention_downsampling" not in inferred or not {mult_name, attention_name} <= set(flags):
        return wrong
    # Different texts of these two can mean the same network.
    is_super_res = inferred["kind"] == "super_res"
    size = inferred.get("image_size") or sizes.side_of(flags)
    base = inferred["classifier_width" if prefix else "num_channels"]
    told = sizes.parse_channel_mult(inferred[mult_name])
    mult = ()
    with contextlib.suppress(ValueError):
        mult = sizes.levels(flags[mult_name], size, is_super_res, inferred.get("network") == "film")
    if [int(factor * base) for factor in mult] == [int(factor * base) for factor in told]:
        wrong.pop(mult_name, None)
    factors = {2**level for level in range(len(told))} & set(sizes.attention_downsampling(flags[attention_name], size))
    if factors == set(inferred["attention_downsampling"]):
        wrong.pop(attention_name, None)
    return wrong


def load_weights(model, state_dict, *, path, flags):
    """
    Load all tensors of a network, strictly.

    :param path: where they come from, for the error.
    :param flags: {name: value} that built the network, for the error.
    :raises ValueError: if names or shapes differ: which, and which flags would fit.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if isinstance(state_dict, dict) and wanted.keys() & state_dict.keys():
        held = {name: tuple(getattr(value, "shape", ())) for name, value in state_dict.items()}
    else:
        held = _network_shapes(state_dict, path)  # which says what the file holds instead
    missing = [name for name in wanted if name not in held]
    surplus = [name for name in held if name not in wanted]
    differing = [name for name in wanted if name in held and wanted[name] != held[name]]
    problems = [f"{len(missing)} keys missing (first: {missing[0]})"] if missing else []
    problems += [f"{len(surplus)} keys too many (first: {surplus[0]})"] if surplus else []
    if differing:
        name = differing[0]
        problems += [f"{len(differing)} shapes differ ({name}: file {list(held[name])}, network {list(wanted[name])})"]
    if problems:
        raise ValueError(f"checkpoint {path} does not fit: {', '.join(problems)}{_advice(state_dict, flags)}")
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if on_meta:  # then the network takes the tensors themselves
        state_dict = {name: value.to(torch.float32).contiguous() for name, value in state_dict.items()}
    model.load_state_dict(state_dict, assign=on_meta)


def _advice(state_dict, flags):
    side = "large_size" if "large_size" in flags else "image_size"
    try:
        inferred = infer_flags(state_dict, flags.get(side), flags.get("image_channels"))
    except ValueError:
        return ""
    fits = misfits(flags, inferred) if flags else {name: inferred[name] for name in inferred if name not in NO_FLAGS}
    advice = f"; it is a {inferred['kind']} network"
    if fits:
        given = "" if side in inferred or not flags else f" at --{side} {flags.get(side)}"
        fit = " ".join(f"--{name} {shlex.quote(str(told))}" for name, told in fits.items())
        advice += f"; flags that would fit{given}: {fit}, with the heads and the process that it was trained with"
    return advice
