"""Feature extractors: images in, features and class probabilities out, all through one door (`Extractor`).

A new network for scores costs one class with `name`, `dim` and a call, and one line in `make_extractor`; a user's own
function costs nothing: `module:function`, from uint8 images [N,H,W,C] to features [N,D].
"""

import importlib
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from evaluations import door, inception, options

DTYPES = {name: getattr(torch, name) for name in options.DTYPES}


class Features(NamedTuple):
    """What a network says of N images, float32: all that the metrics look at. Arrays, or maps of files."""

    pool: np.ndarray  # [N,D]
    probabilities: np.ndarray | None = None  # [N,K]; None of a network without classes
    spatial: np.ndarray | None = None  # [N,2023]: a grid of positions, flattened

    @classmethod
    def join(cls, parts):
        """One record of several, in their order."""
        return cls(*(None if each[0] is None else np.concatenate(each) for each in zip(*parts)))

    def rows(self, index):
        """The record of some of the images."""
        return Features(*(None if each is None else each[index] for each in self))


class Extractor(Protocol):
    """The door: `name` says which network, `dim` is D of its pool features.

    It may have `identity`, a dict of all that its numbers depend on, for the protocol of a score, and `channels`, of
    the images that it reads (else 3).
    """

    name: str
    dim: int

    def __call__(self, images: np.ndarray) -> Features | np.ndarray:
        """Features of a batch of uint8 images [N,H,W,C], or just [N,D]; the same for any batch size."""


def make_extractor(spec, device="cpu", weights=None, **inception_options):
    """The extractor that a word stands for: "inception" (weights: its file; more options: see InceptionExtractor), the
    path or published name of a classifier checkpoint, "module:function", or a network of torch-fidelity's, as
    dinov2-vit-l-14."""
    spec = str(spec)
    if spec == InceptionExtractor.name:
        return InceptionExtractor(weights, device, **inception_options)
    if weights is not None:
        raise ValueError(f"weights belong to the extractor {InceptionExtractor.name!r}; {spec} brings its own")
    dtype = inception_options.pop("dtype", OPTIONS["dtype"])
    if any(inception_options[name] != OPTIONS[name] for name in inception_options):
        others = ", ".join(name for name in OPTIONS if name != "dtype")
        raise ValueError(f"{others} belong to the extractor {InceptionExtractor.name!r}, not to {spec}")
    path = spec if spec.startswith(("dinov2-", "clip-")) else door.locate(spec)
    if Path(path).is_file():
        return ClassifierExtractor(path, device, dtype)
    if dtype != OPTIONS["dtype"]:
        raise ValueError(f"dtype {dtype} is for {InceptionExtractor.name!r} and for classifiers, not for {spec}")
    if spec.startswith(("dinov2-", "clip-")):
        return FidelityExtractor(spec, device)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec):
        return CallableExtractor(spec)
    raise FileNotFoundError(
        f"extractor {spec} is neither {InceptionExtractor.name!r} nor the file or published name of a classifier "
        "checkpoint, nor a function as module:function, nor one of torch-fidelity's (dinov2-vit-{s,b,l,g}-14, "
        "clip-vit-b-32...)"
    )


def extract(extractor, images, batch_size=64, progress=None):
    """Features of uint8 images [N,H,W,C] (anything that can be sliced) in batches; progress is a name for a bar."""
    from tqdm import tqdm

    if batch_size < 1 or len(images) == 0:
        raise ValueError(f"{len(images)} images in batches of {batch_size}: both must be at least 1")
    starts = tqdm(range(0, len(images), batch_size), desc=progress, unit="batch", disable=progress is None)
    return Features.join([checked(extractor, images[start : start + batch_size]) for start in starts])


def checked(extractor, images):
    """What an extractor says of a batch as Features, after a look at it (ValueError for what are no features of it)."""
    said = extractor(images)
    if not isinstance(said, Features):
        said = Features(_to_numpy(said) if isinstance(said, torch.Tensor) else np.asarray(said, np.float32))
    if said.pool.ndim != 2 or len(said.pool) != len(images):
        raise ValueError(f"{extractor.name} gave {list(said.pool.shape)} for {len(images)} images: expected [N,D]")
    for what, array in zip(Features._fields, said):
        if array is not None and not np.isfinite(array).all():
            raise ValueError(f"{extractor.name} gave {what} features that are NaN or infinite: its weights are damaged")
    return said


