"""U-Nets: golden outputs and gradients, published state dicts, each stated behaviour, and bad input."""

import inspect
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn as tnn
from torch.nn.attention import SDPBackend, sdpa_kernel

from guided_diffusion import unet
from guided_diffusion.memory import activation_bytes
from guided_diffusion.nn import UsageError, normalization, timestep_embedding

GOLDEN = Path(__file__).parent / "golden"
SMALL = json.loads((GOLDEN / "networks.json").read_text())
ZOO = json.loads((GOLDEN / "model_zoo.json").read_text())

TINY = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
    "num_heads": 2,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rnd(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def golden_weight(key, shape):
    w = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        w = w / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("weight"):
        w = 1 + 0.1 * w
    else:
        w = 0.1 * w
    return torch.from_numpy(w.astype(np.float32))


def filled(model):
    """The model in eval mode, with the golden recipe's weights instead of zeros and draws."""
    model.load_state_dict({k: golden_weight(k, tuple(v.shape)) for k, v in model.state_dict().items()})
    return model.eval()


def tiny(cls=unet.UNetModel, **kwargs):
    return filled(cls(**{**TINY, **kwargs}))


def tiny_classifier(**kwargs):
    return tiny(unet.EncoderUNetModel, **{"out_channels": 10, **kwargs})


def deviation(a, b):
    a, b = (torch.as_tensor(t).detach().double() for t in (a, b))
    return float((a - b).abs().max() / b.abs().max())


def on_meta(cls, *args, **kwargs):
    with torch.device("meta"):
        return cls(*args, **kwargs)


# ---- golden numbers and published checkpoints


@pytest.mark.parametrize("name", SMALL)
def test_golden_network(name):
    case = SMALL[name]
    model = getattr(unet, case["cls"])(**case["kwargs"])
    shapes = [(k, list(v.shape)) for k, v in model.state_dict().items()]
    assert shapes == list(case["state_dict"].items())
    filled(model)
    x = rnd(1, 2, case["kwargs"]["in_channels"], *case["spatial"]).requires_grad_()
    inputs = {}
    if case["classes"]:
        inputs["y"] = torch.tensor([1, 7])
    if case["low_res"]:
        inputs["low_res"] = rnd(2, 2, 3, 8, 8)
    out = model(x, torch.tensor([3, 700]), **inputs)
    (out * rnd(3, *out.shape)).sum().backward()
    with np.load(GOLDEN / "networks.npz") as golden:
        assert deviation(out, golden[f"{name}/output"]) < 3e-5
        assert deviation(x.grad, golden[f"{name}/input_grad"]) < 3e-5


MULTIPLIERS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}


def published(kind, flags):
    """The network that the original's programs build from these flags, on the meta device."""
    if kind == "cls":
        size = flags.get("image_size", 64)
        return on_meta(
            unet.EncoderUNetModel, size, 3, 128, 1000, flags.get("classifier_depth", 2),
            [size // r for r in (32, 16, 8)], channel_mult=MULTIPLIERS[size], num_head_channels=64,
            use_scale_shift_norm=True, resblock_updown=True, pool="attention",
        )
    if kind == "sr":
        cls, size = unet.SuperResModel, flags.get("large_size", 256)
        multipliers = MULTIPLIERS[64 if size == 64 else 256]
    else:
        cls, size = unet.UNetModel, flags.get("image_size", 64)
        given = flags.get("channel_mult")
        multipliers = tuple(map(int, given.split(","))) if given else MULTIPLIERS[size]
    names = ["num_head_channels", "resblock_updown", "use_new_attention_order", "dropout"]
    return on_meta(
        cls, size, 3, flags.get("num_channels", 128), 6 if flags.get("learn_sigma") else 3,
        flags.get("num_res_blocks", 2),
        [size // int(r) for r in flags.get("attention_resolutions", "16,8").split(",")],
        channel_mult=multipliers, num_classes=1000 if flags.get("class_cond") else None,
        num_heads=flags.get("num_heads", 4), use_scale_shift_norm=flags.get("use_scale_shift_norm", True),
        **{name: flags[name] for name in names if name in flags},
    )


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ZOO)
def test_state_dict_of_published_checkpoint(name):
    model = published(ZOO[name]["kind"], ZOO[name]["flags"])
    state = model.state_dict()
    assert {v.device.type for v in state.values()} == {"meta"}
    assert [(k, list(v.shape)) for k, v in state.items()] == list(ZOO[name]["state_dict"].items())
    assert count(model) == ZOO[name]["parameters"]


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("64x64_diffusion", 295_904_454, 541),
        ("128x128_diffusion", 421_529_606, 493),
        ("256x256_diffusion", 553_838_086, 567),
        ("256x256_diffusion_uncond", 552_814_086, 566),
        ("lsun_cat", 552_814_086, 566),
        ("512x512_diffusion", 558_997_638, 645),
        ("64_256_upsampler", 311_795_910, 567),
        ("128_512_upsampler", 308_835_270, 537),
        ("64x64_classifier", 65_438_568, 307),
        ("128x128_classifier", 42_568_040, 221),
        ("256x256_classifier", 54_096_360, 249),
        ("512x512_classifier", 54_448_360, 281),
        ("defaults_model", 92_025_731, 338),
    ],
)
def test_parameter_counts(name, parameters, tensors):
    model = published(ZOO[name]["kind"], ZOO[name]["flags"])
    assert (count(model), len(model.state_dict())) == (parameters, tensors)


