"""Feature extractors: images in, features and class probabilities out, all through one door (`Extractor`).

A new network for scores costs one class with `name`, `dim` and a call, and one line in `make_extractor`.
"""

import hashlib
import importlib
import importlib.util
import io
import os
import pickle
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

WEIGHTS_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_NAME = WEIGHTS_URL.rsplit("/", 1)[1]
WEIGHTS_SHA256 = "6726825d"  # first digits
WEIGHTS_VARIABLE = "GD_INCEPTION_WEIGHTS"
SPATIAL_CHANNELS = 7


class Features(NamedTuple):
    """What a network says of N images, float32: all that the metrics look at."""

    pool: np.ndarray  # [N,D]
    probabilities: np.ndarray  # [N,K]
    spatial: np.ndarray | None = None  # [N,2023]: a grid of positions, flattened


class Extractor(Protocol):
    """The door: `name` says which network, `dim` is D of its pool features."""

    name: str
    dim: int

    def __call__(self, images: np.ndarray) -> Features:
        """Features of a batch of uint8 images [N,H,W,C]; the same for any batch size."""


def make_extractor(spec, device="cpu", weights=None):
    """The extractor that a word stands for: "inception" (weights: its file), or the path of a classifier checkpoint."""
    if str(spec) == InceptionExtractor.name:
        return InceptionExtractor(weights, device)
    if weights is not None:
        raise ValueError(f"weights belong to the extractor {InceptionExtractor.name!r}; {spec} brings its own")
    if not Path(spec).is_file():
        raise FileNotFoundError(
            f"extractor {spec} is neither {InceptionExtractor.name!r} nor the file of a classifier checkpoint"
        )
    return ClassifierExtractor(spec, device)


def extract(extractor, images, batch_size=64, progress=None):
    """Features of uint8 images [N,H,W,C] (anything that can be sliced) in batches; progress is a name for a bar."""
    from tqdm import tqdm

    if batch_size < 1 or len(images) == 0:
        raise ValueError(f"{len(images)} images in batches of {batch_size}: both must be at least 1")
    starts = tqdm(range(0, len(images), batch_size), desc=progress, unit="batch", disable=progress is None)
    batches = [extractor(images[start : start + batch_size]) for start in starts]
    return Features(*(None if parts[0] is None else np.concatenate(parts) for parts in zip(*batches)))


class InceptionExtractor:
    """Inception-v3 of 2015-12-05, the network of the published scores, by torch-fidelity's port of it.

    pool: the 2048 pooled features. probabilities: over the 1008 outputs, without the bias of the last layer, as
    inception scores of the ADM paper are. spatial: the first 7 channels of the 17x17 map after the 1x1 branch (with
    its ReLU) of the block called mixed_6 in TensorFlow and Mixed_6d here, channels last: 2023 numbers, for sFID.
    Grey images are repeated to three channels; any size is resized to 299 by the network's own rule.

    weights: a file; None reads $GD_INCEPTION_WEIGHTS, else the published file, downloaded once to torch hub's folder.
    Raises ImportError without torch-fidelity, FileNotFoundError without weights, ValueError for a wrong file.
    """

    name = "inception"
    dim = 2048

    def __init__(self, weights=None, device="cpu"):
        network_class = import_inception()
        self.device = torch.device(device)
        self.network = _build_inception(network_class, find_weights(weights)).to(self.device).eval()
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module, inputs, output):
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)   # [N,17*17*7]

    def __call__(self, images):
        x = _as_batch(images, channels=(1, 3), why="Inception reads grey or RGB")     # [N,C,H,W]
        with full_precision(self.device):
            pool, logits = self.network(x.expand(-1, 3, -1, -1).to(self.device))      # [N,2048], [N,1008]
            return Features(_to_numpy(pool), _probabilities(logits), _to_numpy(self._spatial))


