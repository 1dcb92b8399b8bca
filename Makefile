# make report: train the report's three models and write report/index.html       make test: all notebooks and tests
# make lab: the notebooks in JupyterLab      make docs, docs-serve: the site      make outputs: run and store the notebooks
# make lint: ruff      make hooks: git hooks that keep notebooks clean      make clean: remove what was made
# Everything runs in one environment, made on first use: .venv, or the one that VENV names.
# CONSTRAINTS=constraints.txt installs the versions named there, instead of the newest that fit.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CONSTRAINTS ?=
META := settings.ini setup.py pyproject.toml $(CONSTRAINTS)
# Python compiles a module when it is first imported; not to compile all 20,000 now saves a newcomer time.
PIP := $(BIN)/python -m pip install --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# Arguments for cifar_report, such as make report ARGS="--seeds 0 1 2"
ARGS ?=

.PHONY: report test lint lab hooks outputs docs docs-serve clean

report: $(VENV)/.installed
	$(BIN)/cifar_report $(ARGS)

test: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/run.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check

lab: $(VENV)/.installed-dev
	$(BIN)/jupyter lab nbs

hooks: $(VENV)/.installed-dev
	$(BIN)/nbdev_install_hooks

outputs: $(VENV)/.installed-dev
	$(BIN)/python docs/execute.py

docs: $(VENV)/.installed-doc
	$(BIN)/python docs/build.py

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs 8000

clean:
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(META) | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(META) | $(BIN)/python
	$(PIP) -e '.[dev]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-doc: $(META) | $(BIN)/python
	$(PIP) -e '.[dev,doc]'
	touch $(VENV)/.installed $(VENV)/.installed-dev $@
