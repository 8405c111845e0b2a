"""The curve of guidance: equal cost, the probe of a classifier, and the page."""

import contextlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch as th
from test_scores import networks  # noqa: F401  (a fixture)

from evaluations import cases, intervals
from guided_diffusion import checkpoint, probe, script_util, study
from guided_diffusion.script_util import create_gaussian_diffusion

ROOT = Path(__file__).parent.parent


def program():
    spec = importlib.util.spec_from_file_location("guidance_curve", ROOT / "scripts" / "guidance_curve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------------------------------- probe


def test_the_signal_to_noise_ratio_of_gradients_of_which_it_is_known():
    signal = th.tensor([3.0, 0.0, 4.0]).expand(2, 5, 3)
    assert probe.gradient_snr(signal) == math.inf
    noise = th.tensor([1.0, -1.0])[:, None, None] * th.tensor([0.0, 1.0, 0.0])    # two noises, opposite
    # |mean|^2 is 25, the spread E|g - E g|^2 is 2, by two noises: (25 - 2 / 2) / 2.
    assert probe.gradient_snr(signal + noise) == 12
    generator = th.Generator().manual_seed(0)
    draws = 2 * th.randn(4, 20000, 8, generator=generator)   # no signal: 0 on average, whatever the number of noises
    assert abs(probe.gradient_snr(draws)) < 0.005
    assert abs(probe.gradient_snr(draws + 3) - 9 / 4) < 0.02
    with pytest.raises(ValueError, match="two noises of an image or more, not 1"):
        probe.gradient_snr(signal[:1])


def test_the_best_classifier_of_two_points_has_the_known_accuracy():
    """Data at +1 and -1 in D equal pixels: the best classifier's accuracy at noise sigma is Phi(sqrt(D) / sigma)."""
    diffusion = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    labels = th.arange(4000) % 2
    images = (2.0 * labels - 1).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    def classifier(x, t):
        alpha = th.from_numpy(diffusion.alphas_cumprod)[t].float()
        s = (2 * alpha.sqrt() / (1 - alpha)) * x.flatten(1).sum(1)            # log p(x|1) - log p(x|0)
        return th.stack([th.zeros_like(s), s], 1)

    found = list(probe.levels(diffusion, classifier, images, labels, [300, 700, 900]))
    for each in found:
        assert each.images == 4000
        assert math.isclose(each.sigma, (1 / diffusion.alphas_cumprod[each.t] - 1) ** 0.5)
        expected = 0.5 * math.erfc(-2 / each.sigma / 2**0.5)
        low, high = intervals.share(each.accuracy, each.images)
        assert low < expected < high
    # Where the classifier is sure its gradient vanishes alike everywhere, but for rare noises: least certain there.
    assert all(0 < each.snr < math.inf for each in found)
    will, said = probe.verdict(found, [0.9, 0.9, 0.2], 2)
    assert not will and said.startswith("no: at 0 of 3 noise levels")   # 2 classes: twice by chance is always
    will, said = probe.verdict(found, [0.9, 0.3, 0.1], 10)
    assert will and said.startswith("yes: at 2 of 3 noise levels") and f"up to noise {found[1].sigma:.3g}" in said


def test_a_classifier_that_knows_nothing_will_not_guide():
    diffusion = create_gaussian_diffusion(steps=100)
    found = list(probe.levels(diffusion, lambda x, t: x.new_zeros(len(x), 10) + 0 * x.mean(), th.zeros(50, 1, 2, 2),
                              th.arange(50) % 10, [0, 50, 99]))  # fmt: skip
    assert [each.accuracy for each in found] == [0.1] * 3
    lowest = [intervals.share(each.accuracy, each.images)[0] for each in found]
    assert probe.verdict(found, lowest, 10)[0] is False


def test_the_interval_of_a_share():
    assert [round(end, 4) for end in intervals.share(0.5, 10)] == [0.2366, 0.7634]  # Wilson 1927
    low, high = intervals.share(0.0, 10)
    assert abs(low) < 1e-12 and round(high, 4) == 0.2775


# -------------------------------------------------------------------------------------------------------------- curve


@pytest.fixture(scope="module")
def trained(networks, tmp_path_factory):  # noqa: F811
    """networks, with a model of classes beside them that can do without, and real images."""
    folder = tmp_path_factory.mktemp("curve")
    flags = checkpoint.read_config(str(networks / "model/model000002.pt"))["flags"]
    th.manual_seed(1)
    flags = flags | {"class_cond": True, "num_classes": 10, "class_dropout": 0.1}
    net, _ = script_util.create_model_and_diffusion(**flags)
    for parameter in net.parameters():
        parameter.data.add_(0.02 * th.randn_like(parameter))
    checkpoint.save(net.state_dict(), str(folder / "model000002.pt"))
    checkpoint.write_config(str(folder), "diffusion", flags)
    images = np.random.RandomState(0).randint(0, 256, (30, 8, 8, 1)).astype(np.uint8)
    np.savez(folder / "real.npz", arr_0=images, arr_1=np.arange(30) % 10)
    return folder, networks


def words_of(trained, out):
    folder, others = trained
    judge, model = others / "judge/model000002.pt", folder / "model000002.pt"
    given = {"model_path": model, "uncond_path": others / "model/model000002.pt", "classifier_path": judge,
             "guide_path": model, "reference": folder / "real.npz", "walks": "ddim:6", "scales": "0,2",
             "free_scales": "1,2", "num_samples": 10, "extractor": judge, "levels": 2, "level_images": 20,
             "device": "cpu", "out": out}  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_every_kind_costs_the_same_and_is_scored(trained, tmp_path, monkeypatch, capsys):
    curve = program()
    monkeypatch.setattr(sys, "argv", ["guidance_curve", *words_of(trained, tmp_path)])
    ran = []

    def run(work, script, *words):
        ran.append([script, *map(str, words)])
        forked.run(work, script, *words, output=tmp_path / "said.txt")

    monkeypatch.setattr(study.Study, "run", run)
    curve.main()
    said = capsys.readouterr().out
    assert "will this classifier guide? no: at 0 of 2 noise levels" in said and "case 8 of 8" in said
    found = {}
    for path in tmp_path.glob("cases/*/scores.json"):
        settings = json.loads(path.read_text())["settings"]
        found[settings["kind"], settings["scale"]] = settings
    model, classifier = trained[0] / "model000002.pt", trained[1] / "judge/model000002.pt"
    look = curve.look_operations(checkpoint.read_config(str(model))["flags"]) / 1e9
    gradient = curve.gradient_operations(str(classifier)) / 1e9
    steps = round(6 * look / (look + gradient))
    assert 1 < steps < 6
    for whose in ("unconditional", "conditional"):
        for scale, cost in ((0.0, look), (2.0, look + gradient)):
            settings = found[f"classifier, {whose}", scale]
            assert (settings["steps"], settings["evaluations"]) == (steps, steps)
            assert math.isclose(settings["gflop"], steps * cost, rel_tol=0.01)  # labels add one embedding
    for kind in ("classifier-free", "autoguidance"):
        plain, guided = found[kind, 1.0], found[kind, 2.0]
        assert (plain["steps"], plain["evaluations"], guided["evaluations"]) == (3, 3, 6)
        assert math.isclose(found[kind, 2.0]["gflop"], 6 * look)
    assert len(ran) == len(found) == 8 and sum("--guide_path" in words for words in ran) == 1
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 1 + 7 + 3 and "Precision against recall" in page
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("kind,sampler,steps,scale") and len(lines) == 1 + 8 * 7
    curve.main()  # nothing is drawn again
    assert len(ran) == 8 and (tmp_path / "report.html").read_text() == page


@pytest.mark.parametrize("change, said", [
    (["--walks", "ddmp:3"], "unknown sampler 'ddmp' in --walks; did you mean ddpm"),
    (["--walks", "ddim"], "--walks 'ddim': give the steps after the sampler, as ddim:25"),
    (["--reference", ""], "--reference is missing"),
    (["--classifier_path", ""], "--uncond_path is guided by a classifier"),
    (["--uncond_path", "", "--classifier_path", "", "--model_path", "", "--guide_path", ""], "nothing guides: give"),
    (["--model_path", ""], "--guide_path is the worse of two models"),
    (["--num_samples", "3"], "--num_samples must be 6 or more, not 3"),
    (["--guide_path", "none.pt"], "--guide_path none.pt: no such file"),
])
def test_bad_curves_are_refused_before_anything_is_drawn(trained, tmp_path, monkeypatch, change, said):
    monkeypatch.setattr(sys, "argv", ["guidance_curve", *words_of(trained, tmp_path / "out"), *change])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        program().main()
    assert said in str(error.value) and not (tmp_path / "out").exists()


def test_models_in_each_others_place_are_named(trained, tmp_path, monkeypatch):
    folder = trained[0]
    swapped = ["--uncond_path", str(folder / "model000002.pt")]
    monkeypatch.setattr(sys, "argv", ["guidance_curve", *words_of(trained, tmp_path / "out"), *swapped])
    with pytest.raises(ValueError, match="was trained with --class_cond True: give it as the other"):
        program().main()


def test_a_changed_extractor_scores_anew(tmp_path, monkeypatch):
    """The file of the extractor counts, not its name alone."""
    judge, looked = tmp_path / "judge.pt", []
    for path in (judge, tmp_path / "real.npz", tmp_path / "samples.npz"):
        path.write_bytes(b"1")
    monkeypatch.setattr(cases, "evaluate", lambda *args, **more: looked.append(args) or {"fid": 1.0})
    asked = SimpleNamespace(reference=str(tmp_path / "real.npz"), extractor=str(judge), weights="", batch_size=1,
                            out=tmp_path)  # fmt: skip
    for content, times in ((b"1", 1), (b"1", 1), (b"other", 2), (b"other", 2)):
        if judge.read_bytes() != content:
            judge.write_bytes(content)
        path = cases.score(asked, tmp_path / "samples.npz", {"scale": 1}, lambda: None)
        assert len(looked) == times and json.loads(path.read_text())["fid"] == 1


def test_samples_broken_off_go_on_unless_the_checkpoint_has_changed(tmp_path):
    """The program that draws would refuse to go on with those of another checkpoint."""
    model, case, seen = tmp_path / "model.pt", tmp_path / "case", []
    model.write_bytes(b"1")

    def run(*words):
        seen.append((case / "samples_1x1x1x1.partial").exists())
        if len(seen) < 4:
            (case / "samples_1x1x1x1.partial").mkdir(exist_ok=True)
            raise ValueError("killed")
        (case / "samples_1x1x1x1.npz").touch()

    for content in (b"1", b"1", b"other", b"other"):
        if model.read_bytes() != content:
            model.write_bytes(content)
        with contextlib.suppress(ValueError):
            cases.draw(run, ["draw.py"], [model], case)
    assert seen == [False, True, False, True]
    cases.draw(run, ["draw.py"], [model], case)
    assert len(seen) == 4
