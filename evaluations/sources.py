"""Where images come from: an npz that is streamed and never loaded, a folder or zip of pictures, whatever else training
reads, arrays, or a stream of batches.

A source yields its images once, in blocks, the same whatever the number of processes that share it: block b belongs to
rank b mod R. An image is uint8 [H,W,C].
"""

import contextlib
import hashlib
import io
import sys
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from evaluations import door

BLOCK = 256  # images
LOSSY = ("jpg", "jpeg", "webp")
MODES = {1: "L", 3: "RGB"}


class Block(NamedTuple):
    """Images with their places in the whole set."""

    indices: np.ndarray  # int64 [n]
    images: np.ndarray  # uint8 [n,H,W,C]
    labels: np.ndarray | None = None  # int64 [n]


class ImageSet(NamedTuple):
    """Images in memory, by name; moments maps "mu" and "mu_s" to (mean [D], covariance [D,D]) where they are known."""

    name: str
    images: np.ndarray  # uint8 [N,H,W,C]
    labels: np.ndarray | None = None  # [N]
    moments: Mapping = MappingProxyType({})


class Source:
    """What all sources have.

    name; count of images (None: not known beforehand); labels [N] or None; moments, as those of an ImageSet; provenance
    of the moments, a dict; lossy: a compression has touched the pixels (None: not known); label_problem: what is wrong
    with labels that cannot be used, or None.
    """

    count = labels = lossy = label_problem = None
    moments: Mapping = MappingProxyType({})
    provenance: Mapping = MappingProxyType({})
    _looked_at = False

    def __init__(self, name):
        self.name = name

    def check(self):
        """Read all that can be read quickly, once; raises ValueError or OSError for what would fail after hours."""
        if not self._looked_at:
            self._check()
            self._looked_at = True

    def _check(self):
        pass

    def blocks(self, rank=0, num_ranks=1, start=0, stop=None):
        """The Blocks of a rank, of the images start..stop (None: to the end)."""
        raise NotImplementedError

    def take(self, rows):
        """(images [n,H,W,C], labels [n] or None) of some rows, given in ascending order."""
        parts = []
        for block in self.blocks(stop=int(rows[-1]) + 1):
            chosen = np.isin(block.indices, rows)
            parts.append((block.images[chosen], None if block.labels is None else block.labels[chosen]))
        images, labels = zip(*parts)
        return np.concatenate(images), None if labels[0] is None else np.concatenate(labels)

    def _bounds(self, start, stop, step=BLOCK):
        """The rows of each block of start..stop."""
        stop = self.count if stop is None else min(stop, self.count)
        for first in range(start, stop, step):
            yield np.arange(first, min(first + step, stop))

    def fingerprint(self, count):
        """A hex digest of what the first `count` images are, without decoding any; None where that cannot be had."""


class ArraySource(Source):
    """Images [N,H,W,C] in memory."""

    def __init__(self, images, name="array", labels=None, moments=MappingProxyType({})):
        super().__init__(name)
        with blaming(f"{name}, arr_0"):
            _check_shape(images.shape, images.dtype)
            self.images = as_uint8(images)
        self.count = len(images)
        self.labels, self.moments = labels, moments

    def blocks(self, rank=0, num_ranks=1, start=0, stop=None):
        for rows in islice(self._bounds(start, stop), rank, None, num_ranks):
            yield Block(rows, self.images[rows], None if self.labels is None else self.labels[rows])

    def fingerprint(self, count):
        return digest_of(digests(self.images[:count]))


