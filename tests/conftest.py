"""One thread a process, since tiny tensors gain nothing from more; and the long files first, for processes that share.

`make test` gives whole files to two processes. Whoever takes a file of minutes last keeps the other one waiting.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

LONG = [f"test_{name}.py" for name in ("docs", "world", "programs", "sharding", "replay", "evaluations")]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
