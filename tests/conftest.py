"""One thread a process, since tiny tensors gain nothing from more; and the long files first, for processes that share.

`make test` gives whole files to two processes. Whoever takes a file of minutes last keeps the other one waiting.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

LONG = [f"test_{name}.py" for name in ("docs", "world", "programs", "sharding", "replay", "evaluations")]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A file of random weights of the Inception network, scaled so that activations keep their size through it."""
    torch = pytest.importorskip("torch")
    from evaluations.inception import Inception

    weights = Inception().state_dict()
    generator = torch.Generator().manual_seed(0)
    for key, value in weights.items():
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() >= 2:
            weights[key] = noise * (2 / value[0].numel()) ** 0.5
        elif "bn" in key:
            weights[key] = 0.1 * noise + key.endswith(("weight", "running_var"))
        else:
            weights[key] = noise  # the bias of the last layer
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(weights, file)
    return file


@pytest.fixture(scope="session")
def inception(inception_file):
    """The extractor with these weights."""
    from evaluations.features import InceptionExtractor

    return InceptionExtractor(inception_file, allow_other_weights=True)
