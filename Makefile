PYTHON ?= python3
# Words for pip: TORCH="torch==2.13.0 --index-url URL" takes another build, for a GPU or for a CPU alone.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
OLDEST_TRANSFORMERS ?= transformers==5.12.0
# The tests know its interpreter's faults and its compiler's registers; a build of torch for a GPU brings its own.
TRITON ?= triton==3.9.0
# More requirements for the tests' environment, which may be other versions than those of the constraints.
PINS ?=
CONSTRAINTS ?= $(if $(PINS),,-c constraints.txt)
# The Pythons that `make constraints` resolves for.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
VENV ?= .venv

PIP = $(VENV)/bin/python -m pip
SOURCES = pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

# Which tests: nothing but the short ones, none for a GPU; SELECT="-m slow" or "-m gpu" takes others.
SELECT ?=

.PHONY: constraints demo test pytest lint prove prove-ci native native-ci native-all sanitize races emulate emulate-all
.PHONY: slow soak mutate compile oldest clean

demo: $(VENV)/.package
	$(VENV)/bin/carve-kernels demo --output out/demo

# Two things at a time: pip keeps one core busy, and the other compiles what needs no torch.
test:
	$(MAKE) -j 2 native pytest lint

pytest: $(VENV)/.tests
	$(VENV)/bin/pytest -n 2 --dist worksteal $(SELECT)

lint: $(VENV)/.tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The long proofs, the shortest first; the first that fails ends them, and make names it.
prove:
	$(MAKE) -j 2 $(VENV)/.tests native-all
	$(MAKE) -j 1 slow soak mutate compile oldest

# What of them fits into a quarter of an hour behind `make test`.
prove-ci: $(VENV)/.tests
	$(MAKE) -j 2 native-ci
	$(MAKE) pytest SELECT="-m slow -k 'not in_long'"

# C++ and emulated CUDA under sanitizers; `native` is what `make test` has of them.
native native-ci native-all sanitize races emulate emulate-all:
	$(MAKE) -f tests/native/Makefile $@

slow:
	$(MAKE) pytest SELECT="-m slow"

# Faults that are planted in the kernels: each has to be caught.
mutate: $(VENV)/.tests
	$(VENV)/bin/python -m tests.emulator.mutate --all
	$(VENV)/bin/python -m tests.backends.triton.mutants

# Triton's kernels, compiled for every target and interpreted, with each Triton that is supported.
compile: $(VENV)/.tests
	$(VENV)/bin/python -m tests.backends.triton.versions $(VENV)/triton

# A batch that is killed again and again, and thousands of pictures, whose memory is printed on the way.
soak: $(VENV)/.tests
	$(VENV)/bin/python -m tests.long.kill --pictures 200 --kills 10
	$(VENV)/bin/python -m tests.long.soak --pictures 2000

# The tests with the oldest transformers that is supported, and a search of their own.
oldest:
	HYPOTHESIS_PROFILE=searching $(MAKE) test VENV=.venv/oldest PINS="$(OLDEST_TRANSFORMERS)"

# The versions that people have, an environment each: made, tried, deleted. ROWS="3.11-2.13 3.12" takes some of them.
.PHONY: matrix
matrix:
	$(PYTHON) -m tests.matrix $(ROWS)

# The newest transformers of the index, in a folder of its own.
.PHONY: newest
newest: $(VENV)/.tests
	$(VENV)/bin/python -m tests.matrix.newest $(VENV)/newest -n 2 --dist worksteal

clean:
	rm -rf .venv build out *.egg-info carve_kernels/*.so

constraints:
	$(PYTHON) -m tests.constrain $(PYTHONS)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" ninja $(CONSTRAINTS)
	$(PIP) install $(TORCH) $(CONSTRAINTS)
	touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e ".[cli]" $(CONSTRAINTS)
	touch $@

# Some processors of transformers want torchvision. Its compiled part may not fit this torch and then breaks every import
# of transformers, so it stands where tests/conftest.py alone looks for it.
$(VENV)/.tests: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e ".[test]" $(TRITON) $(PINS) $(CONSTRAINTS)
	$(PIP) install --no-deps --upgrade --target $(VENV)/torchvision $(TORCHVISION)
	touch $(VENV)/.package $@
