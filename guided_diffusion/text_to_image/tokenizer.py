"""
Texts as bytes: nothing is learned, and every script is known.

The tokens of a text are a start, the bytes of its UTF-8 and an end, and padding up to a fixed length. The control
characters U+0000, U+0002 and U+0003, whose bytes those three are, are taken out of a text; no other character has such
a byte. A blank text is padding alone, the null caption, which stands for none.
"""

import torch

PAD, START, END = 0, 2, 3
SIZE = 256  # tokens there are
LENGTH = 64  # tokens of a text, in all

_CONTROLS = str.maketrans("", "", "\x00\x02\x03")


def clean(text):
    """A text without the characters that are taken out."""
    return text.translate(_CONTROLS)


def is_blank(text):
    """Whether nothing is left to say of a text, so that it is the null caption."""
    return not clean(text).strip()


def cut(text, length=LENGTH):
    """A text as `tokenize` takes it: without those control characters, and no longer than whole characters fit."""
    if length < 3:
        raise ValueError(f"a text of {length} tokens has no room between its start and its end: take 3 or more")
    data = clean(text).encode("utf-8", errors="replace")
    return data[: length - 2].decode("utf-8", errors="ignore")


def tokenize(texts, length=LENGTH):
    """
    Texts as tokens: (int64 [N,length], bool [N,length], true where there is no padding). What is too long is cut at a
    whole character, and keeps its end.

    :param texts: a list of texts, or one.
    :raises ValueError: for a length below 3.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    ids = torch.zeros(len(texts), length, dtype=torch.int64)                     # [N,L]
    for row, text in zip(ids, texts):
        data = cut(text, length)
        if data.strip():
            tokens = [START, *data.encode("utf-8"), END]
            row[: len(tokens)] = torch.tensor(tokens)
    return ids, ids != PAD


def decode(ids):
    """Tokens [N,L] as a list of texts; what is no UTF-8 shows as U+FFFD."""
    special = (PAD, START, END)
    return [bytes(i for i in row if i not in special).decode("utf-8", errors="replace") for row in ids.tolist()]
