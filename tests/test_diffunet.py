"""DiffUNet: counts, keys, outputs of the original with the same weights, its two ways of being called."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion import config
from guided_diffusion.diffunet import DiffUNet, network_flags
from guided_diffusion.network_options import ModelOptions
from guided_diffusion.prediction import x0_from_eps
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.script_util import create_model, create_model_and_diffusion, model_and_diffusion_defaults

GOLDEN = Path(__file__).parent / "golden" / "diffunet.npz"  # of deepinv 0.5.0, weights by the recipe below


def golden_weight(key, shape):
    """The recipe of the golden networks: N(0, 1) from the key's own seed, scaled so that layers keep their size."""
    w = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        w = w / np.sqrt(np.prod(shape[1:]))
    else:
        w = 0.1 * w + key.endswith("weight")
    return th.from_numpy(w.astype(np.float32))


@pytest.fixture(scope="module")
def golden_network():
    with th.device("meta"):
        network = DiffUNet(1, 1)
    network = network.to_empty(device="cpu").eval()
    tables = DiffUNet.derived()
    process = Process(get_named_beta_schedule("linear", 1000))
    for name in tables:  # made on the meta device too
        getattr(network, name).copy_(th.from_numpy(getattr(process, name)))
    network.load_state_dict({key: golden_weight(key, tuple(w.shape)) for key, w in network.state_dict().items()})
    return network


def golden_inputs():
    rng = np.random.RandomState(0)
    x = rng.standard_normal((2, 1, 32, 32))
    images, noise = rng.rand(2, 1, 32, 32), rng.standard_normal((2, 1, 32, 32))
    return (th.from_numpy(array.astype(np.float32)) for array in (x, images, noise))


