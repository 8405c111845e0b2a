"""The small parts of guided_diffusion.nn: exact values, dtypes, recomputation in the backward pass."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn as tnn

from guided_diffusion import nn


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_signatures_are_the_originals():
    expected = {
        nn.conv_nd: "(dims, *args, **kwargs)",
        nn.linear: "(*args, **kwargs)",
        nn.avg_pool_nd: "(dims, *args, **kwargs)",
        nn.update_ema: "(target_params, source_params, rate=0.99, where=None)",
        nn.zero_module: "(module)",
        nn.scale_module: "(module, scale)",
        nn.mean_flat: "(tensor)",
        nn.normalization: "(channels)",
        nn.timestep_embedding: "(timesteps, dim, max_period=10000)",
        nn.checkpoint: "(func, inputs, params, flag)",
    }
    for function, signature in expected.items():
        assert str(inspect.signature(function)) == signature, function.__name__


def test_an_average_stands_still_where_it_is_told_to():
    start, source = torch.randn(3, 4), torch.randn(3, 4)
    for rate in (0.0, 0.9, 0.99995):
        still, moved, plain = start.clone(), start.clone(), start.clone()
        nn.update_ema([still], [source], rate, where=torch.tensor(False))
        nn.update_ema([moved], [source], rate, where=torch.tensor(True))
        nn.update_ema([plain], [source], rate)
        assert torch.equal(still, start)
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-9)
    pair = [torch.zeros(2), torch.zeros(2, dtype=torch.float64)]
    nn.update_ema(pair, [torch.ones(2), torch.ones(2)], 0.75, where=torch.tensor(True))
    assert [average.tolist() for average in pair] == [[0.25, 0.25]] * 2


def test_networks_import_only_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import guided_diffusion.unet;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) - set(sys.stdlib_module_names) <= {"guided_diffusion", "torch"}


def test_silu():
    x = torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(nn.SiLU()(x), torch.tensor([-0.26894142, 0.0, 1.76159416]))


def test_s08_02_cosines_before_sines_and_fractional_timesteps():
    known = torch.tensor([[0.5403, 0.9989, 1.0000, 0.8415, 0.0464, 0.0022]])
    torch.testing.assert_close(nn.timestep_embedding(torch.tensor([1]), 6), known, atol=5e-5, rtol=0)
    t = torch.tensor([0.0, 0.5, 999.25], dtype=torch.float64)
    freqs = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    expected = torch.cat([torch.cos(t[:, None] * freqs), torch.sin(t[:, None] * freqs)], dim=1)
    # float32 holds an angle of 999 to 3e-5
    torch.testing.assert_close(nn.timestep_embedding(t, 8).double(), expected, atol=6e-5, rtol=0)
    assert nn.timestep_embedding(t, 8).dtype == torch.float32


def test_timestep_embedding_odd_width_and_period():
    t = torch.tensor([3, 700])
    odd = nn.timestep_embedding(t, 7, max_period=100)
    assert odd.shape == (2, 7)
    assert (odd[:, 6] == 0).all()
    assert torch.equal(odd[:, :6], nn.timestep_embedding(t, 6, max_period=100))
    torch.testing.assert_close(odd[0, 1], torch.cos(torch.tensor(3 * 100 ** (-1 / 3))))
    assert nn.timestep_embedding(t.to("meta"), 6).device.type == "meta"


def test_s08_05_group_norm_is_float32_with_32_groups():
    norm = nn.normalization(64)
    assert isinstance(norm, nn.GroupNorm32)
    assert (norm.num_groups, norm.eps) == (32, 1e-5)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = (100 + torch.randn(2, 64, 5)).half()  # half sums would be off by units, and the square overflow
    grouped = x.double().reshape(2, 32, -1)
    mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, keepdim=True, unbiased=False)
    expected = ((grouped - mean) / (var + 1e-5).sqrt()).reshape(2, 64, 5)
    expected = expected * norm.weight.double()[:, None] + norm.bias.double()[:, None]
    result = norm(x)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.double(), expected, rtol=2**-11, atol=5e-5)
    torch.testing.assert_close(norm(x.float()).double(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("width", "near"), [(48, "32 or 64"), (16, "use 32"), (100, "96 or 128")])
def test_normalization_names_the_widths_that_work(width, near):
    with pytest.raises(ValueError, match=f"width {width} is not a multiple of 32.*{near}"):
        nn.normalization(width)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_by_dimension(dims):
    x = torch.arange(2.0 * 4**dims).reshape(1, 2, *[4] * dims)
    conv = nn.conv_nd(dims, 2, 5, 3, padding=1)
    assert conv.weight.shape == (5, 2, *[3] * dims)
    assert conv(x).shape == (1, 5, *[4] * dims)
    pooled = nn.avg_pool_nd(dims, kernel_size=4)(x)
    torch.testing.assert_close(pooled.flatten(), x.flatten(2).mean(2).flatten())
    assert isinstance(nn.linear(3, 2), tnn.Linear)


@pytest.mark.parametrize("make", [nn.conv_nd, nn.avg_pool_nd])
def test_unsupported_dimensions(make):
    with pytest.raises(ValueError, match="unsupported dimensions: 4"):
        make(4, 3, 3, 3)


def test_update_ema_is_the_formula_in_one_call(monkeypatch):
    calls = []
    fused = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: calls.append(1) or fused(*args))
    targets = [tnn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,), ()]]
    sources = [tnn.Parameter(torch.randn_like(target)) for target in targets]
    sources[1].data = sources[1].data.half()
    expected = [0.9 * t.detach().double() + 0.1 * s.detach().double() for t, s in zip(targets, sources)]
    nn.update_ema(iter(targets), iter(sources), rate=0.9)
    assert calls == [1]
    for target, value in zip(targets, expected):
        assert target.requires_grad and target.grad_fn is None
        torch.testing.assert_close(target.detach().double(), value, rtol=1e-6, atol=5e-7)


def test_update_ema_default_rate_fixed_point_and_edges():
    target, source = torch.zeros(3), torch.ones(3)
    nn.update_ema([target], [source])
    torch.testing.assert_close(target, torch.full((3,), 0.01))
    same = torch.randn(100)
    average = same.clone()
    for _ in range(50):
        nn.update_ema([average], [same], rate=0.9999)
    assert torch.equal(average, same)
    nn.update_ema([target], [source], rate=0)
    assert torch.equal(target, source)
    nn.update_ema([], [])
    with pytest.raises(ValueError, match="zip"):
        nn.update_ema([target], [])


def test_zero_scale_and_mean():
    layer = tnn.Linear(3, 2)
    weight = layer.weight.detach().clone()
    assert nn.scale_module(layer, 3) is layer
    torch.testing.assert_close(layer.weight.detach(), 3 * weight)
    layer.weight.data[0, 0] = float("nan")
    assert nn.zero_module(layer) is layer
    assert all((p == 0).all() and p.requires_grad for p in layer.parameters())
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(nn.mean_flat(x), torch.tensor([5.5, 17.5]))


class Noisy(tnn.Module):
    """Two layers with dropout between; counts its calls and keeps the dtype it worked in."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = tnn.Linear(64, 64), tnn.Dropout(0.5), tnn.Linear(64, 64)
        self.dtypes = []

    def forward(self, x):
        h = self.first(x)
        self.dtypes.append(h.dtype)
        return self.last(self.drop(torch.tanh(h)))


