# Two commands do all the set-up: `make demo` and `make test`. Needs Python 3.11 or later with venv.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# Waiting threads sleep instead of spinning: on shared cores small models run many times faster.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint clean

demo: $(READY)
	$(VENV)/bin/codebook demo --out out/demo

test: lint
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[cpu,test]'
	touch $@

clean:
	rm -rf $(VENV) out dist build
