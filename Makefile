# make demo   three quantizers side by side on bundled photographs, minutes on a laptop
# make test   every test, every notebook, one worker per core
# make check  lint, layers and the fast tests, for the time between two edits
# make lab    JupyterLab; a page with all notebooks opens
# make app    the same notebooks without code
# make bench  speed and memory against the published form and the matrix products alone, on this machine, into runs/bench
# make bench-gpu  what one GPU gives beside what it must give, under 7 minutes, into runs/bench/gpu; PARTS="sampling" for one part
# PRESET=smoke makes a demo of a minute, TESTS=tests/test_runs.py tests one file.
# Each builds .venv from requirements.lock when it is missing or out of date, and reuses it otherwise.
PYTHON ?= python3
PY := .venv/bin/python
# uv keeps one unpacked copy of every package in its cache and hard-links it into each .venv (UV_CACHE_DIR moves the cache).
export UV_SYSTEM_CERTS ?= 1
export UV_HTTP_TIMEOUT ?= 300
export MPLBACKEND ?= agg

PRESET ?= demo
TESTS ?=

.PHONY: demo test check lab app bench bench-gpu lint lock clean

demo: .venv/.ready
	@$(PY) -m ibqlab run notebooks/explore_collapse.ipynb preset=$(PRESET)

# One file needs no workers, which take seconds to start. Compiled ahead, since each of a hundred processes would compile
# the package again where PYTHONDONTWRITEBYTECODE is set. What glibc gives back to the system it has to ask for again,
# page by page, which would take a tenth of the time.
test check: export MALLOC_MMAP_THRESHOLD_ = 268435456
test check: export MALLOC_TRIM_THRESHOLD_ = 536870912
test: .venv/.ready
	@$(PY) -m compileall -q -j 0 ibqlab
	@$(PY) -m pytest $(if $(TESTS),$(TESTS),$(WORKERS))

check: lint
	@$(PY) -m pytest -q $(WORKERS) $(FAST:%=tests/test_%.py)

WORKERS := --numprocesses logical --maxprocesses 8 --no-loadscope-reorder
FAST := layers quantizers index_backprop lfq usage geometry comparisons config files lead_lag ema resizing pictures \
  tokens pages messages environment transformer sampling

lab: export JUPYTER_PATH := $(CURDIR)/ibqlab/notebooks/jupyter$(addprefix :,$(JUPYTER_PATH))
lab: export JUPYTER_CONFIG_PATH := $(CURDIR)/ibqlab/notebooks/jupyter$(addprefix :,$(JUPYTER_CONFIG_PATH))
lab: .venv/.ready
	@env -u MPLBACKEND $(PY) -m jupyterlab --notebook-dir=. --LabApp.default_url=/voila/render/notebooks/index.ipynb \
	  $(if $(filter 0,$(shell id -u)),--allow-root)

app: .venv/.ready
	@env -u MPLBACKEND $(PY) -m ibqlab app

# Threads that wait may spin here, as they do without ibqlab: nothing else should run on the machine meanwhile. The last
# line's batch is the published one.
bench: export GOMP_SPINCOUNT = 300000
bench: .venv/.ready
	@$(PY) experiments/benchmarks/index_backprop.py --output $(BENCH)/index_backprop.csv
	@$(PY) experiments/benchmarks/cross_entropy.py --output $(BENCH)/cross_entropy.csv
	@$(PY) experiments/benchmarks/sampling.py --compiled --output $(BENCH)/sampling.csv
	@$(PY) experiments/benchmarks/training_speed.py imagenet/ibq_262144 --published-form \
	  --steps 2 --output $(BENCH)/training_step.csv
	@echo "tables and figure: $(BENCH)"

# Machines with GPUs often bring their own torch and reach no package index: .venv is taken where it is there already.
bench-gpu:
	@$(or $(wildcard $(PY)),$(PYTHON)) experiments/benchmarks/gpu.py $(if $(PARTS),--parts $(PARTS)) --output $(BENCH)/gpu

BENCH ?= $(or $(IBQLAB_RUNS),runs)/bench

lint: .venv/.ready
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m nbstripout --verify $(NBSTRIPOUT_KEYS) notebooks/*.ipynb

# Newest versions that pyproject.toml allows; look at the diff, then run make test.
lock: .venv/.ready
	@.venv/bin/uv pip compile pyproject.toml --extra all --universal --python-version 3.11 --upgrade \
	  --no-header --no-annotate --quiet -o requirements.lock
	@git --no-pager diff --stat requirements.lock

clean:
	rm -rf .venv

NBSTRIPOUT_KEYS := --extra-keys "metadata.papermill metadata.language_info"

# UMAP compiles for half a minute when it is first used; once, here, rather than in front of somebody who waits for a figure.
WARM_UP := import torch; from ibqlab.diagnostics import project_codes; project_codes([torch.randn(64, 8)], torch.randn(64, 8))

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ibqlab needs Python 3.11 or newer, this is %s; type: make PYTHON=python3.11 $(MAKECMDGOALS)" % sys.version.split()[0])'
	@echo "building .venv from requirements.lock (the first time on a machine downloads about 6 GB)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@test -x .venv/bin/uv || $(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	@.venv/bin/uv pip sync --quiet --compile-bytecode --python $(PY) requirements.lock
	@.venv/bin/uv pip install --quiet --python $(PY) --no-deps --editable .
	@$(PY) -c 'import torchvision' || (echo "torchvision does not import against this torch: run 'make clean', then the same command again"; exit 1)
	@$(PY) -c '$(WARM_UP)' || true
	@touch $@
