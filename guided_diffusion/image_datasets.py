"""
Images, labels and vectors of captions, from a folder or an npz file, as an endless stream of batches.

Which image comes when, and how it is flipped and cropped, follows from (seed, epoch, index of the image) alone. So the
stream is the same for any number of workers, and R ranks with batches of B see together, at each step, the very images
that one rank with batches of R * B sees.
"""

import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from .arrays import read_npz
from .signals import heed_parent_alone

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff")
LABEL_RULES = ("auto", "prefix", "folder")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# First word of a seed, which keeps the families of random numbers apart.
_ORDER, _ITEM, _TEXT = 0, 1, 2


class UnreadableImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


# ---------------------------------------------------------------------------------------------------------------------
# The public door


def load_data(
    *, data_dir, batch_size, image_size, class_cond=False, deterministic=False, random_crop=False, random_flip=True,
    image_channels=3, num_classes=None, num_workers=1, seed=0, skip_bad_images=False, class_names=None,
    label_from="auto", rank=0, num_ranks=1, first_batch=0, vector_channels=0,
    once=False,
):
    """
    Open `data_dir` and return an `ImageBatches`: an iterator, endless but with `once`, of (x0, cond), where x0 is
    float32 [N,C,H,W] in [-1,1] and cond holds, with `class_cond`, "y" int64 [N] and, with `vector_channels`, "vector"
    float32 [N,D].

    :param data_dir: a folder of images (searched in depth) or an npz file with `arr_0` uint8 [N,H,W,C] and, for labels,
        `arr_1` integers [N], for vectors `vectors` floats [N,D] or, where an image has M texts, [N,M,D].
    :param batch_size: images in a batch of this rank.
    :param deterministic: keep the order of the files in every epoch.
    :param num_classes: if given, labels must lie in 0..num_classes-1.
    :param num_workers: processes that decode images; 0 decodes in this one.
    :param skip_bad_images: put the next readable image in the place of an unreadable one, warn, and count it in
        `bad_images`, instead of stopping.
    :param class_names: the name of each label in order, as a training run recorded it. Without it the names found in
        `data_dir` are sorted alphabetically.
    :param label_from: where a file's class name stands: "prefix" = its name up to the first "_"; "folder" = the first
        folder below data_dir; "auto" = prefix where every name has one and they differ, else folder.
    :param vector_channels: D, the width of the vectors to give with the images; 0: none. Of M vectors one is drawn for
        each image in each epoch.
    :param first_batch: begin this many batches later; a resumed run goes on where it stopped.
    :param once: end after one pass over all images, whose last batch may be smaller or, of a rank without images,
        absent; an endless stream leaves out what makes no full batch.
    :raises ValueError, FileNotFoundError: data or options that cannot work, before anything is decoded. An unreadable
        image raises ValueError from the batch that meets it.
    """
    source = _open_source(data_dir, class_cond, label_from, class_names, vector_channels)
    if once:
        batches_per_epoch = math.ceil(len(range(rank, len(source.images), num_ranks)) / max(batch_size, 1))
    else:
        batches_per_epoch = _batches_per_epoch(data_dir, len(source.images), batch_size, num_ranks)
    if class_cond:
        _check_labels(source, num_classes)
        source.class_names = source.class_names or [str(label) for label in range(source.labels.max() + 1)]
    dataset = ImageDataset(
        image_size, source.images, source.labels, random_crop=random_crop, random_flip=random_flip,
        image_channels=image_channels, seed=seed, vectors=source.vectors,
    )
    keys = _batch_keys(
        len(dataset), batch_size, batches_per_epoch, None if deterministic else seed, rank, num_ranks, first_batch
    )
    loader = DataLoader(
        _BatchReader(dataset, skip_bad_images),
        batch_size=None,  # a key of the sampler is a whole batch
        sampler=itertools.islice(keys, batches_per_epoch if once else None),
        num_workers=num_workers,
        worker_init_fn=heed_parent_alone,
        generator=torch.Generator(),  # else the loader would draw from the global one
    )
    return ImageBatches(loader, source, batches_per_epoch, _fingerprint(source, str(data_dir)))


