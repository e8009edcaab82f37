PYTHON ?= python3
# Words for pip: TORCH="torch==2.13.0 --index-url URL" takes another build, for a GPU or for a CPU alone.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
OLDEST_TRANSFORMERS ?= transformers==5.0.0
# More requirements for the tests' environment.
PINS ?=
CXX ?= g++
VENV ?= .venv

PIP = $(VENV)/bin/python -m pip
SOURCES = pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*.cpp)

.PHONY: demo test prove sanitize clean

demo: $(VENV)/.package
	$(VENV)/bin/carve-kernels demo --output out/demo

test: $(VENV)/.tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

# The long proofs, run by hand: the C++ under sanitizers, and the tests with the oldest transformers that is supported.
prove: sanitize
	$(MAKE) test VENV=.venv/oldest PINS="$(OLDEST_TRANSFORMERS)"

# What needs no torch is tested without it.
NATIVE = csrc/cpu/isa.cpp csrc/cpu/contrast.cpp csrc/cpu/contrast_resize.cpp csrc/cpu/regions.cpp \
	csrc/cpu/regions_runs.cpp csrc/cpu/regions_threshold.cpp tests/native/parallel.cpp
SANITIZED = $(CXX) -std=c++17 -g -O1 -D_GLIBCXX_ASSERTIONS -fno-sanitize-recover=all -pthread -Icsrc $(NATIVE)

sanitize:
	mkdir -p build
	for stage in contrast regions; do \
		$(SANITIZED) -fsanitize=address,undefined tests/native/$$stage.cpp -o build/$$stage.sanitized && \
		$(SANITIZED) -fsanitize=thread tests/native/$$stage.cpp -o build/$$stage.threads && \
		build/$$stage.sanitized && CARVE_KERNELS_CPU=plain build/$$stage.sanitized && build/$$stage.threads || exit 1; \
	done

clean:
	rm -rf .venv build out *.egg-info carve_kernels/*.so

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" wheel
	$(PIP) install $(TORCH)
	touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e .
	touch $@

# Some processors of transformers want torchvision. Its compiled part may not fit this torch and then breaks every import
# of transformers, so it stands where tests/conftest.py alone looks for it.
$(VENV)/.tests: $(VENV)/.torch $(SOURCES)
	$(PIP) install --no-build-isolation -e ".[test]" $(PINS)
	$(PIP) install --no-deps --upgrade --target $(VENV)/torchvision $(TORCHVISION)
	touch $(VENV)/.package $@
