"""The gradient of a classifier in 16 bits, where what is left of it would be lost on the way back to the image."""

import pytest
import torch as th

from guided_diffusion import guidance
from guided_diffusion.unet import EncoderUNetModel

OPTIONS = {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1,
           "channel_mult": (1, 2), "attention_resolutions": (2,), "num_heads": 2}  # fmt: skip


def unscaled(classifier, x, t, y, marginal=1.0):
    """The same gradient in its plain form."""
    x = x.clone().requires_grad_()
    logits = classifier(x, t).float()
    log_p = logits.log_softmax(1).gather(1, y[:, None])[:, 0] + (1 - marginal) * logits.logsumexp(1)
    return th.autograd.grad(log_p.sum(), x)[0]


def surely(dtype, bias=14.0):
    """Two classes, the first far ahead by the mean of x, which passes through a dtype on its way."""
    return lambda x, t: th.stack([bias + x.type(dtype).float().flatten(1).mean(1), th.zeros(len(x))], dim=1)


@pytest.mark.parametrize("dtype, precision", [(th.float16, 2**-11), (th.bfloat16, 2**-8), (th.float32, 1e-6)])
def test_a_gradient_below_the_smallest_float16_comes_through(dtype, precision):
    x, t, y = th.zeros(2, 3, 16, 16), th.zeros(2), th.zeros(2, dtype=th.long)
    plain, got = unscaled(surely(dtype), x, t, y), guidance.classifier_gradient(surely(dtype))(x, t, y)
    exact = th.sigmoid(th.tensor(-14.0, dtype=th.float64)) / x[0].numel()  # (1 - p) / D
    assert exact < 2**-25 and bool((plain == 0).all()) == (dtype == th.float16)
    full = unscaled(surely(th.float32), x, t, y)  # it has 1 - p from p
    th.testing.assert_close(full.double(), exact.expand_as(got), rtol=5e-3, atol=0)
    th.testing.assert_close(got, full, rtol=precision, atol=0)
    scaled = guidance.classifier_gradient(surely(dtype), scale=th.tensor([1.0, 3.0]))(x, t, y)
    th.testing.assert_close(scaled, got * th.tensor([1.0, 3.0])[:, None, None, None], rtol=1e-6, atol=0)


def encoder():
    """A classifier that is sure of class 1, of more than the float32 neighbours of p = 1."""
    th.manual_seed(0)
    net = EncoderUNetModel(**OPTIONS).eval()
    for p in net.parameters():
        th.nn.init.normal_(p, std=0.05)
    net.out[-2].bias.data = th.tensor([0.0, 13.0, 0.0, 1.0])
    return net


def test_a_network_in_float16():
    x, t = th.randn(3, 3, 16, 16, generator=th.Generator().manual_seed(1)), th.tensor([0, 300, 900])
    y = th.tensor([1, 1, 2])  # of the last one it is sure that it is wrong
    exact = unscaled(encoder(), x, t, y)
    net = encoder()
    net.convert_to(th.float16)
    got, plain = guidance.classifier_gradient(net)(x, t, y), unscaled(net, x, t, y)
    lost, kept = ((each - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1) for each in (plain, got))
    assert kept.max() < 0.02 and lost[:2].min() > 0.5 and lost[2] < 0.02


@pytest.mark.parametrize("marginal", [1.0, 0.5, 0.0, 2.0])
def test_in_float32_not_a_bit_changes(marginal):
    x, t = th.randn(4, 3, 16, 16, generator=th.Generator().manual_seed(1)), th.tensor([0, 300, 900, 5])
    net, y = encoder(), th.tensor([1, 0, 2, 3])
    got = guidance.classifier_gradient(net, marginal=marginal)(x, t, y)
    assert got.any() and th.equal(got, unscaled(net, x, t, y, marginal))


def test_the_power_of_two():
    p = th.tensor([1 - 2**-10, 0.5, 1e-9, 0.75], dtype=th.float64)
    assert guidance._lift(p.log(), 1.0).tolist() == [2**10, 2, 2, 4]
    assert guidance._lift(p.log(), 0.0).tolist() == [1, 1, 1, 1]  # the gradient is onehot_y
    assert guidance._lift(p.log(), 2.0).tolist() == [2, 1, 1, 2]  # the larger of |1 - 2p| and 2 (1 - p)
    assert guidance._lift(th.zeros(1), 1.0).tolist() == [2**60]
