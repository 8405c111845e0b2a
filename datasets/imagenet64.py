"""
Turn the npz batches of downsampled ImageNet (8x8 to 64x64) into an npy that the loader maps, whatever its size.

    python datasets/imagenet64.py SRC OUT_DIR [--map map_clsloc.txt]

SRC holds train_data_batch_1.npz ... and val_data.npz, or the zips they come in (image-net.org gives them to those who
log in). OUT_DIR gets train.npy [N,S,S,3], train_labels.npy and val.npy, val_labels.npy, as far as SRC has them.

The batches number the classes 1 to 1000 in the order of the challenge's development kit; the published models, and the
names of the files of ImageNet, have the alphabetical order of the identifiers (n01440764, ...). --map, the list of
lines "n02119789 1 kit_fox" that comes with the batches, brings the one into the other and keeps the identifiers as
names; without it a label is the number less one. Source: Chrabaszcz, Loshchilov and Hutter, arXiv 1707.08819.
"""

import argparse

from guided_diffusion import config


def parse():
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of the npz batches, or of the zips that hold them")
    parser.add_argument("out_dir", help="folder to write, with train.npy and val.npy")
    config.add_flag(parser, "map", "", "map_clsloc.txt, to number the classes as the published models do")
    parser.set_defaults(map="")
    return parser.parse_args()


config.help_first(__name__, parse)  # before what takes seconds to import

import contextlib
import math
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from guided_diffusion import checkpoint
from guided_diffusion.arrays import GrowingNpy, read_npz

SPLITS = {"train": r"train_data_batch_(\d+)\.npz$", "val": r"val_data()\.npz$"}
ROWS = 1000  # that are turned about at a time


def write_imagenet(source, out_dir, map="", progress=True):
    """
    Write the arrays; {"train": n, "val": m} of what was found.

    :raises ValueError: for batches that do not fit each other, or are not whole.
    :raises FileNotFoundError: without any.
    """
    names = read_map(map) if map else None
    found = {split: find(Path(source), pattern) for split, pattern in SPLITS.items()}
    if not any(found.values()):
        raise FileNotFoundError(f"no train_data_batch_1.npz and no val_data.npz in {source}, nor a zip that holds them")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, batches in found.items():
        if batches:
            counts[split] = _write(Path(out_dir) / f"{split}.npy", batches, names, progress)
    return counts


def find(source, pattern):
    """(path, member of that zip or None) of the batches of a split, in the order of their numbers."""
    paths = sorted(source.iterdir()) if source.is_dir() else [source] if source.is_file() else []
    held = [(path, None) for path in paths if re.match(pattern, path.name)]
    for path in paths:
        if path.suffix == ".zip":
            try:
                with zipfile.ZipFile(path) as archive:
                    members = archive.namelist()
            except zipfile.BadZipFile as error:
                raise ValueError(f"cannot read {path} as a whole zip: {error}") from error
            held += [(path, name) for name in members if re.match(pattern, name.split("/")[-1])]
    numbered = {}
    for path, member in held:
        number = re.match(pattern, (member or path.name).split("/")[-1])[1]
        if numbered.setdefault(int(number or 0), (path, member)) != (path, member):
            raise ValueError(f"{source} holds {member or path.name} twice: leave one of them away")
    return [numbered[number] for number in sorted(numbered)]


def read_map(path):
    """The identifiers by number, {1: "n02119789", ...}."""
    lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or any(len(line) < 2 or not line[1].isdecimal() for line in lines):
        raise ValueError(f"{path} does not hold lines as 'n02119789 1 kit_fox'")
    names = {int(line[1]): line[0] for line in lines}
    if len(names) != len(lines) or len(set(names.values())) != len(lines):
        raise ValueError(f"{path} has a number or an identifier twice")
    return names


def read_batch(path, member):
    """(data uint8 [N,3*S*S], labels [N]) of a batch, unpacked from its zip for as long as it takes to read."""
    with contextlib.ExitStack() as stack:
        if member:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            with zipfile.ZipFile(path) as archive, archive.open(member) as file, open(f"{folder}/b.npz", "wb") as copy:
                shutil.copyfileobj(file, copy)
            path = f"{folder}/b.npz"
        arrays = read_npz(path, ("data", "labels"))
    data, labels, where = arrays.get("data"), arrays.get("labels"), member or path
    if data is None or labels is None:
        raise ValueError(f"{where} has not the arrays data and labels")
    side = math.isqrt(data.shape[-1] // 3)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * side * side or not data.size:
        raise ValueError(f"{where}: data is {data.dtype} {list(data.shape)}, not uint8 [N,3*S*S]")
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu" or labels.min() < 1:
        raise ValueError(f"{where}: labels are {labels.dtype} {list(labels.shape)}, not numbers from 1, one an image")
    return data.reshape(-1, 3, side, side), labels.astype(np.int64)


def _write(out, batches, names, progress):
    label_of = None if names is None else {number: i for i, number in enumerate(sorted(names, key=names.get))}
    all_labels, array = [], None
    with checkpoint.writing(str(out)) as file:
        for path, member in tqdm(batches, desc=out.stem, unit="batch", disable=not progress):
            data, labels = read_batch(path, member)                               # [N,3,S,S]
            array = array or GrowingNpy(file, (*data.shape[2:], 3))
            for first in range(0, len(data), ROWS):
                array.add(data[first : first + ROWS].transpose(0, 2, 3, 1))       # [n,S,S,3]
            unknown = set(labels.tolist()) - label_of.keys() if label_of else ()
            if unknown:
                raise ValueError(f"{member or path}: class {max(unknown)} is not in --map")
            all_labels += [np.array([label_of[n] for n in labels.tolist()]) if label_of else labels - 1]
        array.finish()
        _save(out.with_name(f"{out.stem}_labels.npy"), np.concatenate(all_labels))
        if names is not None:
            _save(out.with_name(f"{out.stem}_class_names.npy"), np.array(sorted(names.values())))
    return array.count


def _save(path, array):
    with checkpoint.writing(str(path)) as file:
        np.save(file, array, allow_pickle=False)


def main():
    counts = write_imagenet(**vars(parse()))
    print(f"wrote {' and '.join(f'{count} images to {split}.npy' for split, count in counts.items())}")


if __name__ == "__main__":
    config.run_program(main)
