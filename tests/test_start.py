"""What starting costs: --help is answered before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_programs import script

from guided_diffusion import diffunet

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
PROGRAMS = [*SCRIPTS, *sorted((ROOT / "datasets").glob("*.py")), "guided_diffusion.doctor"]
PROGRAMS += [ROOT / "evaluations" / f"{name}.py" for name in
             "compare evaluator inspect_file make_reference memorisation report".split()]  # fmt: skip
HEAVY = {"torch", "numpy", "scipy", "PIL", "matplotlib", "sklearn"}
# Runs each script or module as a program that is asked for --help, in turn, and tells what that imported.
ASK = """
import contextlib, io, runpy, sys
for path in sys.argv[1:]:
    sys.argv, before, said = [path, "--help"], set(sys.modules), io.StringIO()
    code = None
    with contextlib.redirect_stdout(said):
        try:
            run = runpy.run_path if path.endswith(".py") else runpy.run_module
            run(path, run_name="__main__")
        except SystemExit as end:
            code = end.code
    print(path, code, len(said.getvalue()), *sorted({name.split(".")[0] for name in sys.modules}), flush=True)
"""


def test_help_is_answered_before_torch_is_imported():
    command = [sys.executable, "-c", ASK, *map(str, PROGRAMS)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert len(told) == len(PROGRAMS)
    for line in told:
        _, code, length, *modules = line.split()
        assert code == "0" and int(length) > 200 and not HEAVY & set(modules), line


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


def test_choices_that_the_evaluator_names_without_importing_them():
    from evaluations import features, inception, neighbours, options, protocol

    assert tuple(inception.RESIZES) == options.RESIZES and tuple(features.DTYPES) == options.DTYPES
    assert protocol.VERSION == 1 and neighbours.rule_of(options.Settings().distances, 8).name == "float32"
    with pytest.raises(ValueError, match="distances are 'float8'; choose one of float32, float64, float16"):
        options.Settings(distances="float8")
