"""README and docs say what runs: every command and every block of Python in them is run here, at tiny size."""

import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

from evaluations import claims, intervals, paired
from guided_diffusion import ablation

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "datasets" / "README.md"]

# From the sizes in the text to sizes that take seconds. Names of files shrink with the counts in them.
TINY = [
    (r"--(iterations|save_interval) (\d)000\b", r"--\1 \2"),
    (r"--save_interval 100\b", "--save_interval 1"),
    (r"_?00(\d)000\.pt", lambda m: m[0].replace(f"00{m[1]}000", f"00000{m[1]}")),
    (r"--num_samples 100\b", "--num_samples 6"),
    (r"samples_500x", "samples_20x"),
    (r"samples_100x", "samples_6x"),
    (r"--batch_size \d+", "--batch_size 4"),
    (r"--timestep_respacing (ddim)?\d+", r"--timestep_respacing \g<1>5"),
    (r"(datasets/mnist.py .*)", r"\1 --source tiny_mnist.npz"),
    (r"scripts/mnist\.py", "scripts/mnist.py --judge_iterations 1 --num_samples 20 --steps 3 --seeds 1 --scales 2"
                           " --iterations 2"),  # what is typed in the text comes later and wins
    (r"187500", "000001"),
    (r"--preset fashion-mnist", "--preset fashion-mnist --iterations 1 --batch_size 4 --num_workers 0"),
    (r"ema_0.9999_(078000|058500|156200)", "ema_0.9999_000001"),
    (r"(--model_path runs/fashion)", r"--prior_steps 3 \1"),
    (r"--val_count \d+", "--val_count 9"),
    (r"(datasets/cifar10.py .*)", r"\1 --source tiny_cifar"),
    (r"--num_channels 128", "--num_channels 32"),
    (r"--num_images \d+", "--num_images 3"),
    (r"latents_64x", "latents_3x"),
    (r"--steps \d{2,3}\b(?!,)", "--steps 6"),
    (r"--samplers ddpm,dpmpp_2m --steps 10,25 --scales 1,3,6", "--samplers dpmpp_2m --steps 3 --scales 0,3"),
    (r"--num_samples 500\b", "--num_samples 20"),
    (r"samples/ddpm_scale_6\b", "samples/ddpm_scale_0"),
    (r"--walks ddpm:250,ddim:25 (.*) --batch_size 4",
     r"--walks ddim:3 --scales 2 --free_scales 2 --levels 2 --level_images 20 \1"),
    (r"(?<=\n)seeds = .*", "seeds = [0]"),  # of a study file
    (r"(?<=\n)(images|samples|iterations|batch_size) = \d+", lambda m: TINY_STUDY[m[1]]),
]
TINY_STUDY = {name: f"{name} = {n}" for name, n in
              {"images": 8, "samples": 10, "iterations": 1, "batch_size": 4}.items()}  # fmt: skip
DEMO = ("python scripts/demo.py --iterations 2 --classifier_iterations 1 --num_samples 20 --steps 4 --scales 0,3"
        " --ddim_scales 3")  # fmt: skip


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path):
    return [line for block in blocks(path, "bash") for line in block.splitlines() if line.strip()]


def tiny(command):
    for pattern, replacement in TINY:
        command = re.sub(pattern, replacement, command)
    return command


def shell(command, folder):
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like a fresh clone to the commands."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "datasets", "evaluations", "docs"):
        os.symlink(ROOT / name, folder / name)
    rng = np.random.default_rng(0)
    made = {f"x_{split}": rng.integers(0, 256, (80, 28, 28), np.uint8) for split in ("train", "test")}
    np.savez(folder / "tiny_mnist.npz", **made, y_train=np.arange(80) % 10, y_test=np.arange(80) % 10)
    write_downloads(folder, rng)
    return folder


def write_downloads(folder, rng):
    """Small ones of the files that the page on data sets begins with."""
    (folder / "tiny_cifar").mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / "tiny_cifar" / name).write_bytes(b"".join(bytes([y]) + rng.bytes(3072) for y in range(10)))
    batches = folder / "downloads" / "imagenet64"
    batches.mkdir(parents=True)
    (batches.parent / "map_clsloc.txt").write_text("n02 1 kit_fox\nn01 2 English_setter\n")
    for name in ("train_data_batch_1", "val_data"):
        np.savez(batches / f"{name}.npz", data=rng.integers(0, 256, (2, 12288), np.uint8), labels=[1, 2])
    with contextlib.suppress(ImportError):
        import lmdb

        picture = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(picture, "webp")
        path = str(batches.parent / "bedroom_train_lmdb")
        with lmdb.open(path, map_size=2**20) as base, base.begin(write=True) as writing:
            writing.put(b"key", picture.getvalue())


