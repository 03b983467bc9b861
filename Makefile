# make demo: sets everything up, then compresses the shipped teacher and shows the result
# make test: sets everything up, then runs every test
# make docs: builds the documentation site into build/site, treating warnings as errors
# make test-app: tests the page of `tinyclip app` in a headless Chromium ($CHROMIUM, or the one on the path)
# make test-package: builds wheel and sdist, installs the wheel into an empty environment and uses it there
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo docs test test-app test-package setup clean

demo: .venv/installed
	@$(BIN)/python scripts/demo.py

test: .venv/installed-dev
	scripts/check

test-app: .venv/installed-app
	$(BIN)/python -m pytest tests/browser

test-package:
	$(PYTHON) scripts/test_package.py

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup: .venv/installed-dev

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tinyclip needs Python 3.11 or newer: make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	@touch $@

.venv/installed-app: .venv/installed-dev
	$(PIP) --editable '.[dev,app,app-test]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv runs
