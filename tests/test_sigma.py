"""The sigma view: its parts one by one, and that it is the same process, prediction and driver as everything else."""

import math
import pickle
import subprocess
import sys
import warnings
from collections import deque
from functools import partial
from itertools import islice, pairwise

import numpy as np
import pytest
import torch as th
from torch import nn
from torch.utils.data import DataLoader

from guided_diffusion import sampling, toy
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from guided_diffusion.prediction import velocity
from guided_diffusion.process import Process, get_named_beta_schedule
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.sigma import (
    ModelMixin,
    PredV,
    PredX0,
    Scaled,
    Schedule,
    ScheduleCosine,
    ScheduleDDPM,
    ScheduleLDM,
    ScheduleLogLinear,
    ScheduleSigmoid,
    alpha,
    as_sigma_model,
    check_embeddings,
    generate_train_sample,
    samples,
    sigma_of,
    sigma_predictor,
    training_loop,
)
from guided_diffusion.solvers import gam_mu
from guided_diffusion.spacing import spaced_rows
from guided_diffusion.toy import Points, Sauropod, Swissroll, TreeDataset
from guided_diffusion.toy_models import (
    Attention,
    CondEmbedderLabel,
    ConditionalMLP,
    CondSequential,
    DiT,
    IdealDenoiser,
    SigmaEmbedderSinCos,
    TimeInputMLP,
    Unet,
    get_sigma_embeds,
    sq_norm,
)
from guided_diffusion.unet import UNetModel

F64 = th.float64
LINEAR = get_named_beta_schedule("linear", 1000)


def last(iterator):
    return deque(iterator, maxlen=1).pop()


def seeded(build, *args, **kwargs):
    th.manual_seed(0)
    return build(*args, **kwargs)


class Wave(nn.Module, ModelMixin):
    """Any output that depends on x and sigma."""

    input_dims = (3,)

    def forward(self, x, sigma, cond=None):
        out = th.sin(3 * x) + th.as_tensor(sigma).to(x).log().reshape(-1, *[1] * (x.ndim - 1)) * th.cos(x)
        return out if cond is None else out * (1 + cond[:, None])


# ------------------------------------------------------------------------------------------------------ the protocol

def test_alpha_and_its_inverse_over_the_ddpm_schedule():
    sigmas = ScheduleDDPM().sigmas.double()
    assert sigmas[0] == pytest.approx(0.0100005, rel=1e-4) and sigmas[-1] == pytest.approx(157.41, rel=1e-4)
    assert th.allclose(sigma_of(alpha(sigmas)), sigmas, rtol=1e-6, atol=0)
    assert np.allclose(alpha(sigmas), Process(LINEAR).alphas_cumprod, rtol=1e-6, atol=0)


def test_rand_input():
    model = Wave()
    th.manual_seed(0)
    expected = th.randn(5, 3)
    assert th.equal(model.rand_input(5, generator=th.Generator().manual_seed(0)), expected)
    assert TimeInputMLP().double().rand_input(2).dtype == F64
    model.input_dims = (1, 4, 4)
    assert model.rand_input(2).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="Bare has no input_dims"):
        type("Bare", (nn.Module, ModelMixin), {})().rand_input(1)


MODELS = {
    "mlp": lambda: TimeInputMLP(hidden_dims=(8,)),
    "conditional": lambda: ConditionalMLP(hidden_dims=(8,)).eval(),
    "ideal": lambda: IdealDenoiser(th.randn(6, 2)),
    "x0": lambda: PredX0(TimeInputMLP)(hidden_dims=(8,)),
    "v": lambda: PredV(TimeInputMLP)(hidden_dims=(8,)),
    "scaled v": lambda: Scaled(PredV(TimeInputMLP))(hidden_dims=(8,)),
    "dit": lambda: unzeroed(DiT(4, 1, 2, depth=1, head_dim=8, num_heads=2)),
    "unet": lambda: unzeroed(Unet(4, 1, 1, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(2,)).eval()),
    "ours": lambda: as_sigma_model(Net(), diffusion(ModelMeanType.VELOCITY), input_dims=(2,)),
}


def unzeroed(model):
    """Give what starts at zero some weights."""
    with th.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_scalar_and_per_example_sigma_agree(name):
    model = seeded(MODELS[name])
    x = th.randn(3, *model.input_dims)
    levels = th.tensor([0.3, 1.0, 7.0])
    each = model.predict_eps(x, levels.reshape(3, *[1] * (x.ndim - 1)))
    assert each.shape == x.shape
    for i, level in enumerate(levels):
        assert th.allclose(model.predict_eps(x, level)[i], each[i], rtol=1e-5, atol=1e-6)
    for sigma in (th.tensor(0.0), th.tensor([0.0, 1.0, 1.0]).reshape(3, *[1] * (x.ndim - 1))):
        with pytest.raises(ValueError, match=r"noise level 0: .* need sigma above 0"):
            model.predict_eps(x, sigma)
    with pytest.raises(ValueError, match="2 noise levels for 3 samples"):
        model.predict_eps(x, th.ones(2, *[1] * (x.ndim - 1)))


def test_losses_are_squares_in_the_space_of_the_output():
    th.manual_seed(0)
    x0, eps, sigma = th.randn(50, 3, dtype=F64), th.randn(50, 3, dtype=F64), th.rand(50, 1, dtype=F64) * 3 + 0.1
    x = x0 + sigma * eps
    keep = 1 / (1 + sigma**2).sqrt()
    target = {Wave: eps, PredX0(Wave): x0, PredV(Wave): keep * eps - keep * sigma * x0}
    for cls, wanted in target.items():
        model = cls()
        assert model.get_loss(x0, sigma, eps).item() == pytest.approx(((model(x, sigma) - wanted) ** 2).mean().item())
        l1 = (model(x, sigma) - wanted).abs().mean().item()
        assert model.get_loss(x0, sigma, eps, loss=nn.L1Loss).item() == pytest.approx(l1)
    # The square in eps is the square in x_0 over sigma^2 and the square in v over 1 + sigma^2.
    for cls, weight in ((PredX0(Wave), lambda s: 1 / s**2), (PredV(Wave), lambda s: 1 / (1 + s**2))):
        in_eps = ((cls().predict_eps(x, sigma) - eps) ** 2).mean().item()
        assert cls().get_loss(x0, sigma, eps, weight=weight).item() == pytest.approx(in_eps, rel=1e-12)


# --------------------------------------------------------------------------------------------------------- modifiers

