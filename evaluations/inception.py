"""Inception-v3 of 2015-12-05, the network of the published scores, as TensorFlow ran it; and the file of its weights.

Szegedy et al. 2016 (arXiv 1512.00567) with the quirks of the graph that FID was defined on: average pooling that does
not count the padding, a maximum where the last block should average, 1008 outputs, and a resize without half-pixel
centres. The names of the parameters are those of torch-fidelity and pytorch-fid, whose weights file this loads.
"""

import os
import pickle
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from evaluations import door

WEIGHTS_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_NAME = WEIGHTS_URL.rsplit("/", 1)[1]
WEIGHTS_SHA256 = "6726825d"  # first digits
WEIGHTS_VARIABLE = "GD_INCEPTION_WEIGHTS"
SIZE = 299  # pixels a side
SPATIAL_CHANNELS = 7

# A block is branches side by side (;) of layers in a row (,); | forks the end of a branch. A layer is a pooling, or the
# name, channels and kernel [/stride] of a convolution; stride 1 keeps the size.
BLOCK_35 = (
    "branch1x1 64 1x1; branch5x5_1 48 1x1, branch5x5_2 64 5x5;"
    "branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3; average, branch_pool {} 1x1"
)
BLOCK_17 = (
    "branch1x1 192 1x1; branch7x7_1 {0} 1x1, branch7x7_2 {0} 1x7, branch7x7_3 192 7x1;"
    "branch7x7dbl_1 {0} 1x1, branch7x7dbl_2 {0} 7x1, branch7x7dbl_3 {0} 1x7, branch7x7dbl_4 {0} 7x1,"
    "branch7x7dbl_5 192 1x7; average, branch_pool 192 1x1"
)
BLOCK_8 = (
    "branch1x1 320 1x1; branch3x3_1 384 1x1, branch3x3_2a 384 1x3 | branch3x3_2b 384 3x1;"
    "branch3x3dbl_1 448 1x1, branch3x3dbl_2 384 3x3, branch3x3dbl_3a 384 1x3 | branch3x3dbl_3b 384 3x1;"
    "{}, branch_pool 192 1x1"
)
BLOCKS = {
    "Mixed_5b": BLOCK_35.format(32),
    "Mixed_5c": BLOCK_35.format(64),
    "Mixed_5d": BLOCK_35.format(64),
    "Mixed_6a": "branch3x3 384 3x3/2; branch3x3dbl_1 64 1x1, branch3x3dbl_2 96 3x3, branch3x3dbl_3 96 3x3/2; maximum/2",
    "Mixed_6b": BLOCK_17.format(128),
    "Mixed_6c": BLOCK_17.format(160),
    "Mixed_6d": BLOCK_17.format(160),
    "Mixed_6e": BLOCK_17.format(192),
    "Mixed_7a": "branch3x3_1 192 1x1, branch3x3_2 320 3x3/2; branch7x7x3_1 192 1x1,"
                "branch7x7x3_2 192 1x7, branch7x7x3_3 192 7x1, branch7x7x3_4 192 3x3/2; maximum/2",
    "Mixed_7b": BLOCK_8.format("average"),
    "Mixed_7c": BLOCK_8.format("maximum"),
}  # fmt: skip
POOLINGS = {
    "average": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    "maximum": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    "maximum/2": partial(F.max_pool2d, kernel_size=3, stride=2),
}


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU. kernel: "HxW", padded to keep the size, or "HxW/2", not padded."""

    def __init__(self, channels, out, kernel, same=True):
        super().__init__()
        size, _, stride = kernel.partition("/")
        height, width = map(int, size.split("x"))
        padding = (height // 2, width // 2) if same and not stride else 0
        self.conv = nn.Conv2d(channels, out, (height, width), int(stride or 1), padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """A row of the table BLOCKS: branches of [N,channels,H,W], whose ends are put together to [N,self.channels,...]."""

    def __init__(self, channels, text):
        super().__init__()
        self.channels, self.branches = 0, []
        for branch in text.split(";"):
            width, steps = channels, []
            for step in branch.split(","):
                layers = [layer.split() for layer in step.split("|")]
                for name, *how in layers:
                    if how:
                        self.add_module(name, Convolution(width, int(how[0]), how[1]))
                steps.append([name for name, *_ in layers])
                width = sum(int(how[0]) for _, *how in layers if how) or width
            self.branches.append(steps)
            self.channels += width

    def forward(self, x):
        return torch.cat([self._through(branch, x) for branch in self.branches], 1)

    def _through(self, branch, x):
        for step in branch:
            x = torch.cat([(POOLINGS.get(name) or getattr(self, name))(x) for name in step], 1)
        return x


class Inception(nn.Module):
    """Images [N,3,299,299], values 0..255, to {layer: features}: the six layers of torch-fidelity, and "spatial".

    "64", "192", "768": means over the positions of early maps; "2048": the pooled features; "logits_unbiased",
    "logits" [N,1008], without and with the bias of the last layer; "spatial" [N,2023]: the first 7 of 192 channels of
    the 17x17 map after the 1x1 branch (with its ReLU) of the block called mixed_6 in TensorFlow, channels last.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, "3x3/2")
        self.Conv2d_2a_3x3 = Convolution(32, 32, "3x3", same=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, "3x3")
        self.Conv2d_3b_1x1 = Convolution(64, 80, "1x1")
        self.Conv2d_4a_3x3 = Convolution(80, 192, "3x3", same=False)
        channels = 192
        for name, text in BLOCKS.items():
            self.add_module(name, Block(channels, text))
            channels = getattr(self, name).channels
        self.fc = nn.Linear(channels, 1008)
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @property
    def dtype(self):
        """The dtype that the convolutions compute in."""
        return self.Conv2d_1a_3x3.conv.weight.dtype

    def convert_to(self, dtype):
        """
        Compute in a dtype. Of 16 bits, it is that of the convolutions and of what passes between them; the norms'
        parameters, the means and the last layer stay float32. Returns the network.
        """
        if dtype.itemsize > 2:
            return self.to(dtype)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype)
        return self

    def _keep_spatial(self, module, inputs, output):
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)   # [N,17*17*7]

    def forward(self, x):
        layers = {}
        x = ((x - 128) / 128).to(self.dtype)                                          # [N,3,299,299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))             # [N,64,147,147]
        x = POOLINGS["maximum/2"](x)
        layers["64"] = _mean(x)
        x = POOLINGS["maximum/2"](self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))          # [N,192,35,35]
        layers["192"] = _mean(x)
        for name in BLOCKS:
            x = getattr(self, name)(x)
            if name == "Mixed_6e":
                layers["768"] = _mean(x)
        layers["2048"] = x = _mean(x)
        layers["logits_unbiased"] = x @ self.fc.weight.T
        layers["logits"] = layers["logits_unbiased"] + self.fc.bias
        return layers | {"spatial": self._spatial}


