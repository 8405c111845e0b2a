"""
Crop a set of images once, to the size that training asks for, and write a zip or an npy that loads many times faster.

    python datasets/pack.py SRC OUT.zip|OUT.npy [--image_size 64] [--image_channels 3]

SRC is anything that --data_dir takes. A zip holds PNG files, not compressed again, and dataset.json with the labels, as
StyleGAN's data sets; an npy, which the loader maps instead of loading it, has OUT_labels.npy and OUT_class_names.npy
beside it. OUT.png shows the first images. Trained on with the same --image_size, a pack gives the pixels that SRC
gives; for --random_crop pack larger.
"""

import argparse

from guided_diffusion import config, sizes
from guided_diffusion.network_options import ModelOptions
from guided_diffusion.training_options import TrainOptions


def parse():
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, zip, tar, npz, npy, idx, CIFAR batches or LMDB")
    parser.add_argument("out", help="file to write, NAME.zip or NAME.npy")
    known = config.options(TrainOptions, ModelOptions)
    for name in "image_size image_channels label_from background skip_bad_images num_workers".split():
        config.add_flag(parser, name, known[name].default, **known[name].metadata)
        parser.set_defaults(**{name: known[name].default})
    config.add_flag(parser, "class_cond", True, "write the labels too")
    parser.set_defaults(class_cond=True)
    return parser.parse_args()


config.help_first(__name__, parse)  # before what takes seconds to import

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch as th
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from guided_diffusion import checkpoint, pictures
from guided_diffusion.arrays import GrowingNpy
from guided_diffusion.decoding import MODES, UnreadableImage, check_background
from guided_diffusion.image_datasets import ImageDataset
from guided_diffusion.sources import open_source

KINDS = (".zip", ".npy")
SHOWN = 32  # images in the picture of a pack


class Crops(Dataset):
    """What a worker makes of an image: uint8 [S,S,C], or the text of what is wrong with it."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            x0, _ = self.dataset[index]
        except UnreadableImage as error:
            return str(error)
        return pictures.nearest_uint8(th.from_numpy(x0[None]))[0].numpy()


def pack(source, out, image_size=64, image_channels=3, class_cond=True, label_from="auto", background="white",
         skip_bad_images=False, num_workers=1, progress=True):
    """
    Write the pack; {"images": n, "left out": m, "classes": k}.

    :param out: a path that ends in .zip or .npy; it is there only when whole.
    :param skip_bad_images: leave out what cannot be read, instead of stopping.
    :raises ValueError, OSError: for a source or options that do not fit.
    """
    if not out.endswith(KINDS):
        raise ValueError(f"{out} ends in neither of {', '.join(KINDS)}: choose what to write")
    if image_channels not in MODES:
        raise ValueError(f"image_channels is {image_channels}; choose 1 (grey), 3 (RGB) or 4 (RGBA)")
    check_background(background)
    held = open_source(source, class_cond, label_from)
    dataset = ImageDataset(
        sizes.sides(image_size), held.images, random_flip=False, image_channels=image_channels, background=background
    )
    crops = DataLoader(Crops(dataset), batch_size=None, num_workers=num_workers, collate_fn=_unchanged)
    crops = _readable(tqdm(crops, desc="packed", unit="image", disable=not progress), skip_bad_images)
    write, first = _write_zip if out.endswith(".zip") else _write_npy, []
    kept = write(out, _remembered(crops, first), held)
    labels = [_name(held, index) for index in kept[: len(first)]]
    pictures.save_grid(f"{out[:-4]}.png", np.stack(first), 8, title=", ".join(dict.fromkeys(labels)))
    names = len(held.class_names or ()) or (len(np.unique(held.labels)) if class_cond else 0)
    return {"images": len(kept), "left out": len(dataset) - len(kept), "classes": names}


def _remembered(crops, first):
    """The same, the first of which are kept in a list; ValueError if there is none."""
    for index, crop in crops:
        if len(first) < SHOWN:
            first.append(crop)
        yield index, crop
    if not first:
        raise ValueError("none of the images can be read")


def _name(source, index):
    if source.labels is None:
        return "first images"
    names = dict(enumerate(source.class_names or ()))
    return names.get(int(source.labels[index]), str(source.labels[index]))


def _unchanged(crop):
    return crop


def _readable(crops, skip_bad_images):
    """(index, uint8 [S,S,C]) of those that could be read."""
    for index, crop in enumerate(crops):
        if not isinstance(crop, str):
            yield index, crop
        elif not skip_bad_images:
            raise ValueError(f"{crop}; repair or remove it, or pass --skip_bad_images True to leave it out")
        else:
            tqdm.write(f"left out: {crop}", file=sys.stderr)


def _write_zip(out, crops, source):
    with checkpoint.writing(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        kept, names = [], []
        for index, crop in crops:
            name = f"{len(names) // 1000:05d}/img{len(names):08d}.png"
            content = io.BytesIO()
            Image.fromarray(crop[..., 0] if crop.shape[-1] == 1 else crop).save(content, "png", compress_level=0)
            archive.writestr(zipfile.ZipInfo(name), content.getvalue())  # of no date: twice packed, the same bytes
            kept.append(index)
            names.append(name)
        told = {"labels": None}
        if source.labels is not None:
            told = {"labels": [[name, int(source.labels[index])] for name, index in zip(names, kept)]}
            told |= {"class_names": source.class_names} if source.class_names else {}
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps(told))
    return kept


def _write_npy(out, crops, source):
    stem = out.removesuffix(".npy")
    with checkpoint.writing(out) as file:
        kept, array = [], None
        for index, crop in crops:
            array = array or GrowingNpy(file, crop.shape)
            array.add(crop[None])
            kept.append(index)
        array.finish()
        # Before the array has its name: it is never there without them, nor with an older pack's.
        _write_beside(f"{stem}_labels.npy", None if source.labels is None else source.labels[kept])
        _write_beside(f"{stem}_class_names.npy", np.array(source.class_names) if source.class_names else None)
    return kept


def _write_beside(path, array):
    if array is None:
        return Path(path).unlink(missing_ok=True)
    with checkpoint.writing(path) as file:
        np.save(file, array, allow_pickle=False)


def main():
    args = parse()
    counts = pack(**vars(args))
    print(f"wrote {args.out}: {', '.join(f'{name} {count}' for name, count in counts.items())}")


if __name__ == "__main__":
    config.run_program(main)