def test_modifiers_have_names_are_cached_and_compose_in_both_orders():
    assert Scaled(PredV(TimeInputMLP)).__name__ == "TimeInputMLPPredVScaled"
    assert PredX0(Wave).__qualname__ == "WavePredX0" and PredX0(Wave).__module__ == __name__
    assert PredX0(Wave) is PredX0(Wave) and issubclass(Scaled(PredX0(Wave)), Wave)
    x, sigma = th.randn(4, 3, dtype=F64), th.tensor([0.1, 1.0, 3.0, 80.0], dtype=F64)[:, None]
    for pred in (PredX0, PredV):
        one, other = Scaled(pred(Wave))(), pred(Scaled(Wave))()
        assert th.equal(one.predict_eps(x, sigma), other.predict_eps(x, sigma))
        assert th.equal(one.get_loss(x, sigma, x), other.get_loss(x, sigma, x))
    assert th.allclose(Scaled(Wave)()(x, sigma), Wave()(x / (1 + sigma**2).sqrt(), sigma), rtol=1e-12, atol=1e-12)
    for twice in (lambda: Scaled(PredV(Scaled(Wave))), lambda: PredX0(PredX0(Wave)), lambda: PredV(PredX0(Wave))):
        with pytest.raises(TypeError, match="already has a"):
            twice()


def test_modified_models_travel_to_another_process(tmp_path):
    model = seeded(Scaled(PredV(TimeInputMLP)), hidden_dims=(8,))
    x, sigma = th.randn(3, 2), th.tensor(0.5)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, type(model), x, sigma, model.predict_eps(x, sigma))))
    code = (
        "import pickle, sys; model, cls, x, sigma, eps = pickle.load(open(sys.argv[1], 'rb'));"
        "assert type(model) is cls and cls.__name__ == 'TimeInputMLPPredVScaled';"
        "assert (model.predict_eps(x, sigma) == eps).all(); print('arrived')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pickle")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "arrived\n"


class Child(Scaled(Wave)):
    """A class of the user's own on a modified one is found by its name."""


def test_a_child_of_a_modified_class_is_pickled_as_itself():
    assert type(pickle.loads(pickle.dumps(Child()))) is Child


@pytest.mark.parametrize("modifier", [PredX0, PredV])
def test_the_true_output_gives_the_true_noise(modifier):
    """In float32, at every level of the DDPM schedule for v; for x_0 the division by sigma magnifies the rounding."""
    th.manual_seed(0)
    sigma = ScheduleDDPM().sigmas[::10, None]
    x0, eps = th.randn(100, 3).clamp(-1, 1), th.randn(100, 3)

    class Oracle(nn.Module, ModelMixin):
        def forward(self, x, sigma, cond=None):
            return self.target(x0, sigma, eps)

    error = (modifier(Oracle)().predict_eps(x0 + sigma * eps, sigma) - eps).abs()
    magnified = 1 / sigma if modifier is PredX0 else th.zeros_like(sigma)
    assert (error / (1 + magnified)).max() < 1e-6


def test_dividing_by_a_noise_level_of_zero_is_refused_whatever_the_network():
    with pytest.raises(ValueError, match="need sigma above 0"):
        PredX0(Wave)().predict_eps(th.ones(2, 3), th.tensor([[1.0], [0.0]]))


