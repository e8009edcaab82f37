"""The same test bodies for backends that have no GPU here, and for a GPU.

Where a test's backend is "cuda", its kernels run on the CPU, in an emulator. Marked for a GPU, tensors are planted on the
CPU, moved for the call, and compared on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest

from carve_kernels.selfcheck.moving import move
from tests.emulator import emulator

_PUBLIC = ("capture", "capture_layers", "contrast", "regions")


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
    """In an item that is marked for a GPU the module's public functions run there."""
    if request.node.get_closest_marker("gpu") is not None:
        for name in _PUBLIC:
            if hasattr(request.module, name):
                monkeypatch.setattr(request.module, name, running_on("cuda", getattr(request.module, name)))


def running_on(device: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A public function that takes and returns CPU tensors, and runs on a device; values are looked at as on a CPU."""
    looks = "check" in inspect.signature(call).parameters

    @wraps(call)
    def run(*arguments: Any, **options: Any) -> Any:
        there = move(options, device)
        if looks and there.get("check") is None:
            there["check"] = True
        result = call(*move(arguments, device), **there)
        out = options.get("out")
        if out is None:
            return move(result, "cpu")
        for target, part in zip(out, there["out"], strict=True):
            target.copy_(part)
        return None if result is None else out

    return run
