"""
Texts as vectors: a table of encoders, named as "hashing:128", kind and width.

A new encoder is one function and one row. What the project cannot compute, such as CLIP's vectors, comes as a file
(`datasets/captions.py --vectors`, `--prompt_vectors`) and is recorded as PRECOMPUTED.
"""

import numpy as np

from .arrays import read_npy
from .schedules import unknown

PRECOMPUTED = "precomputed"


def hashing(texts, size):
    """
    Words and pairs of neighbouring words, each hashed to one of `size` places with a sign (Weinberger et al. 2009,
    arXiv 0902.2206): nothing is learned, word order hardly counts, and unknown words add only noise.
    """
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError:
        raise ImportError("the encoder hashing is that of scikit-learn: pip install scikit-learn") from None
    hashed = HashingVectorizer(n_features=size, ngram_range=(1, 2), norm=None, token_pattern=r"(?u)\b\w+\b")
    return hashed.transform(texts).toarray()


ENCODERS = {"hashing": hashing}


def encode(name, texts):
    """
    Texts as vectors of L2 norm sqrt(D), so that a number in them is about as large as a normal one.

    :param name: of the encoder, as "hashing:128".
    :return: float32 [N,D].
    :raises ValueError: for an unknown name, no texts, or a text of which the encoder knows nothing.
    """
    kind, _, size = name.partition(":")
    if name == PRECOMPUTED:
        raise ValueError("the vectors were computed elsewhere, and so must be those of other texts: --prompt_vectors")
    if kind not in ENCODERS:
        raise ValueError(unknown("text encoder", kind, ENCODERS))
    if not size.isdecimal() or not int(size):
        raise ValueError(f"text encoder {name!r}: give its width, as {kind}:128")
    texts = list(texts)
    if not texts:
        raise ValueError("no texts to encode")
    vectors = ENCODERS[kind](texts, int(size))                                    # [N,D]
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)                        # [N,1]
    if not norms.all():
        raise ValueError(f"text {texts[int(norms[:, 0].argmin())]!r} holds no word that the encoder {name} can use")
    return (vectors / norms * np.sqrt(vectors.shape[1])).astype(np.float32)


def read_vectors(path):
    """
    The vectors of an npy file, finite floats of any shape from [P,D] on: float32.

    :raises ValueError, FileNotFoundError: if it is something else.
    """
    vectors = read_npy(path)
    if vectors.dtype.kind != "f" or vectors.ndim < 2 or not vectors.size:
        raise ValueError(f"{path} is {vectors.dtype} {list(vectors.shape)}; vectors are floats [P,D] in an npy file")
    if not np.isfinite(vectors).all():
        raise ValueError(f"{path} holds values that are not finite")
    return vectors.astype(np.float32)