def test_the_demo_and_every_command_of_the_readme(clone):
    said = shell(DEMO, clone)
    assert "report: runs/demo/report.md" in said
    report = (clone / "runs/demo/report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert len(pictures) == 9 and all((clone / "runs/demo" / picture).stat().st_size > 3000 for picture in pictures)
    assert report.count("\n| DDPM 4 |") == 2 and report.count("\n| DDIM 2 |") == 1

    said = shell("python scripts/toy.py --points 30 --scales 0,4", clone)
    table = [line.split() for line in said.splitlines()[1:-1]]
    assert [row[:2] for row in table] == [[n, s] for n in ("ddpm", "ddim", "heun", "dpmpp_2m") for s in ("0", "4")]
    assert all(float(row[2][:-1]) == 100 for row in table if row[:2] in (["ddim", "4"], ["dpmpp_2m", "4"]))
    assert (clone / "runs/toy/toy.png").stat().st_size > 10000

    ran = 0
    for command in commands(ROOT / "datasets" / "README.md") + commands(ROOT / "README.md"):
        if command.startswith("make "):
            subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, check=True, capture_output=True)
        elif "lsun" not in command or importlib.util.find_spec("lmdb"):
            shell(tiny(command), clone)
            ran += 1
    assert ran == 17 + bool(importlib.util.find_spec("lmdb"))
    assert (clone / "runs/digits/model000004.pt").exists()  # resumed at 2 and gone on to 4
    assert (clone / "runs/digits_guided/samples_6x8x8x1.npz").exists()
    assert (clone / "runs/digits_mpi/model000002.pt").exists() and (clone / "runs/demo/scale_3.json").exists()


def test_every_command_of_the_mnist_page(clone):
    ran = [shell(tiny(command), clone) for command in commands(ROOT / "docs" / "mnist.md")]
    assert len(ran) == 5 and ran[1].count("report: ") == ran[2].count("report: ") == 1
    for name in ("runs/mnist", "runs/mnist16"):
        report = (clone / name / "report.md").read_text()
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", report)
        assert len(pictures) == 7 and all((clone / name / picture).stat().st_size > 3000 for picture in pictures)
        assert len(re.findall(r"^\| (real, held out|2) \|", report, re.MULTILINE)) == 2
    assert (clone / "runs/diffunet_samples/samples_32x32x32x1.npz").exists()


def test_every_command_of_the_page_on_captions(clone):
    for command in commands(ROOT / "docs" / "captions.md"):
        shell(tiny(command), clone)
    assert (clone / "runs/prompts/samples_6x8x8x1.npz").exists()


def test_every_command_of_the_page_on_text_to_image(clone, monkeypatch):
    """In this process, since there are many; without the package for it those for other encoders are left out."""
    from test_programs import done

    page = [tiny(command) for command in commands(ROOT / "docs" / "text_to_image.md")]
    assert len(page) == 20 and sum("foreign" in command for command in page) == 3
    drawn = {"from_text": 6, "variations": 6, "between": 16, "large_from_text": 6}
    if importlib.util.find_spec("transformers"):
        from test_hugging_face import save

        save(clone / "downloads" / "clip-vit-base-patch32")
        drawn["foreign"] = 6
    else:
        page = [command for command in page if "foreign" not in command]
    monkeypatch.chdir(clone)
    for command in page:
        _, program, words = command.split(" ", 2)
        if program.startswith("scripts/"):
            done(Path(program).stem, words)
        else:
            shell(command, clone)
    for name, count in drawn.items():
        assert (clone / "runs" / name / f"samples_{count}x8x8x1.npz").exists()
    assert (clone / "runs/from_text/samples_6x8x8x1_frames.png").exists()
    assert (clone / "runs/large_from_text/enlarged/samples_6x16x16x1.npz").exists()
    assert (clone / "runs/fashion/samples_6x32x32x1.npz").exists()


def test_every_command_of_the_page_on_training(clone):
    ran = [shell(tiny(command), clone) for command in commands(ROOT / "docs" / "training.md")]
    examined, first, second, averaged, drawn, told = ran[1:]
    assert "bottleneck: " in examined and "remembered in runs/long/doctor.json" in examined and len(ran) == 7
    assert "going on from" not in first and "going on from runs/long/model000001.pt at update 1" in second
    assert averaged.count("relative error of the profile") == 2 and "samples_6x8x8x1.npz" in drawn
    assert "start 2: " in told and "changed   iterations 1 -> 2" in told and "data are as they were" in told
    assert not (clone / "runs/long_replay").exists()