def test_v_is_the_velocity_of_the_rest_of_the_project():
    p, t = Process(LINEAR), th.tensor([0, 400, 999])
    x0, eps = th.randn(3, 2, dtype=F64), th.randn(3, 2, dtype=F64)
    sigma = p.at("sqrt_recipm1_alphas_cumprod", t, x0[:, :1])
    assert th.allclose(PredV(Wave)().target(x0, sigma, eps), velocity(p, x0, t, eps), rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- guidance

class Spy(ConditionalMLP):
    """Counts the calls and remembers the conditions."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def forward(self, x, sigma, cond=None):
        self.seen.append(None if cond is None else cond.tolist())
        return super().forward(x, sigma, cond)


@pytest.mark.parametrize("each", [False, True])
def test_classifier_free_guidance_is_one_call_of_twice_the_batch(each):
    model = seeded(Spy, hidden_dims=(8,), num_classes=4, dropout_prob=1.0).train()
    x, cond = th.randn(3, 2), th.tensor([0, 3, 1])
    sigma = th.tensor([[0.5], [2.0], [9.0]]) if each else th.tensor(0.7)
    guided = model.predict_eps_cfg(x, sigma, cond, 1.5)
    assert model.seen == [[0, 3, 1, 4, 4, 4]] and model.training and model.cond_embed.training
    model.eval()
    given, free = model.predict_eps(x, sigma, cond), model.predict_eps(x, sigma, th.full((3,), 4))
    assert not th.allclose(given, free)
    assert th.allclose(guided, 2.5 * given - 1.5 * free, rtol=1e-5, atol=1e-6)  # nothing was dropped in training mode
    assert th.equal(model.predict_eps(x, sigma), free)  # no condition is the null condition
    assert th.equal(model.predict_eps_cfg(x, sigma, cond, 0.0), given)
    assert th.equal(model.predict_eps_cfg(x, sigma, None, 3.0), free)


def test_guidance_without_an_unconditional_branch_is_refused():
    with pytest.raises(ValueError, match="Wave has no null condition"):
        Wave().predict_eps_cfg(th.randn(2, 3), th.tensor(1.0), th.ones(2), 1.0)


def test_conditions_of_any_structure_with_a_null():
    class Twofold(nn.Module, ModelMixin):
        cond_embed = type("Null", (), {"null": staticmethod(lambda cond: {"a": 0 * cond["a"], "b": 0 * cond["b"]})})

        def forward(self, x, sigma, cond=None):
            return x + cond["a"] * cond["b"]

    cond = {"a": th.tensor([[2.0], [3.0]]), "b": th.tensor([[5.0], [7.0]])}
    out = Twofold().predict_eps_cfg(th.zeros(2, 1), th.tensor(1.0), cond, 1.0)
    assert out.tolist() == [[20.0], [42.0]]


# -------------------------------------------------------------------------------------------------------- components

def test_sigma_embeds():
    sigma = th.tensor([math.e, 1.0, math.exp(3)], dtype=F64)
    rows = [[math.sin(s / 2), math.cos(s / 2)] for s in (1.0, 0.0, 3.0)]
    assert np.allclose(get_sigma_embeds(3, sigma.reshape(3, 1, 1)), rows, atol=1e-14)
    assert np.allclose(get_sigma_embeds(2, sigma[0]), [rows[0]] * 2, atol=1e-14)
    plain = get_sigma_embeds(1, th.tensor(0.3, dtype=F64), scaling_factor=2.0, log_scale=False)
    assert np.allclose(plain, [[math.sin(0.6), math.cos(0.6)]], atol=1e-14)
    with pytest.raises(ValueError, match="3 noise levels for 2 samples"):
        get_sigma_embeds(2, sigma)
    embedder = SigmaEmbedderSinCos(6)
    assert [tuple(p.shape) for p in embedder.parameters()] == [(6, 2), (6,), (6, 6), (6,)]
    by_hand = embedder.mlp[2](nn.functional.silu(embedder.mlp[0](get_sigma_embeds(3, sigma).float())))
    assert th.equal(embedder(3, sigma), by_hand) and embedder(4, th.tensor(2.0)).shape == (4, 6)


def test_an_aliasing_embedding_is_warned_about_with_the_scaling_that_does_not():
    schedule = ScheduleCosine()
    sigmas = schedule.sigmas.double()
    assert 0.5 * math.log(sigmas[-1] / sigmas[0]) == pytest.approx(7.48, abs=0.005)
    twin = sigmas[0] * math.exp(4 * math.pi)  # within the range, and embedded like sigma_0
    assert twin < sigmas[-1] and th.allclose(get_sigma_embeds(1, twin), get_sigma_embeds(1, sigmas[0]), atol=1e-12)
    usable = 2 * math.pi / math.log(sigmas[-1] / sigmas[0])
    for model in (TimeInputMLP(), DiT(4, depth=1, head_dim=8, num_heads=1)):
        with pytest.warns(UserWarning, match=rf"look the same; use one below {usable:.3g}"):
            check_embeddings(model, schedule.sigmas)
    batches = [th.randn(4, 2)]
    with pytest.warns(UserWarning, match="repeats itself"):
        next(training_loop(batches, TimeInputMLP(hidden_dims=(4,)), schedule))
    with pytest.warns(UserWarning, match="repeats itself"):
        next(samples(TimeInputMLP(hidden_dims=(4,)), schedule.sample_sigmas(5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_embeddings(TimeInputMLP(scaling_factor=0.99 * usable), schedule.sigmas)
        for other in (ScheduleDDPM(), ScheduleLogLinear(200)):  # 4.83 and 3.80 of 6.28
            check_embeddings(TimeInputMLP(), other.sigmas)


def test_cond_sequential_and_attention():
    class Add(nn.Module):
        def forward(self, x, cond):
            return 2 * x + cond

    assert CondSequential(Add(), Add())(th.tensor(1.0), th.tensor(3.0)) == 13
    attention = seeded(Attention, 4, num_heads=2)
    assert attention.qkv.bias is None and Attention(4, 2, qkv_bias=True).qkv.bias.shape == (24,)
    x = th.randn(3, 5, 8)
    weights = attention.qkv.weight.reshape(3, 2, 4, 8)  # (qkv, head, k) in that order
    heads = []
    for head in range(2):
        q, k, v = (x @ weights[i, head].T for i in range(3))
        heads.append((q @ k.transpose(1, 2) / 2).softmax(2) @ v)
    assert th.allclose(attention(x), attention.proj(th.cat(heads, 2)), atol=1e-6)


def test_label_embedder():
    embed = seeded(CondEmbedderLabel, 6, num_classes=3, dropout_prob=0.25)
    labels = th.arange(3).repeat(4000)
    assert embed.null_cond == 3 and embed.embeddings.weight.shape == (4, 6)
    null = embed.eval()(th.tensor([3]))
    plain = embed(labels)
    by_hand = embed.mlp[1](nn.functional.silu(embed.embeddings.weight))[labels]
    assert th.allclose(plain, by_hand, atol=1e-6)
    trained = embed.train()(labels)
    dropped = (trained - null).abs().amax(1) < 1e-6
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 12000) ** 0.5)
    assert th.allclose(trained[~dropped], plain[~dropped], atol=1e-6)
    for label in (-1, 4):
        with pytest.raises(ValueError, match=r"labels must lie in 0..3"):
            embed(th.tensor([0, label]))
    model = ConditionalMLP(num_classes=3)
    with pytest.raises(ValueError, match=r"labels must lie in 0..2, but span 0 .. 3"):  # 3 would silently mean none
        model.get_loss(th.randn(2, 2), th.tensor(1.0), th.randn(2, 2), cond=th.tensor([0, 3]))


def test_parameter_counts_and_layers():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    assert count(TimeInputMLP()) == 70274 and count(ConditionalMLP()) == 70402
    assert TimeInputMLP.sigma_dim == 2 and TimeInputMLP(dim=5).input_dims == (5,) == ConditionalMLP(dim=5).input_dims
    assert TimeInputMLP(3, output_dim=7)(th.randn(2, 3), th.tensor(1.0)).shape == (2, 7)
    model = seeded(ConditionalMLP).eval()
    x, sigma, cond = th.randn(2, 2), th.tensor(3.0), th.tensor([4, 9])
    inputs = th.cat([x, get_sigma_embeds(2, sigma), model.cond_embed(cond)], 1)  # in this order
    assert th.equal(model(x, sigma, cond), model.net(inputs))


def test_dit():
    model = DiT(in_dim=16, channels=3, patch_size=2, depth=4)
    x = th.randn(2, 3, 16, 16)
    assert model.input_dims == (3, 16, 16) and not model(x, th.tensor(1.0)).any()  # zero when built
    width, hidden = 384, 4 * 384
    block = 3 * width * width + 3 * width + width * width + width  # attention
    block += 2 * width * hidden + hidden + width + 6 * width * (width + 1)
    ends = 3 * 4 * width + width + width * 12 + 12 + 2 * width * (width + 1) + 2 * width + width + width * (width + 1)
    assert sum(p.numel() for p in model.parameters()) == 4 * block + ends
    tokens = th.randn(2, 64, width)
    assert th.equal(model.blocks(tokens, th.randn(2, width)), tokens)  # each block starts as the identity
    assert len(model.positions.round(decimals=4).unique(dim=0)) == 64
    embed = CondEmbedderLabel(16, 3, dropout_prob=0.0)
    small = unzeroed(seeded(DiT, 4, 2, 2, depth=2, head_dim=8, num_heads=2, cond_embed=embed))
    x = th.randn(2, 2, 4, 4)
    out = small(x, th.tensor(1.0), th.tensor([0, 1]))
    assert th.equal(small(x, th.tensor(1.0)), small(x, th.tensor(1.0), th.tensor([3, 3])))
    assert not th.allclose(out, small(x, th.tensor(1.0)))
    alike = small(th.ones(1, 2, 4, 4), th.tensor(1.0))[0].unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 0, 3, 4)
    assert len(alike.reshape(4, -1).round(decimals=4).unique(dim=0)) == 4  # equal patches, told apart by their place
    # Patches come back where they came from: with attention switched off, one patch changes only its own place.
    for block in small.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    moved = x.clone()
    moved[:, :, 2:, :2] += 1
    changed = (small(moved, th.tensor(1.0)) - small(x, th.tensor(1.0))).abs().amax((0, 1)) > 1e-6
    assert changed.tolist() == [[False] * 4] * 2 + [[True, True, False, False]] * 2
    with pytest.raises(ValueError, match="patch_size 2 must divide in_dim 5"):
        DiT(5)


def test_unet_is_the_projects_own():
    model = Unet(28, 1, 1, ch=64, ch_mult=(1, 1, 2))
    assert isinstance(model.net, UNetModel) and model.input_dims == (1, 28, 28)
    assert not model(th.randn(1, 1, 28, 28), th.tensor(1.0)).any()
    embed = CondEmbedderLabel(128, 3, dropout_prob=0.0)
    small = seeded(Unet, 4, 1, 1, ch=32, ch_mult=(1, 1), num_res_blocks=1, cond_embed=embed)
    unzeroed(small).eval()
    x, sigma = th.randn(2, 1, 4, 4), th.tensor([0.1, 3.0]).reshape(2, 1, 1, 1)
    told = 100 * sigma.flatten().log()
    assert th.equal(small(x, sigma, th.tensor([0, 2])), small.net(x, told, th.tensor([0, 2])))
    assert th.equal(small(x, sigma), small.net(x, told, th.tensor([3, 3])))
    assert small.predict_eps_cfg(x, sigma, th.tensor([0, 2]), 2.0).shape == x.shape


# --------------------------------------------------------------------------------------------------- ideal denoiser

def ideal_x0(data, x, sigma):
    """The formula, in numpy and float64: [N,D]."""
    data, x = data.flatten(1).double().numpy(), x.flatten(1).double().numpy()
    logits = -((x[:, None] - data) ** 2).sum(2) / (2 * np.asarray(sigma, dtype=np.float64).reshape(-1, 1) ** 2)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ data


@pytest.mark.parametrize("shape", [(2,), (1, 3, 3)])
@pytest.mark.parametrize("chunk", [None, 5])
def test_the_ideal_denoiser_is_the_softmax_mean(shape, chunk, monkeypatch):
    th.manual_seed(0)
    data = th.randn(17, *shape)
    if chunk:
        monkeypatch.setattr(toy.Mixture, "_parts", lambda self, x: [slice(i, i + chunk) for i in range(0, 17, chunk)])
    model = IdealDenoiser(data)
    sigma = th.tensor([0.02, 0.3, 2.0, 50.0]).reshape(4, *[1] * len(shape))
    x = data[:4] + sigma * th.randn(4, *shape)
    eps = model(x, sigma)
    expected = (x.flatten(1).double().numpy() - ideal_x0(data, x, sigma)) / sigma.reshape(4, 1).double().numpy()
    assert np.allclose(eps.flatten(1), expected, rtol=2e-5, atol=2e-6)
    for i in range(4):
        assert th.allclose(model(x[i : i + 1], sigma[i].flatten()[0])[0], eps[i], rtol=1e-6, atol=1e-6)


def test_parts_of_the_data_bound_the_memory_and_cover_them():
    mixture = toy.Mixture(th.zeros(1000, 4))
    for count in (1, 1000, 10**6):
        parts = mixture._parts(th.zeros(1, 1).expand(count, 4))
        sizes = [len(range(1000)[part]) for part in parts]
        assert sum(sizes) == 1000 and (max(sizes) * count * 4 <= 2**24)


def test_the_ideal_denoiser_at_its_limits():
    data = th.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]])
    model = IdealDenoiser(data)
    x = th.tensor([[0.9, 0.4], [-0.2, 1.6]])
    far, near = th.tensor(1e4), th.tensor(1e-3)
    assert th.allclose(x - far * model(x, far), data.mean(0).expand(2, 2), atol=2e-3)
    assert th.equal(x - near * model(x, near), data[1:])  # the nearest point, to the last bit


def test_the_ideal_denoiser_does_not_cancel():
    """Data 1000 away from the origin lose the digits of their own float32, and no more."""
    th.manual_seed(0)
    data = th.randn(20, 2) * 0.1 + 1000
    sigma = th.tensor(0.05)
    x = data + sigma * th.randn(20, 2)
    eps = IdealDenoiser(data)(x, sigma)
    expected = (x.double().numpy() - ideal_x0(data, x, np.full(20, 0.05))) / 0.05
    assert np.abs(eps.numpy() - expected).max() < 1e-5


def test_the_data_of_the_ideal_denoiser_are_buffers():
    model = IdealDenoiser(TreeDataset(2, 2, 3))
    assert set(model.state_dict()) == {"data", "labels"} and not list(model.parameters())
    assert model.double().data.dtype == F64 and model.rand_input(1).dtype == F64
    assert th.equal(model.double()(th.ones(1, 2, dtype=F64), th.tensor(1.0)), model(th.ones(1, 2).double(), 1.0))
    assert set(IdealDenoiser(Sauropod(5)).state_dict()) == {"data"}


def test_the_conditional_ideal_denoiser_is_that_of_its_class():
    th.manual_seed(0)
    data, labels = th.randn(12, 2), th.arange(12) % 3
    model = IdealDenoiser(Points(data, labels))
    x, sigma = th.randn(6, 2), th.tensor([[0.2], [0.2], [1.0], [1.0], [5.0], [5.0]])
    cond = th.tensor([0, 1, 2, 0, 1, 2])
    given, free = model(x, sigma, cond), model(x, sigma)
    for i in range(6):
        alone = IdealDenoiser(data[labels == cond[i]])(x[i : i + 1], sigma[i])
        assert th.allclose(given[i], alone[0], atol=1e-6)
    assert th.allclose(model(x, sigma, th.full((6,), -1)), free)
    assert th.allclose(model.predict_eps_cfg(x, sigma, cond, 2.0), 3 * given - 2 * free, atol=1e-5)
    with pytest.raises(ValueError, match=r"the data have labels \[0, 1, 2\], and the condition asks for \[0, 7\]"):
        model(x[:2], sigma[:2], th.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"labels \[\]"):
        IdealDenoiser(data)(x, sigma, cond)


def test_the_ideal_denoiser_is_the_exact_predictor_of_the_mixture():
    th.manual_seed(0)
    data, p, t = th.randn(9, 2, dtype=F64), Process(LINEAR), th.tensor([3, 300, 990])
    x = th.randn(3, 2, dtype=F64)
    ours, exact = sigma_predictor(p, IdealDenoiser(data))(x, t), toy.ideal_denoiser(data).predictor(p)(x, t)
    assert th.allclose(ours.eps, exact.eps, atol=1e-9) and th.allclose(ours.x0, exact.x0, atol=1e-12)


def test_expected_noise_of_wide_components():
    mixture = toy.Mixture(th.tensor([[-1.0], [2.0]], dtype=F64), th.tensor([[0.5], [0.1]], dtype=F64), [0.4, 0.6])
    grid = np.linspace(-6, 6, 400001)
    x, sigma = 0.4, 0.8
    prior = 0.4 * np.exp(-((grid + 1) ** 2) / 0.5) / 0.5 + 0.6 * np.exp(-((grid - 2) ** 2) / 0.02) / 0.1
    joint = prior * np.exp(-((x - grid) ** 2) / (2 * sigma**2))
    expected = (joint * (x - grid) / sigma).sum() / joint.sum()
    out = mixture.noise_at(th.tensor([sigma], dtype=F64), th.tensor([[x]], dtype=F64))
    assert out.item() == pytest.approx(expected, rel=1e-9)


def test_the_density_of_a_gaussian_in_the_plane():
    p, t, x = Process(LINEAR), th.tensor([200]), th.tensor([[0.3, -1.1]], dtype=F64)
    abar = p.alphas_cumprod[200]
    var = abar * np.array([0.25, 0.04]) + 1 - abar
    gap = x.numpy()[0] - math.sqrt(abar) * np.array([0.5, -2.0])
    expected = -0.5 * (gap**2 / var + np.log(2 * np.pi * var)).sum()
    density = toy.Mixture(th.tensor([[0.5, -2.0]], dtype=F64), th.tensor([0.5, 0.2])).log_density(p, x, t)
    assert density.item() == pytest.approx(expected, rel=1e-6)  # std was given in float32


def test_sq_norm():
    assert sq_norm(th.tensor([[3.0, 4.0], [0.0, 2.0]]), 3).tolist() == [[25.0] * 3, [4.0] * 3]


# --------------------------------------------------------------------------------------------------------- schedules

def test_schedules_are_readings_of_a_process():
    cumulative = {
        ScheduleDDPM(): np.linspace(1e-4, 0.02, 1000),
        ScheduleDDPM(50, 1e-3, 0.4): np.linspace(1e-3, 0.4, 50),
        ScheduleLDM(): np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
        ScheduleSigmoid(): 1e-4 + 0.0199 / (1 + np.exp(-np.linspace(-6, 6, 1000))),
    }
    for schedule, betas in cumulative.items():
        assert len(schedule) == len(betas) and schedule.sigmas.dtype == th.float32
        assert np.allclose(schedule.sigmas, np.sqrt(1 / np.cumprod(1 - betas) - 1), rtol=1e-6)
    assert np.array_equal(ScheduleCosine().process.betas, get_named_beta_schedule("cosine", 1000))
    assert (ScheduleCosine()[0].item(), ScheduleCosine()[-1].item()) == pytest.approx((0.00643, 20291), rel=1e-3)
    levels = ScheduleLogLinear(N=200, sigma_min=0.005, sigma_max=10)
    steps = levels.sigmas.double().log().diff()
    assert levels[0] == pytest.approx(0.005) and levels[-1] == pytest.approx(10)
    assert np.allclose(steps, math.log(2000) / 199, rtol=1e-4)
    ours = SpacedDiffusion({0, 10, 500}, betas=LINEAR, model_mean_type=ModelMeanType.EPSILON,
                           model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE)  # fmt: skip
    assert th.equal(Schedule(ours).sigmas, ScheduleDDPM()[[0, 10, 500]])
    given = th.tensor([0.1, 0.2, 5.0])
    assert th.allclose(Schedule(given).sigmas, given, rtol=1e-6, atol=0)
    for wrong in ([0.0, 1.0], [1.0, 0.5], [1.0, 1.0], [[1.0]], []):
        with pytest.raises(ValueError, match="must ascend"):
            Schedule(wrong)
    with pytest.raises(ValueError, match="infinite sigma"):
        Schedule(Process(np.array([0.1, 0.5, 1.0])))


def test_sampling_levels_trail():
    schedule = ScheduleDDPM()
    assert th.equal(schedule.sample_sigmas(4), schedule[[999, 749, 499, 249, 0]])
    assert th.equal(schedule.sample_sigmas(1), schedule[[999, 0]])
    assert schedule.sample_sigmas(4, to_zero=True)[-1] == 0
    whole = schedule.sample_sigmas(1000)
    assert len(whole) == 1001 and th.equal(whole[:1000], schedule.sigmas.flip(0)) and whole[1000] == whole[999]
    for steps in (0, -3, 1001):
        with pytest.raises(ValueError, match=rf"1..1000 steps, not {steps}"):
            schedule.sample_sigmas(steps)


def test_training_levels_are_uniform_over_the_schedule():
    schedule = Schedule([1.0, 2.0, 4.0])
    th.manual_seed(0)
    drawn = schedule.sample_batch(th.zeros(30000, 2, dtype=F64))
    assert drawn.shape == (30000,) and drawn.dtype == F64
    for level in (1.0, 2.0, 4.0):
        assert (drawn == level).double().mean().item() == pytest.approx(1 / 3, abs=4 * (2 / 9 / 30000) ** 0.5)


# ---------------------------------------------------------------------------------------------------------- sampling

class Net(nn.Module):
    """A network of the project's kind, which may be told fractional timesteps."""

    def forward(self, x, timesteps, y=None):
        t = timesteps.reshape(-1, *[1] * (x.ndim - 1)).to(x) / 1000
        out = th.sin(2 * x + 3 * t) * (0.5 + t)
        return out if y is None else out + y.reshape(t.shape)


def diffusion(mean_type=ModelMeanType.EPSILON, var_type=ModelVarType.FIXED_SMALL, respacing="50"):
    return SpacedDiffusion(space_timesteps(1000, respacing), betas=LINEAR, model_mean_type=mean_type,
                           model_var_type=var_type, loss_type=LossType.MSE)  # fmt: skip


def levels_of(process):
    return th.as_tensor(process.sqrt_recipm1_alphas_cumprod).flip(0)


@pytest.mark.parametrize("steps", [50, 1000])
def test_gam_one_mu_zero_is_ddim(steps):
    """X.1: sigma-world sample = VP sample / sqrt(abar), at every step, with and without the last one to clean data."""
    d, net = diffusion(respacing=f"{steps}"), Net()
    model = as_sigma_model(net, d)
    start = th.randn(4, 3, dtype=F64)
    vp = [out["sample"] for out in d.ddim_sample_loop_progressive(net, start.shape, noise=start, clip_denoised=False)]
    sigmas = levels_of(d)
    xt = start * (1 + sigmas[0] ** 2).sqrt()
    walk = list(samples(model, th.cat([sigmas, th.zeros(1, dtype=F64)]), xt=xt))
    keep = np.append(d.alphas_cumprod, 1.0)  # the steps end at rows T-2 .. 0 and at clean data
    for x, expected, row in zip(walk, vp, [*range(steps - 2, -1, -1), steps]):
        assert th.allclose(x, expected / math.sqrt(keep[row]), rtol=1e-9, atol=1e-9)
    short = list(samples(model, th.cat([sigmas, sigmas[-1:]]), xt=xt))
    assert len(short) == steps and th.equal(short[-1], short[-2])  # a repeated level is a step of length 0
    assert th.allclose(short[-1], walk[-2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [50, 1000])
def test_gam_one_mu_half_is_ancestral_sampling_with_the_small_variance(steps):
    d, net = diffusion(respacing=f"{steps}"), Net()
    start = th.randn(4, 3, dtype=F64)
    th.manual_seed(1)
    expected = d.p_sample_loop(net, start.shape, noise=start, clip_denoised=False)
    sigmas = levels_of(d)
    th.manual_seed(1)
    xt = start * (1 + sigmas[0] ** 2).sqrt()
    walk = samples(as_sigma_model(net, d), th.cat([sigmas, th.zeros(1, dtype=F64)]), mu=0.5, xt=xt)
    assert th.allclose(last(walk), expected, rtol=1e-9, atol=1e-9)


def test_the_noise_of_mu_half_is_the_posteriors():
    """eta^2 in the sigma world is the posterior variance / abar of the next row: the value at rows 499, 500."""
    p = Process(LINEAR)
    after, sigma = p.sqrt_recipm1_alphas_cumprod[499:501]
    eta2 = after**2 - (after**2 / sigma) ** 2
    assert eta2 == pytest.approx(p.posterior_variance[500] / p.alphas_cumprod[499], rel=1e-9)
    assert eta2 == pytest.approx(0.1279003, abs=5e-8)


def test_the_family_applies_a_gradient_as_ddim_does():
    d, start = diffusion(), th.randn(4, 3, dtype=F64)
    predict = d.predictor(Net(), clip_denoised=False, cond_fn=lambda x, t: 0.3 - x)
    rules = partial(gam_mu, gam=1.0), sampling.ddim
    ours, ddim = (last(sampling.sample(d, predict, rule, start))[0] for rule in rules)
    assert th.allclose(ours, ddim, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gam, mu", [(1.0, 0.0), (2.0, 0.0), (1.0, 0.5), (1.7, 0.3)])
def test_the_family_is_the_published_recursion(gam, mu):
    """Straight from the formula, in the sigma world, with the same noise."""
    model, sigmas = Wave(), Schedule(np.geomspace(0.02, 20, 40)).sample_sigmas(12).double()
    xt = 20 * th.randn(2, 3, dtype=F64)
    th.manual_seed(3)
    walk = list(samples(model, sigmas, gam, mu, xt=xt))
    th.manual_seed(3)
    x, eps = xt, None
    for (sigma, after), mine in zip(pairwise(sigmas), walk):
        before, eps = eps, model(x, sigma)
        average = eps if before is None else gam * eps + (1 - gam) * before
        down = (after / sigma**mu) ** (1 / (1 - mu))
        x = x - (sigma - down) * average
        x = x + (after**2 - down**2).sqrt() * th.randn_like(x) if mu else x
        assert th.allclose(mine, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gam, mu", [(1.0, 0.0), (2.0, 0.0), (1.0, 0.5)])
def test_samples_of_the_ideal_denoiser_are_data(gam, mu):
    th.manual_seed(0)
    data = Swissroll(math.pi / 2, 5 * math.pi, 50)
    schedule = ScheduleLogLinear(N=200, sigma_min=0.005, sigma_max=10)
    x = last(samples(IdealDenoiser(data), schedule.sample_sigmas(20), gam=gam, mu=mu, batchsize=200))
    nearest = th.cdist(x, data.vals).min(1)
    assert x.shape == (200, 2) and nearest.values.max() < 0.04  # a sigma_min of 0.005 is left in x
    assert len(nearest.indices.unique()) > 35
    clean = last(samples(IdealDenoiser(data), schedule.sample_sigmas(20, to_zero=True), gam=1, mu=mu, batchsize=200))
    gap = th.cdist(clean, data.vals).min(1).values
    assert (gap < 1e-6).float().mean() > 0.9 and gap.max() < 0.01  # the rest started between two neighbours


def test_sampling_leaves_the_mode_and_the_random_stream_alone():
    model = seeded(Spy, hidden_dims=(8,), num_classes=3, dropout_prob=1.0)
    model.train()
    model.net[0].eval()  # a frozen part
    sigmas = ScheduleLogLinear(50).sample_sigmas(5)
    xt, cond = th.randn(2, 2), th.tensor([0, 2])
    state = th.get_rng_state()
    walk = samples(model, sigmas, xt=xt, cond=cond, cfg_scale=2.0)
    next(walk)
    assert model.training and not model.net[0].training and model.cond_embed.training
    rest = list(walk)
    assert model.training and not model.net[0].training and model.cond_embed.training
    assert th.equal(th.get_rng_state(), state)  # mu = 0 draws nothing, and nothing was dropped
    assert model.seen == [[0, 2, 3, 3]] * 5 and len(rest) == 4  # guided at every step
    assert th.equal(last(samples(model.eval(), sigmas, xt=xt, cond=cond, cfg_scale=2.0)), rest[-1])


def test_noise_that_belongs_to_the_sample():
    sigmas = ScheduleLogLinear(50).sample_sigmas(5)

    def draw(indices):
        noise = sampling.SeededNoise(7, indices)
        return last(samples(Wave(), sigmas, mu=0.5, xt=10 * noise(th.zeros(len(indices), 3)), noise=noise))

    assert th.allclose(draw([0, 1, 2])[2], draw([2])[0], atol=1e-5)


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 2.0], [2.0, 1.0, 1.0, 0.5], [1.0, -0.1], [1.0, 0.0, 0.0]])
def test_levels_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ValueError, match="noise levels must fall"):
        next(samples(Wave(), th.tensor(sigmas)))


