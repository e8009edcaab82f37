PYTHON ?= python3
# Words for pip: TORCH="torch==2.13.0 --index-url URL" takes another build, for a GPU or for a CPU alone.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
OLDEST_TRANSFORMERS ?= transformers==5.12.0
# The tests know its interpreter's faults and its compiler's registers; a build of torch for a GPU brings its own.
TRITON ?= triton==3.9.0
OLDEST_TRITON ?= triton==3.8.0
# More requirements for the tests' environment, which may be other versions than those of the constraints.
PINS ?=
CONSTRAINTS ?= $(if $(PINS),,-c constraints.txt)
# The Pythons that `make constraints` resolves for.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
CXX ?= g++
VENV ?= .venv

PIP = $(VENV)/bin/python -m pip
SOURCES = pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.inc)

# The kernels need no torch: they are tested without it.
NATIVE = -std=c++17 -g -O1 -D_GLIBCXX_ASSERTIONS -pthread -Icsrc csrc/cpu/isa.cpp tests/native/parallel.cpp
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all
# CUDA kernels on a CPU; a type of element alone in the tests, all of them in the proofs.
EMULATED = -Itests/cuda/emulated $(NATIVE) -ffp-contract=off csrc/cpu/capture*.cpp tests/native/capture_cuda.cpp -x c++
BFLOAT = csrc/cuda/capture.cu csrc/cuda/capture_bfloat.cu -DBFLOAT_ALONE
EMULATED_REGIONS = -Itests/cuda/emulated $(NATIVE) -ffp-contract=off csrc/cpu/regions*.cpp tests/native/regions_cuda.cpp \
	-x c++ csrc/cuda/regions*.cu

.PHONY: constraints demo test prove sanitize emulate emulate-all mutate compile races soak clean

demo: $(VENV)/.package
	$(VENV)/bin/carve-kernels demo --output out/demo

test: $(VENV)/.tests sanitize emulate
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

# The long proofs, run by hand: the C++ and the CUDA kernels under sanitizers, every compilation of the Triton kernels,
# planted faults, killed batches and a long one, and the tests with the oldest transformers that is supported.
prove: sanitize races emulate-all compile mutate soak
	HYPOTHESIS_PROFILE=searching $(MAKE) test VENV=.venv/oldest PINS="$(OLDEST_TRANSFORMERS)"

sanitize:
	mkdir -p build
	$(CXX) $(NATIVE) $(SANITIZE) csrc/cpu/contrast*.cpp tests/native/contrast.cpp -o build/contrast_sanitized
	$(CXX) $(NATIVE) $(SANITIZE) csrc/cpu/regions*.cpp tests/native/regions.cpp -o build/regions_sanitized
	$(CXX) $(NATIVE) $(SANITIZE) csrc/cpu/capture*.cpp tests/native/capture.cpp -o build/capture_sanitized
	build/contrast_sanitized
	build/regions_sanitized
	build/capture_sanitized

# The emulator itself, and the kernels in it where no byte outside and no race goes unseen.
emulate:
	mkdir -p build
	$(CXX) -std=c++17 -g -O1 -Itests/cuda/emulated -Icsrc tests/native/emulator.cpp -o build/emulator
	build/emulator
	$(CXX) $(EMULATED) $(BFLOAT) -fsanitize=address -o build/capture_cuda_sanitized
	build/capture_cuda_sanitized first
	$(CXX) $(EMULATED) $(BFLOAT) -fsanitize=thread -o build/capture_cuda_races
	build/capture_cuda_races first
	$(CXX) $(EMULATED_REGIONS) $(SANITIZE) -o build/regions_cuda_sanitized
	build/regions_cuda_sanitized

emulate-all: emulate
	build/capture_cuda_races
	$(CXX) $(EMULATED) csrc/cuda/capture*.cu $(SANITIZE) -o build/capture_cuda_sanitized
	build/capture_cuda_sanitized
	build/regions_cuda_sanitized all
	$(CXX) $(EMULATED_REGIONS) -fsanitize=thread -o build/regions_cuda_races
	build/regions_cuda_races few

# Faults that are planted in the kernels: each has to be caught.
mutate: $(VENV)/.tests
	$(VENV)/bin/python -m tests.cuda.mutate --all
	$(VENV)/bin/python -m tests.triton.mutants

# Triton's kernels for every head size, option and target, and once more with the oldest Triton that is supported.
compile: $(VENV)/.tests
	$(PIP) install --no-deps --upgrade --target $(VENV)/oldest_triton $(OLDEST_TRITON)
	env -u TRITON_INTERPRET $(VENV)/bin/python -m tests.triton.offline --all
	env -u TRITON_INTERPRET PYTHONPATH=$(VENV)/oldest_triton $(VENV)/bin/python -m tests.triton.offline --all

# Two threads that write to the same place are a fault even where the result is right.
races:
	mkdir -p build
	$(CXX) $(NATIVE) -fsanitize=thread csrc/cpu/regions*.cpp tests/native/regions.cpp -o build/regions_races
	build/regions_races

# A batch that is killed again and again, and thousands of pictures, whose memory is printed on the way.
soak: $(VENV)/.tests
	$(VENV)/bin/python -m tests.long.kill --pictures 200 --kills 10
	$(VENV)/bin/python -m tests.long.soak --pictures 2000

clean:
	rm -rf .venv build out *.egg-info carve_kernels/*.so

constraints:
	$(PYTHON) -m tests.constrain $(PYTHONS)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" ninja $(CONSTRAINTS)
	$(PIP) install $(TORCH)
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
