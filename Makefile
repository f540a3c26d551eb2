# make help lists the targets. Everything runs in .venv, which the first target makes.
SHELL := /bin/bash
.DEFAULT_GOAL := all
.PHONY: all test compile-all lint format record stale duel lock bootstrap help

# Further arguments of snakemake, or of pytest: make all ARGS="--config gpu=4090", make test ARGS="-k format".
ARGS ?=
PYTHON_DIRS := src tests workflow

export PATH := $(CURDIR)/.venv/bin:$(PATH)

all: bootstrap  ## measure, aggregate and draw everything (ARGS: further arguments of snakemake)
	@workflow/run.sh all $(ARGS)

test: bootstrap  ## run the tests (ARGS: further arguments of pytest)
	@python -m pytest $(ARGS)

compile-all: bootstrap  ## compile the CUDA kernels for every architecture anew; one that spills or is serialized fails
	@python -m stof_kernels.kernels all

lint: bootstrap  ## check style: ruff, snakefmt, snakemake --lint
	ruff check $(PYTHON_DIRS)
	ruff format --check $(PYTHON_DIRS)
	snakefmt --check Snakefile rules
	snakemake --lint

format: bootstrap  ## rewrite the code in the project's style
	ruff check --fix $(PYTHON_DIRS)
	ruff format $(PYTHON_DIRS)
	snakefmt Snakefile rules

record: bootstrap  ## promote measured rows to recorded ones: make record GPU=h200
	@test -n "$(GPU)" || { echo "make record: which GPU? make record GPU=h200" >&2; exit 2; }
	@python -m stof_kernels.benchmarking record --gpu $(GPU)

stale: bootstrap  ## list recorded rows that were measured with older code
	@python -m stof_kernels.benchmarking stale

duel: bootstrap  ## measure close cells again, both methods in one process: make duel CELLS=causal:1x2048,mha_long:document:1x8192 METHODS="stof fa2"
	@test -n "$(CELLS)" || { echo "make duel: which cells? make duel CELLS=causal:1x2048" >&2; exit 2; }
	@python -m stof_kernels.benchmarking duel $(CELLS) $(METHODS)

lock:  ## pin the closure of envs/requirements.in anew
	@envs/lock.sh

bootstrap:  ## make or update .venv
	@envs/bootstrap.sh

help:  ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
