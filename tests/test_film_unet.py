"""The FiLM U-Net: its structure and counts, its formulas written out, its conditions and its guidance."""

import inspect
import math

import numpy as np
import pytest
import torch

from guided_diffusion import guidance
from guided_diffusion.film_unet import ResnetBlock, RMSNorm, Unet, sinusoidal
from guided_diffusion.script_util import create_gaussian_diffusion


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def count(model):
    return sum(p.numel() for p in model.parameters())


def small(**options):
    return Unet(8, 6, (1, 2), channels=1, **options).eval()


def inputs():
    return torch.randn(3, 1, 8, 12), torch.tensor([0, 40, 99]), torch.randn(3, 6)


# ---- structure


def test_s0_12_signature():
    parameters = inspect.signature(Unet).parameters
    assert list(parameters)[:5] == ["dim", "condition_dim", "dim_mults", "channels", "uncond_prob"]
    assert [parameters[name].default for name in list(parameters)[2:5]] == [(1, 2, 4, 8), 3, 0.2]


def test_s0_17_parameter_counts_and_widths():
    model = Unet(2, 4, (1, 2, 4))
    assert count(model) == 6499 and count(Unet(48, 512, (1, 2, 4, 8))) == 12_444_963

    def widths(stages):
        blocks = [block for stage in stages for block in stage if isinstance(block, ResnetBlock)]
        return [(b.block1.proj.in_channels, b.block1.proj.out_channels, b.mlp[1].in_features) for b in blocks]

    assert widths(model.downs) == [(2, 2, 8)] * 4 + [(4, 4, 8)] * 2
    assert widths(model.ups) == [(8, 4, 8)] * 2 + [(4, 2, 8)] * 4
    assert widths([model.mid]) == [(8, 8, 8)] * 2
    assert [(d[2].in_channels, d[2].out_channels, d[2].kernel_size, d[2].stride) for d in model.downs] == [
        (2, 2, (2, 2), (2, 2)), (2, 4, (2, 2), (2, 2)), (4, 8, (2, 2), (2, 2)),
    ]  # fmt: skip
    assert [(up[0][1].in_channels, up[0][1].out_channels) for up in model.ups] == [(8, 4), (4, 2), (2, 2)]
    assert [block.dropout.p for block in model.mid] == [0.1, 0.1]


def test_s0_14_block_written_out():
    block = ResnetBlock(3, 4, 5).double().eval()
    x, context = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 5).double()
    block.block1.norm.g.data.normal_()

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def normed(part, x):
        h = part.proj(x)
        return h / h.square().sum(1, keepdim=True).sqrt() * math.sqrt(4) * part.norm.g

    scale, shift = (gelu(context) @ block.mlp[1].weight.T + block.mlp[1].bias)[..., None, None].split(4, dim=1)
    h = gelu(normed(block.block2, gelu(normed(block.block1, x) * (scale + 1) + shift)))
    torch.testing.assert_close(block(x, context), h + block.res_conv(x), rtol=1e-12, atol=1e-12)
    assert isinstance(ResnetBlock(4, 4, 5).res_conv, torch.nn.Identity)
    assert (RMSNorm(4)(torch.zeros(1, 4, 2, 2)) == 0).all()


def test_s0_13_the_walk_written_out():
    """Skips after each block of the way down, joined in reverse behind the features of the way up."""
    model = small().double()
    x, t, vector = torch.randn(2, 1, 4, 8).double(), torch.tensor([3, 50]), torch.randn(2, 6).double()
    time = sinusoidal(t, 8).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guided_diffusion.film_unet.sinusoidal", lambda t, dim: time)
        out = model(x, t, {"text_emb": vector})
    context = model.time_mlp(time) + model.condition_mlp(vector)
    h = model.init_conv(x)
    a = model.downs[0][0](h, context)
    b = model.downs[0][1](a, context)
    c = model.downs[1][0](model.downs[0][2](b), context)
    d = model.downs[1][1](c, context)
    h = model.mid[1](model.mid[0](model.downs[1][2](d), context), context)
    for (up, first, second), skips in zip(model.ups, [(d, c), (b, a)]):
        h = torch.nn.functional.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
        h = first(torch.cat([up[1](h), skips[0]], 1), context)
        h = second(torch.cat([h, skips[1]], 1), context)
    torch.testing.assert_close(out, model.final_conv(h), rtol=1e-12, atol=1e-12)


def test_s0_16_sinusoidal_embedding():
    t = torch.tensor([0.0, 7.0, 99.5])
    for dim in (8, 48):
        frequencies = np.exp(-np.log(10000) * np.arange(dim // 2) / (dim // 2 - 1))
        angle = t.double().numpy()[:, None] * frequencies
        expected = torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)], 1))
        torch.testing.assert_close(sinusoidal(t, dim).double(), expected, rtol=0, atol=2e-5)


def test_m0_11_narrow_and_odd_embeddings():
    t = torch.tensor([0.0, 7.0])
    torch.testing.assert_close(sinusoidal(t, 2), torch.stack([t.sin(), t.cos()], 1))
    assert sinusoidal(t, 5).shape == (2, 5) and torch.equal(sinusoidal(t, 5)[:, :4], sinusoidal(t, 4))
    assert not sinusoidal(t, 5)[:, 4].any()
    assert Unet(3, 4, (1, 2))(torch.randn(1, 3, 4, 4), torch.tensor([5])).shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="2 or more, not 1"):
        Unet(1, 4)


