"""Column sums by the Triton backend: memory accesses, order of programs, launches, and what is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton

from carve_kernels import BackendUnavailable
from carve_kernels import column_sums as public
from carve_kernels.backends.reference import column_sums as reference
from carve_kernels.backends.triton import column_sums
from carve_kernels.types import CaptureOptions
from tests.backends.triton import interpreter
from tests.backends.triton.guard import Guards, guard_allocations
from tests.support.attention import Case, exact, planted
from tests.support.tolerances import close, roundings

if not triton.knobs.runtime.interpret:
    pytest.skip("guards and counters want the interpreter", allow_module_level=True)

NORMALISER, SUMS = "column_normaliser_kernel", "column_sums_kernel"
# Two tiles of rows and of keys.
LONG = Case(batch=2, query_heads=4, key_heads=2, rows=70, keys=150, size=32, tokens=0, ragged=False, view="positions")
CASES = {
    "mask": Case(rows=2, keys=301),
    "head mask": Case(rows=2, view="head mask"),
    "window, sink, softcap": Case(view="positions", window=23, sink=True, softcap=4.0),
    "several tiles": LONG,
    "half": Case(dtype=torch.float16, size=80, view="positions"),
}


def causal(rows: int, keys: int) -> torch.Tensor:
    return torch.arange(keys - rows, keys)[None]


def spread(tensor: torch.Tensor, factor: int) -> torch.Tensor:
    """The same values with gaps between any two elements."""
    if factor == 1:
        return tensor
    store = torch.full((*tensor.shape, factor), torch.nan if tensor.is_floating_point() else 0).to(tensor.dtype)
    store[..., 1] = tensor
    return store[..., 1]


@pytest.mark.parametrize("spacing", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_nothing_outside_the_tensors_is_accessed(name: str, spacing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    (query, key, _), options = planted(case)
    (doubled, doubled_key, _), exact_options = exact((query, key, query), options)
    truth = reference.forward(doubled, doubled_key, CaptureOptions(**exact_options))
    own = reference.forward(query, key, CaptureOptions(**options))
    guards = Guards()

    def guarded(what: str, value: Any) -> Any:
        return guards.put(what, spread(value, spacing)) if isinstance(value, torch.Tensor) else value

    with monkeypatch.context() as patched:
        guard_allocations(guards, patched)
        given = CaptureOptions(**{what: guarded(what, value) for what, value in options.items()})
        found = column_sums.forward(guarded("query", query), guarded("key", key), given)
    guards.check()
    close(found, own, truth, roundings(case.size + 64 + case.rows))


def test_any_order_of_programs_gives_the_same_bits() -> None:
    (query, key, _), options = planted(LONG)
    wanted = column_sums.forward(query, key, CaptureOptions(**options))
    for order in ("reverse", "shuffled"):
        with interpreter.programs_in(order):
            found = column_sums.forward(query, key, CaptureOptions(**options))
        assert torch.equal(found, wanted)


def test_a_batch_has_the_bits_of_its_rows_alone() -> None:
    (query, key, _), options = planted(LONG)
    whole = column_sums.forward(query, key, CaptureOptions(**options))
    for b in range(2):
        alone = CaptureOptions(**options | {"positions": options["positions"][b : b + 1]})
        assert torch.equal(column_sums.forward(query[b : b + 1], key[b : b + 1], alone)[0], whole[b])


def test_one_launch_where_the_lse_is_given_and_two_without() -> None:
    (query, key, _), options = planted(LONG)
    with interpreter.traffic() as traffic:
        column_sums.forward(query, key, CaptureOptions(**options))
    assert traffic.launches == [NORMALISER, SUMS]
    with interpreter.traffic() as traffic:
        column_sums.forward(query, key, CaptureOptions(**options, lse=torch.zeros(2, 4, 70)))
    assert traffic.launches == [SUMS]


def test_rows_that_see_none_of_the_keys_are_not_read() -> None:
    rows = keys = 512
    query, key = torch.randn(1, 1, rows, 16), torch.randn(1, 1, keys, 16)
    lse = torch.full((1, 1, rows), 5.0)
    with interpreter.traffic() as every:
        column_sums.forward(query, key, CaptureOptions(0.25, lse=lse))
    with interpreter.traffic() as half:
        column_sums.forward(query, key, CaptureOptions(0.25, lse=lse, positions=causal(rows, keys)))
    # Beside the positions, whole tiles on the diagonal.
    positions = keys // 128 * rows * 8
    assert half.read_bytes - 2 * positions < 0.75 * every.read_bytes


def test_the_scratch_is_two_floats_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    (query, key, _), options = planted(LONG)
    made: list[int] = []
    shipped = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *shape: Any, **named: Any) -> torch.Tensor:
        memory = shipped(self, *shape, **named)
        if "device" not in named:
            made.append(memory.numel())
        return memory

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    column_sums.forward(query, key, CaptureOptions(**options))
    assert made == [2 * 4 * 150, 2 * 2 * 4 * 70]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"query": torch.ones(1, 2, 3, 4).double(), "key": torch.ones(1, 1, 5, 4).double()},
            r"query is torch\.float64",
        ),
        ({"query": torch.ones(1, 2, 3, 257), "key": torch.ones(1, 1, 5, 257)}, "heads of size 257"),
    ],
)
def test_unsupported_arguments_have_a_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=reason):
        public(**changes, scale=1.0, backend="triton")