def test_bad_arguments_of_samples():
    sigmas = th.tensor([2.0, 1.0, 0.5])
    with pytest.raises(ValueError, match=r"mu must lie in \[0, 1\), not 1"):
        next(samples(Wave(), sigmas, mu=1))
    with pytest.raises(ValueError, match="3 conditions for 2 samples"):
        next(samples(Wave(), sigmas, batchsize=2, cond=th.zeros(3)))
    assert last(samples(Wave(), sigmas[:2])).shape == (1, 3)  # one step works


# ---------------------------------------------------------------------------------------------------------- adapters

KINDS = [kind for kind in ModelMeanType if kind is not ModelMeanType.PREVIOUS_X]


@pytest.mark.parametrize("mean_type", list(ModelMeanType))
@pytest.mark.parametrize("clock", ["interpolated", "nearest"])
def test_there_and_back(mean_type, clock):
    """Our network as a sigma model, back under our samplers: the same predictor."""
    d, net = diffusion(mean_type), Net()
    if mean_type is ModelMeanType.PREVIOUS_X and clock == "interpolated":
        with pytest.raises(ValueError, match="use clock='nearest'"):
            as_sigma_model(net, d, clock)
        return
    back = sigma_predictor(d, as_sigma_model(net, d, clock))
    t, y = th.tensor([0, 1, 25, 49]), th.tensor([0.1, -0.2, 0.3, 0.0], dtype=F64)
    for dtype, bound in ((F64, 1e-9), (th.float32, 1e-6)):
        x = th.randn(4, 3, dtype=dtype, generator=th.Generator().manual_seed(0))
        ours, direct = back(x, t, y=y.to(dtype)), d.predictor(net, clip_denoised=False)(x, t, y=y.to(dtype))
        scale = 1 if dtype == F64 else d.at("sqrt_recip_alphas_cumprod", t, x) + 1 / d.at("sqrt_alphas_cumprod", t, x)
        assert ((ours.x0 - direct.x0).abs() / scale).max() < bound
        assert (ours.variance == direct.variance).all() and (ours.log_variance == direct.log_variance).all()