def _gradients(module, x, flag):
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    module.zero_grad()
    out = nn.checkpoint(module, (x,), module.parameters(), flag)
    torch.rand(7)  # other draws between forward and backward must not matter
    out.square().sum().backward()
    return [out.detach(), x.grad] + [p.grad for p in module.parameters() if p.grad is not None]


def test_checkpoint_repeats_the_dropout_mask():
    module, x = Noisy(), torch.randn(8, 64)
    plain = _gradients(module, x, False)
    assert len(module.dtypes) == 1
    again = _gradients(module, x, True)
    assert len(module.dtypes) == 3  # computed again in the backward pass
    assert len(plain) == 6
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


def test_checkpoint_with_frozen_parameters_and_frozen_input():
    module, x = Noisy(), torch.randn(8, 64)
    module.first.requires_grad_(False)
    for a, b in zip(_gradients(module, x, False), _gradients(module, x, True)):
        assert torch.equal(a, b)
    nn.checkpoint(module, (x,), module.parameters(), True).sum().backward()
    assert module.first.weight.grad is None


def test_checkpoint_keeps_autocast_and_is_skipped_without_gradients():
    module, x = Noisy(), torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = nn.checkpoint(module, (x,), module.parameters(), True)
    out.sum().backward()
    assert module.dtypes == [torch.bfloat16, torch.bfloat16]
    with torch.no_grad():
        nn.checkpoint(module, (x,), module.parameters(), True)
    assert len(module.dtypes) == 3


def test_checkpoint_can_be_differentiated_twice():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = nn.checkpoint(lambda x: (x**3).sum(), (x,), (), True)
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 6 * x.detach())


def test_only_convolutions_are_converted():
    modules = tnn.Sequential(*[nn.conv_nd(d, 2, 2, 1, bias=d != 2) for d in (1, 2, 3)], tnn.Linear(2, 2))
    modules.apply(nn.convert_module_to_f16)
    assert [p.dtype for p in modules[:3].parameters()] == [torch.float16] * 5
    assert {p.dtype for p in modules[3].parameters()} == {torch.float32}
    modules.apply(nn.convert_module_to_f32)
    assert {p.dtype for p in modules.parameters()} == {torch.float32}


def test_the_original_name_of_recomputation_still_works():
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    out = nn.CheckpointFunction.apply(lambda x: (x * w).sin(), 1, x, w)
    by_hand = torch.autograd.grad((x * w).sin().sum(), (x, w))
    for ours, theirs in zip(torch.autograd.grad(out.sum(), (x, w)), by_hand):
        assert torch.equal(ours, theirs)
