"""Pages of headings, texts, tables and pictures, as markdown with pictures beside it and as one html file."""

import base64
import html
from typing import NamedTuple

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #28282d; background: #fafaf8; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block;
        overflow-x: auto }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; white-space: nowrap }
pre { background: #f0f0ec; padding: .8rem; overflow-x: auto }
figure { margin: 1rem 0 } img { max-width: 100%; image-rendering: pixelated } figcaption { color: #66666c }
"""


class Heading(NamedTuple):
    """A heading; level 1 is the page's own."""

    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Lines(NamedTuple):
    """Lines as they are, in letters of equal width."""

    lines: list


class Table(NamedTuple):
    """A table of texts."""

    head: list
    rows: list


class Picture(NamedTuple):
    """A png under a name, which is that of its file, with a caption."""

    name: str
    caption: str
    png: bytes


def to_markdown(blocks, folder="pictures"):
    """The text of a page; its pictures are expected as FOLDER/NAME.png beside it."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Lines):
            parts.append("\n".join(["```", *block.lines, "```"]))
        elif isinstance(block, Table):
            rows = [block.head, ["---"] * len(block.head), *block.rows]
            parts.append("\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows))
        elif isinstance(block, Picture):
            parts.append(f"![{block.caption}]({folder}/{block.name}.png)\n\n*{block.caption}*")
        else:
            parts.append(block.text)
    return "\n\n".join(parts) + "\n"


def to_html(blocks):
    """One html file that needs nothing else: its style and pictures are in it."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return "\n".join(["<!doctype html>", f'<html lang="en"><head>{head}</head>', "<body>", *map(_html, blocks),
                      "</body></html>", ""])  # fmt: skip


def _html(block):
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Lines):
        return f"<pre>{html.escape(chr(10).join(block.lines))}</pre>"
    if isinstance(block, Table):
        rows = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
                for tag, row in [("th", block.head), *(("td", row) for row in block.rows)]]  # fmt: skip
        return "<table>" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "</table>"
    if isinstance(block, Picture):
        source, caption = base64.b64encode(block.png).decode(), html.escape(block.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{source}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return f"<p>{html.escape(block.text)}</p>"
