"""Blocks through torch.compile: the same numbers, or one line that says why not."""

import shutil

import pytest
import torch as th

from guided_diffusion import compiling, config, program
from guided_diffusion.film_unet import Unet as FilmUnet
from guided_diffusion.sampling_options import SampleOptions
from guided_diffusion.train_util import Trainer
from guided_diffusion.unet import EncoderUNetModel, UNetModel

OPTIONS = {"image_size": 8, "in_channels": 3, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1,),
           "attention_resolutions": (), "num_heads": 2, "use_scale_shift_norm": True, "dropout": 0.2}  # fmt: skip
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


def network(kind=UNetModel):
    th.manual_seed(0)
    net = kind(out_channels=3, **OPTIONS)
    for p in net.parameters():
        th.nn.init.normal_(p, std=0.05)
    return net


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_compiled_blocks_give_the_same_numbers():
    """Evaluation, and the output and gradients of a training step with dropout, whose masks are the same."""
    eager, net = network(), compiling.compile_blocks(network())
    x, t = th.randn(2, 3, 8, 8), th.tensor([3, 500])

    def step(net):
        th.manual_seed(3)
        out = net.train()(x, t)
        return out, *th.autograd.grad(out.square().mean(), list(net.parameters()))

    for one, other in zip(step(net), step(eager)):
        th.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with th.inference_mode():
        th.testing.assert_close(net.eval()(x, t), eager.eval()(x, t), rtol=1e-5, atol=1e-6)
    assert list(net.state_dict()) == list(eager.state_dict())
    assert not th._dynamo.utils.counters["graph_break"]
    graphs = th._dynamo.utils.counters["stats"]["unique_graphs"]
    net.eval()(x, t + 1)
    assert th._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 8  # of a mode without inference_mode
    net.eval()(x + 1, t)
    assert th._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 8  # nothing is compiled again


@pytest.fixture
def eager_backend(monkeypatch):
    """Compilation that records which blocks it was asked for, and compiles nothing."""
    seen = []
    monkeypatch.setattr(compiling, "check", lambda device: seen.append(device))
    monkeypatch.setattr(th.nn.Module, "compile", lambda self, **how: seen.append(type(self).__name__))
    return seen


def test_blocks_are_what_is_compiled(eager_backend):
    net = network()
    assert compiling.compile_blocks(net) is net
    assert eager_backend == [th.device("cpu"), "ResBlock", "ResBlock", "AttentionBlock", *["ResBlock"] * 3]
    limit = "recompile_limit" if hasattr(th._dynamo.config, "recompile_limit") else "cache_size_limit"
    assert getattr(th._dynamo.config, limit) >= compiling.VARIANTS


def test_programs_compile_where_asked(eager_backend):
    args = config.parse("", SampleOptions, argv=["--compile"])
    program.hastened(args, network())
    program.compiled(args, network(EncoderUNetModel))
    assert len(eager_backend) == 7 + 5
    program.hastened(config.parse("", SampleOptions, argv=[]), network())
    assert len(eager_backend) == 12


def test_a_network_without_such_blocks(eager_backend):
    with pytest.raises(ValueError, match="for the blocks of --network adm: Unet has none"):
        compiling.compile_blocks(FilmUnet(32, 8, (1, 2)))
    assert not eager_backend


def test_where_compilation_does_not_work(monkeypatch):
    def broken(function):
        raise RuntimeError("no working\nC++ compiler")

    monkeypatch.setattr(th, "compile", broken)
    with pytest.raises(ValueError, match=r"--compile: .* on cpu \(no working C\+\+ compiler\); .* or drop --compile"):
        compiling.compile_blocks(network())
    monkeypatch.setattr(th, "compile", lambda function: lambda x: x)
    with pytest.raises(ValueError, match="gives other numbers"):
        compiling.check("cpu")


def test_not_of_shared_networks():
    with pytest.raises(ValueError, match="--compile True is for whole networks: not with --sharding fsdp"):
        Trainer(None, None, batch_size=1, sharding="fsdp", compile=True)
