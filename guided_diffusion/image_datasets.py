"""
Images, labels and vectors of captions, from wherever `sources` finds them, as an endless stream of batches.

Which image comes when, and how it is flipped and cropped, follows from (seed, epoch, index of the image) alone. So the
stream is the same for any number of workers, and R ranks with batches of B see together, at each step, the very images
that one rank with batches of R * B sees.
"""

import itertools
import math
import warnings

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .archives import Encoded
from .decoding import BACKGROUND, MODES, UnreadableImage, check_background, decode
from .labels import warn_of_gaps
from .signals import heed_parent_alone
from .sources import list_image_files as _list_image_files_recursively  # the original's name  # noqa: F401
from .sources import open_source

# First word of a seed, which keeps the families of random numbers apart.
_ORDER, _ITEM, _TEXT = 0, 1, 2


# ---------------------------------------------------------------------------------------------------------------------
# The public door


def load_data(
    *, data_dir, batch_size, image_size, class_cond=False, deterministic=False, random_crop=False, random_flip=True,
    image_channels=3, num_classes=None, num_workers=1, seed=0, skip_bad_images=False, class_names=None,
    label_from="auto", rank=0, num_ranks=1, first_batch=0, vector_channels=0, once=False, background=BACKGROUND,
    captions=False,
):  # fmt: skip
    """
    Open `data_dir` and return an `ImageBatches`: an iterator, endless but with `once`, of (x0, cond), where x0 is
    float32 [N,C,H,W] in [-1,1] and cond holds, with `class_cond`, "y" int64 [N], with `vector_channels`, "vector"
    float32 [N,D] and, with `captions`, "text" int64 [N], numbers of texts in the stream's `texts`.

    :param data_dir: a folder of images (searched in depth), a zip or tar of them, an LMDB; or arrays: an npz file with
        `arr_0` uint8 [N,H,W,C] and, for labels, `arr_1` integers [N], for vectors `vectors` floats [N,D] or, where an
        image has M texts, [N,M,D], for captions `texts` [N] or [N,M]; an npy, which is not loaded but mapped, with
        NAME_labels.npy or labels.npy beside it; an idx file; batches of CIFAR.
    :param batch_size: images in a batch of this rank.
    :param image_size: side in pixels, or (height, width).
    :param deterministic: keep the order of the files in every epoch.
    :param num_classes: if given, labels must lie in 0..num_classes-1.
    :param num_workers: processes that decode images; 0 decodes in this one.
    :param skip_bad_images: put the next readable image in the place of an unreadable one, warn, and count it in
        `bad_images`, instead of stopping.
    :param class_names: the name of each label in order, as a training run recorded it. Without it the names found in
        `data_dir` are sorted alphabetically.
    :param label_from: where a file's class stands: "prefix" = its name up to the first "_"; "folder" = the first folder
        below data_dir; "csv" = labels.csv, "json" = dataset.json in data_dir; "auto" = one of these files where it is,
        else prefix where every name has one and they differ, else folder.
    :param vector_channels: D, the width of the vectors to give with the images; 0: none. Of M vectors one is drawn for
        each image in each epoch; of M texts likewise, the same one.
    :param captions: give the texts of the images.
    :param first_batch: begin this many batches later; a resumed run goes on where it stopped.
    :param once: end after one pass over all images, whose last batch may be smaller or, of a rank without images,
        absent; an endless stream leaves out what makes no full batch.
    :param background: the colour behind transparent pixels, where no alpha is asked for; "none": alpha is dropped.
    :raises ValueError, FileNotFoundError: data or options that cannot work, before anything is decoded. An unreadable
        image raises ValueError from the batch that meets it.
    """
    check_background(background)
    source = open_source(data_dir, class_cond, label_from, class_names, vector_channels, captions)
    if once:
        batches_per_epoch = _batches_of_a_pass(len(source.images), batch_size, rank, num_ranks)
    else:
        batches_per_epoch = _batches_per_epoch(data_dir, len(source.images), batch_size, num_ranks)
    if class_cond:
        _settle_labels(source, num_classes, told=class_names is not None)
    texts, numbers = _numbered(source.texts)
    dataset = ImageDataset(
        image_size, source.images, source.labels, random_crop=random_crop, random_flip=random_flip,
        image_channels=image_channels, seed=seed, vectors=source.vectors, background=background, texts=numbers,
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
    return ImageBatches(loader, source, batches_per_epoch, source.fingerprint(), texts)


def _numbered(texts):
    """(the different texts, sorted, and the number of each text among them), or (None, None) without texts."""
    if texts is None:
        return None, None
    unique, numbers = np.unique(texts, return_inverse=True)
    return unique.tolist(), numbers.reshape(texts.shape)


def _batches_of_a_pass(num_images, batch_size, rank, num_ranks):
    """Batches, the last one of them maybe smaller, that this rank has in one pass over all images."""
    return math.ceil(len(range(rank, num_images, num_ranks)) / max(batch_size, 1))


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


def _settle_labels(source, num_classes, told):
    """Check the labels, warn of classes without images where their names were not told, and name those without one."""
    _check_labels(source, num_classes)
    if not told:
        warn_of_gaps(source.labels, source.class_names, source.rule)
    source.class_names = source.class_names or [str(label) for label in range(source.labels.max() + 1)]


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


class ImageBatches:
    """
    The endless iterator that `load_data` returns.

    Attributes: `num_images` in the data; `batches_per_epoch` of this rank; `class_names` [list of str; the numbers
    where labels have no names; None without labels]; `label_rule`, a phrase for the log; `text_encoder`, the name of
    what made the vectors, or None; `texts`, the different captions, or None; `fingerprint`, a text that other data
    would not have (of files, their names and order alone); `bad_images`, how many files were skipped so far.
    """

    def __init__(self, loader, source, batches_per_epoch, fingerprint, texts=None):
        self.num_images = len(source.images)
        self.batches_per_epoch = batches_per_epoch
        self.class_names = source.class_names
        self.label_rule = source.rule
        self.fingerprint = fingerprint
        self.text_encoder = source.text_encoder
        self.texts = texts
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
    One shard of a set of images; an item is (float32 [C,H,W] in [-1,1], {"y": int64, "vector": float32 [D], "text":
    int64}), of which the dict holds what there is.

    `dataset[i]` draws a fresh flip, crop, vector and text; `dataset[epoch, i]` draws those of (seed, epoch, i).

    :param resolution: side in pixels, or (height, width).
    :param image_paths: files, or one uint8 array [N,H,W,C], or the images of a `sources.Source`.
    :param classes: a label for each, or None.
    :param vectors: floats [N,D], or [N,M,D] to draw one of M from, or None.
    :param texts: numbers of texts [N], or [N,M] likewise, or None.
    :param background: the colour behind transparent pixels; see `decoding.decode`.
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
        background=BACKGROUND,
        texts=None,
    ):
        super().__init__()
        if image_channels not in MODES:
            raise ValueError(f"image_channels is {image_channels}; choose 1 (grey), 3 (RGB) or 4 (RGBA)")
        self.resolution = resolution if isinstance(resolution, tuple) else (resolution, resolution)
        self.local_images = image_paths[shard:][::num_shards]
        self.local_classes = None if classes is None else classes[shard:][::num_shards]
        self.local_vectors = None if vectors is None else vectors[shard:][::num_shards]
        self.local_texts = None if texts is None else texts[shard:][::num_shards]
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.mode, self.background = MODES[image_channels], background
        self.seed = seed

    def __len__(self):
        return len(self.local_images)

    def __getitem__(self, key):
        index = key[-1] if isinstance(key, tuple) else key
        rng = np.random.default_rng((_ITEM, self.seed, *key) if isinstance(key, tuple) else None)
        image = self.local_images[index]
        name, file = image if isinstance(image, Encoded) else (image, None)
        image = decode(name, self.mode, file, self.background)
        flip = self.random_flip and rng.random() < 0.5
        if self.random_crop:
            pixels = random_crop_arr(image, self.resolution, rng=rng)
        else:
            pixels = center_crop_arr(image, self.resolution)
        pixels = pixels.reshape(*self.resolution, -1)  # [H,W,C]; a grey one came as [H,W]
        if flip:
            pixels = pixels[:, ::-1]
        x0 = np.transpose(pixels, [2, 0, 1]).astype(np.float32, order="C")  # [C,H,W]
        x0 /= 127.5
        x0 -= 1
        cond = {}
        if self.local_classes is not None:
            cond["y"] = np.array(self.local_classes[index], dtype=np.int64)
        if self.local_vectors is not None:
            cond["vector"] = self._one_of(self.local_vectors[index].astype(np.float32), 1, key)    # [D]
        if self.local_texts is not None:
            cond["text"] = np.array(self._one_of(self.local_texts[index], 0, key), dtype=np.int64)
        return x0, cond

    def _one_of(self, values, axes, key):
        """One of M, if there are more; drawn by numbers of its own, so that crops and flips are the same without."""
        if values.ndim == axes:
            return values
        rng = np.random.default_rng((_TEXT, self.seed, *key) if isinstance(key, tuple) else None)
        return values[rng.integers(len(values))]


