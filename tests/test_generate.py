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
    assert len(set(per_batch)) == 6 and max(per_batch) == 999 and seen == per_batch * 2
    assert len(per_batch) <= 6 * sampling.SAMPLERS[name].evaluations


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
