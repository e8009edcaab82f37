"""The same environment for every test: no network, few threads, fixed seeds, a Triton interpreter and torchvision."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Two test processes share two cores: their subprocesses compute on one thread, too, and inductor compiles in-process.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import hypothesis
import numpy
import pytest
import torch

torch.set_num_threads(1)

# Triton reads it at its first import, which may be through another package.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time, so that a failure is due to a change; `make prove` searches new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("searching", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def _make_torchvision_importable() -> torch.library.Library | None:
    """Find the torchvision of `make test`; if its compiled part does not fit this torch, define its schemas."""
    sys.path.append(str(Path(sys.prefix, "torchvision")))
    try:
        importlib.import_module("torchvision")
        return None
    except ModuleNotFoundError as error:
        if error.name == "torchvision":
            return None
        raise
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    schemas = torch.library.Library("torchvision", "DEF")
    schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return schemas


# Kept for the whole run: the schemas are removed with the library object.
_TORCHVISION = _make_torchvision_importable()


@pytest.fixture(scope="session", autouse=True)
def _faithful_interpreter() -> Iterator[None]:
    """Triton kernels on the CPU compute bfloat16 correctly, and their alignment hints are verified."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from tests.backends.triton import interpreter

    with interpreter.faithful():
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch threads for the duration of the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m`, neither tests for a GPU nor long proofs are selected."""
    config.option.markexpr = config.option.markexpr or "not gpu and not slow"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
