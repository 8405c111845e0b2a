"""
What is compared: networks of the sizes that are measured, with their plain form, and the same work for both of them.

Weights are random, those that start at zero as well, so that outputs tell the two apart; only the demo's may be read
from the folder that `make demo` wrote.
"""

import contextlib
from functools import partial

import plain
import plain_steps
import torch as th

from guided_diffusion import config, ema, generate, guidance, presets, sampling
from guided_diffusion.compiling import compile_blocks
from guided_diffusion.fp16_util import PRECISIONS, MixedPrecisionTrainer, make_adamw
from guided_diffusion.network_options import ClassifierOptions, DiffusionOptions, ModelOptions
from guided_diffusion.nn import update_ema
from guided_diffusion.reuse import Reusing
from guided_diffusion.script_util import (
    create_classifier_and_diffusion,
    create_model_and_diffusion,
    open_classifier,
    open_diffusion,
)
from guided_diffusion.train_util import DiffusionTask, Trainer

NETWORKS = {  # flags, and images at a time
    "attention-heavy": ({"image_size": 32, "num_channels": 32, "channel_mult": "1,2,2", "num_res_blocks": 2,
                         "attention_resolutions": "32,16,8"}, 8),
    "convolution-heavy": ({"image_size": 32, "num_channels": 64, "channel_mult": "1,2,2", "num_res_blocks": 2,
                           "attention_resolutions": "8", "num_head_channels": 64}, 8),
    "demo": ({"image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 2, "num_head_channels": 32,
              "attention_resolutions": "4", "noise_schedule": "cosine"}, 64),
}  # fmt: skip
GUIDE = {"image_size": 8, "image_channels": 1, "num_classes": 10, "classifier_width": 32, "classifier_depth": 1,
         "classifier_attention_resolutions": "4", "classifier_num_head_channels": 32,
         "noise_schedule": "cosine"}  # fmt: skip
MEMORY = {"image_size": 64, "num_channels": 32, "channel_mult": "1,2,2", "num_res_blocks": 2,
          "attention_resolutions": "32"}  # fmt: skip
# The published sizes at which steps are measured on a GPU, and images at a time in training and in sampling.
PUBLISHED = {"imagenet64": (64, 64), "imagenet128": (32, 32), "imagenet256": (16, 16)}
TINY = {"num_channels": 32, "num_res_blocks": 1, "num_head_channels": 32, "image_size": 16, "channel_mult": "1,2",
        "attention_resolutions": "8", "num_classes": 10}  # fmt: skip
TINY_GUIDE = {"image_size": 16, "classifier_width": 32, "classifier_depth": 1, "classifier_channel_mult": "1,2",
              "classifier_attention_resolutions": "8", "classifier_num_head_channels": 32,
              "num_classes": 10}  # fmt: skip


def filled(net, seed=0):
    """The network with weights that are random everywhere."""
    random = th.Generator().manual_seed(seed)
    for p in net.parameters():
        scale = 0.5 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        more = scale * th.randn(p.shape, generator=random)
        p.data = (more if p.ndim > 1 else p.data.cpu() + more).to(p.device)
    return net


def diffusion_of(flags, device="cpu"):
    """(network, process) of the flags of ModelOptions and DiffusionOptions that are not as usual."""
    flags = config.defaults(ModelOptions, DiffusionOptions) | flags
    net, process = create_model_and_diffusion(**flags)
    return filled(net).to(device), process


def classifier_of(flags, device="cpu"):
    """The classifier of the flags that are not as usual."""
    flags = config.defaults(ClassifierOptions, DiffusionOptions) | flags
    return filled(create_classifier_and_diffusion(**flags)[0], 1).to(device)


def published(name, tiny):
    """(flags of the network, flags of its classifier) of a preset; small ones of the same kind if `tiny`."""
    flags = presets.PRESETS[name].flags | (TINY if tiny else {}) | {"use_fp16": False}
    guide = TINY_GUIDE if tiny else presets.PRESETS[presets.PRESETS[name].classifier].flags
    return flags, guide


def quick(net, precision, compile, device):
    """The network as one runs it on a GPU: 16 bits, channels last, its blocks compiled."""
    net.convert_to(PRECISIONS[precision])
    return laid_out(net, compile, device)


def laid_out(net, compile, device):
    """The network with channels last on a GPU, and its blocks compiled if asked for."""
    net = net.to(memory_format=th.channels_last) if th.device(device).type == "cuda" else net
    return compile_blocks(net) if compile else net


