"""The memory traffic of capture, counted in the interpreter, and its division among programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton

from carve_kernels.backends.triton import capture, capture_plan
from carve_kernels.backends.triton.capture_plan import (
    LEAST_LANES,
    MOST_LANES,
    MOST_SPLITS,
    PARTIALS,
    SPLIT_UNIT,
    plan,
    plan_scratch,
)
from carve_kernels.selfcheck.triton_work import capture_work
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot
from tests.backends.triton import interpreter
from tests.support.attention import Case, planted

if not triton.knobs.runtime.interpret:
    pytest.skip("counters want the interpreter", allow_module_level=True)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, query_heads=7, key_heads=1, rows=1, keys=1300, size=64, tokens=300),
        Case(batch=2, query_heads=4, key_heads=2, rows=3, keys=900, size=80, tokens=700, dtype=torch.float16),
        Case(batch=1, query_heads=4, key_heads=2, rows=9, keys=300, size=32, tokens=40),
    ],
    ids=["one row", "padded head size", "rows"],
)
def test_the_work_is_what_the_kernels_move(case: Case, lse: bool) -> None:
    compare(case, lse=lse)


def test_the_work_of_several_turns_is_what_the_kernels_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_plan, "MOST_LINES", 2)
    plan.cache_clear()
    plan_scratch.cache_clear()
    try:
        compare(Case(batch=1, query_heads=4, key_heads=2, rows=3, keys=300, size=32, tokens=40), launches=4)
    finally:
        plan.cache_clear()
        plan_scratch.cache_clear()


def test_the_scores_between_the_tokens_are_stored() -> None:
    case = Case(batch=1, query_heads=4, key_heads=2, rows=1, keys=900, size=32, tokens=200)
    tokens = torch.arange(300, 500, dtype=torch.int32)[None]
    compare(case, tokens=tokens, span=200)


def compare(
    case: Case, *, lse: bool = False, launches: int | None = None, tokens: torch.Tensor | None = None,
    span: int | None = None,
) -> None:  # fmt: skip
    """The work of a case, and what its kernels move."""
    case = case.but(view="all", ragged=False)
    (query, key, _), options = planted(case)
    if tokens is None:
        tokens = torch.stack([torch.randperm(case.keys)[: case.tokens] for _ in query]).to(torch.int32)
    known = torch.zeros(case.batch, case.query_heads, case.rows) if lse else None
    asked = CaptureOptions(**options, lse=known)
    ends = None if span is None else torch.stack([tokens.min(), tokens.max()])
    with interpreter.traffic() as traffic:
        slot = Slot(Capture.empty(query, tokens, "mean"))
        assert capture.forward_layers(Layers.single(query, key, None), tokens, asked, slot, ends)
    work = capture_work(
        layers=1, batch=case.batch, query_heads=case.query_heads, key_heads=case.key_heads, rows=case.rows,
        keys=case.keys, size=case.size, tokens=case.tokens, element_bytes=query.element_size(), lse=lse, span=span,
        architecture="interpreter",
    )  # fmt: skip
    assert traffic.read_bytes == pytest.approx(work.read_bytes, rel=0.05)
    # The tokens may begin and end within vectors of scores.
    slack = 0.05 if span is None else 0.4
    assert traffic.written_bytes == pytest.approx(work.written_bytes, rel=slack)
    assert len(traffic.launches) == work.launches == (launches or 2 - lse)


def test_the_keys_are_read_once() -> None:
    sizes: dict[str, Any] = {"layers": 6, "batch": 1, "query_heads": 28, "key_heads": 4, "size": 128}
    for keys, tokens in ((4096, 3277), (32768, 26214)):
        work = capture_work(rows=1, keys=keys, tokens=tokens, element_bytes=2, span=tokens, **sizes)
        once, scores = 6 * 4 * 128 * 2 * keys, 6 * 28 * 4 * tokens
        assert once + scores < work.read_bytes < 1.05 * (once + scores)
        assert scores < work.written_bytes < 1.15 * scores
        assert work.launches == 2
    again = capture_work(rows=1, keys=4096, tokens=256, element_bytes=2, lse=True, **sizes)
    assert again.launches == 1 and again.read_bytes < 1.2 * 6 * 4 * 128 * 2 * 256


SIZES = {
    "keys": st.integers(0, 2**20), "rows": st.integers(1, 300), "key_heads": st.integers(1, 8),
    "group": st.integers(1, 80), "layers": st.integers(1, 40), "batch": st.integers(1, 9),
    "element_bytes": st.sampled_from([2, 4]),
}  # fmt: skip


@given(size=st.integers(1, 256), **SIZES)
def test_tiles_and_splits_cover_everything(
    keys: int, rows: int, key_heads: int, group: int, layers: int, batch: int, element_bytes: int, size: int
) -> None:
    divided = plan(layers, batch, key_heads * group, key_heads, rows, keys, size, element_bytes)
    assert 1 <= divided.splits <= MOST_SPLITS and divided.span % SPLIT_UNIT == divided.padded % SPLIT_UNIT == 0
    assert divided.splits * divided.span >= keys and (keys == 0 or (divided.splits - 1) * divided.span < keys)
    assert divided.row_tiles * divided.block_row >= divided.rows and divided.group_tiles * divided.block_group >= group
    assert LEAST_LANES <= divided.block_row * divided.block_group <= MOST_LANES[element_bytes]
    assert size <= divided.block_size < max(2 * size, 17)
    assert 1 <= divided.rows <= rows and 1 <= divided.layers <= layers and divided.padded >= keys
    # Neither the layers nor the batch of a call change how its rows are added up, unless they are captured in turns.
    alone = plan(1, 1, key_heads * group, key_heads, divided.rows, keys, size, element_bytes)
    assert (divided.splits, divided.span) == (alone.splits, alone.span)


@given(tokens=st.integers(0, 5000), fewer=st.integers(0, 2**20), **SIZES)
def test_the_scratch_suffices_and_never_shrinks(
    keys: int, rows: int, key_heads: int, group: int, layers: int, batch: int, element_bytes: int, tokens: int,
    fewer: int,
) -> None:  # fmt: skip
    heads, blocks = key_heads * group, -(-tokens // 128)
    divided = plan(layers, batch, heads, key_heads, rows, keys, 64, element_bytes)
    scratch = plan_scratch(layers, batch, heads, rows, keys, blocks)
    lines = divided.layers * batch * divided.rows
    assert lines * heads * divided.padded <= scratch.statistics
    assert scratch.statistics + 2 * lines * heads * divided.splits <= scratch.partials
    assert scratch.partials + lines * max(blocks, 1) * PARTIALS <= scratch.floats and lines <= scratch.tickets
    assert scratch.statistics % 4 == 0
    less = plan_scratch(layers, batch, heads, rows, min(keys, fewer), blocks)
    assert less.floats <= scratch.floats and less.tickets <= scratch.tickets
    one = plan_scratch(1, batch, heads, rows, keys, blocks)
    assert one.floats <= scratch.floats and one.tickets <= scratch.tickets