def attention_heads(blocks):
    """{index of the block: number of heads} of those blocks that have attention."""
    layers = [(i, layer) for i, block in enumerate(blocks) for layer in block]
    return {i: layer.num_heads for i, layer in layers if isinstance(layer, unet.AttentionBlock)}


def test_block_layout_of_the_published_models():
    model = published("model", ZOO["64x64_diffusion"]["flags"])
    assert len(model.input_blocks) == len(model.output_blocks) == 16
    assert attention_heads(model.input_blocks) == {5: 6, 6: 6, 7: 6, 9: 9, 10: 9, 11: 9, 13: 12, 14: 12, 15: 12}
    widths = [block[0].in_layers[0].num_channels for block in model.output_blocks]
    assert widths == [1536, 1536, 1536, 1344, 1344, 1152, 1152, 960, 960, 768, 768, 576, 576, 384, 384, 384]
    ups = [i for i, block in enumerate(model.output_blocks) if isinstance(block[-1], unet.ResBlock) and len(block) > 1]
    assert ups == [3, 7, 11]
    model = published("model", ZOO["512x512_diffusion"]["flags"])
    assert model.input_blocks[0][0].weight.shape[0] == 128
    assert sorted(attention_heads(model.input_blocks)) == [13, 14, 16, 17, 19, 20]
    model = published("model", ZOO["128x128_diffusion"]["flags"])
    assert attention_heads(model.input_blocks) == dict.fromkeys([7, 8, 10, 11, 13, 14], 4)


def test_signatures_are_the_originals():
    shared = {
        "num_heads": 1, "num_head_channels": -1, "num_heads_upsample": -1, "use_scale_shift_norm": False,
        "resblock_updown": False, "use_new_attention_order": False,
    }
    first = ["image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions"]
    trunk = {"dropout": 0, "channel_mult": (1, 2, 4, 8), "conv_resample": True, "dims": 2}
    half = {"use_checkpoint": False, "use_fp16": False}
    more = {"vector_channels": None, "token_channels": None, "checkpoint_levels": 0, "residual_rescale": False}  # new
    res = {"out_channels": None, "use_conv": False, "use_scale_shift_norm": False, "dims": 2, "use_checkpoint": False,
           "up": False, "down": False, "rescale": False}
    expected = {
        unet.UNetModel: (first, trunk | {"num_classes": None} | half | shared | more),
        unet.EncoderUNetModel: (first, trunk | half | shared | {"pool": "adaptive", "residual_rescale": False}),
        unet.ResBlock: (["channels", "emb_channels", "dropout"], res),
        unet.AttentionBlock: (["channels"], {"num_heads": 1, "num_head_channels": -1, "use_checkpoint": False,
                                             "use_new_attention_order": False, "encoder_channels": None,
                                             "rescale": False}),
        unet.AttentionPool2d: (["spacial_dim", "embed_dim", "num_heads_channels"], {"output_dim": None}),
        unet.Upsample: (["channels", "use_conv"], {"dims": 2, "out_channels": None}),
        unet.Downsample: (["channels", "use_conv"], {"dims": 2, "out_channels": None}),
        unet.QKVAttention: (["n_heads"], {}),
        unet.QKVAttentionLegacy: (["n_heads"], {}),
    }
    for cls, (required, optional) in expected.items():
        parameters = inspect.signature(cls).parameters
        assert list(parameters) == required + list(optional), cls.__name__
        assert {k: p.default for k, p in parameters.items() if k in optional} == optional, cls.__name__
    assert str(inspect.signature(unet.SuperResModel)) == "(image_size, in_channels, *args, **kwargs)"
    signature = "(self, x, timesteps, y=None, vector=None, tokens=None, token_mask=None, deep=None)"
    assert str(inspect.signature(unet.UNetModel.forward)) == signature
    assert str(inspect.signature(unet.SuperResModel.forward)) == "(self, x, timesteps, low_res=None, **kwargs)"
    assert str(inspect.signature(unet.EncoderUNetModel.forward)) == "(self, x, timesteps)"


# ---- the stated behaviours, by their numbers in the list of behaviours


@pytest.mark.parametrize("options", [{}, {"resblock_updown": True, "use_scale_shift_norm": True}, {"num_classes": 5}])
def test_s08_01_fresh_networks_return_zeros(options):
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, 500])
    y = torch.tensor([0, 4]) if "num_classes" in options else None
    out = unet.UNetModel(**TINY, **options)(x, t, y)
    assert out.shape == (2, 6, 16, 16)
    assert (out == 0).all()
    assert (unet.SuperResModel(**TINY)(x, t, low_res=x) == 0).all()


def test_s08_01_fresh_classifiers_by_pool():
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, 500])
    adaptive = unet.EncoderUNetModel(**TINY)(x, t)
    assert adaptive.shape == (2, 6)
    assert (adaptive == 0).all()
    attention = unet.EncoderUNetModel(**TINY, pool="attention", num_head_channels=32)(x, t)
    assert attention.shape == (2, 6)
    assert (attention != 0).all()


