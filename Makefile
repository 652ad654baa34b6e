PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

RUN := --run-dir weights/toy.en-it
SENTENCE := "I can eat an apple."

demo: .venv/run  ## train the embedded corpus, score it on held-out sentences, translate, draw the attention page
	$(BIN)/python train.py --preset toy $(RUN)
	$(BIN)/python evaluate.py $(RUN) --split test
	$(BIN)/python translate.py $(RUN) $(SENTENCE)
	$(BIN)/python visualize.py $(RUN) $(SENTENCE) --html weights/toy.en-it/attention.html

test: .venv/dev  ## linters and the whole test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

.venv/run: requirements.txt  ## the virtual environment with what running takes
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:  ## remove the environment and caches; runs in weights/ stay
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__
