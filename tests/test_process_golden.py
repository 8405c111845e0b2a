"""The process against numbers computed by the original: tables, losses, seeded samples, bits per dimension."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

GOLDEN = Path(__file__).parent / "golden"
SCHEDULES = np.load(GOLDEN / "schedules.npz")
PROCESS = np.load(GOLDEN / "process.npz")
KEYS = json.loads((GOLDEN / "process.json").read_text())
SHAPE = (2, 3, 8, 8)


def rnd(seed, *shape):
    return th.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


X0, NOISE, Y = rnd(10, *SHAPE).tanh(), rnd(11, *SHAPE), th.tensor([1, 4])


def build(key):
    schedule, respacing, variance, mean, loss, clock = key.split("|")
    steps = 4000 if schedule == "cosine4000" else 1000
    return SpacedDiffusion(
        range(steps) if respacing == "full" else space_timesteps(steps, respacing),
        betas=get_named_beta_schedule("linear" if schedule == "linear" else "cosine", steps),
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[variance],
        loss_type=LossType[loss],
        rescale_timesteps=clock == "rescale",
    )


def network(learned):
    def forward(x, t, y):
        t, y = (v.float().view(-1, 1, 1, 1) for v in (t, y))
        out = 0.8 * th.tanh(0.9 * x + 0.1 * th.sin(t / 37) + 0.05 * y) + 0.1 * th.roll(x, 1, -1)
        return th.cat([out, 0.7 * th.cos(3 * x + t / 50)], 1) if learned else out

    return forward


def cond_fn(x, t, y):
    t, y = (v.float().view(-1, 1, 1, 1) for v in (t, y))
    return -0.3 * (x - 0.1 * y) * (1 + t / 1000)


def assert_close(ours, key, tolerance):
    golden = PROCESS[key]
    ours = np.asarray(ours)
    assert ours.shape == golden.shape
    assert np.abs(ours - golden).max() <= tolerance * np.abs(golden).max(), key


def test_no_golden_entry_is_left_out():
    tested = re.compile(r"/(losses_[ab]/\w+|sample_\w+|bpd/\w+|q_sample|ddim_reverse)$")
    assert [k for k in PROCESS if not tested.search(k)] == []
    assert len(KEYS) == 356 and len(PROCESS.files) == 1876


@pytest.mark.parametrize("name", sorted({k.rsplit("/", 1)[0] for k in SCHEDULES}))
def test_tables(name):
    schedule, steps, respacing = name.split("-", 2)
    steps = int(steps)
    ours = SpacedDiffusion(
        range(steps) if respacing == "full" else space_timesteps(steps, respacing),
        betas=get_named_beta_schedule(schedule, steps),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
    )
    tables = [k.rsplit("/", 1)[1] for k in SCHEDULES if k.rsplit("/", 1)[0] == name]
    assert len(tables) == 14
    for table in tables:
        golden, value = SCHEDULES[f"{name}/{table}"], np.asarray(getattr(ours, table))
        assert value.shape == golden.shape and value.dtype == golden.dtype, table
        assert ((golden == 0) == (value == 0)).all(), table
        tolerance = 1e-6 if table == "log_one_minus_alphas_cumprod" else 1e-9
        np.testing.assert_allclose(value, golden, rtol=tolerance, atol=0, err_msg=table)


@pytest.mark.parametrize("key", KEYS)
def test_losses(key):
    diffusion = build(key)
    model = network("LEARNED" in key)
    last = diffusion.num_timesteps
    for part, t in {"a": [0, last - 1], "b": [last // 3, 1]}.items():
        terms = diffusion.training_losses(model, X0, th.tensor(t), model_kwargs={"y": Y}, noise=NOISE)
        names = {k.rsplit("/", 1)[1] for k in PROCESS if k.startswith(f"{key}/losses_{part}/")}
        assert set(terms) == names
        for name in names:
            assert_close(terms[name], f"{key}/losses_{part}/{name}", 1e-4)


SAMPLES = sorted(k for k in PROCESS if "/sample_" in k)


@pytest.mark.parametrize("entry", SAMPLES)
def test_seeded_samples(entry):
    key, kind = entry.rsplit("/sample_", 1)
    diffusion = build(key)
    loop = diffusion.ddim_sample_loop if kind.startswith("ddim") else diffusion.p_sample_loop
    options = {"eta": 0.7} if kind == "ddim_eta" else {}
    th.manual_seed(5)
    sample = loop(
        network("LEARNED" in key),
        SHAPE,
        clip_denoised=kind != "p_noclip",
        cond_fn=cond_fn if kind.endswith("cond") else None,
        model_kwargs={"y": Y},
        **options,
    )
    assert_close(sample, entry, 1e-3)


@pytest.mark.parametrize("key", sorted({k.split("/bpd/")[0] for k in PROCESS if "/bpd/" in k}))
def test_bits_per_dimension_and_reverse_steps(key):
    diffusion = build(key)
    model = network("LEARNED" in key)
    th.manual_seed(6)
    terms = diffusion.calc_bpd_loop(model, X0, clip_denoised=True, model_kwargs={"y": Y})
    assert set(terms) == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
    for name, value in terms.items():
        assert_close(value, f"{key}/bpd/{name}", 1e-4)
    t = th.tensor([diffusion.num_timesteps // 3, 1])
    x_t = diffusion.q_sample(X0, t, NOISE)
    assert_close(x_t, f"{key}/q_sample", 1e-4)
    reverse = diffusion.ddim_reverse_sample(model, x_t, t, clip_denoised=True, model_kwargs={"y": Y})
    assert_close(reverse["sample"], f"{key}/ddim_reverse", 1e-4)


def test_plain_and_spaced_agree_when_every_row_is_kept():
    """The original's GaussianDiffusion is the SpacedDiffusion of all rows."""
    betas = get_named_beta_schedule("linear", 100)
    kinds = {
        "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.LEARNED_RANGE,
        "loss_type": LossType.MSE,
    }
    plain, spaced = GaussianDiffusion(betas=betas, **kinds), SpacedDiffusion(range(100), betas=betas, **kinds)
    assert np.abs(plain.betas - spaced.betas).max() < 2e-16
    np.testing.assert_allclose(plain.posterior_mean_coef1, spaced.posterior_mean_coef1, rtol=1e-12)
