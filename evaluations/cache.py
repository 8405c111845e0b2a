"""Features kept on disk under the content of the images and the network that they are of: no network looks twice."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from evaluations import gallery
from evaluations.features import Features, extract


def extract_once(folder, extractor, images, batch_size=64, progress=None):
    """features.extract of images [N,H,W,C], from a file of `folder` if it has been computed before, else into one.

    The file's name is a hash of the pixels and of the network (its name and, if that is a file, its content), so that a
    file of other weights under the same name is never taken for the same. A damaged file is computed again.
    """
    path = Path(folder) / f"{key_of(extractor, images)}.npz"
    try:
        with np.load(path, allow_pickle=False) as npz:
            return Features(npz["pool"], npz["probabilities"], npz["spatial"] if "spatial" in npz.files else None)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        found = extract(extractor, images, batch_size, progress)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with gallery.writing(path) as file:
        np.savez(file, **{name: value for name, value in found._asdict().items() if value is not None})
    return found


def key_of(extractor, images):
    """The hash, 32 hex digits, of images [N,H,W,C] and of what looks at them."""
    told = hashlib.sha256(f"{extractor.name} {extractor.dim} {images.dtype} {images.shape}".encode())
    if Path(extractor.name).is_file():
        told.update(Path(extractor.name).read_bytes())
    for start in range(0, len(images), 1024):
        told.update(np.ascontiguousarray(images[start : start + 1024]).tobytes())
    return told.hexdigest()[:32]
