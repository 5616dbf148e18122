# Every target makes the virtual environment that it needs; a second run finds it ready.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo bench micro fuzz mutants soak test compat docs lint clean

help: ## Show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: what setup.cfg asks for is installed again when it changes.
$(VENV)/%.installed: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

demo: $(VENV)/demo.installed ## Real engines, the real gateway, a session server and agents: the plugin on and off
	@exec $(BIN)/python examples/demo.py

bench: $(VENV)/bench.installed ## What the plugin costs and what pinning gains: PARTS="call cache" runs some of it
	@exec $(BIN)/python -m benchmarks $(PARTS)

micro: $(VENV)/bench.installed ## Micro-benchmarks of this tree beside those of BASE, the commit before by default
	@.ci/micro $(BASE)

fuzz: $(VENV)/fuzz.installed ## Inputs that a fuzzer makes up, against the laws of key, matcher and config: SECONDS=60 each
	@exec $(BIN)/python -m fuzz $(SECONDS)

mutants: $(VENV)/mutants.installed ## Small faults put into the package, a random sample: do its tests notice? FILES= COUNT= SEED= AT_LEAST=
	@exec $(BIN)/python -m mutants $(FILES) $(COUNT:%=--count=%) $(SEED:%=--seed=%) $(AT_LEAST:%=--at-least=%)

soak: $(VENV)/demo.installed ## 10,000 sessions while workers, the gateway and the server are killed: nothing is lost
	@exec $(BIN)/python -m soak

test: $(VENV)/test.installed ## All tests, the ones on the real gateway included, with branch coverage
	$(BIN)/python -m coverage run -m pytest  # not pytest --cov: pytest itself imports the package
	$(BIN)/python -m coverage report --fail-under=100

compat: ## Tests with old and new versions, and on each gateway, each in an environment of its own: ENVIRONMENTS="oldest uvloop" runs some
	@.ci/compat $(ENVIRONMENTS)

docs: $(VENV)/docs.installed ## The documentation site, into build/docs; a warning or a broken link is an error
	rm -rf build/docs
	$(BIN)/sphinx-build -M html . build/docs -c docs --fail-on-warning --keep-going --quiet
	@echo "file://$(CURDIR)/build/docs/html/index.html"

lint: $(VENV)/lint.installed ## ruff, mypy --strict, a wheel built and checked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf build dist
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
