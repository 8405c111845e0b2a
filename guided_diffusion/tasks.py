"""What a training loop trains: a network and its loss. The loop knows neither noise nor labels."""

import torch as th
import torch.nn.functional as F

from .resample import LossAwareSampler, UniformSampler


class DiffusionTask:
    """
    Denoising at sampled timesteps.

    A task has a `net`, the number of rows `num_timesteps` (for the log), a `prefix` for its log keys, and the methods
    `draw(n, device, rng) -> (t [n], weights [n])` and `loss(net, x0, cond, t, noise) -> {name: [n], "loss": [n]}`,
    where `net` is the network as the loop wrapped it and noise is N(0, I) like x0. It may have `learn(t, losses)`,
    called after each update with those of all processes; `condition(x0, cond, rng, normal) -> cond`, what a batch is
    conditioned on, where rng draws uniform numbers and `normal(x)` N(0, I) like x, each sample's its own; and
    `probe(x0, cond, t, noise) -> {name: number}`, called for each row of the log.
    """

    prefix = ""

    def __init__(self, model, diffusion, schedule_sampler=None):
        self.net = model
        self.diffusion = diffusion
        self.num_timesteps = diffusion.num_timesteps
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.learn = self.schedule_sampler.update_with_local_losses

    def draw(self, n, device, rng):
        return self.schedule_sampler.sample(n, device, rng)

    def loss(self, net, x0, cond, t, noise):
        return self.diffusion.training_losses(net, x0, t, model_kwargs=cond, noise=noise)

    def probe(self, x0, cond, t, noise):
        """How far the mean colour of the predicted x_0 is from that of the data, in each channel, in [-1,1] units."""
        if x0.ndim < 3:
            return {}
        x = self.diffusion.q_sample(x0, t, noise)
        pred = self.diffusion.predictor(self.net, clip_denoised=False)(x, t, **cond).x0
        shift = (pred.clamp(-1, 1) - x0).transpose(0, 1).flatten(1).mean(1)   # [C]
        return {f"x0_shift_c{channel}": value for channel, value in enumerate(shift[:4].tolist())}


class SuperResTask(DiffusionTask):
    """
    Denoising of large images given small ones, which are the large ones' means over blocks.

    :param small_size: their height and width in pixels.
    :param low_res_noise: Gaussian noise is added to them, of a standard deviation uniform in [0, this] for each image,
        so that the network mends the faults of images that were drawn (Ho et al. 2021, arXiv 2106.15282, section 4.1;
        here the network is not told how much).
    """

    def __init__(self, model, diffusion, schedule_sampler=None, *, small_size, low_res_noise=0.0):
        super().__init__(model, diffusion, schedule_sampler)
        if low_res_noise < 0:
            raise ValueError(f"low_res_noise is a standard deviation, 0 or more, not {low_res_noise}")
        self.small_size, self.low_res_noise = small_size, low_res_noise

    def condition(self, x0, cond, rng, normal):
        low_res = shrunk(x0, self.small_size)                                 # [N,C,h,w]
        if self.low_res_noise:
            levels = th.from_numpy(rng.random(len(x0)) * self.low_res_noise).to(low_res)
            low_res = low_res + levels[:, None, None, None] * normal(low_res)
        return cond | {"low_res": low_res}


def shrunk(x, side):
    """Images [N,C,H,W] as [N,C,side,side], each pixel the mean of the area that it covers."""
    return F.interpolate(x, (side, side), mode="area")


class ClassifierTask:
    """Classification of noised images (or clean ones, at t = 0); see `DiffusionTask` for the methods."""

    prefix = "train_"

    def __init__(self, classifier, diffusion, schedule_sampler=None, noised=True):
        self.net = classifier
        self.diffusion = diffusion
        self.num_timesteps = diffusion.num_timesteps
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.noised = noised

    def draw(self, n, device, rng):
        if not self.noised:
            return th.zeros(n, dtype=th.int64, device=device), th.ones(n, device=device)
        t, weights = self.schedule_sampler.sample(n, device, rng)
        return t, th.ones_like(weights)  # as the original: accuracy, not a bound, is the aim

    def loss(self, net, x0, cond, t, noise):
        x = self.diffusion.q_sample(x0, t, noise) if self.noised else x0
        logits = net(x, self.diffusion.clock(t))
        terms = {"loss": F.cross_entropy(logits, cond["y"], reduction="none")}
        for k in (1, min(5, logits.shape[1])):
            terms[f"acc@{k}"] = compute_top_k(logits, cond["y"], k, reduction="none")
        return terms


def compute_top_k(logits, labels, k, reduction="mean"):
    """Whether the label is among the k largest logits: its mean, or [N] with reduction "none"."""
    hits = (logits.topk(k, dim=-1).indices == labels[:, None]).any(-1).float()
    return hits.mean() if reduction == "mean" else hits
