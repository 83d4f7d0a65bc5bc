# make demo      quantize, sample and measure the embedded model    make test      run the tests
# make lint      check style and format                             make types     check types
# make gpu-test  the tests that need a GPU                          make wheel     build, install elsewhere, import
# make docs      API pages into out/docs                            make kernels   compile them for GPUs not here
# make clean     remove what make made
#
# The first run makes .venv. TORCH is what pip installs for PyTorch: a version, or more, TORCH="torch --index-url URL".
PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin

.PHONY: demo test lint types kernels gpu-test wheel docs clean

demo: .venv/plot.stamp
	$(BIN)/ptq4dm quantize --output out/demo/quantized
	$(BIN)/ptq4dm evaluate --model out/demo/quantized --metric none --num-paired 16 --num-heldout 16 --output out/demo

# A process for each core, one thread each.
test: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Which rooms: [tool.mypy] in pyproject.toml.
types: .venv/test.stamp
	$(BIN)/mypy

# Ahead of time, for every GPU that kernels/tuned/ has settings for; none is needed. Then with the oldest Triton that is
# promised, which takes less than newer ones do. CAPABILITIES="89 90" compiles for these alone.
kernels: .venv/test.stamp .venv/triton-floor.stamp
	env -u TRITON_INTERPRET $(BIN)/python scripts/benchmarks/compile_kernels.py --quick $(if $(CAPABILITIES),--capability $(CAPABILITIES))
	env -u TRITON_INTERPRET PYTHONPATH=.venv/triton-floor $(BIN)/python scripts/benchmarks/compile_kernels.py --quick --capability 90

gpu-test: .venv/test.stamp
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'PyTorch finds no GPU here'"
	$(BIN)/python -m pytest -m gpu

# In another folder, so that the checkout cannot stand in for what the wheel lacks.
wheel: .venv/test.stamp
	rm -rf out/wheel build  # an old build folder would lend its files to a new wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir out/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target out/wheel/site out/wheel/*.whl
	cd out/wheel && PYTHONPATH=$(CURDIR)/out/wheel/site $(CURDIR)/$(BIN)/python -c "import ptq4dm, ptq4dm.kernels.w8a8.layer; \
		assert ptq4dm.__file__.startswith('$(CURDIR)/out/wheel/site'), ptq4dm.__file__; ptq4dm.load_reference()"
	cd out/wheel && PYTHONPATH=$(CURDIR)/out/wheel/site $(CURDIR)/$(BIN)/python site/bin/ptq4dm --help >/dev/null

# Rooms whose __init__ shows less than they hold are named with their folders; ptq4dm.kernels has no __init__.
PAGES = $(shell find ptq4dm svdquant samplers -mindepth 1 -maxdepth 1 \( -type d -o -name '[a-z]*.py' \) ! -name __pycache__ \
	| sed -e 's|^ptq4dm/||' -e 's|\.py$$||' -e 's|/|.|g' -e 's|^|ptq4dm.|')
docs: .venv/docs.stamp
	$(BIN)/pdoc --output-directory out/docs ptq4dm ptq4dm.kernels ptq4dm.svdquant ptq4dm.samplers $(PAGES)

# PyTorch first and by itself, so that the extras below do not choose another build of it.
.venv/torch.stamp:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

.venv/triton-floor.stamp: .venv/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/triton-floor \
		triton==$$(sed -n 's/.*"triton>=\([0-9.]*\);.*/\1/p' pyproject.toml).0
	touch $@

.venv/%.stamp: .venv/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info
