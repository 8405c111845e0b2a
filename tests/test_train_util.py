"""The training loop against a second implementation, closed forms, and bad steps."""

import csv
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from test_programs import same
from torch import nn

from guided_diffusion import checkpoint, dist_util, ema, guidance, health, logger, saves, signals, train_util
from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.train_util import (
    ClassifierTask,
    DiffusionTask,
    Trainer,
    TrainLoop,
    compute_top_k,
    noise_like,
)
from guided_diffusion.unet import SuperResModel, UNetModel

DIFFUSION = GaussianDiffusion(
    betas=get_named_beta_schedule("linear", 40),
    model_mean_type=ModelMeanType.EPSILON,
    model_var_type=ModelVarType.FIXED_LARGE,
    loss_type=LossType.MSE,
)


class Net(nn.Module):
    """A tiny network on vectors, for denoising or (classes > 0) classification."""

    def __init__(self, classes=0):
        super().__init__()
        th.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, classes or 4))

    def forward(self, x, t, y=None):
        return self.body(th.cat([x, t[:, None].float() / 40], 1))


def batches(size=8, seed=0):
    """The same few batches again and again, with labels."""
    rng = np.random.default_rng(seed)
    x = th.from_numpy(rng.normal(size=(3, size, 4)).astype(np.float32))
    y = th.from_numpy(rng.integers(3, size=(3, size)))
    while True:
        for k in range(3):
            yield x[k], {"y": y[k]}


@pytest.fixture
def folder(tmp_path):
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["csv"]):
        yield tmp_path


def train(folder, steps, net=None, task=None, data=None, **options):
    task = task or DiffusionTask(net or Net(), DIFFUSION)
    options = {"batch_size": 8, "lr": 1e-2, "log_interval": 1, "save_interval": 1000, **options}
    trainer = Trainer(task, data or batches(), iterations=steps, **options)
    trainer.run_loop()
    return trainer


def sample_noise(step, place, size, seed=0):
    """What the loop's noise is documented to be, from torch's generator on the CPU."""
    word = np.random.SeedSequence((0, seed, step, place)).generate_state(1, np.uint64)[0] >> 1
    return th.empty(size).normal_(generator=th.Generator().manual_seed(int(word)))


def weights(trainer):
    return th.cat([p.detach().float().flatten() for p in trainer.mp_trainer.master_params])


def rows(folder):
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


