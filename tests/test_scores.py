"""Comparison of results, scores of each class, memorisation, pages, kept features, and the sweep."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from test_intervals import World, softened

from evaluations import (
    collect,
    compare,
    errors,
    evaluator,
    gallery,
    influence,
    intervals,
    memorisation,
    pages,
    report,
    sources,
    tables,
)
from evaluations.features import Features
from evaluations.per_class import per_class
from guided_diffusion import checkpoint, script_util

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


class Pixels:
    """An extractor of exact answers: the first eight pixels and the share of three of them."""

    dim = 8

    def __init__(self, name="pixels"):
        self.name, self.seen = name, 0

    def __call__(self, images):
        self.seen += len(images)
        pool = images.reshape(len(images), -1)[:, :8].astype(np.float32)
        return Features(pool, np.exp(pool[:, :3] / 99) / np.exp(pool[:, :3] / 99).sum(1, keepdims=True))


def noise(seed, n):
    return np.random.RandomState(seed).randint(0, 256, (n, 4, 4, 1)).astype(np.uint8)


@pytest.fixture
def results(tmp_path):
    """(reference.npz, a.json, b.json, c.json): b of a's images, a little brighter; c of others."""
    np.savez(tmp_path / "reference.npz", noise(0, 90), np.arange(90) % 3)
    images = {"a": noise(1, 80) // 2, "b": noise(1, 80) // 2 + 2, "c": noise(2, 70) // 2 + 60}
    for name, each in images.items():
        np.savez(tmp_path / f"{name}.npz", each, np.arange(len(each)) % 3)
        parts = {}
        result = evaluator.evaluate(tmp_path / "reference.npz", tmp_path / f"{name}.npz", Pixels(), parts=parts)
        result["protocol"] |= {"weights": "abc", "images": {"sample": 80}, "versions": {"torch": "2.13"}}
        (tmp_path / f"{name}.json").write_text(errors.to_json(result))
        errors.save(tmp_path / f"{name}.parts.npz", parts)
    return [str(tmp_path / name) for name in ("reference.npz", "a.json", "b.json", "c.json")]


# ----------------------------------------------------------------------------------------------------- comparison


def test_compare_pairs_the_images_and_names_the_better(results, tmp_path, capsys):
    _, a, b, c = results
    assert compare.main([a, b, "--out", str(tmp_path / "d.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    told = json.loads((tmp_path / "d.json").read_text())["scores"]
    parts = [errors.load(Path(path).with_suffix(".parts.npz")) for path in (a, b)]
    assert {"density", "coverage"} == told.keys() - parts[0].keys()  # of which no error is known
    assert told["density"]["standard_error"] is None and told["density"]["better"] is None
    for name, each in ((name, told[name]) for name in parts[0]):
        expected = intervals.difference(parts[0][name], parts[1][name])
        assert each["paired"] and each["difference"] == pytest.approx(expected.value, abs=1e-12)
        assert each["interval"] == pytest.approx(expected.interval, abs=1e-12)
    fid = told["fid"]
    apart = math.hypot(*(intervals.standard_error(each["fid"]) for each in parts))
    assert fid["standard_error"] < apart / 3 and fid["difference"] > 0 and fid["better"] == "second"
    row = next(line for line in printed if line.startswith("fid"))
    assert row.split("  ")[-1].strip() == "b" and "±" in row
    assert compare.main([a, c]) == 0
    printed = capsys.readouterr().out
    assert "* not image by image" in printed and "recall *" in printed
    Path(b).with_suffix(".parts.npz").unlink()
    assert compare.main([a, b]) == 0
    alone = compare.compare(*map(compare.read, (a, b)))["scores"]["fid"]
    assert not alone["paired"] and alone["standard_error"] == pytest.approx(apart, rel=1e-12)
    assert alone["difference"] == pytest.approx(fid["difference"], rel=1e-9)
    same = compare.compare(*map(compare.read, (a, a)), parts[0], parts[0])["scores"]["fid"]
    assert same["difference"] == 0 and same["better"] is None and same["standard_error"] == 0


@pytest.mark.parametrize("change, said", [
    ({"weights": "xyz"}, "weights abc and xyz"),
    ({"images": {"sample": 99}}, "images.sample 80 and 99"),
    ({"k": 5, "resize": "other"}, "k 3 and 5; resize unknown and other"),
])
def test_compare_refuses_unlike_protocols_and_says_what_differs(results, capsys, change, said):
    _, a, b, _ = results
    result = compare.read(b)
    result["protocol"] |= change
    Path(b).write_text(json.dumps(result))
    assert compare.main([a, b]) == 2
    assert said in capsys.readouterr().err
    assert compare.main([a, b, "--anyway"]) == 0
    assert f"warning: unlike protocols: {said}" in capsys.readouterr().out


def test_compare_tells_of_versions_and_of_another_network(results, capsys):
    _, a, b, _ = results
    result = compare.read(b)
    result["protocol"]["versions"] = {"torch": "2.6"}
    Path(b).write_text(json.dumps(result))
    assert compare.main([a, b]) == 0
    assert "made with other versions.torch 2.13 and 2.6" in capsys.readouterr().out
    result["protocol"]["extractor"]["name"] = "other.pt"
    Path(b).write_text(json.dumps(result))
    assert compare.main([a, b]) == 2
    assert "extractor.name pixels and other.pt" in capsys.readouterr().err


@pytest.mark.parametrize("content, said", [(None, "no such file"), ("{", "is not json"), ("[1]", "holds no scores"),
                                           ("{}", "holds no scores")])  # fmt: skip
def test_compare_refuses_other_files_in_one_line(results, tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    assert compare.main([results[1], str(tmp_path / "bad.json")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("error: ")


def test_names_are_as_short_as_tells_results_apart():
    assert tables.names(["x/a.json", "x/b.json"]) == ["a", "b"]
    assert tables.names(["x/scores.json", "y/scores.json"]) == ["x", "y"]
    assert tables.names(["x/z/scores.json", "y/z/scores.json"]) == ["x/z/scores.json", "y/z/scores.json"]


# ------------------------------------------------------------------------------------------- each class by itself


def test_scores_of_each_class_are_those_of_its_images():
    rng, world = np.random.RandomState(0), World(4)
    y, x = (Features(world.draw(n, rng, s), softened(rng.standard_normal((n, 3)))) for n, s in ((60, 0), (50, 0.3)))
    of_y, of_x = np.arange(60) % 3, np.array([0] * 20 + [1] * 27 + [5] * 3)
    told = per_class(y, x, of_y, of_x)
    assert list(told) == [0, 1, 5] and [each["images"] for each in told.values()] == [20, 27, 3]
    ones = influence.frechet(y.pool[of_y == 1], x.pool[of_x == 1])
    assert told[1]["fid"]["value"] == pytest.approx(ones.value) and told[1]["fid"]["bias"] == pytest.approx(ones.bias)
    assert told[1]["fid"]["interval"] == pytest.approx(intervals.interval(ones))
    right = (x.probabilities[of_x == 0].argmax(1) == 0).mean()
    assert told[0]["label_agreement"]["value"] == right and told[5]["label_agreement"]["value"] == 0
    assert "fid" not in told[5] and "precision" not in told[5] and {"kid", "precision", "recall"} <= told[0].keys()
    assert "label_agreement" not in per_class(y, x, of_y, of_x, agreement=False)[0]
    with pytest.raises(ValueError, match=r"the sample has no labels \(arr_1\)"):
        per_class(y, x, of_y, None)
    with pytest.raises(ValueError, match=r"labels of the reference are int64 of shape \[59\]: expected 60"):
        per_class(y, x, of_y[1:], of_x)


def test_the_program_scores_each_class_and_asks_for_labels_first(results, tmp_path, monkeypatch, capsys):
    reference, look = results[0], Pixels()
    monkeypatch.setattr(evaluator, "make_extractor", lambda *args, **options: look)
    sample, out = str(tmp_path / "a.npz"), str(tmp_path / "classes.json")
    assert evaluator.main([reference, sample, "--per_class", "--no_errors", "--out", out]) == 0
    result = json.loads(Path(out).read_text())
    assert list(result["per_class"]) == ["0", "1", "2"] and result["per_class"]["0"]["images"] == 27
    assert "standard_errors" not in result and not errors.parts_path(out).exists()
    look.seen = 0
    np.savez(tmp_path / "unlabelled.npz", noise(1, 80))
    assert evaluator.main([reference, str(tmp_path / "unlabelled.npz"), "--per_class"]) == 2
    assert "unlabelled.npz has no labels (arr_1)" in capsys.readouterr().err and look.seen == 0


# --------------------------------------------------------------------------------------------------- memorisation


def test_copies_and_repetitions_that_were_planted_are_found():
    rng = np.random.RandomState(0)
    training, held_out = rng.standard_normal((300, 6)), rng.standard_normal((200, 6))
    sample = rng.standard_normal((200, 6))
    sample[7], sample[11] = training[42], training[43] + 1e-4  # a copy, and nearly one
    sample[20], sample[21] = sample[22] + 1e-5, sample[23]
    found = memorisation.neighbours(training, sample)
    assert found.closest(2).tolist() == [7, 11] and found.ratios[7] == 0 and 0 < found.ratios[11] < 1e-2
    assert found.owners[7, 0] == 42 and found.owners[11, 0] == 43
    d = np.sqrt(np.square(sample[50] - training).sum(1))
    own = np.sort(np.sqrt(np.square(training[d.argmin()] - training).sum(1)))[1]
    assert found.ratios[50] == pytest.approx(d.min() / own, rel=1e-9)
    np.testing.assert_allclose(found.distances[50], np.sort(d)[:3], rtol=1e-9)
    close, pairs = memorisation.repetitions(training, sample)
    assert pairs[:2] == [(21, 23), (20, 22)] and close[[20, 21, 22, 23]].all() and close.mean() < 0.06
    told = memorisation.summary(training, sample, held_out=held_out)
    assert told["closest"][0] == {"sample": 7, "training": found.owners[7].tolist(), "ratio": 0.0}
    share, real = told["copies"], told["copies_held_out"]
    assert share["share"] == (found.ratios < 1).mean() and real["interval"][0] < share["share"] - 0.01
    assert errors.to_json(told)
    assert memorisation.neighbours(np.repeat(training[:5], 2, axis=0), sample[:3]).ratios.min() == np.inf
    with pytest.raises(ValueError, match="1 training images"):
        memorisation.neighbours(training[:1], sample)


def test_pixels_that_repeat():
    images = noise(3, 8)
    images[5], images[2] = images[1], images[1]
    digests = sources.digests(images)
    assert memorisation.repeated_pixels(digests) == [[1, 2, 5]]
    assert memorisation.repeated_pixels(sources.digests(noise(3, 8))) == []
    assert memorisation.repeated_pixels(digests, digests[[3, 1, 3]]) == [(1, 1), (2, 1), (3, 0), (5, 1)]


def test_the_memorisation_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "make_extractor", lambda *args, **options: Pixels())
    samples = noise(6, 20)
    samples[4] = noise(5, 40)[13]
    np.savez(tmp_path / "training.npz", noise(5, 40))
    np.savez(tmp_path / "samples.npz", samples)
    files = [str(tmp_path / f"{name}.npz") for name in ("training", "samples")]
    assert memorisation.main([*files, "--held_out", files[0], "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "samples with the pixels of a training image: 1\n" in said and "held-out real images closer" in said
    assert ": 1 ± 0" in said  # all of the training images themselves
    told = json.loads((tmp_path / "out/memorisation.json").read_text())
    assert told["copied_pixels"] == [[4, 13]] and told["closest"][0]["sample"] == 4
    assert (tmp_path / "out/pictures/closest.png").read_bytes().startswith(PNG)
    assert "data:image/png" in (tmp_path / "out/report.html").read_text()
    assert memorisation.main([files[0], "none.npz", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: none.npz: no such file")


# ---------------------------------------------------------------------------------------------------------- pages


def test_pages_in_markdown_and_html():
    picture = gallery.grid(noise(0, 4), 2)
    blocks = [pages.Heading("A & B", 1), pages.Text("x < y"), pages.Lines(["FID: 1", "  <b>"]),
              pages.Table(["", "±"], [["a|b", "1 ± 2"]]), pages.Picture("four", "Four images", picture)]  # fmt: skip
    markdown = pages.to_markdown(blocks)
    assert markdown.startswith("# A & B\n\nx < y\n\n```\nFID: 1\n  <b>\n```\n\n|  | ± |\n| --- | --- |\n| a&#124;b")
    assert "![Four images](pictures/four.png)" in markdown
    page = pages.to_html(blocks)
    assert "<title>A &amp; B</title>" in page and "<p>x &lt; y</p>" in page and "<pre>FID: 1\n  &lt;b&gt;</pre>" in page
    assert "<tr><td>a|b</td><td>1 ± 2</td></tr>" in page
    assert "http" not in page and "src=\"data:image/png;base64,iVBOR" in page  # self-contained


def test_the_report_begins_with_the_five_lines_and_shows_the_samples_that_hurt(results, tmp_path, capsys):
    _, a, b, _ = results
    result = compare.read(a) | {"per_class": {"0": {"images": 27, "reference_images": 30, "fid": {
        "value": 3.14159, "standard_error": 0.2, "interval": [2.0, 4.0], "bias": 0.1}}}}  # fmt: skip
    Path(a).write_text(json.dumps(result))
    assert report.main([a, "--out", str(tmp_path / "one")]) == 0
    text = (tmp_path / "one/report.md").read_text()
    lines = re.search(r"```\n(.*?)```", text, re.DOTALL)[1].splitlines()
    assert lines[1] == f"FID: {result['fid']}" and [line.split(":")[0] for line in lines] == [
        "Inception Score", "FID", "Precision", "Recall", "Density", "Coverage", "KID", "Label agreement"]  # fmt: skip
    assert text.index("```") < text.index("|") and "| 0 | 27 | 3.14 ± 0.20 |" in text and "| weights | abc |" in text
    fid = errors.load(errors.parts_path(a))["fid"]
    worst = int(fid.sample.argmax())
    assert f"| {worst} | {fid.sample[worst]:+.3g} |" in text
    assert report.most_harmful(fid, 3) == np.argsort(-fid.sample)[:3].tolist()
    low, high = result["intervals"]["fid"]
    error = result["standard_errors"]["fid"]
    row = next(line for line in text.splitlines() if line.startswith("| FID |"))
    assert intervals.shown(result["fid"], error) in row and intervals.shown_interval(low, high, error) in row
    for name in ("00_samples", "00_harmful"):
        assert (tmp_path / f"one/pictures/{name}.png").read_bytes().startswith(PNG)
    assert (tmp_path / "one/report.html").read_text().count("data:image/png") == 2
    (tmp_path / "a.npz").unlink()
    assert report.main([a, b, "--out", str(tmp_path / "two")]) == 0
    text = (tmp_path / "two/report.md").read_text()
    assert "## Overview" in text and f"No pictures: {tmp_path}/a.npz is not there any more." in text
    capsys.readouterr()
    assert report.main(["none.json", "--out", str(tmp_path / "two")]) == 2
    assert "none.json: no such file" in capsys.readouterr().err


def swept(sampler, steps, scale, fid, precision, recall, evaluations):
    return {"settings": {"sampler": sampler, "steps": steps, "scale": scale, "ema": "0.99", "evaluations": evaluations},
            "fid": fid, "precision": precision, "recall": recall,
            "standard_errors": {"fid": 0.1, "precision": 0.01, "recall": None}}  # fmt: skip


def test_the_curves_of_a_sweep():
    ran = [swept("ddim", 10, 3.0, 7.0, 0.9, 0.3, 10), swept("ddpm", 10, 0.0, 5.0, 0.6, 0.5, 10),
           swept("ddpm", 20, 0.0, 4.0, 0.7, 0.5, 20), swept("ddpm", 10, 3.0, 6.0, 0.8, 0.4, 10),
           swept("ddpm", 20, 3.0, 5.5, 0.8, 0.4, 20), swept("ddim", 10, 0.0, 8.0, 0.5, 0.6, 10)]  # fmt: skip
    found = {name: lines for name, _, lines, _ in report.curves(ran)}
    assert found["fid_scale"] == {
        "ddim, 10 steps": ([0.0, 3.0], [8.0, 7.0], [0.1, 0.1]),
        "ddpm, 10 steps": ([0.0, 3.0], [5.0, 6.0], [0.1, 0.1]),
        "ddpm, 20 steps": ([0.0, 3.0], [4.0, 5.5], [0.1, 0.1]),
    }
    assert found["precision_recall"]["ddim, 10 steps"] == ([0.6, 0.3], [0.5, 0.9], [0, 0], [0.01, 0.01])
    assert found["fid_evaluations"] == {"ddpm, scale 0": ([10, 20], [5.0, 4.0], [0.1, 0.1]),
                                        "ddpm, scale 3": ([10, 20], [6.0, 5.5], [0.1, 0.1])}  # fmt: skip
    for lines in found.values():
        assert gallery.curves(lines, "x", "y", "title").startswith(PNG)
    assert report.curves(ran[:1]) == []


# ---------------------------------------------------------------------------------------------------------- sweep


def sweep_program():
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "scripts" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """(a diffusion model of 8x8 digits with an average beside it, a classifier), untrained."""
    folder = tmp_path_factory.mktemp("networks")
    th.manual_seed(0)
    flags = script_util.model_and_diffusion_defaults() | {
        "image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "4",
        "num_head_channels": 32, "noise_schedule": "cosine"}  # fmt: skip
    names = [("model", "diffusion", "model000002.pt"), ("model", "diffusion", "ema_0.9_000002.pt"),
             ("judge", "classifier", "model000002.pt")]  # fmt: skip
    for name, kind, file in names:
        if kind == "classifier":
            flags = script_util.classifier_defaults() | {
                "image_size": 8, "image_channels": 1, "num_classes": 10, "classifier_width": 32, "classifier_depth": 1,
                "classifier_attention_resolutions": "4", "classifier_num_head_channels": 32}  # fmt: skip
        network = (script_util.create_classifier(**flags) if kind == "classifier"
                   else script_util.create_model_and_diffusion(**flags)[0])  # fmt: skip
        (folder / name).mkdir(exist_ok=True)
        with th.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * th.randn_like(parameter))
        checkpoint.save(network.state_dict(), str(folder / name / file))
        if name != "model" or file.startswith("model"):
            checkpoint.write_config(str(folder / name), kind, flags | {"noise_schedule": "cosine"})
    return folder


def test_a_sweep_goes_on_where_it_was_broken_off(networks, tmp_path, monkeypatch, capsys):
    sweep = sweep_program()
    reference, out = tmp_path / "reference.npz", tmp_path / "out"
    np.savez(reference, np.random.RandomState(0).randint(0, 256, (30, 8, 8, 1)).astype(np.uint8))
    words = ["sweep", "--model_path", networks / "model/model000002.pt", "--emas", "0.9,model", "--samplers", "heun",
             "--steps", "2", "--scales", "1", "--num_samples", "12", "--reference", reference, "--extractor",
             networks / "judge/model000002.pt", "--out", out, "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    ran, looked, real_look = [], [], collect.Collector._look

    def drawn(work, *given):  # what the sampling programs write; tests/test_docs.py has them do it
        ran.append(given)
        images = np.random.RandomState(len(str(given[2]))).randint(0, 256, (12, 8, 8, 1)).astype(np.uint8)
        np.savez(given[given.index("--log_dir") + 1] / "samples_12x8x8x1.npz", images)

    monkeypatch.setattr(sweep.study.Study, "run", drawn)
    monkeypatch.setattr(collect.Collector, "_look", lambda self, x: (looked.append(x), real_look(self, x))[1])
    sweep.main()
    assert len(ran) == 2 and len(looked) == 3  # the reference once
    assert ran[0][:7] == ("scripts/image_sample.py", "--model_path", str(networks / "model/ema_0.9_000002.pt"),
                          "--guidance_scale", "1", "--sampler", "heun")  # fmt: skip
    cases = sorted(path.name for path in (out / "cases").iterdir())
    assert cases == ["heun_2_1_0.9", "heun_2_1_model"]
    text = (out / "report.html").read_text()
    assert "Overview" in text and text.count("data:image/png") == 4
    scores = {name: out / "cases" / name / "scores.json" for name in cases}
    first = json.loads(scores[cases[0]].read_text())
    assert first["settings"] == {"sampler": "heun", "steps": 2, "scale": 1.0, "ema": "0.9", "evaluations": 3}
    assert first["standard_errors"]["fid"] > 0 and errors.load(errors.parts_path(scores[cases[0]]))["fid"].bias > 0
    # Broken off while the second case was being drawn: what is done stays, what is not is done.
    kept = scores[cases[0]].stat().st_mtime_ns
    (out / "cases" / cases[1] / "drawn.json").unlink()
    scores[cases[1]].unlink()
    sweep.main()
    assert len(ran) == 3 and len(looked) == 3 and scores[cases[0]].stat().st_mtime_ns == kept  # equal pixels: no look
    again = json.loads(scores[cases[1]].read_text())
    assert again["sample"]["images"] == 12
    np.savez(reference, np.random.RandomState(1).randint(0, 256, (30, 8, 8, 1)).astype(np.uint8))
    sweep.main()  # another reference: scored again, not drawn
    assert len(ran) == 3 and len(looked) == 4
    assert json.loads(scores[cases[1]].read_text())["fid"] != again["fid"]


@pytest.mark.parametrize("words, said", [
    ("--samplers dpm", "unknown sampler 'dpm' in --samplers"),
    ("--steps 2.5", "--steps '2.5': give whole numbers"),
    ("--scales a", "--scales 'a': give numbers"),
    ("--emas 0.5", "no average of the rate 0.5"),
    ("--reference none.npz", "--reference none.npz: no such file"),
    ("--num_samples 2", "--num_samples must be 4 or more"),
])
def test_a_sweep_refuses_bad_options_before_it_draws(networks, tmp_path, monkeypatch, words, said):
    sweep = sweep_program()
    np.savez(tmp_path / "reference.npz", noise(0, 9))
    given = ["sweep", "--model_path", networks / "model/model000002.pt", "--reference", tmp_path / "reference.npz",
             "--out", tmp_path / "out", *words.split()]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, given)))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)):
        sweep.main()
    assert not (tmp_path / "out").exists()


def test_evaluations_of_guidance_count_both_looks(networks):
    sweep = sweep_program()
    case = {"path": str(networks / "model/model000002.pt"), "sampler": "ddim", "steps": 7, "scale": 3.0}
    assert sweep.evaluations(case, guided=[]) == 14 and sweep.evaluations(case, guided=["a classifier"]) == 7
    assert sweep.evaluations(case | {"scale": 1.0, "sampler": "heun"}, guided=[]) == 13
