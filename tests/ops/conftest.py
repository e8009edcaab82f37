"""One test body for every backend, without a GPU and on one.

Without a GPU, the kernels of the "cuda" backend run on the CPU in an emulator. In tests that are marked for a GPU,
tensors are planted on the CPU, moved for the call, and compared on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest

from carve_kernels.selfcheck.moving import move, tensors
from carve_kernels.types import Attended
from tests.emulator import emulator

_PUBLIC = ("attention", "capture", "capture_layers", "column_sums", "contrast", "regions")


@pytest.fixture(autouse=True)
def _cuda_on_a_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if "cuda" not in (parameters.get("backend"), parameters.get("name")):
        yield
        return
    with emulator.serving(request.node.module.__name__.rpartition(".")[2].split("_")[1]):
        yield


@pytest.fixture(autouse=True)
def _on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test that is marked for a GPU, the public functions of the module run on it."""
    if request.node.get_closest_marker("gpu") is not None:
        for name in _PUBLIC:
            if hasattr(request.module, name):
                monkeypatch.setattr(request.module, name, running_on("cuda", getattr(request.module, name)))


def running_on(device: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A public function that takes and returns CPU tensors and runs on a device; values are checked as on a CPU."""
    has_check = "check" in inspect.signature(call).parameters

    @wraps(call)
    def run(*arguments: Any, **options: Any) -> Any:
        there = move(options, device)
        if has_check and there.get("check") is None:
            there["check"] = True
        result = call(*move(arguments, device), **there)
        given = {name: options[name] for name in ("output", "out") if options.get(name) is not None}
        for name, value in given.items():
            for target, values in zip(tensors(value), tensors(there[name]), strict=True):
                target.copy_(values)
        moved = move(result, "cpu")
        if isinstance(moved, Attended):
            return Attended(given.get("output", moved.output), given.get("out", moved.capture))
        return moved if result is None else given.get("out", moved)

    return run
