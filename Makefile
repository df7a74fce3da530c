# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BACKEND ?= tensorflow
BACKENDS = tensorflow jax torch
# Test files go to this many processes; each holds a framework, so many cores are no reason for as many.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
VENV = .venv
BIN = $(VENV)/bin
ROOMS = keras_mrl export/keras_mrl_export serving/keras_mrl_serving cli/keras_mrl_cli
PYTEST = $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet
# TensorFlow's own greetings (CPU features, oneDNN) drown what the tests and the demo say.
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help demo test check lint types docs proto release soak clean
.DEFAULT_GOAL := help

help: ## what each command does
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python must be 3.11 or newer. Received: $$($(PYTHON) --version). Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# What the demo of one backend needs; the development set below holds it too.
$(VENV)/.demo-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing keras-mrl with $* into $(VENV) (a few minutes the first time) ..."
	$(PIP) -c constraints.txt -e '.[$*,export,server,evaluate]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing keras-mrl with everything its tests need into $(VENV) (several minutes the first time) ..."
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@ $(foreach b,$(BACKENDS),$(VENV)/.demo-$(b))

demo: $(VENV)/.demo-$(BACKEND) ## train, calibrate, export, serve and ask, on handwritten digits (BACKEND=jax|torch|tensorflow)
	$(BIN)/keras-mrl demo --backend $(BACKEND)

test: check ## lint, types and the test suite, on every backend
	$(PYTEST) -m "not backend"
	for backend in $(BACKENDS); do KERAS_BACKEND=$$backend $(PYTEST) -m backend || exit 1; done

check: lint types ## lint and types alone

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy $(ROOMS) tests benchmarks examples

soak: $(VENV)/.dev ## the long counts that `make test` runs in small; needs chromium and npm
	$(PIP) -c constraints.txt -e '.[docs]'
	KERAS_MRL_SOAK=1 $(BIN)/python -m pytest tests -m soak

docs: $(VENV)/.dev ## the documentation as a site, in site/
	$(PIP) -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

# protoc 31 (its Python output runs on protobuf 6.31 and 7) in an environment of its own.
proto: | $(BIN)/python ## generate the wire messages anew from _wire.proto
	test -x $(VENV)/proto/bin/python || $(PYTHON) -m venv $(VENV)/proto
	$(VENV)/proto/bin/python -m pip install --quiet 'grpcio-tools==1.75.1' 'setuptools<81'
	cd serving && ../$(VENV)/proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. keras_mrl_serving/_wire.proto

# twine stands in an environment of its own: it needs much that nothing here does.
release: $(VENV)/.dev ## wheel and sdist in dist/, checked as a registry would
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	test -x $(VENV)/release/bin/twine || { $(PYTHON) -m venv $(VENV)/release && $(VENV)/release/bin/python -m pip install --quiet 'twine==7.0.0'; }
	$(VENV)/release/bin/twine check --strict dist/*

clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist site *.egg-info
