"""
Checkpoints from the net by a published model's name or an address: downloaded once to a cache, and found there later.

The cache is $XDG_CACHE_HOME/guided-diffusion, or ~/.cache/guided-diffusion. A file has its name there only when it is
whole; what has arrived of a download that broke off waits beside it and is gone on with.
"""

import contextlib
import hashlib
import os
from pathlib import Path
from urllib.parse import urlsplit

from . import checkpoint, download, presets


def cache_folder():
    """Where downloaded files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guided-diffusion"


def locate(path, progress=True):
    """
    A path that can be read, for what the user gave: a path as it is, the file of a published model for its name (a
    preset's, or the file's with or without .pt), the file of an http address. Downloads what is not in the cache.

    :raises FileNotFoundError: for a path of no file whose name is that of a published model: how to have it.
    :raises ValueError: for a file of another size or content than it should have.
    :raises OSError: if it cannot be downloaded.
    """
    path = os.fspath(path)
    if _is_web(path):
        address = hashlib.sha256(path.encode()).hexdigest()[:12]
        name = os.path.basename(urlsplit(path).path) or "checkpoint"
        return _cached(path, cache_folder() / address / name, "", None, progress)
    preset = presets.by_name(path)
    if preset is None or checkpoint.is_remote(path) or os.path.isfile(path) or path.endswith(".safetensors"):
        return path
    if os.path.dirname(path):
        raise FileNotFoundError(f"no checkpoint {path}; {os.path.basename(path)} without a folder downloads it")
    checksum = f"sha256:{preset.sha256}" if preset.sha256 else ""
    return _cached(preset.url, cache_folder() / preset.file, checksum, preset.size, progress)


def _is_web(path):
    """Whether this is an address that blobfile, which knows object stores, does not read."""
    return path.startswith(("http://", "https://")) and not urlsplit(path).netloc.endswith(".blob.core.windows.net")


def _cached(url, path, checksum, size, progress):
    if path.exists():  # checked when it came; a size takes no time
        download.check_size(path, size, f"delete it, and it is fetched again from {url}")
        return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _turn(path):
        if not path.exists():
            print(f"fetching {url} to {path.parent}", flush=True)
            download.fetch(url, path, checksum, progress, size)
    return str(path)


@contextlib.contextmanager
def _turn(path):
    """One process at a time: of many that want a file, the first fetches it and the others wait."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(f"{path}.lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
