"""
Write the pictures of an LSUN category as PNG files of one size, cropped as the original's program of that name does.

    python datasets/lsun_bedroom.py [--image-size 256] [--prefix bedroom] LMDB_PATH OUT_DIR

LMDB_PATH is the folder that github.com/fyu/lsun's download.py gives, the zip that it comes in, or the address of that
zip, which is fetched beside OUT_DIR (then give --checksum md5:HEX). The short side is brought to the size in one step,
by means over areas (BOX), and the centre square cut out: OUT_DIR/bedroom_0000000.png and so on, in the order of the
database. The same command goes on where it was broken off. The loader also reads an LMDB as it is (--data_dir), with
its own crop. Needs the package lmdb. Source: Yu et al., arXiv 1506.03365.
"""

import argparse

from guided_diffusion import config


def parse():
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lmdb_path", help="folder of the LMDB, its zip, or the address of that")
    parser.add_argument("out_dir", help="folder to write")
    parser.add_argument("--image-size", type=config.parse_int, default=256, help="side in pixels (default: 256)")
    parser.add_argument("--prefix", default="bedroom", help="beginning of the names, the class (default: bedroom)")
    parser.add_argument("--checksum", default="", help="of a zip that is fetched, as md5:HEX")
    return parser.parse_args()


config.help_first(__name__, parse)  # before what takes seconds to import

import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from guided_diffusion import checkpoint
from guided_diffusion.archives import lmdb_of
from guided_diffusion.decoding import UnreadableImage, decode
from guided_diffusion.download import fetch


def crop(image, size):
    """The centre square of a PIL image after one BOX step of its short side to `size`: uint8 [S,S,C]."""
    scale = size / min(image.size)
    sides = tuple(round(side * scale) for side in image.size)
    pixels = np.asarray(image.resize(sides, Image.Resampling.BOX))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def write_lsun(lmdb_path, out_dir, image_size=256, prefix="bedroom", checksum="", progress=True):
    """
    Write the pictures; (written now, there already, unreadable and left out). A picture's number is its place in the
    database, whatever was left out before it.

    :raises ValueError, OSError: for what is no whole LMDB, and files that cannot be fetched, unpacked or written.
    """
    out = Path(out_dir)
    if image_size < 1:
        raise ValueError(f"image-size is {image_size}; it must be 1 or more")
    images, _, _ = lmdb_of(_unpacked(lmdb_path, out, checksum, progress))
    out.mkdir(parents=True, exist_ok=True)
    written = present = bad = 0
    for number, (name, opened) in enumerate(tqdm(images, desc="pictures", unit="image", disable=not progress)):
        path = out / f"{prefix}_{number:07d}.png"
        if path.exists():
            present += 1
            continue
        try:
            pixels = crop(decode(name, "RGB", opened), image_size)
        except UnreadableImage as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            bad += 1
            continue
        with checkpoint.writing(str(path)) as file:
            Image.fromarray(pixels).save(file, "png")
        written += 1
    return written, present, bad


def _unpacked(path, out, checksum, progress):
    """The path of the LMDB itself: fetched and unpacked beside `out` where need be, once."""
    if "://" in str(path):
        if not checksum:
            raise ValueError(f"{path} is an address: say by --checksum md5:HEX or sha256:HEX what the file must be")
        path = fetch(path, out.parent / str(path).rsplit("/", 1)[-1], checksum, progress)
    if Path(path).suffix != ".zip":
        return str(path)
    base = out.parent / f"{Path(path).stem}.mdb"
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((info for info in archive.infolist() if info.filename.split("/")[-1] == "data.mdb"), None)
            if member is None:
                raise ValueError("there is no data.mdb in it")
            if not base.exists() or base.stat().st_size != member.file_size:
                base.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, checkpoint.writing(str(base)) as file:
                    shutil.copyfileobj(packed, file, 2**24)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path} as a zip of an LMDB: {error}") from error
    return str(base)


def main():
    written, present, bad = write_lsun(**vars(parse()))
    print(f"wrote {written} pictures; {present} were there, {bad} could not be read")


if __name__ == "__main__":
    config.run_program(main)
