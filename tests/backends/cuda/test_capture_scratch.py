"""What the CUDA backend of capture is given beside its arguments: scratch and tickets; and its sinks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from carve_kernels import capture
from carve_kernels.backends.cuda import capture as cuda_capture
from carve_kernels.backends.cuda.plan import scratch_needs
from carve_kernels.backends.native.scratch import Memory, ScratchNeeds
from carve_kernels.ops.layer_operator import layer_operator
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot
from tests.emulator import emulator
from tests.support.attention import Case, planted, poisoned
from tests.support.cuda_capture import LONG, layered, same


@pytest.fixture(autouse=True)
def _served() -> Iterator[None]:
    with emulator.serving("capture"):
        yield


def needs_of(case: Case, layers: int = 1) -> ScratchNeeds:
    return scratch_needs(
        layers=layers, batch=case.batch, query_heads=case.query_heads, key_heads=case.key_heads, rows=case.rows,
        keys=case.keys, size=case.size, tokens=case.tokens, element_bytes=4,
    )  # fmt: skip


def banded(needs: ScratchNeeds, filling: int) -> tuple[Memory, torch.Tensor, torch.Tensor]:
    """Memory with exactly what a call needs, and the stores that it is the beginning of."""
    scratch = torch.full((needs.bytes + 64,), 7, dtype=torch.uint8)
    scratch[: needs.bytes] = filling
    tickets = torch.full((needs.tickets + 16,), 7, dtype=torch.int32)
    tickets[: needs.tickets] = 0
    return Memory(scratch[: needs.bytes], tickets[: needs.tickets]), scratch, tickets


@pytest.mark.parametrize("each", [False, True])
def test_the_scratch_has_the_size_asked_for_and_no_state(each: bool) -> None:
    case = LONG.but(keys=700)
    (query, key, tokens), options = planted(case)
    heads = "each" if each else "mean"
    needs = needs_of(case)
    slot = Slot(poisoned(case, heads))
    asked = CaptureOptions(**options, heads=heads)  # type: ignore[arg-type]
    results = []
    for filling in (0, 255, 93):
        memory, scratch, tickets = banded(needs, filling)
        assert cuda_capture.forward_layers(Layers([query], [key]), tokens, asked, slot, None, memory)
        assert bool((scratch[needs.bytes :] == 7).all()) and bool((tickets[needs.tickets :] == 7).all())
        assert not memory.tickets.any()
        results.append(Capture(*(part.clone() for part in slot.out)))
    assert same(results[0], results[1]) and same(results[0], results[2])
    for little, message in (
        (memory._replace(scratch=memory.scratch[:-1]), f"at least {needs.bytes} bytes, got {needs.bytes - 1}"),
        (memory._replace(tickets=memory.tickets[:-1]), f"at least {needs.tickets}, got {needs.tickets - 1}"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cuda_capture.forward_layers(Layers([query], [key]), tokens, asked, slot, None, little)


def test_memory_serves_every_call_that_needs_no_more() -> None:
    case = LONG.but(keys=700)
    memory = Memory.new(needs_of(case), torch.device("cpu"))
    for changes in ({}, {"keys": 130, "tokens": 9}, {"rows": 1}, {}):
        smaller = case.but(**changes)
        arguments, options = planted(smaller)
        out = poisoned(smaller)
        asked = CaptureOptions(**options)
        cuda_capture.forward_layers(Layers.single(*arguments[:2], None), arguments[2], asked, Slot(out), None, memory)
        assert same(out, capture(*arguments, **options, backend="cuda"))


def test_a_session_that_holds_memory_allocates_nothing() -> None:
    """In a CUDA graph an allocation would come from the graph's pool."""
    case = Case(view="all", batch=1)
    problems, out = layered(case, 3)
    operator = layer_operator("cuda", torch.device("cpu"), dtype=torch.float32, size=case.size)
    assert operator.backend == "cuda" and operator.run is emulator.operators.capture_layers.default
    memory = Memory.new(needs_of(case, 3), torch.device("cpu"))
    query, key = ([problem[part] for problem in problems] for part in (0, 1))
    step = torch.tensor(0)
    with Conversions() as conversions:
        operator.run(
            query, key, problems[0][2], None, None, None, [], None, 0.1, 0.0, 0, False, step, 0,
            *memory, *out,
        )  # fmt: skip
    assert conversions.ran == ["capture_layers"]


def test_the_needs_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = needs_of(LONG)
    assert needs.bytes > 0 and needs.tickets > 0
    monkeypatch.setattr(torch, "empty", None)
    assert needs_of(LONG) == needs


class Conversions(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "wanted"), [(torch.float32, []), (torch.bfloat16, ["stack", "_to_copy", "unbind"])])
def test_sinks_become_float32_in_two_launches_for_all_layers(dtype: torch.dtype, wanted: list[str]) -> None:
    problems, out = layered(Case(view="all", batch=1), 5)
    sinks = [torch.randn(6).to(dtype) for _ in problems]
    step = torch.tensor(0)
    with Conversions() as conversions:
        layers = Layers([query for query, _, _ in problems], [key for _, key, _ in problems], sinks)
        cuda_capture.forward_layers(layers, problems[0][2], CaptureOptions(0.1), Slot(out, step))
    before = conversions.ran[: conversions.ran.index("capture_layers")]
    allocated = ("detach", "empty", "zeros", "capture_plan_cuda")
    assert [name for name in before if name not in allocated] == wanted
    for place, ((query, key, _), sink) in enumerate(zip(problems, sinks, strict=True)):
        alone = capture(query, key, problems[0][2], scale=0.1, sink=sink, backend="cuda")
        assert same(Capture(*(part[0, place] for part in out)), alone)
