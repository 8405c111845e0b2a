"""A training step on images of noise, apart from any run: for measuring what it takes."""

import copy

import torch as th

from . import checks, ema, sizes
from .fp16_util import MixedPrecisionTrainer, make_adamw
from .nn import update_ema
from .script_util import create_classifier_and_diffusion, create_model_and_diffusion
from .tasks import ClassifierTask, DiffusionTask

TASKS = {  # the builder of the network and the process, the task, the option of 16 bits
    "diffusion": (create_model_and_diffusion, DiffusionTask, "use_fp16"),
    "classifier": (create_classifier_and_diffusion, ClassifierTask, "classifier_use_fp16"),
}


def labelled(kind, flags):
    """Whether such a network is trained with labels."""
    return kind == "classifier" or flags["class_cond"]


class Step:
    """
    What `Trainer` does with a batch, in one process.

    :param kind: of the network: a row of TASKS; a classifier has no averages.
    :param args: with precision, lr, weight_decay, ema_rate, ema_halflife and ema_power.
    :param flags: {name: value} of the network and its process.
    """

    def __init__(self, kind, args, flags, device):
        create, task, half = TASKS[kind]
        net, diffusion = create(**flags)
        self.flags, self.device = flags, device
        self.labelled = labelled(kind, flags)
        self.task = task(net.to(device), diffusion)
        precision = checks.precision_of(getattr(args, "precision", ""), flags[half], half)
        self.precision = MixedPrecisionTrainer(model=net, precision=precision)
        self.opt = make_adamw(self.precision.master_params, lr=args.lr, weight_decay=args.weight_decay)
        averages = ema.parse(args.ema_rate, args.ema_halflife, args.ema_power)
        self.averages = averages if kind == "diffusion" else []
        self.ema_params = [copy.deepcopy(self.precision.master_params) for _ in self.averages]

    def batch(self, n):
        """(images of noise [n,C,H,W], the conditions that the network takes)."""
        flags = self.flags
        x = th.randn(n, flags["image_channels"], *sizes.size_of(flags), device=self.device)
        cond = {"y": th.arange(n, device=self.device) % flags["num_classes"]} if self.labelled else {}
        width = flags.get("vector_channels")
        return x, cond | ({"vector": th.randn(n, width, device=self.device)} if width else {})

    def loss(self, x, cond):
        """The sum of the losses of images [n,C,H,W]."""
        t = th.arange(len(x), device=self.device) % self.task.num_timesteps
        return self.task.loss(self.task.net, x, cond, t, th.randn_like(x))["loss"].sum()

    def __call__(self, n, microbatch):
        """An update from n images, so many at a time."""
        self.precision.zero_grad()
        for start in range(0, n, microbatch):
            part = min(microbatch, n - start)
            self.precision.backward(self.loss(*self.batch(part)) / n)
        good, _ = self.precision.optimize(self.opt)
        for average, params in zip(self.averages, self.ema_params):
            update_ema(params, self.precision.master_params, rate=average.decay(1, n), where=good)