def test_every_command_of_the_page_on_guidance(clone):
    ran = [shell(tiny(command), clone) for command in commands(ROOT / "docs" / "guidance.md")]
    assert len(ran) == 6
    for name in ("scale_2", "interval", "autoguided"):
        assert (clone / "runs" / name / "samples_6x8x8x1.npz").exists()


def test_every_command_of_the_page_on_checkpoints(tmp_path):
    for name in ("scripts", "datasets"):
        os.symlink(ROOT / name, tmp_path / name)
    page = ROOT / "docs" / "checkpoints.md"
    ran = [shell(tiny(command), tmp_path) for command in commands(page)]
    assert len(ran) == 8 and "read off its tensors: " in ran[3]
    assert (tmp_path / "runs/known_samples/samples_6x8x8x1.npz").exists()
    assert (tmp_path / "runs/back/config.json").exists() and (tmp_path / "runs/known_diffusers/unet").is_dir()
    with pytest.raises(AssertionError) as error:
        shell("python scripts/image_sample.py --model_path runs/unknown/x.pt --log_dir runs/none", tmp_path)
    quoted = " ".join(line[2:] for line in page.read_text().splitlines() if line.startswith("> "))
    assert quoted in str(error.value)


def test_the_table_of_published_models_is_that_of_the_presets():
    from guided_diffusion.presets import PRESETS

    page = (ROOT / "docs" / "checkpoints.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| (\w+\.pt) \| (.*?) ?\| (.*) \|$", page, re.MULTILINE)
    told = {name: (file, scale, *rest.split(" | ")) for name, file, scale, rest in rows}
    scored = {name: preset for name, preset in PRESETS.items() if preset.fid}
    assert told == {
        name: (p.file, str(p.scale or ""), p.steps, f"{p.fid:.2f}", f"{p.precision:.2f}", f"{p.recall:.2f}")
        for name, p in scored.items()
    }


def test_every_command_of_the_page_on_evaluation(tmp_path):
    for name in ("scripts", "datasets", "evaluations"):
        os.symlink(ROOT / name, tmp_path / name)
    ran = [shell(tiny(command), tmp_path) for command in commands(ROOT / "docs" / "evaluation.md")]
    assert len(ran) == 8 and "a reference file of this project" in ran[3]
    alone, together = (dict(line.split(": ") for line in said.splitlines() if ": " in line) for said in ran[4:6])
    assert list(alone) == ["FID", "Precision", "Recall", "Density", "Coverage", "KID"]
    numbers = {name: float(value) for name, value in alone.items()}
    assert {name: float(value) for name, value in together.items()} == pytest.approx(numbers, rel=1e-8)
    assert (tmp_path / "runs/evaluated_samples/scores.json").exists()


def test_every_command_of_the_page_on_scores(clone):
    if not (clone / "runs/demo/held_out.npz").exists():
        shell(DEMO, clone)
    ran = [shell(tiny(command), clone) for command in commands(ROOT / "docs" / "scores.md")]
    scored, compared, page, swept, remembered = ran
    assert "± standard error" in scored and "95 % interval" in scored
    assert compared.splitlines()[0].split()[-1] == "better"
    assert page == "report: runs/demo/page/report.html\n" and swept.endswith("report: runs/demo/sweep/report.html\n")
    assert "held-out real images closer to a training image" in remembered
    for name, pictures in (("page", 4), ("sweep", 6), ("memorisation", 1)):
        assert (clone / "runs/demo" / name / "report.html").read_text().count("data:image/png") >= pictures


def test_the_commands_of_the_page_on_inverse_problems(tmp_path):
    for name in ("scripts", "datasets"):
        os.symlink(ROOT / name, tmp_path / name)
    for command in commands(ROOT / "docs" / "inverse.md"):
        shell(tiny(command), tmp_path)
    restored = [path.parent.name for path in tmp_path.glob("runs/*/restored.png")]
    inverted = [path.parent.name for path in tmp_path.glob("runs/*/inversion.png")]
    assert sorted(restored) == ["blocks", "halves", "repainted"] and inverted == ["latents"]
    assert (tmp_path / "runs/latents/interpolation.png").exists() and list(tmp_path.glob("runs/decoded/samples_3x*"))


