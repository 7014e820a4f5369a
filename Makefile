# A machine with Python 3.11 or later, git and make is enough: everything else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# For .venv only: the batch scripts too know a PYTHON, theirs is .venv's.
unexport PYTHON
BIN := .venv/bin
STAMP := .venv/.installed
# The newest megatron-core that is supported. It needs another Python than .venv may have, so it gets an environment of its own.
ENGINE := 0.19.2
ENGINE_BIN := .venv-engine/bin
ENGINE_STAMP := .venv-engine/.installed
DOCS_BIN := .venv-docs/bin

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all test-engine test-slurm coverage rehearse lint docs docs-site clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

venv: $(STAMP)  ## make .venv and install megatron_ft into it

# Again only when what is to be installed changes.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "megatron_ft needs Python 3.11 or later, $(PYTHON) is older; set one: make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## a tiny model learns to answer, split as on a cluster; minutes, no GPU
	$(BIN)/python -m megatron_ft demo

# Two workers, each with whole files: a file's tests share the processes it starts. Files are in the order of tests/conftest.py;
# pytest-xdist by itself begins with those of many tests, which are the short ones.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/pytest $(WORKERS)

test: $(STAMP)  ## the tests, about 21 minutes on 2 cores
	$(PYTEST) -m "not thorough and not slurm"

test-all: $(STAMP)  ## those too that show again, at more length, what others show
	$(PYTEST) -m "not slurm"

test-engine: $(ENGINE_STAMP)  ## tests of engine, checkpoints and layouts with the newest megatron-core, in .venv-engine; PYTHON=python3.12 or later
	$(ENGINE_BIN)/pytest $(WORKERS) -m "not thorough and not slurm" tests/engine tests/checkpoints tests/parallel

$(ENGINE_STAMP): setup.py constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
	  || { echo "megatron-core $(ENGINE) needs Python 3.12 or later, $(PYTHON) is older: make test-engine PYTHON=python3.12" >&2; exit 2; }
	@test -x $(ENGINE_BIN)/pip || $(PYTHON) -m venv .venv-engine
	@grep -v '^megatron-core==' constraints.txt > .venv-engine/constraints.txt
	$(ENGINE_BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' megatron-core==$(ENGINE) -c .venv-engine/constraints.txt
	@touch $@

# The tests that save, load, verify and damage checkpoints. Data of all processes, also of those that are forked, is put together.
COVERED := tests/checkpoints tests/parallel tests/errors tests/conversion

coverage: $(STAMP)  ## branches of megatron_ft/checkpoints that tests run, in tests' processes too; fails below 95%
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(WORKERS) -m "not thorough and not slurm" $(COVERED)
	$(BIN)/coverage combine --quiet --append || true  # files of killed processes cannot be read
	$(BIN)/coverage report

test-slurm: $(STAMP)  ## jobs of a real SLURM on this machine; needs its programs (CONTRIBUTING.md) and root; half an hour
	$(BIN)/pytest tests/slurm

# 32 processes as 4 nodes x 8, then 16 as 2 nodes x 8 (of 16: one of its 8 replicas).
rehearse: $(STAMP)  ## the batch scripts for 32 and 128 GPUs, on this machine; minutes, 24 GB of memory
	$(BIN)/python examples/slurm/measure.py examples/slurm/rehearse.sh examples/oasst_llama2_70b/stage1.sbatch llama2-70b
	STAND_IN_NODES=2 $(BIN)/python examples/slurm/measure.py examples/slurm/rehearse.sh examples/alfred_40b/train.sbatch falcon-40b

lint: $(STAMP)  ## style, types, and mistakes that can be seen without running
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## docs/flags.md, from the commands themselves; docs/works_with.md, from the tests
	$(BIN)/megatron-ft flags > docs/flags.tmp && mv docs/flags.tmp docs/flags.md
	$(BIN)/python -m tests.docs.works_with

# An environment of its own: nothing else needs mkdocs.
docs-site:  ## all pages as a web site, in build/site
	@test -x $(DOCS_BIN)/pip || $(PYTHON) -m venv .venv-docs
	$(DOCS_BIN)/pip install --quiet --disable-pip-version-check mkdocs-material -c tools/docs_site/constraints.txt
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --strict
	@echo "to read it: $(DOCS_BIN)/python -m http.server --directory build/site"

clean:  ## remove the environments and what builds and tests leave; runs/ stays
	rm -rf .venv .venv-engine .venv-docs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
