"""All that this package takes from the rest of the project, imported when it is asked for and nowhere else."""

import hashlib
import os
import sys
from typing import NamedTuple


def open_classifier(path, device):
    """(classifier of this project in evaluation mode, its flags)."""
    from guided_diffusion.script_util import open_classifier

    return open_classifier(path, device=device)


def fetch(url, path, checksum=""):
    """Bring a file from the net to `path`, resumed where it broke off, checked, with a bar."""
    from guided_diffusion.download import fetch

    return fetch(url, path, checksum)


def pictures():
    """The module that draws grids and curves."""
    from guided_diffusion import pictures

    return pictures


def writing(path):
    """A context with a binary file that takes its name when all of it is on the disk, and leaves no trace otherwise."""
    from guided_diffusion.checkpoint import writing

    return writing(path)


def image_files(folder):
    """Paths of the pictures in a folder, in depth, in the order of their names."""
    from guided_diffusion.image_datasets import _list_image_files_recursively

    return _list_image_files_recursively(str(folder))


def is_image_name(name):
    """Whether a file of this name counts as a picture."""
    from guided_diffusion.image_datasets import EXTENSIONS

    return "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS


def decode(source, mode, file=None):
    """A picture as PIL image of that mode; file: an open file to read in place of the path `source`."""
    from guided_diffusion.image_datasets import _decode

    return _decode(source, mode, file)


def center_crop(image, size):
    """The centre square of a PIL image, made small as the training data of this project is: uint8 [S,S,C] or [S,S]."""
    from guided_diffusion.image_datasets import center_crop_arr

    return center_crop_arr(image, size)


def to_uint8(x):
    """float [N,C,H,W] in [-1,1] to uint8 [N,H,W,C], by the truncation that the samplers use."""
    from guided_diffusion.pictures import to_uint8

    return to_uint8(x).cpu().numpy()


def sha256(path):
    """The hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_tensors(named):
    """The hex digest of {name: tensor}."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Ranks(NamedTuple):
    """This process among those of a run. Methods are collective: all ranks must call them."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self):
        return self.rank == 0

    def share(self, obj):
        """[the obj of rank 0, of rank 1, ...], on every rank."""
        if self.size == 1:
            return [obj]
        from guided_diffusion.dist_util import gather_objects

        return gather_objects(obj)

    def to_main(self, obj):
        """[the obj of rank 0, of rank 1, ...] on rank 0, None elsewhere."""
        if self.size == 1:
            return [obj]
        from guided_diffusion.dist_util import gather_to_main

        return gather_to_main(obj)

    def from_main(self, function, *args):
        """What function(*args) returns on rank 0, where alone it runs; its ValueError or OSError is raised on all."""
        if self.size == 1:
            return function(*args)
        from guided_diffusion.dist_util import from_main

        return from_main(function, *args)


def start(device=None):
    """(Ranks, torch device) of this process; the ranks of torchrun, mpiexec or srun meet here."""
    from guided_diffusion import dist_util

    dist_util.setup_dist(device)
    return here(), dist_util.dev()


def here():
    """The Ranks of a run that has been started."""
    from guided_diffusion import dist_util

    return Ranks(dist_util.rank(), dist_util.world_size())


def exit_code(work):
    """Run a program's work and return its exit code: 0, or 2 after one line on stderr about bad input.

    GD_DEBUG=1 in the environment keeps the traceback.
    """
    from guided_diffusion import dist_util

    try:
        with dist_util.naming_lost_peers():
            work()
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("GD_DEBUG") == "1":
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    dist_util.finish()
    return 0
