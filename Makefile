# make demo   quantize, sample and measure the embedded model       make test   run the tests
# make lint   check style and format                                make clean  remove what make made
#
# The first run makes .venv. TORCH is what pip installs for PyTorch: a version, or more, TORCH="torch --index-url URL".
PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/plot.stamp
	$(BIN)/ptq4dm quantize --output out/demo/quantized
	$(BIN)/ptq4dm evaluate --model out/demo/quantized --metric none --num-paired 16 --num-heldout 16 --output out/demo

test: .venv/test.stamp
	$(BIN)/python -m pytest

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# PyTorch first and by itself, so that the extras below do not choose another build of it.
.venv/torch.stamp:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

.venv/%.stamp: .venv/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info
