"""
Work that is kept: each piece lies in a folder named by the hash of all that it depends on, so that it is done once,
whoever asks for it, however often the asking program is killed.
"""

import hashlib
import json
import threading
from pathlib import Path

from . import checkpoint

DONE = "done.json"
LASTING = "not finite"  # in the error of a piece that would fail in the same way again: it has diverged
_working = {}  # {folder: the lock of who fills it}


def key(recipe):
    """The name of the piece that a recipe, a dict of plain values, makes: 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def folder_of(root, kind, recipe):
    """Where the piece of that recipe lies, or will."""
    return Path(root) / kind / key(recipe)


def told(root, kind, recipe):
    """What is known of a piece: None if it is not done, "" if it is, else why it failed."""
    path = folder_of(root, kind, recipe) / DONE
    return json.loads(path.read_text(encoding="utf-8"))["failed"] if path.is_file() else None


def do(root, kind, recipe, work):
    """
    The folder of a piece, which `work(folder)` fills unless it is done; where several threads want the same piece, one
    does it and the others wait.

    :raises Diverged: if it fails in a way that would repeat itself; that is remembered.
    :raises ValueError, OSError: as `work`, for other failures, which the next call may not meet.
    """
    folder = folder_of(root, kind, recipe)
    with _working.setdefault(str(folder), threading.Lock()):
        failed = told(root, kind, recipe)
        if failed is None:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                work(folder)
                failed = ""
            except (ValueError, ArithmeticError) as error:
                if LASTING not in str(error):
                    raise
                failed = str(error)
            write_json(folder / DONE, {"recipe": recipe, "failed": failed})
    if failed:
        raise Diverged(failed)
    return folder


def others(root, wanted):
    """The folders of pieces below root that are in none of the folders `wanted`: of an earlier state of what asks."""
    return sorted({path.parent for path in Path(root).glob(f"*/*/{DONE}")} - set(wanted))


def write_json(path, content):
    """Write plain values as a json file, whole or not at all."""
    with checkpoint.writing(str(path)) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


class Diverged(ArithmeticError):
    """A piece of work whose numbers do not stay finite."""