def captured(module, call):
    """The positional inputs that `module` receives while `call` runs."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    call()
    hook.remove()
    assert len(seen) == 1
    return seen[0]


def test_s08_03_class_embedding_is_added_after_the_mlp_and_before_the_silu():
    model = tiny(num_classes=10)
    x, t, y = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 7])
    block = model.input_blocks[1][0]
    _, emb = captured(block, lambda: model(x, t, y))
    expected = model.time_embed(timestep_embedding(t, 32)) + model.label_emb.weight[y]
    torch.testing.assert_close(emb.value, silu(expected))
    (inside,) = captured(block.emb_layers[1], lambda: model(x, t, y))
    torch.testing.assert_close(inside, expected * torch.sigmoid(expected))


def group_norm(x, norm):
    grouped = x.reshape(len(x), 32, -1)
    var, mean = torch.var_mean(grouped, dim=-1, unbiased=False, keepdim=True)
    shape = (-1,) + (1,) * (x.dim() - 2)
    return ((grouped - mean) / (var + 1e-5).sqrt()).reshape(x.shape) * norm.weight.reshape(shape) + norm.bias.reshape(
        shape
    )


def silu(x):
    return x * torch.sigmoid(x)


def written_out_res_block(block, x, emb, resample=lambda x: x):
    """The block of the paper in a few lines of formulas."""
    h = block.in_layers[2](resample(silu(group_norm(x, block.in_layers[0]))))
    emb = (silu(emb) @ block.emb_layers[1].weight.T + block.emb_layers[1].bias)[:, :, None, None]
    width = h.shape[1]
    if emb.shape[1] == 2 * width:
        h = group_norm(h, block.out_layers[0]) * (1 + emb[:, :width]) + emb[:, width:]
    else:
        h = group_norm(h + emb, block.out_layers[0])
    return block.skip_connection(resample(x)) + block.out_layers[3](silu(h))


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("use_conv", [True, False])
def test_s08_04_scale_is_the_first_half_and_acts_between_norm_and_silu(scale_shift, use_conv):
    block = filled(unet.ResBlock(32, 16, 0.3, 64, use_conv=use_conv, use_scale_shift_norm=scale_shift))
    assert block.emb_layers[1].out_features == (128 if scale_shift else 64)
    assert block.skip_connection.kernel_size == ((3, 3) if use_conv else (1, 1))
    x, emb = rnd(1, 2, 32, 6, 4), rnd(2, 2, 16)
    torch.testing.assert_close(block(x, emb), written_out_res_block(block, x, emb), rtol=1e-4, atol=1e-5)


def test_the_embedding_is_activated_once_for_all_blocks():
    model = filled(tiny(num_classes=10))
    seen = []
    for block in model.modules():
        if isinstance(block, unet.ResBlock):
            block.register_forward_pre_hook(lambda module, args: seen.append(args[1].value))
            block.emb_layers[0].register_forward_hook(lambda *_: pytest.fail("a block activates what all share"))
    model(rnd(1, 2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 7]))
    assert len(seen) > 5 and all(emb is seen[0] for emb in seen)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adaptive_norm_in_one_pass(layout):
    """GN(x) (1 + scale) + shift with its gradients, against the formula in float64."""
    norm = filled(normalization(64))
    inputs = [rnd(i, *shape) for i, shape in enumerate([(3, 64, 4, 6), (3, 64), (3, 64), (3, 64, 4, 6)])]

    def written(x, scale, shift):
        return group_norm(x, norm) * (1 + scale[..., None, None]) + shift[..., None, None]

    def of(function, dtype):
        norm.to(dtype)
        *wrt, weights = (t.to(dtype).requires_grad_() for t in inputs)
        out = function(*wrt)
        return out, *torch.autograd.grad((out * weights).sum(), [*wrt, *norm.parameters()])

    wanted = of(written, torch.float64)
    got = of(lambda x, *more: norm(x.contiguous(memory_format=layout), *more), torch.float32)
    assert got[0].is_contiguous(memory_format=layout)
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("dims, factor", [(1, 2), (2, 2), (3, (1, 2, 2))])
def test_upsampling_copies_the_nearest(dims, factor):
    x = rnd(1, 2, 3, 4, 6, 5)[(...,) + (0,) * (3 - dims)].contiguous()
    wanted = torch.nn.functional.interpolate(x, scale_factor=factor, mode="nearest")
    layer = unet.Upsample(3, False, dims)
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=0)
    torch.testing.assert_close(layer(x.transpose(0, 1)), wanted.transpose(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("width, length, fused", [(8, 32, False), (8, 33, True), (64, 256, False), (64, 257, True)])
def test_the_kernel_by_length_and_width_of_a_head(monkeypatch, width, length, fused):
    seen, kernel = [], torch.nn.functional.scaled_dot_product_attention
    spy = lambda *args, **more: (seen.append(1), kernel(*args, **more))[1]  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = (rnd(i, 1, 2, width, length) for i in range(3))
    torch.testing.assert_close(unet.attend(q, k, v).double(), written_out_attention(q, k, v), rtol=1e-4, atol=1e-5)
    assert bool(seen) == fused


def written_out_attention(q, k, v):
    """float64 softmax attention of [N,heads,c,L] tensors, head by head and query by query."""
    q, k, v = (t.detach().double().numpy() for t in (q, k, v))
    out = np.empty_like(v)
    for n, head, i in np.ndindex(*q.shape[:2], q.shape[3]):
        logits = q[n, head, :, i] @ k[n, head] / np.sqrt(q.shape[2])
        weights = np.exp(logits - logits.max())
        out[n, head, :, i] = v[n, head] @ (weights / weights.sum())
    return torch.from_numpy(out)


@pytest.mark.parametrize("length", [1, 17, unet.SHORT_LENGTH, unet.SHORT_LENGTH + 1])
def test_s08_06_attention_formula(length):
    q, k, v = rnd(5, 3, 2, 2, 8, length)
    assert deviation(unet.attend(q, k, v), written_out_attention(q, k, v)) < 2e-6


@pytest.mark.parametrize("length", [16, unet.SHORT_LENGTH + 44])
def test_s08_06_half_attention_neither_overflows_nor_loses_its_softmax(length):
    # 64 channels of about 40 make products of 10^5, beyond float16, unless q and k are scaled before.
    q, k, v = (rnd(6, 3, 1, 2, 64, length) * torch.tensor([2.0, 2.0, 1.0])[:, None, None, None, None]).half()
    q[:, :, :, :3] = k[:, :, :, 5:6] = 40.0
    out = unet.attend(q, k, v)
    assert out.dtype == torch.float16
    assert deviation(out, written_out_attention(q, k, v)) < 2e-3


def test_s08_06_half_softmax_runs_in_float32(monkeypatch):
    seen = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: seen.append(x.dtype) or softmax(x, dim))
    unet.attend(*rnd(5, 3, 1, 1, 8, 16).half())
    assert seen == [torch.float32]


def test_long_attention_is_given_contiguous_heads(monkeypatch):
    # strided tensors would give the same numbers from a slower kernel
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(*qkv, attn_mask=None):
        seen.extend(t.is_contiguous() and t.shape == (2, 4, unet.SHORT_LENGTH + 1, 8) for t in qkv)
        return fused(*qkv)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    unet.QKVAttentionLegacy(4)(rnd(7, 2, 3 * 32, unet.SHORT_LENGTH + 1))
    assert seen == [True] * 3


def new_order_rows(heads, channels):
    """For each row of the new order's qkv, the row of the legacy order that holds the same thing."""
    c = channels // heads
    rows = torch.empty(3 * channels, dtype=torch.long)
    for head in range(heads):
        for part in range(3):
            for i in range(c):
                rows[part * heads * c + head * c + i] = head * 3 * c + part * c + i
    return rows


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_s08_07_orders_agree_after_the_permutation(heads):
    qkv = rnd(7, 2, 3 * 32, 9)
    legacy, new = unet.QKVAttentionLegacy(heads), unet.QKVAttention(heads)
    assert torch.equal(new(qkv[:, new_order_rows(heads, 32)]), legacy(qkv))
    assert torch.equal(new(qkv), legacy(qkv)) == (heads == 1)


