"""
Pictures with captions in one npz that the training programs read: arr_0, arr_1, texts, vectors, text_encoder.

SRC is labelled images (a folder or an npz, as for training), whose captions are templates filled with the class, or one
text a class (--class_texts), or an npz with `images` and `texts`. In a template {class} stands for the name of the
class, {word} for the same with a number from 0 to 9 spelt out. Vectors are made by an encoder of
guided_diffusion/text.py, or come from a file.
"""

import argparse

from guided_diffusion import config


def parse():
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="labelled folder or npz, or npz with images and texts")
    parser.add_argument("out", help="npz to write")
    parser.add_argument("--image_size", type=int, default=32, help="side of the images in pixels (default: 32)")
    parser.add_argument("--image_channels", type=int, default=3, help="1 grey, 3 colour, 4 with alpha (default: 3)")
    parser.add_argument("--templates", nargs="+", help="phrasings, as 'a picture of a {class}' (default: usual ones)")
    parser.add_argument("--hold_out", nargs="*", help="phrasings to keep apart for trying the model")
    parser.add_argument(
        "--class_texts", nargs="+",
        help="instead of phrasings one text a class, each in quotes and in the order of the labels, or fashion-mnist",
    )  # fmt: skip
    parser.add_argument("--val_out", help="npz for images that are held out, drawn at random but always the same")
    parser.add_argument("--val_count", type=int, default=0, help="how many images --val_out gets (default: 0)")
    parser.add_argument(
        "--encoder", default="hashing:512",
        help="text encoder and width; none: no vectors, for CLIP, which reads texts (default: hashing:512)",
    )  # fmt: skip
    parser.add_argument("--vectors", help="npy file of the vectors of the texts, computed elsewhere, as by CLIP")
    return parser.parse_args()


config.help_first(__name__, parse)  # before what takes seconds to import

from pathlib import Path

import numpy as np
import torch as th

from guided_diffusion import checkpoint, text
from guided_diffusion.arrays import read_npz
from guided_diffusion.image_datasets import ImageDataset, load_data
from guided_diffusion.pictures import nearest_uint8

WORDS = "zero one two three four five six seven eight nine".split()
TEMPLATES = ("{class}", "a {class}", "a picture of a {class}", "one {class}")
NUMBER_TEMPLATES = (
    "{word}", "{class}", "a handwritten {word}", "a {word} written by hand", "the digit {class}", "digit {word}",
    "the number {word}", "number {class}",
)  # fmt: skip
CLASS_TEXTS = {
    "fashion-mnist": (
        "An image of a t-shirt/top", "An image of trousers", "An image of a pullover", "An image of a dress",
        "An image of a coat", "An image of a sandal", "An image of a shirt", "An image of a sneaker",
        "An image of a bag", "An image of an ankle boot",
    ),
}  # fmt: skip
NUMBER_HOLD_OUT = ("a picture of a {word}", "the handwritten number {class}", "please draw {word}")


def fill(template, name):
    """
    The caption of a class: "a {word}", "3" -> "a three".

    :raises ValueError: if the template would say the same of every class.
    """
    if "{class}" not in template and "{word}" not in template:
        raise ValueError(f"template {template!r} says the same of every class: put {{class}} or {{word}} into it")
    word = WORDS[int(name)] if name.isdecimal() and int(name) < 10 else name
    return template.replace("{class}", name).replace("{word}", word)


def labelled(source, image_size, image_channels):
    """(uint8 [N,S,S,C], labels [N], class names) of a labelled folder or npz, in the order of the files."""
    data = load_data(
        data_dir=source, batch_size=1, image_size=image_size, image_channels=image_channels, class_cond=True,
        deterministic=True, random_flip=False, num_workers=0,
    )  # fmt: skip
    items = [next(data) for _ in range(data.num_images)]
    images = nearest_uint8(th.cat([x0 for x0, _ in items])).numpy()
    return images, np.concatenate([cond["y"].numpy() for _, cond in items]), data.class_names


def captioned(source, image_size, image_channels):
    """
    (uint8 [N,S,S,C], texts [N,M]) of an npz with `images`, uint8 or floats from 0 to 1, [N,H,W,C], and `texts` [N] or
    [N,M]; None if the npz has no `images`.

    :raises ValueError: if they are something else.
    """
    arrays = read_npz(source, ("images", "texts"))
    if "images" not in arrays:
        return None
    images, texts = arrays["images"], arrays.get("texts")
    if images.dtype.kind == "f" and images.size and images.min() >= 0 and images.max() <= 1:
        images = np.rint(images * 255).astype(np.uint8)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{source}: images is {images.dtype} {list(images.shape)}; it must be [N,H,W,C], uint8 or floats from 0 to"
            " 1"
        )
    if texts is None or texts.dtype.kind != "U" or texts.ndim not in (1, 2) or len(texts) != len(images):
        raise ValueError(f"{source}: texts must hold {len(images)} texts, one or as many for each image, [N] or [N,M]")
    dataset = ImageDataset(image_size, images, random_flip=False, image_channels=image_channels)
    x = th.from_numpy(np.stack([dataset[i][0] for i in range(len(dataset))]))     # [N,C,S,S]
    return nearest_uint8(x).numpy(), texts.reshape(len(texts), -1)