def identity_of(extractor):
    """A dict of all that an extractor's numbers depend on, as far as it tells."""
    return {"name": extractor.name, **getattr(extractor, "identity", {})}


class InceptionExtractor:
    """The network of the published scores (`inception.Inception`): its pool features, the probabilities without the
    bias of its last layer, as inception scores of the ADM paper are, and the spatial features of sFID.

    Grey images are repeated to three channels. The network always sees as many images at once, the last ones filled up,
    so that no number depends on the size of a batch.

    :param weights, allow_other_weights: as `inception.find_weights` takes them.
    :param resize: one of inception.RESIZES; "tf1" is the published rule.
    :param dtype: "float32", the published one, "float64", or that of the convolutions alone, "bfloat16" or "float16".
    :raises FileNotFoundError: without weights. :raises ValueError: for a wrong file or option.
    """

    name = "inception"
    dim = 2048

    def __init__(self, weights=None, device="cpu", resize="tf1", dtype="float32", allow_other_weights=False):
        for what, value, choices in (("resize", resize, inception.RESIZES), ("dtype", dtype, DTYPES)):
            if value not in choices:
                raise ValueError(f"{what} is {value!r}; choose one of {', '.join(choices)}")
        file, digest = inception.find_weights(weights, allow_other_weights)
        self.device = torch.device(device)
        self.dtype = torch.promote_types(DTYPES[dtype], torch.float32)  # of the images, resized
        self.at_once = 4 if self.device.type == "cpu" else 64
        self.resize = inception.RESIZES[resize]
        self.network = inception.load(file).to(self.device).convert_to(DTYPES[dtype])
        self.identity = {"weights": f"sha256:{digest}", "resize": resize, "dtype": dtype}

    def __call__(self, images):
        x = _as_batch(images, channels=(1, 3), why="Inception reads grey or RGB")     # [N,C,H,W]
        return _in_equal_parts(self._look, x.expand(-1, 3, -1, -1), self.at_once)

    def _look(self, x):
        with full_precision(self.device):
            said = self.network.eval()(self.resize(x.to(self.device, self.dtype)))
            return Features(
                _to_numpy(said["2048"]), _probabilities(said["logits_unbiased"]), _to_numpy(said["spatial"])
            )


OPTIONS = {"resize": "tf1", "dtype": "float32", "allow_other_weights": False}  # the defaults; only dtype is not of
# Inception alone, but of classifiers too


class ClassifierExtractor:
    """A classifier checkpoint of this project, looked at without noise (t = 0): pool features and probabilities.

    Scores by its features compare only with scores by the same file. Images must have the size and the channels the
    classifier was trained on (ValueError otherwise).

    :param dtype: of the convolutions and of attention, "float32", "bfloat16" or "float16".
    """

    at_once = 64

    def __init__(self, path, device="cpu", dtype="float32"):
        if dtype == "float64":
            raise ValueError("dtype float64 is for 'inception' alone: classifiers take float32, bfloat16 or float16")
        self.name = str(path)
        self.device = torch.device(device)
        self.classifier, flags = door.open_classifier(path, device)
        self.channels, self.size = flags["image_channels"], door.size_of(flags)
        self.identity = {"name": "classifier at t = 0", "weights": f"sha256:{door.sha256(path)}"}
        if dtype != "float32":  # unsaid if it is, so that what was kept before there was a choice is found
            self.classifier.convert_to(DTYPES[dtype])
            self.identity["dtype"] = dtype
        self.dim = self(np.zeros((1, *self.size, self.channels), np.uint8)).pool.shape[1]

    def __call__(self, images):
        x = _as_batch(images, (self.channels,), f"the classifier {self.name} was trained on {self.channels}")
        if x.shape[2:] != self.size:
            raise ValueError(f"images are {list(x.shape[2:])} pixels, but {self.name} reads {list(self.size)}")
        return _in_equal_parts(self._look, x, self.at_once)

    def _look(self, x):
        x = x.to(self.device, torch.float32) / 127.5 - 1                              # [N,C,H,W]
        t = torch.zeros(len(x), dtype=torch.long, device=self.device)                 # [N]
        with full_precision(self.device):
            return Features(_to_numpy(self.classifier.features(x, t)), _probabilities(self.classifier(x, t)))


