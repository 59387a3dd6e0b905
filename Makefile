# make demo      train a small model on this machine, look at its report, talk to it
# make install   only what that needs, in .venv: then .venv/bin/nautilus --help
# make test      every test, slow ones included
# make soak      mixed load on a server for MINUTES=20: no answer lost or wrong, no memory that grows
# make check     what to run before a change: lint, format, types, fast tests
#
# Each makes the environment it needs in .venv and reuses it. Choose the interpreter with PYTHON=python3.12.

PYTHON ?= python3
MINUTES ?= 20
# Where this is set every start would compile torch's sources anew.
export PYTHONDONTWRITEBYTECODE =
BIN := .venv/bin
# Packages are not compiled at install time: that takes 25 s for torch alone, and what is imported gets compiled then.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt setup.py $(wildcard nautilus/ops/cpu/*.cpp nautilus/ops/cpu/*.h)
# Two workers use two cores; torch keeps to one thread in each (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help demo install test soak check

help:
	@sed -n 's/^# \(make \)/\1/p' $(firstword $(MAKEFILE_LIST))

install: .venv/.ready-demo
	@echo "ready: $(BIN)/nautilus --help"

demo: .venv/.ready-demo
	$(BIN)/nautilus demo

test: .venv/.ready-test
	$(PYTEST) -m ""

soak: .venv/.ready-test
	$(BIN)/python -m tests.serve.reliability.soak minutes=$(MINUTES)

check: .venv/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(PYTEST)

# A stamp is as new as the last install from the same inputs; with it in place a second run starts at once.
.venv/.ready-demo: .venv/.ready-torch $(INPUTS)
	@echo "compiling the CPU kernels, which takes a minute or two ..."
	@$(PIP) --no-build-isolation --editable '.[report]'
	@touch $@

.venv/.ready-test: .venv/.ready-torch $(INPUTS)
	@echo "installing what tests need and compiling the CPU kernels, which takes a few minutes ..."
	@$(PIP) --no-build-isolation --editable '.[dev,data,report,serve,eval,scale,rl]'
	@touch $@ .venv/.ready-demo

# torch comes first and alone: the constraint keeps every later install from replacing it.
.venv/.ready-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Nautilus needs Python 3.11 or newer, $(PYTHON) is %d.%d; \
	try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch, about 200 MB ..."
	@$(PIP) torch setuptools
	@touch $@
