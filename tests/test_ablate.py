"""Studies of arms: what is found before anything is trained, what is kept, what is paired, and what a kill changes."""

import importlib.util
import json
import math
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch as th

from evaluations import claims, outcome, paired
from guided_diffusion import ablation, checkpoint, config, kept, pictures, saves, script_util, unet
from guided_diffusion.gaussian_diffusion import ModelVarType
from guided_diffusion.network_options import ClassifierOptions, DiffusionOptions, ModelOptions

ROOT = Path(__file__).parent.parent

STUDY = """
title = "Tiny"
data = "digits.npz"
held_out = "digits.npz"
seeds = [0, 1]
[budget]
images = 32
[train]
image_size = 8
image_channels = 1
class_cond = true
num_classes = 10
num_channels = 32
num_res_blocks = 1
num_head_channels = 32
attention_resolutions = ""
channel_mult = "1,1"
noise_schedule = "cosine"
random_flip = false
batch_size = 4
num_workers = 0
lr = 1e-3
ema_rate = "0.9"
[sample]
classes = "all"
batch_size = 40
timestep_respacing = 2
[judge]
classifier_width = 32
classifier_depth = 1
classifier_attention_resolutions = ""
classifier_channel_mult = "1,1"
classifier_num_head_channels = 32
batch_size = 8
iterations = 1
random_crop = false
random_flip = false
num_workers = 0
[evaluation]
samples = 10
[arms]
"""
ARM = '"added" = { use_scale_shift_norm = false }\n'
WALK = '"DDIM" = { sample = { use_ddim = true }, against = ["added", "base"] }\n'
WILD = '"wild" = { lr = 1e30 }\n'
CLAIMS = """
[claims]
"lower" = { arm = "added", of = "fid", below = "base", source = "nobody" }
"alike" = { arm = "DDIM", of = "fid", near = "added", within = 1e9 }
"""
UNLABELLED = STUDY.replace("digits.npz", "bare.npz").replace("class_cond = true", "class_cond = false").replace(
    'classes = "all"', "").replace("held_out", "#")  # fmt: skip
GUIDE = """
[classifier]
classifier_width = 32
classifier_depth = 1
classifier_attention_resolutions = ""
classifier_channel_mult = "1,1"
classifier_num_head_channels = 32
iterations = 1
num_workers = 0
"""
GUIDED = STUDY.replace("[arms]", GUIDE + "[arms]").replace("[sample]", "[sample]\nclassifier_scale = 2")
RESULTS = "results.csv", "results.json", "report.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a few images of noise, labelled."""
    path = tmp_path_factory.mktemp("study")
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(path / "digits.npz", arr_0=images, arr_1=np.arange(40) % 10)
    np.savez(path / "bare.npz", arr_0=images)
    return path


