# make book   the HTML book              make test   everything that is checked
# make lab    JupyterLab on the chapters  make notebooks   run the chapters from their text twins
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread: small matrices gain little from more, and numbers do not depend on the machine's cores
export OMP_NUM_THREADS := 1

.PHONY: book test lab notebooks figures env lint clean

book: env
	$(BIN)/jupyter-book build . --quiet
	@echo
	@echo "The book is built. Open file://$(CURDIR)/_build/html/index.html"

test: env lint
	$(BIN)/pytest tests --ignore=tests/test_book.py -n 2 -p no:nbval
	$(BIN)/python tests/mutate.py
	$(BIN)/pytest --nbval chapters --ignore=chapters/text -n 2 --dist loadfile
	$(BIN)/jupyter-book build . --all --quiet -W -n --keep-going
	$(BIN)/pytest tests/test_book.py -p no:nbval

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/notebooks.py --check

lab: env
	$(BIN)/jupyter lab chapters $(if $(filter 0,$(shell id -u)),--allow-root)

notebooks: env
	$(BIN)/python tools/notebooks.py

figures: env
	$(BIN)/python figures/paths.py

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
	rm -rf _build
