"""
Checkpoint files: their names, writing that leaves no half file, reading that runs no code, config.json beside them,
and what the tensors of a network tell about the flags that built it.

A path with "://" in it (gs://, az://, https://) is read and written by blobfile, which is imported only then.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import shlex
import warnings

import torch

from . import config

# ------------------------------------------------------------------------------------------------------------- names


def model_name(step):
    """File name of the weights after `step` updates."""
    return f"model{step:06d}.pt"


def ema_name(rate, step):
    """File name of the averaged weights of one decay rate after `step` updates."""
    return f"ema_{rate}_{step:06d}.pt"


def opt_name(step):
    """File name of the optimizer's state after `step` updates."""
    return f"opt{step:06d}.pt"


def parse_resume_step_from_filename(filename):
    """path/to/modelNNNNNN.pt -> NNNNNN; 0 for a name of another form."""
    digits = re.search(r"model(\d+)(\.[^/]*)?$", filename)
    return int(digits[1]) if digits else 0


def latest(folder):
    """Path of the modelNNNNNN.pt of the most updates in a folder, or None."""
    folder = os.fspath(folder)
    models = [name for name in names_in(folder) if re.fullmatch(r"model\d+\.pt", name)]
    return os.path.join(folder, max(models, key=parse_resume_step_from_filename)) if models else None


# --------------------------------------------------------------------------------------------------- files, anywhere


def is_remote(path):
    """Whether blobfile reads and writes this path."""
    return "://" in os.fspath(path)


def exists(path):
    """Whether there is such a file or folder."""
    if is_remote(path):
        import blobfile

        return blobfile.exists(path)
    return os.path.exists(path)


def names_in(folder):
    """The names in a folder; none if there is no such folder."""
    if is_remote(folder):
        import blobfile

        return list(blobfile.listdir(folder)) if blobfile.isdir(folder) else []
    return os.listdir(folder) if os.path.isdir(folder) else []


def reading(path):
    """A binary file to read."""
    if is_remote(path):
        import blobfile

        return blobfile.BlobFile(path, "rb")
    return open(path, "rb")


def remove(path):
    """Delete a file, if it is there."""
    if is_remote(path):
        import blobfile

        if blobfile.exists(path):
            blobfile.remove(path)
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def writing(path):
    """A binary file that takes the name `path` when all of it is on the disk, and leaves no trace if that fails."""
    if is_remote(path):
        import blobfile

        buffer = io.BytesIO()
        yield buffer
        with blobfile.BlobFile(path, "wb") as file:
            file.write(buffer.getvalue())
        return
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, (OSError, RuntimeError)):
            raise OSError(f"cannot write {path}: {_first_line(_of_the_disk(error))}") from error
        raise


def _of_the_disk(error):
    """The OSError behind an error of torch, which reports a full disk as a RuntimeError of its own; else the error."""
    behind = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__context__
    return behind or error


def _first_line(error):
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().split("\n")[0]


def check_writable(folder):
    """Make a folder, and write and delete a file in it. Raises OSError if that cannot be: call it before the work."""
    probe = os.path.join(folder, f".probe{os.getpid()}")
    try:
        if not is_remote(probe):
            os.makedirs(folder, exist_ok=True)
            with open(probe, "wb"):
                pass
            os.unlink(probe)
    except OSError as error:
        reason = _first_line(error)
        raise OSError(f"cannot write to the folder {folder} ({reason}): choose another --log_dir") from error


def save(obj, path):
    """Write an object of tensors and plain values. Raises OSError, with an earlier file of that name left as it was."""
    with writing(os.fspath(path)) as file:
        torch.save(obj, file)