def test_s08_07_wrong_order_loads_silently_and_differs():
    legacy = tiny(num_head_channels=32)
    new = unet.UNetModel(**{**TINY, "num_head_channels": 32}, use_new_attention_order=True).eval()
    new.load_state_dict(legacy.state_dict())
    x, t = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700])
    assert deviation(new(x, t), legacy(x, t)) > 1e-2
    for block in new.modules():
        if isinstance(block, unet.AttentionBlock):
            rows = new_order_rows(block.num_heads, block.channels)
            block.qkv.weight.data = block.qkv.weight.data[rows]
            block.qkv.bias.data = block.qkv.bias.data[rows]
    assert deviation(new(x, t), legacy(x, t)) < 1e-5


@pytest.mark.parametrize("resolutions", [(), (64,)])
def test_s08_08_the_middle_always_has_attention(resolutions):
    model = on_meta(unet.UNetModel, **{**TINY, "attention_resolutions": resolutions})
    assert [type(layer).__name__ for layer in model.middle_block] == ["ResBlock", "AttentionBlock", "ResBlock"]
    assert sum(isinstance(m, unet.AttentionBlock) for m in model.modules()) == 1


def test_s08_09_heads_of_the_upward_path():
    def heads(**kwargs):
        model = on_meta(unet.UNetModel, **{**TINY, "num_heads": 4, **kwargs})
        return [
            set(attention_heads(blocks).values())
            for blocks in (model.input_blocks, [model.middle_block], model.output_blocks)
        ]

    assert heads() == [{4}, {4}, {4}]
    assert heads(num_heads_upsample=8) == [{4}, {4}, {8}]
    assert heads(num_heads_upsample=8, num_head_channels=32) == [{2}, {2}, {2}]


def test_s08_10_attention_where_the_downsampling_factor_matches():
    # 64 pixels, attention at 32 and 8 pixels: factors 2 and 8; 5 matches no level
    model = on_meta(unet.UNetModel, 64, 3, 32, 3, 1, [2, 8, 5], channel_mult=(1, 1, 1, 1))
    assert sorted(attention_heads(model.input_blocks)) == [3, 7]
    assert sorted(attention_heads(model.output_blocks)) == [0, 1, 4, 5]