class NpzSource(Source):
    """The images `arr_0` of an npz, read from the zip as they are needed; labels `arr_1`; and what else it holds.

    Files are data: nothing in them is unpickled.
    """

    def __init__(self, path, moments=MappingProxyType({})):
        super().__init__(str(path))
        self.moments = moments
        with self._member() as (_, shape, dtype):
            with blaming(f"{path}, arr_0"):
                _check_shape(shape, dtype)
            self.count, self.shape, self.dtype = shape[0], shape[1:], dtype

    def fits_labels(self, header):
        """Whether the array of this Header (None: there is none) can be labels; else why not is in label_problem."""
        if header is None:
            return False
        if header.shape != (self.count,) or header.dtype.kind not in "iu":
            shape = list(header.shape)
            told = f"labels are {header.dtype} of shape {shape}: expected {self.count} whole numbers"
            self.label_problem = f"{self.name}, arr_1: {told}"
        return not self.label_problem

    def _check(self):
        for _ in self.blocks():
            pass

    def blocks(self, rank=0, num_ranks=1, start=0, stop=None):
        bytes_each = int(np.prod(self.shape)) * self.dtype.itemsize
        with self._member() as (file, _, dtype):
            for number, rows in enumerate([*self._bounds(0, start), *self._bounds(start, stop)]):
                with reading(self.name):
                    data = _read_exactly(file, len(rows) * bytes_each)
                    if rows[-1] + 1 == self.count and file.read(1):  # at its end the checksum is looked at
                        raise ValueError("arr_0 is longer than it says")
                if rows[0] >= start and number % num_ranks == rank:
                    with blaming(f"{self.name}, arr_0"):
                        images = as_uint8(np.frombuffer(data, dtype).reshape(-1, *self.shape))
                    yield Block(rows, images, None if self.labels is None else self.labels[rows])

    def fingerprint(self, count):
        return digest_of(np.concatenate([digests(block.images) for block in self.blocks(stop=count)]))

    @contextmanager
    def _member(self):
        """(file at the first pixel, shape, dtype) of arr_0."""
        with reading(self.name), zipfile.ZipFile(self.name) as archive:
            file = archive.open("arr_0.npy")
            header = read_header(file)
        with file:
            if header.fortran_order:
                raise ValueError(f"{self.name}: arr_0 is in Fortran order: save np.ascontiguousarray(images)")
            yield file, header.shape, header.dtype


class FilesSource(Source):
    """Pictures of a folder, in depth, or of a zip, in the order of their names; all of one size, or made so.

    :param channels: 3 or 1. :param image_size: of a centre crop, made as the training data are, a side or
        "HEIGHTxWIDTH"; None: as they are.
    """

    def __init__(self, path, channels=3, image_size=None):
        super().__init__(str(path))
        self.channels, self.image_size = channels, image_size
        self.archive = None if Path(path).is_dir() else zipfile.ZipFile(path)
        if self.archive:
            self.files = sorted(n for n in self.archive.namelist() if door.is_image_name(n) and "__MACOSX" not in n)
        else:
            self.files = door.image_files(path)
        if not self.files:
            raise ValueError(f"no pictures in {path}")
        self.count = len(self.files)
        self.lossy = any(name.rsplit(".", 1)[1].lower() in LOSSY for name in self.files)

    def _check(self):
        from PIL import Image

        if self.image_size:
            return
        first = None
        for name in self.files:
            with reading(f"{self.name}: {name}"), self._open(name) as file, Image.open(file) as picture:
                size = picture.size[::-1]
            first = first or (size, name)
            if size != first[0]:
                raise ValueError(
                    f"{first[1]} is {first[0][0]}x{first[0][1]} and {name} {size[0]}x{size[1]} (height x width): give "
                    "--image_size N to cut squares of one size out of them"
                )

    def blocks(self, rank=0, num_ranks=1, start=0, stop=None):
        for rows in islice(self._bounds(start, stop), rank, None, num_ranks):
            yield Block(rows, self.take(rows)[0])

    def take(self, rows):
        images = [self._image(self.files[row]) for row in rows]
        if len({image.shape for image in images}) > 1:
            self._check()
        return np.stack(images), None

    def _image(self, name):
        name_told = f"{self.name}: {name}" if self.archive else name
        return self._pixels(door.decode(name_told, MODES[self.channels], self._open(name)))

    def _pixels(self, picture):
        pixels = door.center_crop(picture, self.image_size) if self.image_size else np.array(picture)
        return pixels.reshape(*pixels.shape[:2], self.channels)

    def _open(self, name):
        return io.BytesIO(self.archive.read(name)) if self.archive else open(name, "rb")

    def fingerprint(self, count):
        digest = hashlib.sha256(f"{self.channels} {self.image_size}".encode())
        for name in self.files[:count]:
            size = self.archive.getinfo(name).CRC if self.archive else Path(name).stat().st_size
            digest.update(f"{name if self.archive else Path(name).relative_to(self.name)} {size}\n".encode())
        return digest.hexdigest()


