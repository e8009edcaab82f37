PYTHON ?= python3
# Arguments of pip: TORCH="torch==2.13.0 --index-url URL" installs another build, for a GPU or for a CPU only.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
OLDEST_TRANSFORMERS ?= transformers==5.12.0
# The tests depend on the bugs of its interpreter and the registers of its compiler; torch for a GPU requires its own.
TRITON ?= triton==3.9.0
# More requirements for the test environment; they replace the constraints.
PINS ?=
CONSTRAINTS ?= $(if $(PINS),,-c constraints.txt)
# The Pythons that `make constraints` resolves for.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
VENV ?= .venv

PIP = $(VENV)/bin/python -m pip
SOURCES = pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

# The default selection is the short tests without a GPU; SELECT="-m slow" or "-m gpu" selects others.
SELECT ?=

.PHONY: constraints demo test pytest lint prove prove-ci native native-ci native-all sanitize races emulate emulate-all
.PHONY: slow soak mutate compile oldest clean

demo: $(VENV)/.package
	$(VENV)/bin/carve-kernels demo --output out/demo

# Two jobs: pip uses one core, and the other compiles the programs that need no torch.
test:
	$(MAKE) -j 2 native pytest lint

pytest: $(VENV)/.tests
	$(VENV)/bin/pytest -n 2 --dist worksteal $(SELECT)

lint: $(VENV)/.tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The long proofs, the shortest first. The first failure ends them, and make names it.
prove:
	$(MAKE) -j 2 $(VENV)/.tests native-all
	$(MAKE) -j 1 slow soak mutate compile quantised oldest

# The part of them that takes a quarter of an hour after `make test`.
prove-ci: $(VENV)/.tests
	$(MAKE) -j 2 native-ci
	$(MAKE) pytest SELECT="-m slow -k 'not in_many_examples'"

# C++ and emulated CUDA under sanitizers; `native` is the part in `make test`.
native native-ci native-all sanitize races emulate emulate-all:
	$(MAKE) -f tests/native/Makefile $@

slow:
	$(MAKE) pytest SELECT="-m slow"

# Faults planted in the kernels: the tests have to catch each.
mutate: $(VENV)/.tests
	$(VENV)/bin/python -m tests.emulator.mutate --all
	$(VENV)/bin/python -m tests.native.mutants
	$(VENV)/bin/python -m tests.backends.triton.mutants

# The Triton kernels, compiled for every target and interpreted, with each supported Triton.
compile: $(VENV)/.tests
	$(VENV)/bin/python -m tests.backends.triton.versions $(VENV)/triton

# A batch that is killed repeatedly, and thousands of images with their memory use.
soak: $(VENV)/.tests
	$(VENV)/bin/python -m tests.long.kill --images 200 --kills 10
	$(VENV)/bin/python -m tests.long.soak --images 2000

# Quantised weights and offloaded ones, with libraries that no other test needs.
QUANTISED ?= accelerate==1.15.0 bitsandbytes==0.50.2 psutil==7.2.2 torchao==0.18.0
.PHONY: quantised
quantised: $(VENV)/.tests
	$(PIP) install --no-deps --upgrade --target $(VENV)/quantised $(QUANTISED)
	PYTHONPATH=$(VENV)/quantised $(VENV)/bin/pytest tests/hf/test_quantised.py tests/hf/test_offloading.py

# The tests with the oldest supported transformers, and with a random search of more examples.
oldest:
	HYPOTHESIS_PROFILE=searching $(MAKE) test VENV=.venv/oldest PINS="$(OLDEST_TRANSFORMERS)"

# The versions in use, each in an environment that is created, tested and deleted. ROWS="3.11-2.13 3.12" selects some.
.PHONY: matrix
matrix:
	$(PYTHON) -m tests.matrix $(ROWS)

# On a machine with a GPU, by an interpreter that has torch; installs nothing. GPU_OUT is its folder, GPU_SECONDS all its time.
GPU_OUT ?= out/gpu
GPU_SECONDS ?= 480
.PHONY: gpu
gpu:
	$(PYTHON) -m tests.gpu --output $(GPU_OUT) --seconds $(GPU_SECONDS)

# The newest transformers of the index, in a separate folder.
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

# Some processors of transformers need torchvision. Its compiled part may not fit this torch and would then break every
# import of transformers, so it is installed in a folder that only tests/conftest.py adds to the path.
$(VENV)/.tests: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e ".[test]" $(TRITON) $(PINS) $(CONSTRAINTS)
	$(PIP) install --no-deps --upgrade --target $(VENV)/torchvision $(TORCHVISION)
	touch $(VENV)/.package $@
