"""The stream of samples with named samplers: how often the network runs, where, and what is refused."""

import pytest
import torch as th

from guided_diffusion import sampling
from guided_diffusion.generate import sample_stream
from guided_diffusion.script_util import create_gaussian_diffusion


def draw(seen=None, respacing="", **options):
    def model(x, t):
        if seen is not None:
            seen.append(int(t[0]))
        return 0.3 * x + 0.1 * th.sin(t.float() / 100).view(-1, 1, 1, 1)

    diffusion = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing=respacing)
    stream = sample_stream(diffusion, model, shape=(1, 4, 4), num_samples=3, batch_size=2, seed=1, **options)
    return th.cat([x for _, x, _ in stream])


@pytest.mark.parametrize("name", [name for name in sampling.SAMPLERS if name not in ("adaptive", "edm")])
def test_steps_are_rows_of_the_original_clock_and_cost_what_the_table_says(name):
    seen = []
    assert draw(seen, sampler=name, steps=6).isfinite().all()
    per_batch = seen[: len(seen) // 2]
    assert len(set(per_batch)) == 6 and max(per_batch) in (990, 999) and seen == per_batch * 2
    assert len(per_batch) <= 6 * sampling.SAMPLERS[name].evaluations


def test_noise_of_one_path_is_the_same_for_any_number_of_steps():
    """With fresh noise two runs differ as two samples do; with a path they come closer as the steps grow more."""
    full = create_gaussian_diffusion(noise_schedule="cosine", predict_xstart=True)

    def drawn(steps, path):
        stream = sample_stream(full, lambda x, t: 0.5 * x.tanh(), shape=(1, 4, 4), num_samples=6, batch_size=4,
                               sampler="ddim", steps=steps, eta=1.0, seed=3, path=path)  # fmt: skip
        return th.cat([x for _, x, _ in stream])

    def gap(a, b, path):
        return (drawn(a, path) - drawn(b, path)).square().mean().sqrt().item()

    assert gap(200, 400, full) < 0.65 * gap(50, 100, full) and gap(200, 400, full) < 0.3 * gap(200, 400, None)


@pytest.mark.parametrize("words, message", [
    ({"eta": 2.0, "use_ddim": True}, "--eta is the noise of DDIM, from 0 .* to 1 .*not 2.0"),
    ({"eta": -1.0, "sampler": "dpmpp_2m"}, "--eta .*not -1.0"),
    ({"eta": 0.5}, "--eta 0.5 belongs to DDIM: add --use_ddim True"),
    ({"sampler": "heun", "use_ddim": True}, "two samplers"),
    ({"sampler": "heun", "eta": 0.5}, "the sampler heun has no options, and so no eta"),
    ({"sampler_options": {"gam": 1.0}}, "belong to a sampler"),
    ({"sampler": "gam_mu", "sampler_options": {"gamma": 1.0}}, "unknown option of gam_mu: gamma .*did you mean gam"),
])  # fmt: skip
def test_walks_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        draw(**words)


def test_options_reach_the_rule():
    """gam 1 and mu 0 are DDIM; eta 0 takes the noise out of a sampler that has it by default."""
    ddim = draw(sampler="ddim", steps=8, spacing="uniform")
    options = {"gam": 1.0, "mu": 0.0}
    th.testing.assert_close(draw(sampler="gam_mu", steps=8, spacing="uniform", sampler_options=options), ddim)
    assert not th.allclose(draw(sampler="gam_mu", steps=8, spacing="uniform"), ddim)
    assert th.equal(draw(sampler="euler_ancestral", steps=8, eta=0.0), draw(sampler="euler", steps=8))


def test_the_named_ddim_is_the_original_one():
    """Rows 250 of the original's even spacing, then all of them by name."""
    for eta in (0.0, 0.5):
        usual = draw(respacing="25", use_ddim=True, eta=eta)
        assert th.equal(draw(respacing="25", sampler="ddim", eta=eta), usual)
        th.testing.assert_close(draw(sampler="ddim", steps=25, spacing="uniform", eta=eta), usual, rtol=0, atol=1e-5)
    assert th.equal(draw(respacing="25", sampler="ddpm"), draw(respacing="25"))


@pytest.mark.parametrize("options, message", [
    ({"sampler": "dpmp_2m"}, "unknown sampler: dpmp_2m .*did you mean dpmpp_2m"),
    ({"sampler": "heun", "steps": 2000}, "1 to the 1000 rows"),
    ({"sampler": "heun", "steps": -1}, "steps must be"),
    ({"sampler": "heun", "spacing": "log-snr"}, "unknown spacing: log-snr .*did you mean log_snr"),
    ({"sampler": "heun", "eta": 1.0}, "eta"),
    ({"steps": 10}, "name one by --sampler"),
])  # fmt: skip
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


def test_walks_are_in_inference_mode_but_for_the_gradient():
    """The network knows nothing of autograd, the gradient function may use it, and what comes out may enter a graph."""
    modes = []
    diffusion = create_gaussian_diffusion(steps=30, timestep_respacing="3")

    def network(x, t, y):
        modes.append(("network", th.is_inference_mode_enabled(), th.is_grad_enabled()))
        return 0.1 * x

    def cond_fn(x, t, y):
        modes.append(("gradient", th.is_inference_mode_enabled(), th.is_grad_enabled()))
        with th.enable_grad():
            x = x.detach().requires_grad_()
            return th.autograd.grad((x * y.view(-1, 1, 1, 1)).square().sum(), x)[0]

    how = {"shape": (1, 4, 4), "num_samples": 2, "batch_size": 2, "labels": [1, 2], "seed": 3}
    ((_, x, y),) = sample_stream(diffusion, network, cond_fn=cond_fn, **how)
    assert modes == [("network", True, False), ("gradient", False, False)] * 3
    assert not x.is_inference() and not y.is_inference()
    x.requires_grad_().square().sum().backward()
    assert th.equal(x.grad, 2 * x)
    noise = sampling.SeededNoise(3, range(2))
    y = th.tensor([1, 2])
    predict, start = diffusion.predictor(network, cond_fn=cond_fn), noise.normal(1, 4, 4)
    *_, (plain, _) = sampling.sample(diffusion, predict, sampling.ddpm, start, noise=noise, cond={"y": y})
    assert th.equal(plain, x)  # the walk without inference mode
    weight = th.ones(2, 1, 4, 4, requires_grad=True)  # the tables that the walk used first serve training
    (diffusion.q_sample(x.detach(), y, x.detach()) * diffusion.at("betas", y, weight) * weight).sum().backward()
    assert weight.grad.isfinite().all()