def test_the_page_on_own_images_word_for_word(clone, monkeypatch):
    page = ROOT / "docs" / "own_images.md"
    monkeypatch.chdir(clone)
    exec("\n".join(blocks(page, "python")), {"__name__": "docs"})
    said = [shell(tiny(command), clone) for command in commands(page)]
    assert len(said) == 7 and "61 images in data/pets, labels: sub-folder" in said[0]
    assert (clone / "runs/wide_samples/samples_4x16x32x3.npz").exists()
    assert json.loads((clone / "runs/pets/config.json").read_text())["class_names"] == ["cat", "dog", "eel"]
    assert (clone / "runs/pets_samples/samples_12x16x16x3.png").exists()
    assert "images 61, left out 0, classes 3" in said[4] and "images 61" in said[5]
    assert "61 images in data/pets.npy, labels: pets_labels.npy" in said[6]
    for name in ("model000002.pt", "progress.csv"):
        assert (clone / "runs/pets_packed" / name).exists()
    with np.load(clone / "runs/pets_samples/samples_12x16x16x3.npz") as drawn:
        assert drawn["arr_1"].tolist() == [0, 1, 2] * 4


def test_the_page_on_own_images_says_what_was_measured():
    measured = json.loads((ROOT / "benchmarks" / "results" / "loader.json").read_text())["median"]
    page = (ROOT / "docs" / "own_images.md").read_text()
    for row, name in zip(measured, ("folder of JPEG files", "packed zip", "packed npy")):
        assert f"| {name} | {row['images_per_s']:,.0f} | {row['times_jpeg']:.1f} |" in page
    assert measured[2]["times_jpeg"] >= 10


def test_every_command_of_the_page_on_super_resolution(clone):
    for command in commands(ROOT / "docs" / "super_resolution.md"):
        shell(tiny(command), clone)
    for name in ("enlarged", "cascade"):
        assert {"samples_6x8x8x1.npz", "enlarged.png"} <= set(os.listdir(clone / "runs" / name))
    assert (clone / "runs/bits_nll/nll.png").exists()


def run_in_forks(ran, clone):
    """Run commands of programs in forks of this process, since there are many; what the last one said."""
    for command in ran:
        _, script, *words = shlex.split(tiny(command).replace("--parallel 2", ""))  # forks are one at a time
        (clone / "said.txt").unlink(missing_ok=True)
        assert forked.ended(forked.start(script, words, clone)) == 0, f"{command}\n{(clone / 'said.txt').read_text()}"
    return (clone / "said.txt").read_text()


