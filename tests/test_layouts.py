"""Channels last: the same numbers, a layout that survives all blocks or is told of, and files as ever."""

import pytest
import torch as th
import torch.nn.functional as F

from guided_diffusion import checkpoint, config, logger, nn, program, tasks
from guided_diffusion.compiling import compile_blocks
from guided_diffusion.ema import Rate
from guided_diffusion.film_unet import Unet as FilmUnet
from guided_diffusion.layouts import blocks_of, to_channels_last
from guided_diffusion.reuse import Reusing
from guided_diffusion.sampling_options import SampleOptions
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.train_util import Trainer
from guided_diffusion.unet import AttentionBlock, EncoderUNetModel, UNetModel

SIZES = {"image_size": 16, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "num_heads": 2,
         "attention_resolutions": (2,)}  # fmt: skip
KINDS = {
    "the usual": {"use_scale_shift_norm": True, "resblock_updown": True},
    "the original's": {},
    "averages": {"conv_resample": False, "use_checkpoint": True},
}


def network(kind=UNetModel, **options):
    th.manual_seed(0)
    net = kind(**SIZES | {"in_channels": 3, "out_channels": 6} | options)
    for p in net.parameters():
        th.nn.init.normal_(p, std=0.05)
    return net


def a_step(net, channels=3):
    """The output and all gradients at one made-up input."""
    x = th.randn(2, channels, 16, 16, generator=th.Generator().manual_seed(1))
    out = net(x, th.tensor([3, 500]))
    return out, *th.autograd.grad(out.square().mean(), list(net.parameters()))


@pytest.mark.parametrize("kind", [UNetModel, EncoderUNetModel])
@pytest.mark.parametrize("name", KINDS)
def test_the_same_numbers_and_a_layout_that_survives_every_block(kind, name):
    said = []
    net = to_channels_last(network(kind, **KINDS[name]), said.append)
    for one, other in zip(a_step(net), a_step(network(kind, **KINDS[name]))):
        th.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    count = len(blocks_of(net))
    assert count == (9 if kind is UNetModel else 5)
    assert said == [f"channels last: {count} of {count} blocks keep the layout"]
    a_step(net)
    assert len(said) == 1  # only once
    assert a_step(net)[0].is_contiguous()
    assert nn.is_channels_last(net.input_blocks[0][0].weight) and not nn.is_channels_last(net.time_embed[0].weight)


def test_inside_of_the_blocks(monkeypatch):
    """No convolution or norm of feature maps is given one that is laid out otherwise."""
    net = to_channels_last(network(**KINDS["the usual"]), lambda line: None)
    seen = []
    for module in net.modules():
        if isinstance(module, (th.nn.Conv2d, nn.GroupNorm32)):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]) if args[0].dim() == 4 else None)
    with th.inference_mode():
        net(th.randn(2, 3, 16, 16), th.zeros(2))
    assert len(seen) == 10 * 4 + 5 + 3  # 10 residual blocks, 5 skips with weights, one convolution and norm at the ends
    assert [nn.is_channels_last(x) for x in seen] == [False] + 47 * [True]  # the image


def test_blocks_that_do_not_keep_the_layout_are_named(monkeypatch):
    monkeypatch.setattr(AttentionBlock, "forward", lambda self, x, *tokens: x.contiguous())
    said = []
    with th.inference_mode():
        to_channels_last(network(), said.append)(th.randn(2, 3, 16, 16), th.zeros(2))
    assert said == [
        "channels last: 6 of 9 blocks keep the layout, but not input_blocks.3, output_blocks.0, middle_block, whose "
        "outputs are copied"
    ]


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_norm_by_moments_is_the_norm(adaptive):
    """The form that GPUs take, against torch's own norm in float64; its result is laid out as what it is given."""
    norm = nn.normalization(64)
    th.nn.init.normal_(norm.weight), th.nn.init.normal_(norm.bias)
    x = (3 + th.randn(2, 64, 5, 7)).contiguous(memory_format=th.channels_last)
    scale, shift = (th.randn(2, 64), th.randn(2, 64)) if adaptive else (th.zeros(2, 64), th.zeros(2, 64))
    gain, offset = (norm.weight * (1 + scale), norm.bias * (1 + scale) + shift)
    got = norm._by_moments(x, *((gain, offset) if adaptive else (norm.weight, norm.bias)))
    plain = F.group_norm(x.double().contiguous(), 32, eps=norm.eps)
    want = plain * gain.double()[..., None, None] + offset.double()[..., None, None]
    th.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)
    assert nn.is_channels_last(got)
    gradients = [th.autograd.grad(y.double().cos().sum(), norm.weight, retain_graph=True)[0] for y in (got, want)]
    th.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_where_the_norm_takes_that_form(monkeypatch):
    """On a device that is no CPU, of maps with channels last alone; meta tensors stand for such a device."""
    taken = []
    monkeypatch.setattr(nn.GroupNorm32, "_by_moments", lambda self, x, *_: taken.append(x.shape) or x)
    norm, x = nn.normalization(64).to("meta"), th.empty(2, 64, 4, 4, device="meta")
    norm(x), norm(x.flatten(2)), nn.normalization(64)(th.zeros(2, 64, 4, 4).contiguous(memory_format=th.channels_last))
    assert not taken
    norm(x.contiguous(memory_format=th.channels_last))
    norm(x.contiguous(memory_format=th.channels_last), x[:, :, 0, 0], x[:, :, 0, 0])
    assert len(taken) == 2


