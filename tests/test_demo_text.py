"""The demo from text to image at tiny size, its programs in this process: that it ends in a whole report."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from test_programs import done, script

from guided_diffusion import study

ROOT = Path(__file__).parent.parent
TINY = (
    "--clip_iterations 2 --prior_iterations 2 --decoder_iterations 2 --judge_iterations 2 --num_samples 20 --steps 2"
    " --prior_steps 2 --scales 0,2 --prior_scales 1"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo_text")

    def run(self, program, *words):
        self.commands.append((program, 0.0))
        words = list(map(str, words))
        if program.startswith("scripts/"):
            done(Path(program).stem, shlex.join(words))
            return
        spec = importlib.util.spec_from_file_location(Path(program).stem, ROOT / program)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program, *words])
            module.main()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.Study, "run", run)
        patch.setattr(sys, "argv", ["demo_text.py", "--out", str(out), *TINY.split()])
        script("demo_text").main()
    return out


def test_the_report_has_its_pictures_and_a_row_for_each_run(demo):
    report = (demo / "report.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert len(shown) == 6 and all((demo / picture).stat().st_size > 1000 for picture in shown)
    rows = [line for line in report.splitlines() if re.match(r"\| (trained|held out) \|", line)]
    table = json.loads((demo / "scores.json").read_text())
    assert len(rows) == len(table) - 2 == 7  # beside the real digits and their variations
    assert len(re.findall(r"^- (trained|held out) phrasings", report, re.MULTILINE)) == 3  # with the prior and without


def test_samples_are_judged_by_the_digit_of_their_text(demo):
    words = script("demo_text").WORDS
    for path in sorted((demo / "samples").glob("0*/labelled.npz")):
        with np.load(path) as npz:
            for text, digit in zip(npz["texts"], npz["arr_1"]):
                assert re.search(rf"\b({digit}|{words[digit]})\b", text)


def test_held_out_phrasings_are_shown_to_no_network(demo):
    with np.load(demo / "data" / "train.npz") as npz:
        trained, apart = set(npz["texts"].ravel().tolist()), set(npz["held_out"].tolist())
    assert len(trained) == 200 and len(apart) == 40 and not trained & apart
    prompts = (demo / "prompts_held_out.txt").read_text().splitlines()
    assert set(prompts) == apart
