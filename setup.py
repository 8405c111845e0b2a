from pathlib import Path

from setuptools import setup

DEV = ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.6", "scikit-learn>=1.3", "tensorboard>=2.14", "safetensors>=0.4"]
DEV += ["diffusers>=0.30", "lmdb>=1.4", "transformers>=5"]
EVAL = ["torch-fidelity>=0.4", "torchvision"]  # DINOv2 and CLIP features; pin torch beside it, or pip exchanges it
MPI = ["mpi4py>=4", "mpich>=4"]

setup(
    name="guided-diffusion",
    version="2.0.0",
    description="Train, guide, sample and score image diffusion models: guided-diffusion (ADM) reborn.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    # `datasets` and `scripts` stay programs beside the package: as installed names they would hide other packages.
    packages=["guided_diffusion", "guided_diffusion.text_to_image", "evaluations"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "numpy>=1.24",
        "scipy>=1.11",
        "blobfile>=2.0",
        "tqdm>=4.60",
        "Pillow>=9.1",
        "matplotlib>=3.7",
        "tomli>=2; python_version < '3.11'",  # what Python 3.11 has as tomllib
    ],
    extras_require={"mpi": MPI, "eval": EVAL, "demo": ["scikit-learn>=1.3"], "lmdb": ["lmdb>=1.4"],
                    "transformers": ["transformers>=5"], "dev": DEV},
)
