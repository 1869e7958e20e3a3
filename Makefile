# Everything a checkout needs is made here: `make demo`, `make test` and `make check` work on a bare
# machine with Python 3.11 to 3.13, pip and make. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv

# uv from the PATH if it is new enough, else a pinned one in a folder of its own. `pip install --target`
# needs neither a virtual environment nor ensurepip, and leaves an externally managed Python alone.
UV_VERSION := 0.13.9
UV := $(if $(shell uv venv --help 2>/dev/null | grep -e --clear),uv,.venv-uv/bin/uv)

BIN := $(VENV)/bin
PIP := $(UV) pip
# "cpu": PyTorch's CPU builds, without the CUDA libraries; docker/libraries.sh has more. An environment
# keeps its kind.
TORCH ?= $(or $(shell cat $(VENV)/.torch 2>/dev/null),cuda)
SYNC = UV=$(UV) sh docker/libraries.sh "$(TORCH)" $(VENV)
DEV_READY := $(VENV)/.ready-dev
# The files of the tests are shared out among as many processes as there are cores, but four at most:
# each may start others, and a file's tests share what they have made.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile
RUN_READY := $(VENV)/.ready

DEMO_DATA := data/fashion-mnist-32
DEMO_RUN := runs/demo
DEMO_TRAIN := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no pipeline/train.py --config configs/demo.yaml

export UV_PYTHON_DOWNLOADS := never
export UV_HTTP_TIMEOUT ?= 300
export UV_COMPILE_BYTECODE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-faults faults-long coverage mutants check wings keys docs bench test-gpu bench-gpu lock clean fashion-mnist test-cluster test-container \
	slurm-programs newer-slurm container-programs FORCE

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

setup: $(DEV_READY)  ## The environment in .venv, from the hashed lock file; TORCH=cpu: without CUDA libraries

demo: $(RUN_READY)  ## Prepare Fashion-MNIST, train a small DCGAN on this machine, show scores and samples
	@test -f $(DEMO_DATA)/index.json || $(MAKE) --no-print-directory fashion-mnist
	@test -f $(DEMO_DATA)/index.json || $(BIN)/python -m pipeline.prepare fashion-mnist \
		--out $(DEMO_DATA) --size 32 --channels 1
	$(DEMO_TRAIN)
	$(BIN)/python -m pipeline.evaluate --run $(DEMO_RUN) --pending
	@echo "samples: $$(ls -t $(DEMO_RUN)/samples/*.png | head -n 1)"

test: $(DEV_READY)  ## Every test that needs neither a cluster nor the network nor damage on purpose
	$(PYTEST) -m "not cluster and not container and not faults and not gpu" --durations=20

test-faults: $(DEV_READY)  ## Damaged and hostile files, full disks, kills: a sample of tests/faults, and more
	$(PYTEST) -m faults

faults-long: $(DEV_READY)  ## Every case of tests/faults, and a soak of 20 minutes; docs/reliability.md (hours)
	$(BIN)/python tests/faults --all --write

# A part: make coverage TESTS="tests/runtime tests/config". A failed test does not stop it: a test that
# limits the size of files also keeps coverage from writing its own.
coverage: $(DEV_READY)  ## Lines of pipeline/ that no test reaches, subprocesses included
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest -m "not cluster and not container" $(TESTS)
	-$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Some: make mutants MODULES="data/order runtime/signals".
mutants: $(DEV_READY)  ## Are changed lines noticed by the tests? Modules of tests/mutants.py, with scores
	$(BIN)/python tests/mutants.py $(MODULES)

test-cluster: $(DEV_READY) slurm-programs  ## The Slurm scripts on a two-node Slurm started for it (needs root)
	$(BIN)/python -m pytest -m cluster --durations=0

test-container: $(DEV_READY) container-programs  ## The image, built and run by a Docker engine started for it (root, 25 GB)
	$(BIN)/python -m pytest -m container --durations=0 -rP

