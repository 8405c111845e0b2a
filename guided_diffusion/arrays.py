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
