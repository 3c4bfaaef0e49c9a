# Aliases only: what a command does stands in the package, in pyproject.toml and in tests/.
#
#   make demo                      name the speaker in 370 recordings through compiled layers
#   make test                      the tests; test-all adds the full tables
#   make fuzz MINUTES=10           layers drawn anew against the reference, until the time is over; also SEED=1
#   make check                     lint, format and types
#   make tune TARGET=x86           search faster kernels, records into tuning_logs/; also TRIALS=8 MINUTES=10 WORKLOADS=QN-B1,CN-* SEED=1 RPC=9190 KEY=rpi4
#   make build TARGET=x86          compile layers of the workload table, with the records there are
#   make bench                     time beside other frameworks; also WORKLOADS=QN-B1,QN-C1 THREADS=1,2 HTML=page.html JSON=figures.json
#   make bench-setup               the frameworks, each into an environment of its own in this user's cache
#   make bench-spaces              tune in our design space and in MetaSchedule's own, and compare; also WORKLOADS=QN-B1 TRIALS=16,32,64 JSON=spaces.json
#   make gpu                       everything on this machine's GPU, 8 minutes at a time; without one it prepares build/gpu for a machine with one
#   make report                    pages and pictures of what tuning found, into report/
#   make wheel                     dist/*.whl
#   make setup                     everything the above need, into .venv (each of them does its own part by itself)
#   make clean                     remove what the above made

PYTHON ?= python3
VENV ?= .venv
TARGET ?= x86
# Test files side by side on all processors.
WORKERS ?= -n auto --dist loadfile

# What each set of commands needs. A machine without a C compiler gets ziglang to link with; `dev` has it
# anyway, since the tests link with both.
EXTRAS-demo = compiler,h5
EXTRAS-bench = compiler,bench
EXTRAS-tune = compiler,h5,report,tune
EXTRAS-dev = compiler,cross,dev,h5,test,tune
COVERS-demo = demo
COVERS-bench = bench
COVERS-tune = demo tune
COVERS-dev = demo bench tune dev
ZIG = $(if $(shell command -v cc 2>/dev/null),,$(comma)cross)
comma := ,

CLI = $(VENV)/bin/tvm-sepconv
SCOPE = --target $(TARGET) $(if $(WORKLOADS),--workloads '$(WORKLOADS)')

.PHONY: help setup demo test test-all fuzz check tune build bench bench-setup bench-spaces gpu report wheel clean
help:
	@sed -n 's/^#   //p' Makefile

setup: $(VENV)/.has-dev

demo: $(VENV)/.has-demo
	$(VENV)/bin/python -m tvm_sepconv.demo

test: $(VENV)/.has-dev
	$(VENV)/bin/python -m pytest -m "not full" $(WORKERS)

test-all: $(VENV)/.has-dev
	$(VENV)/bin/python -m pytest $(WORKERS)

fuzz: $(VENV)/.has-dev
	$(VENV)/bin/python tests/kernels/fuzz.py --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

check: $(VENV)/.has-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

tune: $(VENV)/.has-tune
	$(CLI) tune $(SCOPE) $(if $(TRIALS),--trials $(TRIALS)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(if $(RPC),--rpc $(RPC)) $(if $(KEY),--key $(KEY))

build: $(VENV)/.has-demo
	$(CLI) build $(SCOPE)

bench: $(VENV)/.has-bench
	$(CLI) bench $(if $(WORKLOADS),'$(WORKLOADS)') $(if $(THREADS),--threads $(THREADS)) $(if $(JSON),--json $(JSON)) $(if $(HTML),--html $(HTML))

bench-setup: $(VENV)/.has-bench
	$(CLI) bench --setup

bench-spaces: $(VENV)/.has-tune
	$(CLI) bench $(if $(WORKLOADS),'$(WORKLOADS)') --spaces $(or $(TRIALS),16,32,64) $(if $(THREADS),--threads $(THREADS)) $(if $(JSON),--json $(JSON))

gpu: build/gpu/manifest.json
	$(PYTHON) build/gpu

build/gpu/manifest.json:
	$(MAKE) $(VENV)/.has-tune
	$(CLI) gpu prepare build/gpu

report: $(VENV)/.has-tune
	$(CLI) report --output report

# setuptools packs whatever an earlier build left in build/lib, deleted modules included.
wheel: $(VENV)/bin/pip
	rm -rf build/lib
	$(VENV)/bin/pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The tests want PyTorch's CPU build, from its own index where yours has none: the plain wheel draws gigabytes of CUDA.
TORCH = $(VENV)/bin/pip install --disable-pip-version-check 'torch==2.13.0+cpu'
AFTER-dev = $(TORCH) || $(TORCH) --extra-index-url https://download.pytorch.org/whl/cpu || echo 'warning: no CPU build of PyTorch for this Python can be had here: the tests with it will be skipped' >&2

$(VENV)/.has-demo $(VENV)/.has-bench $(VENV)/.has-tune $(VENV)/.has-dev: $(VENV)/.has-%: pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --disable-pip-version-check --editable '.[$(EXTRAS-$*)$(ZIG)]'
	$(AFTER-$*)
	touch $(addprefix $(VENV)/.has-,$(COVERS-$*))

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed, got '$(PYTHON)': name another with PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: this Python cannot make virtual environments: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