def test_learned_variance_is_left_behind():
    d = diffusion(var_type=ModelVarType.LEARNED_RANGE)

    def net(x, t):
        return th.cat([Net()(x, t), x], 1)

    x, t = th.randn(3, 2, 4), th.tensor([1, 20, 49])
    sigma = d.at("sqrt_recipm1_alphas_cumprod", t, x[:, :1, :1])
    eps = as_sigma_model(net_module(net), d).predict_eps(x * (1 + sigma**2).sqrt(), sigma)
    assert th.allclose(eps, Net()(x, d.clock(t)), atol=1e-6)


def net_module(function):
    module = nn.Module()
    module.forward = function
    return module


def test_the_clock_between_rows():
    told = []

    def net(x, t):
        told.append(t)
        return x

    d = diffusion(respacing="5")
    sigmas = th.as_tensor(d.sqrt_recipm1_alphas_cumprod).float()
    between = (sigmas[1] * sigmas[2]).sqrt()
    x = th.zeros(5, 2)
    asked = th.stack([sigmas[0] / 9, sigmas[2], between, sigmas[2] ** 0.7 * sigmas[1] ** 0.3, sigmas[4] * 9])[:, None]
    as_sigma_model(net_module(net), d)(x, asked)
    as_sigma_model(net_module(net), d, "nearest")(x, asked)
    steps = d.timesteps.astype(float)
    gap = steps[2] - steps[1]
    expected = [steps[0], steps[2], steps[1] + gap / 2, steps[1] + 0.7 * gap, steps[4]]
    assert told[0].tolist() == pytest.approx(expected, rel=1e-5) and told[0].dtype == th.float32
    assert told[1].tolist() in ([0, steps[2], steps[1], steps[2], 999], [0, steps[2], steps[2], steps[2], 999])
    assert told[1].dtype == th.int64
    whole = diffusion(respacing="1000")
    levels = th.as_tensor(whole.sqrt_recipm1_alphas_cumprod).float()[:, None]  # rounded, and rows all the same
    as_sigma_model(net_module(net), whole)(th.zeros(1000, 2), levels)
    assert told[2].dtype == th.int64 and told[2].tolist() == list(range(1000))
    with pytest.raises(ValueError, match="unknown clock 'linear'"):
        as_sigma_model(Net(), d, "linear")


