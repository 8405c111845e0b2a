"""
Tensors to pixels and back, and pictures for people: grids of images with captions, strips of a process, curves.

Pictures need Pillow, curves matplotlib; both are imported on use.
"""

import math
import os
import textwrap

import numpy as np
import torch

BACKGROUND = (250, 250, 248)
INK = (40, 40, 45)
LONGEST_LABEL = 80  # letters beside a row
# Okabe and Ito's colours, which stay apart for colour-blind readers, darkest first.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def to_uint8(x):
    """
    float [N,C,H,W] in [-1,1] -> uint8 [N,H,W,C]: (x + 1) * 127.5, clamped to 0..255 and truncated.

    Truncation, not rounding, is the published samples' conversion (half a grey level darker on average); keep it, since
    scores are compared with theirs.
    """
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()  # [N,H,W,C]


def from_uint8(images):
    """uint8 [N,H,W,C], array or tensor -> float32 [N,C,H,W] in [-1,1], as training reads images."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1               # [N,C,H,W]


def nearest_uint8(x):
    """The inverse of `from_uint8`: rounded, not truncated as drawn samples are, so that pixels come back exactly."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()  # [N,H,W,C]


def psnr(x, truth):
    """Peak signal-to-noise ratio of [N,C,H,W] in [-1,1], in dB: 10 log10(4 / mean square error), [N]; inf if equal."""
    return 10 * torch.log10(4 / (x - truth).square().flatten(1).mean(1))


def read_mask(path, height, width):
    """
    A picture as bool [height,width], true where it is white (128 or more, as grey).

    :raises ValueError: if it has another size.
    """
    from PIL import Image

    with Image.open(path) as image:
        mask = torch.from_numpy(np.array(image.convert("L")) >= 128)
    if mask.shape != (height, width):
        raise ValueError(f"the mask {path} has {mask.shape[0]} x {mask.shape[1]} pixels, the images {height} x {width}")
    return mask


