# make demo, make test: both set up .venv when it is missing or made from other requirements, and reuse it otherwise.
PYTHON ?= python3
VENV := .venv
REQUIREMENTS := pyproject.toml tests/pins.txt
STAMP := $(VENV)/.made-from-$(shell cat $(REQUIREMENTS) | cksum | tr ' ' '-')

.PHONY: demo test check setup clean

demo: $(STAMP)
	$(VENV)/bin/dynexit run configs/digits.yaml

test: check
	$(VENV)/bin/python -m pytest -m "not gpu"

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

setup: $(STAMP)

# uv installs the same packages several times faster; where it is not to be had, pip does it
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dynexit needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv || true
	$(VENV)/bin/python -m uv pip install --compile-bytecode --python $(VENV)/bin/python -e '.[dev]' -c tests/pins.txt \
	    || $(VENV)/bin/python -m pip install -e '.[dev]' -c tests/pins.txt
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