class LoaderSource(FilesSource):
    """What else the training loader reads: a tar of pictures, an npy, idx or CIFAR file, an LMDB; without labels."""

    def __init__(self, path, channels=3, image_size=None):
        Source.__init__(self, str(path))
        self.channels, self.image_size = channels, image_size
        self.images = door.loader_images(path)
        self.count = len(self.images)
        if not self.count:
            raise ValueError(f"no pictures in {path}")
        names = getattr(self.images, "names", None) or ()
        self.lossy = any(name.lower().endswith(LOSSY) for name in names) if names else None

    def _check(self):
        self.take([0])

    def take(self, rows):
        images = [self._pixels(door.decode_item(self.images[int(row)], MODES[self.channels])) for row in rows]
        shapes = sorted({image.shape[:2] for image in images})
        if len(shapes) > 1:
            raise ValueError(
                f"{self.name} holds pictures of {shapes[0]} and {shapes[1]} pixels: give --image_size N to cut squares"
                " of one size out of them"
            )
        return np.stack(images), None

    def fingerprint(self, count):
        digest = hashlib.sha256(f"{self.channels} {self.image_size}".encode())
        for row in range(count):
            digest.update(hashlib.sha256(door.bytes_of(self.images[row])).digest())
        return digest.hexdigest()


class CutSource(Source):
    """The images of another Source brought to one size, as the training data are; moments of theirs no longer hold."""

    def __init__(self, source, image_size):
        super().__init__(source.name)
        self.source, self.image_size = source, image_size
        self.count, self.labels, self.lossy = source.count, source.labels, source.lossy
        self.label_problem = source.label_problem

    def _check(self):
        self.source.check()

    def blocks(self, rank=0, num_ranks=1, start=0, stop=None):
        from PIL import Image

        for block in self.source.blocks(rank, num_ranks, start, stop):
            flat = block.images[..., 0] if block.images.shape[-1] == 1 else block.images
            cut = np.stack([door.center_crop(Image.fromarray(image), self.image_size) for image in flat])
            yield block._replace(images=cut.reshape(*cut.shape[:3], block.images.shape[-1]))

    def fingerprint(self, count):
        known = self.source.fingerprint(count)
        return known and hashlib.sha256(f"{self.image_size} {known}".encode()).hexdigest()


class StreamSource(Source):
    """Batches as they come: each `images`, or `(indices, images, labels)` as the samplers give them (labels or None).

    Images are uint8 arrays [N,H,W,C], or tensors [N,C,H,W], uint8 or floats in [-1,1]. Each rank has a stream of its
    own; without indices rank r of R has images r, r + R and so on. It can be read once.
    """

    def __init__(self, batches, name="stream"):
        super().__init__(name)
        self.batches = batches

    def blocks(self, rank=0, num_ranks=1, start=0, stop=None):
        seen = 0
        for batch in self.batches:
            indices, images, labels = batch if isinstance(batch, tuple) else (None, batch, None)
            images = pixels_of(images)
            if indices is None:
                indices = rank + num_ranks * np.arange(seen, seen + len(images))
            seen += len(images)
            yield Block(np.asarray(list(indices), np.int64), images, None if labels is None else _numbers(labels))