def batch_of(flags, count, device="cpu", seed=0):
    """(x [N,C,S,S], t [N], labels or None) to call a network with."""
    random = th.Generator().manual_seed(seed)
    size, channels = flags["image_size"], flags.get("image_channels", 3)
    x, t = th.randn(count, channels, size, size, generator=random), th.randint(1000, (count,), generator=random)
    y = th.randint(flags.get("num_classes", 1000), (count,), generator=random) if flags.get("class_cond") else None
    return x.to(device), t.to(device), y if y is None else y.to(device)


# ---------------------------------------------------------------------------------------------------- evaluations


def evaluations(net, other, batch):
    """Works that evaluate the plain network `other` and ours; each returns its output."""
    x, t, y = batch
    given = (x, t) if y is None else (x, t, y)

    def literal():
        with th.no_grad():
            return other(*given)

    def ours():
        with th.inference_mode():
            return net(*given)

    return {"plain": literal, "ours": ours}


# ------------------------------------------------------------------------------------------------------- training


def trainings(net, process, flags, count, device="cpu", **ours):
    """
    Works that take one whole training step each: noise, loss, gradients, optimizer, average, log. The plain form starts
    from a copy of the weights.

    :param ours: what else `Trainer` takes; precision bf16 or fp16 makes the plain form train in fp16.
    """
    x0, _, y = batch_of(flags, count, device)
    half = ours.get("precision", "fp32") != "fp32"
    literal = plain_steps.PlainTrainer(plain.plain_of(net), plain_steps.PlainDiffusion(process), fp16=half)

    def step():
        t = th.randint(process.num_timesteps, (count,), device=device)
        literal.step(x0, t, th.randn_like(x0), y)

    return {"plain": step, "ours": our_training(net, process, x0, y, **ours)}


def our_training(net, process, x0, y=None, **how):
    """A work that takes one whole training step of ours on a batch."""
    trainer = Trainer(DiffusionTask(net, process), None, batch_size=len(x0), averages=ema.parse("0.9999"), **how)
    return partial(trainer.run_step, x0, {} if y is None else {"y": y})


def gradients(net, process, flags, count, device="cpu"):
    """The gradients of one loss by both: two lists of tensors."""
    x, t, y = batch_of(flags, count, device)
    noise, found = x.flip(0), []
    literal = plain.plain_of(net)
    losses = [plain_steps.PlainDiffusion(process).losses(literal, x, t, noise, y),
              process.training_losses(net, x, t, {} if y is None else {"y": y}, noise)]  # fmt: skip
    for each, terms in zip((literal, net), losses):
        found.append(th.autograd.grad(terms["loss"].mean(), list(each.parameters())))
    return found


def updates(module, device="cpu"):
    """
    Works of optimizer and average alone, with the norms that are logged: {part: works}, the parts "" for all, "AdamW
    alone" and "average alone"; gradients are made up once.
    """
    copy = th.nn.ParameterList(th.nn.Parameter(p.detach().clone()) for p in module.parameters())
    for p, other in zip(module.parameters(), copy):
        p.grad = 1e-3 * th.randn_like(p)
        other.grad = p.grad.clone()
    literal, mixed = plain_steps.PlainTrainer(copy, None, weight_decay=0.01), MixedPrecisionTrainer(model=module)
    opt = make_adamw(mixed.master_params, lr=1e-4, weight_decay=0.01)
    average = [p.detach().clone() for p in mixed.master_params]

    def ours():
        good, _ = mixed.optimize(opt)
        update_ema(average, mixed.master_params, rate=0.9999, where=good)
        return average

    def plainly():
        literal.optimize()
        return literal.averages[0]

    alone = {"plain": literal.opt.step, "ours": opt.step}
    averages = {
        "plain": lambda: [a.mul_(0.9999).add_(p.detach(), alpha=1e-4) for a, p in zip(average, mixed.master_params)],
        "ours": lambda: update_ema(average, mixed.master_params, rate=0.9999),
    }
    return {"": {"plain": plainly, "ours": ours}, "AdamW alone": alone, "average alone": averages}


# ------------------------------------------------------------------------------------------------------- sampling