@pytest.mark.parametrize("mean_type", KINDS)
def test_a_foreign_euler_sampler_drives_our_network_as_ddim_does(mean_type):
    """What k-diffusion does: d x / d sigma = eps, with a function that knows only (x, sigma)."""
    d, net = diffusion(mean_type), Net()
    model = as_sigma_model(net, d)
    start = th.randn(3, 2, dtype=F64)
    sigmas = levels_of(d)
    x = start * (1 + sigmas[0] ** 2).sqrt()
    for sigma, after in pairwise([*sigmas, th.zeros(())]):
        x = x + (after - sigma) * model.predict_eps(x, sigma.expand(3, 1))
    expected = d.ddim_sample_loop(net, (3, 2), noise=start, clip_denoised=False)
    assert th.allclose(x, expected, rtol=1e-8, atol=1e-8)


def test_a_unet_of_ours_as_a_sigma_model_with_labels_and_guidance():
    net = unzeroed(seeded(UNetModel, 4, 1, 32, 1, 1, [2], channel_mult=(1, 1), num_classes=3)).eval()
    d = diffusion()
    model = as_sigma_model(net, d, null_cond=2)
    assert model.input_dims == (1, 4, 4) and model.rand_input(2).shape == (2, 1, 4, 4)
    assert {id(p) for p in model.parameters()} == {id(p) for p in net.parameters()}
    x, y = th.randn(2, 1, 4, 4), th.tensor([0, 1])
    t = th.tensor([30, 30])
    sigma = d.at("sqrt_recipm1_alphas_cumprod", t, x[:, :1, :1, :1])
    given, free = (net(x, d.clock(t), y) for y in (y, th.tensor([2, 2])))
    guided = model.predict_eps_cfg(x * (1 + sigma**2).sqrt(), sigma, y, 1.0)
    assert th.allclose(guided, 2 * given - free, atol=1e-5)
    assert len(list(samples(model, Schedule(d).sample_sigmas(3), cond=y, cfg_scale=1.0, batchsize=2))) == 3
    with pytest.raises(ValueError, match="no null condition"):
        as_sigma_model(net, d).predict_eps_cfg(x, sigma, y, 1.0)


