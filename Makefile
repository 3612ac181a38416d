# make demo   install into .venv, train a small network, and do the main job on its snapshots
# make test   install into .venv, then lint, type-check and run every test, with coverage
# make soak   the long tests: kills, full disks, 10,000 hostile files (half an hour)
# make docs   write docs/commands.md and the README's picture anew from the program
# make bench  measure synthesize beside other tools, in a temporary folder (30 GB, an hour)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# A target and a stamp: the environment is made anew when what it should hold changes.
INSTALLED = $(VENV)/.installed

.PHONY: demo test soak docs bench clean

demo: $(INSTALLED)
	rm -rf build/demo
	mkdir -p build
	$(BIN)/posthoc demo build/demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n auto --cov

soak: $(INSTALLED)
	$(BIN)/python -m pytest -q -n auto -m hypothesis --hypothesis-profile=search
	$(BIN)/python -m tests.soak

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

bench: $(INSTALLED)
	$(BIN)/python tests/benchmarks/speed.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