def _mean(x):
    """The mean over positions, summed in float32 at least: [N,C,H,W] -> [N,C]."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).mean((2, 3))


# ------------------------------------------------------------------------------------------------------------- resize


def resize_tf1(x):
    """Bilinear, as TensorFlow 1 did it: pixel j of the result reads j * old / new, no half-pixel centres."""
    return _stretched(_stretched(x, 3), 2)


def _stretched(x, axis):
    size = x.shape[axis]
    at = torch.arange(SIZE, dtype=torch.float32, device=x.device) * torch.tensor(size / SIZE, dtype=torch.float32)
    low = at.long()
    high = (low + 1).clamp_max(size - 1)
    share = (at - low).to(x.dtype).view((-1, 1) if axis == 2 else (-1,))
    start = x.index_select(axis, low)
    return start + (x.index_select(axis, high) - start) * share


# Rules to bring [N,C,H,W], values 0..255, to 299 squared. tf1 is the published one; half_pixel is what newer
# pytorch-fid does, antialias what torchmetrics does, bicubic what clean-fid does (Pillow's, unrounded).
RESIZES = {
    "tf1": resize_tf1,
    "half_pixel": partial(F.interpolate, size=(SIZE, SIZE), mode="bilinear", align_corners=False),
    "antialias": partial(F.interpolate, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True),
    "bicubic": lambda x: F.interpolate(
        x, size=(SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True
    ).clamp(0, 255),
}


# ------------------------------------------------------------------------------------------------------------ weights


def find_weights(path=None, allow_other=False):
    """(file of the Inception weights, its sha256): path, else $GD_INCEPTION_WEIGHTS, else the published file in torch
    hub's folder, downloaded once with a progress bar.

    :param allow_other: take a file of the user's own with another content, with a warning, instead of refusing it.
    :raises FileNotFoundError: saying which file to put where.
    :raises ValueError: for another content than the published one.
    """
    own = path or os.environ.get(WEIGHTS_VARIABLE)
    file = Path(own) if own else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_NAME
    if own and not file.is_file():
        raise FileNotFoundError(
            f"no Inception weights at {file} (from --weights or ${WEIGHTS_VARIABLE}): it must name {WEIGHTS_NAME}, "
            f"which is at {WEIGHTS_URL}"
        )
    if not file.is_file():
        try:
            door.fetch(WEIGHTS_URL, file, f"sha256:{WEIGHTS_SHA256}")
        except (OSError, ValueError) as error:  # no network, no right to write; another content
            raise FileNotFoundError(
                f"no Inception weights: {error}; or name their file with --weights or ${WEIGHTS_VARIABLE}"
            ) from error
    digest = door.sha256(file)
    if not digest.startswith(WEIGHTS_SHA256):
        problem = f"{file} has sha256 {digest[:8]}..., the published Inception weights have {WEIGHTS_SHA256}..."
        if not allow_other or file.name == WEIGHTS_NAME:
            raise ValueError(
                f"{problem}: it is damaged or another network; fetch {WEIGHTS_NAME} from {WEIGHTS_URL}, or use the "
                "file all the same with --allow_other_weights, for scores that compare with none published"
            )
        print(f"warning: {problem}: scores will not compare with published ones", file=sys.stderr)
    return file, digest


def load(file):
    """The network with the weights of a file, in evaluation mode. The file is data: nothing in it is executed.

    :raises ValueError: if it does not hold this network.
    """
    network = Inception()
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (RuntimeError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{file} does not hold the Inception network ({reason}): expected {WEIGHTS_NAME}, from {WEIGHTS_URL}"
        ) from error
    return network.requires_grad_(False).eval()
