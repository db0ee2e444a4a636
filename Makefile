# make chat    a conversation with the default model, from nothing but Python 3.11+
# make test    everything that CI runs
# make gpu     everything that needs a GPU; make gpu DRY=1 walks through it on the CPU; ONLY=prompts for a part of it
# make docs    the documentation as a site, in build/site; a broken link fails it
# make clients  OpenAI's and Anthropic's packages, LangChain, LlamaIndex, llm, schemathesis and a crowd against slimrt serve
# make dist    wheel and sdist in dist/, each checked, installed into an empty environment and asked something
# Options: make chat PYTHON=python3.13 ARGS="--ctx 8k"; make test TESTS="tests/hub/test_hub.py -k hf"

PYTHON ?= python3
ARGS ?=
TESTS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Of what pip says, a line for each package; its errors pass by on stderr.
TOLD := -e 's/^Collecting \([A-Za-z0-9._-]*\).*/   fetching \1/p' -e 's/^Building wheel.*/   &/p' -e 's/^Installing collected.*/   unpacking all of them/p'
OURS := slimrt models convert kernels_cu tests scripts examples click_cli.py

.PHONY: help chat test lint types unit docs clients dist format gpu clean
help:
	@sed -n 's/^# //p' Makefile

chat: .venv/installed
	@$(BIN)/slimrt pull
	@$(BIN)/slimrt chat $(ARGS)

# mypy, which uses one core, goes along with the first tests.
test: lint
	@$(MAKE) --no-print-directory -j2 types unit
	@echo "== all checks passed"

lint: .venv/installed-dev
	@echo "== ruff"
	@$(BIN)/ruff check $(OURS)
	@$(BIN)/ruff format --check $(OURS)

# mypy has no notion of a folder installed under another name (pyproject.toml: package-dir), so it is shown a folder of
# links that has the installed layout. The links always lead to the sources at hand.
types: .venv/installed-dev
	@echo "== mypy"
	@rm -rf build/layout && mkdir -p build/layout/slimrt
	@cd build/layout && ln -s ../../click_cli.py . && cd slimrt && \
		ln -s ../../../slimrt/* ../../../models ../../../convert ../../../kernels_cu .
	@cd build/layout && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		-p slimrt -m click_cli

# Dozens of tests start a process that imports slimrt: without its bytecode on disk each takes half as long again.
unit: .venv/installed-dev
	@echo "== pytest"
	@PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -q -n 2 --dist worksteal --durations=5 --durations-min=5 $(TESTS)

# Any Python with CuPy will do, .venv's where there is one: nothing is installed, no network is needed (scripts/gpu.py).
# Results go to docs/results, and from there, where the README has a place for them, into its table.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	@$(GPU_PYTHON) scripts/gpu.py $(if $(DRY),--dry) $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT)); \
		status=$$?; $(if $(DRY)$(OUT),:,$(GPU_PYTHON) scripts/results_table.py) && exit $$status

docs: .venv/installed-docs
	@$(BIN)/python -m mkdocs build
	@echo "== build/site/index.html"

# An environment of their own: clients want each other's packages in versions that ours do not.
clients: build/clients/installed
	@build/clients/bin/python -m scripts.clients $(ARGS)

build/clients/installed: pyproject.toml examples/llm-slimrt/pyproject.toml
	@echo "== installing clients into build/clients (a few minutes)"
	@$(PYTHON) -m venv build/clients
	@build/clients/bin/python -m pip install -q --upgrade 'pip>=25.1'
	@PYTHONWARNINGS=ignore build/clients/bin/python -m pip install -q -e '.[fast,server,structured,documents]' -e examples/llm-slimrt --group clients
	@touch $@

dist: .venv/installed-docs
	@rm -rf dist
	@$(BIN)/python -m build -o dist .
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python scripts/check_dist.py dist/*

format: .venv/installed-dev
	@$(BIN)/ruff check --fix $(OURS)
	@$(BIN)/ruff format $(OURS)

# Editable: a change of a source needs no new installation, a change of pyproject.toml causes one.
# --no-compile: bytecode of what is used is made when it is used; that of all packages takes as long as fetching them.
# PYTHONWARNINGS: setuptools warns, at length, of any editable installation of folders under other names.
.venv/installed: pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slimrt needs Python 3.11 or newer, $(PYTHON) is " \
			+ sys.version.split()[0] + "; name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11")' && \
		echo "== creating .venv" && $(PYTHON) -m venv .venv; }
	@echo "== installing slimrt and its dependencies into .venv (a minute or two)"
	@$(PIP) install -q --upgrade 'pip>=25.1'
	@rm -f .venv/failed
	@{ PYTHONWARNINGS=ignore $(PIP) install --no-compile --progress-bar off -e '.[all]' || touch .venv/failed; } | sed -n $(TOLD)
	@test ! -e .venv/failed
	@touch $@

# --group needs pip 25.1.
.venv/installed-dev: .venv/installed
	@echo "== installing the development tools"
	@$(PIP) install -q --no-compile --group dev
	@touch $@

.venv/installed-docs: .venv/installed-dev
	@echo "== installing what makes the documentation and packages"
	@$(PIP) install -q --no-compile --group docs --group dist
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(OURS) -name __pycache__ -type d -prune -exec rm -rf {} +