def center_crop_arr(pil_image, image_size):
    """
    The centre of an image that is brought to cover `image_size`, a side or (height, width), touching two of its edges:
    uint8 [H,W,C], or [H,W] if grey.
    """
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    pixels = _resize_to_cover(pil_image, height, width)
    top = (pixels.shape[0] - height) // 2
    left = (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def random_crop_arr(pil_image, image_size, min_crop_frac=0.8, max_crop_frac=1.0, rng=None):
    """
    A random part of `image_size`, a side or (height, width), of an image that is brought to a random scale, so that the
    part covers between `min_crop_frac` and `max_crop_frac` of its tighter side: uint8 [H,W,C], or [H,W] if grey.
    `rng` is a numpy Generator.
    """
    rng = np.random.default_rng() if rng is None else rng
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    side = min(height, width)
    drawn = int(rng.integers(math.ceil(side / max_crop_frac), math.ceil(side / min_crop_frac) + 1))
    pixels = _resize_to_cover(pil_image, math.ceil(height * drawn / side), math.ceil(width * drawn / side))
    top = rng.integers(pixels.shape[0] - height + 1)
    left = rng.integers(pixels.shape[1] - width + 1)
    return pixels[top : top + height, left : left + width]


def _resize_to_cover(pil_image, height, width):
    """Pixels of the image, its shape kept, at the least size of at least so many rows and columns."""
    # Halving by BOX averages every pixel; one bicubic step from far larger would alias in older Pillow.
    while pil_image.width >= 2 * width and pil_image.height >= 2 * height:
        pil_image = pil_image.resize(tuple(side // 2 for side in pil_image.size), Image.Resampling.BOX)
    scale = max(width / pil_image.width, height / pil_image.height)
    sides = tuple(round(side * scale) for side in pil_image.size)
    return np.array(pil_image if pil_image.size == sides else pil_image.resize(sides, Image.Resampling.BICUBIC))


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
