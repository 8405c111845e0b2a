"""The protocol of a score: all that must be equal before two scores compare."""

import hashlib
import platform
from dataclasses import asdict, dataclass

import numpy as np
import scipy
import torch

from evaluations import features, neighbours, sources

VERSION = 1  # of the meaning of the numbers: changes when a score of the same input would


@dataclass(frozen=True)
class Settings:
    """The switches of the metrics; the defaults are the published protocol.

    k: neighbours of precision and recall; density_k: of density and coverage; distances: see `neighbours.DISTANCES`;
    split_size, splits, shuffle: of the inception score, see `metrics.inception_score`.
    """

    k: int = 3
    density_k: int = 5
    distances: str = "float32"
    split_size: int = 5000
    splits: int | None = None
    shuffle: int | None = None

    def __post_init__(self):
        for name in ("k", "density_k", "split_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.splits is not None and self.splits < 1:
            raise ValueError(f"splits is {self.splits}: it must be at least 1")
        if self.shuffle is not None and not 0 <= self.shuffle < 2**32:
            raise ValueError(f"shuffle is {self.shuffle}: it is a seed, a whole number from 0")
        neighbours.rule_of(self.distances, 1)


def protocol(extractor, settings, reference_hash, counts, stored):
    """The dict that a result carries.

    :param reference_hash: of `hash_of`. :param counts: {"reference": N1, "sample": N2}.
    :param stored: {"reference": names of stored moments that were used, "sample": ...}.
    """
    return {
        "version": VERSION,
        "extractor": features.identity_of(extractor),
        "reference": reference_hash,
        "images": counts,
        "stored_moments": stored,
        **asdict(settings),
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
    }


def hash_of(digests, moments):
    """"sha256:HEX" of images (their digests [n,32]) and of stored moments {key: (mean, covariance)}."""
    digest = hashlib.sha256(sources.digest_of(digests).encode())
    for key in sorted(moments):
        digest.update(key.encode())
        for array in moments[key]:
            digest.update(np.ascontiguousarray(array).tobytes())
    return f"sha256:{digest.hexdigest()}"