class ClassifierExtractor:
    """A classifier checkpoint of this project, looked at without noise (t = 0): pool features and probabilities.

    Scores by its features compare only with scores by the same file. Images must have the size and the channels the
    classifier was trained on (ValueError otherwise).
    """

    def __init__(self, path, device="cpu"):
        from guided_diffusion.script_util import open_classifier

        self.name = str(path)
        self.device = torch.device(device)
        self.classifier, flags = open_classifier(path, device=device)
        self.channels, self.size = flags["image_channels"], flags["image_size"]
        self.dim = self(np.zeros((1, self.size, self.size, self.channels), np.uint8)).pool.shape[1]

    def __call__(self, images):
        x = _as_batch(images, (self.channels,), f"the classifier {self.name} was trained on {self.channels}")
        if x.shape[2:] != (self.size, self.size):
            raise ValueError(f"images are {list(x.shape[2:])} pixels, but {self.name} reads {self.size} squared")
        x = x.to(self.device, torch.float32) / 127.5 - 1                              # [N,C,H,W]
        t = torch.zeros(len(x), dtype=torch.long, device=self.device)                 # [N]
        with full_precision(self.device):
            return Features(_to_numpy(self.classifier.features(x, t)), _probabilities(self.classifier(x, t)))


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


def import_inception():
    """torch-fidelity's class of the network, also where torchvision (which the class has no use for) does not import.

    The package's own import comes first. If it fails, the one module is imported inside an empty package of the same
    name, and whatever either attempt left in sys.modules is taken out again.
    """
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        raise ImportError("Inception scores need torch-fidelity: pip install --no-deps torch-fidelity==0.4.0")
    module = "torch_fidelity.feature_extractor_inceptionv3"
    before = set(sys.modules)
    try:
        return importlib.import_module(module).FeatureExtractorInceptionV3
    except Exception:  # a missing torchvision raises ImportError, a broken one RuntimeError
        sys.modules["torch_fidelity"] = bare = types.ModuleType("torch_fidelity")
        bare.__path__ = list(spec.submodule_search_locations)
        try:
            return importlib.import_module(module).FeatureExtractorInceptionV3
        finally:
            for name in set(sys.modules) - before:
                if name.split(".")[0] in ("torch_fidelity", "torchvision"):
                    del sys.modules[name]


def find_weights(path=None):
    """The file of the Inception weights: path, else $GD_INCEPTION_WEIGHTS, else torch hub's copy (downloaded once).

    The published name must have the published content; another file of the user's own is used with a warning.
    """
    own = path or os.environ.get(WEIGHTS_VARIABLE)
    file = Path(own) if own else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if own and not file.is_file():
        raise FileNotFoundError(
            f"no Inception weights at {file} (from --weights or ${WEIGHTS_VARIABLE}): it must name {WEIGHTS_NAME}, "
            f"which is at {WEIGHTS_URL}"
        )
    if not file.is_file():
        _download(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digest.startswith(WEIGHTS_SHA256):
        problem = f"{file} has sha256 {digest[:8]}..., the published Inception weights have {WEIGHTS_SHA256}..."
        if file.name == WEIGHTS_NAME:
            raise ValueError(f"{problem}: delete the file and fetch it again from {WEIGHTS_URL}")
        print(f"warning: {problem}: scores will not compare with published ones", file=sys.stderr)
    return file


def _download(file):
    from guided_diffusion.download import fetch

    try:
        fetch(WEIGHTS_URL, file, f"sha256:{WEIGHTS_SHA256}")
    except (OSError, ValueError) as error:  # no network, no right to write; another content
        raise FileNotFoundError(
            f"no Inception weights: {error}; or name their file with --weights or ${WEIGHTS_VARIABLE}"
        ) from error


def _build_inception(network_class, file):
    """The network with the weights of a file, which is read as data: a pickle that wants to run code is refused.

    The class reads its own file, and trustingly; so it gets a copy in memory of what was read safely.
    """
    try:
        weights = io.BytesIO()
        torch.save(torch.load(file, map_location="cpu", weights_only=True), weights)
        weights.seek(0)
        layers = ["2048", "logits_unbiased"]
        return network_class(InceptionExtractor.name, layers, feature_extractor_weights_path=weights)
    except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{file} does not hold the Inception network ({reason}): expected {WEIGHTS_NAME}, from {WEIGHTS_URL}"
        ) from error


def _as_batch(images, channels, why):
    """uint8 images [N,H,W,C] as a tensor [N,C,H,W], after a look at their type, axes and channels (ValueError)."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} of shape {list(images.shape)}: expected uint8 [N,H,W,C]")
    if images.shape[3] not in channels:
        raise ValueError(f"images have {images.shape[3]} channels, but {why}")
    return torch.tensor(images).permute(0, 3, 1, 2)                                   # [N,C,H,W]


def _probabilities(logits):
    return _to_numpy(torch.softmax(logits.double(), dim=1))


def _to_numpy(x):
    return x.float().cpu().numpy()
