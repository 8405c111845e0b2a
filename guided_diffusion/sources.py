"""
Where images come from: one door, `open_source`, to folders, archives, arrays and databases of them.

A source gives images by index, in an order that does not depend on the system: that of the names, folder by folder,
where there are names, else that of the file. An image is a path, uint8 [H,W,C], or an `archives.Encoded`.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import byte_formats, labels
from .archives import Inside, lmdb_of, tar_of, zip_of
from .arrays import map_npy, read_npy, read_npz
from .decoding import EXTENSIONS, MODES, in_order, is_picture, open_binary

KINDS = "a folder, an npz, npy, zip, tar, idx or CIFAR file, or an LMDB"


@dataclass
class Source:
    """
    Images with what belongs to them: labels int64 [N] or None, class names by label or None, the rule of the labels in
    words, vectors floats [N,D] or [N,M,D] or None, and the name of what made those; texts [N] or [N,M] or None; `names`
    as in the data, or None.
    """

    images: Sequence
    labels: np.ndarray | None = None
    class_names: list | None = None
    rule: str = "no labels"
    vectors: np.ndarray | None = None
    text_encoder: str | None = None
    texts: np.ndarray | None = None
    names: Sequence | None = None

    def fingerprint(self):
        """A text that other data would not have: of files by their names, order and labels alone."""
        if self.names is not None:
            digest = hashlib.sha256("\n".join(self.names).encode(errors="surrogateescape"))
        elif isinstance(self.images, np.ndarray):
            digest = hashlib.sha256(np.ascontiguousarray(self.images))
        else:  # in a file of any size: its shape and some of its images
            rows = np.linspace(0, len(self.images) - 1, min(len(self.images), 256)).astype(int)
            digest = hashlib.sha256(str(len(self.images)).encode())
            for row in rows.tolist():
                digest.update(np.ascontiguousarray(self.images[row]))
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels))
        if self.texts is not None:
            digest.update("\n".join(self.texts.ravel().tolist()).encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def open_source(data_dir, class_cond=False, label_from="auto", class_names=None, vector_channels=0, captions=False):
    """
    The Source of a path, with labels if `class_cond`; the options are those of `image_datasets.load_data`.

    :raises ValueError: for what holds no images, is not whole, or does not fit the options.
    :raises FileNotFoundError: if there is none.
    """
    if not data_dir:
        raise ValueError(f"unspecified data directory: pass --data_dir with {KINDS}")
    labels.check_rule(label_from)
    path = str(data_dir).rstrip("/") or "/"
    if path.endswith(".npz"):
        source = _of_npz(path, vector_channels, captions)
    elif vector_channels or captions:
        wanted = "captions" if captions else f"vectors (vector_channels {vector_channels})"
        raise ValueError(
            f"{path} is no npz, and {wanted} come with the images of one: datasets/captions.py makes it of labelled"
            " images"
        )
    else:
        kind = _kind(path)
        if kind in (_folder_of, zip_of, tar_of, lmdb_of):
            images, names, files = kind(path)
            source = Source(images, names=names)
            if class_cond:
                found = labels.label(names, files, path, label_from, class_names)
                source.labels, source.class_names, source.rule = found
            return source
        source = kind(path)
    if not class_cond:
        source.labels, source.class_names, source.rule = None, None, "no labels"
        return source
    _check_one_each(source, path)
    source.labels, source.class_names = labels.renumbered(
        source.labels.astype(np.int64), source.class_names, class_names, path
    )
    return source


def _kind(path):
    """The function that opens what lies at a path."""
    if "://" in path:
        return _folder_of
    if not os.path.exists(path):
        raise FileNotFoundError(f"data_dir {path} does not exist")
    name = os.path.basename(path).lower()
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "data.mdb")):
            return lmdb_of
        return _of_cifar if byte_formats.cifar_files(path) else _folder_of
    by_end = {".npy": _of_npy, ".zip": zip_of, ".tar": tar_of, ".mdb": lmdb_of}
    found = by_end.get(os.path.splitext(name)[1])
    if found or byte_formats.is_idx_name(name):
        return found or _of_idx
    if byte_formats.is_cifar_name(name):
        return _of_cifar
    if name.endswith((".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ValueError(f"{path} is compressed as a whole, so no picture in it can be read alone: unpack it to a .tar")
    raise FileNotFoundError(f"data_dir {path} is not {KINDS}")


def _check_one_each(source, path):
    count, values = len(source.images), source.labels
    if values is None:
        raise ValueError(f"{path} has no labels: class_cond needs {source.rule}, one integer an image")
    if values.shape != (count,) or values.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: {source.rule} is {values.dtype} {list(values.shape)}; it must hold {count} integers, one an image"
        )


# ------------------------------------------------------------------------------------------------------------ folders


def _folder_of(path):
    """(paths, names, files of labels), as of an archive."""
    paths = list_image_files(path)
    if not paths:
        raise ValueError(f"no images in {path}: looked in depth for files named *.{', *.'.join(EXTENSIONS)}")
    files = {name: f"{path}/{name}" for name in labels.LABEL_FILES.values()}
    files = {name: _content(file) for name, file in files.items() if _is_file(file)}
    return paths, [each[len(path) :].lstrip("/") for each in paths], files


def list_image_files(data_dir):
    """Paths of the image files at any depth, hidden ones too, in the order of their names, folder by folder."""
    if "://" in data_dir:
        import blobfile

        folders = blobfile.walk(data_dir)
    else:
        folders = os.walk(data_dir, followlinks=True)
    paths = [
        f"{folder.replace(os.sep, '/').rstrip('/')}/{name}"
        for folder, _, names in folders
        for name in names
        if is_picture(name)
    ]
    return sorted(paths, key=in_order)


def _is_file(path):
    if "://" not in path:
        return os.path.isfile(path)
    import blobfile

    return blobfile.exists(path)


def _content(path):
    with open_binary(path) as file:
        return file.read()


# ------------------------------------------------------------------------------------------------------------- arrays


class Mapped(Inside):
    """The images of an npy of uint8 [N,H,W,C] that stays on the disk: uint8 [H,W,C], keys being their numbers."""

    def _open(self):
        return map_npy(self.path)

    def _item(self, key, index):
        return np.array(self.handle[key])


def _of_npy(path):
    images = map_npy(path)
    _check_images(images, path, "it")
    stem = path.removesuffix(".npy")
    beside = (f"{stem}_labels.npy", os.path.join(os.path.dirname(path), "labels.npy"))
    told = next((each for each in beside if os.path.isfile(each) and each != path), None)
    names = f"{stem}_class_names.npy"
    source = Source(Mapped(path, range(len(images))), rule=os.path.basename(told or beside[0]))
    source.labels = read_npy(told) if told else None
    source.class_names = read_npy(names).tolist() if os.path.isfile(names) else None
    return source


def _of_npz(path, vector_channels, captions):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"data_dir {path} does not exist")
    more = (("vectors", "text_encoder") if vector_channels else ()) + (("texts",) if captions else ())
    arrays = read_npz(path, ("arr_0", "arr_1", "class_names", *more))
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has no array arr_0 (uint8 [N,H,W,C])")
    images, names = arrays["arr_0"], arrays.get("class_names")
    _check_images(images, path, "arr_0")
    source = Source(images, arrays.get("arr_1"), None if names is None else names.tolist(), "arr_1")
    if vector_channels:
        source.vectors = _checked_vectors(path, arrays.get("vectors"), len(images), vector_channels)
        source.text_encoder = str(arrays.get("text_encoder", "")) or None
    if captions:
        source.texts = _checked_texts(path, arrays.get("texts"), len(images))
    return source


def _checked_texts(path, texts, count):
    if texts is None:
        raise ValueError(f"{path} has no array texts (texts [N] or [N,M]); datasets/captions.py makes it")
    if texts.dtype.kind != "U" or texts.ndim not in (1, 2) or len(texts) != count or not texts.size:
        raise ValueError(
            f"{path}: texts is {texts.dtype} {list(texts.shape)}; it must be one text or as many for each of {count}"
            f" images, [{count}] or [{count},M]"
        )
    return texts


def _of_idx(path):
    images, values = byte_formats.read_idx_images(path)
    _check_images(images, path, "it")
    return Source(images, values, rule=os.path.basename(path).replace("images", "labels").replace("idx3", "idx1"))


def _of_cifar(path):
    images, values, names = byte_formats.read_cifar(path)
    return Source(images, values, names, "the batches")


def _check_images(images, path, name):
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in MODES:
        raise ValueError(
            f"{path}: {name} is {images.dtype} {list(images.shape)}; it must be uint8 [N,H,W,C] with C 1, 3 or 4"
        )
    if len(images) and not images.size:
        raise ValueError(f"{path}: {name} is {list(images.shape)}: images without pixels")


def _checked_vectors(path, vectors, count, size):
    if vectors is None:
        raise ValueError(f"{path} has no array vectors (floats [N,D] or [N,M,D]); datasets/captions.py makes it")
    fits = vectors.ndim in (2, 3) and vectors.shape[0] == count and vectors.shape[-1] == size and vectors.size
    if not fits or vectors.dtype.kind != "f":
        raise ValueError(
            f"{path}: vectors is {vectors.dtype} {list(vectors.shape)}; for {count} images and vector_channels {size}"
            f" it must be floats [{count},{size}] or [{count},M,{size}]"
        )
    bad = ~np.isfinite(vectors).reshape(count, -1).all(1)
    if bad.any():
        raise ValueError(f"{path}: vectors of image {int(bad.argmax())} hold values that are not finite")
    return vectors