@pytest.mark.parametrize("direction", ["up", "down"])
def test_s08_11_resampling_block(direction):
    block = filled(unet.ResBlock(32, 16, 0.0, use_scale_shift_norm=True, **{direction: True}))
    plain = unet.ResBlock(32, 16, 0.0, use_scale_shift_norm=True)
    assert list(block.state_dict()) == list(plain.state_dict())
    if direction == "up":
        resample, size = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3), (12, 8)
    else:
        resample, size = lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)), (3, 2)
    x, emb = rnd(1, 2, 32, 6, 4), rnd(2, 2, 16)
    out = block(x, emb)
    assert out.shape == (2, 32, *size)
    torch.testing.assert_close(out, written_out_res_block(block, x, emb, resample), rtol=1e-4, atol=1e-5)


def test_s08_12_names_of_the_learned_resampling():
    model = tiny(num_res_blocks=2, channel_mult=(1, 1, 1), attention_resolutions=(4,))
    names = [k for k in model.state_dict() if ".op." in k or ".conv." in k]
    assert names == [
        f"{name}.{kind}"
        for name in ("input_blocks.3.0.op", "input_blocks.6.0.op", "output_blocks.2.2.conv", "output_blocks.5.1.conv")
        for kind in ("weight", "bias")
    ]
    down, up = model.input_blocks[3][0], model.output_blocks[2][2]
    assert (down.op.kernel_size, down.op.stride, down.op.padding) == ((3, 3), (2, 2), (1, 1))
    x = rnd(1, 1, 32, 4, 4)
    nearest = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x), torch.conv2d(nearest, up.conv.weight, up.conv.bias, padding=1))


def test_resampling_without_weights_and_with_new_width():
    x = rnd(1, 1, 32, 4, 6)
    assert not list(unet.Upsample(32, False).parameters()) + list(unet.Downsample(32, False).parameters())
    torch.testing.assert_close(unet.Downsample(32, False)(x)[0, 0, 1, 2], x[0, 0, 2:4, 4:6].mean())
    assert unet.Upsample(32, True, out_channels=8)(x).shape == (1, 8, 8, 12)
    assert unet.Downsample(32, True, out_channels=8)(x).shape == (1, 8, 2, 3)
    volume = rnd(1, 1, 32, 3, 4, 6)
    assert unet.Upsample(32, False, dims=3)(volume).shape == (1, 32, 3, 8, 12)
    assert unet.Downsample(32, False, dims=3)(volume).shape == (1, 32, 3, 2, 3)
    with pytest.raises(AssertionError, match="32 channels into 64: set use_conv"):
        unet.Downsample(32, False, out_channels=64)


def test_s08_13_the_decoder_joins_current_then_skip_last_skip_first():
    model = tiny()
    x, t = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700])
    outputs = []
    for module in [*model.input_blocks, model.middle_block]:
        module.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    joined, _ = captured(model.output_blocks[0], lambda: model(x, t))
    *skips, middle = outputs
    assert len(skips) == 4
    assert torch.equal(joined, torch.cat([middle, skips[-1]], dim=1))
    joined, _ = captured(model.output_blocks[3], lambda: model(x, t))
    assert torch.equal(joined[:, 32:], skips[0])


@pytest.mark.parametrize("make", [tiny, tiny_classifier])
def test_s08_14_fp16_converts_the_convolutions_of_the_trunk_only(make):
    model = make(use_scale_shift_norm=True, use_fp16=True)
    assert model.dtype == torch.float32
    single = model(rnd(1, 2, 3, 16, 16), torch.tensor([3, 700]))  # works before the conversion, too
    model.convert_to_fp16()
    assert model.dtype == torch.float16
    for name, module in model.named_modules():
        half = isinstance(module, (tnn.Conv1d, tnn.Conv2d)) and not name.startswith("out.")
        for parameter in module.parameters(recurse=False):
            assert parameter.dtype == (torch.float16 if half else torch.float32), name
    out = model(rnd(1, 2, 3, 16, 16), torch.tensor([3, 700]))
    assert out.dtype == torch.float32
    assert 1e-5 < deviation(out, single) < 5e-3
    half_out = model(rnd(1, 2, 3, 16, 16).half(), torch.tensor([3, 700]))
    assert half_out.dtype == torch.float16
    assert deviation(half_out, single) < 5e-3


@pytest.mark.parametrize("pool", ["attention", "spatial", "spatial_v2"])
def test_s08_14_fp16_leaves_the_pools_alone(pool):
    model = tiny_classifier(pool=pool, num_head_channels=32)
    x, t = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700])
    single = model(x, t)
    model.convert_to_fp16()
    assert {p.dtype for p in model.out.parameters()} == {torch.float32}
    assert 1e-5 < deviation(model(x, t), single) < 2e-3


def test_s08_15_converted_back_everything_is_float32():
    model = tiny()
    model.convert_to_fp16()
    model.convert_to_fp32()
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}
    assert model.dtype == torch.float32


