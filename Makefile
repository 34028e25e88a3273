# make run | test | check | check-all | docs-check | mutants | demo | bench | screens | lock | audit | sbom | licences | clean. Needs Python 3.11 or newer and make; the rest is installed in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test check check-all docs-check mutants demo bench screens lock audit sbom licences clean

run: $(VENV)/run.stamp
	$(BIN)/python whatsapp_router.py

# Two at once: most of the time the tests wait, for disks and processes.
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The same, but no test is left out for want of a program.
check-all: export NOTHING_SKIPPED = 1
check-all: check

# Dead links in the documents, and settings, endpoints, metrics or commands that there are not.
docs-check: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/test_documents.py

# Wrong lines in the rules, one at a time: each should make a test fail. Minutes; not in CI.
mutants: $(VENV)/dev.stamp
	$(BIN)/mutmut run
	$(BIN)/mutmut results

demo: $(VENV)/run.stamp
	$(BIN)/python examples/demo.py

bench: $(VENV)/dev.stamp
	-cd bench/peers/express && npm install --no-audit --no-fund --no-package-lock --silent
	$(BIN)/python bench/run.py

# The pictures of docs/: each view of the page in each language, as a browser shows it.
screens: $(VENV)/dev.stamp
	mkdir -p docs/screens
	SCREENS=docs/screens $(BIN)/python -m pytest tests/browser -k every_view

# Versions are chosen in pyproject.toml; this writes the .txt files with all that they bring along.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-annotate --custom-compile-command "make lock"
lock: $(VENV)/dev.stamp
	$(LOCK) pyproject.toml -o requirements.txt
	$(LOCK) pyproject.toml --group dev -o requirements-dev.txt

audit: $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	$(BIN)/pip-audit --disable-pip --require-hashes -r requirements.txt

# What the image is made of, as CycloneDX: dist/sbom.json.
sbom: $(VENV)/dev.stamp
	@mkdir -p dist
	$(BIN)/uv tool run --quiet --from cyclonedx-bom==7.5.0 cyclonedx-py requirements requirements.txt \
	  --output-reproducible --output-file dist/sbom.json

# Under which terms each dependency is; fails for one that is not known to go with MIT.
LICENCES := MIT;BSD;Apache;Python Software Foundation;PSF;MPL;Mozilla Public;ISC;Copyright © 2025, Karen Petrosyan
licences: $(VENV)/dev.stamp
	@mkdir -p dist
	$(BIN)/uv tool run --quiet --from pip-licenses==5.5.5 pip-licenses --python $(BIN)/python \
	  --partial-match --allow-only="$(LICENCES)" --format=csv \
	  --packages $$(sed -n 's/^\([a-z0-9-]*\)==.*/\1/p' requirements.txt) > dist/licences.csv
	@cut -c1-100 dist/licences.csv

clean:
	rm -rf $(VENV) mutants .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
