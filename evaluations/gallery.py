"""Pictures of results as png files in memory."""

import io

from evaluations import door


def grid(images, columns, **captions):
    """The png of images (uint8 [N,H,W,C]) in rows of `columns`; captions as guided_diffusion.pictures.grid has them."""
    buffer = io.BytesIO()
    door.pictures().grid(images, columns, **captions).save(buffer, "PNG")
    return buffer.getvalue()


def curves(lines, xlabel, ylabel, title, logy=False):
    """The png of {name: (xs, ys, errors...)} as lines, as guided_diffusion.pictures.draw_curves draws them."""
    buffer = io.BytesIO()
    door.pictures().draw_curves(lines, xlabel, ylabel, title, logy).savefig(buffer, format="png")
    return buffer.getvalue()


def write(path, content):
    """Write bytes or text as the file `path`, whole or not at all."""
    with door.writing(str(path)) as file:
        file.write(content.encode() if isinstance(content, str) else content)