def vectors_of(texts, encoder, path):
    """float32 [N,M,D] for texts [N,M]: each encoded once, or those of a file, which must fit, else ValueError."""
    if path:
        vectors = text.read_vectors(path)
        if vectors.shape[:-1] not in (texts.shape, texts.shape[:1]):
            fit = " x ".join(map(str, texts.shape))
            raise ValueError(f"{path} holds vectors {list(vectors.shape)}; the {fit} texts need [N,D] or [N,M,D]")
        return vectors
    unique, place = np.unique(texts, return_inverse=True)
    return text.encode(encoder, unique.tolist())[place.reshape(texts.shape)]


def phrasings(names, templates=None, hold_out=None, class_texts=None):
    """(texts of each class [K,M], a list of (text kept apart, label)) as `write_captions` is asked for them."""
    if class_texts:
        return text_of_each_class(class_texts, names, templates, hold_out)[:, None], []
    numbers = all(name in map(str, range(10)) for name in names)
    templates = templates or (NUMBER_TEMPLATES if numbers else TEMPLATES)
    hold_out = (NUMBER_HOLD_OUT if numbers else ()) if hold_out is None else hold_out
    both = set(templates) & set(hold_out)
    if both:
        raise ValueError(f"{both.pop()!r} is both a template and held out: choose")
    apart = [(fill(template, name), y) for template in hold_out for y, name in enumerate(names)]
    return np.array([[fill(template, name) for template in templates] for name in names]), apart


def text_of_each_class(class_texts, names, templates, hold_out):
    """
    The one text of every class, in the order of the labels; those of a name in CLASS_TEXTS, or given.

    :raises ValueError: if they are not as many as the classes, or phrasings are asked for as well.
    """
    if templates or hold_out:
        raise ValueError("--class_texts say all of a class: drop --templates and --hold_out")
    texts = CLASS_TEXTS.get(class_texts[0], class_texts) if len(class_texts) == 1 else class_texts
    if len(texts) != len(names):
        listed = f"{len(names)} classes: {', '.join(names)}"
        raise ValueError(f"--class_texts are {len(texts)}, and the images have {listed}")
    return np.array(texts)


def parted(arrays, count):
    """
    Two npz of one: without `count` images, drawn by a fixed seed, and those alone; each in the order that they had.

    :raises ValueError: if there are not more images than that.
    """
    total = len(arrays["arr_0"])
    if not 0 < count < total:
        raise ValueError(f"--val_count {count} of {total} images: hold out at least 1 and fewer than all")
    apart = np.zeros(total, bool)
    apart[np.random.default_rng(0).permutation(total)[:count]] = True
    each = {"arr_0", "arr_1", "texts", "vectors"}
    return [{name: a[rows] if name in each else a for name, a in arrays.items()} for rows in (~apart, apart)]


def write_captions(source, out, image_size, image_channels=3, templates=None, hold_out=None, encoder="hashing:512",
                   vectors=None, class_texts=None, val_out=None, val_count=0):
    """
    Write the npz and return its texts [N,M].

    :param templates: phrasings of a class; None: a few usual ones. :param hold_out: phrasings that are filled in for
        every class and kept apart, as `held_out` [H] with `held_out_labels`, to try the model on.
    :param class_texts: instead of phrasings the one text of each class, or a name in CLASS_TEXTS.
    :param val_out: npz that so many of the images, `val_count`, are held out in; None: all are in `out`.
    :param vectors: npy file of the texts' vectors, in the order of `texts` as an earlier run wrote them, or None.
    :raises ValueError, OSError: for a source, templates, vectors or an encoder that cannot be used.
    """
    arrays = {}
    given = captioned(source, image_size, image_channels) if source.endswith(".npz") and Path(source).exists() else None
    if given:
        if class_texts:
            raise ValueError(f"{source} has texts of its own: drop --class_texts")
        arrays["arr_0"], texts = given
    else:
        arrays["arr_0"], labels, names = labelled(source, image_size, image_channels)
        phrased, apart = phrasings(names, templates, hold_out, class_texts)
        texts = phrased[labels]                                                   # [N,M]
        arrays |= {"arr_1": labels, "class_names": np.array(names)}
        arrays |= {"held_out": np.array([t for t, _ in apart]), "held_out_labels": np.array([y for _, y in apart])}
    arrays["texts"] = texts
    if vectors or encoder != "none":
        arrays["text_encoder"] = np.array(text.PRECOMPUTED if vectors else encoder)
        arrays["vectors"] = vectors_of(texts, encoder, vectors)
    if bool(val_out) != bool(val_count):
        raise ValueError("--val_out and --val_count, a file and how many images it gets, go together: give both")
    parts = parted(arrays, val_count) if val_out else [arrays]
    for path, part in zip((out, val_out), parts):
        with checkpoint.writing(path) as file:
            np.savez_compressed(file, **part)
    return texts


def main():
    args = parse()
    texts = write_captions(**vars(args))
    print(f"wrote {len(texts)} images with {texts.shape[1]} texts each to {args.out}")


if __name__ == "__main__":
    config.run_program(main)
