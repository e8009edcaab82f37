"""Where a test's room is "cuda" its kernels run on the CPU, in an emulator, and the room serves the CPU's tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda import emulator


@pytest.fixture(autouse=True)
def _cuda_on_a_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if "cuda" not in (parameters.get("room"), parameters.get("name")):
        yield
        return
    with emulator.serving(request.node.module.__name__.rpartition("_")[2]):
        yield