check: $(DEV_READY)  ## Format, lint, types, imports, dependencies, dead code, spelling, scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/deptry pipeline
	$(BIN)/vulture
	$(BIN)/codespell benchmarks configs docker docs pipeline slurm tests *.md Makefile .ci .github CITATION.cff
	$(BIN)/shellcheck .ci/run $$(git ls-files --cached --others --exclude-standard -- '*.sh')
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml
	@# The schema's reader knows no !reset, the schema no null in its place.
	sed 's/!reset null/{}/' docker/compose.cpu.yaml | \
		$(BIN)/check-jsonschema --quiet --default-filetype yaml --builtin-schema vendor.compose-spec -
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --default-filetype yaml \
		--builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/kubernetes-validate --quiet --strict docker/kubernetes/*.yaml
	$(MAKE) --no-print-directory docs

wings: $(DEV_READY)  ## The table of pipeline/'s wings and their imports, in CONTRIBUTING.md
	$(BIN)/python tests/wings.py

keys: $(DEV_READY)  ## docs/configuration.md, from the dataclasses of the configuration
	$(BIN)/python tests/key_page.py

# Git's list: a file that is not committed is no page.
docs: $(DEV_READY)  ## The pages as a site, build/site/index.html; a broken link is an error
	rm -rf build/pages build/site
	mkdir -p build/pages
	git ls-files '*.md' '*.png' '*.gif' 'tests/faults/*.py' CITATION.cff | tar -cf - -T - | tar -xf - -C build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(DEV_READY)  ## Tables of benchmarks/: training, step, loader, order, scale, overheads, evaluation
	$(BIN)/python benchmarks/training.py --rounds 1
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/loader.py --rounds 1
	$(BIN)/python benchmarks/order.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/overheads.py --rounds 2
	$(BIN)/python benchmarks/evaluation.py

# An interpreter that has all packages, where nothing can be installed: make test-gpu GPU_PYTHON=python3.
GPU_PYTHON ?= $(BIN)/python
GPU_READY := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(DEV_READY))
ON_GPU := PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(GPU_PYTHON)

test-gpu: $(GPU_READY)  ## What only a GPU shows: compiled steps, waits, memory, kills, scores (3 minutes)
	$(ON_GPU) -m pytest tests/test_gpu.py -m gpu --durations=10 $(TESTS)

bench-gpu: $(GPU_READY)  ## Speed on a GPU: shares of the card's own limits, in runs/bench-gpu (5 minutes)
	$(ON_GPU) benchmarks/gpu.py --out $(or $(OUT),runs/bench-gpu) --seconds $(or $(SECONDS),240)

lock: | $(filter .venv-uv/%,$(UV))  ## requirements*.txt from pyproject.toml; pins change only where they must
	$(PIP) compile --quiet $(LOCK) $(RUNTIME) -o requirements.txt pyproject.toml
	$(PIP) compile --quiet $(LOCK) $(RUNTIME) -c requirements.txt --extra dev --extra cluster \
		--extra docs --extra probe --extra figures --extra onnx --extra report --extra sources --extra tensorboard \
		-o requirements-dev.txt pyproject.toml
# A cluster's image cannot install what it lacks: shards from anywhere (86 MB of 6 GB) belong in.
RUNTIME := --extra offline-eval --extra s3 --extra gs
LOCK := --universal --generate-hashes --python-version 3.11 --no-header \
	--no-emit-index-url --no-emit-find-links --annotation-style line

clean:  ## Everything made here except data/ and runs/
	rm -rf $(VENV) .venv-uv .slurm-24 build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian packages the images; a machine without them lets `pipeline.prepare` find another source.
fashion-mnist:
	@test -d /usr/share/datasets/fashion-mnist || ! command -v apt-get >/dev/null || { \
		test "$$(id -u)" = 0 && root= || root="sudo -n"; \
		install="$$root apt-get install -y -qq dataset-fashion-mnist"; \
		$$install || { $$root apt-get update -qq && $$install; }; \
	} </dev/null >/dev/null 2>&1 || true

# Without them, and where they cannot be installed, the tests say so and are skipped. Daemons that the
# packages would start are held back: the tests start their own.
slurm-programs: newer-slurm
	@test "$$(id -u)" != 0 || type slurmctld slurmd srun munged >/dev/null || \
		! command -v apt-get >/dev/null || { \
		test -e /usr/sbin/policy-rc.d || { made=1; printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; \
			chmod +x /usr/sbin/policy-rc.d; }; \
		install="apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge"; \
		$$install || { apt-get update -qq && $$install; }; \
		test -z "$$made" || rm -f /usr/sbin/policy-rc.d; \
	} </dev/null >/dev/null 2>&1 || true

# A newer Slurm, in a Debian of its own (195 MB). The folder appears when it is whole.
newer-slurm:
	@test -e .slurm-24/.ready || test "$$(id -u)" != 0 || { \
		type mmdebstrap || ! command -v apt-get || { \
			install="apt-get install -y -qq --no-install-recommends mmdebstrap debian-archive-keyring"; \
			$$install || { apt-get update -qq && $$install; }; }; \
		rm -rf .slurm-24 .slurm-24.tmp; \
		mmdebstrap --quiet --variant=minbase --include=slurmctld,slurmd,slurm-client,munge,hwloc \
			trixie .slurm-24.tmp && touch .slurm-24.tmp/.ready && mv .slurm-24.tmp .slurm-24; \
	} </dev/null >/dev/null 2>&1 || true

# Compose 2 is in no older Debian: its package is then taken from a newer one, for the tests alone.
container-programs:
	@test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || { \
		type dockerd docker mmdebstrap >/dev/null || { \
			test -e /usr/sbin/policy-rc.d || { made=1; printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; \
				chmod +x /usr/sbin/policy-rc.d; }; \
			install="apt-get install -y -qq --no-install-recommends docker.io iptables mmdebstrap"; \
			$$install || { apt-get update -qq && $$install; }; \
			type docker || apt-get install -y -qq --no-install-recommends docker-cli; \
			test -z "$$made" || rm -f /usr/sbin/policy-rc.d; }; \
		sh tests/container/compose.sh; \
	} </dev/null >/dev/null 2>&1 || true

# -- the environment ----------------------------------------------------------------------------

$(DEV_READY): requirements-dev.txt requirements.txt pyproject.toml $(VENV)/.torch
	@echo "installing PyTorch ($(TORCH)), the other libraries and the tools of development into $(VENV)"
	@$(SYNC) requirements-dev.txt
	@$(PIP) install --quiet --no-deps --no-build-isolation --python $(BIN)/python -e .
	@touch $(RUN_READY) $@

# What `make demo` needs; the development environment has it all and is left as it is.
$(RUN_READY): requirements.txt pyproject.toml $(VENV)/.torch
	@rm -f $(DEV_READY)
	@echo "installing PyTorch ($(TORCH)) and the other libraries into $(VENV)"
	@$(SYNC) requirements.txt
	@$(PIP) install --quiet --no-deps --no-build-isolation --python $(BIN)/python -e .
	@touch $@

# Written when TORCH changes: the environment is then synced anew.
$(VENV)/.torch: FORCE | $(VENV)/.made-by-$(notdir $(PYTHON))
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" >$@

# Made anew when PYTHON names another version than the environment has.
$(VENV)/.made-by-$(notdir $(PYTHON)): | $(filter .venv-uv/%,$(UV))
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
		echo "$(PYTHON): Python 3.11 to 3.13 is needed; name one: make PYTHON=python3.11 ..." >&2; \
		exit 1; }
	@version='import sys; print(sys.version_info[:2])'; \
		test -x $(BIN)/python && \
		test "$$($(BIN)/python -c "$$version")" = "$$($(PYTHON) -c "$$version")" || \
		$(UV) venv --quiet --clear --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	@touch $@

.venv-uv/bin/uv:
	PIP_USER=0 $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-input --no-deps \
		--root-user-action ignore --upgrade --target .venv-uv uv==$(UV_VERSION)
	@echo '*' > .venv-uv/.gitignore
	@touch $@
