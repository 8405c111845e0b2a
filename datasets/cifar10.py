"""
Bring CIFAR-10, or CIFAR-100, into the npz files that the loader reads.

    python datasets/cifar10.py OUT_DIR [--source WHERE] [--hundred] [--png]

writes OUT_DIR/train.npz and OUT_DIR/test.npz: arr_0 uint8 [N,32,32,3], arr_1 the labels, class_names. WHERE is the
address of a mirror (default: the authors' page; what is fetched is checked, and kept in OUT_DIR), a folder of the
batches, or the .tar.gz of them: the binary version or the one for Python, of which nothing is executed. --png writes
pictures instead, as improved-diffusion's cifar10.py: OUT_DIR/cifar_train/plane_00003.png and OUT_DIR/cifar_test.
Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import argparse

from guided_diffusion import config


def parse():
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", help="folder to write; train.npz and test.npz are made in it")
    config.add_flag(parser, "source", "", "mirror's address, folder of batches, or .tar.gz; empty: the authors' page")
    config.add_flag(parser, "hundred", False, "CIFAR-100, with its fine labels")
    config.add_flag(parser, "png", False, "pictures named as improved-diffusion names them, instead of npz files")
    parser.set_defaults(source="", hundred=False, png=False)
    return parser.parse_args()


config.help_first(__name__, parse)  # before what takes seconds to import

import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion import checkpoint
from guided_diffusion.byte_formats import cifar_files, is_cifar_name, read_cifar
from guided_diffusion.download import fetch

MIRROR = "https://www.cs.toronto.edu/~kriz/"
ARCHIVES = {  # of the authors' page, the binary versions
    10: ("cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530"),
    100: ("cifar-100-binary.tar.gz", "md5:03b5dce01913d631647c71ecec9e9cb8"),
}
META = {"batches.meta.txt", "fine_label_names.txt", "batches.meta", "meta"}
TESTS = ("test_batch.bin", "test_batch", "test.bin", "test")
SHORT = "plane car bird cat deer dog frog horse ship truck".split()  # improved-diffusion's names, by label


def write_cifar(out_dir, source="", classes=10, png=False, archive=None, progress=True):
    """
    Write the files below `out_dir`; {"train": n, "test": m} of the images written.

    :param archive: (name, checksum) of what a mirror has; None: the published one.
    :raises ValueError: for files that are not what their names say; nothing is written then.
    :raises FileNotFoundError, OSError: for files that are not there, cannot be fetched or written.
    """
    if png and classes != 10:
        raise ValueError("pictures are written of CIFAR-10 alone: leave --png away for CIFAR-100")
    out, source = Path(out_dir), str(source or MIRROR)
    if "://" in source:
        name, checksum = archive or ARCHIVES[classes]
        source = str(fetch(f"{source.rstrip('/')}/{name}", out / name, checksum, progress))
    if Path(source).is_dir():
        splits = read_splits(Path(source))
    elif Path(source).is_file():
        with tempfile.TemporaryDirectory() as folder:
            unpack(source, Path(folder))
            splits = read_splits(Path(folder), source)
    else:
        raise FileNotFoundError(f"source {source} is neither an address, nor a folder, nor a file")
    for split, (_, labels, _) in splits.items():
        if labels.max() >= classes:
            raise ValueError(f"{source}: label {labels.max()} in the {split} set is none of {classes} classes")
    out.mkdir(parents=True, exist_ok=True)
    for split, held in splits.items():
        (_write_png if png else _write_npz)(out, split, *held)
    return {split: len(labels) for split, (_, labels, _) in splits.items()}


def read_splits(folder, source=None):
    """{"train": (images, labels, class names), "test": ...} of a folder of batches; see `byte_formats.read_cifar`."""
    test = next((folder / name for name in TESTS if (folder / name).is_file()), None)
    if not cifar_files(folder) or test is None:
        raise FileNotFoundError(f"no batches of CIFAR in {source or folder}, to train on and to test")
    return {"train": read_cifar(folder), "test": read_cifar(test)}


def unpack(path, folder):
    """The batches of a tar into a folder, by their bare names: nothing else is written, and nowhere else."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isreg() and (is_cifar_name(name) or name in META | {"train", "test"}):
                    (folder / name).write_bytes(archive.extractfile(member).read())
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path} as a whole tar: {error}") from error


def _write_npz(out, split, images, labels, names):
    named = {} if names is None else {"class_names": np.array(names)}
    with checkpoint.writing(str(out / f"{split}.npz")) as file:
        np.savez_compressed(file, arr_0=images, arr_1=labels.astype(np.int64), **named)


def _write_png(out, split, images, labels, _):
    folder = out / f"cifar_{split}"
    folder.mkdir(exist_ok=True)
    for number, (image, label) in enumerate(zip(images, labels)):
        with checkpoint.writing(str(folder / f"{SHORT[label]}_{number:05d}.png")) as file:
            Image.fromarray(image).save(file, "png")


def main():
    args = parse()
    counts = write_cifar(args.out_dir, args.source, 100 if args.hundred else 10, args.png)
    print(f"wrote {' and '.join(f'{count} images ({split})' for split, count in counts.items())} to {args.out_dir}")


if __name__ == "__main__":
    config.run_program(main)
