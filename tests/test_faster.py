"""What docs/faster.md names is there: options, files, names of the code."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

from guided_diffusion import config
from guided_diffusion.network_options import ModelOptions
from guided_diffusion.sampling_options import ClassifierSampleOptions, SampleOptions
from guided_diffusion.training_options import TrainOptions

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "faster.md").read_text(encoding="utf-8")
FLAGS = sorted(set(re.findall(r"(?<![\w-])--([a-z_][a-z_0-9]*)", TEXT)) - {"help"})

DRAWN = SampleOptions, ClassifierSampleOptions, ModelOptions, config.RunOptions
TRAINED = TrainOptions, ModelOptions, config.RunOptions


def flags_of(*groups):
    return {field.name for group in groups for field in dataclasses.fields(group)}


def test_every_option_exists():
    """In a program that trains or draws, or in the evaluator's own."""
    from evaluations import evaluator

    scored = vars(evaluator.parse(["reference.npz", "sample.npz"]))
    drawn, trained = flags_of(*DRAWN), flags_of(*TRAINED)
    assert {"channels_last", "compile", "reuse_every", "checkpoint_levels", "dtype"} <= set(FLAGS)
    assert [name for name in FLAGS if name not in drawn | trained | scored.keys()] == []
    assert {"channels_last", "compile", "precision"} <= drawn & trained


def test_what_its_rows_give_is_taken():
    """Each row's option with the value it names, read as the programs read it."""
    from evaluations import evaluator

    rows = re.findall(r"^\| `(--[^`]*)`", TEXT, re.MULTILINE)
    assert len(rows) >= 12
    for words in rows:
        if words.startswith("--dtype"):
            assert evaluator.parse(["a", "b", *words.split()]).dtype == "bfloat16"
        else:
            name = words.split()[0][2:]
            config.parse("", *(DRAWN if name in flags_of(*DRAWN) else TRAINED), argv=words.split())


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(benchmarks/[\w/.]+)`|\]\((\w+\.md)\)", TEXT))))
def test_files_are_there(path):
    benchmark, page = path
    assert (ROOT / benchmark if benchmark else ROOT / "docs" / page).is_file()


def test_names_of_the_code():
    for module, name in set(re.findall(r"`(\w+)\.(\w+)[ =`]", TEXT)):
        module = module if module == "torch" else f"guided_diffusion.{module}"
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_recorded_errors_and_ratios_are_those_of_the_page():
    """Rounded as written there."""
    text, rows = TEXT.replace("\n", " "), json.loads((ROOT / "benchmarks/results/precision.json").read_text())["rows"]
    errors, distances = ([100 * abs(row[name]) for row in rows[1:]] for name in ("pool_error", "frechet_error"))
    assert "bfloat16 were {:.1f} % off, in float16 {:.1f} %".format(*errors) in text
    assert "sets of pictures {:.1f} % and {:.1f} %".format(*distances) in text
    times = [row["ms_per_image"] for row in rows]
    assert f"{times[1]:.0f} ms an image in bfloat16 against {times[0]:.0f} ms in float32" in text
    layouts = json.loads((ROOT / "benchmarks/results/layouts.json").read_text())
    ratios = {what: [row["times_as_fast"]["channels_last"]["median"] for part in layouts.values()
                     for row in part["rows"] if row["what"].endswith(what)] for what in ("evaluation", "both passes")}
    for (first, last), (low, high) in zip(ratios.items(), ((0.83, 1.07), (0.92, 1.01))):
        assert (round(min(last), 2), round(max(last), 2)) == (low, high), first
    errors = [row["error"] for row in layouts["fp32 on cpu"]["rows"]]
    assert max(errors) < 3e-6
