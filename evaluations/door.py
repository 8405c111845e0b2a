"""All that this package takes from the rest of the project, imported when it is asked for and nowhere else."""

import hashlib
import os
import sys
from typing import NamedTuple


def open_classifier(path, device):
    """(classifier of this project in evaluation mode, its flags)."""
    from guided_diffusion.script_util import open_classifier

    return open_classifier(path, device=device)


def locate(path):
    """A path that can be read, for a path or for the name of a published checkpoint, which is downloaded once."""
    from guided_diffusion.published import locate

    return locate(path)


def sides(size):
    """(height, width) of a size as `parse_size` gives it."""
    from guided_diffusion.sizes import sides

    return sides(size)


def size_of(flags):
    """(height, width) of the images that a network of these flags reads."""
    from guided_diffusion.sizes import size_of

    return size_of(flags)


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
    from guided_diffusion.sources import list_image_files

    return list_image_files(str(folder))


def is_image_name(name):
    """Whether a file of this name counts as a picture."""
    from guided_diffusion.decoding import is_picture

    return is_picture(name)


def decode(source, mode, file=None):
    """A picture as PIL image of that mode; file: an open file to read in place of the path `source`."""
    from guided_diffusion.decoding import decode

    return decode(source, mode, file)


def center_crop(image, size):
    """The centre of a PIL image, brought to `size` as the training data of this project is: uint8 [H,W,C] or [H,W].

    :param size: as of `parse_size`.
    """
    from guided_diffusion.image_datasets import center_crop_arr

    return center_crop_arr(image, sides(size))


def help_first(module, parse):
    """Where the module of that name is the program that runs, and --help was typed, call parse(), which answers it."""
    from guided_diffusion.config import help_first

    help_first(module, parse)


def parse_size(text):
    """A side in pixels, or "HEIGHTxWIDTH", of what is typed; argparse.ArgumentTypeError for anything else."""
    from guided_diffusion.sizes import parse_size

    return parse_size(text)


def is_database(folder):
    """Whether a folder is an LMDB or holds CIFAR's batches, so that its images are no files."""
    from guided_diffusion.byte_formats import cifar_files

    return os.path.isfile(os.path.join(folder, "data.mdb")) or bool(cifar_files(str(folder)))


def loader_images(path):
    """The images of anything that the training loader reads, as `decode_item` takes them: a Sequence."""
    from guided_diffusion.sources import open_source

    return open_source(str(path)).images


def bytes_of(item):
    """The bytes that one of `loader_images` is decoded from."""
    if not hasattr(item, "open"):
        return item.tobytes()
    with item.open() as file:
        return file.read()


def decode_item(item, mode):
    """One of `loader_images` as PIL image of that mode."""
    return decode(item.name, mode, item.open) if hasattr(item, "open") else decode(item, mode)


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
