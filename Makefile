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
SOURCES = pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inc)
SANITIZE = -std=c++17 -g -O1 -w -D_GLIBCXX_ASSERTIONS -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc

.PHONY: demo test prove sanitize clean

demo: $(VENV)/.package
	$(VENV)/bin/carve-kernels demo --output out/demo

test: $(VENV)/.tests sanitize
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest

# The long proof, run by hand: the tests with the oldest transformers that is supported.
prove:
	$(MAKE) test VENV=.venv/oldest PINS="$(OLDEST_TRANSFORMERS)"

sanitize:
	mkdir -p build
	$(CXX) $(SANITIZE) csrc/cpu/contrast.cpp tests/native/contrast.cpp -o build/contrast_sanitized
	build/contrast_sanitized
	$(CXX) $(SANITIZE) -pthread csrc/cpu/isa.cpp csrc/cpu/capture*.cpp tests/native/capture.cpp \
		-o build/capture_sanitized
	build/capture_sanitized

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
