# make demo, make test: both set up .venv when it is missing or made from other requirements, and reuse it otherwise.
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
REQUIREMENTS := pyproject.toml tests/pins.txt
STAMP := $(VENV)/.made-from-$(shell cat $(REQUIREMENTS) | cksum | tr ' ' '-')

.PHONY: demo fashion test check setup clean cluster-test cluster-demo

demo: $(STAMP)
	$(VENV)/bin/dynexit run configs/digits.yaml

# every method on Fashion-MNIST, a job on each core; seeds that were done before are not done again
SEEDS ?= 1
fashion: $(STAMP)
	seeds="[$$(seq -s, 0 $$(($(SEEDS) - 1)))]" && \
	    $(VENV)/bin/dynexit run configs/fashion_mnist_methods.yaml --on local "data.seed=$$seeds" "seed=$$seeds"

test: check
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not gpu"

# words of an idiom that the project's English does without
check: $(STAMP)
	@! git grep -nwiE 'told|anew|mend|mends|mended|besides|thereof' -- dynexit launch tests README.md slurm docs
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

# the tests on a SLURM cluster in one folder; they start it and stop it. Needs root and Debian's SLURM packages
cluster-test: $(STAMP)
	slurm/devcluster/install.sh
	DYNEXIT_REQUIRE_ALL=1 $(VENV)/bin/python -m pytest -m slurm

# the digits study on that cluster: submitted, followed to its end, stopped
cluster-demo: $(STAMP)
	slurm/devcluster/install.sh
	slurm/devcluster/demo.sh $(VENV)/bin/dynexit

clean:
	rm -rf $(VENV) build *.egg-info