def test_s08_16_super_resolution_input():
    model = tiny(unet.SuperResModel)
    assert model.input_blocks[0][0].weight.shape[1] == 6
    x, low, t = rnd(1, 2, 3, 16, 16), rnd(2, 2, 3, 8, 8), torch.tensor([3, 700])
    joined, _ = captured(model.input_blocks[0], lambda: model(x, t, low_res=low))
    assert torch.equal(joined[:, :3], x)
    # bilinear, corners not aligned: 3/4 of the pixel that covers it and 1/4 of the next one, the border repeated
    weights = torch.zeros(16, 8)
    for i in range(16):
        weights[i, i // 2] += 0.75
        weights[i, min(max(i // 2 + (1 if i % 2 else -1), 0), 7)] += 0.25
    torch.testing.assert_close(joined[:, 3:], weights @ low @ weights.T, rtol=1e-5, atol=1e-6)


def test_s08_64_labels_if_and_only_if_class_conditional():
    x, t, y = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 7])
    message = "must specify y if and only if the model is class-conditional"
    with pytest.raises(AssertionError, match=message):
        tiny(num_classes=10)(x, t)
    with pytest.raises(ValueError, match=f"{message}.*y is given"):
        tiny()(x, t, y)


# ---- sizes, dimensions, devices, layouts


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (4, 2), (30, 10)])
def test_any_divisible_size(size):
    model = tiny(num_res_blocks=1)
    assert model(torch.randn(1, 3, *size), torch.tensor([5])).shape == (1, 6, *size)


@pytest.mark.parametrize(("dims", "size"), [(1, (20,)), (3, (3, 8, 4))])
@pytest.mark.parametrize("pool", ["adaptive", "spatial_v2"])
def test_one_and_three_dimensions(dims, size, pool):
    x, t = torch.randn(2, 4, *size), torch.tensor([5, 6])
    options = {"dims": dims, "in_channels": 4, "resblock_updown": True}
    assert tiny(**options, conv_resample=False)(x, t).shape == (2, 6, *size)
    assert tiny_classifier(**options, pool=pool)(x, t).shape == (2, 10)
    low = torch.randn(2, 4, *(max(s // 2, 1) for s in size))
    assert tiny(unet.SuperResModel, **options)(x, t, low_res=low).shape == (2, 6, *size)


def test_fractional_multipliers():
    model = tiny(model_channels=64, channel_mult=(0.5, 1.5))
    assert model.input_blocks[0][0].weight.shape == (32, 3, 3, 3)
    assert model.middle_block[0].in_layers[0].num_channels == 96
    assert model.time_embed[0].weight.shape == (256, 64)
    assert model(torch.randn(1, 3, 16, 16), torch.tensor([5])).shape == (1, 6, 16, 16)


def test_samples_of_a_batch_do_not_touch():
    model = tiny(num_classes=10, use_scale_shift_norm=True)
    x, t, y = rnd(1, 3, 3, 16, 16), torch.tensor([3, 700, 20]), torch.tensor([1, 7, 2])
    together = model(x, t, y)
    alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(3)])
    assert deviation(together, alone) < 1e-5


def test_runs_on_the_meta_device_and_comes_back():
    model = on_meta(unet.UNetModel, **TINY, num_classes=10)
    y = torch.empty(2, dtype=torch.long, device="meta")
    assert model(torch.empty(2, 3, 16, 16, device="meta"), y, y).shape == (2, 6, 16, 16)
    model = filled(model.to_empty(device="cpu"))
    x, t, y = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 7])
    assert torch.equal(model(x, t, y), tiny(num_classes=10)(x, t, y))


def test_channels_last_gives_the_same():
    x, t = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700])
    expected = tiny()(x, t)
    model = tiny().to(memory_format=torch.channels_last)
    assert deviation(model(x.to(memory_format=torch.channels_last), t), expected) < 1e-5


def test_autocast_returns_the_input_dtype():
    x, t = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700])
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, t)
    assert out.dtype == torch.float32
    assert deviation(out, model(x, t)) < 5e-2


# ---- classifier


def test_features_are_the_spatial_mean_of_the_last_map():
    model = tiny_classifier()
    x, t = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700])
    (last,) = captured(model.out, lambda: model(x, t))
    features = model.features(x, t)
    assert features.shape == (2, 64)
    torch.testing.assert_close(features, last.mean(dim=(2, 3)))
    model.convert_to_fp16()
    assert model.features(x, t).dtype == torch.float32


def test_spatial_pool_sees_every_block():
    model = tiny_classifier(pool="spatial")
    x, t = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700])
    outputs = []
    for module in [*model.input_blocks, model.middle_block]:
        module.register_forward_hook(lambda _m, _i, out: outputs.append(out.mean(dim=(2, 3))))
    (seen,) = captured(model.out, lambda: model(x, t))
    torch.testing.assert_close(seen, torch.cat(outputs, dim=1))


def test_attention_pool_written_out():
    pool = filled(unet.AttentionPool2d(3, 32, 16, 5))
    assert pool.positional_embedding.shape == (32, 10)
    x = rnd(1, 2, 32, 3, 3)
    tokens = torch.cat([x.mean(dim=(2, 3))[:, :, None], x.reshape(2, 32, 9)], dim=2) + pool.positional_embedding
    qkv = pool.qkv_proj.weight[:, :, 0] @ tokens + pool.qkv_proj.bias[:, None]
    mixed = written_out_attention(*(part.reshape(2, 2, 16, 10) for part in qkv.chunk(3, dim=1)))[..., 0].flatten(1)
    expected = mixed @ pool.c_proj.weight[:, :, 0].double().T + pool.c_proj.bias.double()
    assert deviation(pool(x), expected) < 1e-5
    fresh = torch.stack([unet.AttentionPool2d(7, 256, 64).positional_embedding.detach() for _ in range(4)])
    assert abs(float(fresh.std()) * 16 - 1) < 0.02


