"""Numpy's files from strangers: plain arrays, or one line that says what is wrong."""

import numpy as np


def read_npz(path, names):
    """
    Those of the named arrays that an npz holds, {name: array}.

    :raises ValueError: if the file is no npz, is damaged, or holds under these names what is no plain array.
    :raises FileNotFoundError: if there is none.
    """
    return _read(path, "an npz of plain arrays", names)


def read_npy(path):
    """The array of an npy file; errors as of `read_npz`."""
    return _read(path, "an npy file of a plain array", None)


def map_npy(path):
    """The array of an npy file, left on the disk and read where it is looked at; errors as of `read_npz`."""
    return _read(path, "an npy file of a plain array", None, mmap_mode="r")


def _read(path, what, names, **how):
    """The single array if names is None, else the dict."""
    try:
        held = np.load(path, allow_pickle=False, **how)
        if isinstance(held, np.ndarray):
            _check(names is None, "it is a single array")
            return held
        with held:
            _check(names is not None, "it is an npz")
            found = {name: held[name] for name in names if name in held.files}
        for name, array in found.items():
            _check(isinstance(array, np.ndarray), f"{name} is no array")
        return found
    except FileNotFoundError:
        raise
    except Exception as error:  # of damaged files numpy and zipfile raise almost anything
        # Whatever numpy does not know it takes for a pickle, and advises to load it as one.
        told = "it is none, or holds objects instead of numbers or texts" if "pickle" in str(error) else error
        raise ValueError(f"cannot read {path} as {what}: {told}") from error


def _check(fits, otherwise):
    if not fits:
        raise ValueError(otherwise)


class GrowingNpy:
    """
    An npy of uint8 [N,...] that is written one item at a time, so that no memory holds it; N is counted.

    :param file: open for writing, seekable. :param shape: of an item. Call `finish` at the end.
    """

    _LENGTH = 128  # of the header, room for any N

    def __init__(self, file, shape):
        self.file, self.shape, self.count = file, tuple(shape), 0
        file.write(self._header())

    def add(self, items):
        """Append uint8 [n,...]."""
        if items.dtype != np.uint8 or items.shape[1:] != self.shape:
            raise ValueError(f"items are {items.dtype} {list(items.shape[1:])}, those before uint8 {list(self.shape)}")
        self.file.write(np.ascontiguousarray(items).data)
        self.count += len(items)

    def finish(self):
        """Write the true number into the header."""
        self.file.seek(0)
        self.file.write(self._header())

    def _header(self):
        """Version 1.0 of the format: magic, length of the rest, a dict as text, filled up with spaces."""
        told = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.shape)}
        text = repr(told).encode().ljust(self._LENGTH - 11) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
