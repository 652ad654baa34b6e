PYTHON ?= python3
BIN := .venv/bin
RUN := --run-dir weights/toy.en-it
SENTENCE := "I can eat an apple."

.PHONY: help demo app check test clean

help:  ## print the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*##[ ]*/\1|/' | awk -F'|' '{printf "make %-7s %s\n", $$1, $$2}'

demo: .venv/run  ## train on the built-in corpus, evaluate, translate, write an attention page
	$(BIN)/python train.py --preset toy $(RUN)
	$(BIN)/python evaluate.py $(RUN) --split test
	$(BIN)/python translate.py $(RUN) $(SENTENCE)
	$(BIN)/python visualize.py $(RUN) $(SENTENCE) --html weights/toy.en-it/attention.html

app: .venv/app  ## open the live explorer in the browser
	$(BIN)/streamlit run app.py

check: .venv/dev  ## run the linters and the quick tests, about three minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow"

test: .venv/dev  ## run the linters and all tests, as in continuous integration
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

clean:  ## remove the virtual environment and caches, but not weights/
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run: requirements.txt requirements-train.txt requirements-charts.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.13')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/app: .venv/run requirements-app.txt
	$(BIN)/pip install -q -r requirements-app.txt
	touch $@

.venv/dev: .venv/run requirements-notebooks.txt requirements-app.txt requirements-export.txt requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@
