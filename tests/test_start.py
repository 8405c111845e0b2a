"""What starting costs: --help is answered before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_programs import script

from guided_diffusion import diffunet

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
HEAVY = {"torch", "numpy", "PIL", "matplotlib", "sklearn"}
# Runs every script named as a program that is asked for --help, one after the other, and tells what that imported.
ASK = """
import contextlib, io, runpy, sys
for path in sys.argv[1:]:
    sys.argv, before, said = [path, "--help"], set(sys.modules), io.StringIO()
    code = None
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = end.code
    print(path, code, len(said.getvalue()), *sorted({name.split(".")[0] for name in sys.modules}), flush=True)
"""


def test_help_is_answered_before_torch_is_imported():
    command = [sys.executable, "-c", ASK, *map(str, SCRIPTS)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert len(told) == len(SCRIPTS)
    for line in told:
        _, code, length, *modules = line.split()
        assert code == "0" and int(length) > 300 and not HEAVY & set(modules), line


def test_networks_that_a_program_names_without_importing_them():
    options = script("mnist").MnistOptions.__dataclass_fields__["network"].metadata["choices"]
    assert options == ("small", *diffunet.FLAGS)


@pytest.mark.parametrize("words", ["--help --seed x", "--help --no_such_flag 1"])
def test_a_wrong_line_with_help_is_answered_all_the_same(words):
    """argparse answers --help as soon as it meets it."""
    command = [sys.executable, str(ROOT / "scripts" / "image_sample.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--num_samples" in done.stdout


def test_an_error_before_help_is_one_line():
    command = [sys.executable, str(ROOT / "scripts" / "toy.py"), "--seed", "x", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "whole number expected" in done.stderr