@pytest.mark.parametrize("name", list(sampling.SAMPLERS))
def test_a_sigma_model_under_every_sampler_of_ours(name):
    th.manual_seed(0)
    data = th.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.0]])
    p = Process(LINEAR).spaced(spaced_rows(Process(LINEAR), "log_snr", 40))
    predict = sigma_predictor(p, Scaled(PredX0(IdealOfX0))(data))
    x, _ = last(sampling.sample(p, predict, sampling.SAMPLERS[name], th.randn(300, 2)))
    near, which = th.cdist(x, data).min(1)
    assert near.max() < 0.02
    assert th.allclose(which.bincount(minlength=3) / 300, th.full((3,), 1 / 3), atol=4 * (2 / 9 / 300) ** 0.5)


class IdealOfX0(nn.Module, ModelMixin):
    """The ideal denoiser written as a network that sees scaled x and puts out x_0."""

    def __init__(self, data):
        super().__init__()
        self.ideal = IdealDenoiser(data)

    def forward(self, x, sigma, cond=None):
        x = x * (1 + sigma**2).sqrt()
        return x - sigma * self.ideal(x, sigma)


class Dropping(nn.Dropout, ModelMixin):
    """In training mode it drops half of x."""

    def forward(self, x, sigma, cond=None):
        return super().forward(x)