def ablate():
    spec = importlib.util.spec_from_file_location("ablate", ROOT / "scripts" / "ablate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(folder, text, out, *words):
    (folder / f"{out}.toml").write_text(text)
    return forked.start("scripts/ablate.py", [f"{out}.toml", "--out", out, "--estimate", "False", *words], folder)


def run(folder, text, out, *words):
    (folder / "said.txt").unlink(missing_ok=True)
    code = forked.ended(start(folder, text, out, *words))
    return code, (folder / "said.txt").read_text()


def content(folder, out):
    return {name: (folder / out / name).read_bytes().replace(out.encode(), b"OUT") for name in RESULTS}


@pytest.fixture(scope="module")
def whole(folder):
    """What a study says and writes that is never killed."""
    code, said = run(folder, STUDY + ARM + WALK + WILD + CLAIMS, "whole")
    assert code == 0, said
    return said, content(folder, "whole")


def test_a_study_ends_with_a_table_and_marks_what_diverged(folder, whole):
    said, files = whole
    assert "4 arms x 2 seeds: 23 pieces of work, of which 0 are done" in said  # DDIM shares the base's training
    assert said.count("wild, seed") == 2 and said.count("diverged: scripts/image_train.py ended with exit code 2") == 2
    found = json.loads(files["results.json"])["arms"]
    assert [arm["name"] for arm in found] == ["base", "added", "DDIM", "wild"]
    assert set(found[3]["failed"]) == {"0", "1"} and found[3]["scores"] == {}
    assert all(arm["iterations"] == 8 and arm["evaluations"] == 2 for arm in found)
    assert [list(arm["compared"]["fid"]["differences"]) for arm in found[:3]] == [[], ["base"], ["added", "base"]]
    for arm, other in ((1, 0), (2, 0), (2, 1)):
        arm, other = found[arm], found[other]
        a, b = ([each["scores"]["fid"][seed] for seed in "01"] for each in (arm, other))
        first, second = a[0] - b[0], a[1] - b[1]
        difference = arm["compared"]["fid"]["differences"][other["name"]]
        assert math.isclose(difference["value"], (first + second) / 2, rel_tol=1e-9)
        assert math.isclose(difference["standard_error"], abs(first - second) / 2, rel_tol=1e-9)
        assert math.isclose(difference["high"] - difference["value"], 12.706204736 * abs(first - second) / 2,
                            rel_tol=1e-8)  # fmt: skip
    lower, alike = json.loads(files["results.json"])["claims"]
    assert lower["finding"] == found[1]["compared"]["fid"]["differences"]["base"]
    assert alike["finding"] == found[2]["compared"]["fid"]["differences"]["added"]
    assert alike["verdict"] == "reproduced" and "| lower | nobody | FID, added - base |" in files["report.md"].decode()
    rows = [line.split(",")[:3] for line in files["results.csv"].decode().splitlines()]
    assert rows[0] == ["arm", "metric", "seeds"] and ["added", "fid", "2"] in rows and ["wild", "fid", "2"] not in rows
    assert "| diverged |" in files["report.md"].decode() and b"data:image/png" in (
        folder / "whole" / "report.html").read_bytes()
    assert found[0]["curves"]["0"]["loss"][0] == [4 * step for step in range(1, 9)]


@pytest.mark.parametrize("change", ["", '"four" = { num_res_blocks = 4 }\n'])
def test_what_is_done_is_kept_and_a_changed_file_says_what_is_not_used(folder, whole, change):
    before = {path: path.stat().st_mtime_ns for path in (folder / "whole" / "work").glob("*/*/*")}
    text = STUDY + ARM + WALK + (change or WILD) + CLAIMS
    code, said = run(folder, text, "whole", "--run", "False")
    told = "19 pieces of work, of which 19 are done" if not change else "23 pieces of work, of which 17 are done"
    assert code == 0 and told in said
    said_so = "2 done pieces in whole/work are of another state of the study or its data, and are not used" in said
    assert said_so == bool(change)
    if not change:
        recorded = folder / "whole" / "results.json"
        altered = json.loads(recorded.read_text())
        compared = altered["arms"][1]["compared"]
        compared["fid"]["mean"]["low"], compared["fid"]["mean"]["high"] = -2e9, -1e9
        count = sum(len(arm["compared"]) for arm in altered["arms"])
        (folder / "altered.json").write_text(json.dumps(altered))
        code, said = run(folder, text, "whole", "--recorded", "altered.json")
        assert f"of {count} means, {count - 1} equal those of altered.json to the last digit, 1 differ" in said
        assert code == 0 and "\nadded, FID: " in said and "\nreproduced: alike\n" in said
        assert content(folder, "whole") == whole[1]
    assert {path: path.stat().st_mtime_ns for path in (folder / "whole" / "work").glob("*/*/*")} == before


def test_a_study_killed_three_times_ends_with_the_same_files(folder, whole):
    """Killed in a training, in the sampling after it, and in the last arm: aimed at files, not seconds."""
    text = STUDY + ARM + WALK + WILD + CLAIMS
    for pattern, count in (("train/*/model000004.pt", 1), ("sample/*/output.txt", 2), ("score/*/scores.json", 5)):
        pid, deadline = start(folder, text, "killed"), time.monotonic() + 60
        while len(list((folder / "killed" / "work").glob(pattern))) < count:
            assert time.monotonic() < deadline, (folder / "said.txt").read_text()
            time.sleep(0.005)
        assert forked.kill(pid) == -9
    code, said = run(folder, text, "killed")
    assert code == 0, said
    assert content(folder, "killed") == whole[1]


def test_arms_run_side_by_side_each_on_a_device():
    """Four runs on two devices: two at a time, never two on one, and one that fails does not stop the others."""
    program, busy, seen, both = ablate(), [], [], threading.Barrier(2, timeout=30)

    class Work:
        plan = SimpleNamespace(runs=lambda: [(seed, SimpleNamespace(name=name)) for seed in (0, 1) for name in "ab"])

        def judge(self, device):
            assert not seen

        def score(self, arm, seed, device):
            busy.append(device)
            both.wait()
            seen.append(sorted(busy))
            both.wait()
            busy.remove(device)
            why = {("b", 0): kept.Diverged("the loss is not finite"), ("b", 1): RuntimeError("out of memory")}
            raise why.get((arm.name, seed), OSError("no room"))

    failed = program.run_all(Work(), ["cuda:0", "cuda:1"])
    assert seen == [["cuda:0", "cuda:1"]] * 4
    assert failed.pop(("b", 0)) == "diverged: the loss is not finite"
    assert failed.pop(("b", 1)) == "failed: out of memory" and list(failed.values()) == ["failed: no room"] * 2


def test_arms_that_share_a_training_are_worked_on_last(folder, tmp_path, monkeypatch):
    """Base and DDIM share one: of two at work none then waits for the other."""
    monkeypatch.chdir(folder)
    (tmp_path / "x.toml").write_text(STUDY + WALK + ARM)
    plan = ablate().Plan(ablation.read(tmp_path / "x.toml"), tmp_path)
    assert [(seed, arm.name) for seed, arm in plan.runs()] == [
        (0, "base"), (0, "added"), (1, "base"), (1, "added"), (0, "DDIM"), (1, "DDIM")]  # fmt: skip


def test_a_piece_that_several_want_at_once_is_done_once(tmp_path):
    """Whoever comes second waits, and finds it done."""
    begun, go = [], threading.Event()

    def work(folder):
        begun.append(folder)
        go.wait(30)

    threads = [threading.Thread(target=kept.do, args=(tmp_path, "train", {"a": 1}, work)) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    go.set()
    for thread in threads:
        thread.join(30)
    assert len(begun) == 1 and kept.told(tmp_path, "train", {"a": 1}) == ""


def test_pictures_edited_in_place_are_other_data(folder, tmp_path, monkeypatch):
    """Their names stay, and with them the fingerprint; what was there first goes by that alone."""
    monkeypatch.chdir(folder)
    (tmp_path / "data").mkdir()
    for i in range(8):
        pictures.save_grid(tmp_path / f"data/{i % 2}_{i}.png", np.full((1, 8, 8, 3), i, np.uint8), 1)
    text = STUDY.replace("digits.npz", f"{tmp_path}/data").replace("image_channels = 1", "image_channels = 3")
    (tmp_path / "x.toml").write_text(text.replace("num_classes = 10", "num_classes = 2") + ARM)

    def plan():
        found = ablate().Plan(ablation.read(tmp_path / "x.toml"), tmp_path)
        found.known.write()
        keys = [kept.key(recipe) for _, recipe in found.pieces(found.arms[1], 0)] + [kept.key(found.of_judge())]
        return found.data["base"], keys

    before, keys = plan()
    kept_picture = (tmp_path / "data/1_3.png").read_bytes()
    pictures.save_grid(tmp_path / "data/1_3.png", np.full((1, 8, 8, 3), 99, np.uint8), 1)
    after, others = plan()
    assert after.startswith(f"{before} ") and not set(keys) & set(others)
    (tmp_path / "data/1_3.png").write_bytes(kept_picture)
    assert plan() == (before, keys)


def test_a_device_that_is_not_here_is_refused_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    words = ["ablate", "none.toml", "--out", str(tmp_path / "out"), "--devices"]
    monkeypatch.setattr("sys.argv", [*words, "cpu, cdua:1"])
    with pytest.raises(ValueError, match="device 'cdua:1' is not available here; choose from cpu"):
        ablate().main()
    assert ablate().slots_of(SimpleNamespace(devices="cpu, cpu", parallel=2)) == ["cpu"] * 4


def test_a_preset_tells_the_classifiers_of_a_study_what_they_look_at():
    typed = {"judge": {}, "train": {"preset": "imagenet128"}}
    assert ablation._options({"classifier": {}}, "judge", typed, "[judge]").image_size == 128


def test_two_studies_in_one_folder_are_refused(folder, tmp_path):
    """But the plan may be asked for while one runs."""
    out = folder / "twice"
    out.mkdir()
    held = forked.fork(lambda: (saves.Lock(out).acquire(), (tmp_path / "held").touch(), time.sleep(60)))
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    try:
        code, said = run(folder, STUDY + ARM, "twice")
        assert code == 2 and f"twice is in use by process {held}" in said and "or choose another --out" in said
        assert run(folder, STUDY + ARM, "twice", "--run", "False")[0] == 0
        assert not (out / "work").exists()
    finally:
        forked.kill(held)


def test_a_guided_study_with_a_budget_in_seconds_goes_on_after_a_failure(folder):
    """What the samples are guided by is trained for each arm that changes it; speeds and distances are told."""
    text = GUIDED.replace("images = 32", "seconds = 0.05").replace("[0, 1]", "[3]")
    text = text.replace("samples = 10", "samples = 10\npoints = 1").replace("class_cond = true", "class_cond = false")
    text += '"clean" = { classifier = { noised = false } }\n"few" = { sample = { log_formats = "none" } }\n'
    for attempt in (1, 2):
        code, said = run(folder, text, "guided", "--estimate", "True", "--price", "2")
        assert code == 2 and "few, seed 3: failed: scripts/classifier_sample.py ended with exit code 2; " in said
        assert "came to nothing, and will be tried again by the same command: few, seed 3" in said
        assert "10 pieces of work, of which 0 are done" in said if attempt == 1 else "of which 8 are done" in said
        assert "at 2 an hour" in said
    found = json.loads((folder / "guided" / "results.json").read_text())["arms"]
    assert [bool(arm["scores"]) for arm in found] == [True, True, False] and list(found[2]["failed"]) == ["3"]
    speeds = json.loads((folder / "guided" / "speed.json").read_text())
    assert len(speeds) == 3  # one network, one judge, one guide: "clean" trains it in the same time
    assert found[0]["iterations"] in [max(1, math.ceil(0.05 * speed / 4 - 1e-9)) for speed in speeds.values()]
    assert len(found[0]["curves"]["3"]["fid"][0]) == 1
    assert len(list((folder / "guided" / "work").glob("classifier/*/done.json"))) == 2


# -------------------------------------------------------------------------------------------------------- bad studies


@pytest.mark.parametrize("text, said", [
    (STUDY + '"x" = { num_chanels = 64 }', "arm 'x', train: unknown flag --num_chanels; did you mean --num_ch"),
    (STUDY + '"x" = { use_ddim = true }', "arm 'x': use_ddim is no option of training: write sample = { use_ddim"),
    (STUDY + '"x" = { sample = { use_dim = true } }', "arm 'x', sample: unknown flag --use_dim; did you mean --use"),
    (STUDY + '"x" = { num_channels = 40 }', "arm 'x' cannot be built: model_channels 40"),
    (STUDY + '"x" = { channel_mult = "1,1,1,1,1" }', "arm 'x' cannot be built: image_size 8 is not divisible by 16"),
    (STUDY + '"x" = { learned_variance = "free" }', "arm 'x' cannot be built: --learned_variance free has no effect"),
    (STUDY + '"x" = { ema_rate = "2" }', "arm 'x' cannot be built: an ema_rate is a decay in [0, 1)"),
    (STUDY + '"x" = { sample = { sampler = "ddmp" } }', "arm 'x' cannot be built: unknown sampler: ddmp"),
    (STUDY + '"x" = { sample = { guidance_scale = 2 } }', "arm 'x' cannot be built: --guidance_scale 2.0: the model"),
    (STUDY + '"x" = { batch_size = 64 }', "arm 'x': digits.npz"),
    (STUDY + '"x" = { lr = -1 }', "arm 'x': lr_min is a rate from 0 to lr -1.0"),
    (STUDY + '"x" = { beta2 = 2 }', "arm 'x': beta2 is a decay in [0, 1), as 0.999, not 2.0"),
    (STUDY + '"x" = { lr = [0.1, 0.2] }', "arm 'x': lr takes one value, not [0.1, 0.2]: make an arm of each"),
    (STUDY + '"x" = { keep_best = true }', "arm 'x': keep_best needs held-out images"),
    (STUDY + '"x" = { lr_anneal_steps = 7 }', "arm 'x': lr_anneal_steps 7 would end its training before the 8 updates"),
    (STUDY + '"x" = { image_size = 16 }', "arm 'x': image_size is 16, and the base has 8: only scores of"),
    (STUDY + '"x" = { sample = 3 }', "arm 'x': sample must be a table of options"),
    (STUDY + '"x" = { sample = { batch_size = -1 } }', "arm 'x', sample: --batch_size must be 0 or more, not -1"),
    (STUDY + '"x" = { sample = { reuse_every = 0 } }', "arm 'x', sample: --reuse_every must be 1 or more, not 0"),
    (STUDY + '"x" = { sample = { classes = "10" } }', "arm 'x', sample: "),
    (STUDY + '"x" = { sample = { num_channels = 64 } }', "arm 'x', sample: num_channels 64: the network is trained"),
    (STUDY + '"x" = { sample = { classes = "0:3" } }', "arm 'x', sample: "),
    (STUDY + '"x" = { sample = { guide_path = "no.pt", guidance_scale = 2 } }', "arm 'x', sample: "),
    (STUDY.replace("iterations = 1", "iterations = 0") + ARM, "[judge]: iterations must be 1 or more, not 0"),
    (STUDY.replace("[judge]", "[judge]\nimage_size = 16") + ARM, "[judge]: image_size is 16, and the base has 8"),
    (STUDY.replace("[judge]", "[judge]\nnum_classes = 5") + ARM, "[judge]: label 9 in the data does not fit 5 classes"),
    (STUDY.replace("[judge]", "[judge]\nnoised = true") + ARM, "[judge]: it looks at images without noise"),
    (STUDY.replace('held_out = "digits', 'held_out = "bare') + ARM, "[judge]: bare.npz has no labels"),
    (UNLABELLED + ARM, "[judge]: bare.npz has no labels"),
    (GUIDED + '"x" = { classifier = { noise_schedule = "linear" } }', "arm 'x', classifier: the model has noise_sche"),
    (GUIDED + '"x" = { classifier = { num_classes = 11 } }', "arm 'x', classifier: the model has num_classes 10"),
    (GUIDED + '"x" = { classifier = { iterations = 0 } }', "arm 'x', classifier: iterations must be 1 or more"),
    (GUIDED + '"x" = { class_cond = false, sample = { classes = "12" } }', "arm 'x', sample: "),
    (STUDY.replace("samples = 10", "samples = 10.5") + ARM, "[evaluation]: samples must be a whole number, not 10.5"),
    (STUDY.replace("samples = 10", "batch_size = 0") + ARM, "[evaluation] batch_size must be 1 or more, not 0"),
    (STUDY.replace("images = 32", "images = inf") + ARM, "[budget]: images must be a finite number, not inf"),
    (STUDY + '"x" = { seed = 3 }', "arm 'x': seed is set by the study itself"),
    (STUDY + '"x" = { iterations = 3 }', "arm 'x': iterations follow from [budget]"),
    (STUDY + '"x" = { classifier = { noised = false } }', "arm 'x' changes a classifier, and the study has none"),
    (STUDY + '"x" = { dropout = 0.0 }', "arms 'base' and 'x' are equal"),
    (STUDY + '"x" = { dropout = 0.1 }\n"y" = { dropout = 1e-1 }', "arms 'x' and 'y' are equal"),
    (STUDY + '"x" = 3', "arm 'x' must be a table of what it changes"),
    (STUDY + '"base" = { dropout = 0.1 }', "an arm is called 'base'"),
    (STUDY + '"x" = { dropout = 0.1, against = "bace" }', "arm 'x' is to be compared with 'bace', which is no other "
     "arm; did you mean base?"),
    (STUDY + '"x" = { dropout = 0.1, against = ["base", "x"] }', "compared with 'x', which is no other arm"),
    ('axis = "dropuot"\n' + STUDY + ARM, "axis 'dropuot' is neither an option nor 'looks'; did you mean dropout or"),
    ('axis = "noise_schedule"\n' + STUDY + ARM, "arm 'base' has 'cosine' there, which is no number"),
    (STUDY + ARM + CLAIMS, "claim 'alike': there is no arm 'DDIM'; there are base, added"),
    (STUDY, "[arms] is empty"),
    (STUDY.replace("samples = 10", "samples = 5") + ARM, "5 samples are too few for precision, recall, density"),
    (STUDY.replace("[budget]", "[bugdet]") + ARM, "unknown entry 'bugdet'; did you mean budget?"),
    (STUDY.replace("images = 32", "images = 32\nseconds = 3") + ARM, "give images, as 64000, or seconds"),
    (STUDY.replace("seeds = [0, 1]", "seeds = [0, 0]") + ARM, "seeds [0, 0]: give different whole numbers"),
    (STUDY.replace("seeds = [0, 1]", 'seeds = "0"') + ARM, "seeds must be of the kind of [0, 1, 2], not '0'"),
    (STUDY.replace("digits.npz", "none.npz") + ARM, "none.npz"),
    ('match = "width"\n' + STUDY + ARM, "match 'width' is none of"),
    ('match = "parameters"\n' + STUDY + '"x" = { num_channels = 64 }', "arm 'x' sets num_channels, which match"),
    (STUDY.replace("images = 32", "seconds = 32") + ARM, "a budget in seconds needs the measured speed"),
    ("title = ", "is no toml file"),
])
def test_bad_studies_are_refused_before_anything_is_trained(folder, tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(folder)
    (tmp_path / "x.toml").write_text(text)
    monkeypatch.setattr("sys.argv", ["ablate", str(tmp_path / "x.toml"), "--out", str(tmp_path / "out"), "--estimate",
                                     "False"])  # fmt: skip
    program = ablate()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        program.main()
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


def test_reference_images_too_few_for_the_metric(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((5, 8, 8, 1), np.uint8))
    text = STUDY.replace("samples = 10", f'samples = 10\nreference = "{tmp_path}/few.npz"')
    (tmp_path / "x.toml").write_text(text + ARM)
    study = ablation.read(tmp_path / "x.toml")
    with pytest.raises(ValueError, match="5 reference images are too few for precision, recall, density and coverage"):
        ablate().Plan(study, tmp_path)


# ----------------------------------------------------------------------------------------------------------- the plan


def arms(text, **more):
    study = ablation.ENTRIES | ablation._toml().loads(text) | more
    study["budget"] = ablation.BUDGET | study["budget"]
    found = ablation.arms_of(study)
    ablation.set_iterations(study, found)
    return found


def test_a_study_extends_another_name_by_name(tmp_path):
    (tmp_path / "common.toml").write_text(STUDY + ARM)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "x.toml").write_text(
        'extends = "../common.toml"\nseeds = [7]\njudge = {}\n[train]\nlr = 3e-4\n[arms]\n"x" = { dropout = 0.1 }\n')
    whole, found = ablation.read(tmp_path / "common.toml"), ablation.read(tmp_path / "below" / "x.toml")
    assert found["train"] == whole["train"] | {"lr": 3e-4} and list(found["arms"]) == ["added", "x"]
    assert found["seeds"] == [7] and found["judge"] == {}
    changed = {name for name in whole if whole[name] != found[name]}
    assert changed == {"extends", "seeds", "judge", "train", "arms"}
    (tmp_path / "common.toml").write_text('extends = "below/x.toml"\n')
    with pytest.raises(ValueError, match="a study cannot extend itself"):
        ablation.read(tmp_path / "below" / "x.toml")
    (tmp_path / "common.toml").write_text('sedes = [1]\n')
    with pytest.raises(ValueError, match=r"common\.toml has an unknown entry 'sedes'; did you mean seeds\?"):
        ablation.read(tmp_path / "below" / "x.toml")


def test_shared_work_is_counted_once_in_the_time_that_is_told(folder, tmp_path, monkeypatch):
    """32 images at 4 a second: 8 s of training; 10 samples of 2 looks, each a third of a step: 5/3 s; 5 s a start."""
    monkeypatch.chdir(folder)
    (tmp_path / "x.toml").write_text(STUDY.replace("seeds = [0, 1]", "seeds = [0]") + WALK.replace('"added", ', ""))
    program = ablate()
    plan = program.Plan(ablation.read(tmp_path / "x.toml"), tmp_path)
    plan.set_iterations({})
    counted = set()
    left = [program.seconds_of(plan, arm, 0, {"base": 4, "DDIM": 4}, counted) for arm in plan.arms]
    assert np.allclose(left, [8 + 5 / 3 + 10, 5 / 3 + 5])


SHIPPED = {
    path.stem: path for path in sorted((ROOT / "docs" / "reproduction").glob("*.toml")) if path.stem != "digits"
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_studies_that_ship_can_be_planned(name, tmp_path, monkeypatch):
    """With a few images of noise in the places of their data."""
    monkeypatch.chdir(tmp_path)
    content, rng = ablation.read(SHIPPED[name]), np.random.default_rng(0)
    size, channels = (content["train"].get(key, usual) for key, usual in (("image_size", 64), ("image_channels", 3)))
    for part, key in ((content, "data"), (content, "held_out"), (content["evaluation"], "reference")):
        if part[key]:
            part[key] = str(Path(part[key]).with_suffix(".npz"))
            Path(part[key]).parent.mkdir(parents=True, exist_ok=True)
            images = rng.integers(0, 256, (256, size, size, channels), np.uint8)
            np.savez(part[key], arr_0=images, arr_1=np.arange(256) % 10)
    program = ablate()
    monkeypatch.setattr(program, "make_extractor", lambda *words: lambda images: None)  # Inception is not here
    plan = program.Plan(content, tmp_path)
    plan.set_iterations({})
    assert len(plan.arms) == len(content["arms"]) + 1 and len(content["seeds"]) >= 3
    assert all(arm.iterations * arm.args["train"].batch_size >= content["budget"]["images"] for arm in plan.arms)
    if name == "architecture_imagenet":
        assert plan.arms[0].iterations == 700_000 and plan.arms[0].evaluations == 250


def test_operations_are_those_of_the_formula():
    class Net(th.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = th.nn.Conv2d(3, 96, 3, padding=1, device="meta")
            self.attention = unet.QKVAttentionLegacy(4)

        def forward(self, x, t):
            return self.attention(self.conv(x).flatten(2))

    flags = config.defaults(ModelOptions) | {"image_size": 16}
    conv, attention = 2 * 9 * 3 * 96 * 256, 2 * 2 * 256**2 * 32
    assert ablation.operations(Net(), flags) == conv + attention


def test_matched_arms_have_the_nearest_width_and_say_how_near():
    text = STUDY.replace("num_channels = 32", "num_channels = 128") + '"x" = { num_res_blocks = 3 }'
    base, arm = arms(text)
    assert (base.parameters, arm.near) == (arms(text, match="parameters")[0].parameters, "")
    assert arm.parameters > 1.3 * base.parameters
    matched = arms(text, match="parameters")[1]
    assert matched.args["train"].num_channels == 96 and matched.typed["train"]["num_channels"] == 96
    ratio = matched.parameters / base.parameters
    assert matched.near == f"width 96: {ratio:.2f} of the base's parameters" and 0.8 < ratio < 1.1
    with th.device("meta"):  # the widths beside it are further off
        for width in (64, 128):
            net = script_util.build("diffusion", arm.flags() | {"num_channels": width})
            other = sum(p.numel() for p in net.parameters()) / base.parameters
            assert abs(math.log(other)) > abs(math.log(ratio))
    counts = {width: ablation.nearest_width(arm.flags(), "parameters", wanted)[1] for width, wanted in
              ((64, 0.95 * 0.6974 * base.parameters), (96, 1.05 * 0.6974 * base.parameters))}  # fmt: skip
    assert counts == {64: 64, 96: 96}  # on either side of the geometric mean of .4655 and 1.0450
    matched = arms(text, match="compute")[1]
    assert 0.7 < matched.operations / base.operations < 1.4 and "operations" in matched.near
    base, trained = arms(text, match="training", budget={"images": 4000})
    assert trained.args["train"].num_channels == 128 and base.iterations == 1000
    assert trained.iterations == math.ceil(1000 * base.operations / trained.operations)


def test_the_budget_gives_updates_by_images_or_by_measured_seconds():
    text = STUDY + '"x" = { batch_size = 5 }'
    assert [arm.iterations for arm in arms(text)] == [8, 7]  # 32 / 4, 32 / 5 upwards
    study = {"budget": {"images": 0, "seconds": 10.0}, "match": ""}
    found = arms(text)
    ablation.set_iterations(study, found, {"base": 20.0, "x": 10.0})
    assert [arm.iterations for arm in found] == [50, 20]


def test_the_checkpoint_that_is_drawn_with():
    lines = '"none" = { ema_rate = "" }\n"half" = { ema_halflife = "0.5", ema_rate = "" }'
    assert [arm.checkpoint for arm in arms(STUDY + lines)] == [
        "ema_0.9_000008.pt", "model000008.pt", "ema_halflife0.5_000008.pt"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- work that is kept


def test_work_is_done_once_and_failures_that_last_are_remembered(tmp_path):
    done = []

    def work(folder):
        done.append(folder)
        if len(done) == 1:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        kept.do(tmp_path, "train", {"a": 1, "b": 2}, work)
    assert kept.told(tmp_path, "train", {"a": 1, "b": 2}) is None
    for _ in range(2):
        folder = kept.do(tmp_path, "train", {"b": 2, "a": 1}, work)
    assert len(done) == 2 and folder == kept.folder_of(tmp_path, "train", {"a": 1, "b": 2})

    def wild(folder):
        done.append(folder)
        raise ValueError("the loss is not finite")

    for _ in range(2):
        with pytest.raises(kept.Diverged, match="not finite"):
            kept.do(tmp_path, "train", {"a": 2}, wild)
    assert len(done) == 3
    assert kept.others(tmp_path, [folder]) == [kept.folder_of(tmp_path, "train", {"a": 2})]


# -------------------------------------------------------------------------------------------------- paired differences


def test_paired_differences_are_those_of_student():
    """Student's sleep data (1908, the first use of the t): mean difference 1.58, s 1.23, t = 4.06 with 9 degrees."""
    first = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
    second = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))
    found = paired.difference(second, first)
    assert (round(found.mean, 2), found.count, found.apart) == (1.58, 10, True)
    assert round(found.mean / found.standard_error, 4) == 4.0621
    assert [round(end, 7) for end in found.interval] == [0.7001142, 2.4598858]  # R: t.test(..., paired = TRUE)
    common = paired.difference({1: 5.0, 2: 6.0, 9: 0.0}, {1: 4.0, 2: 3.0})  # the seeds that both have
    assert (common.mean, common.standard_error, common.count) == (2.0, 1.0, 2) and not common.apart
    assert math.isclose(common.interval[1], 2 + 12.706204736174698, rel_tol=1e-12)
    alone = paired.difference({1: 5.0}, {1: 4.0})
    assert alone.mean == 1 and math.isnan(alone.standard_error) and not alone.apart
    assert paired.difference({1: 5.0}, {2: 4.0}) is None
    assert not paired.mean([1.0, 1.0, 1.0]).apart  # no spread is no certainty
    for freedom, t in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622)):
        assert round(paired.quantile(freedom), 4) == t


def test_arms_stand_on_the_axis_each_on_the_line_of_what_it_changes_besides(tmp_path):
    text = STUDY + """
"2" = { dropout = 0.2 }
"added, 1" = { dropout = 0.1, use_scale_shift_norm = false }
"DDIM" = { sample = { use_ddim = true, timestep_respacing = 8 } }
"""
    places = {"dropout": [(0, "base"), (0.2, "base"), (0.1, "use_scale_shift_norm False"),
                          (0, "sample use_ddim True, sample timestep_respacing 8")],
              "looks": [(2, "base"), (2, "dropout 0.2"), (2, "dropout 0.1, use_scale_shift_norm False"),
                        (8, "sample use_ddim True")]}  # fmt: skip
    for axis, wanted in places.items():
        (tmp_path / "x.toml").write_text(f'axis = "{axis}"\n' + text)
        arms = ablation.arms_of(ablation.read(tmp_path / "x.toml"))
        assert [(arm.at, arm.line) for arm in arms] == wanted


def test_pictures_along_the_axis_show_the_means_in_order_with_a_line_each(monkeypatch):
    shown = []
    monkeypatch.setattr("evaluations.gallery.curves", lambda *words: shown.append(words) or b"")
    scored = [("a", 2, [1, 3]), ("a", 0, [5, 5]), ("b", 1, [7, 9])]
    arms = [{"name": f"{line}{at}", "at": at, "line": line, "against": (), "runs": {
        seed: {"failed": "", "scores": {"precision": value, "recall": -value, "fid": value, "sfid": -value}, "log": {}}
        for seed, value in enumerate(values)}} for line, at, values in scored]  # fmt: skip
    blocks = outcome.along(outcome.results(arms), ["precision", "recall"], "dropout")
    assert [block.name for block in blocks] == ["along_precision", "along_recall", "precision_recall"]
    assert shown[0][0] == {"a": ([0, 2], [5, 2], [0, 0], [0, 1]), "b": ([1], [8], [0], [1])}
    assert shown[2][0] == {"a": ([-5, -2], [5, 2], [0, 1], [0, 1]), "b": ([-8], [8], [1], [1])}
    assert [words[1] for words in shown] == ["dropout", "dropout", "recall"]
    outcome.along(outcome.results(arms), ["fid", "sfid"], "dropout")
    assert [words[4] for words in shown] == [False, False, False, True, False]  # by factors: distances, all above 0


@pytest.mark.parametrize("way, d, wanted", [
    # Three seeds whose differences are d and d ± 1: standard error 1/sqrt 3, interval d ± 4.302653/sqrt 3 = d ± 2.484.
    ({"below": "b"}, -2.5, "reproduced"), ({"below": "b"}, -2.4, "not decidable"),
    ({"below": "b"}, 2.4, "not decidable"), ({"below": "b"}, 2.5, "not reproduced"),
    ({"above": "b"}, 2.5, "reproduced"), ({"above": "b"}, 2.4, "not decidable"),
    ({"above": "b"}, -2.5, "not reproduced"), ({"near": "b", "within": 2.5}, 0, "reproduced"),
    ({"near": "b", "within": 2.4}, 0, "not decidable"), ({"near": "b", "within": 2.5}, 4.9, "not decidable"),
    ({"near": "b", "within": 2.5}, 5, "not reproduced"), ({"near": "b", "within": 2.5}, -5, "not reproduced"),
])  # fmt: skip
def test_the_verdict_on_a_claim_is_that_of_its_interval(way, d, wanted):
    scores = {"a": {"fid": {seed: d + seed - 1 + seed for seed in range(3)}},
              "b": {"fid": {seed: seed for seed in range(4)}}}  # fmt: skip
    claim = {"x": {"arm": "a", "of": "fid", "source": "us", **way}}
    found = claims.judged(claim, scores)
    assert found[0]["verdict"] == wanted and found[0]["finding"]["seeds"] == 3
    assert claims.table(found).rows[0][5] == wanted
    assert claims.judged(claim, {"a": scores["a"]})[0]["verdict"] == "not decidable"


@pytest.mark.parametrize("claim, said", [
    (3, "claim 'x' must be a table"),
    ({"arm": "a", "of": "fid", "below": "b", "margin": 1}, "unknown entry 'margin'"),
    ({"arm": "a", "of": "fid"}, "one of below, above and near"),
    ({"arm": "a", "of": "fid", "below": "b", "above": "b"}, "one of below, above and near"),
    ({"of": "fid", "below": "b"}, "give arm"),
    ({"arm": "c", "of": "fid", "below": "b"}, "there is no arm 'c'; there are a, b"),
    ({"arm": "a", "of": "fid", "below": "a"}, "with itself"),
    ({"arm": "a", "of": "fib", "below": "b"}, "of = 'fib' is no score"),
    ({"arm": "a", "below": "b"}, "of = None is no score"),
    ({"arm": "a", "of": "fid", "near": "b"}, "near asks for within"),
    ({"arm": "a", "of": "fid", "near": "b", "within": -1}, "near asks for within"),
    ({"arm": "a", "of": "fid", "below": "b", "within": 1}, "near asks for within"),
])  # fmt: skip
def test_claims_that_no_study_could_judge_are_refused(claim, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        claims.check({"x": claim}, ["a", "b"])


def test_curves_are_means_over_seeds_where_all_have_values():
    curves = {0: {"loss": ([4, 8, 12], [3.0, 2.0, 1.0])}, 1: {"loss": ([4, 8], [1.0, 2.0])}}
    assert outcome.mean_curve(curves, "loss") == ([4, 8], [2.0, 2.0], [1.0, 0.0])
    assert outcome.mean_curve(curves, "fid") is None


# --------------------------------------------------------------------------------------------------------- new options


def test_rescaled_residual_sums_are_divided_by_the_root_of_two():
    th.manual_seed(0)
    x, emb = th.randn(2, 32, 4, 4), th.randn(2, 16)
    blocks = (unet.ResBlock, (32, 16, 0.0)), (unet.ResBlock, (32, 16, 0.0, 64)), (unet.AttentionBlock, (32, 2))
    for kind, given in blocks:
        plain, scaled = kind(*given), kind(*given, rescale=True)
        for parameter in plain.parameters():
            parameter.data.normal_()
        scaled.load_state_dict(plain.state_dict())
        given = (x, emb) if isinstance(plain, unet.ResBlock) else (x,)
        assert th.allclose(scaled(*given) * 2**0.5, plain(*given), atol=1e-5)
    base = arms(STUDY + '"x" = { residual_rescale = true }')
    for residual_rescale, arm in ((False, base[0]), (True, base[1])):
        with th.device("meta"):
            net = script_util.build("diffusion", arm.flags())
        blocks = [each for each in net.modules() if isinstance(each, unet.ResBlock | unet.AttentionBlock)]
        assert len(blocks) > 8 and {each.rescale for each in blocks} == {residual_rescale}
    flags = config.defaults(ClassifierOptions) | {"classifier_residual_rescale": True}
    with th.device("meta"):
        net = script_util.build("classifier", flags)
    assert all(each.rescale for each in net.modules() if isinstance(each, unet.ResBlock | unet.AttentionBlock))


def test_a_checkpoint_opens_with_the_options_that_only_its_config_tells(tmp_path):
    flags = arms(STUDY + '"x" = { residual_rescale = true, learn_sigma = true, learned_variance = "free" }')[1].flags()
    net, diffusion = script_util.create_model_and_diffusion(**flags)
    assert diffusion.model_var_type == ModelVarType.LEARNED
    checkpoint.save(net.state_dict(), str(tmp_path / "model000001.pt"))
    checkpoint.write_config(str(tmp_path), "diffusion", flags)
    opened, diffusion, found = script_util.open_diffusion(str(tmp_path / "model000001.pt"))
    assert found == flags and diffusion.model_var_type == ModelVarType.LEARNED and opened.middle_block[0].rescale
    with pytest.raises(ValueError, match="--learned_variance free has no effect without --learn_sigma True"):
        script_util.process_of(flags | {"learn_sigma": False})
    usual = script_util.process_of(flags | {"learned_variance": "range"})
    assert usual.model_var_type == ModelVarType.LEARNED_RANGE


def test_a_freely_learned_variance_is_what_the_network_says():
    flags = config.defaults(DiffusionOptions) | {"learn_sigma": True, "learned_variance": "free"}
    diffusion = script_util.process_of(flags)
    x = th.randn(2, 3, 4, 4)
    said = th.full((2, 3, 4, 4), -3.0)
    found = diffusion.p_mean_variance(lambda x, t: th.cat([x, said], 1), x, th.tensor([5, 900]))
    assert (found["log_variance"] == -3).all() and th.allclose(found["variance"], th.full_like(x, math.exp(-3)))


def test_the_words_of_an_arm_are_those_of_a_command_line():
    assert ablation.words({"lr": 1e-3, "class_cond": True, "prompts": ["a b", "c"]}) == [
        "--lr", "0.001", "--class_cond", "True", "--prompts", "a b", "c"]  # fmt: skip
    args = config.parse("", *ablation.GROUPS["train"], argv=["--seed", "3", "--dropout", "0.0", "--lr", "0.5"])
    assert ablation.chosen(args) == {"lr": 0.5}