def test_s08_42_a_second_implementation_of_the_loop_agrees(folder):
    """Plain AdamW on the same draws: the file named 4 holds exactly 4 updates."""
    train(folder, 4, weight_decay=0.1)
    net = Net()
    opt = th.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    data = batches()
    for step in range(4):
        rng = np.random.default_rng((0, 0, step))
        rng.integers(2**63)  # of dropout
        x0, _ = next(data)
        t = th.from_numpy(rng.choice(40, size=(8,), p=np.ones(40) / 40))
        noise = th.stack([sample_noise(step, place, 4) for place in range(8)])
        abar = th.from_numpy(DIFFUSION.alphas_cumprod)[t].float()[:, None]
        loss = ((net(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t) - noise) ** 2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    saved = checkpoint.load(folder / "model000004.pt")
    for name, value in net.state_dict().items():
        th.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
    names = sorted(path.name for path in folder.iterdir() if path.name != "progress.csv")
    assert names == ["commit000004.json", "model000004.pt", "opt000004.pt", "state000004.pt"]


@pytest.mark.parametrize("microbatch", [1, 3, 8, -1, 100])
def test_the_microbatch_changes_nothing(folder, microbatch):
    """The original summed the microbatches' gradients: here they are averaged over the batch."""
    whole = weights(train(folder, 3))
    th.testing.assert_close(weights(train(folder, 3, microbatch=microbatch)), whole, rtol=0, atol=2e-6)


def test_gradient_norm_does_not_depend_on_the_microbatch(folder):
    for microbatch in (8, 2):
        train(folder, 1, microbatch=microbatch)
    first, second = (float(row["grad_norm"]) for row in rows(folder))
    assert first == pytest.approx(second, rel=1e-5)


def test_same_seed_same_run_and_another_seed_another(folder):
    first, again, other = (weights(train(folder, 3, seed=seed)) for seed in (0, 0, 1))
    assert th.equal(first, again) and not th.equal(first, other)


# --------------------------------------------------------------------------------------------- rates, limits, averages

def test_constant_rate_for_a_fixed_number_of_steps(folder):
    train(folder, 5)
    assert [float(row["lr"]) for row in rows(folder)] == [1e-2] * 5
    assert [int(row["step"]) for row in rows(folder)] == [1, 2, 3, 4, 5]
    assert [int(row["samples"]) for row in rows(folder)] == [8, 16, 24, 32, 40]


def test_annealing_falls_linearly_to_zero_and_stops(folder):
    train(folder, 0, lr_anneal_steps=4)
    np.testing.assert_allclose([float(row["lr"]) for row in rows(folder)], [1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_s08_41_averages_follow_the_closed_form(folder):
    """With the warm-up the decay is min(rate, (1 + s) / (10 + s)) for the update that follows s others."""
    for warmup in (True, False):
        snapshots = [weights(train(folder, n)) for n in range(1, 5)]
        start = th.cat([p.flatten() for p in Net().parameters()]).detach()
        expected = start
        for s, value in enumerate(snapshots):
            rate = min(0.9, (1 + s) / (10 + s)) if warmup else 0.9
            expected = rate * expected + (1 - rate) * value
        trainer = train(folder, 4, averages=[ema.Rate(0.9, warmup)])
        ours = th.cat([p.detach().flatten() for p in trainer.ema_params[0]])
        th.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_a_decay_of_zero_keeps_a_file_of_its_own(folder):
    train(folder, 2, averages=ema.parse("0,0.5"))
    names = sorted(path.name for path in folder.glob("*.pt"))
    assert names == ["ema_0.0_000002.pt", "ema_0.5_000002.pt", "model000002.pt", "opt000002.pt", "state000002.pt"]
    now, copy = checkpoint.load(folder / "model000002.pt"), checkpoint.load(folder / "ema_0.0_000002.pt")
    assert all(th.equal(now[name], copy[name]) for name in now)


def test_checkpoints_are_written_at_the_interval_and_at_the_end_once(folder):
    train(folder, 6, save_interval=3)
    assert sorted(path.name for path in folder.glob("model*")) == ["model000003.pt", "model000006.pt"]
    train(folder, 5, save_interval=4)
    assert (folder / "model000005.pt").exists() and (folder / "model000004.pt").exists()


def test_gradient_clipping_bounds_the_update(folder):
    class Sgd(th.optim.SGD):
        def __init__(self, params, lr, weight_decay, betas):
            super().__init__(params, lr=lr)

    before = th.cat([p.flatten() for p in Net().parameters()]).detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_util, "make_adamw", Sgd)
        moved = weights(train(folder, 1, grad_clip=0.01, lr=1.0)) - before
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


# -------------------------------------------------------------------------------------------------------------- resume

def test_resumed_training_is_the_uninterrupted_one(folder):
    options = {"averages": [ema.Rate(0.9)], "lr_anneal_steps": 6}
    whole = train(folder, 0, **options)
    data = batches()
    train(folder, 3, data=data, **options)
    resumed = train(folder, 0, data=data, resume_checkpoint=str(folder / "model000003.pt"), **options)
    assert th.equal(weights(whole), weights(resumed))
    assert all(th.equal(a, b) for a, b in zip(whole.ema_params[0], resumed.ema_params[0]))


def test_a_new_rate_takes_effect_on_resume(folder):
    train(folder, 2)
    train(folder, 3, lr=5e-4, resume_checkpoint=str(folder / "model000002.pt"))
    assert float(rows(folder)[-1]["lr"]) == 5e-4 and int(rows(folder)[-1]["step"]) == 3


def test_missing_companions_are_said_and_started_anew(folder, capsys):
    train(folder, 2, averages=[ema.Rate(0.9)])
    (folder / "opt000002.pt").unlink()
    (folder / "ema_0.9_000002.pt").unlink()
    with logger.scoped_configure(dir=str(folder), format_strs=["stdout"]):
        resumed = train(folder, 2, averages=[ema.Rate(0.9)], resume_checkpoint=str(folder / "model000002.pt"))
    said = capsys.readouterr().out
    assert "ema_0.9_000002.pt is missing" in said and "opt000002.pt is missing" in said
    state = checkpoint.load(folder / "model000002.pt")
    assert th.equal(resumed.ema_params[0][0], state["body.0.weight"])


def test_an_optimizer_of_another_network_is_refused(folder):
    train(folder, 1)
    other = th.optim.AdamW([th.zeros(3, requires_grad=True)])
    checkpoint.save(other.state_dict(), folder / "opt000001.pt")
    with pytest.raises(ValueError, match=r"does not fit this network.*opt000001\.pt"):
        train(folder, 2, resume_checkpoint=str(folder / "model000001.pt"))


# ----------------------------------------------------------------------------------------------------------- bad steps

def poisoned(*bad):
    for number, (x, cond) in enumerate(batches()):
        yield (x * math.nan if number in bad else x), cond


def test_s08_40_a_bad_step_is_skipped_and_counted(folder):
    trainer = train(folder, 1, averages=[ema.Rate(0.5)])
    good = train(folder, 2, data=poisoned(1), averages=[ema.Rate(0.5)])
    assert th.equal(weights(good), weights(trainer))
    assert th.equal(good.ema_params[0][0], trainer.ema_params[0][0])
    assert rows(folder)[-1]["skipped_steps"] == "1" and good.step == 2


def test_too_many_bad_steps_in_a_row_stop_the_run(folder):
    with pytest.raises(ArithmeticError, match=r"3 updates in a row, up to update 6.*\(update 4\).*--grad_clip 1"):
        train(folder, 20, data=poisoned(1, 3, 4, 5), max_bad_steps=3, save_interval=2)
    saved = checkpoint.load(folder / "model000004.pt")
    assert all(value.isfinite().all() for value in saved.values())


# ----------------------------------------------------------------------------------------------------------- 16 bits

def unet(**options):
    th.manual_seed(0)
    net = UNetModel(image_size=8, in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1,
                    attention_resolutions=(), channel_mult=(1,), **options)  # fmt: skip
    nn.init.normal_(net.out[2].weight, std=0.05)
    return net


def pictures():
    x = th.rand(4, 1, 8, 8, generator=th.Generator().manual_seed(0)) * 2 - 1
    while True:
        yield x, {}


def test_s08_15_and_39_half_precision_training_saves_float32_and_grows_its_scale(folder):
    options = {"data": pictures(), "batch_size": 4, "averages": [ema.Rate(0.5)]}
    assert Trainer(DiffusionTask(unet(), DIFFUSION), use_fp16=True, **options).mp_trainer.lg_loss_scale == 20
    trainer = train(folder, 3, net=unet(), use_fp16=True, initial_lg_loss_scale=10.0, **options)
    assert trainer.task.net.input_blocks[0][0].weight.dtype == th.float16
    for name in ("model000003.pt", "ema_0.5_000003.pt"):
        assert {value.dtype for value in checkpoint.load(folder / name).values()} == {th.float32}
    assert trainer.mp_trainer.lg_loss_scale == pytest.approx(10 + 3 * 1e-3)
    saved = checkpoint.load(folder / "model000003.pt")
    half = trainer.task.net.state_dict()["input_blocks.0.0.weight"]
    assert th.equal(saved["input_blocks.0.0.weight"].half(), half)
    assert not th.equal(saved["input_blocks.0.0.weight"], half.float())  # the master keeps what half precision lost
    opt16 = checkpoint.load(folder / "opt000003.pt")
    train(folder, 3, net=unet(), **options)
    opt32 = checkpoint.load(folder / "opt000003.pt")
    shapes16, shapes32 = ([v["exp_avg"].shape for v in opt["state"].values()] for opt in (opt16, opt32))
    assert shapes16 == shapes32  # one entry a parameter: optimizer files fit both precisions


def test_half_precision_gradients_are_the_full_ones_to_half_precision():
    """fp16 keeps 11 bits of a number, bf16 8."""
    grads = {}
    for precision in ("fp32", "fp16", "bf16"):
        trainer = Trainer(DiffusionTask(unet(), DIFFUSION), None, batch_size=4, precision=precision,
                          initial_lg_loss_scale=10.0)  # fmt: skip
        assert trainer.mp_trainer.lg_loss_scale == (10 if precision == "fp16" else 0)
        trainer.forward_backward(*next(pictures()))
        scale = 2**trainer.mp_trainer.lg_loss_scale
        grads[precision] = th.cat([p.grad.float().flatten() / scale for p in trainer.mp_trainer.model_params])
    errors = {name: ((grad - grads["fp32"]).norm() / grads["fp32"].norm()).item() for name, grad in grads.items()}
    assert 0 < errors["fp16"] < 5e-3 and 2 * errors["fp16"] < errors["bf16"] < 4e-2


def test_bf16_training_keeps_float32_masters_and_has_no_scale(folder):
    """A number that fp16 cannot hold is one of bf16; updates below its 8 bits are kept by the masters."""
    trainer = train(folder, 3, net=unet(), precision="bf16", data=pictures(), batch_size=4, averages=[ema.Rate(0.5)],
                    lr=1e-5)  # fmt: skip
    body, saved = trainer.task.net.state_dict(), checkpoint.load(folder / "model000003.pt")
    kinds = {name: value.dtype for name, value in body.items()}
    assert kinds["input_blocks.0.0.weight"] == th.bfloat16 and trainer.mp_trainer.lg_loss_scale == 0
    assert {kinds[name] for name in ("out.0.weight", "out.2.weight", "time_embed.0.weight")} == {th.float32}
    assert {value.dtype for value in saved.values()} == {th.float32}
    before = unet().state_dict()["input_blocks.0.0.weight"]
    assert not th.equal(saved["input_blocks.0.0.weight"], before)
    assert th.equal(body["input_blocks.0.0.weight"], saved["input_blocks.0.0.weight"].bfloat16())
    huge = [{"data": ((x * 1e6, cond) for x, cond in pictures()), "precision": each} for each in ("bf16", "fp16")]
    skipped = [train(folder, 1, net=unet(), batch_size=4, **how).mp_trainer.skipped for how in huge]
    assert skipped == [0, 1]


def test_overflow_halves_the_scale_and_skips(folder):
    trainer = train(folder, 1, net=unet(), data=pictures(), batch_size=4, use_fp16=True, initial_lg_loss_scale=60.0)
    assert trainer.mp_trainer.lg_loss_scale == 59 and trainer.mp_trainer.skipped == 1
    th.testing.assert_close(weights(trainer), th.cat([p.detach().flatten() for p in unet().parameters()]))


# ------------------------------------------------------------------------------------------------- classifier and log

def test_top_k_counts():
    logits = th.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 2, 1, 0]])
    y = th.tensor([0, 2, 3])
    assert compute_top_k(logits, y, 1, reduction="none").tolist() == [1, 0, 0]
    assert compute_top_k(logits, y, 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize("noised", [True, False])
def test_s08_38_classifier_training_ignores_importance_weights(folder, noised):
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(th.tensor([0.5, 0.0, 0.0]))
            self.seen = []

        def forward(self, x, t):
            self.seen.append((x, t))
            return self.logits.expand(len(x), 3)

    sampler = create_named_schedule_sampler("loss-second-moment", DIFFUSION)
    sampler._loss_history[:] = np.linspace(1, 50, 40)[:, None]
    sampler._loss_counts[:] = 10
    net = Everything()
    task = ClassifierTask(net, DIFFUSION, sampler, noised=noised)
    train(folder, 1, task=task, val_data=batches(seed=1), eval_interval=1)
    row = rows(folder)[-1]
    x, y = next(batches())
    expected = -th.log_softmax(th.tensor([0.5, 0.0, 0.0]), 0)[y["y"]].mean()
    assert float(row["train_loss"]) == pytest.approx(expected.item(), rel=1e-5)
    assert float(row["train_acc@1"]) == pytest.approx((y["y"] == 0).float().mean().item())
    assert float(row["train_acc@3"]) == 1.0 and "val_loss" in row and "val_acc@1" in row
    if noised:
        assert net.seen[0][1].unique().numel() > 2 and not th.equal(net.seen[0][0], x)
    else:
        assert (net.seen[0][1] == 0).all() and th.equal(net.seen[0][0], x)


def test_s08_49_quartiles_of_the_kept_steps(folder):
    class Fixed(DiffusionTask):
        def draw(self, n, device, rng):
            return th.tensor([0, 9, 10, 20, 29, 30, 39, 39]), th.tensor([1.0, 3, 1, 1, 1, 1, 1, 4])

        def loss(self, net, x0, cond, t, noise):
            return {"loss": t + 0.0 * net(x0, t).sum(1)}

    train(folder, 1, task=Fixed(Net(), DIFFUSION))
    row = {key: float(value) for key, value in rows(folder)[0].items() if key.startswith("loss")}
    expected = {"loss_q0": 27 / 2, "loss_q1": 10, "loss_q2": 49 / 2, "loss_q3": (30 + 39 + 156) / 3}
    assert row == pytest.approx({**expected, "loss": (27 + 10 + 49 + 225) / 8}, rel=1e-5)


def test_train_loop_keeps_the_originals_arguments(folder):
    loop = TrainLoop(
        model=Net(), diffusion=DIFFUSION, data=batches(), batch_size=8, microbatch=-1, lr=1e-3, ema_rate="0.9,0.99",
        log_interval=1, save_interval=2, resume_checkpoint="", use_fp16=False, fp16_scale_growth=1e-3,
        schedule_sampler=None, weight_decay=0.0, lr_anneal_steps=2,
    )  # fmt: skip
    loop.run_loop()
    assert {path.name for path in folder.glob("*.pt")} == {
        "model000002.pt", "opt000002.pt", "ema_0.9_000002.pt", "ema_0.99_000002.pt", "state000002.pt",
    }  # fmt: skip


def test_super_resolution_is_one_more_task_of_the_same_loop(folder):
    """Small images go with the batch as a condition; the microbatch cuts them too."""

    def pairs():
        for x, _ in pictures():
            yield x, {"low_res": nn.functional.avg_pool2d(x, 2)}

    th.manual_seed(0)
    options = {"in_channels": 1, "model_channels": 32, "out_channels": 1, "num_res_blocks": 1, "channel_mult": (1,)}
    net = SuperResModel(image_size=8, attention_resolutions=(), **options)
    nn.init.normal_(net.out[2].weight, std=0.05)
    grads = []
    for microbatch in (4, 1):
        trainer = Trainer(DiffusionTask(net, DIFFUSION), None, batch_size=4, microbatch=microbatch)
        trainer.forward_backward(*next(pairs()))
        grads.append(th.cat([p.grad.flatten() for p in net.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[0].norm()
    train(folder, 2, net=net, data=pairs(), batch_size=4, microbatch=2, val_data=pairs(), eval_interval=1)
    assert {"loss", "val_loss", "x0_shift_c0"} <= set(rows(folder)[-1])


def test_the_loss_aware_sampler_learns_during_training(folder):
    sampler = create_named_schedule_sampler("loss-second-moment", DIFFUSION)
    train(folder, 3, task=DiffusionTask(Net(), DIFFUSION, sampler))
    assert sampler._loss_counts.sum() == 24


def test_the_launch_test_variable_stops_after_the_first_save(folder, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    assert train(folder, 50, save_interval=2).step == 2


def test_the_best_checkpoint_stays_and_is_named(folder, capsys):
    """Validation on data that the first updates fit, and later ones, of another loss, do not."""

    def turning():
        for number, (x, cond) in enumerate(batches()):
            yield (x if number < 4 else 30 * x), cond

    with logger.scoped_configure(dir=str(folder), format_strs=["stdout"]):
        trainer = train(folder, 12, data=turning(), val_data=batches(), eval_interval=1, save_interval=2, lr=0.05,
                        keep_best=True, keep_last=1)  # fmt: skip
    best = trainer.best["step"]
    assert 2 <= best < 12
    assert sorted(path.name for path in folder.glob("model*")) == [f"model{best:06d}.pt", "model000012.pt"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the least validation loss")]
    assert said[-1] == f"the least validation loss so far, {trainer.best['val_loss']:.4g}: model{best:06d}.pt"
    assert checkpoint.load(folder / "state000012.pt")["best"] == trainer.best


@pytest.mark.parametrize("options, message", [
    ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
    ({"log_interval": 0}, "log_interval"),
    ({"save_interval": -3}, "save_interval.*-3"),
    ({"lr_schedule": "steps"}, "lr_schedule 'steps'.*cosine"),
    ({"max_minutes": -1}, "max_minutes.*-1"),
    ({"keep_best": True}, "keep_best needs held-out images: give --val_data_dir"),
])  # fmt: skip
def test_bad_options_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        train(folder, 1, **options)


def test_a_bad_loss_does_not_spoil_the_loss_aware_sampler(folder):
    sampler = create_named_schedule_sampler("loss-second-moment", DIFFUSION)
    sampler._loss_history[:], sampler._loss_counts[:] = 1.0, 10
    train(folder, 4, task=DiffusionTask(Net(), DIFFUSION, sampler), data=poisoned(1))
    assert np.isfinite(sampler.weights()).all() and rows(folder)[-1]["skipped_steps"] == "1"


def test_a_row_of_the_log_averages_the_good_steps_and_the_last_updates_have_one(folder):
    train(folder, 7, data=poisoned(3), log_interval=5)
    assert [row["step"] for row in rows(folder)] == ["1", "5", "7"]
    assert all(math.isfinite(float(row["loss"])) for row in rows(folder))


def test_a_new_weight_decay_takes_effect_on_resume(folder):
    train(folder, 2)
    resumed = train(folder, 3, weight_decay=0.5, resume_checkpoint=str(folder / "model000002.pt"))
    assert resumed.opt.param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize("number", signals.ASKING)
def test_a_signal_saves_what_is_done_and_says_how_to_go_on(folder, number):
    before = signal.getsignal(number)  # a run in the background may have it ignored

    def interrupted():
        for count, batch in enumerate(batches()):
            if count == 3:
                signal.raise_signal(number)
            yield batch

    with pytest.raises(health.Stopped, match=r"update 3.*model000003\.pt: run the same command again") as stopped:
        train(folder, 50, data=interrupted())
    assert stopped.value.reason == health.SIGNALLED and saves.newest(folder) == (str(folder / "model000003.pt"), [])
    assert signal.getsignal(number) is before


def test_the_clock_saves_what_is_done(folder, monkeypatch):
    """A clock of the test's own, on which an hour passes after the first batch."""
    now = [0.0]
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def late():
        for batch in batches():
            yield batch
            now[0] += 3600

    with pytest.raises(health.Stopped, match="update 1,") as stopped:
        train(folder, 50, data=late(), max_minutes=59)
    assert stopped.value.reason == health.TIME_IS_UP and (folder / "commit000001.json").exists()


def test_a_run_without_time_for_one_update_says_so(folder):
    with pytest.raises(health.Stopped, match="stopped before the first update: run the same command again"):
        train(folder, 50, data=batches(), max_minutes=1e-9)
    assert not list(folder.glob("*.pt"))


# ------------------------------------------------------------------------------------------------------- exact resume


class Stop(Exception):
    pass


def killed_after(steps, data):
    for count, batch in enumerate(data):
        if count == steps:
            raise Stop
        yield batch


def contents(folder, step):
    """Every tensor and value of a checkpoint, and the rows of the log but for their times."""
    files = {path.name: checkpoint.load(path) for path in sorted(folder.glob(f"*{step:06d}.pt"))}
    return files, [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, precision):
    """Weights, averages, optimizer, loss scale, history of losses, best loss, and every row of the log."""
    half = precision != "fp32"

    def run(folder, data, resume="", steps=11):
        net = unet() if half else Net()
        sampler = create_named_schedule_sampler("loss-second-moment", DIFFUSION)
        if resume:
            logger.rewind(folder, checkpoint.parse_resume_step_from_filename(resume))
        with logger.scoped_configure(dir=str(folder), format_strs=["csv", "json"]):
            train(
                folder, steps, task=DiffusionTask(net, DIFFUSION, sampler), data=data, microbatch=3,
                averages=ema.parse("0.9", "0.05", "0.1"), val_data=batches_from(1 if half else 0, resume, 2),
                eval_interval=2, keep_best=True, save_interval=3, log_interval=4, precision=precision, lr_warmup=5,
                initial_lg_loss_scale=10.0, resume_checkpoint=resume,
            )  # fmt: skip

    def batches_from(kind, resume, every=1):
        data = pictures() if kind else batches(seed=every)
        for _ in range(checkpoint.parse_resume_step_from_filename(resume) // every if resume else 0):
            next(data)
        return data

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    kind = 1 if half else 0
    run(whole, batches_from(kind, ""))
    with pytest.raises(Stop):
        run(broken, killed_after(8, batches_from(kind, "")))
    found, problems = saves.newest(broken)
    assert found == str(broken / "model000006.pt") and not problems
    run(broken, batches_from(kind, found), found)
    expected, log = contents(whole, 11)
    again, log_again = contents(broken, 11)
    assert len(expected) == 6 and same(expected, again)
    assert log == log_again and [row["step"] for row in log] == ["1", "4", "8", "11"]
    state = expected["state000011.pt"]
    assert state["sampler"]["counts"].sum() == 11 * len(next(batches_from(kind, ""))[0]) and state["best"]["step"]
    lines = [(folder / "progress.json").read_text().count("\n") for folder in (whole, broken)]
    assert lines == [4, 4]


def test_background_saves_hold_the_moment_of_the_save(folder):
    """Later steps change the weights in place; the copy does not see them."""
    train(folder, 6, save_interval=2, averages=[ema.Rate(0.5)])
    early = contents(folder, 2)[0]
    with logger.scoped_configure(dir=str(folder / "other"), format_strs=[]):
        train(folder, 2, background_save=False, averages=[ema.Rate(0.5)])
    assert same(early, contents_of(folder / "other", 2))


def contents_of(folder, step):
    return {path.name: checkpoint.load(path) for path in sorted(folder.glob(f"*{step:06d}.pt"))}


# ------------------------------------------------------------------------------------------- shares of the whole batch


def test_noise_timesteps_and_drops_are_those_of_the_whole_batch_for_any_number_of_processes(monkeypatch, folder):
    """What rank r of R draws is every R-th of what one process draws."""

    def draws(rank, ranks):
        monkeypatch.setattr(dist_util, "world_size", lambda: ranks)
        monkeypatch.setattr(dist_util, "rank", lambda: rank)
        sampler = create_named_schedule_sampler("loss-second-moment", DIFFUSION)
        sampler._loss_history[:], sampler._loss_counts[:] = np.linspace(1, 9, 40)[:, None], 10
        trainer = object.__new__(Trainer)
        trainer.seed, trainer.step, trainer.device = 5, 17, th.device("cpu")
        trainer.task = DiffusionTask(Net(), DIFFUSION, sampler)
        trainer.drop = lambda cond, rng: guidance.dropped(cond, rng, {"y": -1}, 0.5)
        x0, y = th.zeros(8 // ranks, 4), th.arange(8)[rank::ranks]
        _, cond, t, importance, noise = trainer._draws(0, x0, {"y": y})
        return cond["y"], t, importance, noise

    whole = draws(0, 1)
    assert (whole[0] == -1).any() and (whole[0] >= 0).any() and whole[2].unique().numel() > 1
    for ranks in (2, 4, 8):
        for rank in range(ranks):
            assert all(th.equal(mine, of_all[rank::ranks]) for mine, of_all in zip(draws(rank, ranks), whole))


def test_noise_is_standard_normal_and_differs_by_sample_step_and_seed():
    x = noise_like(th.empty(400, 50), (0, 3, 7), range(400))
    assert abs(x.mean().item()) < 4 / 20000**0.5 and abs(x.var().item() - 1) < 4 * (2 / 20000) ** 0.5
    assert th.equal(x[17:18], noise_like(th.empty(1, 50), (0, 3, 7), [17]))
    others = [noise_like(th.empty(1, 50), words, [17]) for words in ((0, 3, 8), (0, 4, 7), (1, 3, 7))]
    assert all(abs((x[17] * other[0]).mean().item()) < 0.6 and not th.equal(x[17], other[0]) for other in others)


# ------------------------------------------------------------------------------------------------------------- health


def test_no_step_waits_for_the_device(folder, monkeypatch):
    """Between two rows of the log no tensor is read on the host, but for the check that nobody wants to stop."""
    read = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):
        original = getattr(th.Tensor, name)
        monkeypatch.setattr(th.Tensor, name, lambda self, *a, f=original, n=name: (read.append(n), f(self, *a))[1])
    trainer = Trainer(DiffusionTask(unet(), DIFFUSION), None, batch_size=4, use_fp16=True, microbatch=2, grad_clip=1.0,
                      averages=ema.parse("0.9", "1", "0.1"), initial_lg_loss_scale=10.0)  # fmt: skip
    data = pictures()
    trainer.run_step(*next(data))  # the optimizer makes its state
    read.clear()
    for _ in range(3):
        trainer.run_step(*next(data))
    assert read == []


def test_the_gradient_noise_scale_is_that_of_gaussian_gradients(folder):
    """Loss x_k . w: the gradient of a sample is x_k ~ N(m, s^2 I), so the scale is dim s^2 / |m|^2."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(th.zeros(500))

        def forward(self, x):
            return x @ self.w

    class Task:
        prefix, num_timesteps, net = "", 1, Linear()

        def draw(self, n, device, rng):
            return th.zeros(n, dtype=th.int64), th.ones(n)

        def loss(self, net, x0, cond, t, noise):
            return {"loss": net(x0)}

    def gaussian():
        generator = th.Generator().manual_seed(0)
        while True:
            yield 0.3 + 0.5 * th.randn(32, 500, generator=generator), {}

    train(folder, 250, task=Task(), data=gaussian(), batch_size=32, microbatch=4, lr=0.0, log_interval=250)
    assert float(rows(folder)[-1]["grad_noise_scale"]) == pytest.approx(0.25 / 0.09, rel=0.04)


def test_the_gradient_noise_scale_in_half_precision_is_that_of_full(folder):
    """With a loss scale at which the norm of a whole gradient passes what 16 bits hold."""
    estimates = []
    for use_fp16, scale in ((False, 0.0), (True, 15.0)):
        trainer = Trainer(DiffusionTask(unet(), DIFFUSION), None, batch_size=4, microbatch=1, use_fp16=use_fp16,
                          initial_lg_loss_scale=scale)  # fmt: skip
        trainer.forward_backward(*next(pictures()))
        assert trainer._gradient_norm() * 2**scale > 65504 or not use_fp16
        estimates.append(trainer.tally.means())
    for name in ("grad_trace", "grad_square"):
        assert estimates[1][name] == pytest.approx(estimates[0][name], rel=0.02)


def test_the_colour_shift_is_that_of_the_predictions(folder):
    """A network whose x_0 is always 0.5 in one channel and -1 in the other, on data of mean 0.25 and -1."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(th.tensor([0.5, -1.0]))

        def forward(self, x, t):
            return self.value[None, :, None, None].expand_as(x)

    process = GaussianDiffusion(betas=get_named_beta_schedule("linear", 40), model_mean_type=ModelMeanType.START_X,
                                model_var_type=ModelVarType.FIXED_LARGE, loss_type=LossType.MSE)  # fmt: skip
    data = iter([(th.tensor([0.25, -1.0])[None, :, None, None].expand(8, 2, 4, 4), {})] * 2)
    train(folder, 1, task=DiffusionTask(Constant(), process), data=data, lr=0.0)
    (row,) = rows(folder)
    assert [float(row[f"x0_shift_c{c}"]) for c in (0, 1)] == pytest.approx([0.25, 0.0], abs=1e-6)


def test_the_first_layer_that_is_not_finite_is_named(folder):
    net = Net()
    with th.no_grad():
        net.body[2].weight[0, 0] = math.inf
    with pytest.raises(ArithmeticError, match=r"first not finite: the weight body\.2\.weight"):
        train(folder, 9, net=net, max_bad_steps=2)
    with pytest.raises(ArithmeticError, match="first not finite: the data"):
        train(folder, 9, data=poisoned(*range(9)), max_bad_steps=2)

    class Overflow(Net):
        def forward(self, x, t, y=None):
            h = self.body[1](self.body[0](th.cat([x, t[:, None].float() / 40], 1)) * 1e30 * 1e30)
            return self.body[2](h)

    with pytest.raises(ArithmeticError, match=r"the output of body\.1 \(SiLU\)"):
        train(folder, 9, net=Overflow(), max_bad_steps=2)


def test_rates_follow_their_schedules(folder):
    def rates(**options):
        (folder / "progress.csv").unlink(missing_ok=True)
        with logger.scoped_configure(dir=str(folder), format_strs=["csv"]):
            train(folder, 0, **options)
        return [float(row["lr"]) for row in rows(folder)]

    cosine = [1e-2 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    np.testing.assert_allclose(rates(lr_anneal_steps=4, lr_schedule="cosine"), cosine)
    np.testing.assert_allclose(rates(lr_anneal_steps=3, lr_schedule="constant"), [1e-2] * 3)
    warm = [1e-2 * (1 - k / 5) * min(1, (k + 1) / 3) for k in range(5)]
    np.testing.assert_allclose(rates(lr_anneal_steps=5, lr_warmup=3), warm)
