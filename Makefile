# `make serve` and `make test` set up everything they need; so do the others.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
APP    ?= examples.hello:app
# `make test COVER=` does without coverage, which takes a third of the time.
COVER  ?= --cov --cov-report=
# So many tests at once, but for those marked `alone`, which follow one by one. By stealing, not by file: a few files
# take as long as all others, and whoever gets them last would keep the rest waiting.
# Three on two cores: a test often waits for what it has started.
JOBS   ?= 3
# The only folders that have some (tests/conftest.py sees to it); to collect all tests takes half a minute.
ALONE   = tests/e2e tests/observe
# `make test ARGS=tests/http` runs what it names, in one go; options (ARGS=--ignore=tests/http) are for all tests.
NAMED   = $(filter-out -%,$(ARGS))
# Hundreds of processes import the package, and pytest rewrites 160 files each time it starts: what has been compiled is
# kept, also where PYTHONDONTWRITEBYTECODE says otherwise.
PYTEST  = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

.PHONY: serve test quick check format bench wheel clean

serve: $(VENV)/.ready
	$(BIN)/python -m trioserve --bind 127.0.0.1:8000 $(APP)

test: $(VENV)/.ready-test
	rm -f .coverage .coverage.*
	$(BIN)/python -m compileall -q trioserve tests examples
ifneq ($(NAMED),)
	$(PYTEST) $(COVER) $(ARGS)
else
	$(PYTEST) $(COVER) $(ARGS) -m "not alone" -n $(JOBS) --dist worksteal
	$(PYTEST) $(COVER) $(ARGS) -m alone $(ALONE) $(if $(COVER),--cov-append)
endif
	$(if $(COVER),$(BIN)/python -m coverage report --skip-covered --show-missing)

quick: $(VENV)/.ready-test
	$(PYTEST) -m "not slow" -x -q $(ARGS)

check: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-lint
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/.ready-bench
	@$(BIN)/python -c "import gunicorn_h1c" 2>/dev/null || $(BIN)/pip install --quiet --group h1c || \
	    echo "gunicorn_h1c could not be installed (where there is no wheel it takes a C compiler): measuring without it"
	$(BIN)/python bench/run.py $(ARGS)

wheel: $(VENV)/.ready
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache

# The environment. Groups need pip 25.1, so pip comes first.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"

$(VENV)/.ready: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.ready-%: pyproject.toml | $(VENV)/.ready
	$(BIN)/pip install --quiet --group $*
	touch $@
