# Everything runs in its own virtual environment; `make demo` and `make test` need nothing but Python and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build of torch, where the package index has one; any version in the range of pyproject.toml will do.
TORCH ?= torch==2.13.0
FAISS ?= cpu
# Material would print a page about plans of MkDocs.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-slow check docs docs-serve fix bench chaos corrupt peers experiments results clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[$(FAISS),dev]"
	touch $@

install: $(VENV)/installed  ## make the virtual environment

demo: install  ## run the main job on shipped images and leave build/demo/report.html
	$(BIN)/gsl demo --output build/demo

# Those without Ray two at a time, a file in one process: those with Ray share one Ray.
test: install  ## run the tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not ray and not slow"
	$(BIN)/python -m pytest -q -m "ray and not slow"

test-fast: install  ## run the tests that need no Ray
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not ray and not slow"

test-slow: install  ## run the tests that take minutes each
	$(BIN)/python -m pytest -q -m slow

check: install  ## lint, format, types, links and the site; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py tests/test_shipped_configs.py tests/test_docs.py

docs: install  ## build the site into build/site, which is read without a server
	$(MKDOCS) build --strict

docs-serve: install  ## show the site at http://127.0.0.1:8001, built anew when a page changes
	$(MKDOCS) serve --dev-addr 127.0.0.1:8001

fix: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## measure the claims of the README, one after another
	$(BIN)/python benchmarks/snapping.py
	$(BIN)/python benchmarks/encoding.py
	$(BIN)/python benchmarks/building.py
	$(BIN)/python benchmarks/memory.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/load.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kills.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py
	$(BIN)/python benchmarks/scanning.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/devices.py
	$(BIN)/python benchmarks/quantizers.py --seeds 1 --bytes 8
	$(BIN)/python benchmarks/cells.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/matching.py search
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/matching.py join
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/costs.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/multimodal.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/crosslayer.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/lowbit.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pipeline.py
	for stage in train codebook "encode images" "encode vectors" build search; do \
	    OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling.py "$$stage" || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/simulate.py

ROUNDS ?= 200
SEED ?= 0
MINUTES ?= 20
chaos: install  ## strike every stage with faults, and compare what is left (ROUNDS, SEED, MINUTES; goes on where it stopped)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py --rounds $(ROUNDS) --seed $(SEED) --minutes $(MINUTES)

PEERS_DATA ?= sift100k photos
peers: install  ## measure this project beside other systems on real vectors (hours; goes on where it stopped)
	$(BIN)/python -m pip install --quiet --editable ".[$(FAISS),dev,peers]"
	for data in $(PEERS_DATA); do for what in build time; do \
	    OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers.py $$what $$data || exit 1; done; done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scanning.py --books 16 --kinds pq "residual pq" vlq cq
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/growth.py
	for what in build time; do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/served.py $$what || exit 1; done
	$(BIN)/python benchmarks/ingest.py photos

corrupt: install  ## damage artefacts of every kind, thousands of times each (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/corrupt.py

experiments: install  ## carry out the experiments whose data is prepared (hours; goes on where it stopped)
	for settings in benchmarks/experiments/*.yaml; do $(BIN)/python benchmarks/experiment.py $$settings || true; done

results: install  ## redraw docs/results from the runs that are there
	$(BIN)/python benchmarks/draw_results.py
	$(BIN)/python benchmarks/draw_peers.py
	$(BIN)/python benchmarks/draw_plan.py
	$(BIN)/python benchmarks/draw_corruption.py
	$(BIN)/python benchmarks/draw_scale.py
	$(BIN)/python benchmarks/draw_service.py
	$(BIN)/python benchmarks/draw_served.py
	$(BIN)/python benchmarks/draw_encoders.py
	$(BIN)/python benchmarks/draw_chaos.py

clean:  ## remove what was built, the virtual environment apart
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