def test_m0_12_channels_and_sizes():
    model = Unet(4, 6, (1, 2, 4), channels=2)
    assert model(torch.randn(2, 2, 8, 24), torch.tensor([1, 2])).shape == (2, 2, 8, 24)
    with pytest.raises(ValueError, match=r"images of 12x8 cannot be halved 3 times.*divisible by 8"):
        model(torch.randn(2, 2, 12, 8), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"x must be floats of shape \[any,2,any,any\], got float32 \[2, 3, 8, 8\]"):
        model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))
    assert Unet(4, 6, channels=2, learn_sigma=True).final_conv.out_channels == 4


# ---- conditions


def test_s0_18_no_vector_is_the_zero_vector_in_either_mode():
    model, (x, t, vector) = small(dropout=0.0, uncond_prob=1.0), inputs()
    zero = model(x, t, vector=torch.zeros(3, 6))
    for empty in ({}, {"text_emb": None}, None):
        assert torch.equal(model(x, t, empty), zero)
    given = model(x, t, {"text_emb": vector})
    assert torch.equal(given, model(x, t, vector=vector)) and not torch.allclose(given, zero)
    assert torch.equal(model.train()(x, t, vector=vector), given)  # whatever uncond_prob is: the training step drops
    assert model.uncond_prob == 1.0


def test_a_network_without_vectors():
    model, (x, t, vector) = Unet(8, 0, (1, 2), channels=1), inputs()
    assert model(x, t).shape == x.shape and not hasattr(model, "condition_mlp")
    with pytest.raises(ValueError, match="takes no vector"):
        model(x, t, vector=vector)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 5), torch.zeros(2, 6), torch.zeros(3, 6, dtype=int), "a text"])
def test_vectors_that_do_not_fit(wrong):
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=r"vector must be floats of shape \[3,6\], got"):
        small()(x, t, {"text_emb": wrong})


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_s0_19_its_guidance_is_ours_with_scale_1_plus_w(batched, learn_sigma):
    """And as M0.1, M0.16: the caller's dict stays as it is, and a learned variance is that of the condition."""
    model, (x, t, vector) = small(learn_sigma=learn_sigma), inputs()
    kwargs = {"text_emb": vector, "cfg_scale": 1.5}
    out = model.cfg_forward(x, t, kwargs, batched)
    assert set(kwargs) == {"text_emb", "cfg_scale"}
    assert torch.equal(model(x, t, kwargs), model.cfg_forward(x, t, kwargs))
    given, free = model(x, t, vector=vector), model(x, t)
    torch.testing.assert_close(out[:, :1], 2.5 * given[:, :1] - 1.5 * free[:, :1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[:, 1:], given[:, 1:])
    diffusion = create_gaussian_diffusion(steps=100, learn_sigma=learn_sigma)

    def guide(predict):
        return guidance.classifier_free(predict, {"vector": 0.0}, 2.5)

    ours = diffusion.predictor(model, False, guide=guide)(x, t, vector=vector)
    its = diffusion.predictor(lambda x, t: model.cfg_forward(x, t, kwargs), False)(x, t)
    torch.testing.assert_close(ours.eps, its.eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.variance, its.variance)
    assert torch.equal(model.cfg_forward(x, t, {"text_emb": vector, "cfg_scale": 0}, False), given)


def test_m0_01_guided_at_every_step():
    """Null calls are counted over a whole walk, the same dict being passed at each step."""
    model, seen = small(dropout=0.0), []
    embed = model.condition_mlp.forward
    model.condition_mlp.forward = lambda v, n: seen.append((v == 0).all(1).sum().item()) or embed(v, n)
    diffusion = create_gaussian_diffusion(steps=20, noise_schedule="cosine")
    kwargs = {"text_emb": torch.randn(2, 6), "cfg_scale": 1.0}
    diffusion.p_sample_loop(model, (2, 1, 8, 8), model_kwargs={"model_kwargs": kwargs})
    assert seen == [2] * 20 and set(kwargs) == {"text_emb", "cfg_scale"}


def test_guidance_that_cannot_be():
    model, (x, t, vector) = small(), inputs()
    with pytest.raises(ValueError, match="cfg_scale 0 or more, not -1"):
        model.cfg_forward(x, t, {"text_emb": vector, "cfg_scale": -1})
    with pytest.raises(ValueError, match=r"guidance needs text_emb, \[N,6\]"):
        model(x, t, {"cfg_scale": 1.0})


def test_half_precision_in_the_body():
    model, (x, t, vector) = small(), inputs()
    full = model(x, t, vector=vector).detach()
    model.convert_to_fp16()
    assert model.init_conv.weight.dtype == model.ups[0][0][1].weight.dtype == torch.float16
    assert model.final_conv.weight.dtype == model.mid[0].mlp[1].weight.dtype == torch.float32
    out = model(x, t, vector=vector)
    assert out.dtype == torch.float32 and not torch.equal(out, full)
    torch.testing.assert_close(out, full, rtol=0, atol=0.01 * float(full.abs().max()))
    model.convert_to_fp32()
    assert model(x, t, vector=vector).dtype == torch.float32
