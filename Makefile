# Two commands do all the set-up: `make demo` and `make test`. Both create .venv and use it.
PYTHON ?= python3
BIN := .venv/bin
# Two processes that take a file of tests at a time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-text toy reproduce-small test test-all lint clean

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,mpi]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps 'torch-fidelity==0.4.0'
	touch $@

toy: .venv/installed
	$(BIN)/python scripts/toy.py

demo: .venv/installed
	$(BIN)/python scripts/demo.py

demo-text: .venv/installed
	$(BIN)/python scripts/demo_text.py

# One whole study on two cores, within the hour (docs/reproduction.md): guidance, or STUDY=architecture, steps, samplers.
STUDY ?= guidance
reproduce-small: .venv/installed
	$(BIN)/python datasets/digits.py data/digits
	$(BIN)/python scripts/ablate.py docs/reproduction/$(STUDY).toml --parallel 2

test: .venv/installed
	$(PYTEST)

test-all: .venv/installed
	$(PYTEST) -m 'slow or not slow'

lint: .venv/installed
	$(BIN)/ruff check .

clean:
	rm -rf .venv runs *.egg-info .pytest_cache .ruff_cache
