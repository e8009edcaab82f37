"""The backends that a test of capture or of column sums runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from carve_kernels.backends import cpu
from carve_kernels.types import CaptureOptions
from tests.support.attention import Case, planted
from tests.support.planted_maps import backends, on_gpu, serving


def backends_of(stage: str) -> list[Any]:
    """The backends of a stage, the compiled one once for each set of instructions: "cpu avx2"."""
    names = [f"{name} {isa}".strip() for name in backends(stage) for isa in (cpu.ISAS if name == "cpu" else [""])]
    return [*names, *on_gpu(stage)]


BACKENDS = backends_of("capture")


@contextmanager
def entered(name: str, stage: str = "capture") -> Iterator[str]:
    """The backend of a name in `backends_of`, with its instructions forced; skips the test where it cannot serve."""
    backend, *isa = [name] if name.endswith(" on gpu") else name.split()
    (query, key, tokens), options = planted(Case())
    tensors = (query, key, tokens) if stage == "capture" else (query, key)
    backend = serving(stage, backend, *tensors, CaptureOptions(**options))
    if not isa:
        yield backend
        return
    if cpu.ISAS.index(isa[0]) > cpu.ISAS.index(cpu.isa()[1]):
        pytest.skip(f"this machine has no {isa[0]}")
    with forced_isa(isa[0]):
        yield backend


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """A context in which the kernels use one set of instructions of this machine."""
    before, _ = cpu.isa()
    torch.ops.carve_kernels.isa_cpu(cpu.ISAS.index(name), torch.empty(2, dtype=torch.int64))
    try:
        yield
    finally:
        torch.ops.carve_kernels.isa_cpu(cpu.ISAS.index(before), torch.empty(2, dtype=torch.int64))