def test_every_command_of_the_page_on_studies(clone):
    page = ROOT / "docs" / "studies.md"
    (clone / "study.toml").write_text(tiny("\n".join(blocks(page, "toml"))))
    run_in_forks(commands(page), clone)
    rows = (clone / "runs/study/results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows if ",fid," in row] == ["base", "two blocks", "addition", "DDIM"]
    assert (clone / "runs/study/report.html").read_text().count("data:image/png") == 5
    claimed = json.loads((clone / "runs/study/results.json").read_text())["claims"]
    assert [each["claim"] for each in claimed] == ["two blocks lower the distance", "DDIM costs nothing"]
    assert len(list(clone.glob("runs/guidance_curve/cases/*/scores.json"))) == 4


def test_every_command_of_the_page_on_reproduction(clone):
    """The studies that ship are planned only; the networks of the curve are those of the page on studies."""
    if not (clone / "runs/study_judge").exists():
        run_in_forks([each for each in commands(ROOT / "docs" / "studies.md") if "ablate" not in each], clone)
    for command in commands(ROOT / "docs" / "reproduction.md"):
        if command.startswith("make "):
            done = subprocess.check_output(shlex.split(command.replace("make", "make -n")), cwd=ROOT, text=True)
            ran = re.findall(r"^\.venv/bin/(python (?:datasets|scripts)/.*)", done, re.MULTILINE)
            assert [line.split()[1] for line in ran] == ["datasets/digits.py", "scripts/ablate.py"]
        else:
            ran = [command]
        ran = [f"{line} --run False --estimate False" if "ablate" in line else line for line in ran]
        said = run_in_forks(ran, clone)
        if command == "make reproduce-small":
            assert "11 arms x 5 seeds: 131 pieces of work, of which 0 are done" in said


RECORDED = {path.parent.name: path for path in sorted((ROOT / "docs/reproduction").glob("*/results.json"))}


@pytest.mark.parametrize("name", RECORDED)
def test_the_page_on_reproduction_says_what_the_recorded_studies_found(name):
    """Each verdict follows from the recorded scores and the claims as they stand in the study's file."""
    path = RECORDED[name]
    found, page = json.loads(path.read_text()), (ROOT / "docs" / "reproduction.md").read_text()
    written = ablation.read(path.parent.with_suffix(".toml"))
    judged = claims.judged(written["claims"], {arm["name"]: arm["scores"] for arm in found["arms"]})
    assert judged == found["claims"] and judged
    for row in claims.table(judged).rows:
        assert f"| {' | '.join(row)} |" in page
    assert [arm["name"] for arm in found["arms"]] == ["base", *written["arms"]]
    for arm in found["arms"]:
        assert set(arm["scores"]["fid"]) == set(map(str, written["seeds"])) and not arm["failed"]
    for each in judged:
        low, high = (each["finding"][end] for end in ("low", "high"))
        if "near" not in each and low <= 0 <= high:
            assert each["verdict"] == "not decidable"


def test_the_page_on_reproduction_has_the_recorded_distances_of_schedules():
    page = (ROOT / "docs" / "reproduction.md").read_text()
    arms = ["linear", "cosine, half the noise", "base", "cosine, twice the noise", "cosine, four times the noise"]
    for size in (8, 16):
        found = {arm["name"]: arm for arm in json.loads(RECORDED[f"schedules_{size}"].read_text())["arms"]}
        shown = [paired.texts(found[arm]["compared"]["fid"]["mean"])[0] for arm in arms]
        assert f"| {size}x{size} | {' | '.join(shown)} |" in page


def test_the_page_on_reproduction_has_the_recorded_curve_of_guidance():
    page = (ROOT / "docs" / "reproduction.md").read_text()
    with open(ROOT / "docs/reproduction/guidance_curve/results.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    cases = {}
    for row in lines:
        case = row["kind"], f"{row['sampler']} {row['steps']}", f"{float(row['scale']):g}"
        error = float(row["standard_error"] or "nan")
        cases.setdefault(case, {})[row["score"]] = intervals.shown(float(row["value"]), error)
    assert len(cases) == 28
    for case, scores in cases.items():
        shown = [scores[name] for name in ("fid", "precision", "recall", "label_agreement")]
        assert f"| {' | '.join([*case, *shown])} |" in page


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_the_docs_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(path, "python")
    if found:
        exec(compile("\n".join(found), str(path), "exec"), {"__name__": "docs"})
    assert found or path.name in ("training.md", "differences.md", "super_resolution.md", "speed.md",
                                      "reproduction.md")  # fmt: skip


def test_links_lead_somewhere():
    for path in DOCS:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} points to {target}"


def test_every_statement_about_the_original_has_a_test_or_a_reason():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    numbers = re.findall(r"def test_s08_(\w+)", tests)
    tested = {int(n) for name in numbers for n in re.findall(r"(?:^|_(?:and_)?)(\d\d)(?=_)", name)}
    differences = (ROOT / "docs" / "differences.md").read_text()
    explained = {int(n) for n in re.findall(r"^\| (\d\d?) \|", differences, re.MULTILINE)}
    assert sorted(set(range(1, 66)) - tested - explained) == []


def test_every_flag_that_the_docs_name_exists():
    import dataclasses

    from test_config import MODULES

    known = {field.name for module in MODULES for group in vars(module).values() if dataclasses.is_dataclass(group)
             for field in dataclasses.fields(group)}  # fmt: skip
    foreign = {"help", "nproc_per_node", "extractor", "out", "weights", "image_size", "val_fraction", "device",
               "source", "fashion", "data", "network", "scales", "seeds", "gpus", "ntasks", "requeue",
               "signals", "cache", "k", "density_k", "distances", "splits", "split_size", "shuffle", "resize", "dtype",
               "keep", "reference", "no_errors", "per_class", "anyway", "held_out", "samplers", "emas", "more", "count",
               "allow_other_weights", "templates", "hold_out", "vectors", "encoder", "judge", "strips", "demo",
               "hundred", "png", "map", "checksum", "prefix", "class_texts", "val_out", "val_count", "run", "price",
               "devices", "parallel", "equal_cost", "walks", "free_scales", "uncond_path", "recorded"}  # fmt: skip
    for path in DOCS:
        named = set(re.findall(r"(?<![\w-])--([a-z_][a-z_0-9]*)", path.read_text()))
        assert named <= known | foreign, f"{path.name}: {named - known - foreign}"
