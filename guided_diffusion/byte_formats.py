"""
Data sets that are arrays of bytes in formats of their own: idx (MNIST), and CIFAR's batches, binary or pickled.

Nothing in a file is executed: the reader of pickles knows plain values and arrays of bytes, and builds nothing else.
"""

import gzip
import io
import pickle
import re
import zlib
from pathlib import Path

import numpy as np

_PIXELS = 3 * 32 * 32
_CIFAR_NAME = re.compile(r"(data_batch(_\d+)?|test_batch)(\.bin)?$|(train|test)\.bin$")


def read_idx(path):
    """
    An idx file of bytes, packed by gzip if so named: uint8 of the shape that it states.

    The format: two zeros, 8 for bytes, the number of axes, each axis as 4 bytes (big end first), then the values.

    :raises ValueError: if it is none, or not whole.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        data = gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged or not whole: {error}") from error
    axes = data[3] if len(data) > 3 else 0
    if data[:3] != b"\0\0\x08" or not axes or len(data) < 4 + 4 * axes:
        raise ValueError(f"{path} is no idx file of bytes: it begins with {data[:4].hex(' ')}, not with 00 00 08")
    shape = tuple(np.frombuffer(data, ">u4", axes, 4).tolist())
    values = len(data) - 4 - 4 * axes
    if values != np.prod(shape, dtype=object):
        raise ValueError(f"{path} is not whole: {values} values for the shape {list(shape)}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def is_idx_name(name):
    """Whether a file of this name is one of MNIST's kind."""
    return bool(re.search(r"idx\d-ubyte(\.gz)?$", name))


def read_idx_images(path):
    """(uint8 [N,H,W,C], labels [N] or None): of train-images-idx3-ubyte, and train-labels-idx1-ubyte where it is."""
    path = Path(path)
    images = read_idx(path)
    if images.ndim == 3:
        images = images[..., None]                                                # [N,H,W,1]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{path} holds {list(images.shape)} bytes; images are [N,H,W] or [N,H,W,C] with C 1, 3 or 4")
    name = re.sub(r"idx\d", "idx1", path.name.replace("images", "labels"))
    beside = [path.with_name(name.removesuffix(".gz") + packing) for packing in ("", ".gz")]
    found = next((each for each in beside if each != path and each.is_file()), None)
    return images, None if found is None else read_idx(found)


# -------------------------------------------------------------------------------------------------------------- CIFAR


def is_cifar_name(name):
    """Whether a file of this name is a batch of CIFAR-10 or CIFAR-100."""
    return bool(_CIFAR_NAME.match(name))


def cifar_files(path):
    """The batches that a path stands for: itself, or of a folder those to train on, in order; [] if it has none."""
    path = Path(path)
    if path.is_file():
        return [path]
    for pattern in ("data_batch_[0-9]*", "train.bin"):
        found = sorted((p for p in path.glob(pattern) if is_cifar_name(p.name)), key=lambda p: (len(p.name), p.name))
        if found:
            return found
    return [path / "train"] if (path / "meta").is_file() and (path / "train").is_file() else []


def read_cifar(path):
    """
    (uint8 [N,32,32,3], labels uint8 [N], class names or None) of a batch file or a folder of them; CIFAR-100's labels
    are the fine ones.

    :raises ValueError: for what is no batch, or not whole.
    """
    files = cifar_files(path)
    batches = [_read_binary(each) if each.suffix == ".bin" else _read_pickled(each) for each in files]
    images = np.concatenate([pixels.reshape(-1, 3, 32, 32) for pixels, _ in batches]).transpose(0, 2, 3, 1)
    labels = np.concatenate([labels for _, labels in batches])
    return np.ascontiguousarray(images), labels, _class_names(files[0].parent, labels.max(initial=0) + 1)


def _read_binary(path):
    """(pixels [N,3072], labels [N]): a record is a label, for CIFAR-100 a coarse and a fine one, and the pixels."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    label_bytes = 2 if path.name in ("train.bin", "test.bin") else 1
    if not len(data) or len(data) % (label_bytes + _PIXELS):
        raise ValueError(
            f"{path} is no whole batch of CIFAR: {len(data)} bytes make no records of {label_bytes} + {_PIXELS}"
        )
    records = data.reshape(-1, label_bytes + _PIXELS)
    return records[:, label_bytes:], records[:, label_bytes - 1]


def _read_pickled(path):
    content = read_plain_pickle(path)
    content = content if isinstance(content, dict) else {}
    pixels, labels = content.get("data"), content.get("fine_labels", content.get("labels"))
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
        raise ValueError(f"{path} has no array data of bytes [N,{_PIXELS}]")
    whole = isinstance(labels, list) and all(type(label) is int and 0 <= label < 256 for label in labels)
    if not whole or len(labels) != len(pixels):
        raise ValueError(f"{path} has no list of {len(pixels)} labels")
    return pixels, np.array(labels, np.uint8)


def _class_names(folder, count):
    """Those of the files that come with the batches, if they name `count` classes; else None."""
    for name in ("batches.meta.txt", "fine_label_names.txt"):
        if (folder / name).is_file():
            names = (folder / name).read_text().split()
            return names if len(names) >= count else None
    for name, key in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
        if (folder / name).is_file():
            content = read_plain_pickle(folder / name)
            names = content.get(key) if isinstance(content, dict) else None
            return names if isinstance(names, list) and len(names) >= count else None
    return None


def read_plain_pickle(path):
    """
    What a pickle holds, if it is made of dicts, lists, tuples, texts, numbers and arrays of bytes.

    :raises ValueError: if it asks for anything else, which is not built, or is damaged.
    """
    try:
        return _texts(_PlainUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="bytes").load())
    except OSError:
        raise
    except Exception as error:  # pickles that are none raise almost anything
        raise ValueError(f"cannot read {path} as a pickle of plain values: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Stand-ins of ours take the place of the three names that an array of bytes needs; no other name is looked up."""

    def find_class(self, module, name):
        known = {"_reconstruct": _begin, "ndarray": _Bytes, "dtype": _Type}
        inside = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        if inside and name in known:
            return known[name]
        if (module, name) == ("_codecs", "encode"):  # how newer Pythons write bytes for older ones
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not read")


class _Type:
    def __init__(self, code=None, *_):
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, _):
        pass


class _Bytes:
    array = None

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Type) or kind.code not in ("u1", "|u1"):
            raise ValueError("it holds an array that is not of bytes")
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


def _begin(*_):
    return _Bytes()


def _encode(text, *_):
    return text.encode("latin1") if isinstance(text, str) else text


def _texts(value):
    """Bytes as texts, also inside, and the stand-ins as arrays."""
    if isinstance(value, dict):
        return {_texts(key): _texts(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_texts(each) for each in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.array if isinstance(value, _Bytes) else value
