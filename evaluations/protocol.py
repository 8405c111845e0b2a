"""The protocol of a score: all that must be equal before two scores compare."""

import hashlib
import platform
from dataclasses import asdict

import numpy as np
import scipy
import torch

from evaluations import features, sources

VERSION = 1  # of the meaning of the numbers: changes when a score of the same input would


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
