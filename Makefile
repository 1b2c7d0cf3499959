# make demo   the whole pipeline on the embedded data
# make test   the tests
# make study  the demo and BraTS's layout with several seeds, and variants: hours; again resumes
# All create .venv first. On a machine without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu
# saves the download of the CUDA libraries.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
DEMO ?= configs/demo.yaml
STUDY ?= configs/study.yaml
# patients' folders for the study's experiment brats2021, which is left out where there are none
BRATS ?= data/brats2021
LAUNCH := $(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml -m cldf_dist

.PHONY: install check test test-gpu test-slurm demo study bench phantom-check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' EXTRAS=dev slurm/install.sh '$(VENV)'
	touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# each worker is a process of its own: one thread each is faster than fighting over the cores
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-slurm: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slurm -rs tests/slurm $(PYTEST_ARGS)

# two single-thread processes beat one process of two threads on small CPUs
demo: $(STAMP)
ifeq ($(HAS_GPU),yes)
	$(BIN)/python -m cldf_dist run $(DEMO) $(DEMO_ARGS)
else ifeq ($(CORES),1)
	$(BIN)/python -m cldf_dist run $(DEMO) $(DEMO_ARGS)
else
	ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(LAUNCH) run $(DEMO) $(DEMO_ARGS)
endif

# one process that starts each run as `make demo` does
study: $(STAMP)
ifeq ($(HAS_GPU),yes)
	BRATS='$(BRATS)' $(BIN)/python -m cldf_dist study $(STUDY) $(STUDY_ARGS)
else ifeq ($(CORES),1)
	BRATS='$(BRATS)' $(BIN)/python -m cldf_dist study $(STUDY) $(STUDY_ARGS)
else
	BRATS='$(BRATS)' ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 \
		$(BIN)/python -m cldf_dist study $(STUDY) launcher='$(LAUNCH)' $(STUDY_ARGS)
endif

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_contrast.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_stream.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_train.py --parts sizes overhead large
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_cache.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_decode.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_stages.py --config configs/demo.yaml --train-slices 700
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_scaling.py

phantom-check: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/phantom_check.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