def pixels_of(images):
    """A batch of a stream as uint8 [N,H,W,C] (ValueError for what is none)."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"a tensor of images is {list(images.shape)}: expected [N,C,H,W] with C 1 or 3")
        if images.is_floating_point():
            if not images.isfinite().all() or images.abs().max() > 1.001:
                raise ValueError("a tensor of float images holds values that are not in [-1,1]")
            return door.to_uint8(images)
        images = images.permute(0, 2, 3, 1).cpu().numpy()
    _check_shape(images.shape, images.dtype)
    return as_uint8(images)


def _numbers(labels):
    return (labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)).astype(np.int64)


def open_source(given, channels=3, image_size=None):
    """The Source of a path (npz, folder, zip), an ImageSet, an array [N,H,W,C], an iterable of batches, or a Source."""
    if isinstance(given, Source):
        return given
    if isinstance(given, ImageSet):
        return ArraySource(given.images, given.name, given.labels, given.moments)
    if isinstance(given, np.ndarray):
        return ArraySource(given)
    if isinstance(given, str | Path):
        return _open_path(Path(given), channels, image_size)
    if isinstance(given, Iterable):
        return StreamSource(given)
    raise TypeError(f"{type(given).__name__} is no source of images: give a path, an array or an iterable of batches")


def read_image_set(path, channels=3):
    """All images of a path in memory, for what looks at single ones: an ImageSet. Errors as of `open_source`."""
    source = open_source(path, channels)
    images = np.concatenate([block.images for block in source.blocks()])
    return ImageSet(source.name, images, source.labels, source.moments)


def _open_path(path, channels, image_size):
    if path.is_dir():
        return (LoaderSource if door.is_database(path) else FilesSource)(path, channels, image_size)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an npz file of images, or a folder or zip of pictures")
    if path.suffix == ".pkl":
        raise ValueError(f"{path} is a pickle, which can run code and is not read: ask for its npz, or make one of it")
    if not zipfile.is_zipfile(path):
        if path.suffix != ".npz":
            with contextlib.suppress(FileNotFoundError):  # of a name that says nothing to the loader
                return LoaderSource(path, channels, image_size)
        raise ValueError(f"{path} is not an npz file: write it with np.savez(path, images)")
    with reading(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith(".npy") for name in names):
        from evaluations.reference_files import open_npz

        source = open_npz(path)
        there = getattr(source, "shape", None)
        return CutSource(source, image_size) if image_size and there and there[:2] != door.sides(image_size) else source
    return FilesSource(path, channels, image_size)


# -------------------------------------------------------------------------------------------------------- npy headers


class Header(NamedTuple):
    """The first bytes of an npy file."""

    shape: tuple
    fortran_order: bool
    dtype: np.dtype


def read_header(file):
    """The Header of an npy file that is open at its start; ValueError for arrays of objects, which need a pickle."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version} is not known here")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    header = Header(*read(file))
    if header.dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded: they are pickles, which can run code")
    return header


def _read_exactly(file, size):
    data = file.read(size)
    if len(data) != size:
        raise ValueError("it ends too early")
    return data


# ------------------------------------------------------------------------------------------------------------- checks


def digests(images):
    """SHA-256 of each image, with its shape: uint8 [n,32]."""
    shape = str(images.shape[1:]).encode()
    found = [hashlib.sha256(shape + np.ascontiguousarray(image).tobytes()).digest() for image in images]
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32)


def digest_of(rows):
    """The hex digest of digests [n,32] in their order."""
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()


def _check_shape(shape, dtype):
    if len(shape) != 4 or shape[3] not in (1, 3):
        raise ValueError(
            f"shape {list(shape)}: images must be [N,H,W,C] with C 3 or 1; transpose those of torch, and give "
            "grey ones a last axis"
        )
    if dtype.kind not in "iuf":
        raise ValueError(f"values of type {dtype}: images must be uint8")


def as_uint8(images):
    """Images [N,H,W,C] of any number type as uint8, if they hold whole numbers 0..255 (ValueError otherwise)."""
    if images.dtype == np.uint8 or not len(images):
        return images.astype(np.uint8, copy=False)
    if not np.isfinite(images).all():
        raise ValueError(f"{np.sum(~np.isfinite(images))} NaN or infinite values: images must be uint8")
    if images.min() < 0 or images.max() > 255:
        raise ValueError(f"values {images.min()}..{images.max()}: images must be uint8, 0..255")
    if (images != np.rint(images)).any():
        raise ValueError("fractional values: images must be uint8, whole numbers 0..255, scaled before they are saved")
    return images.astype(np.uint8)


@contextmanager
def blaming(what):
    """Puts the name of what is at fault before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


@contextmanager
def reading(path):
    """Turns whatever a damaged file makes its reader raise into a ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy, zipfile and Pillow raise almost anything
        told = f"it has no array {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {told}; it must be as np.savez or an image program wrote it") from error


def warn(message):
    """A line on stderr."""
    print(f"warning: {message}", file=sys.stderr)
