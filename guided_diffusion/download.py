"""Files from the net: fetched once, resumed where they broke off, checked, and there only when whole."""

import base64
import binascii
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

CHUNK = 2**16
ATTEMPTS = 5


def fetch(url, path, checksum="", progress=True, size=None):
    """
    Bring a file to `path`, unless it is there already with the right content.

    What has arrived is kept as PATH.part when the connection breaks, and the next attempt, of this call or of a later
    one, asks for the rest only. A server that cannot do that sends everything again.

    :param url: http, https, file...
    :param checksum: "md5:HEX" or "sha256:HEX" of the content, or the first digits of it; empty: that which the server
        tells, if it does.
    :param progress: show a bar.
    :param size: (least, most) bytes that the content can have, or None.
    :return: the path, as a Path.
    :raises ValueError: for another content, which is deleted if it has just come, or a checksum of no known kind.
    :raises OSError: if the file cannot be had or written; says what to do by hand.
    """
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():
        remedy = f"delete it, and it is fetched again from {url}"
        check_size(path, size, remedy)
        if checksum:
            check(path, checksum, remedy)
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        told = _fetch_all(url, part, progress)
    except (OSError, http.client.HTTPException) as error:
        kept = f" ({part.stat().st_size} bytes are kept for the next attempt)" if part.exists() else ""
        raise OSError(
            f"cannot fetch {url}: {error}{kept}: run again, or get it elsewhere and save it as {path}"
        ) from error
    try:
        remedy = f"it came from {url} and is deleted: try another source, or later"
        check_size(part, size, remedy)
        check_archive(part, remedy)
        if checksum or told:
            check(part, checksum or told, remedy)
    except ValueError:
        part.unlink()
        raise
    os.replace(part, path)
    return path


def check_size(path, size, remedy):
    """Raise ValueError, with the remedy, unless the file has from size[0] to size[1] bytes; size None: any will do."""
    held = os.path.getsize(path)
    if size and not size[0] <= held <= size[1]:
        raise ValueError(f"{path} has {held} bytes, not from {size[0]} to {size[1]}: {remedy}")


def check_archive(path, remedy):
    """Raise ValueError, with the remedy, if this begins as a zip archive (npz, torch's files) and ends as none."""
    with open(path, "rb") as file:
        begins = file.read(4) == b"PK\x03\x04"
    if begins and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is an archive without its end: {remedy}")


def check(path, checksum, remedy):
    """Raise ValueError, with the remedy, unless the file has the checksum ("md5:HEX", "sha256:HEX", or a beginning)."""
    kind, _, wanted = checksum.partition(":")
    if kind not in ("md5", "sha256") or not re.fullmatch("[0-9a-f]{8,64}", wanted):
        raise ValueError(f"checksum {checksum!r} is neither md5:HEX nor sha256:HEX")
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if not digest.hexdigest().startswith(wanted):
        raise ValueError(f"{path} has {kind} {digest.hexdigest()}, not {wanted}: {remedy}")


def _fetch_all(url, part, progress):
    """
    Append to the file `part` until all of the content is there; again after a break, as long as there is gain. Returns
    the checksum that the server tells, or "".
    """
    for attempt in range(1, ATTEMPTS + 1):
        before = part.stat().st_size if part.exists() else 0
        try:
            return _fetch_rest(url, part, before, progress)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not before:
                raise
            part.unlink()  # nothing left to send: longer than what is there, or whole but of unknown length
        except (OSError, http.client.HTTPException):
            gained = part.exists() and part.stat().st_size > before
            if attempt == ATTEMPTS or not gained:
                raise
    raise OSError("the server sends no more of it, and what there is is not all")


def _fetch_rest(url, part, start, progress):
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = getattr(response, "status", None) == 206 and _first_byte(response) == start
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with open(part, "ab" if resumed else "wb") as file, _bar(part.stem, start, total, progress) as bar:
            while block := response.read(CHUNK):
                file.write(block)
                bar.update(len(block))
    arrived = part.stat().st_size
    if total is not None and arrived != total:
        raise ConnectionError(f"the connection broke off after {arrived} of {total} bytes")
    return _told_md5(response)


def _told_md5(response):
    """What the server says of the whole content: Azure in a header of its own, others of an answer that is whole."""
    told = response.headers.get("x-ms-blob-content-md5")
    if getattr(response, "status", None) == 200:
        told = told or response.headers.get("Content-MD5")
    try:
        digest = base64.b64decode(told or "", validate=True)
    except binascii.Error:
        return ""
    return f"md5:{digest.hex()}" if len(digest) == 16 else ""


def _first_byte(response):
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _bar(name, start, total, show):
    from tqdm.auto import tqdm

    return tqdm(desc=name, initial=start, total=total, unit="B", unit_scale=True, disable=not show, mininterval=0.5)
