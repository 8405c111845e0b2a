"""Reference files: statistics and images of a data set, in the original's layout and in those of other projects.

An npz may hold `arr_0` (uint8 [N,H,W,C]), labels `arr_1`, and Inception statistics of a set that may be larger: `mu,
sigma` of the pooled features (OpenAI, pytorch-fid, EDM, clean-fid) and `mu_s, sigma_s` of the spatial ones (OpenAI and
here). Files of this project also have `provenance`, a json text. Pickles, as EDM2's, are never read.
"""

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from evaluations import door, metrics, sources

MOMENTS = {"mu": "sigma", "mu_s": "sigma_s"}  # the names in a file
FORMAT = 1
BASE = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
REFERENCES = {
    **{f"imagenet{side}": f"imagenet/{side}/VIRTUAL_imagenet{side}_labeled.npz" for side in (64, 128, 256)},
    "imagenet512": "imagenet/512/VIRTUAL_imagenet512.npz",
    **{f"lsun_{what}": f"lsun/{what}/VIRTUAL_lsun_{what}256.npz" for what in ("bedroom", "cat", "horse")},
}
SAMPLES = {  # models by the folder of their samples
    "imagenet/64": "admnet iddpm biggan_deep",
    "imagenet/128": "admnet admnet_guided admnet_guided_25step biggan_deep_trunc1",
    **{f"imagenet/{side}": "admnet admnet_guided admnet_guided_25step admnet_upsampled admnet_guided_upsampled "
                           "biggan_deep_trunc1" for side in (256, 512)},
    "lsun/bedroom": "admnet_dropout ddpm iddpm stylegan",
    "lsun/cat": "admnet_dropout stylegan2",
    "lsun/horse": "admnet admnet_dropout",
}  # fmt: skip
PUBLISHED = REFERENCES | {
    f"{model}_{name}": f"{folder}/{model}_{name}.npz"
    for folder, models in SAMPLES.items()
    for model in models.split()
    for name in [folder.replace("/", "") if folder.startswith("imagenet") else folder.replace("/", "_")]
}


class StatisticsSource(sources.Source):
    """Stored statistics without images: enough for FID, not for precision and recall."""

    count = 0

    def __init__(self, path, moments):
        super().__init__(str(path))
        self.moments = moments

    def blocks(self, rank=0, num_ranks=1, start=0, stop=None):
        return iter(())


class Contents(NamedTuple):
    """What an npz holds: {name: Header}, its provenance (a dict, empty without one)."""

    arrays: dict
    provenance: dict


def look_into(path):
    """The Contents of an npz, from the headers alone. ValueError for what is damaged or pickled."""
    with sources.reading(path), zipfile.ZipFile(path) as archive:
        arrays = {}
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as file:
                    arrays[name.removesuffix(".npy")] = sources.read_header(file)
    provenance = {}
    if "provenance" in arrays:
        with sources.reading(path):
            provenance = json.loads(str(read(path, ["provenance"])["provenance"]))
            if not isinstance(provenance, dict):
                raise ValueError("its provenance is no json object")
    return Contents(arrays, provenance)


def read(path, names):
    """{name: array} of an npz; nothing in it is unpickled."""
    with sources.reading(path), np.load(path, allow_pickle=False) as npz:
        return {name: np.asarray(npz[name]) for name in names if name in npz.files}


def open_npz(path):
    """The Source of an npz: its images, streamed, with labels and moments; or its moments alone.

    :raises ValueError: for what has neither, or statistics that are none.
    """
    known = look_into(path)
    moments = moments_of(path, known)
    if "arr_0" in known.arrays:
        source = sources.NpzSource(path, moments)
        source.labels = read(path, ["arr_1"]).get("arr_1") if source.fits_labels(known.arrays.get("arr_1")) else None
    elif "mu" in moments:
        source = StatisticsSource(path, moments)
    else:
        more = " (features for KID, as clean-fid keeps them, are not enough)" if "feats" in known.arrays else ""
        raise ValueError(f"{path} has no array arr_0: save the images as np.savez(path, images){more}")
    source.provenance = known.provenance
    return source


def moments_of(path, known):
    """{"mu": (mean, covariance), "mu_s": ...} as far as the file has them, checked."""
    moments = {}
    for mu, sigma in MOMENTS.items():
        if mu not in known.arrays:
            continue
        if sigma not in known.arrays:
            raise ValueError(f"{path} has {mu} but not {sigma}: store both or neither")
        arrays = read(path, [mu, sigma])
        with sources.blaming(f"{path}, {mu} and {sigma}"):
            moments[mu] = metrics.checked_moments(arrays[mu], arrays[sigma])
    return moments


def published(name):
    """The path of a published file by its name in PUBLISHED, downloaded once (with a bar) and looked at.

    No checksums of these files are published: what came is checked to be a whole npz with images, and, if it is a
    reference, with statistics.
    """
    path = Path(torch.hub.get_dir()) / "ref_batches" / PUBLISHED[name].rsplit("/", 1)[1]
    fresh = not path.exists()
    door.fetch(BASE + PUBLISHED[name], path)
    try:
        known = look_into(path)
        wanted = ["arr_0", *(MOMENTS if name in REFERENCES else ())]
        lacking = [each for each in wanted if each not in known.arrays]
        if lacking:
            raise ValueError(f"{path} has no {' and no '.join(lacking)}: it is not the published {name}")
        if fresh:
            sources.NpzSource(path).check()
    except ValueError:
        path.unlink() if fresh else None
        raise
    return path


def find(given):
    """A path or source as it is; the name of a published file as the path to it, where no such file lies about."""
    if isinstance(given, str) and given in PUBLISHED and not Path(given).exists():
        return published(given)
    return given