class CallableExtractor:
    """A user's own function `module:function` from uint8 images [N,H,W,C] to features [N,D], array or tensor.

    The module is looked for in the current folder too. It is code and is run: name only what you trust. It may have a
    number `channels`. Scores are remembered by the text of its file, so what it reads besides must not change.
    """

    def __init__(self, spec):
        module_name, _, function_name = spec.partition(":")
        before = list(sys.path)
        sys.path.insert(0, "")
        try:
            module = importlib.import_module(module_name)
            self.function = getattr(module, function_name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"extractor {spec}: {error}") from error
        finally:
            sys.path[:] = before
        self.name = spec
        self.channels = getattr(self.function, "channels", 3)
        source = getattr(module, "__file__", None)
        self.identity = {"code": f"sha256:{door.sha256(source)}"} if source else {}
        self.dim = checked(self, np.zeros((1, 32, 32, self.channels), np.uint8)).pool.shape[1]

    def __call__(self, images):
        with torch.inference_mode():
            return self.function(images)


class FidelityExtractor:
    """A network that torch-fidelity knows by name: dinov2-vit-{s,b,l,g}-14, clip-vit-b-32, clip-rn50 and so on.

    It fetches the weights itself (of DINOv2 the code too, from facebookresearch's repository). Needs torch-fidelity and
    the torchvision that belongs to the installed torch: the extra `eval`.
    """

    at_once = 16

    def __init__(self, name, device="cpu"):
        try:
            registry = importlib.import_module("torch_fidelity.registry").FEATURE_EXTRACTORS_REGISTRY
        except Exception as error:  # a missing torchvision raises ImportError, a broken one RuntimeError
            raise ImportError(
                f"extractor {name} needs torch-fidelity and a torchvision that fits torch {torch.__version__}, which "
                f"do not import here ({_first_line(error)}): pip install torch=={torch.__version__.split('+')[0]} "
                "torch-fidelity torchvision"
            ) from error
        known = [each for each in registry if each.startswith(("dinov2-", "clip-"))]
        if name not in known:
            raise ValueError(f"extractor {name} is none of torch-fidelity's: {', '.join(known)}")
        kind = registry[name]
        layer = kind.get_default_feature_layer_for_metric("fid")
        try:
            self.network = kind(name, [layer]).to(device).eval()
        except (OSError, RuntimeError) as error:  # no way to the weights, or to the code
            raise FileNotFoundError(f"the weights of {name} cannot be had: {_first_line(error)}") from error
        self.name, self.device = name, torch.device(device)
        digest = door.sha256_of_tensors(self.network.state_dict())
        self.identity = {"layer": layer, "weights": f"tensors:{digest}"}
        self.dim = self(np.zeros((1, 32, 32, 3), np.uint8)).pool.shape[1]

    def __call__(self, images):
        x = _as_batch(images, channels=(1, 3), why=f"{self.name} reads grey or RGB")
        return _in_equal_parts(self._look, x.expand(-1, 3, -1, -1), self.at_once)

    def _look(self, x):
        with full_precision(self.device):
            return Features(_to_numpy(self.network(x.to(self.device))[0].flatten(1)))


@contextmanager
def full_precision(device):
    """No gradients, no autocast, no TF32, no search for kernels: a score must not depend on what ran before it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    exact_kernels = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    try:
        with torch.inference_mode(), torch.autocast(torch.device(device).type, enabled=False), exact_kernels:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _in_equal_parts(look, x, at_once):
    """Features of a batch [N,C,H,W], looked at in parts of `at_once` images exactly: convolutions round differently for
    another number. What the last part lacks is filled up."""
    missing = -len(x) % at_once
    x = torch.cat([x, x[:1].expand(missing, -1, -1, -1)]) if missing else x
    return Features.join([look(part) for part in x.split(at_once)]).rows(slice(0, len(x) - missing))


def _as_batch(images, channels, why):
    """uint8 images [N,H,W,C] as a tensor [N,C,H,W], after a look at their type, axes and channels (ValueError)."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} of shape {list(images.shape)}: expected uint8 [N,H,W,C]")
    if images.shape[3] not in channels:
        raise ValueError(f"images have {images.shape[3]} channels, but {why}")
    return torch.tensor(images).permute(0, 3, 1, 2)                                   # [N,C,H,W]


def _probabilities(logits):
    return _to_numpy(torch.softmax(logits.cpu().double(), dim=1))


def _to_numpy(x):
    return x.detach().float().cpu().numpy()


def _first_line(error):
    return (str(error).strip() or type(error).__name__).split("\n")[0]
