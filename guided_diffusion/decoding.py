"""
Pictures from their files to pixels: whatever Pillow opens becomes grey, RGB or RGBA of 8 bits, upright, and flat where
no alpha is wanted.
"""

import warnings

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
BACKGROUND = "white"
DROP_ALPHA = "none"
LONGEST = 100  # times the short side: what is cropped from a longer picture says nothing of it, and takes its memory

# What turns a picture upright, by the EXIF tag 0x0112.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names it."""


def is_picture(name):
    """Whether a file of this name counts as a picture."""
    return "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS


def in_order(name):
    """What pictures are sorted by: their names, folder by folder."""
    return name.split("/")


def check_background(background):
    """Raise ValueError unless this is a colour that Pillow knows, or "none"."""
    try:
        _ = background == DROP_ALPHA or ImageColor.getrgb(background)
    except (ValueError, AttributeError):
        raise ValueError(
            f"background is {background!r}; choose a colour, as white or #ff8000, or none to drop the alpha channel"
        ) from None


def decode(source, mode, file=None, background=BACKGROUND):
    """
    A picture as PIL image of that mode ("L", "RGB" or "RGBA"), turned as its EXIF orientation says.

    16 bits are scaled to 8 (v / 257, rounded); of a film comes the first frame.

    :param source: a path, or uint8 [H,W,C].
    :param file: what to read in place of the path `source`, which then is only a name: an open file, or a function that
        opens one.
    :param background: the colour behind what is transparent, unless the mode has alpha; "none": alpha is dropped, and
        what was hidden shows.
    :raises UnreadableImage: for what is no whole picture, one of no pixels, of more than Pillow's limit of about 89
        million, or more than 100 times as long as wide.
    """
    if isinstance(source, np.ndarray):  # [H,W,C]
        return _in_mode(Image.fromarray(source[..., 0] if source.shape[-1] == 1 else source), mode, background)
    try:
        with _opened(source, file) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of decoders, about pictures that they can read all the same
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)
            _check_sides(*image.size)
            image.load()
            return _in_mode(_upright(_of_8_bits(image)), mode, background)
    except UnidentifiedImageError:
        told = "not a picture in a format that Pillow knows"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        told = f"{str(error).split(', could')[0]}; make it smaller before training"
    except Exception as error:  # decoders of broken files raise almost anything
        told = str(error) or type(error).__name__
    raise UnreadableImage(f"cannot read image {source}: {told}")


def open_binary(path):
    """An open binary file of a path, or of an address that blobfile reads."""
    if "://" not in path:
        return open(path, "rb")
    import blobfile

    return blobfile.BlobFile(path, "rb")


def _opened(source, file):
    if callable(file):
        return file()
    return file or open_binary(source)


def _check_sides(width, height):
    if width < 1 or height < 1:
        raise ValueError(f"it has no pixels, {width} x {height}")
    if max(width, height) > LONGEST * min(width, height):
        raise ValueError(f"its {width} x {height} pixels are more than {LONGEST} times as long as wide; crop it")


def _of_8_bits(image):
    """Grey of 16 bits brought to 8; other modes as they are."""
    # Some Pillows give a PNG of 16 bits as 32-bit integers; those of other files have no range that is known.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are {image.mode}, 32 bits of no known range; convert it to 8 or 16 bits")
    return image


def _upright(image):
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # damaged EXIF beside whole pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _in_mode(image, mode, background):
    if image.mode == mode and "transparency" not in image.info:
        return image
    if mode == "RGBA" or background == DROP_ALPHA or not _transparent(image):
        return image.convert(mode)
    image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert(mode)


def _transparent(image):
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