def second_gradient(function, x, direction):
    """Gradient of <gradient of function at x, direction>, by differentiating twice."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad((gradient * direction).sum(), x)[0]


@pytest.mark.parametrize("options", [{}, {"use_checkpoint": True}, {"pool": "attention", "num_head_channels": 32}])
def test_gradient_of_the_classifier_gradient(options):
    model, t = tiny_classifier(**options), torch.tensor([3, 700])
    x, v = rnd(1, 2, 3, 16, 16), rnd(2, 2, 3, 16, 16)

    def log_prob(x):
        return torch.log_softmax(model(x, t), dim=1)[:, 4].sum()

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(log_prob(x), x)[0]

    step = 3e-3
    difference = (gradient(x + step * v) - gradient(x - step * v)) / (2 * step)
    assert deviation(second_gradient(log_prob, x, v), difference) < 1e-3


def test_long_attention_can_be_differentiated_twice_in_the_math_kernel(monkeypatch):
    qkv, v = rnd(8, 1, 2 * 3 * 8, 20), rnd(9, 1, 2 * 3 * 8, 20)
    attention = unet.QKVAttention(2)
    expected = second_gradient(lambda x: attention(x).square().sum(), qkv, v)
    monkeypatch.setattr(unet, "SHORT_LENGTH", 0)
    with sdpa_kernel(SDPBackend.MATH):
        long = second_gradient(lambda x: attention(x).square().sum(), qkv, v)
    assert deviation(long, expected) < 1e-5


# ---- activation checkpointing


def training_gradients(monkeypatch, use_checkpoint, frozen=False, levels=0):
    """Loss gradients with dropout, and how often the bodies of the blocks ran."""
    calls = {unet.ResBlock: 0, unet.AttentionBlock: 0}
    with monkeypatch.context() as patch:
        for cls in calls:

            def counted(self, *args, cls=cls, body=cls._forward):
                calls[cls] += 1
                return body(self, *args)

            patch.setattr(cls, "_forward", counted)
        model = tiny(dropout=0.5, use_checkpoint=use_checkpoint, checkpoint_levels=levels, num_classes=10).train()
        model.time_embed.requires_grad_(not frozen)
        model.middle_block.requires_grad_(not frozen)
        torch.manual_seed(11)
        out = model(rnd(1, 2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([1, 7]))
        (out * rnd(3, *out.shape)).sum().backward()
    return {k: p.grad for k, p in model.named_parameters()}, calls


@pytest.mark.parametrize("frozen", [False, True])
def test_use_checkpoint_recomputes_and_changes_no_gradient(monkeypatch, frozen):
    plain, calls = training_gradients(monkeypatch, False, frozen)
    again, calls_again = training_gradients(monkeypatch, True, frozen)
    assert calls == {unet.ResBlock: 8, unet.AttentionBlock: 4}
    assert calls_again == {cls: 2 * n for cls, n in calls.items()}
    for name, gradient in plain.items():
        assert (gradient is None) == (frozen and name.startswith(("time_embed", "middle_block")))
        if gradient is None:
            assert again[name] is None
        else:
            torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_the_finest_levels_alone_are_recomputed(monkeypatch):
    """Of TINY's two levels: one block and no attention on the way down at the first, two on the way up."""
    plain, calls = training_gradients(monkeypatch, False)
    some, calls_some = training_gradients(monkeypatch, False, levels=1)
    _, calls_all = training_gradients(monkeypatch, False, levels=2)
    assert calls_some == calls | {unet.ResBlock: calls[unet.ResBlock] + 3}
    assert calls_all == {cls: 2 * n for cls, n in calls.items()}
    for name, gradient in plain.items():
        torch.testing.assert_close(some[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_levels_that_are_recomputed_keep_less():
    """Each level has a quarter of the positions of the one before, and keeps less."""

    def kept(levels):
        model = tiny(channel_mult=(1, 1, 1), checkpoint_levels=levels, attention_resolutions=())
        x, t = rnd(1, 2, 3, 16, 16), torch.tensor([3, 700])
        return activation_bytes(lambda: model(x, t).sum(), but=list(model.parameters()))

    sizes = [kept(levels) for levels in (0, 1, 2, 3)]
    saved = [-step for step in np.diff(sizes)]
    assert saved[0] > 3 * saved[1] > 0 and saved[2] > 0


@pytest.mark.parametrize("levels", [-1, 3])
def test_levels_that_are_not_there(levels):
    with pytest.raises(ValueError, match=f"--checkpoint_levels must be from 0 to 2, .* not {levels}"):
        tiny(checkpoint_levels=levels)


def test_use_checkpoint_keeps_less():
    def kept(use_checkpoint):
        sizes = []
        model = tiny(num_res_blocks=2, use_checkpoint=use_checkpoint)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(rnd(1, 2, 3, 16, 16), torch.tensor([3, 700]))
        return sum(sizes)

    assert kept(True) < 0.25 * kept(False)


def test_flops_counter():
    module = tnn.Identity()
    module.total_ops = torch.zeros(1, dtype=torch.float64)
    y = torch.empty(2, 8, 5)
    unet.count_flops_attn(module, None, (y,))
    unet.QKVAttention.count_flops(module, None, y)
    unet.QKVAttentionLegacy.count_flops(module, None, y)
    assert module.total_ops.item() == 3 * 2 * 2 * 5**2 * 8


# ---- bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model_channels": 48}, r"model_channels 48 \(--num_channels.*\[48, 96\].*use 32 or 64"),
        ({"model_channels": 32, "channel_mult": (0.5, 1)}, r"widths \[16, 32\].*use 64"),
        ({"model_channels": 16}, "use 32"),
        ({"model_channels": 100}, "use 96 or 128"),
        ({"image_size": 18, "channel_mult": (1, 1, 2)}, "image_size 18 is not divisible by 4.*use 16 or 20"),
        ({"image_size": 2, "channel_mult": (1, 1, 2)}, "image_size 2 is not divisible by 4.*use 4,"),
        ({"num_head_channels": 48}, "q,k,v channels 64 is not divisible by num_head_channels 48"),
        ({"num_heads": 5}, "q,k,v channels 64 is not divisible by num_heads 5"),
        ({"num_heads": 0}, "num_heads must be 1 or more, not 0"),
        ({"num_head_channels": 0}, "num_head_channels must be 1 or more, not 0"),
        ({"dims": 4}, "unsupported dimensions: 4"),
    ],
)
def test_impossible_networks(kwargs, message):
    with pytest.raises(ValueError, match=message):
        on_meta(unet.UNetModel, **{**TINY, **kwargs})


