"""The rooms that a test body of capture runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from carve_kernels.backends import cpu
from tests.support.attention import Case, planted
from tests.support.planted_maps import on_gpu, rooms, serving

# The compiled room once for each set of instructions: "cpu avx2".
BACKENDS = [f"{room} {isa}".strip() for room in rooms("capture") for isa in (cpu.ISAS if room == "cpu" else [""])]
BACKENDS += on_gpu("capture")


@contextmanager
def entered(name: str) -> Iterator[str]:
    """The room of a name in BACKENDS, with its instructions forced; a skipped test where it cannot serve."""
    room, *isa = [name] if name.endswith(" on gpu") else name.split()
    arguments, options = planted(Case())
    room = serving("capture", room, *arguments, **options)
    if not isa:
        yield room
        return
    if cpu.ISAS.index(isa[0]) > cpu.ISAS.index(cpu.isa()[1]):
        pytest.skip(f"this machine has no {isa[0]}")
    with cpu.forced_isa(isa[0]):
        yield room
