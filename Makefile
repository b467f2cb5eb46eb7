# `make demo` and `make test` start from nothing: they make .venv and install fastseg into it.
PYTHON ?= python3
BIN := .venv/bin
comma := ,
ARCH := $(shell uname -m)
# DALI has wheels for these; elsewhere the reference tier does its work.
EXTRAS := $(if $(filter x86_64 aarch64,$(ARCH)),[dali$(comma)dev],[dev])


.PHONY: help demo test oldest lint docs coverage bench wheels clean
help: ## say what each target does
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)'
	touch $@

demo: .venv/done ## train SegNet on synthetic street scenes and write a report (no GPU, no data needed)
	$(BIN)/fastseg train --data synth --recipe fast --size 48x72 --epochs 4 --set train.grow_from=1

PROCESSES := tests/fastseg/test_processes.py
# Two at a time, of about the same length, each on half of the cores (tests/conftest.py). The output of the second follows
# that of the first.
test: .venv/done ## run every test that this machine can run
	@mkdir -p build; export FASTSEG_TEST_CORES=2/2; \
	($(BIN)/python -m pytest tests/faults; faults=$$?; $(BIN)/python -m pytest $(PROCESSES); processes=$$?; \
		TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels; exit $$((faults | processes | $$?))) \
		> build/second.txt 2>&1 & second=$$!; \
	FASTSEG_TEST_CORES=1/2 $(BIN)/python -m pytest --ignore tests/faults --ignore $(PROCESSES); first=$$?; \
	wait $$second; second=$$?; cat build/second.txt; exit $$((first | second))

# The lower bounds of pyproject.toml: GPU machines and NVIDIA's containers lag behind. torch 2.11 wants an older setuptools.
oldest: ## run the quick tests with the oldest torch that fastseg takes (3 GB to download, into .venv-oldest)
	@mkdir -p build
	grep -vE '^(torch|torchvision|triton|setuptools)==' constraints.txt > build/oldest.txt
	sed -nE 's/^ *"(torch|torchvision)>=([0-9.]+)",/\1==\2.*/p' pyproject.toml >> build/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c build/oldest.txt -e '.$(EXTRAS)'
	.venv-oldest/bin/python -m pytest -m "not slow" --ignore tests/faults

# mypy sees the mapped packages only where they are installed, not where they lie: a copy of its own, see pyproject.toml.
# In build/lib setuptools keeps modules that are gone.
lint: .venv/done ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint build/lib
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/lint .
	cd build/lint && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p fastseg

docs: .venv/done ## the documentation, as pages in build/docs
	$(BIN)/sphinx-build -q -W -b html docs build/docs

# Of one process each: what tests start as commands, and Triton's kernels, count for nothing.
coverage: .venv/done ## which lines no quick test runs, and the slowest of those tests
	mkdir -p build
	$(BIN)/coverage run -m pytest -m "not slow" --durations 25
	$(BIN)/coverage report

bench: .venv/done ## throughput of the data path, the operators and the training step on this machine
	$(BIN)/fastseg bench

wheels: .venv/done ## fill build/wheels for bench/device.sh on a GPU machine without a package index
	$(BIN)/pip download --quiet --disable-pip-version-check -c constraints.txt -d build/wheels -r bench/device.txt
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps -d build/wheels nvidia-cudnn-frontend

clean: ## remove .venv and build products (runs/ stays)
	rm -rf .venv .venv-oldest build dist *.egg-info