def _batches_per_epoch(data_dir, num_images, batch_size, num_ranks):
    """Full batches that every rank has in an epoch; all ranks drop the same tail, so that their epochs end together."""
    images_per_rank = num_images // num_ranks
    if not 1 <= batch_size <= images_per_rank:
        remedy = f"pass a batch_size from 1 to {images_per_rank}" if images_per_rank else "use fewer processes"
        raise ValueError(
            f"{data_dir} holds {num_images} images, {images_per_rank} for each of {num_ranks} rank(s), which makes no "
            f"batch of {batch_size}: {remedy}, or add images"
        )
    return images_per_rank // batch_size


def _fingerprint(source, data_dir):
    if isinstance(source.images, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(source.images))
    else:
        digest = hashlib.sha256("\n".join(path[len(data_dir) :].lstrip("/") for path in source.images).encode())
    if source.labels is not None:
        digest.update(np.ascontiguousarray(source.labels))
    return digest.hexdigest()[:16]


class ImageBatches:
    """
    The endless iterator that `load_data` returns.

    Attributes: `num_images` in the data; `batches_per_epoch` of this rank; `class_names` [list of str; the numbers
    where labels have no names; None without labels]; `label_rule`, a phrase for the log; `text_encoder`, the name of
    what made the vectors, or None; `fingerprint`, a text that other data would not have (of files, their names and
    order alone); `bad_images`, how many files were skipped so far.
    """

    def __init__(self, loader, source, batches_per_epoch, fingerprint):
        self.num_images = len(source.images)
        self.batches_per_epoch = batches_per_epoch
        self.class_names = source.class_names
        self.label_rule = source.rule
        self.fingerprint = fingerprint
        self.text_encoder = source.text_encoder
        self._bad = set()
        self._batches = iter(loader)

    @property
    def bad_images(self):
        return len(self._bad)

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._batches)
        if isinstance(batch, UnreadableImage):
            self._batches = iter(())  # stops the workers; collected with the traceback's cycle, they would take seconds
            raise ValueError(f"{batch}; repair or remove it, or pass --skip_bad_images True to go on without it")
        x0, cond, bad = batch
        for message in bad:
            if message not in self._bad:
                self._bad.add(message)
                warnings.warn(f"{message}; skipped, {self.bad_images} so far", stacklevel=2)
        return x0, cond


# ---------------------------------------------------------------------------------------------------------------------
# One image


class ImageDataset(Dataset):
    """
    One shard of a set of images; an item is (float32 [C,S,S] in [-1,1], {"y": int64, "vector": float32 [D]}), of which
    the dict holds what there is.

    `dataset[i]` draws a fresh flip, crop and vector; `dataset[epoch, i]` draws those of (seed, epoch, i).

    :param image_paths: files, or one uint8 array [N,H,W,C].
    :param classes: a label for each, or None.
    :param vectors: floats [N,D], or [N,M,D] to draw one of M from, or None.
    :raises UnreadableImage: from an item whose file cannot be decoded.
    """

    def __init__(
        self,
        resolution,
        image_paths,
        classes=None,
        shard=0,
        num_shards=1,
        random_crop=False,
        random_flip=True,
        *,
        image_channels=3,
        seed=0,
        vectors=None,
    ):
        super().__init__()
        if image_channels not in MODES:
            raise ValueError(f"image_channels is {image_channels}; choose 1 (grey), 3 (RGB) or 4 (RGBA)")
        self.resolution = resolution
        self.local_images = image_paths[shard:][::num_shards]
        self.local_classes = None if classes is None else classes[shard:][::num_shards]
        self.local_vectors = None if vectors is None else vectors[shard:][::num_shards]
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.mode = MODES[image_channels]
        self.seed = seed

    def __len__(self):
        return len(self.local_images)

    def __getitem__(self, key):
        index = key[-1] if isinstance(key, tuple) else key
        rng = np.random.default_rng((_ITEM, self.seed, *key) if isinstance(key, tuple) else None)
        image = _decode(self.local_images[index], self.mode)
        flip = self.random_flip and rng.random() < 0.5
        if self.random_crop:
            pixels = random_crop_arr(image, self.resolution, rng=rng)
        else:
            pixels = center_crop_arr(image, self.resolution)
        pixels = pixels.reshape(self.resolution, self.resolution, -1)  # [S,S,C]; a grey one came as [S,S]
        if flip:
            pixels = pixels[:, ::-1]
        x0 = np.transpose(pixels.astype(np.float32) / 127.5 - 1, [2, 0, 1])  # [C,S,S]
        cond = {}
        if self.local_classes is not None:
            cond["y"] = np.array(self.local_classes[index], dtype=np.int64)
        if self.local_vectors is not None:
            cond["vector"] = self._vector(index, key)
        return x0, cond

    def _vector(self, index, key):
        """[D]; drawn by numbers of its own, so that crops and flips are the same with it and without."""
        vectors = self.local_vectors[index].astype(np.float32)                    # [D] or [M,D]
        if vectors.ndim == 1:
            return vectors
        rng = np.random.default_rng((_TEXT, self.seed, *key) if isinstance(key, tuple) else None)
        return vectors[rng.integers(len(vectors))]


