# Each command uses the active virtual environment, or makes .venv; see `make help`.
PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := $(or $(VIRTUAL_ENV),.venv)
PY := $(VENV)/bin/python
LOWEST := .venv-lowest
# One stamp per environment and extra: nothing is installed again until one of these two files changes.
installed = $(VENV)/.semu-installed-$(1)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-lowest lint format docs pictures package

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'ARGS="..." is passed on to demo and the tests, JOBS=2 is the number of test processes,'
	@echo 'PYTHON=python3 is the interpreter that .venv and .venv-lowest are made with.'

demo: $(call installed,examples) ## forget one class, end to end (examples/forget_class.py)
	$(PY) examples/forget_class.py $(ARGS)

# One thread a process: the tests' models are small, so a process gains more from a core of its own.
test: $(call installed,dev) ## run the tests
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(JOBS) $(ARGS)

# In an environment of its own, whatever is active.
test-lowest: $(LOWEST)/.semu-installed-test ## run the tests with the lowest versions that are supported
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(LOWEST)/bin/python -m pytest -n $(JOBS) $(ARGS)

lint: $(call installed,dev) ## check style, types and layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(call installed,dev) ## rewrite the code in the house style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(call installed,docs) ## build the documentation into site/
	$(PY) -m mkdocs build --strict

package: $(call installed,dev) ## build sdist and wheel, check and install them, and use them from elsewhere
	$(PY) .ci/package.py

pictures: $(call installed,dev) ## draw the documentation's pictures again
	$(PY) docs/pictures.py

# torch goes first and alone: resolved with the rest, it may be replaced by a build with gigabytes of CUDA.
$(VENV)/.semu-installed-%: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install torch==2.13.0 -c constraints.txt
	$(PY) -m pip install -e ".[$*]" -c constraints.txt
	@touch $@

$(LOWEST)/.semu-installed-%: pyproject.toml constraints-lowest.txt | $(LOWEST)/bin/python
	$(LOWEST)/bin/python -m pip install torch -c constraints-lowest.txt
	$(LOWEST)/bin/python -m pip install -e ".[$*]" -c constraints-lowest.txt
	@touch $@

$(PY) $(LOWEST)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"constraints.txt needs Python 3.11 or newer; say which: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(@:/bin/python=)