def grid(images, columns, row_labels=None, column_labels=None, title=None, tile=48, gap=4):
    """
    A PIL image with `images` in rows of `columns`, each enlarged by a whole factor until its longer side is `tile`
    pixels or more. Without captions the top left corner of image k is at x = gap + (k % columns) * (w + gap) and
    y = gap + (k // columns) * (h + gap), w and h being the enlarged sides. Captions add margins at the left and the
    top; a title that is wider than the tiles adds one at the right.

    :param images: uint8 [N,H,W,C] with C 1, 3 or 4 (laid on white); array or tensor.
    :param row_labels, column_labels: texts, one for each row or column.
    :raises ValueError: images of another kind, or labels that do not match in number.
    """
    from PIL import Image

    images = _checked(images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    for labels, count, what in ((row_labels, rows, "row"), (column_labels, columns, "column")):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} {what} labels for {count} {what}s")
    factor = max(1, -(-tile // max(images.shape[1:3])))
    tiles = images.repeat(factor, axis=1).repeat(factor, axis=2)  # [N,h,w,C]
    high, wide = tiles.shape[1:3]
    panel = Image.new("RGB", (gap + columns * (wide + gap), gap + rows * (high + gap)), BACKGROUND)
    for k, pixels in enumerate(tiles):
        panel.paste(_to_rgb(pixels), (gap + k % columns * (wide + gap), gap + k // columns * (high + gap)))
    panel = _label_columns(panel, column_labels, gap, wide)
    panel = _label_rows(panel, row_labels, gap, high)
    return _add_title(panel, title)


def save_grid(path, images, columns, **captions):
    """Write `grid(images, columns, **captions)` as the picture file `path`, making its folder if need be."""
    _make_folder(path)
    grid(images, columns, **captions).save(path)


def as_png(pixels):
    """The bytes of a PNG of uint8 [H,W,C], C 1, 3 or 4; the same for the same pixels."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels)).save(buffer, "png")
    return buffer.getvalue()


def save_film(path, frames, columns, frame_ms=120, last_ms=1500, **captions):
    """A GIF whose frames are grids of samples, the last one staying longest; frames: S times uint8 [N,H,W,C]."""
    _make_folder(path)
    shown = [grid(frame, columns, **captions) for frame in frames]
    durations = [frame_ms] * (len(shown) - 1) + [last_ms]
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=durations, loop=0)


def strip(frames, **captions):
    """A grid whose columns are the steps of a process and whose rows are samples; frames: S times uint8 [N,H,W,C]."""
    images = np.stack([np.asarray(frame) for frame in frames], axis=1)  # [N,S,H,W,C]
    return grid(images.reshape(-1, *images.shape[2:]), images.shape[1], **captions)


def save_curves(path, curves, xlabel, ylabel, title, logy=False):
    """Write `draw_curves` of the rest as the picture file `path`, making its folder if need be."""
    figure = draw_curves(curves, xlabel, ylabel, title, logy)
    _make_folder(path)
    figure.savefig(path)


def draw_curves(curves, xlabel, ylabel, title, logy=False):
    """
    A matplotlib figure of {name: (xs, ys)} as lines; the names stand in a legend if there are several.

    (xs, ys, errors) has bars of that length above and below each point, and (xs, ys, errors of xs, errors) to the sides
    as well; None: no bars.
    """
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * cycler(color=LINE_COLOURS))
    for number, (xs, ys, *bars) in enumerate(curves.values()):
        # A name is anything: matplotlib would read $ as mathematics, and hide what begins with _.
        how = {"label": str(number), "linewidth": 1.6, "marker": "o" if len(xs) <= 12 else None, "markersize": 4}
        if bars:
            across, along = [None, *bars][-2:]
            axes.errorbar(xs, ys, along, across, capsize=2, elinewidth=1, **how)
        else:
            axes.plot(xs, ys, **how)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if logy else "linear")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        legend = figure.legend(frameon=False, loc="outside lower center", ncols=2)  # where it hides no line
        for text, name in zip(legend.get_texts(), curves):
            text.set(text=name, parse_math=False)
    return figure


def _make_folder(path):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)


def _checked(images):
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not len(images):
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}; a grid takes uint8 [N,H,W,C] with N > 0 and C 1, 3 or 4"
        )
    return images


def _to_rgb(pixels):
    """uint8 [H,W,C] -> PIL image in RGB; what is transparent shows white."""
    from PIL import Image

    if pixels.shape[-1] == 1:
        return Image.fromarray(pixels[..., 0]).convert("RGB")
    image = Image.fromarray(pixels)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def _label_columns(panel, labels, gap, wide):
    """Centred above each column, in several lines where need be."""
    if not labels:
        return panel
    words = [word for label in labels for word in str(label).split()]
    sizes = range(_text_size(wide), 8, -1)
    font = next((font for font in map(_font, sizes) if _width(font, *words) <= wide), _font(9))
    wrapped = [_wrap(str(label), font, wide) for label in labels]
    margin = _line_height(font) * max(map(len, wrapped)) + gap
    picture, draw = _extend(panel, top=margin)
    for column, lines in enumerate(wrapped):
        centre = gap + column * (wide + gap) + wide / 2
        for k, line in enumerate(lines):
            y = margin - _line_height(font) * (len(lines) - k)
            draw.text((centre - _width(font, line) / 2, y), line, INK, font)
    return picture


def _label_rows(panel, labels, gap, high):
    """Left of each row, at half its height; the rows stand at the bottom of the panel."""
    if not labels:
        return panel
    font, labels = _font(_text_size(high)), [_one_line(str(label)) for label in labels]
    margin = _width(font, *labels) + 2 * gap
    picture, draw = _extend(panel, left=margin)
    first = panel.height - len(labels) * (high + gap)
    for row, label in enumerate(labels):
        y = first + row * (high + gap) + (high - _line_height(font)) / 2
        draw.text((margin - gap - _width(font, label), y), label, INK, font)
    return picture


def _add_title(panel, title):
    if not title:
        return panel
    font, pad = _font(16, "DejaVuSans-Bold"), 8
    lines = _wrap(title, font, max(panel.width, 320) - 2 * pad)
    right = max(0, _width(font, *lines) + 2 * pad - panel.width)
    picture, draw = _extend(panel, top=_line_height(font) * len(lines) + pad, right=right)
    for k, line in enumerate(lines):
        draw.text((pad, pad / 2 + k * _line_height(font)), line, INK, font)
    return picture


def _extend(panel, left=0, top=0, right=0):
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (left + panel.width + right, top + panel.height), BACKGROUND)
    picture.paste(panel, (left, top))
    return picture, ImageDraw.Draw(picture)


def _text_size(tile):
    return min(max(tile // 4, 12), 16)


def _font(size, face="DejaVuSans"):
    """A font that matplotlib brings (Pillow's own lacks accents, Greek and arrows), or else Pillow's."""
    from PIL import ImageFont

    try:
        import matplotlib

        return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf"), size)
    except (ImportError, OSError):
        return ImageFont.load_default()


def _width(font, *texts):
    return max((math.ceil(font.getlength(text)) for text in texts), default=0)


def _line_height(font):
    return font.getbbox("Ag")[3] + 3


def _one_line(text):
    """A text without breaks, which would be drawn over the next row, and not so long that it dwarfs the tiles."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 3]}..."


def _wrap(text, font, width):
    """Lines that fit the width; words are broken only if one is too wide for a line."""
    for letters in range(max(len(text), 1), 0, -1):
        lines = textwrap.wrap(text, letters)
        if _width(font, *lines) <= width:
            break
    return lines
