"""
No step of training or sampling makes the host wait for the device. Nothing can be read back from torch's meta device,
so that whatever would wait for a GPU raises there, and copies to it that would wait are recorded.
(benchmarks/gpu_checks.py asks a real GPU.)
"""

import importlib.util
import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion import config, ema, fp16_util, guidance, logger, sampling, train_util
from guided_diffusion.network_options import ClassifierOptions, DiffusionOptions, ModelOptions
from guided_diffusion.script_util import create_classifier_and_diffusion, create_model_and_diffusion

META = th.device("meta")
PROCESS = config.defaults(DiffusionOptions) | {"diffusion_steps": 40, "noise_schedule": "cosine"}
NET = config.defaults(ModelOptions) | PROCESS | {
    "image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
    "attention_resolutions": "4", "num_classes": 9,
}  # fmt: skip
CLASSIFIER = config.defaults(ClassifierOptions) | PROCESS | {
    "image_size": 8, "image_channels": 1, "classifier_width": 32, "classifier_depth": 1, "num_classes": 9,
    "classifier_channel_mult": "1,2", "classifier_attention_resolutions": "4", "classifier_num_head_channels": 16,
}  # fmt: skip


class Copies(TorchDispatchMode):
    """Records the copies from the host to the device that wait."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name, waits = kwargs or {}, func.name(), False
        if name == "aten::_to_copy":
            waits = args[0].device.type == "cpu" and kwargs.get("device") == META and not kwargs.get("non_blocking")
        elif name == "aten::copy_":
            waits = args[1].device.type == "cpu" and args[0].device == META and not (*args, False)[2]
        if waits:
            self.waiting.append((name, tuple(args[0].shape)))
        return func(*args, **kwargs)


def test_what_is_recorded():
    with Copies() as copies:
        th.zeros(2).to(META, non_blocking=True)
        th.zeros(3, device=META).copy_(th.zeros(3), non_blocking=True)
        assert copies.waiting == []
        th.zeros(2).to(META)
        th.zeros(3, device=META).copy_(th.zeros(3))
        assert [shape for _, shape in copies.waiting] == [(2,), (3,)]
    for look in (th.Tensor.item, th.Tensor.tolist, bool, th.Tensor.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            look(th.zeros(1, device=META))


def batches():
    while True:
        yield th.randn(4, 1, 8, 8), {"y": th.arange(4)}


KINDS = {
    "plain": {},
    "microbatches": {"microbatch": 2},
    "fp16": {"use_fp16": True},
    "clipped": {"grad_clip": 1.0},
    "dropped": {"drop": partial(guidance.dropped, null={"y": 9}, rate=0.5)},
    "classifier": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_training_step_waits(kind, monkeypatch, tmp_path):
    logger.configure(str(tmp_path), format_strs=[])
    # What only a real device has: its generators, and the fused optimizer, which looks at `good` there.
    monkeypatch.setattr(train_util, "noise_like", lambda x, words, places: th.randn_like(x))
    monkeypatch.setattr(fp16_util, "_step", lambda opt, good: opt.step())
    if kind == "classifier":
        net, diffusion = create_classifier_and_diffusion(**CLASSIFIER)
        task = train_util.ClassifierTask(net.to(META), diffusion)
    else:
        net, diffusion = create_model_and_diffusion(**NET | {"class_cond": True, "learn_sigma": True})
        task = train_util.DiffusionTask(net.to(META), diffusion)
    trainer = train_util.Trainer(task, batches(), batch_size=4, averages=ema.parse("0.9"), **KINDS[kind])
    trainer.run_step(*next(trainer.data))  # the first one brings the tables of the process
    with Copies() as copies:
        for _ in range(2):
            trainer.run_step(*next(trainer.data))
    assert copies.waiting == []


@pytest.mark.parametrize("name", sorted(sampling.SAMPLERS.keys() - {"adaptive"}))
def test_no_step_of_a_guided_walk_waits(name):
    """The adaptive sampler must know its error to choose its step; the others know all steps beforehand."""
    model, diffusion = create_model_and_diffusion(**NET | {"class_cond": True, "learn_sigma": True})
    classifier = create_classifier_and_diffusion(**CLASSIFIER)[0].to(META)
    rule, rows = sampling.plan(diffusion, name, 20)
    diffusion = diffusion.spaced(rows)
    null = {"y": 9}
    predict = diffusion.predictor(
        lambda x, t, y=None: model(x, t, y.clamp(max=8)),
        cond_fn=guidance.classifier_gradient(classifier, 2.0),
        guide=lambda predict: guidance.classifier_free(predict, null, 1.5, batched=True),
    )
    model.to(META)
    noise = sampling.SeededNoise(0, range(4), META)
    cond = {"y": th.zeros(4, dtype=th.int64, device=META)}
    steps = sampling.sample(diffusion, predict, rule, noise.normal(1, 8, 8), noise=noise, cond=cond)
    next(steps)  # the first one brings the tables of the process
    with Copies() as copies:
        assert len(list(itertools.islice(steps, 3))) == 3
    assert copies.waiting == []


def test_the_gpu_checks_run_on_a_cpu(tmp_path, capsys):
    path = Path(__file__).parent.parent / "benchmarks" / "gpu_checks.py"
    spec = importlib.util.spec_from_file_location("gpu_checks", path)
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    words = "--steps 6 --log_interval 2 --batch_size 2 --image_size 8 --num_channels 32 --walk 4 --device cpu --out"
    assert checks.main([*words.split(), str(tmp_path / "results.json")]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result == json.loads(capsys.readouterr().out) and result["problems"] == []
    assert result["machine"]["gpu"] is None and result["options"]["device"] == "cpu"
    for told in result["training"].values():
        assert [row["step"] for row in told["losses"]] == [2, 4, 6]
        assert told["no_step_waits"] is None and told["skipped_steps"] == 0
    assert result["training"]["fp16"]["lg_loss_scale"] == pytest.approx(20.006)  # 0.001 a step
    assert all(told["finite"] for told in result["walks"].values()) and len(result["walks"]) == 4
    result["training"]["fp16"]["losses"][-1]["loss"] *= 2
    result["walks"]["ddpm"] = checks.checked("no_step_waits", th.device("cpu"), lambda: th.zeros(1, device=META).item())
    found = "\n".join(checks.problems(result))
    assert "fp16: the loss ended at" in found and "ddpm: a step waited for the device (failed: Tensor.item" in found


def test_a_gpu_fetches_from_pinned_memory(monkeypatch):
    """From any other the host waits until the GPU has come so far, though it asks for a copy that does not wait."""
    pinned = []
    monkeypatch.setattr(th.Tensor, "pin_memory", lambda self: pinned.append(len(self)) or self)
    monkeypatch.setattr(th.Tensor, "to", lambda self, device, **how: (device.type, len(pinned), how))
    assert sampling.sent(th.zeros(2), "cuda:0") == ("cuda", 1, {"non_blocking": True})
    assert sampling.sent(th.zeros(3), "cpu") == ("cpu", 1, {"non_blocking": True})
    assert pinned == [2]