def load(path, map_location="cpu"):
    """
    Read a file of tensors and plain values. Nothing in it is executed.

    :raises FileNotFoundError: if there is none.
    :raises ValueError: if it is no checkpoint, an incomplete one, or one that asks to run code.
    """
    path = os.fspath(path)
    if not path:
        raise ValueError("no checkpoint given: --model_path, --classifier_path or --resume_checkpoint is empty")
    folder, name = os.path.split(path)
    if not exists(path):
        raise FileNotFoundError(f"no checkpoint {path}{config.nearest(name, names_in(folder or '.'))}")
    if os.path.isdir(path):
        held = latest(path)
        raise ValueError(f"{path} is a folder: give " + (f"the checkpoint in it, {held}" if held else "a checkpoint"))
    try:
        with reading(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it then refuses
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # a broken file can fail anywhere, in any way
        # torch seeks before the start of a file that is cut short (EINVAL); other such errors are those of the disk.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(_why_unreadable(path, error)) from error


def _why_unreadable(path, error):
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked:
        return (
            f"refused {path}: it asks for {asked[1]}, which is neither a tensor nor a plain value and could run code;"
            " nothing in it was executed"
        )
    reason = {RuntimeError: _first_line(error), EOFError: "it ends too early"}.get(type(error), "unknown content")
    return f"{path} is not a checkpoint, or an incomplete one ({reason})"


# ------------------------------------------------------------------------------------------------------- config.json

FORMAT = 1
CONFIG_NAME = "config.json"
# What a network computes does not depend on these, so a later run in the same folder may change them.
PASSING = (
    "dropout classifier_dropout use_checkpoint use_fp16 classifier_use_fp16 timestep_respacing use_kl"
    " rescale_learned_sigmas"
).split()


def write_config(folder, kind, flags, class_names=None, **extra):
    """
    Write config.json, which spares whoever opens a checkpoint of the folder its flags.

    :param kind: "diffusion", "classifier" or "super_res".
    :param flags: {name: value}, all options of that network and its process and no others.
    :param class_names: names by label, or None.
    :param extra: anything else worth keeping, as json.
    :raises ValueError: if the folder already holds checkpoints of another kind, or that other flags describe.
    """
    path = os.path.join(folder, CONFIG_NAME)
    earlier = read_config(path)
    if earlier and earlier["kind"] != kind:
        raise ValueError(f"{folder} holds checkpoints of kind {earlier['kind']}: choose another --log_dir for {kind}")
    known = earlier["flags"] if earlier and latest(folder) else {}
    for name in sorted(known.keys() & flags.keys() - set(PASSING)):
        if known[name] != flags[name]:
            raise ValueError(
                f"{folder} holds checkpoints with {name} {known[name]}, which config.json must go on to tell: choose "
                f"another --log_dir for {name} {flags[name]}"
            )
    content = {"format": FORMAT, "kind": kind, "flags": flags, "class_names": class_names, **extra}
    with writing(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def read_config(checkpoint_path):
    """
    The content of the config.json beside a checkpoint: dict with format, kind, flags, class_names and more, or None
    if there is none. Raises ValueError if it cannot be read.
    """
    path = os.path.join(os.path.dirname(os.fspath(checkpoint_path)), CONFIG_NAME)
    if not exists(path):
        return None
    with reading(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid json ({error}): mend it, or delete it and give the flags") from error
    if not isinstance(content, dict) or not isinstance(content.get("flags"), dict) or "kind" not in content:
        raise ValueError(f"{path} lacks kind or flags: mend it, or delete it and give the flags")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')}, but only format {FORMAT} can be read")
    return content


# -------------------------------------------------------------------------------------------- what the tensors tell

NO_FLAGS = ("kind", "attention_downsampling")  # what infer_flags tells besides flags


def infer_flags(state_dict, image_size=None, image_channels=None, path="this"):
    """
    What the names and shapes of a network's tensors determine of the flags that built it.

    Heads, attention order, dropout and the process leave no trace there; neither, in rare classifiers, does the
    division into levels. What is not determined is absent. `num_classes` counts the null class, if there is one.

    :param state_dict: {name: anything with a shape}.
    :param image_size: side of the images (large_size) if known; it turns factors of attention into sides.
    :param image_channels: channels of the images if known; they tell a super-resolution network of C channels with
        learned variance from a plain one of 2C without.
    :param path: what to call the file in errors.
    :return: {flag: value}, also `kind` ("diffusion", "classifier", "super_res") and `attention_downsampling`, the
        factors by which features with attention are smaller than the image.
    :raises ValueError: if these are no weights of such a network.
    """
    shapes = _network_shapes(state_dict, path)
    try:
        return _infer(shapes, image_size, image_channels)
    except (LookupError, ArithmeticError) as error:
        raise ValueError(f"{path} holds no whole network (missing or misshapen: {error})") from error


def _infer(shapes, image_size, image_channels):
    if "init_conv.weight" in shapes:
        return _infer_film(shapes)
    is_unet = any(name.startswith("output_blocks.") for name in shapes)
    found = _unet_head(shapes, image_channels) if is_unet else _classifier_head(shapes)
    base, block = shapes["time_embed.0.weight"][1], "input_blocks.1.0."
    scale_shift = shapes[block + "emb_layers.1.weight"][0] == 2 * shapes[block + "in_layers.2.weight"][0]
    trunk = {"num_channels": base, "use_scale_shift_norm": scale_shift}
    entries = _entries_per_level(shapes, image_size)
    if entries:
        starts = range(1, _blocks(shapes)[-1] + 1, entries)  # the first residual block of each level
        widths = [shapes[f"input_blocks.{n}.0.in_layers.2.weight"][0] for n in starts]
        trunk["num_res_blocks"] = entries - 1
        trunk["channel_mult"] = ",".join(_factor(width, base) for width in widths)
        if len(starts) > 1:
            trunk["resblock_updown"] = f"input_blocks.{entries}.0.op.weight" not in shapes
        if _pool_side(shapes):
            image_size = found["image_size"] = _pool_side(shapes) * 2 ** (len(starts) - 1)
        factors = [2**level for level, n in enumerate(starts) if f"input_blocks.{n}.1.qkv.weight" in shapes]
        found["attention_downsampling"] = tuple(factors)
        if image_size:
            trunk["attention_resolutions"] = ",".join(str(image_size // factor) for factor in factors)
    return found | (trunk if is_unet else {_classifier_name(name): value for name, value in trunk.items()})


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
        "channel_mult": ",".join(_factor(shapes[f"downs.{i}.2.weight"][0], base) for i in stages),
        "attention_downsampling": (),
    }


def _classifier_name(name):
    return {"num_channels": "classifier_width", "num_res_blocks": "classifier_depth"}.get(name, f"classifier_{name}")


def _network_shapes(state_dict, path):
    names = [name for name in state_dict if isinstance(name, str)] if isinstance(state_dict, dict) else []
    known = {"time_embed.0.weight", "init_conv.weight"} & set(names)
    if known and all(hasattr(state_dict[name], "shape") for name in names):
        return {name: tuple(state_dict[name].shape) for name in names}
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


def _entries_per_level(shapes, image_size):
    """Entries of input_blocks a level, that which resamples included, or None if the tensors leave a choice."""
    total = _blocks(shapes)[-1] + 1  # the first convolution stands in for the resampling that the last level lacks
    ups = [name for name in shapes if re.match(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.0)\.weight", name)]
    if ups or "output_blocks.0.0.in_layers.0.weight" in shapes:
        return total // (len(ups) + 1)
    convolutions = _blocks(shapes, r"0\.op\.weight")
    if convolutions:
        return convolutions[0]
    # Resampling blocks of a classifier look like others: but they keep the width, and never have attention.
    possible = [n for n in range(2, total + 1) if total % n == 0 and _could_be_levels(shapes, n, total)]
    if len(possible) > 1 and image_size and _pool_side(shapes):
        possible = [n for n in possible if image_size == _pool_side(shapes) * 2 ** (total // n - 1)]
    return possible[0] if len(possible) == 1 else None


def _could_be_levels(shapes, entries, total):
    widened, attentive = _blocks(shapes, r"0\.skip_connection"), set(_blocks(shapes, r"1\.qkv"))
    levels = [set(range(start, start + entries - 1)) for start in range(1, total, entries)]
    whole = set().union(*(level for level in levels if level <= attentive))
    return all(n % entries == 1 for n in widened) and attentive == whole


def _factor(width, base):
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
    size = inferred.get("image_size") or flags["large_size" if is_super_res else "image_size"]
    base = inferred["classifier_width" if prefix else "num_channels"]
    told = config.parse_channel_mult(inferred[mult_name])
    mult = ()
    with contextlib.suppress(ValueError):
        mult = config.levels(flags[mult_name], size, is_super_res, inferred.get("network") == "film")
    if [int(factor * base) for factor in mult] == [int(factor * base) for factor in told]:
        wrong.pop(mult_name, None)
    factors = {2**level for level in range(len(told))} & set(config.attention_downsampling(flags[attention_name], size))
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
    model.load_state_dict(state_dict)


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
