# make demo    a 3D object from a sentence, from a fresh clone
# make test    the tests
# make docs    the manual as a site: open site/index.html (to search, serve it: python -m http.server -d site)
# make check   format, lint, types, tests, manual
# make clean   removes the environment and what tools left behind (runs/ stays)
#
# PYTHON=python3.12   which interpreter makes the environment (3.11 to 3.13)
# VENV=.venv          where it lies
# JOBS=4              how many tests run at once; as many as there are cores, unless given
# PIP_FLAGS=...       more options for pip. On Linux PyPI's torch carries CUDA, several GB; the small one comes with
#                     PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

VENV ?= .venv
PIP_FLAGS ?=
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
SUITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUITS)' 2>/dev/null && { echo $$p; break; }; done)

BIN := $(VENV)/bin
DEMO := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PACKAGE := pyproject.toml constraints.txt

.PHONY: demo test docs check clean
.NOTPARALLEL:

demo: $(DEMO)
	$(BIN)/distill3d generate "a red mushroom"

test: $(DEV)
	$(BIN)/python -m pytest -n $(JOBS)

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n $(JOBS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# The installation is editable: a change in src/ needs no new one, only a change of what is depended on does.
$(DEMO): $(PACKAGE)
	$(make_venv)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

$(DEV): $(PACKAGE)
	$(make_venv)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $(DEMO) $@

define make_venv
	@[ -x $(BIN)/pip ] || { \
	"$(PYTHON)" -c '$(SUITS)' 2>/dev/null || { \
		echo "distill3d needs Python 3.11, 3.12 or 3.13, found: $$("$(or $(PYTHON),python3)" --version 2>&1 | head -1)"; \
		echo "name one that you have, for instance:  make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2; \
	"$(PYTHON)" -m venv $(VENV); }
endef
