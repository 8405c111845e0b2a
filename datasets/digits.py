"""
Write the 1,797 real handwritten digits that scikit-learn ships as images the loader reads. Nothing is downloaded.

    python datasets/digits.py OUT_DIR [--image_size 8] [--val_fraction 0.2] [--seed 0]

makes OUT_DIR/train/3_0042.png and so on (digit, index in the data set) and OUT_DIR/val with the held-out images: 8x8,
grey, 8 bits. The same options give the same bytes. Source: Alpaydin and Kaynak, Optical Recognition of Handwritten
Digits, UCI Machine Learning Repository, 1998 (its test set).
"""

import argparse

from guided_diffusion import config


def parse():
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("out_dir", help="folder to write; train and val are made in it")
    parser.add_argument("--image_size", type=int, default=8, help="8, or 16 or 32 by bicubic enlargement (default: 8)")
    parser.add_argument("--val_fraction", type=float, default=0.2, help="part of each digit held out (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="decides which images are held out (default: 0)")
    return parser.parse_args()


config.help_first(__name__, parse)  # before what takes seconds to import

from pathlib import Path

import numpy as np

IMAGE_SIZES = (8, 16, 32)


def write_digits(out_dir, image_size=8, val_fraction=0.2, seed=0):
    """
    Write the digits below `out_dir` and return the numbers of images written, as {"train": n, "val": m}.

    :param image_size: 8 keeps the data; 16 and 32 enlarge them by bicubic interpolation.
    :param val_fraction: part of each digit's images that is held out.
    :param seed: decides which ones.
    :raises ValueError: an option that cannot work, or a folder that holds another split.
    :raises ImportError: scikit-learn is not installed.
    :raises OSError: `out_dir` cannot be written.
    """
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size is {image_size}; choose one of {', '.join(map(str, IMAGE_SIZES))}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and less than 1")
    pixels, labels = load_digits()
    held_out = choose_held_out(labels, val_fraction, seed)
    written = {
        Path(out_dir) / ("val" if held_out[index] else "train") / f"{label}_{index:04d}.png": pixels[index]
        for index, label in enumerate(labels)
    }
    stray = sorted(set(Path(out_dir).glob("*/*.png")) - set(written))
    if stray:
        raise ValueError(
            f"{out_dir} holds {len(stray)} images that are not of this split, such as {stray[0]}: remove the folder or "
            "choose another"
        )
    try:
        for path, image in written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            enlarge(image, image_size).save(path)
    except OSError as error:
        raise OSError(f"cannot write to {out_dir} ({error.strerror or error}); choose another folder") from error
    return {"train": int((~held_out).sum()), "val": int(held_out.sum())}


def load_digits():
    """uint8 images [1797,8,8] (ink is bright; the data's 0..16 become 0..255, rounded) and their digits [1797]."""
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError("the digits are those of scikit-learn, which is missing: pip install scikit-learn") from None
    data = datasets.load_digits()
    return np.rint(data.images * 255 / 16).astype(np.uint8), data.target


def choose_held_out(labels, fraction, seed):
    """A mask [N] with `fraction` of each class, rounded, drawn at random."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(len(members) * fraction)]] = True
    return held_out


def enlarge(image, side):
    """uint8 [8,8] -> grey PIL image of that side."""
    from PIL import Image

    picture = Image.fromarray(image)
    return picture if picture.size == (side, side) else picture.resize((side, side), Image.Resampling.BICUBIC)


def main():
    args = parse()
    counts = write_digits(**vars(args))
    print(f"wrote {counts['train']} images to {args.out_dir}/train and {counts['val']} to {args.out_dir}/val")


if __name__ == "__main__":
    config.run_program(main)
