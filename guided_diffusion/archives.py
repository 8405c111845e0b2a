"""
Pictures inside one file, a zip, a tar or an LMDB, read one at a time without unpacking.

Each of the functions `zip_of`, `tar_of` and `lmdb_of` gives the images, their names in order (those of an archive
without the one folder that it may wrap everything in), and {name: content} of the files of labels beside them.
"""

import copy
import io
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .decoding import EXTENSIONS, in_order, is_picture
from .labels import LABEL_FILES

MOST_BYTES = 2**30  # of one picture: a zip can promise any number


class Encoded(NamedTuple):
    """A picture inside something: its name for messages, and a function that opens it as a binary file."""

    name: str
    open: Callable


class Inside(Sequence):
    """
    Images inside one file, each read when it is wanted, by a handle that every process opens for itself: one that was
    inherited would share its place in the file with its parent's.
    """

    def __init__(self, path, keys, names=None):
        self.path, self.keys, self.names = path, keys, names
        self._handle = self._owner = None

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, key):
        if isinstance(key, slice):
            part = copy.copy(self)
            part.keys, part.names = self.keys[key], self.names and self.names[key]
            return part
        return self._item(self.keys[key], key)

    def _item(self, key, index):
        return Encoded(f"{self.names[index]} in {self.path}", lambda: io.BytesIO(self._read(self.handle, key)))

    @property
    def handle(self):
        if self._owner != os.getpid():
            self._handle, self._owner = self._open(), os.getpid()
        return self._handle

    def __getstate__(self):
        return self.__dict__ | {"_handle": None, "_owner": None}

    def _open(self):
        raise NotImplementedError

    def _read(self, handle, key):
        raise NotImplementedError


class Zip(Inside):
    """The pictures of a zip; keys are their names in it."""

    def _open(self):
        return zipfile.ZipFile(self.path)

    def _read(self, handle, key):
        size = handle.getinfo(key).file_size
        if size > MOST_BYTES:
            raise ValueError(f"it unpacks to {size} bytes, more than {MOST_BYTES}")
        return handle.read(key)


class Tar(Inside):
    """The pictures of a tar; keys are (place, size) in it, [N,2]."""

    def _open(self):
        return open(self.path, "rb")

    def _read(self, handle, key):
        place, size = key.tolist()
        handle.seek(place)
        return handle.read(size)


def zip_of(path):
    """(Zip, names, files of labels). Raises ValueError for what is no whole zip, is encrypted, or has unsafe names."""
    try:
        with zipfile.ZipFile(path) as file:
            held = [info for info in file.infolist() if not info.is_dir()]
            if any(info.flag_bits & 1 for info in held):
                raise ValueError("it is encrypted")
            where = _members([info.filename for info in held])
            files = {name: file.read(where[name]) for name in LABEL_FILES.values() if name in where}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read {path} as a whole zip: {error}") from error
    names = _pictures(path, where)
    return Zip(path, [where[name] for name in names], names), names, files


def tar_of(path):
    """(Tar, names, files of labels). Raises ValueError for what is no whole tar, or has unsafe names."""
    try:
        with open(path, "rb") as file:
            found = list(_tar_members(file, 0, os.path.getsize(path)))
            places = {name: (place, size) for name, place, size in found}
            where = _members([name for name, _, _ in found])
            files = {}
            for name in LABEL_FILES.values():
                if name in where:
                    file.seek(places[where[name]][0])
                    files[name] = file.read(places[where[name]][1])
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read {path} as a whole tar: {error}") from error
    names = _pictures(path, where)
    return Tar(path, np.array([places[where[name]] for name in names], dtype=np.int64), names), names, files


