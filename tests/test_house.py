"""The plan of the house: who may import whom, and nothing said twice."""

import ast
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "guided_diffusion"

# Each line may import what stands to the left of it or on earlier lines of its part; machinery may import anything
# above it. Mathematics and networks never meet below the machinery.
MATHEMATICS = [
    "schedules",
    "process",
    "prediction spacing",
    "solvers",
    "sampling guidance losses resample",
    "gaussian_diffusion inverse likelihood",
    "respace toy sigma",
]
NETWORKS = ["nn", "conditions", "unet film_unet", "reuse compiling layouts"]
MACHINERY = [
    "toy_models arrays presets tensor_files signals pace decoding byte_formats labels",
    "archives config",
    "sources sizes training_options",
    "network_options sampling_options pictures image_datasets download text",
    "checks diffunet super_res",
    "checkpoint recognition",
    "published dist_util",
    "sharding",
    "logger saves ema health memory",
    "fp16_util generate tally tasks runs",
    "identify sample_store",
    "train_util script_util watch",
    "diffusers_format",
    "convert",
    "program study rehearsal kept probe",
    "doctor ablation",
    "recipes feasible",
]
LIBRARIES = {"numpy", "torch"}  # of mathematics and networks, beside the standard library
LIGHT = [*MATHEMATICS, *NETWORKS, "toy_models"]  # what needs no other


# The same of the sub-package: files that need only torch and these rooms, and then the machinery of the cascade.
CASCADE = PACKAGE / "text_to_image"
CASCADE_NETWORKS = ["tokenizer", "transformer", "clip prior", "decoder"]
CASCADE_MACHINERY = ["hugging_face", "models", "tasks", "pipeline", "training prompting"]
CASCADE_NEEDS = {"nn", "conditions", "unet", "guidance"}


def imports(path):
    """(modules of this package, other top-level modules) that a file imports anywhere; of a sub-package, its own."""
    ours, others, _ = all_imports(path)
    return ours, others


def all_imports(path):
    """(modules of the same package, other top-level modules, modules of the package above) that a file imports."""
    ours, others, above = set(), set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = {node.module} if node.module else {alias.name for alias in node.names}
            (ours if node.level == 1 else above).update(names)
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
    return ours, others, above


def allowed(name):
    everything_below = set(" ".join(MATHEMATICS + NETWORKS).split())
    for part, below in ((MATHEMATICS, set()), (NETWORKS, set()), (MACHINERY, everything_below)):
        for line in part:
            if name in line.split():
                return below
            below = below | set(line.split())
    raise AssertionError(f"{name} has no room in the plan: give it one")


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_arrows(path):
    ours, others = imports(path)
    assert ours <= allowed(path.stem), f"{path.stem} may not import {ours - allowed(path.stem)}"
    if path.stem in " ".join(LIGHT).split():
        foreign = others - LIBRARIES - sys.stdlib_module_names
        # A progress bar is asked for by the caller and imported only then.
        assert foreign <= ({"tqdm"} if path.stem == "gaussian_diffusion" else set())


def test_arrows_of_the_cascade():
    """Its networks know torch and networks; its machinery may know all else, but nothing else knows it."""
    below = set()
    for line in CASCADE_NETWORKS + CASCADE_MACHINERY:
        for name in line.split():
            ours, others, above = all_imports(CASCADE / f"{name}.py")
            assert ours <= below, f"{name} may not import {ours - below}"
            if line in CASCADE_NETWORKS:
                assert above <= CASCADE_NEEDS and others - LIBRARIES <= sys.stdlib_module_names
            # What is optional is imported where a folder of such a model is opened.
            assert "transformers" not in others or name == "hugging_face"
        below |= set(line.split())
    assert below == {path.stem for path in CASCADE.glob("[!_]*.py")}
    for path in PACKAGE.glob("*.py"):
        assert "text_to_image" not in path.read_text(), f"{path.stem} looks up to the cascade"


def test_evaluations_know_the_project_through_one_door():
    for path in (ROOT / "evaluations").glob("*.py"):
        assert not imports(path)[0]
        for node in ast.parse(path.read_text()).body:  # at module level
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("guided_diffusion") for name in names)
        if path.name != "door.py":
            assert "guided_diffusion" not in imports(path)[1]


def test_importing_the_network_costs_only_torch():
    code = "import sys, torch; before = set(sys.modules); import guided_diffusion.unet, guided_diffusion.toy;"
    code += "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(out.stdout)) - sys.stdlib_module_names <= {"guided_diffusion", "torch", "numpy"}


def test_nothing_stands_twice():
    seen = defaultdict(list)
    for path in [*PACKAGE.glob("**/*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "evaluations").glob("*.py")]:
        lines = [line.strip() for line in path.read_text().splitlines()]
        kept = [line for line in lines if line and not line.startswith(("#", "from ", "import "))]
        for i in range(len(kept) - 5):
            block = "\n".join(kept[i : i + 6])
            if sum(any(c.isalnum() for c in line) for line in kept[i : i + 6]) == 6:
                seen[block].append(path.name)
    repeats = {block: names for block, names in seen.items() if len(names) > 1}
    assert not repeats, "\n\n".join(f"{names}\n{block}" for block, names in repeats.items())


def test_functions_are_short_enough_to_read_beside_the_paper():
    """The mathematics, where the original has one of 190 lines: none above 60, half of them at most 12."""
    lengths = []
    paths = [PACKAGE / f"{name}.py" for name in " ".join(MATHEMATICS).split()]
    for path in paths + list(CASCADE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
    assert max(lengths) <= 60 and sorted(lengths)[len(lengths) // 2] <= 12


def test_a_plain_pip_install_installs_the_code(tmp_path):
    """The original's setup.py installed metadata only."""
    tree = tmp_path / "tree"
    wanted = ["setup.py", "pyproject.toml", "README.md", "guided_diffusion", "evaluations"]
    for name in wanted:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        tree.mkdir(exist_ok=True)
        copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(tree)], check=True, capture_output=True)
    installed = {path.name for path in (tmp_path / "site").iterdir() if path.suffix != ".dist-info"} - {"bin"}
    assert installed == {"guided_diffusion", "evaluations"}  # `datasets` and `scripts` would hide other packages
    found = (tmp_path / "site" / "guided_diffusion").glob("**/*.py")
    assert sorted(path.name for path in found) == sorted(path.name for path in PACKAGE.glob("**/*.py"))
