"""The base samples that a super-resolution model enlarges: from an npz or a folder, in their order."""

import os

import numpy as np
import torch.nn.functional as F

from . import pictures
from .arrays import read_npz
from .image_datasets import load_data
from .sampling import SeededNoise

_NOISE = 1 << 32  # added to a seed: the noise of base samples is none of those that samplers start from


class BaseSamples:
    """
    Small images [N,h,w,C], uint8, with labels int64 [N] or None and the names of their classes, or None.

    :param noise_std: of the Gaussian noise that `batch` adds, a function of the seed and the index.
    """

    def __init__(self, images, labels=None, class_names=None, noise_std=0.0, seed=0):
        if noise_std < 0:
            raise ValueError(f"--low_res_noise is a standard deviation, 0 or more, not {noise_std}")
        self.images, self.labels, self.class_names = images, labels, class_names
        self.noise_std, self.seed = noise_std, seed

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        """Those of the samples with these indices, taken in turn, float32 [n,C,h,w] in [-1,1]."""
        x = pictures.from_uint8(self.images[[i % len(self) for i in indices]])  # [n,C,h,w]
        if self.noise_std:
            x = x + self.noise_std * SeededNoise(self.seed + _NOISE, indices)(x)
        return x


def read_base_samples(path, side, channels, labelled=False, class_names=None, label_from="auto", most=None, **noise):
    """
    The BaseSamples of an npz file or a folder of images, in the order of the file or of the names.

    :param side, channels: of the small images that the model takes. Those of a folder are cropped and resized.
    :param labelled: whether a folder must tell labels; an npz's are read wherever it has them.
    :param class_names: of the model, by which a folder's labels are numbered.
    :param most: read no more of a folder than so many images.
    :raises ValueError, FileNotFoundError: for what holds no such images.
    """
    if not path:
        raise ValueError("no base samples: give --base_samples, an npz of images to enlarge or a folder of them")
    if os.path.isdir(path) or "://" in path:
        return _of_folder(path, side, channels, labelled, class_names, label_from, most, **noise)
    arrays = read_npz(path, ("arr_0", "arr_1", "class_names"))
    if "arr_0" not in arrays:
        raise ValueError(f"{path} has no array arr_0 (uint8 [N,h,w,C])")
    images, labels, names = arrays["arr_0"], arrays.get("arr_1"), arrays.get("class_names")
    if images.dtype != np.uint8 or images.shape[1:] != (side, side, channels) or not len(images):
        raise ValueError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}; the model enlarges uint8"
            f" [N,{side},{side},{channels}]: images of another size may come as a folder, which is cropped to it"
        )
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: arr_1 is {labels.dtype} {list(labels.shape)}; it must hold a label for each image")
    labels = None if labels is None else labels.astype(np.int64)
    return BaseSamples(images, labels, None if names is None else names.tolist(), **noise)


def _of_folder(path, side, channels, labelled, class_names, label_from, most, **noise):
    data = load_data(
        data_dir=path,
        batch_size=1,
        image_size=side,
        image_channels=channels,
        class_cond=labelled,
        class_names=class_names,
        deterministic=True,
        random_flip=False,
        num_workers=0,
        label_from=label_from,
        once=True,
    )
    pairs = [next(data) for _ in range(min(most or data.num_images, data.num_images))]
    images = np.concatenate([pictures.nearest_uint8(x).numpy() for x, _ in pairs])
    labels = np.concatenate([cond["y"].numpy() for _, cond in pairs]) if labelled else None
    return BaseSamples(images, labels, data.class_names, **noise)


def save_pairs(path, base, drawn, columns=4, rows=6):
    """A grid of the first base samples, enlarged without a model, each beside what was drawn of it [N,H,W,C]."""
    count = min(columns * rows, len(drawn))
    x = F.interpolate(base.batch(range(count)), tuple(drawn.shape[1:3]), mode="nearest")
    pairs = np.stack([pictures.to_uint8(x).numpy(), drawn[:count]], axis=1)       # [N,2,H,W,C]
    columns = min(columns, count)
    labels = ["small", "enlarged"] * columns
    pictures.save_grid(path, pairs.reshape(-1, *drawn.shape[1:]), 2 * columns, column_labels=labels)
