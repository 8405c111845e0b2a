"""How much memory a training step takes, which microbatch fits, and the note of it that training reads."""

import json
import os

import torch as th
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import checkpoint, config
from .network_options import ClassifierOptions, ModelOptions

FORMAT = 1
NOTE_NAME = "doctor.json"
SHARE = 0.7  # of the free memory that an estimate fills; the rest is for what it does not see


def fixed_bytes(model_params, master_params, averages):
    """
    Bytes that a training step holds whatever the microbatch, as {what: bytes}.

    :param model_params: the network's parameters.
    :param master_params: those that the optimizer sees: the same, or float32 copies of those in 16 bits.
    :param averages: how many averages of the weights there are.
    """
    copies = [m for p, m in zip(model_params, master_params) if p is not m]
    return {
        "weights": _bytes(model_params) + _bytes(copies),
        "gradients": _bytes(model_params) + _bytes(copies),
        "moments of AdamW": 2 * _bytes(master_params),
        "averages": averages * _bytes(master_params),
    }


def _bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def activation_bytes(loss, but=()):
    """
    Bytes that autograd keeps for the backward pass of what `loss()` computes, each storage once. With activations
    recomputed, those of the part that the backward pass has in hand come on top.

    :param but: tensors that do not count, as parameters.
    """
    known = {t.untyped_storage().data_ptr() for t in but}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()  # kept alive by the graph, so that no address comes twice
        return tensor

    with th.enable_grad(), th.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss()  # alive until the sum is taken
    total = sum(kept.values())
    del result
    return total


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered: `alive` now, and at most, `peak`."""

    def __init__(self):
        super().__init__()
        self.peak, self._storages = 0, {}

    @property
    def alive(self):
        self._storages = {key: (ref, size) for key, (ref, size) in self._storages.items() if not ref.expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, th.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, th.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.alive)
        return out


def working_bytes(action):
    """Bytes of the tensors that `action()` makes, as many as are alive at once."""
    with _Alive() as seen:
        action()
    return seen.peak


def largest_that_fits(attempt, most):
    """
    The largest of 1, 2, 4, ... and `most` for which `attempt(n)` does not run out of the device's memory; 0: none.

    :param attempt: raises torch.OutOfMemoryError, or on some devices RuntimeError "... out of memory".
    """
    fits, n = 0, 1
    while fits < most:
        if not _survives(attempt, n):
            break
        fits, n = n, min(2 * n, most)
    return fits


def _survives(attempt, n):
    try:
        attempt(n)
        return True
    except RuntimeError as error:  # OutOfMemoryError is one
        if "out of memory" not in str(error).lower() and not isinstance(error, th.OutOfMemoryError):
            raise
        return False


def estimated_fit(free, fixed, each, most):
    """The largest of 1, 2, 4, ... and `most` microbatches of `each` bytes an image that fit; 0: not one image does."""
    room = int((SHARE * free - fixed) // max(each, 1))
    if room >= most:
        return most
    return 1 << (room.bit_length() - 1) if room > 0 else 0


def fitting(device, attempt, most):
    """
    The largest of 1, 2, 4, ... and `most` samples that can be drawn at once: on a GPU those for which `attempt(n)` does
    not run out of memory, elsewhere estimated from what `attempt(1)` takes, or `most` where it cannot be told.

    :raises ValueError: if not one fits.
    """
    if device.type == "cuda":
        fits = largest_that_fits(attempt, most)
        th.cuda.empty_cache()
    else:
        attempt(1)  # what is made once, as tables, does not count
        free = free_bytes(device)
        fits = estimated_fit(free, 0, working_bytes(lambda: attempt(1)), most) if free else most
    if not fits:
        raise ValueError("not even one image at a time fits in memory: take 16 bits (--precision), or a smaller model")
    return fits


def free_bytes(device):
    """Memory that is free on a device, or None where that cannot be told."""
    if device.type == "cuda":
        return th.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            told = dict(line.split(":") for line in file)
        return 1024 * int(told["MemAvailable"].split()[0])
    return None


# ---------------------------------------------------------------------------------------------------------- the note


def device_name(device):
    """What a note calls a device: the GPU's name, or the kind."""
    return th.cuda.get_device_name(device) if device.type == "cuda" else device.type


def network_of(flags):
    """What of a network's flags memory depends on."""
    names = [*config.options(ModelOptions, ClassifierOptions), "learn_sigma"]
    return {name: flags[name] for name in names if name in flags}


def remember(folder, device, flags, microbatch, **measured):
    """Write doctor.json in a folder: the microbatch that fits, and what else was `measured`."""
    content = {"format": FORMAT, "device": device_name(device), "network": network_of(flags)}
    content |= {"microbatch": microbatch, **measured}
    with checkpoint.writing(os.path.join(folder, NOTE_NAME)) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def recall(folder, device, flags):
    """
    (the microbatch that doctor.json in a folder remembers for this device and network, or -1; a line for the log).

    :raises ValueError: if the file cannot be read.
    """
    path = os.path.join(folder, NOTE_NAME)
    if not checkpoint.exists(path):
        return -1, ""
    try:
        with checkpoint.reading(path) as file:
            content = json.loads(file.read())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}")
        held, network, microbatch = content["device"], content["network"], int(content["microbatch"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, or give --microbatch") from error
    if held != device_name(device) or network != network_of(flags):
        return -1, f"{path} is about another device or network: not used"
    return microbatch, f"--microbatch {microbatch}, which {path} says fits; --microbatch N would be another"
