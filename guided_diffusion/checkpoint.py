"""
Checkpoint files: their names, writing that leaves no half file, reading that runs no code, config.json beside them.

A path with "://" in it (gs://, az://, https://) is read and written by blobfile, which is imported only then.
"""

import contextlib
import errno
import io
import json
import os
import re
import warnings

import torch

from . import config, tensor_files

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


def is_safetensors(path):
    """Whether a path's name says that the file is of that format."""
    return os.fspath(path).endswith(".safetensors")


def save(obj, path):
    """
    Write an object of tensors and plain values; NAME.safetensors: {name: tensor}. Raises OSError, with an earlier file
    of that name left as it was.
    """
    if is_safetensors(path):
        return save_safetensors(obj, path)
    with writing(os.fspath(path)) as file:
        torch.save(obj, file)


def save_safetensors(tensors, path, content=None):
    """Write {name: tensor} and, if given, the content of a config.json into one file, as `save`."""
    texts = {"format": "pt"} | ({CONFIG_KEY: json.dumps(content, sort_keys=True)} if content else {})
    with writing(os.fspath(path)) as file:
        tensor_files.write(file, tensors, texts)


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
        if "unet" in names_in(path) or "diffusion_pytorch_model.safetensors" in names_in(path):
            raise ValueError(f"{path} is a folder of diffusers: make a checkpoint of it by scripts/convert.py")
        raise ValueError(f"{path} is a folder: give " + (f"the checkpoint in it, {held}" if held else "a checkpoint"))
    if is_safetensors(path):
        with reading(path) as file:
            return tensor_files.read(file, path, map_location)
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
    if "legacy .tar" in str(error):  # torch would have it unpickled after all
        return f"{path} is not a checkpoint, or an incomplete one (a tar, as of torch before 1.0)"
    reason = {RuntimeError: _first_line(error), EOFError: "it ends too early"}.get(type(error), "unknown content")
    return f"{path} is not a checkpoint, or an incomplete one ({reason})"


# ------------------------------------------------------------------------------------------------------- config.json

FORMAT = 1
CONFIG_NAME = "config.json"
CONFIG_KEY = "guided_diffusion"  # of the text in a safetensors file that is its config.json
# What a network computes does not depend on these, so a later run in the same folder may change them.
PASSING = (
    "dropout classifier_dropout use_checkpoint checkpoint_levels use_fp16 classifier_use_fp16 timestep_respacing use_kl"
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
    content = config_content(kind, flags, class_names, **extra)
    with writing(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def config_content(kind, flags, class_names=None, **extra):
    """What config.json holds; as `write_config`."""
    return {"format": FORMAT, "kind": kind, "flags": flags, "class_names": class_names, **extra}


def where_config(path):
    """What to call the config.json of a checkpoint, or what a safetensors file holds in its place, in messages."""
    return f"{CONFIG_NAME} {'inside' if _config_inside(path) else 'beside'} {path}"


def _config_inside(path):
    if not is_safetensors(path) or not exists(path):
        return None
    with reading(path) as file:
        return tensor_files.read_texts(file, path).get(CONFIG_KEY)


def read_config(checkpoint_path):
    """
    The content of the config.json inside a safetensors file or beside a checkpoint: dict with format, kind, flags,
    class_names and more, or None if there is none. Raises ValueError if it cannot be read.
    """
    path, text = os.fspath(checkpoint_path), _config_inside(checkpoint_path)
    if text is None:
        path = os.path.join(os.path.dirname(path), CONFIG_NAME)
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
