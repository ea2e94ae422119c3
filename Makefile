# make book   the HTML book              make test   everything that is checked
# make lab    JupyterLab on the chapters  make notebooks   run the chapters from their text twins
# make colab  the pages with Colab's versions of everything (PYTHON=python3.12, a network for pip)
# make pdf    the stories as one PDF      make dist        a wheel and the sources, to be installed
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread: small matrices gain little from more, and numbers do not depend on the machine's cores
export OMP_NUM_THREADS := 1

# The numbers of another processor: no vector instructions but the oldest, another order of sums
OTHER := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
TWO := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
BROWSED := $(patsubst %,tests/test_%.py,book browser playground explorer search)
UNITS := $(BIN)/pytest tests $(BROWSED:%=--ignore=%) -p no:nbval -rs -n 2
# the outputs that are compared are a CPU's, on every machine
PAGES := CUDA_VISIBLE_DEVICES= $(BIN)/pytest --nbval chapters --ignore=chapters/text \
  --ignore=chapters/assignments --dist loadfile -n 2

.PHONY: book pdf dist test test-units test-mutants test-pages test-book test-arithmetic test-threads \
	lab notebooks colab assignments figures env lint clean

book: env
	$(BIN)/jupyter-book build . --quiet
	@echo
	@echo "The book is built. Open file://$(CURDIR)/_build/html/index.html"

# printed by Debian's chromium; the landing page of this build gets the link
pdf: book
	$(BIN)/python tools/pdf.py

# Every page runs twice, and every test that compares numbers: with two threads, and with one in
# another arithmetic. (test-units and test-pages, with one thread in this one, are for daily work.)
test: lint test-threads test-mutants test-book test-arithmetic

test-units: env
	$(UNITS)

test-pages: env
	$(PAGES)

test-mutants: env
	$(BIN)/python tests/mutate.py

test-book: env
	$(BIN)/jupyter-book build . --all --quiet -W -n --keep-going
	$(BIN)/pytest $(BROWSED) -p no:nbval -rs -n 2

# each page alone in a folder, as in Colab
test-threads: env
	$(TWO) $(UNITS)
	rm -rf _build/alone
	for page in chapters/[0-9]*/*.ipynb; do \
	  folder=_build/alone/$$(basename $$page .ipynb); mkdir -p $$folder; cp $$page $$folder; done
	$(TWO) $(PAGES:chapters=_build/alone)

# a compiler of PyTorch's looks at the real processor, so what it compiles is left out
test-arithmetic: env
	$(OTHER) $(UNITS) -m "not compiles and not processes" --hypothesis-profile=again
	$(OTHER) $(PAGES)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/notebooks.py --check

lab: env
	$(BIN)/jupyter lab chapters $(if $(filter 0,$(shell id -u)),--allow-root)

notebooks: env
	$(BIN)/python tools/notebooks.py

colab:
	$(PYTHON) tools/colab.py

# student versions to chapters/assignments, solutions and autograders to _build/assignments
assignments: env
	$(BIN)/python tools/assignments.py --variant $(or $(VARIANT),0)

figures: env
	$(BIN)/python figures/paths.py
	$(BIN)/python figures/modulators.py
	$(BIN)/python figures/landing.py
	$(BIN)/python figures/explorer.py
	$(BIN)/python figures/symbols.py
	$(BIN)/python figures/preview.py

dist: env
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist
	$(BIN)/pytest tests/test_dist.py -p no:nbval

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "Python's venv module is missing (Debian: apt-get install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[book,dev]"
	touch $@

clean:
	rm -rf _build dist
