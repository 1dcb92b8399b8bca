# make report: train the report's three models and write report/index.html       make test: all tests
# make lab: the notebooks in JupyterLab      make docs, docs-serve: the site      make outputs: run and store the notebooks
# make hooks: git hooks that keep notebooks clean      make clean: remove what was made
# Everything runs in one environment, made on first use: .venv, or the one that VENV names.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
META := settings.ini setup.py pyproject.toml
# Arguments for cifar_report, such as make report ARGS="--seeds 0 1 2"
ARGS ?=

.PHONY: report test lab hooks outputs docs docs-check docs-serve clean

report: $(VENV)/.installed
	$(BIN)/cifar_report $(ARGS)

test: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/run.py

lab: $(VENV)/.installed-dev
	$(BIN)/jupyter lab nbs

hooks: $(VENV)/.installed-dev
	$(BIN)/nbdev_install_hooks

outputs: $(VENV)/.installed-dev
	$(BIN)/python docs/execute.py

docs: $(VENV)/.installed-doc
	$(BIN)/python docs/build.py

docs-check: $(VENV)/.installed-doc
	$(BIN)/python docs/execute.py --check

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs 8000

clean:
	rm -rf _docs _proc build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(META) | $(BIN)/python
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: $(META) | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-doc: $(META) | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev,doc]'
	touch $(VENV)/.installed $(VENV)/.installed-dev $@