def test_the_mode_of_a_sigma_model_under_our_samplers():
    model = seeded(Spy, hidden_dims=(8,), num_classes=3, dropout_prob=1.0).train()
    predict = sigma_predictor(Process(LINEAR), model, cfg_scale=1.0)
    t, x, y = th.tensor([5, 5]), th.randn(2, 2), th.tensor([0, 1])
    assert th.equal(predict(x, t, y=y).eps, predict(x, t, cond=y).eps) and model.training
    assert model.seen == [[0, 1, 3, 3]] * 2
    assert sigma_predictor(Process(LINEAR), Dropping())(th.ones(1, 99), t[:1]).eps.all()


# ---------------------------------------------------------------------------------------------------------- training

def test_a_training_sample():
    schedule, x0, labels = ScheduleLogLinear(10), th.randn(6, 1, 2, 2), th.arange(6)
    for batch, conditional, cond in ((x0, False, None), ([x0, labels], False, None), ([x0, labels], True, labels)):
        got, sigma, eps, given = generate_train_sample(batch, schedule, conditional)
        assert got is x0 and sigma.shape == (6, 1, 1, 1) and eps.shape == x0.shape and given is cond
        assert th.isin(sigma, schedule.sigmas).all()
    with pytest.raises(ValueError, match="needs batches"):
        generate_train_sample(x0, schedule, True)


def test_the_training_loop_is_adamw_and_yields_after_each_step():
    model, schedule = seeded(TimeInputMLP, hidden_dims=(8,)), ScheduleLogLinear(20)
    twin = seeded(TimeInputMLP, hidden_dims=(8,))
    batches = [th.randn(4, 2), th.randn(4, 2)]
    th.manual_seed(5)
    seen = list(training_loop(batches, model, schedule, epochs=2, lr=0.01))
    assert [now.step for now in seen] == [1, 2, 3, 4] and not seen[0].loss.requires_grad
    th.manual_seed(5)
    optimizer = th.optim.AdamW(twin.parameters(), lr=0.01)
    for now, x0 in zip(seen, 2 * batches):
        _, sigma, eps, _ = generate_train_sample(x0, schedule)
        loss = ((twin(x0 + sigma * eps, sigma) - eps) ** 2).mean()
        assert th.equal(now.sigma, sigma) and th.equal(now.eps, eps) and loss.item() == pytest.approx(now.loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(th.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), twin.parameters()))


def test_training_goes_on_in_training_mode_whatever_the_consumer_does():
    data, seen = TreeDataset(3, 2, 4), []
    model = Spy(hidden_dims=(8,), num_classes=3)
    for now in islice(training_loop(DataLoader(data, 6), model, ScheduleLogLinear(20), conditional=True), 3):
        seen.append(now.model.training)
        model.eval()
    assert seen == [True] * 3 and all(0 <= label < 3 for cond in model.seen for label in cond)


def loss_at(model, x0, sigma, eps):
    with th.no_grad():
        return ((model.predict_eps(x0 + sigma * eps, sigma) - eps) ** 2).mean().item()


@pytest.mark.parametrize("build", [TimeInputMLP, Scaled(PredV(TimeInputMLP))])
def test_training_comes_down_to_the_ideal_denoiser_and_not_below(build):
    """At each noise level, with the same noise for both, to four standard errors of the difference."""
    data = Swissroll(math.pi / 2, 5 * math.pi, 100)
    schedule = ScheduleLogLinear(N=200, sigma_min=0.05, sigma_max=10)
    model, ideal = seeded(build, hidden_dims=(64, 128, 64)), IdealDenoiser(data)
    x0 = data.vals.repeat(100, 1)
    eps, levels = th.randn(10000, 2), th.tensor([0.05, 0.25, 0.5, 1.2, 5.0])
    untrained = [loss_at(model, x0, level, eps) for level in levels]
    for now in training_loop([data.vals.repeat(10, 1)], model, schedule, epochs=400, lr=5e-3):
        for group in now.optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - now.step / 400)
    for level, before in zip(levels, untrained):
        excess = loss_at(model, x0, level, eps) - loss_at(ideal, x0, level, eps)
        x = x0 + level * eps
        with th.no_grad():
            difference = ((model.predict_eps(x, level) - eps) ** 2 - (ideal(x, level) - eps) ** 2).mean(1)  # [N]
        assert excess >= -4 * difference.std().item() / 100
        at_first = before - loss_at(ideal, x0, level, eps)
        # Noise much narrower than the gap between the turns of the roll takes a longer training.
        assert excess < (1 if level < 0.1 else 0.08) * at_first, (level, excess, at_first)


# -------------------------------------------------------------------------------------------------------------- data

def test_swissroll():
    roll = Swissroll(math.pi / 2, 5 * math.pi, 100)
    t = th.linspace(math.pi / 2, 5 * math.pi, 100)
    assert len(roll) == 100 and th.allclose(roll.vals.norm(dim=1), t / (5 * math.pi), atol=1e-6)
    assert np.allclose(roll[0], [0.0, 0.1], atol=1e-6) and np.allclose(roll[99], [-1.0, 0.0], atol=1e-5)
    moved = Swissroll(1.0, 2.0, 3, center=(5.0, -1.0), scale=2.0)
    assert th.allclose((moved.vals - th.tensor([5.0, -1.0])) / 2, Swissroll(1.0, 2.0, 3).vals, atol=1e-6)


def test_tree():
    tree = TreeDataset(branching_factor=3, depth=3, num_samples_per_path=5)
    assert len(tree) == 5 * (3 + 9 + 27) and tree.labels.bincount().tolist() == [65, 65, 65]
    assert tree.vals.norm(dim=1).max() <= 1
    assert tree.vals[:15].norm(dim=1).reshape(3, 5)[0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    for label in range(3):  # a branch grows out of its parent, within its own third of the plane
        branch = tree.vals[tree.labels == label]
        heading = branch[4] / branch[4].norm()
        assert ((branch @ heading) / branch.norm(dim=1)).min() > 0.5
    point, label = tree[7]
    assert point.shape == (2,) and label == 1


def test_sauropod():
    animal = Sauropod(500)
    step = (animal.vals.roll(-1, 0) - animal.vals).norm(dim=1)
    corners = th.tensor(toy.SAUROPOD) / 100
    length = (corners.roll(-1, 0) - corners).norm(dim=1).sum().item()
    assert animal.vals.abs().max() <= 1 and len(animal) == 500
    assert step.max().item() <= length / 500 * 1.001 and step.median().item() == pytest.approx(length / 500, rel=1e-3)
    assert th.cdist(corners, animal.vals).min(1).values.max() < length / 500