class Walks:
    """
    Ancestral or DDIM walks of both sides, guided by a classifier; image i is the same function of (seed, i).

    :param sampler: "ddpm" or "ddim".
    :param rows: how many rows of the process, spaced evenly, are kept.
    """

    def __init__(self, net, process, classifier, rows, scale, sampler="ddpm", classes=10, literal=None):
        self.net, self.classifier, self.sampler, self.classes = net, classifier, sampler, classes
        kept = sampling.plan(process, sampler, rows)[1]
        self.process, self.whole = process.spaced(kept), process
        other, guide = literal or (plain.plain_of(net), plain.plain_of(classifier))
        self.plain_net, self.plain_process = other, plain_steps.PlainDiffusion(self.process)
        self.plain_gradient = plain_steps.classifier_gradient(guide, scale)
        self.gradient = guidance.classifier_gradient(classifier, scale)
        self.device = next(net.parameters()).device
        self.labelled = getattr(net, "num_classes", None) is not None

    def labels(self, count):
        return th.arange(count, device=self.device) % self.classes

    def literal(self, count, shape, seed=0, own_noise=True):
        """x [N,C,H,W] of the plain form; with noise of torch, or else that of ours."""
        noise, y = sampling.SeededNoise(seed, range(count), self.device), self.labels(count)
        draw = th.randn_like if own_noise else noise
        x = noise.normal(*shape)
        for row in reversed(range(self.process.num_timesteps)):
            t = th.full((count,), row, device=self.device)
            if self.sampler == "ddim":
                x = self.plain_process.ddim(self.plain_net, x, t, y, self.plain_gradient)
            else:
                x = self.plain_process.ancestral(self.plain_net, x, t, draw(x), y, self.plain_gradient)
        return x

    def ours(self, count, shape, seed=0, sampler="", every=1, reuse=1, **walk):
        """
        x [N,C,H,W] as the sampling programs draw; `sampler` takes rows of the whole process in place of these.

        :param every: the classifier is asked at every so many rows, with so many times the scale.
        :param reuse: deep features of the network are computed at every so many rows.
        """
        net, process = self.net, self.whole if sampler else self.process
        net = Reusing(net, reuse) if reuse > 1 else net

        def steer(predict):
            grad_fn = process.told_rows(guidance.scaled(self.gradient, every))
            return guidance.every(guidance.classifier_guided(predict, grad_fn), predict, every)

        stream = generate.sample_stream(
            process, net if self.labelled else lambda x, t, y=None: net(x, t), shape=shape, num_samples=count,
            batch_size=count, seed=seed, labels=self.labels(count).tolist(), device=self.device, sampler=sampler,
            use_ddim=self.sampler == "ddim" and not sampler, steer=steer if every > 1 else None,
            cond_fn=self.gradient if every == 1 else None, **walk,
        )  # fmt: skip
        return th.cat([x for _, x, _ in stream])

    def works(self, count, shape):
        return {"plain": partial(self.literal, count, shape), "ours": partial(self.ours, count, shape)}


def free_of_classifier(net, process, count, rows, scale=3.0):
    """
    Works that walk with classifier-free guidance: two evaluations a step in the plain form; the last class of the
    network stands for none.
    """
    process = process.spaced(sampling.plan(process, "ddpm", rows)[1])
    other, literal = plain.plain_of(net), plain_steps.PlainDiffusion(process)
    null, shape = net.num_classes - 1, (net.in_channels, net.image_size, net.image_size)
    y = th.arange(count) % null
    guide = guidance.classifier_free
    told = plain_steps.classifier_free(other, null, scale)

    def plainly(draw=th.randn_like):
        noise = sampling.SeededNoise(0, range(count))
        x = noise.normal(*shape)
        for row in reversed(range(rows)):
            t = th.full((count,), row)
            x = literal.ancestral(told, x, t, (draw or noise)(x), y)
        return x

    def ours(batched):
        stream = generate.sample_stream(
            process, net, shape=shape, num_samples=count, batch_size=count, labels=y.tolist(),
            guide=lambda predict: guide(predict, {"y": null}, scale, batched=batched),
        )  # fmt: skip
        return th.cat([x for _, x, _ in stream])

    return {"plain": plainly, "ours": partial(ours, False), "ours, batched": partial(ours, True)}


def demo_networks(folder=None):
    """(network, process, classifier) of the demo: from its folder, or with random weights."""
    if folder is None:
        return *(each.eval() if isinstance(each, th.nn.Module) else each
                 for each in diffusion_of(NETWORKS["demo"][0])), classifier_of(GUIDE).eval()  # fmt: skip
    with contextlib.suppress(StopIteration):
        model, process, _ = open_diffusion(str(next((folder / "model").glob("ema_*.pt"))))
        return model, process, open_classifier(str(next((folder / "classifier").glob("model*.pt"))))[0]
    raise FileNotFoundError(f"no networks in {folder}: give --demo the folder that make demo wrote")
