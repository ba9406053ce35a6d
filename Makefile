# Two commands do everything: `make reproduce` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/paper
SCALE ?= full

# Where the tests run with the lowest versions that pyproject.toml allows.
LOWEST := .venv-lowest
# Where they run with another Python, named by PYTHON, and where releases are built.
OTHER := .venv-$(notdir $(PYTHON))
RELEASE := .venv-release
# Tests to run, e.g. PYTEST=tests/nqm/test_table.py; all by default.
PYTEST ?=

.PHONY: reproduce test test-all checks test-portable test-lowest test-python release lint docs bench bench-gpu gallery pictures clean setup setup-neural
reproduce: setup  ## the paper's theory figures, tables and report under $(OUT)
	$(BIN)/nqm reproduce all --out $(OUT) --scale $(SCALE)

test: checks  ## lint, types, the site without a warning, and every test that is quick
	$(BIN)/pytest -n auto --dist worksteal -m "not slow" $(PYTEST)

test-all: checks  ## the same with notebooks, processes, a cluster, and long statistics
	$(BIN)/pytest -n auto --dist worksteal $(PYTEST)

test-portable: setup-neural  ## every test as on another processor, with another BLAS, on new examples
	ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Haswell HYPOTHESIS_PROFILE=random \
	  $(BIN)/pytest -n auto --dist worksteal $(PYTEST)

# Without PyTorch, of which one version is pinned: the tests of neural are left out.
test-lowest: $(LOWEST)/.installed  ## every test of nqm with the lowest versions allowed
	$(LOWEST)/bin/python -m pytest -n auto --dist worksteal $(PYTEST)

# Without PyTorch as well; e.g. PYTHON=python3.13.
test-python: $(OTHER)/.installed  ## every test of nqm with another Python
	$(OTHER)/bin/python -m pytest -n auto --dist worksteal $(PYTEST)

release:  ## archives in dist/, checked
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet build twine
	rm -rf dist
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/python -m twine check --strict dist/*

checks: setup-neural $(VENV)/.installed-docs
	$(MAKE) --jobs 2 lint docs

lint: setup-neural
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## the site, out/site/index.html; a warning is an error
	rm -rf docs/reference/generated  # stubs of names that are gone
	$(BIN)/numpydoc lint $$(find nqm neural figures paper_repro -name "*.py")
	$(BIN)/sphinx-build --quiet --jobs auto --fail-on-warning --keep-going docs out/site

bench: setup-neural  ## ratios against named peers, printed in one run
	$(BIN)/python -m benchmarks.exact_moments
	$(BIN)/python -m benchmarks.monte_carlo
	$(BIN)/python -m benchmarks.variance_reduction
	$(BIN)/python -m benchmarks.zhang2019
	$(BIN)/python -m benchmarks.late_phase
	$(BIN)/python -m benchmarks.scheduled
	$(BIN)/python -m benchmarks.quantiles
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.allocator

bench-gpu: setup-neural  ## on a GPU: speed, memory and a comparison over seeds, in ten minutes
	$(BIN)/python -m benchmarks.gpu

gallery: setup  ## run the gallery's code, draw its pictures, note what it prints; render docs/tables
	$(BIN)/python -m figures.gallery docs/gallery*.md
	$(BIN)/python -m figures.pages docs/*.md

pictures: setup-neural  ## draw the pictures of docs/images from docs/tables
	$(BIN)/python -m paper_repro.pictures docs

setup: $(VENV)/.installed
setup-neural: $(VENV)/.installed-neural  ## PyTorch as well

# The stamp makes re-runs quick: packages are installed again only when their list changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

$(VENV)/.installed-neural: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,cluster,neural,vision,oracles]' --constraint constraints.txt
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-neural
	$(BIN)/python -m pip install --quiet --editable '.[docs]' --constraint constraints.txt
	touch $@

$(OTHER)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --editable '.[test]' --constraint constraints-lowest.txt
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(OTHER) $(RELEASE) out build dist docs/reference/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
