# make setup | train | test | test-long | test-failures | test-cluster | test-cpp | test-matrix | lint | format | clean.
# The variables of set-up are in scripts/setup.sh.
SHELL := /bin/bash
VENV ?= .venv
NP ?= 2
BIN := $(VENV)/bin

export VENV
# Six minutes together; the rest of tests/ is `test-long`, `test-failures`, and `test-cluster`, what needs root.
SHORT_TESTS := tests/unit tests/contract tests/test_docs.py \
    $(patsubst %,tests/mpi/test_%.py,averaging models start_checks)
FAILURE_TESTS := $(patsubst %,tests/mpi/test_%.py,claims damage ends hangs interrupts killed refusals)
CLUSTER_TESTS := tests/cluster tests/faults
.PHONY: help setup train test test-long test-failures test-cluster test-cpp test-matrix lint format clean
.NOTPARALLEL:

help:
	@echo 'make train   [ARGS="--period 20"] [NP=2]   set up what is missing, then train on the embedded digits'
	@echo 'make test    [PYTEST_ARGS="-k ring"]       set up what is missing, then run the tests but the long ones'
	@echo 'make test-long                             the long tests: whole trainings, the pages, commands of the README'
	@echo 'make test-failures                         jobs that fail: ranks that stop, are killed, or refuse what they see'
	@echo 'make test-cluster                          the tests on emulated hosts and Slurm; ranks that die. Needs root'
	@echo 'make test-cpp                              test the C++ parts alone, also under sanitizers'
	@echo 'make test-matrix [MPIS="mpich-5"]          run the tests of several ranks with each MPI, in build/matrix'
	@echo 'make setup   [PYTHON= VENV= TORCH= MPI=auto|wheel|system HOROVOD=0|1]   set up only; see scripts/setup.sh'
	@echo 'make lint | format                         style, types and layers | rewrite to the style'
	@echo 'make clean                                 remove build/ and caches; the environment and runs/ stay'

setup:
	@scripts/setup.sh

train: setup
	@if [[ -x $(BIN)/horovodrun ]]; then \
	    exec launch/horovodrun.sh -np $(NP) -- $(ARGS); \
	else \
	    echo 'Horovod is not available: the launcher is mpirun'; \
	    exec launch/mpirun.sh -np $(NP) -- $(ARGS); \
	fi

test: setup
	@. launch/env.sh && exec $(BIN)/python -m pytest $(or $(PYTEST_ARGS),$(SHORT_TESTS))

test-long: setup
	@. launch/env.sh && exec $(BIN)/python -m pytest tests $(addprefix --ignore=,$(SHORT_TESTS) $(FAILURE_TESTS) $(CLUSTER_TESTS))

test-failures: setup
	@. launch/env.sh && exec $(BIN)/python -m pytest $(FAILURE_TESTS)

test-cluster: setup
	@. launch/env.sh && exec $(BIN)/python -m pytest $(CLUSTER_TESTS)

test-cpp: setup
	@. launch/env.sh && scripts/test_cpp.sh

test-matrix:
	@scripts/test_matrix.sh $(MPIS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format:
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find hvd_train tests scripts cmake -name __pycache__ -prune -exec rm -rf {} +
