# Every target works on a clean clone: the tools that it needs are fetched by it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
RUN := PYTHONPATH=tests $(UV) run --no-sync
export UV_COMPILE_BYTECODE := 1
# On a fresh machine the control plane (Go) is built beside the Python set-up.
MAKEFLAGS += -j2
# Two processes share them (tests/lanes.py), in this order: what waits most and what takes longest
# first.
TESTS := tests/controlplane tests/e2e tests/chaos tests/unit tests/store
# `make demo CLUSTER=current [VALUES=FILE]`: the cluster of your kubeconfig, asked for and never taken
# by accident; the file's values go to the operator's chart.
OWN_CLUSTER := $(if $(filter current,$(CLUSTER)),--current $(if $(VALUES),--operator-values $(VALUES)))

help:  ## This list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

.tools/bin/uv:
	python3 -m venv .tools && .tools/bin/pip install --quiet 'uv>=0.9'

.venv/.synced: pyproject.toml uv.lock | $(filter .tools/bin/uv,$(UV))
	$(UV) sync --frozen && touch $@

setup: .venv/.synced  ## The virtual environment

control-plane:  ## The control plane, built once into the cache
	$(if $(OWN_CLUSTER)$(KUBECONFIG_E2E),,PYTHONPATH=tests python3 -m devcluster.assets)

demo: .venv/.synced control-plane  ## A real chain of three stages, end to end
	$(RUN) python examples/demo/demo.py $(OWN_CLUSTER)

demo-smollm2: .venv/.synced control-plane  ## The real SmolLM2-135M as teacher; half an hour
	$(RUN) python examples/demo/demo.py --smollm2 $(OWN_CLUSTER)

down:  ## End the demo's cluster
	$(RUN) python -m devcluster down

lint: .venv/.synced  ## Style, types, layers
	$(UV) run --no-sync ruff format --check
	$(UV) run --no-sync ruff check
	$(UV) run --no-sync mypy
	$(UV) run --no-sync lint-imports

crds: .venv/.synced  ## Generate crds/*.yaml and the chart's copies
	$(UV) run --no-sync python -m kubedistill_api.crd crds
	$(UV) run --no-sync python charts/render.py
	$(UV) run --no-sync python -m kubedistill_api.reference docs

test: lint control-plane  ## Lint, types, layers; then all tests, real gangs on a real control plane included
	$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

chaos: .venv/.synced control-plane  ## Faults at every call, and of nodes; about 100 minutes. FAMILY=… CASE=… SEED=… SAMPLE=…
	$(RUN) python -m chaos --seed $(or $(SEED),0) $(if $(FAMILY),--family $(FAMILY)) \
		$(if $(CASE),--case $(CASE)) $(if $(SAMPLE),--sample $(SAMPLE))

.PHONY: chaos help setup control-plane demo demo-smollm2 down lint crds test
