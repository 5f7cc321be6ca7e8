# Everything runs in .venv, made by pip: pip takes the CPU build of torch where one is offered.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := demo,dicom,coordinator,ray,dev
TEST_PROCESSES ?= 2

export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export OMP_NUM_THREADS := 1
# The tests start many processes: what is compiled once is kept, also where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install demo demo-imaging test lint types test-full test-system constraints clean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | column -t -s '	'

install: $(STAMP)  ## Create .venv and install fedmed with every extra that demo and tests use

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] < (3, 14), "Python 3.11 to 3.13 is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(STAMP)

demo: install  ## Four hospitals fine-tune a pretrained transformer under differential privacy
	$(BIN)/fedmed run experiment=demo

lint: install  ## Format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install  ## Type check
	$(BIN)/mypy

demo-imaging: install  ## Three made-up hospitals: DICOM written, ingested, learned from under privacy
	rm -rf demo-imaging && mkdir demo-imaging
	$(BIN)/fedmed task phantoms demo-imaging/export --difficulty 2
	for site in Northside Riverbank Lakeview; do \
	    $(BIN)/fedmed site ingest demo-imaging/export/$$site/dicom demo-imaging/data/$$site \
	        --labels demo-imaging/export/$$site/labels.csv --name $$site || exit; \
	done
	$(BIN)/fedmed run experiment=demo_imaging

test: lint types  ## Lint, types and tests, at most 10 minutes
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-full: install  ## The same tests at the full counts
	FEDMED_TEST_FULL=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal
	FEDMED_TEST_FULL=1 $(BIN)/python -m pytest tests/long
	FEDMED_TEST_FULL=1 ./tests/system/run

test-system: install  ## What needs a browser or root: the report in Chromium, a full disk, cables that are cut
	./tests/system/run

constraints: install  ## Write the versions of .venv to constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' | grep -v -E '^(nvidia|triton)' > constraints.txt

clean:  ## Remove what the commands above made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
