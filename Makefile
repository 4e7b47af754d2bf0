# Needs make, Python 3.11 or newer and access to a Python package index. `make help` lists the targets.
#
#   make train ARGS="--substrate chicken_in_the_matrix__repeated"     ARGS goes to the command
#   make setup PYTHON=python3.12                                      another Python than python3
#   make setup PIP_ARGS="--extra-index-url URL"                       to pip, as for a CPU build of torch
#   make setup UV=                                                    with pip alone (uv is quicker)
#   make setup MELTINGPOT_ASSETS=FILE                                 see envs/meltingpot/install.py

PYTHON ?= python3
ARGS ?=
PIP_ARGS ?=
UV ?= uv==0.13.9
PY := .venv/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check $(PIP_ARGS)
TORCH = $(shell grep '^torch==' requirements-lock.txt)
# pip picks the build of torch, as PIP_ARGS and its own settings say; uv, which does not read those,
# what is left. Where it fails (it may reach no index), pip does everything.
WITH_UV = { $(PIP) -q $(UV) && $(if $(TORCH),$(PIP) --no-deps $(TORCH) &&) \
	$(PY) -m uv pip install --python $(PY) -r requirements-lock.txt; }
READY := .venv/ready
DOCS_PY := .venv-docs/bin/python
DOCS_READY := .venv-docs/ready
# Packages of another Python must not get in.
unexport PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help setup setup-sc2 setup-ray train test test-long test-slow test-gpu lint docs clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(READY)  ## make .venv with everything in it (0.5 GB to download, 3 GB with CUDA)
	$(if $(JUST_MADE),,@$(PY) envs/meltingpot/install.py)

setup-sc2: $(READY)  ## packages for --backend sc2 and its tests (docs/starcraft.md has the game)
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps -r requirements-sc2.txt

setup-ray: $(READY)  ## Ray, for launch.py --engine ray and its test: 80 MB to download (docs/ray.md)
	$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps -r requirements-ray.txt

train: $(READY)  ## a short run of BiDist on a real substrate: a bar, a table, videos
	$(PY) bidist_mappo_meltingpot.py --substrate coins --preset cpu --total-timesteps 72000 --final-episodes 5 \
		--eval-scenarios SC0,SC2 --capture-video $(ARGS)

test: $(READY)  ## all tests but the long and slow ones, in two processes
	$(PY) -m pytest -m "not slow and not long" -n 2 --dist loadfile $(ARGS)

test-long: $(READY)  ## the long ones: some four seconds or more each
	$(PY) -m pytest -m "long and not slow" -n 2 --dist loadfile $(ARGS)

test-slow: $(READY)  ## the slow tests
	$(PY) -m pytest -m slow $(ARGS)

test-gpu: $(READY)  ## every script on a CUDA device, some minutes
	$(PY) -m pytest -m gpu $(ARGS)

lint: $(READY)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

docs: $(READY) $(DOCS_READY)  ## the website in site/html, by Sphinx in an environment of its own
	$(PY) experiments/website.py lay-out site/source
	@rm -rf site/html site/doctrees
	$(DOCS_PY) -m sphinx -q -W --keep-going -d site/doctrees $(ARGS) site/source site/html
	@echo "site/html/index.html is the start page."

clean:  ## remove .venv, .venv-docs, site and caches; runs/ stays
	rm -rf .venv .venv-docs site .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

IS_NEW := import sys; assert sys.version_info >= (3, 11)
HAS_VENV := import ensurepip, venv
SHOW_VERSION := import platform; print(platform.python_version())
runs = $(shell $(PYTHON) -c '$(1)' >/dev/null 2>&1 && echo yes)

# Each of these errors is one sentence.
define need_python
$(if $(call runs,$(IS_NEW)),,$(error Unseen needs Python 3.11 or newer, and $(PYTHON) is \
	$(or $(shell $(PYTHON) -c '$(SHOW_VERSION)' 2>/dev/null),missing): name a newer one with PYTHON=/path/to/python3))
$(if $(call runs,$(HAS_VENV)),,$(error $(PYTHON) cannot make virtual environments: install its venv \
	package (python3-venv on Debian and Ubuntu)))
endef

# .venv/ready is written last. Without it a setup was interrupted, or the environment is somebody's
# own: an unfinished one is made anew, a whole one gets what it lacks.
$(READY): requirements-lock.txt envs/meltingpot/install.py
	$(need_python)
	$(eval JUST_MADE := yes)
	@rm -f $(READY)
	@if [ -e .venv/unfinished ] || ! $(PY) -c '$(IS_NEW)' 2>/dev/null; then \
	    $(PYTHON) -m venv --clear --without-pip .venv; fi
	@touch .venv/unfinished
	@$(PY) -c 'import pip' 2>/dev/null || $(PY) -m ensurepip --default-pip >/dev/null
	@echo "Installing into .venv: about 0.5 GB to download and 2 GB on disk, some minutes (on Linux"
	@echo "PyPI's PyTorch adds 2.5 GB of CUDA libraries; for a build without, see README.md)."
	@$(if $(UV),$(WITH_UV) ||) $(PIP) -r requirements-lock.txt \
	    || { echo "pip could not install everything; Melting Pot's engine, dmlab2d, has builds for" \
	    "Linux with glibc 2.35 or newer and for macOS 15 or newer on Apple silicon." >&2; exit 1; }
	@$(PY) envs/meltingpot/install.py
	@rm -f .venv/unfinished && touch $(READY)

$(DOCS_READY): requirements-docs.txt
	$(need_python)
	@$(PYTHON) -m venv --clear .venv-docs
	$(DOCS_PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps -r requirements-docs.txt
	@touch $(DOCS_READY)
