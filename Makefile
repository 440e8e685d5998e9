# make demo    the main job on what the repository ships
# make test    every test but those on Slurm
# make test-slurm  installs a real Slurm if it is missing (as root, Debian), and tests jobs on it
# make torture a run of four ranks, killed a hundred times
# make check   format, lint, types, every test can be collected
# make install the environment alone

PYTHON ?= python3
# constraints-cuda.txt on a machine with GPUs
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test test-slurm torture check format

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS) $(wildcard distilcb/*.hpp distilcb/*/*.cpp)
	$(PYTHON) -m venv $(VENV)
	@echo "installing tested versions into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	$(BIN)/python -m distilcb.engine.operators
	touch $@

demo: $(INSTALLED)
	$(BIN)/deepspeed launch/train.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not slurm' --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 30 $(ARGS)

test-slurm: $(INSTALLED)
	if [ "$$(id -u)" = 0 ] && ! command -v slurmctld >/dev/null; then tests/slurm/slurm_lab.sh install; fi
	$(BIN)/python -m pytest tests/slurm --durations 15 $(ARGS)

torture: $(INSTALLED)
	$(BIN)/python benchmarks/torture.py --kills 100 --ranks 4 --runs runs/torture --report docs/results/torture.md

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --collect-only --quiet --quiet --no-header

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
