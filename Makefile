SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS_VENV := .venv-protos
SOURCES := protos client preconditioner_service worker tests

# The tests start hundreds of processes, which all import the same modules.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test tests-together faults abuse fuzz lint style types protos check-protos clean

help:  ## Show what can be made.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch hatchling editables
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@touch $@

$(PROTOS_VENV)/.installed: constraints-protos.txt
	$(PYTHON) -m venv $(PROTOS_VENV)
	$(PROTOS_VENV)/bin/python -m pip install --quiet --constraint constraints-protos.txt grpcio-tools setuptools
	@touch $@

setup: $(VENV)/.installed  ## Make .venv with everything pinned by constraints.txt.

demo: setup  ## Train a small Transformer with AdamW and with Shampoo through a real service; draw the picture.
	$(BIN)/preconditioner-worker demo

# Tests that measure time, and those whose trainers never rest, run by themselves.
ALONE := tests/end_to_end/test_step_times.py tests/faults tests/abuse
# Two more than there are cores, as much of the time is waiting (on two cores 527 s instead of 578 s with one
# more); in the order of the files, so that none of the long ones comes last.
PARALLEL := --numprocesses $(shell $(PYTHON) -c "import os; print(min(os.cpu_count(), 4) + 2)") \
	--dist loadfile --no-loadscope-reorder

test: setup style check-protos  ## Lint, type-check, and run every test.
	$(MAKE) --no-print-directory --jobs 2 types tests-together
	$(BIN)/python -m pytest $(ALONE)

tests-together:
	$(BIN)/python -m pytest $(PARALLEL) $(ALONE:%=--ignore %)

faults: setup  ## Inject every fault of the catalogue into real processes; print what became of each.
	$(BIN)/python -m pytest tests/faults --whole-catalogue --faults-json runs/faults.json

abuse: setup  ## Attack a real service in every way of the catalogue; print memory, statuses and another job's times.
	PYTHONPATH=tests/helpers $(BIN)/python tests/abuse/run.py

fuzz: setup  ## Fuzz the message handlers with COUNT (100000) scripts of calls.
	PYTHONPATH=tests/helpers $(BIN)/python tests/abuse/fuzz.py --count $(or $(COUNT),100000)

lint: style types  ## ruff and mypy --strict.

style: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: setup
	$(BIN)/mypy
	$(BIN)/mypy client/examples/*.py tests/client/typed_choices.py

protos: $(PROTOS_VENV)/.installed  ## Generate the protocol code again from its .proto.
	cd protos && ../$(PROTOS_VENV)/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. \
		--grpc_python_out=. preconditioner_protos/v1/preconditioner.proto

check-protos: $(PROTOS_VENV)/.installed  ## Fail when the committed protocol code and its .proto differ.
	@mkdir -p $(PROTOS_VENV)/generated && cd protos && ../$(PROTOS_VENV)/bin/python -m grpc_tools.protoc -I. \
		--python_out=../$(PROTOS_VENV)/generated --pyi_out=../$(PROTOS_VENV)/generated \
		--grpc_python_out=../$(PROTOS_VENV)/generated preconditioner_protos/v1/preconditioner.proto
	@for file in preconditioner_pb2.py preconditioner_pb2.pyi preconditioner_pb2_grpc.py; do \
		diff -u protos/preconditioner_protos/v1/$$file $(PROTOS_VENV)/generated/preconditioner_protos/v1/$$file \
		|| { echo "protocol code differs from its .proto: run 'make protos' and commit"; exit 1; }; done

clean:  ## Remove environments, caches and builds; runs/ is kept.
	rm -rf $(VENV) $(PROTOS_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
