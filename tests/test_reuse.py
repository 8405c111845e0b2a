"""Deep features kept from step to step: when the whole network runs, and what it costs."""

from collections import deque
from functools import partial

import pytest
import torch as th

from guided_diffusion import checks, config, guidance, sampling
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.process import get_named_beta_schedule
from guided_diffusion.reuse import Reusing
from guided_diffusion.sampling_options import SampleOptions
from guided_diffusion.unet import EncoderUNetModel, UNetModel

OPTIONS = {"image_size": 16, "in_channels": 3, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2),
           "attention_resolutions": (2,), "num_heads": 2, "use_scale_shift_norm": True}  # fmt: skip


@pytest.fixture
def net():
    th.manual_seed(0)
    net = UNetModel(out_channels=3, num_classes=5, **OPTIONS).eval()
    for p in net.parameters():
        th.nn.init.normal_(p, std=0.05)
    return net


def process(steps, total=1000):
    kinds = ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL, LossType.MSE
    whole = GaussianDiffusion(betas=get_named_beta_schedule("linear", total), model_mean_type=kinds[0],
                              model_var_type=kinds[1], loss_type=kinds[2])  # fmt: skip
    return whole.spaced(sampling.plan(whole, "ddim", steps)[1])


def drawn(net, steps, n=2, guide=None, seed=1):
    x = th.randn(n, 3, 16, 16, generator=th.Generator().manual_seed(seed))
    diffusion = process(steps)
    predict = diffusion.predictor(net, guide=guide)
    walk = sampling.sample(diffusion, predict, sampling.ddim, x, cond={"y": th.arange(n) % 4})
    return deque(walk, maxlen=1).pop()[0]


def counted(net):
    """How often the middle of a network runs, by the batch it ran on."""
    runs = []
    net.middle_block.register_forward_hook(lambda module, args, out: runs.append(len(out)))
    return runs


@pytest.mark.parametrize("steps, every, whole", [(7, 3, 3), (6, 3, 3), (8, 2, 5), (5, 9, 2), (1, 2, 1)])
def test_the_first_row_row_0_and_every_kth_are_whole(net, steps, every, whole):
    """7 rows, every third: rows 6, 3, 0."""
    runs, reusing = counted(net), Reusing(net, every)
    drawn(reusing, steps)
    assert len(runs) == whole
    drawn(reusing, steps)  # another walk begins anew
    assert len(runs) == 2 * whole


def test_walks_of_a_reusing_network_are_independent(net):
    reusing = Reusing(net, 4)
    first = drawn(reusing, 6, seed=1)
    drawn(reusing, 6, seed=2)
    assert th.equal(drawn(reusing, 6, seed=1), first)


def test_a_walk_that_was_left_leaves_nothing_behind(net):
    reusing, diffusion = Reusing(net, 8), process(6)
    x = th.randn(2, 3, 16, 16)
    walk = sampling.sample(diffusion, diffusion.predictor(reusing), sampling.ddim, x, cond={"y": th.arange(2)})
    next(walk), next(walk)
    assert th.equal(drawn(reusing, 6), drawn(Reusing(net, 8), 6))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_exact_where_the_deep_path_says_nothing(net, depth):
    """Where what goes into the last blocks is a constant, features from another step are as good as new ones."""
    block = net.output_blocks[-depth - 1]
    for layer in block:
        for conv in (layer.out_layers[3], layer.skip_connection) if hasattr(layer, "out_layers") else ():
            th.nn.init.zeros_(conv.weight)
        if hasattr(layer, "proj_out"):
            th.nn.init.zeros_(layer.proj_out.weight)
        if hasattr(layer, "conv"):
            th.nn.init.zeros_(layer.conv.weight)
    runs = counted(net)
    th.testing.assert_close(drawn(Reusing(net, 5, depth), 5), drawn(net, 5), rtol=0, atol=1e-6)
    assert len(runs) == 2 + 5


