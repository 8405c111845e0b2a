"""The plain form computes what ours does; ours is faster; and the benchmarks measure what they say."""

import json
import sys
from pathlib import Path

import pytest
import torch as th

from guided_diffusion import guidance, logger, sampling, solvers

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import growth  # noqa: E402
import hardware  # noqa: E402
import pairs  # noqa: E402
import plain  # noqa: E402
import plain_steps  # noqa: E402
import quality  # noqa: E402
import records  # noqa: E402
import speed  # noqa: E402
import timing  # noqa: E402

SMALL = {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1, "num_classes": 5,
         "attention_resolutions": "16,8", "noise_schedule": "cosine", "diffusion_steps": 40}  # fmt: skip
GUIDE = {"image_size": 16, "classifier_width": 32, "classifier_depth": 1, "classifier_channel_mult": "1,2",
         "classifier_attention_resolutions": "16,8", "classifier_num_head_channels": 16, "num_classes": 5}  # fmt: skip
KINDS = {
    "as usual": {},
    "of the published models": {"class_cond": True, "learn_sigma": True, "resblock_updown": True,
                                "num_head_channels": 16, "use_new_attention_order": True},
    "recomputed, embeddings added": {"use_checkpoint": True, "use_scale_shift_norm": False, "sigma_small": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    th.manual_seed(0)


def close(a, b, tolerance=1e-5):
    assert timing.difference(a, b) < tolerance


# --------------------------------------------------------------------------------------------------- equal results


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_network_has_the_outputs_and_gradients_of_ours(kind):
    flags = SMALL | KINDS[kind]
    net, process = pairs.diffusion_of(flags)
    other, batch = plain.plain_of(net), pairs.batch_of(flags, 3)
    assert list(other.state_dict()) == list(net.state_dict())
    works = pairs.evaluations(net.eval(), other.eval(), (batch[0], batch[1] % 40, batch[2]))
    assert works["ours"]().abs().mean() > 0.1
    close(works["plain"](), works["ours"]())
    x, t, y = batch[0], th.tensor([0, 1, 39]), batch[2]
    told = {} if y is None else {"y": y}
    terms = plain_steps.PlainDiffusion(process).losses(other, x, t, x.flip(0), y)
    ours = process.training_losses(net, x, t, told, x.flip(0))
    assert terms.keys() == ours.keys()
    close([terms[name] for name in ours], [*ours.values()])
    found = [th.autograd.grad(each["mse"].mean(), list(n.parameters())) for each, n in ((terms, other), (ours, net))]
    close(*found)


def test_the_plain_classifier_has_the_outputs_and_gradients_of_ours():
    net = pairs.classifier_of(GUIDE).eval()
    x, t, y = th.randn(3, 3, 16, 16), th.tensor([0, 500, 999]), th.tensor([4, 0, 2])
    other = plain.plain_of(net)
    close(other(x, t), net(x, t))
    close(plain_steps.classifier_gradient(other, 3.0)(x, t, y), guidance.classifier_gradient(net, 3.0)(x, t, y))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_plain_guided_steps_are_ours(sampler):
    net, process = pairs.diffusion_of(SMALL)
    process = process.spaced(range(36))  # beyond, x_0 has hundreds of times the rounding of eps
    walks = pairs.Walks(net.eval(), process, pairs.classifier_of(GUIDE).eval(), 4, 20.0, sampler, classes=5)
    close(walks.literal(3, (3, 16, 16), own_noise=False), walks.ours(3, (3, 16, 16)))
    alone = pairs.Walks(net, process, walks.classifier, 4, 0.0, sampler, classes=5)
    assert timing.difference(walks.ours(3, (3, 16, 16)), alone.ours(3, (3, 16, 16))) > 0.01


def test_a_plain_step_with_learned_variances_and_guidance_without_a_classifier_is_ours():
    net, process = pairs.diffusion_of(SMALL | KINDS["of the published models"])
    other, literal = plain.plain_of(net.eval()), plain_steps.PlainDiffusion(process)
    x, noise, y = th.randn(2, 3, 16, 16), th.randn(2, 3, 16, 16), th.tensor([1, 2])
    guide = lambda predict: guidance.classifier_free(predict, {"y": 4}, 2.5)                     # noqa: E731
    predict, told = process.predictor(net, guide=guide), plain_steps.classifier_free(other, 4, 2.5)
    for row in (0, 20, 39):
        t = th.full((2,), row)
        step = sampling.Step(process, lambda x, t: predict(x, t, y=y), x, t, lambda: noise)
        close(literal.ancestral(told, x, t, noise, y), solvers.ddpm(step)[0])


def test_plain_updates_are_ours():
    module = th.nn.ParameterList(th.nn.Parameter(th.randn(n, 3)) for n in (1, 5))
    works = pairs.updates(module)[""]
    for _ in range(3):
        averages = works["plain"](), works["ours"]()
    close(*averages, 1e-6)


# ------------------------------------------------------------------------------------------------------ the guard


def ratio(works, rounds=3):
    """How many times as fast ours is; a busy machine may be asked twice."""
    return timing.compared(timing.interleaved(works, rounds), "cpu")["times_as_fast"]["ours"]["median"]


def at_least(least, works):
    assert ratio(works) >= least or ratio(works) >= least


def test_ours_is_faster_than_the_plain_form_where_attention_is_heavy(tmp_path):
    flags = pairs.NETWORKS["attention-heavy"][0] | {"num_res_blocks": 1}
    net, process = pairs.diffusion_of(flags)
    at_least(1.3, pairs.evaluations(net, plain.plain_of(net), pairs.batch_of(flags, 1)))
    with logger.scoped_configure(tmp_path, format_strs=[]):
        at_least(1.5, pairs.trainings(net, process, flags, 1))


def test_ours_updates_faster_than_loops():
    module = th.nn.ParameterList(th.nn.Parameter(th.randn(32, 32)) for _ in range(300))
    at_least(1.5, pairs.updates(module)[""])


# ----------------------------------------------------------------------------------------------------- the measuring


def test_sides_take_turns_and_ratios_are_of_rounds():
    order = []
    rounds = timing.interleaved({name: lambda n=name: order.append(n) for name in "ab"}, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(pairs) for name, pairs in rounds.items()} == {"a": 3, "b": 3}
    row = timing.compared({"plain": [(9, 2), (9, 4), (9, 3)], "ours": [(3, 1), (3, 1), (3, 1)]}, "cpu")
    assert row["times_as_fast"] == {"ours": {"median": 3, "low": 2, "high": 4}}
    assert row["sides"]["plain"]["wall_s"]["median"] == 9
    assert timing.compared({"plain": [(9, 2)], "ours": [(3, 1)]}, "wall")["times_as_fast"]["ours"]["median"] == 3
    assert timing.spread([1, 2, 3, 4, 5]) == {"median": 3, "low": 2, "high": 4}
    assert timing.difference(th.tensor([4.0, -8.0]), th.tensor([4.0, -7.0])) == 1 / 8
    assert "ours x3.00 (2.00 .. 4.00)" in timing.shown(row | {"what": "it"})


def test_sections_that_did_not_run_stay(tmp_path):
    path = tmp_path / "new" / "speed.json"
    timing.record(path, {"a": [1]}, "cpu")
    timing.record(path, {"b": [2]}, "cpu")
    timing.record(path, {"a": [3]}, "cpu")
    content = json.loads(path.read_text())
    assert {name: each["rows"] for name, each in content.items()} == {"a": [3], "b": [2]}
    assert content["a"]["machine"]["torch"] == th.__version__ and [*path.parent.iterdir()] == [path]


def test_operations_and_bytes_are_counted():
    x, conv = th.randn(2, 8, 16, 16), th.nn.Conv2d(8, 4, 3, padding=1)
    assert hardware.flops_of(lambda: conv(x)) == 2 * 2 * 8 * 4 * 9 * 16 * 16
    q = th.randn(1, 2, 300, 8)  # [N,heads,L,c]: two products of L x L
    attend = th.nn.functional.scaled_dot_product_attention
    assert hardware.flops_of(lambda: attend(q, q, q)) == 2 * (2 * 2 * 300 * 300 * 8)
    a = th.zeros(10, 10)
    assert hardware.bytes_of(lambda: a.t() + a) == 3 * 400
    assert hardware.fractions(10, 6, 2.0, {"flops_per_s": 10, "convolution_flops_per_s": 20, "bytes_per_s": 1}) == {
        "share_of_matrix_rate": 0.5, "share_of_convolution_rate": 0.25, "share_of_copy_rate": 3.0}  # fmt: skip


def test_the_program_runs_at_small_size_as_it_would_on_a_gpu(tmp_path, capsys):
    words = "limit evaluation training guided updates saving --tiny --images 1 --repeats 1 --steps 2 --seconds 0.01"
    words += " --published --networks imagenet64 --precision bf16 --compile False --out"
    speed.main([*words.split(), str(tmp_path / "speed.json")])
    content = json.loads((tmp_path / "speed.json").read_text())
    assert [*content] == words.split()[:6]
    said = [row["what"] for row in content["evaluation"]["rows"]]
    assert said == ["imagenet64, 1 images", "classifier of imagenet64, 1 images"]
    assert all(row["error"] < 0.05 for row in content["evaluation"]["rows"])  # 8 and 11 bits of fraction
    assert [row["what"] for row in content["guided"]["rows"]][:2] == [
        "imagenet64, 2 steps of ddpm, 1 images", "imagenet64, 2 steps of ddim, 1 images"]  # fmt: skip
    assert len(content["training"]["rows"]) == 1 and content["limit"]["rows"][0]["flops_per_s"] > 0
    assert "x" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        speed.main(["speed"])
    assert "unknown section speed: choose from limit, evaluation" in capsys.readouterr().err


def test_ours_computes_what_diffusers_does(tmp_path):
    pytest.importorskip("diffusers")
    words = "others --images 2 --repeats 1 --steps 2 --tiny --published --networks imagenet64 --out"
    speed.main([*words.split(), str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["others"]["rows"]
    equal = [row for row in rows if "error" in row]
    assert equal and all(row["error"] < 1e-5 and len(set(row["parameters"])) == 1 for row in equal)
    assert [row["what"] for row in rows][-3:] == [f"demo, 4 steps of {name}, unguided" for name in
                                                 ("ddpm", "ddim", "dpmpp_2m")]  # fmt: skip


def test_growth_has_exponents_and_a_figure(tmp_path):
    assert growth.grown("images", "", {2: 1.0, 4: 3.0, 8: 12.0})["exponent"] == 2.0
    assert growth.grown("pixels", "", {2: 1.0, 4: 4.0})["exponent"] == 1.0  # four times the pixels
    rows = [growth.grown(what, "", {10: 3.0, 100: 3.3}) for what in growth.LABELS]
    growth.figure(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10000
    works = growth.works(growth.SMALL)
    assert works.keys() | {"memory"} == growth.COUNTS.keys() == growth.SMALL.keys()
    assert all([*each] == growth.SMALL[what] for what, lines in works.items() for each in lines.values())
    for lines in works.values():
        next(iter(next(iter(lines.values())).values()))()


def test_the_answer_is_the_fastest_that_is_not_worse():
    def row(fast, low, error=0.01):
        return {"difference_low": low, "difference_error": error, "times_as_fast": {"an image": {"median": fast}}}

    rows = [row(1, 0), row(9, -0.01), row(12, -0.001), row(20, 0.004), row(30, -0.2, error=0.1)]
    assert quality.best(rows, 0.02) is rows[2]
    assert quality.best(rows[:1], 0.02) is None


def test_the_page_on_speed_has_the_recorded_numbers():
    content = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text())
    page = (ROOT / "docs" / "speed.md").read_text().splitlines()
    for section, lines in records.lines(content).items():
        assert lines and set(lines) <= set(page), f"{section}: write what `python benchmarks/records.py` prints"
