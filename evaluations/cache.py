"""Features that were computed once, in a folder, found again by what they are of: images and network."""

import hashlib
import json
from pathlib import Path

import numpy as np

from evaluations import door, sources
from evaluations.features import Features


class Cache:
    """A folder of features, a file for each block of images, named by the content of the images and the extractor.

    So work that was broken off goes on where it was, 10,000 images grow to 50,000 at the price of 40,000, other images
    never find the features of these, and several processes may use one folder. Files are written whole or not at all;
    one that is damaged, or a disk that is full, costs a warning and the time to compute.
    """

    def __init__(self, folder, identity):
        self.folder, self.full = Path(folder), False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key = json.dumps(identity, sort_keys=True).encode()

    def features(self, digests, compute):
        """The Features of images with these digests [n,32]: from the folder, or compute()."""
        name = hashlib.sha256(self.key + digests.tobytes()).hexdigest()
        path = self.folder / name[:2] / f"{name}.npz"
        found = self._read(path, len(digests)) if path.is_file() else None
        if found is None:
            found = compute()
            self._write(path, found)
        return found

    def _read(self, path, count):
        try:
            with np.load(path, allow_pickle=False) as npz:
                found = Features(**{name: npz[name] for name in npz.files})
            if len(found.pool) == count:
                return found
            problem = f"{len(found.pool)} rows in place of {count}"
        except Exception as error:  # of damaged files numpy and zipfile raise almost anything
            problem = error
        sources.warn(f"features in {path} are damaged ({problem}) and are computed again")
        return None

    def _write(self, path, features):
        if self.full:
            return
        try:
            path.parent.mkdir(exist_ok=True)
            with door.writing(str(path)) as file:
                np.savez(file, **{name: each for name, each in features._asdict().items() if each is not None})
        except OSError as error:
            self.full = True
            sources.warn(f"{error}; the scores will come all the same, but later features are not kept")