def small(**changes):
    """A DiffUNet of 32 base channels, with weights that are not zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(network_flags.__globals__["FLAGS"], "diffunet", {"num_channels": 32, "num_res_blocks": 1,
                                                                       "attention": (16,)})  # fmt: skip
        network = DiffUNet(1, 1, **changes)
    th.manual_seed(0)
    th.nn.init.normal_(network.out[2].weight, std=0.05)
    return network.eval()


@pytest.mark.parametrize(
    "options, parameters",
    [
        ({"in_channels": 1, "out_channels": 1}, 93_555_841),
        ({"learn_sigma": True}, 93_563_910),
        ({"in_channels": 1, "out_channels": 1, "large_model": True}, 552_797_953),
    ],
)
def test_parameter_counts(options, parameters):
    with th.device("meta"):
        network = DiffUNet(**options)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("name, parameters", [("diffunet", 93_555_841), ("diffunet_large", 552_797_953)])
@pytest.mark.parametrize("image_size", [32, 256])
def test_the_flags_give_the_same_network_at_any_size(name, image_size, parameters):
    typed = {flag: str(value) for flag, value in network_flags(name, image_size).items()}
    words = [word for flag, value in typed.items() for word in (f"--{flag}", value)]
    words += ["--image_size", str(image_size), "--image_channels", "1"]
    flags = config.flags_of(config.parse("", ModelOptions, argv=words), ModelOptions)
    with th.device("meta"):
        network = create_model(**flags)
        ours = DiffUNet(1, 1, large_model=name == "diffunet_large")
    shapes = {key: w.shape for key, w in network.state_dict().items()}
    assert shapes == {key: w.shape for key, w in ours.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.dropout == 0.1 == ours.dropout


def test_attention_stands_at_factor_16_and_in_the_middle():
    with th.device("meta"):
        keys = DiffUNet(1, 1).state_dict().keys()
    found = {key.split(".qkv")[0] for key in keys if ".qkv.weight" in key}
    assert found == {"input_blocks.9.1", "middle_block.1", "output_blocks.2.1", "output_blocks.3.1"}


def test_a_fresh_network_says_zero():
    network = DiffUNet(1, 1)
    assert (network(th.randn(1, 1, 32, 32), th.tensor([5])) == 0).all()


@pytest.mark.parametrize("kind", ["timestep", "noise_level"])
def test_outputs_are_the_originals(golden_network, kind):
    x, images, noise = golden_inputs()
    with th.no_grad():
        if kind == "timestep":
            out = golden_network(x, th.tensor([3, 937]))
        else:
            sigma = th.tensor([0.05, 0.7])
            out = golden_network(images + sigma.reshape(2, 1, 1, 1) * noise, sigma, type_t=kind)
    with np.load(GOLDEN) as golden:
        expected = th.from_numpy(golden[kind])
    assert expected.shape == (2, 1, 32, 32)
    if kind == "noise_level":
        assert ((expected > 0) & (expected < 1)).float().mean() > 0.6  # most of it is not clamped
    th.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_a_noise_level_is_the_nearest_step_and_the_prediction_of_x0_there():
    network = small()
    process = Process(get_named_beta_schedule("linear", 1000))
    t = th.tensor([0, 250, 700])
    sigma = th.from_numpy(process.sqrt_recipm1_alphas_cumprod)[t] / 2                # in [0,1], half as wide
    image = th.rand(3, 1, 32, 32)
    noisy = image + sigma.float().reshape(3, 1, 1, 1) * th.randn(3, 1, 32, 32)
    with th.no_grad():
        denoised = network(noisy, sigma, type_t="noise_level")
        x_t = process.at("sqrt_alphas_cumprod", t, noisy) * (2 * noisy - 1)
        x0 = x0_from_eps(process, x_t, t, network(x_t, t)).clamp(-1, 1)
    th.testing.assert_close(denoised, (x0 + 1) / 2, rtol=0, atol=1e-5)
    with th.no_grad():
        assert (network(noisy[:1], 0.3, type_t="noise_level") == network(noisy[:1], th.tensor([0.3]),
                                                                         type_t="noise_level")).all()  # fmt: skip


def test_learned_variance_is_left_out_of_the_denoised_image():
    network = small(learn_sigma=True)
    x = th.rand(2, 1, 32, 32)
    with th.no_grad():
        assert network(x, th.tensor([3, 4])).shape == (2, 2, 32, 32)
        assert network(x, 0.1, type_t="noise_level").shape == (2, 1, 32, 32)


@pytest.mark.parametrize("side", [28, 33, 9, 1])
def test_other_sizes_are_continued_by_reflection(side):
    network = small()
    x, t = th.randn(1, 1, side, 32), th.tensor([40])
    more = -side % 32
    whole = th.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (more, 0), (0, 0)), mode="reflect"))
    with th.no_grad():
        assert whole.shape[2] % 32 == 0
        th.testing.assert_close(network(x, t), network(whole, t)[:, :, more:], rtol=0, atol=0)


def test_weights_travel_both_ways_and_nothing_derived_is_saved():
    network, other = small(), small()
    keys = network.state_dict().keys()
    assert not [key for key in keys if "cumprod" in key]
    assert {key.split(".")[0] for key in keys} == {"time_embed", "input_blocks", "middle_block", "output_blocks", "out"}
    originals = {key: w * 1.1 for key, w in network.state_dict().items()}
    tables = {"sqrt_1m_alphas_cumprod": th.zeros(1000), "sqrt_alphas_cumprod": th.zeros(1000)}
    other.load_state_dict({**originals, **tables})  # as the original saves
    network.load_state_dict(other.state_dict())
    x = th.rand(1, 1, 32, 32)
    with th.no_grad():
        a, b = (n(x, 0.2, type_t="noise_level") for n in (network, other))
    assert (a == b).all() and (network.sqrt_alphas_cumprod > 0).all()
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_a_model_trained_by_the_programs_fits():
    flags = model_and_diffusion_defaults() | network_flags("diffunet", 32)
    with th.device("meta"):
        model, diffusion = create_model_and_diffusion(**{**flags, "image_size": 32, "image_channels": 1})
        ours = DiffUNet(1, 1)
    assert list(model.state_dict()) == list(ours.state_dict())
    network = DiffUNet.derived()[0]
    assert getattr(diffusion, network)[0] == pytest.approx(0.99995, abs=1e-6)  # the same linear process


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="type_t is 'sigma'; choose timestep or noise_level"):
        small()(th.zeros(1, 1, 32, 32), th.tensor([0]), type_t="sigma")
    for side in (0, 28, 48):
        with pytest.raises(ValueError, match=f"image_size {side}: .* multiple of 32"):
            network_flags("diffunet", side)
