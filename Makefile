# Every target sets up what it needs by itself: a virtual environment with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check format schema clean

demo: $(READY)
	$(BIN)/lightleak demo --out lightleak-demo --no-open

test: $(READY) check
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

# verdict.json's JSON Schema follows the classes that write it; a test holds them together.
schema: $(READY)
	$(BIN)/python -m lightleak.validity.schemas

clean:
	rm -rf $(VENV) lightleak-demo

# torch first and alone: it has to be the version of the lock before anything else asks for it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)
