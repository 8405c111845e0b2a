"""Pictures of results as png files in memory. The door to the project's pictures: they are imported on use."""

import io


def grid(images, columns, **captions):
    """The png of images (uint8 [N,H,W,C]) in rows of `columns`; captions as guided_diffusion.pictures.grid has them."""
    from guided_diffusion import pictures

    buffer = io.BytesIO()
    pictures.grid(images, columns, **captions).save(buffer, "PNG")
    return buffer.getvalue()


def curves(lines, xlabel, ylabel, title):
    """The png of {name: (xs, ys, errors...)} as lines, as guided_diffusion.pictures.draw_curves draws them."""
    from guided_diffusion import pictures

    buffer = io.BytesIO()
    pictures.draw_curves(lines, xlabel, ylabel, title).savefig(buffer, format="png")
    return buffer.getvalue()


def writing(path):
    """A context with a binary file that takes its name when all of it is on the disk, and leaves no trace otherwise."""
    from guided_diffusion import checkpoint

    return checkpoint.writing(str(path))


def write(path, content):
    """Write bytes or text as the file `path`, whole or not at all."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
