"""The batch that sampling takes by itself: bytes counted exactly, and as many images as fit."""

import pytest
import torch as th
from test_programs import done, refused, samples

from guided_diffusion import checkpoint, memory, program
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

CPU = th.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The path of a class-conditional model with weights of noise."""
    folder = tmp_path_factory.mktemp("model")
    flags = model_and_diffusion_defaults() | {
        "image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1",
        "attention_resolutions": "4", "noise_schedule": "cosine", "class_cond": True, "num_classes": 3,
    }  # fmt: skip
    th.manual_seed(0)
    net, _ = create_model_and_diffusion(**flags)
    for p in net.parameters():
        th.nn.init.normal_(p, std=0.05)
    checkpoint.save(net.state_dict(), str(folder / "model000001.pt"))
    checkpoint.write_config(str(folder), "diffusion", flags)
    return folder / "model000001.pt"


def test_working_bytes_are_those_alive_at_once():
    """Views and what is given count nothing; what was freed counts no more."""
    given = th.zeros(1000)

    def action():
        a = given + 1                      # 4000 bytes
        b = a.view(10, 100).t() * 2        # and 4000
        del a
        c = b.contiguous()                 # 8000 again
        c.add_(given.view(100, 10))        # in place
        return c

    assert memory.working_bytes(action) == 8000
    assert memory.working_bytes(lambda: given[:10]) == 0
    with th.inference_mode():
        assert memory.working_bytes(lambda: th.zeros(10, dtype=th.float64)) == 80


@pytest.mark.parametrize("free, fits", [(99, None), (1000, 4), (10**6, 50), (None, 50)])
def test_what_fits_is_estimated_from_one(monkeypatch, free, fits):
    """Images of 160 bytes, of which 0.7 of the memory may be full."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    tried = []

    def attempt(n):
        tried.append(n)
        th.zeros(n, 40).sum()

    if fits is None:
        with pytest.raises(ValueError, match="not even one image at a time fits"):
            memory.fitting(CPU, attempt, 50)
    else:
        assert memory.fitting(CPU, attempt, 50) == fits
    assert set(tried) == {1}


@pytest.mark.parametrize("name", ["fits", "scarce"])
def test_batch_size_0_takes_what_fits_and_draws_the_same(model, tmp_path, monkeypatch, name):
    words = f"--model_path {model} --timestep_respacing ddim3 --num_samples 5 --log_dir {tmp_path}"
    done("image_sample", f"{words}/a --batch_size 2")
    batches = []
    drain = program.drain
    monkeypatch.setattr(program, "drain", lambda stream, *rest: drain(seen(stream), *rest))

    def seen(stream):
        for indices, x, y in stream:
            batches.append(len(x))
            yield indices, x, y

    if name == "scarce":  # for three images at once, so two are taken
        one = []
        monkeypatch.setattr(memory, "working_bytes", lambda action: one.append(100) or 100)
        monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 100 / memory.SHARE + 1)
    done("image_sample", f"{words}/b --batch_size 0")
    assert batches == ([5] if name == "fits" else [2, 2, 1])
    (_, first, labels), (_, again, same) = samples(tmp_path / "a"), samples(tmp_path / "b")
    assert (first == again).mean() > 0.98 and (labels == same).all()


def test_negative_batches_are_refused(model, tmp_path):
    words = f"--model_path {model} --num_samples 5 --log_dir {tmp_path} --batch_size -1"
    refused("image_sample", words, "--batch_size must be 0 or more, not -1")