def test_split_errors_are_the_originals_kind():
    with pytest.raises(AssertionError, match="q,k,v channels 64 is not divisible by num_head_channels 48"):
        unet.AttentionBlock(64, num_head_channels=48)
    with pytest.raises(AssertionError, match="96 rows of q, k, v do not split into 5 heads"):
        unet.QKVAttention(5)(torch.zeros(1, 96, 4))
    assert issubclass(UsageError, ValueError)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 18, 16), "input size 18x16 is not divisible by 4.*use 16x16 or 20x16"),
        ((2, 3, 16, 17), "input size 16x17 is not divisible by 4"),
        ((2, 1, 16, 16), r"built for \[N,3\].*\[2, 1, 16, 16\]"),
        ((2, 3, 16), r"2 spatial axes.*\[2, 3, 16\]"),
    ],
)
def test_inputs_that_do_not_fit(shape, message):
    model = on_meta(unet.UNetModel, **{**TINY, "channel_mult": (1, 1, 2)})
    with pytest.raises(ValueError, match=message):
        model(torch.empty(shape, device="meta"), torch.empty(2, device="meta"))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([1, 10], r"labels must lie in 0\.\.9, but span 1 \.\. 10"),
        ([-1, 3], r"labels must lie in 0\.\.9, but span -1 \.\. 3"),
        ([1], r"shape \[2\], got \[1\]"),
        ([[1], [2]], r"shape \[2\], got \[2, 1\]"),
    ],
)
def test_labels_that_do_not_fit(y, message):
    with pytest.raises(ValueError, match=message):
        unet.UNetModel(**TINY, num_classes=10)(torch.zeros(2, 3, 16, 16), torch.tensor([1, 2]), torch.tensor(y))


def test_labels_elsewhere_than_on_the_cpu_are_not_looked_at():
    model = on_meta(unet.UNetModel, **TINY, num_classes=10)
    y = torch.full((2,), 99, device="meta")
    model(torch.zeros(2, 3, 16, 16, device="meta"), y, y)  # a look at the values would raise


def test_super_resolution_without_its_small_images():
    model = on_meta(unet.SuperResModel, **TINY)
    x, t = torch.zeros(2, 3, 16, 16, device="meta"), torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match="low_res is missing"):
        model(x, t)
    with pytest.raises(ValueError, match=r"built for \[N,6\].*\[2, 4, 16, 16\]"):
        model(x, t, low_res=x[:, :1])


def test_pools_that_do_not_fit():
    with pytest.raises(NotImplementedError, match="Unexpected max pooling: choose adaptive, attention, spatial or spa"):
        on_meta(unet.EncoderUNetModel, **TINY, pool="max")
    with pytest.raises(ValueError, match="attention pool needs num_head_channels"):
        on_meta(unet.EncoderUNetModel, **TINY, pool="attention")
    with pytest.raises(ValueError, match="image_size 17 is not divisible by 2"):
        on_meta(unet.EncoderUNetModel, **{**TINY, "image_size": 17, "num_head_channels": 32}, pool="attention")
    model = on_meta(unet.EncoderUNetModel, **{**TINY, "num_head_channels": 32}, pool="attention")
    with pytest.raises(ValueError, match="built for 8x8 features, got 8x4"):
        model(torch.zeros(2, 3, 16, 8, device="meta"), torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match=r"built for \[N,3\]"):
        model(torch.zeros(2, 1, 16, 16, device="meta"), torch.zeros(2, device="meta"))
