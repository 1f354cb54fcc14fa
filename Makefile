# make demo    train and compare the models on a small data set, in minutes
# make bench   measure speed and memory on this machine, in under 15 minutes (docs/performance.md)
# make test    run all tests and docstring examples, two at a time  (make test ARGS="tests/test_install.py -x" runs some)
# make lint    check style, format and types
# make recbole-tests RECBOLE=path    run RecBole's own tests under the repairs, from a checkout of its tag v1.2.1
# make faults  kill runs at random moments, fill the disk, close folders: every resumed run must equal the unbroken one
# make soak    fifty runs in one process, without growing memory, files or threads
# make clean   remove what the commands above wrote, except .venv;  make distclean removes .venv too
#
# The first command creates .venv and installs into it; later ones start at once.

# Any Python from 3.10 to 3.13:  make test PYTHON=python3.12
PYTHON ?= python3
# The version that was tested. Any 2.6 or later will do, and pip's options may follow, for instance those that choose
# a build for the processor only:  make test TORCH="torch>=2.6"
TORCH ?= torch==2.13.0
# Without its dependencies, because RecBole requires an old ray that Python 3.12 cannot install and that is not used
# here; setup.cfg lists what RecBole really needs.
RECBOLE_PACKAGE ?= --no-deps recbole==1.2.1
# Added to the command of `make demo`, `make bench`, `make test`, `make recbole-tests`, `make faults` or `make soak`.
ARGS ?=

# Where this is set, every process compiles torch, transformers and RecBole again: 20 seconds for each of the many
# that the tests start, in place of 7.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Word by word, since the shell would take torch>=2.6 for a redirection.
quoted = $(foreach word,$(1),'$(word)')
# --no-compile: Python compiles a module when it first imports it, and most of those installed never are.
PIP_INSTALL := $(RUN) -m pip install --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.PHONY: help demo bench test lint recbole-tests faults soak install clean distclean

help:
	@sed -n '1,10s/^# \{0,1\}//p' Makefile

demo: $(STAMP)
	$(RUN) -m recbole_llm.demo $(ARGS)

bench: $(STAMP)
	for name in compute training_step scoring streams data_scale; do \
	  $(RUN) benchmarks/$$name.py $(ARGS) || exit 1; \
	done

test: $(STAMP)
	$(RUN) -m pytest -n 2 --durations=15 $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

recbole-tests: $(STAMP)
	@test -n "$(RECBOLE)" || { echo "Name a checkout of RecBole 1.2.1: make recbole-tests RECBOLE=path" >&2; exit 1; }
	$(RUN) tests/recbole_tests.py "$(RECBOLE)" $(ARGS)

faults: $(STAMP)
	$(RUN) tests/faults/kill_and_resume.py $(ARGS)
	$(RUN) tests/faults/break_and_repeat.py

soak: $(STAMP)
	$(RUN) tests/faults/soak.py $(ARGS)

install: $(STAMP)

# The stamp is written last: an interrupted installation is done again, as is one older than setup.cfg.
# --no-warn-conflicts: where RecBole is there already, pip would report each of its unmet requirements as an error.
$(STAMP): setup.cfg pyproject.toml
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "There is no '$(PYTHON)' on this machine. Install Python 3.10 to 3.13, or name one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "recbole_llm needs Python 3.10 to 3.13, but '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot create virtual environments: its modules venv and ensurepip are missing." >&2; \
	  echo "On Debian and Ubuntu: apt install python3-venv. Or name another Python: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@echo "Installing into $(VENV) (once; a few minutes)"
	"$(PYTHON)" -m venv $(VENV)
	$(PIP_INSTALL) --quiet --upgrade pip
	$(PIP_INSTALL) $(call quoted,$(TORCH))
	$(PIP_INSTALL) --no-warn-conflicts --editable '.[test]'
	$(PIP_INSTALL) $(RECBOLE_PACKAGE)
	@touch $(STAMP)

clean:
	rm -rf build dist recbole_llm.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .demo
	find recbole_llm tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
