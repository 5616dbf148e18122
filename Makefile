# Every target makes the virtual environment that it needs; a second run finds it ready.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
UV := $(abspath $(firstword $(wildcard $(BIN)/uv) $(shell command -v uv 2> /dev/null)))

# The tests start hundreds of Pythons: without this each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# What needs no gateway, no engine and no large package, and is quick.
QUICK := tests/unit tests/wire -m 'not thorough' \
	--ignore-glob 'tests/*/test_properties*.py' \
	--ignore tests/unit/test_verify_cli.py --ignore tests/unit/test_verify_plot.py \
	--ignore tests/unit/test_watch_cli.py

.PHONY: help check types tests demo bench micro fuzz mutants soak test compat docs figures lint dist programs clean

help: ## Show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per dependency group: a change of pyproject.toml installs the groups again.
# uv takes a fraction of pip's time. If uv is missing or fails, pip installs: it may know another
# index. An older pip than 25.1 knows no groups.
# Python compiles what it imports. To compile everything at once takes longer, and more space.
$(VENV)/%.installed: pyproject.toml | $(BIN)/python
	$(if $(UV),$(UV) pip install --quiet --python $(BIN)/python -e . --group $* ||) \
		{ $(PIP) 'pip>=25.1' && $(PIP) --no-compile -e . --group $*; }
	@touch $@

$(BIN)/uv: | $(BIN)/python
	$(PIP) 'uv>=0.9,<1'

check: $(VENV)/check.installed ## In a minute and 150 MB: lint, types, and the tests that need no gateway
	@$(MAKE) --no-print-directory --jobs 2 --output-sync types tests

types:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy --disable-error-code import-not-found --exclude ^tests/recipes/  # without large packages

tests:
	$(BIN)/python -m pytest -n auto --dist worksteal $(QUICK)

demo: $(VENV)/demo.installed ## Real engines, the real gateway, a session server and agents: the plugin on and off
	@exec $(BIN)/python -m demo

bench: $(VENV)/bench.installed ## What the plugin costs and what pinning gains: PARTS="call cache" runs some of it; PARTS=trace TRACES="FILE FILE"
	@exec $(BIN)/python -m benchmarks $(PARTS) $(TRACES)

micro: $(VENV)/bench.installed ## Micro-benchmarks of this tree beside those of BASE, the commit before by default
	@.ci/micro $(BASE)

fuzz: $(VENV)/fuzz.installed ## Inputs that a fuzzer makes up, against the laws of key, matcher and config: SECONDS=60 each
	@exec $(BIN)/python -m fuzz $(SECONDS)

mutants: $(VENV)/mutants.installed ## Small faults put into the package, a random sample: do its tests notice? FILES= COUNT= SEED= AT_LEAST=
	@exec $(BIN)/python -m mutants $(FILES) $(COUNT:%=--count=%) $(SEED:%=--seed=%) $(AT_LEAST:%=--at-least=%)

soak: $(VENV)/demo.installed ## 10,000 sessions while workers, the gateway and the server are killed: nothing is lost
	@exec $(BIN)/python -m soak

# On a machine without Debian's packages the tests say which program is missing.
programs: | $(BIN)/python
	-@.ci/debian nginx nginx
	-@.ci/debian prometheus promtool prometheus

# Three for each processor, because a test mostly waits for a gateway or a worker to start.
JOBS ?= $(shell expr 3 '*' $$(nproc 2> /dev/null || echo 2))

test: $(VENV)/test.installed programs ## All tests, the ones on the real gateway included, with branch coverage
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder --cov --cov-report=term --cov-fail-under=100

compat: ## Tests with old and new versions, and on each gateway, each in an environment of its own: ENVIRONMENTS="oldest uvloop" runs some
	@.ci/compat $(ENVIRONMENTS)

figures: $(VENV)/test.installed ## Run what made the figures on the pages, and renew them: PAGES="docs/scaling.md" renews some
	@exec $(BIN)/python -m benchmarks.pages $(PAGES)

docs: $(VENV)/docs.installed ## The documentation site, into build/docs; a warning or a broken link is an error
	rm -rf build/docs
	$(BIN)/sphinx-build -M html . build/docs -c docs --fail-on-warning --keep-going --quiet
	@echo "file://$(CURDIR)/build/docs/html/index.html"

lint: $(VENV)/lint.installed ## ruff, spelling, mypy --strict, public types, the workflows of GitHub
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	PYTHONPATH="$(CURDIR)" PATH="$(abspath $(BIN)):$$PATH" basedpyright --ignoreexternal --verifytypes aiohttp_smg_routing
	$(BIN)/actionlint .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

dist: $(VENV)/dist.installed ## The sdist and the wheel, checked; the sdist passes its own make check
	rm -rf dist build/sdist
	! git rev-parse HEAD > /dev/null 2>&1 || $(BIN)/check-manifest  # it compares the sdist with git
	$(BIN)/python -m build $(if $(wildcard $(BIN)/uv),--installer uv) > /dev/null
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	mkdir -p build/sdist
	tar -xf dist/*.tar.gz -C build/sdist --strip-components 1
	$(MAKE) -C build/sdist check VENV=.venv UV="$(UV)"

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
