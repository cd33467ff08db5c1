.DEFAULT_GOAL := help
.PHONY: help demo test e2e api-older cluster cluster-down kind chaos chaos-long check bench bench-scaling bench-joint bench-outage generate release-dry-run lock

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## Run the whole system on this machine; ARGS="--json FILE" also writes what happened
	@$(BIN)/python -m examples.media.demo $(ARGS)

test: $(READY) ## Run every level of test that this machine can run (the first run builds a cluster's binaries: about 13 min)
	@$(BIN)/python -m tests.levels test

e2e: $(READY) ## Run the chart, the images and the operator in a real cluster of two nodes (needs root on Linux, or E2E_KUBECONFIG)
	@$(BIN)/python -m tests.levels e2e

api-older: $(READY) ## Run level api on the oldest Kubernetes that is supported (the first run builds its control plane)
	@KUBEBUILDER_ASSETS="$$($(BIN)/python -m e2e.cluster.binaries --older)" $(BIN)/python -m tests.levels api

cluster: $(READY) ## Start that cluster in the background and print how to reach it
	@$(BIN)/python -m e2e.cluster.cluster up

cluster-down: $(READY) ## End it, with all that it left
	@$(BIN)/python -m e2e.cluster.cluster down

kind: $(READY) ## Make a kind cluster with the same images and pretended GPUs (needs Docker and kind), for E2E_KUBECONFIG
	@$(BIN)/python -m e2e.cluster.kind

chaos: $(READY) ## Kill everything that can be killed and count every job, 5 times each; ends with a table (CHAOS_SEED=N repeats)
	@$(BIN)/python -m tests.chaos.suite full

chaos-long: $(READY) ## The same 20 times each, with 90,000 jobs
	@$(BIN)/python -m tests.chaos.suite long

check: $(READY) ## Run what has to pass before a commit: format, lint, types, imports, generated files, unit tests
	@$(BIN)/python -m tests.levels check

bench: $(READY) ## Measure what admission costs, as ratios, and put the sample API under load (about 3 min; docs/benchmarks.md)
	@$(BIN)/python -m benchmarks.admission
	@$(BIN)/python -m benchmarks.media_api

generate: $(READY) ## Write the files that are made from others: the chart's version, CRD and README, manifests/ and docs/reference/
	@$(BIN)/python charts/render.py
	@$(BIN)/python -m docs.render

release-dry-run: $(READY) ## Build all of a release into dist/, with checksums, and publish nothing
	@$(BIN)/python -m charts.release

bench-scaling: $(READY) ## Compare the scaling rule with others; ARGS="--traces DIR --plots DIR" for recorded traces and pictures
	@$(BIN)/python -m benchmarks.scaling $(ARGS)

bench-joint: $(READY) ## Compare scaler and router on one view of capacity with one autoscaler a tier and a router by hand
	@$(BIN)/python -m benchmarks.joint

bench-outage: $(READY) ## Live through an outage of all accelerators, and compare waits with the simulator and with ideal late binding
	@$(BIN)/python -m benchmarks.outage

lock: $(READY) ## Bring requirements.lock in line with pyproject.toml; ARGS=--upgrade takes the newest versions
	@$(BIN)/uv pip compile --system-certs --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" \
		--all-extras --group examples --group test --group lint --group build $(ARGS) --output-file requirements.lock pyproject.toml

# uv, itself taken from the lock by pip, installs the rest in a few seconds where pip needs half a minute. It does not read pip's
# configuration: where packages come through a mirror that only pip knows, pip does it all.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d; this needs 3.11 or newer; name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" % sys.version_info[:2])'
	@echo "Setting up .venv from requirements.lock (some 300 MB, once)"
	@$(PYTHON) -m venv --clear .venv
	@sed -n '/^uv==/,/# via/p' requirements.lock | $(BIN)/pip install --quiet --require-hashes --requirement /dev/stdin
	@VIRTUAL_ENV=.venv $(BIN)/uv pip sync --system-certs $$([ -t 2 ] || echo --quiet) --require-hashes requirements.lock \
		|| $(BIN)/pip install --quiet --require-hashes --requirement requirements.lock
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