def center_crop_arr(pil_image, image_size):
    """The centre square of an image whose short side is brought to `image_size`: uint8 [S,S,C], or [S,S] if grey."""
    pixels = _resize_short_side(pil_image, image_size)
    top = (pixels.shape[0] - image_size) // 2
    left = (pixels.shape[1] - image_size) // 2
    return pixels[top : top + image_size, left : left + image_size]


def random_crop_arr(pil_image, image_size, min_crop_frac=0.8, max_crop_frac=1.0, rng=None):
    """
    A random square of an image whose short side is brought to a random length, so that the square covers between
    `min_crop_frac` and `max_crop_frac` of it: uint8 [S,S,C], or [S,S] if grey. `rng` is a numpy Generator.
    """
    rng = np.random.default_rng() if rng is None else rng
    shortest, longest = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    pixels = _resize_short_side(pil_image, int(rng.integers(shortest, longest + 1)))
    top = rng.integers(pixels.shape[0] - image_size + 1)
    left = rng.integers(pixels.shape[1] - image_size + 1)
    return pixels[top : top + image_size, left : left + image_size]


def _resize_short_side(pil_image, length):
    # Halving by BOX averages every pixel; one bicubic step from far larger would alias in older Pillow.
    while min(pil_image.size) >= 2 * length:
        pil_image = pil_image.resize(tuple(side // 2 for side in pil_image.size), Image.Resampling.BOX)
    scale = length / min(pil_image.size)
    sides = tuple(round(side * scale) for side in pil_image.size)
    return np.array(pil_image.resize(sides, Image.Resampling.BICUBIC))


def _decode(source, mode, file=None):
    """The PIL image of a path or of uint8 [H,W,C]; file: opened by the caller, and `source` only its name."""
    if isinstance(source, np.ndarray):  # [H,W,C]
        return Image.fromarray(source[..., 0] if source.shape[-1] == 1 else source).convert(mode)
    try:
        with file or _open_binary(source) as file:
            image = Image.open(file)
            image.load()
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels are {image.mode}, more than 8 bits, and would saturate; convert it to 8 bits")
        return image.convert(mode)
    except UnidentifiedImageError:
        raise UnreadableImage(f"cannot read image {source}: not a picture in a format that Pillow knows") from None
    except Exception as error:  # decoders of broken files raise almost anything
        raise UnreadableImage(f"cannot read image {source}: {error}") from error


def _open_binary(path):
    if "://" not in path:
        return open(path, "rb")
    import blobfile

    return blobfile.BlobFile(path, "rb")


# ---------------------------------------------------------------------------------------------------------------------
# Order and batches


def _batch_keys(num_images, batch_size, batches_per_epoch, seed, rank, num_ranks, first_batch):
    """For ever: the (epoch, index) of each image of this rank's next batch. Item i of an epoch goes to rank i mod R."""
    drawn = None
    for number in itertools.count(first_batch):
        epoch, batch = divmod(number, batches_per_epoch)
        if epoch != drawn:
            drawn = epoch
            order = np.arange(num_images)
            if seed is not None:
                np.random.default_rng((_ORDER, seed, epoch)).shuffle(order)
            mine = order[rank::num_ranks]
        yield [(epoch, index) for index in mine[batch * batch_size : (batch + 1) * batch_size].tolist()]


class _BatchReader(Dataset):
    """
    What a worker runs: the keys of a batch -> (x0, cond, messages about skipped files), or the error that the main
    process shall raise (raised here, it would arrive wrapped in the text of two tracebacks).
    """

    def __init__(self, dataset, skip_bad_images):
        self.dataset = dataset
        self.skip_bad_images = skip_bad_images

    def __getitem__(self, keys):
        bad = []
        try:
            items = [self._read(epoch, index, bad) for epoch, index in keys]
        except UnreadableImage as error:
            return error
        x0 = torch.from_numpy(np.stack([x for x, _ in items]))  # [N,C,S,S]
        names = items[0][1]
        return x0, {name: torch.from_numpy(np.stack([cond[name] for _, cond in items])) for name in names}, bad

    def _read(self, epoch, index, bad):
        for offset in range(len(self.dataset)):
            try:
                return self.dataset[epoch, (index + offset) % len(self.dataset)]
            except UnreadableImage as error:
                if not self.skip_bad_images:
                    raise
                bad.append(str(error))
        raise UnreadableImage(f"none of the {len(self.dataset)} images can be read; the last: {bad[-1]}")


# ---------------------------------------------------------------------------------------------------------------------
# Sources and their labels


@dataclass
class _Source:
    images: Sequence  # paths, or uint8 [N,H,W,C]
    labels: np.ndarray | None = None  # int64 [N]
    class_names: list | None = None
    rule: str = "no labels"
    vectors: np.ndarray | None = None  # floats [N,D] or [N,M,D]
    text_encoder: str | None = None


def _open_source(data_dir, class_cond, label_from, class_names, vector_channels=0):
    if not data_dir:
        raise ValueError("unspecified data directory: pass --data_dir with a folder of images or an npz file")
    if label_from not in LABEL_RULES:
        raise ValueError(f"label_from is {label_from!r}; choose one of {', '.join(LABEL_RULES)}")
    data_dir = str(data_dir).rstrip("/") or "/"
    if data_dir.endswith(".npz"):
        return _open_npz(data_dir, class_cond, class_names, vector_channels)
    if "://" not in data_dir and not os.path.isdir(data_dir):
        kind = "is neither a folder nor an npz file" if os.path.exists(data_dir) else "does not exist"
        raise FileNotFoundError(f"data_dir {data_dir} {kind}")
    if vector_channels:
        raise ValueError(
            f"{data_dir} is a folder, and vectors (vector_channels {vector_channels}) come with the images of an npz:"
            " datasets/captions.py makes one of a labelled folder"
        )
    paths = _list_image_files_recursively(data_dir)
    if not paths:
        raise ValueError(f"no images in {data_dir}: looked in depth for files named *.{', *.'.join(EXTENSIONS)}")
    if not class_cond:
        return _Source(paths)
    names, rule = _class_name_of_each(paths, data_dir, label_from)
    class_names = sorted(set(names)) if class_names is None else list(class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    unknown = sorted(set(names) - label_of.keys())
    if unknown:
        raise ValueError(
            f"{data_dir} holds class {unknown[0]!r}, which is not one of the {len(class_names)} known classes: "
            f"{_shorten(class_names)} (labels by {rule})"
        )
    return _Source(paths, np.array([label_of[name] for name in names]), class_names, rule)


def _list_image_files_recursively(data_dir):
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
        if "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS
    ]
    return sorted(paths, key=lambda path: path.split("/"))


def _class_name_of_each(paths, data_dir, label_from):
    """The class name of each file and, in words, the rule that gave it."""
    inside = [path[len(data_dir) :].lstrip("/").split("/") for path in paths]
    prefixes = [parts[-1].split("_")[0] for parts in inside]
    folders = [parts[0] for parts in inside if len(parts) > 1]
    bare = next((path for path, parts in zip(paths, inside) if "_" not in parts[-1]), None)
    loose = next((path for path, parts in zip(paths, inside) if len(parts) == 1), None)
    if label_from == "auto":
        if bare is None and (len(set(prefixes)) > 1 or not folders):
            label_from = "prefix"
            _warn_if_folders_differ(prefixes, folders)
        elif loose is None:
            label_from = "folder"
        else:
            raise ValueError(
                f"no class labels in {data_dir}: name the files CLASS_anything.EXT or put them into one folder a class "
                f"({bare or loose} fits neither)"
            )
    if label_from == "prefix":
        if bare is not None:
            raise ValueError(f"label_from is prefix, but {bare} has no '_' in its name; rename it or use folder")
        return prefixes, "file-name prefix"
    if loose is not None:
        raise ValueError(f"label_from is folder, but {loose} lies in no sub-folder; move it into one or use prefix")
    return folders, "sub-folder"


def _warn_if_folders_differ(prefixes, folders):
    if len(folders) == len(prefixes) and len(set(folders)) > 1:
        by_prefix, by_folder, by_both = len(set(prefixes)), len(set(folders)), len(set(zip(prefixes, folders)))
        if not by_prefix == by_folder == by_both:
            warnings.warn(
                f"labels come from the {by_prefix} file-name prefixes ({_shorten(prefixes)}), not from the {by_folder} "
                f"sub-folders ({_shorten(folders)}); label_from=folder takes those",
                stacklevel=2,
            )


def _shorten(names, most=10):
    names = sorted(set(names))
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _open_npz(path, class_cond, class_names, vector_channels):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"data_dir {path} does not exist")
    more = ("vectors", "text_encoder") if vector_channels else ()
    arrays = read_npz(path, ("arr_0", "arr_1", "class_names", *more))
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has no array arr_0 (uint8 [N,H,W,C])")
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in MODES:
        raise ValueError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}; it must be uint8 [N,H,W,C] with C 1, 3 or 4"
        )
    source = _Source(images)
    if vector_channels:
        source.vectors = _checked_vectors(path, arrays.get("vectors"), len(images), vector_channels)
        source.text_encoder = str(arrays.get("text_encoder", "")) or None
    return _with_labels(source, path, arrays, class_names) if class_cond else source


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


def _with_labels(source, path, arrays, class_names):
    images, labels = source.images, arrays.get("arr_1")
    if labels is None:
        raise ValueError(f"{path} has no labels: class_cond needs arr_1, one integer an image")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: arr_1 is {labels.dtype} {list(labels.shape)}; it must hold {len(images)} integers, one an image"
        )
    if class_names is None and "class_names" in arrays:
        class_names = arrays["class_names"].tolist()
    source.labels, source.rule = labels.astype(np.int64), "arr_1"
    source.class_names = None if class_names is None else list(class_names)
    return source


def _check_labels(source, num_classes):
    """Labels lie in 0..limit-1, the limit being `num_classes` or else the number of known names."""
    known = source.class_names or []
    limit = len(known) or None if num_classes is None else num_classes
    lowest, highest = int(source.labels.min()), int(source.labels.max())
    if lowest < 0:
        raise ValueError(f"label {lowest} in the data is negative; labels count from 0")
    if limit is not None and highest >= limit:
        name = f" ({known[highest]!r})" if highest < len(known) else ""
        raise ValueError(
            f"label {highest}{name} in the data does not fit {limit} classes, whose labels are 0..{limit - 1}; these "
            f"data need num_classes {highest + 1} (labels by {source.rule})"
        )
