# SPDX-License-Identifier: Apache-2.0
# The commands of a fresh clone. Each installs first, once, into .venv.
#
#   make train [ARGS="--resume auto"]   train the tiny recipe on this machine
#   make test [ARGS="-k packing"]       the CPU test suite; SLOW=1 adds its slow cases
#   make lint                           ruff and mypy
#   make docs                           the site of the documentation, into build/site
#   make doctor                         what is installed, and what is missing
#   make gpu                            add Transformer Engine and DALI (needs a GPU and nvcc)
#   make clean                          remove .venv and what was built; runs/ stays

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help train test lint docs doctor gpu clean

VENV := .venv
# What every run imports; compiled to bytecode once, at installation.
IMPORTS := av, rich, tiktoken, torch.utils.tensorboard, megatron.core.dist_checkpointing, \
  megatron.core.distributed, megatron.core.optimizer, megatron.core.transformer.transformer_block
INSTALLED := $(VENV)/.installed
ARGS ?=
SLOW ?=

# Without bytecode every process would compile torch and megatron-core anew: 31 s instead of 12.
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed -n 's/^#   //p' Makefile

train: $(INSTALLED)
	@PYTHON=$(VENV)/bin/python exec bash launch/local.sh keye_tiny $(ARGS)

test: $(INSTALLED)
	@exec $(VENV)/bin/python -m pytest -q $(if $(SLOW),,-m "not slow") $(ARGS)

lint: $(INSTALLED)
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The notice is about a later major version, which pyproject.toml excludes.
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 exec $(VENV)/bin/mkdocs build --quiet

doctor: $(INSTALLED)
	@exec $(VENV)/bin/megatron-keye doctor $(ARGS)

gpu: $(INSTALLED)
	@$(VENV)/bin/pip install --no-build-isolation -c constraints.txt -e ".[gpu]"

clean:
	@rm -rf $(VENV) build dist *.egg-info megatron_keye/_C*.so .pytest_cache .mypy_cache .ruff_cache

# constraints.txt is complete, so nothing is resolved; `pip check` proves that its packages fit
# each other, tests/unit/test_packaging.py that they fit pyproject.toml. torch comes before the
# package, whose setup.py looks at it. The import compiles to bytecode only what a run needs, once,
# instead of all that was installed.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@for candidate in python3 python3.12; do
	  if $$candidate -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
	    python=$$candidate; break
	  fi
	done
	if [[ -z "$${python:-}" ]]; then
	  echo "make: Python 3.12 is needed, and neither python3 nor python3.12 is one" >&2; exit 1
	fi
	echo "Installing into $(VENV) (once, a few minutes)"
	[[ -x $(VENV)/bin/pip ]] || "$$python" -m venv $(VENV)
	pip=($(VENV)/bin/pip install -qq --no-deps --no-compile --disable-pip-version-check)
	"$${pip[@]}" -r constraints.txt
	"$${pip[@]}" --no-build-isolation -e .
	$(VENV)/bin/pip check --disable-pip-version-check >$(VENV)/install.log 2>&1 \
	  && $(VENV)/bin/python -c "import $(IMPORTS)" >$(VENV)/install.log 2>&1 \
	  || { cat $(VENV)/install.log >&2; exit 1; }
	touch $@
