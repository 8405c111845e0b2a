"""
Deep features kept from one step of a walk to the next (DeepCache, Ma et al. 2023, arXiv 2312.00858).

From step to step the features at low resolutions change little. So most steps run only the first and the last blocks of
a U-Net, and take what the others gave at the last full step: the less work, and an error, which is to be measured.
"""

from dataclasses import dataclass

import torch

from .unet import UNetModel


@dataclass
class Deep:
    """
    What a UNetModel keeps: the feature [N,C,...] that goes into its last `depth` output blocks, as its last full
    evaluation left it. With None there is nothing yet, and the next evaluation is a full one.
    """

    depth: int = 1
    feature: torch.Tensor | None = None


class Reusing:
    """
    A U-Net that is evaluated in full at every `every`-th row of a walk, at its first row and at row 0; in between, only
    its first and last `depth` blocks are. A call like the network's, for one walk at a time and one set of conditions.

    It must be told timesteps as `prediction.ask` tells them, which know their row. A row that is not below the one
    before begins a new walk, and is evaluated in full, as is a batch of another size.

    :param net: a UNetModel.
    :param every: 2 or more.
    :param depth: from 1 to one less than the number of its blocks on the way down.
    :raises ValueError: for another network, or numbers out of range.
    """

    def __init__(self, net, every, depth=1):
        if not isinstance(net, UNetModel):
            raise ValueError(f"features can be reused in the U-Net of --network adm only, not in {type(net).__name__}")
        if every < 2:
            raise ValueError(f"features are reused in all but every so many steps, 2 or more, not {every}")
        if not 1 <= depth < len(net.input_blocks):
            raise ValueError(
                f"the blocks that are not reused must be from 1 to {len(net.input_blocks) - 1} of the network's"
                f" {len(net.input_blocks)}, not {depth} (--reuse_depth)"
            )
        self.net, self.every = net, every
        self.deep, self._last = Deep(depth), None

    def __call__(self, x, timesteps, *args, **cond):
        row = getattr(timesteps, "row", None)
        if row is None:
            raise ValueError("features can be reused only in a walk of sampling.sample, which tells the row")
        ahead = self._last is not None and row < self._last[0] and self._last[1] == x.shape
        if not ahead or row % self.every == 0:
            self.deep.feature = None
        self._last = row, x.shape
        return self.net(x, timesteps, *args, deep=self.deep, **cond)
