# make demo    a 3D object from a sentence, from a fresh clone
# make test    the tests
# make docs    the manual as a site: open site/index.html (to search, serve it: python -m http.server -d site)
# make check   format, lint, types, tests, manual
# make test-lowest   one pass through the program on the lowest versions that pyproject.toml allows
# make audit   known holes in the versions of constraints.txt
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

LOWEST ?= .venv-lowest
AUDIT ?= .venv-audit

.PHONY: demo test test-lowest audit docs check clean
.NOTPARALLEL:

demo: $(DEMO)
	$(BIN)/distill3d generate "a red mushroom"

test: $(DEV)
	$(BIN)/python -m pytest -n $(JOBS)

# uv, since pip cannot be asked for the lowest versions; where a Python has no wheel of one, the next version is taken.
test-lowest:
	$(call make_venv,$(LOWEST))
	$(LOWEST)/bin/python -m pip install -q uv
	$(LOWEST)/bin/python -m uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct \
		--only-binary :all: --no-binary meshoptimizer $(PIP_FLAGS) -r pyproject.toml \
		--extra bench --extra gltf --extra student "pytest>=8.3" "beartype>=0.19"
	PYTHONPATH=src $(LOWEST)/bin/python -m pytest tests/test_smoke.py

audit:
	$(call make_venv,$(AUDIT))
	$(AUDIT)/bin/python -m pip install -q $(PIP_FLAGS) pip-audit
	$(AUDIT)/bin/pip-audit --disable-pip --no-deps -r constraints.txt

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n $(JOBS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(LOWEST) $(AUDIT) build dist site .pytest_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# The installation is editable: a change in src/ needs no new one, only a change of what is depended on does.
$(DEMO): $(PACKAGE)
	$(call make_venv)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

$(DEV): $(PACKAGE)
	$(call make_venv)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $(DEMO) $@

define make_venv
	@[ -x $(or $(1),$(VENV))/bin/pip ] || { \
	"$(PYTHON)" -c '$(SUITS)' 2>/dev/null || { \
		echo "distill3d needs Python 3.11, 3.12 or 3.13, found: $$("$(or $(PYTHON),python3)" --version 2>&1 | head -1)"; \
		echo "name one that you have, for instance:  make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2; \
	"$(PYTHON)" -m venv $(or $(1),$(VENV)); }
endef
