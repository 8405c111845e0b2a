"""
Bring MNIST, or Fashion-MNIST, into the npz files that the loader reads.

    python datasets/mnist.py OUT_DIR [--source WHERE] [--fashion]

writes OUT_DIR/train.npz and OUT_DIR/test.npz: arr_0 uint8 [N,28,28,1], arr_1 the labels. WHERE is the address of a
mirror (default: the usual one; what is fetched is checked, and kept in OUT_DIR/idx), a folder with the four files in
the original idx format, packed by gzip or not, or an npz with x_train, y_train and, if there is one, the test set.
Sources: LeCun, Bottou, Bengio and Haffner, Proc. IEEE 86, 1998; Xiao, Rasul and Vollgraf, arXiv 1708.07747.
"""

import argparse

from guided_diffusion import config


def parse():
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("out_dir", help="folder to write; train.npz and test.npz are made in it")
    where = "address of a mirror, folder of idx files, or npz with x_train; empty: the usual mirror"
    config.add_flag(parser, "source", "", where)
    config.add_flag(parser, "fashion", False, "Fashion-MNIST, whose files have the same names, instead of the digits")
    parser.set_defaults(source="", fashion=False)
    return parser.parse_args()


config.help_first(__name__, parse)  # before what takes seconds to import

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guided_diffusion import arrays as plain
from guided_diffusion import checkpoint
from guided_diffusion.byte_formats import read_idx
from guided_diffusion.download import fetch

FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class Original:
    """Where a data set is, the md5 of its four files in the order of FILES, and the names of its classes."""

    url: str
    md5: tuple
    class_names: tuple = ()


MNIST = Original(
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
)
FASHION = Original(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def write_mnist(out_dir, source="", original=MNIST, progress=True):
    """
    Write train.npz and, where there is one, test.npz below `out_dir`; {"train": n, "test": m} of what was written.

    Nothing is written before everything has been read.

    :param source: a mirror, a folder or an npz, as above; empty: `original.url`.
    :raises ValueError: for files that are not what their names say.
    :raises FileNotFoundError, OSError: for files that are not there, cannot be fetched or written.
    """
    out, source = Path(out_dir), str(source or original.url)
    if "://" in source:
        folder = out / "idx"
        for name, md5 in zip(FILES.values(), original.md5):
            fetch(f"{source.rstrip('/')}/{name}.gz", folder / f"{name}.gz", f"md5:{md5}", progress)
        arrays = read_folder(folder)
    elif Path(source).is_dir():
        arrays = read_folder(Path(source))
    elif Path(source).is_file():
        arrays = read_npz(source)
    else:
        raise FileNotFoundError(f"source {source} is neither an address, nor a folder, nor a file")
    splits = {split: _checked(arrays, split, source) for split in ("train", "test") if f"x_{split}" in arrays}
    names = {"class_names": np.array(original.class_names)} if original.class_names else {}
    out.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in splits.items():
        with checkpoint.writing(str(out / f"{split}.npz")) as file:
            np.savez_compressed(file, arr_0=images[..., None], arr_1=labels, **names)
    return {split: len(labels) for split, (_, labels) in splits.items()}


def read_folder(folder):
    """The four arrays, from files as in FILES, or train-images.idx3-ubyte and so on as some mirrors have them."""
    found = {}
    for key, name in FILES.items():
        variants = [name, name.replace("-idx", ".idx")]
        names = [variant + packing for variant in variants for packing in ("", ".gz")]
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no {name} and no {name}.gz in {folder}")
        found[key] = read_idx(path)
    return found


def read_npz(path):
    """The arrays of an npz as Keras writes it; the test set may be missing."""
    arrays = plain.read_npz(path, FILES)
    has_test = bool(arrays.keys() & {"x_test", "y_test"})
    wanted = [name for name in FILES if has_test or name.endswith("_train")]
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]}: it needs x_train and y_train, and x_test only with y_test")
    return arrays


def _checked(arrays, split, source):
    """(images uint8 [N,28,28], labels int64 [N]) of a split."""
    images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or not len(images):
        raise ValueError(f"{source}: x_{split} is {images.dtype} {list(images.shape)}, not uint8 [N,28,28]")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{source}: y_{split}, {labels.dtype} {list(labels.shape)}, gives no label 0..9 to each image")
    return images, labels.astype(np.int64)


def main():
    args = parse()
    counts = write_mnist(args.out_dir, args.source, FASHION if args.fashion else MNIST)
    print(f"wrote {' and '.join(f'{count} images to {args.out_dir}/{split}.npz' for split, count in counts.items())}")


if __name__ == "__main__":
    config.run_program(main)
