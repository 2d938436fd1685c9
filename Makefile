# Every target sets up .venv first and does nothing about it when it is up to date.
.DEFAULT_GOAL := help
.PHONY: help setup demo plan-table bench-check test test-ci test-slurm test-full lint format clean

# ninja, which DeepSpeed calls to compile its operators, is a program of the environment.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Containers often forbid Python to write bytecode; then each of the tests' many processes would compile the project.
export PYTHONDONTWRITEBYTECODE :=
# Files are dealt to several processes; the tests of one share what is costly to make. Each has its own warm worlds, so
# more processes than this cost more than they save.
PYTEST := .venv/bin/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile --durations=15

# Tests start several processes; without this each would use every core, and they would wait for each other.
test test-ci test-slurm test-full: export OMP_NUM_THREADS ?= 1

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## make or update .venv
	@scripts/setup_venv.sh

demo: setup  ## train a small model from nothing on this machine and show what it learned
	.venv/bin/python -m sft_dist.demo

plan-table: setup  ## what usual runs take and cost: memory, hours and money, without a GPU
	.venv/bin/python benchmarks/plan_table.py

bench-check: setup  ## has training become slower beside other trainers? compares ratios with benchmarks/results
	.venv/bin/python -m benchmarks.check

test: lint  ## what must pass before a change is merged: the whole project, in some minutes
	$(PYTEST) -m "not ci and not full and not slurm"

test-ci: setup  ## what `make test` leaves out for its time: more combinations of what it tests; PART=1/7: a seventh
	$(PYTEST) -m "ci and not full and not slurm" $(if $(PART),--part $(PART))

# Two clusters side by side; what takes longest begins first.
test-slurm: setup  ## jobs on a SLURM cluster that the tests bring up (root and SLURM's packages; else skipped)
	.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "slurm and not full" --durations=15 \
	    tests/slurm/test_story.py tests/slurm/test_faults.py tests/slurm

test-full: lint  ## all tests, those that take minutes too
	$(PYTEST)

lint: setup  ## style, types and layers
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: setup  ## format the code and fix what can be fixed without judgement
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:  ## remove caches and logs of the tools (not .venv, not runs/)
	rm -rf .build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