def _tar_members(file, start, end, folder=""):
    """(name, place, size) of the files in a tar; those of tars inside, as ImageNet's, lie in folders of their names."""
    file.seek(start)  # tarfile then counts places of an inner tar from the beginning of the file, too
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members = tar.getmembers()
        file.seek(tar.offset)
        if tar.offset > end - 512 or file.read(512).strip(b"\0"):
            raise ValueError("it has no end, as if half written")
        for member in members:
            name = f"{folder}{member.name.removeprefix('./')}"
            if member.issparse() or ((member.islnk() or member.issym()) and is_picture(name)):
                raise ValueError(f"{name} is a sparse file or a link: pack the files themselves")
            if member.isreg() and name.endswith(".tar"):
                inner = member.offset_data
                yield from _tar_members(file, inner, inner + member.size, f"{name.removesuffix('.tar')}/")
            elif member.isreg():
                yield name, member.offset_data, member.size


def _members(names):
    """{name: name in the archive} of its files. Raises ValueError for names that are unsafe or stand twice."""
    names = [name for name in names if not name.startswith("__MACOSX/")]
    for name in names:
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:3] in (":/", ":\\"):
            raise ValueError(f"{name} would lie outside of it")
    twice = [name for name, count in Counter(names).items() if count > 1 and is_picture(name)]
    if twice:
        raise ValueError(f"it holds {twice[0]} twice ({len(twice)} such names): pack it anew")
    root = _root(names)
    return {name[len(root) :].removeprefix("./"): name for name in names if name.startswith(root)}


def _root(names):
    """The one folder that holds all pictures, if it holds several folders of them or a file of labels; else ''."""
    tops = {name.split("/")[0] for name in names if is_picture(name)}
    if len(tops) != 1 or not all("/" in name for name in names if is_picture(name)):
        return ""
    root = f"{tops.pop()}/"
    folders = {name.split("/")[1] for name in names if is_picture(name) and name.count("/") > 1}
    told = any(f"{root}{name}" in names for name in LABEL_FILES.values())
    return root if told or len(folders) > 1 else ""


def _pictures(path, names):
    found = sorted(filter(is_picture, names), key=in_order)
    if not found:
        raise ValueError(f"no images in {path}: looked for files named *.{', *.'.join(EXTENSIONS)}")
    return found


class Lmdb(Inside):
    """The pictures of an LMDB, as LSUN's, in the order of their keys, which are bytes."""

    def __init__(self, path, keys):
        super().__init__(path, keys, [_name(key) for key in keys])

    def _open(self):
        return None  # see `_lmdb`

    def _read(self, handle, key):
        with _lmdb(self.path).begin() as reading:
            return reading.get(key)


_bases = {}  # those that are open, by their paths


def _close_bases():
    while _bases:
        _bases.popitem()[1].close()


# A process must not open an LMDB twice, nor what it has open be carried over a fork.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_bases)


def _lmdb(path):
    """An LMDB to read from, a folder with data.mdb or that file itself; ValueError for what is none."""
    try:
        import lmdb
    except ImportError:
        raise ImportError(f"{path} is an LMDB, and to read it takes the package lmdb: pip install lmdb") from None
    file = os.path.realpath(os.path.join(path, "data.mdb") if os.path.isdir(path) else path)
    if file in _bases:
        return _bases[file]
    try:
        base = lmdb.open(file, subdir=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError(f"cannot read {path} as an LMDB: {error}") from error
    size = (base.info()["last_pgno"] + 1) * base.stat()["psize"]
    if os.path.getsize(file) < size:  # to read on would be a bus error
        base.close()
        raise ValueError(f"{file} is not whole: {os.path.getsize(file)} of {size} bytes")
    _bases[file] = base
    return base


def lmdb_of(path):
    """(Lmdb, names, {}). Raises ValueError for what is none, or not whole."""
    with _lmdb(path).begin() as reading:
        keys = list(reading.cursor().iternext(values=False))
    if not keys:
        raise ValueError(f"no images in {path}: the LMDB is empty")
    images = Lmdb(path, keys)
    return images, images.names, {}


def _name(key):
    return key.decode("utf-8", "backslashreplace")