def test_the_blocks_that_are_not_reused_see_each_step(net):
    """A full depth but one leaves nothing but the deepest blocks old; what differs shrinks with more of them new."""
    exact = drawn(net, 12)
    gaps = [(drawn(Reusing(net, 3, depth), 12) - exact).abs().max().item() for depth in (1, 3)]
    assert 0 < gaps[1] < gaps[0]


def test_the_error_falls_as_the_steps_grow(net):
    """
    Features of one step ago are off by what a step changes: with four times the steps, a fraction of it. The time is
    not told, since a network that was never trained takes neighbouring timesteps for unrelated ones.
    """
    th.nn.init.zeros_(net.time_embed[2].weight)
    gaps = [(drawn(Reusing(net, 2), steps) - drawn(net, steps)).square().mean().sqrt() for steps in (20, 80)]
    assert gaps[1] < gaps[0] / 2.5


def test_guidance_in_one_batch_keeps_both_halves(net):
    guide = partial(guidance.classifier_free, null={"y": 4}, scale=2.0, batched=True)
    runs = counted(net)
    there = drawn(Reusing(net, 2), 4, guide=guide)
    assert runs == [4, 4, 4]  # rows 3, 2, 0
    assert (there - drawn(net, 4, guide=guide)).abs().max() < 0.5  # not the halves exchanged
    for k in (0, 1):  # nor the samples
        y = {"y": th.arange(2)[k : k + 1] % 4}
        diffusion = process(4)
        x = th.randn(2, 3, 16, 16, generator=th.Generator().manual_seed(1))[k : k + 1]
        walk = sampling.sample(diffusion, diffusion.predictor(Reusing(net, 2), guide=guide), sampling.ddim, x, cond=y)
        th.testing.assert_close(deque(walk, maxlen=1).pop()[0], there[k : k + 1], rtol=0, atol=1e-5)


def test_another_batch_is_not_given_old_features(net):
    """Guidance within an interval: the batch is twice as large there only."""

    def guide(predict):
        guided = guidance.classifier_free(predict, {"y": 4}, 2.0, batched=True)
        return guidance.interval(guided, predict, 3, 5)

    runs = counted(net)
    drawn(Reusing(net, 100), 8, guide=guide)
    assert runs == [2, 4, 2, 2]  # rows 7, 5, 2 and 0


@pytest.mark.parametrize("kind", [ModelMeanType.EPSILON, ModelMeanType.EDM])
def test_networks_are_told_the_row(kind):
    told = []
    diffusion = process(4)
    diffusion.model_mean_type = kind
    walk = sampling.sample(diffusion, diffusion.predictor(lambda x, t: told.append(t.row) or 0 * x), sampling.ddim,
                           th.randn(2, 3, 4, 4))  # fmt: skip
    deque(walk, maxlen=0)
    assert told == [3, 2, 1, 0]


def test_what_cannot_be_reused(net):
    classifier = EncoderUNetModel(out_channels=5, **OPTIONS)
    with pytest.raises(ValueError, match="--network adm only, not in EncoderUNetModel"):
        Reusing(classifier, 2)
    with pytest.raises(ValueError, match="2 or more, not 1"):
        Reusing(net, 1)
    for depth in (0, 4):
        with pytest.raises(ValueError, match=f"from 1 to 3 of the network's 4, not {depth}"):
            Reusing(net, 2, depth)
    with pytest.raises(ValueError, match="tells the row"):
        Reusing(net, 2)(th.zeros(1, 3, 16, 16), th.zeros(1), y=th.zeros(1, dtype=th.int64))


@pytest.mark.parametrize("words, message", [
    ("--reuse_every 0", "--reuse_every must be 1 or more, not 0"),
    ("--reuse_every 2 --reuse_depth 0", "--reuse_depth must be 1 or more, not 0"),
    ("--reuse_depth 2", "no effect at --reuse_every 1"),
    ("--reuse_every 2 --guidance_scale 2 --guidance_batched False", "each other's features"),
])  # fmt: skip
def test_options_that_contradict(words, message):
    args = config.parse("", SampleOptions, argv=words.split())
    with pytest.raises(ValueError, match=message):
        checks.check_reuse(args)
