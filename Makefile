# `make help` lists what can be made. Everything runs in .venv, which is created when missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Where it is set, every process of the tests would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo browser picture gallery screenshots docs test test-broad test-all test-real test-gpu coverage check audit format perf clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(READY) ## create .venv and install the package with its development tools

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## dense, CAMERA-P and the random control at 20, 40, 60 %, and the report
	$(BIN)/bench run experiment=demo
	$(BIN)/bench report

# The report's tests need a browser. Debian's is installed where that may be done; elsewhere these
# tests say what is missing and skip, unless BENCH_BROWSER=required.
browser:
	@[ -n "$$(which chromium chromium-browser google-chrome 2>/dev/null)" ] \
	|| { [ "$$(id -u)" = 0 ] && which apt-get >/dev/null 2>&1 && apt-get update -qq \
	     && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	|| echo "no Chromium: the report's browser tests will be skipped"

picture: $(READY) browser ## the README's picture of the report, from the records of a small run
	$(BIN)/bench run experiment=demo benchmark.limit=100 '~benchmark.perplexity' results_dir=build/picture tracker=none
	$(BIN)/python -m tests.reporting.html.screenshots build/picture --readme docs/images/report.png

gallery: $(READY) ## the pictures of docs/plots.md, from the records of `make picture`
	for kind in front curves breakdown "allocation latest:camera_p" "calibration latest:dense latest:camera_p"; do \
	  $(BIN)/bench plot $$kind --results-dir build/picture --output docs/images/$${kind%% *}.png || exit 1; \
	done

screenshots: $(READY) browser ## every page of the report on build/picture, at 1,400 and 390 pixels
	$(BIN)/python -m tests.reporting.html.screenshots build/picture build/screenshots

docs: $(READY) ## the documentation site in build/site; a warning or a dead link is an error
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(READY) browser ## the tests, in under ten minutes on two cores
	$(BIN)/python -m pytest -n 2 -m 'not broad and not slow and not gpu and not real'

test-broad: $(READY) browser ## the same on more models, and what takes seconds
	$(BIN)/python -m pytest -n 2 -m 'broad and not slow and not gpu and not real'

test-all: $(READY) browser ## all tests and the long proofs
	HYPOTHESIS_PROFILE=searching $(BIN)/python -m pytest -m 'not gpu and not real'

# SLIMBENCH_REAL_TASKS=FOLDER adds the tests on real tasks.
test-real: $(READY) ## the tests on a real checkpoint, which is downloaded once
	$(BIN)/python -m pytest -rs -m real tests/real

test-gpu: $(READY) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

coverage: $(READY) browser ## the tests, and the share of lines and branches that they reach
	$(BIN)/python -m pytest -n 2 -m 'not slow and not gpu and not real' --cov --cov-report=term --cov-report=html

check: $(READY) ## lint, format, types, layers, dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.structure
	$(BIN)/python -m tests.security.audit

audit: $(READY) ## pinned versions, licences, and known vulnerabilities where the network allows
	$(BIN)/python -m tests.security.audit

format: $(READY) ## format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

perf: $(READY) ## measure speed and memory against their goals
	$(BIN)/python -m tests.performance

clean: ## remove what was built; results stay
	rm -rf $(VENV) build dist *.egg-info htmlcov .coverage* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
