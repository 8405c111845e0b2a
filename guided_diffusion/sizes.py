"""What the flags of a network say of sizes: the sides of images, and the widths and the attention of its levels."""

import argparse
import contextlib

from .config import parse_float, parse_int


def parse_size(text):
    """A side in pixels, or HEIGHTxWIDTH: an integer, or where the two differ the text "HEIGHTxWIDTH"."""
    height, by, width = str(text).lower().partition("x")
    height, width = parse_int(height), parse_int(width if by else height)
    return height if height == width else f"{height}x{width}"


def sides(size):
    """(height, width) in pixels of what `parse_size` gives."""
    return tuple(map(int, size.split("x"))) if isinstance(size, str) else (size, size)


def size_of(flags):
    """(height, width) in pixels of the images that a network of these flags makes or reads."""
    return sides(flags["large_size"] if "large_size" in flags else flags["image_size"])


def side_of(flags):
    """The shorter of the two sides of `size_of`."""
    return min(size_of(flags))


def check_sides(flags):
    """Raise ValueError unless a super-resolution network of these flags has small images to enlarge."""
    small, large = flags["small_size"], flags["large_size"]
    if not 1 <= small < large:
        raise ValueError(f"--small_size {small} must be from 1 to below --large_size {large}")


def _numbers(text, read, what):
    with contextlib.suppress(argparse.ArgumentTypeError):
        numbers = tuple(read(part) for part in text.split(",")) if text else ()
        if all(number > 0 for number in numbers):
            return numbers
    raise ValueError(f"cannot read {what} {text!r}: give positive numbers with commas between, or nothing")


def parse_channel_mult(text):
    """'0.5,1,2' -> (0.5, 1, 2), '' -> None; a sequence passes as it is. Raises ValueError for anything else."""
    if not isinstance(text, str):
        return tuple(text)

    def factor(part):
        return int(part) if part.strip().isdigit() else parse_float(part)

    return _numbers(text, factor, "channel_mult") or None


def default_channel_mult(image_size, super_res=False):
    """
    Width factors by image side: the paper's (table 11) for 512, 256, 128 and 64, improved-diffusion's for 32, and
    for any other side below 64 those of 32, cut to the halvings that leave an integer of at least 4 pixels; a side
    that this leaves above 8 pixels has no default, since attention always stands at the lowest level.

    :param super_res: the upsamplers (table 13) have at 512 the factors of 256.
    :raises ValueError: for a side without default.
    """
    if super_res and image_size == 512:
        image_size = 256
    table = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
    if image_size in table:
        return table[image_size]
    side, levels = image_size, 1
    while side % 2 == 0 and side >= 8 and levels < 4:
        side, levels = side // 2, levels + 1
    if not 0 < side <= 8:
        raise ValueError(
            f"unsupported image size: {image_size} has no default width factors; give --channel_mult (for a"
            " classifier --classifier_channel_mult), a factor for each level, as 1,2,2; each level halves the side"
        )
    return (1, 2, 2, 2)[:levels]


def levels(channel_mult, image_size, super_res=False, film=False):
    """
    The width factors of the levels that --channel_mult and the image side give; ValueError as the two above.

    :param film: of the network film, which has the same default for every side.
    """
    default = (1, 2, 4, 8) if film else None
    return parse_channel_mult(channel_mult) or default or default_channel_mult(min(sides(image_size)), super_res)


def attention_downsampling(text, image_size):
    """
    Sides in pixels -> factors by which the features are smaller than the image: ('32,16,8', 64) -> (2, 4, 8).
    A side that no level of the network has counts for nothing, as in the original.
    """
    return tuple(min(sides(image_size)) // side for side in _numbers(text, parse_int, "attention_resolutions"))