def test_with_features_that_are_reused():
    outputs = []
    for net in (network(), to_channels_last(network(), lambda line: None)):
        reusing, x = Reusing(net.eval(), every=2), th.linspace(-1, 1, 2 * 768).view(2, 3, 16, 16)
        with th.inference_mode():
            for row in (3, 2, 1):
                t = th.full((2,), row)
                t.row = row
                outputs.append(reusing(x + row, t))
    for k in range(3):
        th.testing.assert_close(outputs[k], outputs[3 + k], rtol=1e-5, atol=1e-6)


def test_it_is_laid_out_before_its_blocks_are_compiled(monkeypatch):
    monkeypatch.setattr("guided_diffusion.compiling.check", lambda device: None)
    monkeypatch.setattr(th.nn.Module, "compile", lambda self, **how: None)
    args = config.parse("", SampleOptions, argv=["--compile", "--channels_last"])
    net = program.hastened(args, network())
    assert nn.is_channels_last(net.input_blocks[0][0].weight) and compile_blocks(net) is net
    args = config.parse("", SampleOptions, argv=[])
    assert not nn.is_channels_last(program.hastened(args, network()).input_blocks[0][0].weight)


def trained(folder, steps, precision="fp32", **options):
    net = network(**KINDS["the usual"])
    folder.mkdir(exist_ok=True)
    diffusion = create_gaussian_diffusion(steps=10, learn_sigma=True, noise_schedule="cosine")
    first = options.pop("seen", 0)
    data = ((th.randn(4, 3, 16, 16, generator=th.Generator().manual_seed(k)), {}) for k in range(first, 99))
    trainer = Trainer(tasks.DiffusionTask(net, diffusion), data, batch_size=4, lr=1e-2, averages=[Rate(0.9)],
                      save_interval=2, iterations=steps, folder=str(folder), precision=precision,
                      background_save=False, **options)  # fmt: skip
    trainer.run_loop()
    return trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_files_are_as_ever_and_resume_exactly(tmp_path, precision):
    """Laid out as usual on the disk, optimizer's moments and averages too; in memory as the weights, resumed or not."""
    with logger.scoped_configure(dir=str(tmp_path / "log"), format_strs=[]):
        whole = trained(tmp_path / "whole", 4, precision, channels_last=True)
        trained(tmp_path / "half", 2, precision, channels_last=True)
        newest = str(tmp_path / "half" / "model000002.pt")
        resumed = trained(tmp_path / "half", 4, precision, channels_last=True, resume_checkpoint=newest, seen=2)
        plain = trained(tmp_path / "plain", 4, precision)
    for file in ("model000004.pt", "ema_0.9_000004.pt", "opt000004.pt"):
        one, other, usual = (checkpoint.load(tmp_path / name / file) for name in ("whole", "half", "plain"))
        if file.startswith("opt"):
            one, other, usual = ({f"{i}{k}": v for i, held in each["state"].items() for k, v in held.items()}
                                 for each in (one, other, usual))  # fmt: skip
        assert list(one) == list(usual)
        for name, tensor in one.items():
            assert tensor.stride() == usual[name].stride() and th.equal(tensor, other[name]), name
    for trainer in (whole, resumed):
        for master, average in zip(trainer.mp_trainer.master_params, trainer.ema_params[0]):
            moments = [trainer.opt.state[master][name] for name in ("exp_avg", "exp_avg_sq")]
            assert {t.stride() for t in (average, *moments)} == {master.stride()}
        assert sum(nn.is_channels_last(each) for each in trainer.mp_trainer.master_params) > 10
    if precision == "fp32":
        gaps = [float((a - b).detach().abs().max()) for a, b in zip(whole.ema_params[0], plain.ema_params[0])]
        assert max(gaps) < 2e-2  # a step of Adam's has the size of lr wherever a gradient is rounding alone


def test_networks_that_have_no_such_layout():
    for net in (FilmUnet(32, 8, (1, 2)), network(dims=1)):
        with pytest.raises(ValueError, match=f"for images in networks of --network adm, not for {type(net).__name__}"):
            to_channels_last(net, print)
    with pytest.raises(ValueError, match="--channels_last True is for whole networks: not with --sharding fsdp"):
        Trainer(None, None, batch_size=1, sharding="fsdp", channels_last=True)
