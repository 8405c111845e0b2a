"""What training shows of itself on the way: pictures of samples, and their distance to the data."""

import os

import torch as th

from . import dist_util, generate, logger, pictures, sizes

COLUMNS, ROWS = 8, 4


class Watch:
    """
    Samples of the averaged weights, by DDIM, the same noise each time. The methods take a `Trainer` whose task has a
    diffusion; collective.

    :param flags: of the network.
    :param folder: of the pictures.
    :param num_classes: labels in turn, where the network takes labels.
    :param given: what the network is told besides, as `generate.sample_stream` takes it; None: vectors of zeros, where
        it takes vectors.
    :param steps: of DDIM.
    :param batch_size: samples at once in each process.
    """

    def __init__(self, diffusion, flags, folder, *, num_classes=0, given=None, steps=50, batch_size=16, seed=0):
        self.diffusion, self.flags, self.folder = diffusion, flags, folder
        self.num_classes, self.steps, self.batch_size, self.seed = num_classes, steps, batch_size, seed
        width = flags.get("vector_channels", 0)
        self.given = given or ({"vector": lambda indices: th.zeros(len(indices), width)} if width else None)

    def samples(self, trainer, count):
        """uint8 [count,H,W,C] on the first process, None elsewhere."""
        labels = [i % self.num_classes for i in range(count)] if self.num_classes else None
        with trainer.averaged() as net, th.no_grad():
            stream = generate.sample_stream(
                self.diffusion,
                net,
                shape=(self.flags["image_channels"], *sizes.size_of(self.flags)),
                num_samples=count,
                batch_size=self.batch_size,
                seed=self.seed,
                labels=labels,
                num_classes=self.num_classes if labels else 0,
                given=self.given,
                sampler="ddim",
                steps=min(self.steps, self.diffusion.num_timesteps),
                device=dist_util.dev(),
                rank=dist_util.rank(),
                num_ranks=dist_util.world_size(),
            )
            drawn = generate.collect(stream)
        return drawn and drawn[0]

    def picture(self, trainer):
        """Write samples_at_NNNNNN.png, and show it where the log has pictures."""
        images = self.samples(trainer, COLUMNS * ROWS)
        if images is not None:
            path = os.path.join(self.folder, f"samples_at_{trainer.step:06d}.png")
            pictures.save_grid(path, images, COLUMNS, title=f"{trainer.step} updates")
            logger.logimage("samples", path, trainer.step)

    def score(self, trainer, count, scores):
        """Put what `scores(images)`, a dict, says of `count` samples into the next row of the log."""
        images = self.samples(trainer, count)
        if images is not None:
            logger.logkvs(scores(images))
