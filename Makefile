# Two commands do everything on a fresh Debian or Ubuntu machine: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: integration load
.PHONY: sim etcd network proto bench-cluster bench-alerts bench-archive soak
.PHONY: help demo test check format bench clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# Debian splits ensurepip off into python3-venv; a machine with plain Python gets it here.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Tallymark needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV); \
		echo "installing python3-venv"; \
		SUDO=$$(test $$(id -u) = 0 || echo sudo); \
		$$SUDO apt-get update -q && $$SUDO apt-get install -y -q --no-install-recommends python3-venv; \
		$(PYTHON) -m venv $(VENV); }

$(VENV)/.server: pyproject.toml | $(BIN)/python
	@echo "installing Tallymark into $(VENV)"
	@$(BIN)/python -m pip install -q -e '.[server]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "installing Tallymark and what its tests need into $(VENV)"
	@$(BIN)/python -m pip install -q -e '.[test]'
	@touch $@

$(VENV)/.load: pyproject.toml | $(BIN)/python
	@echo "installing Tallymark and what its load tests need into $(VENV)"
	@$(BIN)/python -m pip install -q -e '.[load]'
	@touch $@

demo: $(VENV)/.server ## meter a git repository's history, show totals, leave the server up
	@$(BIN)/tallymark demo

# Half of the time that tests of processes take they wait, for a lease to run out or a process to end: a machine that is
# left to itself may get through sooner with a worker more than it has processors.
WORKERS ?= 2
# Kernels are compiled once before tests start servers side by side, each of which would compile them otherwise.
test: $(VENV)/.test etcd network ## unit, scenario and process-level tests
	@echo "compiling the kernels"
	@$(BIN)/python -c 'from tallymark_node.dev import warm_up; warm_up()'
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# pytest doesn't look into tests/containers unless it is told to: everything else runs without an engine.
integration: $(VENV)/.test ## images, a cluster of containers, and the compose file; needs no registry
	@.ci/install-docker
	@.ci/start-docker bash -c '.ci/build-images && exec $(BIN)/python -m pytest tests/containers'

HOST ?= 127.0.0.1:7001
SECONDS ?= 30
USERS ?= 10
GENERATORS ?= 1
load: $(VENV)/.load ## a load on HOST=host:port[,host:port] for SECONDS=…, with USERS=… and GENERATORS=…
	$(BIN)/python -m locust -f loadtests/locustfile.py --headless --only-summary --host $(HOST) -t $(SECONDS)s \
		-u $(USERS) -r $(USERS) --stop-timeout 60 --generators $(GENERATORS)

START ?= 0
SEEDS ?= 1000
sim: $(VENV)/.test ## the simulator: SEEDS=… seeds from START=… on; a failing one's history is printed
	$(BIN)/python -m tests.sim.run --start $(START) --seeds $(SEEDS) --workers 2

etcd: ## install etcd, which tests of clusters run, where there is none
	@.ci/install-etcd

network: ## install what tests of cut networks need, where it isn't there
	@.ci/install-network

proto: $(VENV)/.test ## generate the gRPC code anew
	$(BIN)/python libs/runtime/proto/generate.py

check: $(VENV)/.test ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.test ## print the performance table
	$(BIN)/tallymark bench

bench-cluster: $(VENV)/.server etcd ## the performance of a cluster on this machine, beside dev's, and its failovers
	$(BIN)/tallymark bench --cluster
	$(BIN)/tallymark bench --failover

MINUTES ?= 15
RATE ?= 300000
soak: $(VENV)/.server ## load, queries, archive and recycling for MINUTES=…, at RATE=… events/s or RATE=max
	$(BIN)/tallymark bench --soak $(MINUTES) --rate $(RATE) $(SOAK)

EVENTS ?= 1_000_000_000
bench-archive: $(VENV)/.server ## a store with EVENTS=… in its archive; needs 20 bytes of disk for each, below TMPDIR
	$(BIN)/tallymark bench --archive $(subst _,,$(EVENTS))

bench-alerts: $(VENV)/.server etcd ## how soon alerts of a cluster are there, and how many an instance hands out
	$(BIN)/tallymark bench --alerts

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
