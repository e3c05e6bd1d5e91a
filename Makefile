# `make` lists the targets. Those that need the environment make it first; a second call skips what is done.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo report airflow-setup airflow retrain test test-fast test-system lint check docs hooks images pins audit clean

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TF_CPP_MIN_LOG_LEVEL := 2

# Debian and Ubuntu split ensurepip off into python3.11-venv; without it a virtual environment gets no pip.
PYTHON = $(shell for python in python3.11 python3; do \
	"$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo "$$python" && break; done)
MISSING = $(strip $(if $(PYTHON),,python3.11 python3.11-venv) \
	$(foreach program,gcc g++ cmake make git,$(if $(shell command -v $(program)),,$(program))))
check-prerequisites = $(if $(MISSING),$(error set-up needs $(MISSING), not found on this machine; install with: \
	$(if $(filter-out 0,$(shell id -u)),sudo )apt-get install -y $(MISSING)))
define new-environment
	@if [ -L $(1) ]; then echo "error: $(1) is a link: set-up would empty the folder that it leads to, which others may" \
		"use; remove the link" >&2; exit 1; fi
	$(PYTHON) -m venv --clear $(1)
endef
pip-install := .venv/bin/python -m pip install --require-hashes --no-deps

# The stamps bear the hash of what they were made from, and are set last: other pins, or an interrupted set-up, have none.
PACKAGES := .venv/packages-$(shell cat requirements/build.txt requirements/ml.txt | sha256sum | cut -c -12)
GPU := $(if $(HOROVOD_GPU_OPERATIONS),requirements/cuda.txt)
HOROVOD := .venv/horovod-$(shell { cat requirements/horovod.txt docker/build_horovod.sh $(GPU); command -v mpicxx || true; \
	echo "$${HOROVOD_GPU_OPERATIONS:-}"; } | sha256sum | cut -c -12)

TOOLS := .venv-tools/packages-$(shell sha256sum requirements/tools.txt | cut -c -12)
AIRFLOW := .venv-airflow/packages-$(shell sha256sum < requirements/airflow.txt | cut -c -12)

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(HOROVOD) ## the environment, .venv: pinned packages, and Horovod built against them (about five minutes)

# The build tools come first and serve instead of build isolation, which would fetch its own, unpinned.
$(PACKAGES):
	@$(check-prerequisites)
	$(call new-environment,.venv)
	$(pip-install) -r requirements/build.txt
	$(pip-install) --no-build-isolation -r requirements/ml.txt
	@touch $@

$(HOROVOD): $(PACKAGES)
	@$(check-prerequisites)
	@rm -f .venv/horovod-*
	$(if $(GPU),$(pip-install) -r $(GPU))
	docker/build_horovod.sh .venv/bin/python
	@touch $@

demo: setup ## the six stages on the embedded data set, from data to a judged model
	dvc repro
	@dvc metrics show
	@if ! git diff --quiet HEAD -- params.yaml; then \
		echo "params.yaml is not the committed one. The figures that differ:"; dvc metrics diff HEAD; \
	elif [ -z "$$(git status --porcelain -- dvc.lock metrics.json)" ]; then \
		echo "Bit for bit what dvc.lock and metrics.json say."; \
	elif git diff --quiet HEAD -- metrics.json; then \
		echo "The figures that metrics.json says. Hashes differ: \`git diff dvc.lock\` shows which, and" \
			"data/model/provenance.json names the processor and the Python of the training."; \
	else \
		echo "This hardware gave other results than metrics.json says. The figures that differ:"; dvc metrics diff HEAD; \
	fi

BASE ?= main
export BASE
report: setup ## what this branch changed against BASE=main, for a reviewer: data/reports/review/
	python -m pipeline.report "$$BASE"

airflow-setup: $(AIRFLOW) ## Airflow's own environment, .venv-airflow: pinned packages (about two minutes)

$(AIRFLOW):
	@$(check-prerequisites)
	$(call new-environment,.venv-airflow)
	.venv-airflow/bin/python -m pip install --require-hashes --no-deps -r requirements/airflow.txt
	@touch $@

PORT ?= 8080
airflow: setup airflow-setup ## Airflow with the retraining's DAGs on 127.0.0.1:PORT=8080, until Ctrl-C
	@.venv-airflow/bin/python -m dags.standalone "$(PORT)"

REASON ?= by hand
CONF ?= {}
export REASON CONF
retrain: airflow-setup ## what is committed here, retrained by that Airflow and followed; REASON='why' CONF='{"train.epochs": 9}'
	@.venv-airflow/bin/python -m dags.retrain_now "$$REASON" "$$CONF"

test: setup ## the fast and the slow tests; no network needed
	pytest -n 2 --dist loadfile -m "fast or slow"

test-fast: setup ## the fast tests, under two minutes
	pytest -m fast

test-system: setup airflow-setup ## all tests; names first the programs that are missing and how to install them
	pytest

lint: setup ## ruff, mypy, and the direction of the imports
	ruff check
	ruff format --check
	mypy
	lint-imports

check: lint test airflow-setup ## what CI runs: lint, test, and the system tests whose programs are here
	pytest -m system

docs: setup ## the pages that are made of the code and of the environments (THIRD_PARTY.md wants .venv-airflow, too)
	python -m docs.parameters
	python -m docs.third_party

$(TOOLS):
	@$(check-prerequisites)
	$(call new-environment,.venv-tools)
	.venv-tools/bin/python -m pip install --require-hashes --no-deps -r requirements/tools.txt
	@touch $@

hooks: setup $(TOOLS) ## git runs lint before each commit, from the locked environment
	.venv-tools/bin/pre-commit install

# --strict: a package that the index knows nothing of is a failure, not a pass. What was looked into and accepted stands
# with its reason in a table of docs/supply_chain.md.
audit: $(TOOLS) ## known vulnerabilities of the pins, by PyPI's data
	for name in build ml horovod benchmarks airflow cuda deployment tools; do echo "requirements/$$name.txt"; \
		.venv-tools/bin/pip-audit --strict --disable-pip --require-hashes -r requirements/$$name.txt \
			$$(sed -nE 's/^\| ((GHSA|PYSEC|CVE)-[^ ]+) .*/--ignore-vuln \1/p' docs/supply_chain.md); done

ENGINE ?= docker
BASE_IMAGE ?= docker.io/library/debian:bookworm-slim
CUDA ?=
VERSION ?= $(shell git describe --always --dirty)
images: ## train, airflow and worker, by ENGINE=docker or buildah; CUDA=nvidia/cuda:12.9.1-devel-ubuntu22.04 for GPUs
	for target in train airflow worker; do $(ENGINE) build $(if $(filter buildah,$(ENGINE)),--format docker --layers) \
		--build-arg "BASE=$(BASE_IMAGE)" --build-arg "CUDA=$(CUDA)" --build-arg "VERSION=$(VERSION)" \
		--build-arg "REVISION=$$(git rev-parse HEAD)" --target "$$target" --file docker/Dockerfile \
		--tag "effdet-$$target$(if $(CUDA),-cuda):$(VERSION)" .; done

pins: setup ## the newest versions that requirements/*.in allow, pinned and hashed
	@cd requirements && for name in build ml benchmarks airflow cuda deployment tools; do \
		UV_CUSTOM_COMPILE_COMMAND="make pins" uv pip compile --quiet --upgrade --generate-hashes --no-annotate \
			--python-version 3.11 --output-file $$name.txt $$name.in >/dev/null; done
	@git --no-pager diff --stat -- requirements

clean: ## removes the environments and the tools' caches; data, cached results and checkpoints stay
	rm -rf .venv .venv-airflow .venv-tools .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
