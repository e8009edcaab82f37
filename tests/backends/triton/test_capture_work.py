"""The memory traffic of capture, counted in the interpreter, and its division among programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton

from carve_kernels.backends.triton import capture
from carve_kernels.backends.triton.capture_plan import LEAST_LANES, MOST_LANES, MOST_SPLITS, plan
from carve_kernels.selfcheck.triton_work import capture_work
from carve_kernels.types import CaptureOptions
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
    case = case.but(view="all", ragged=False)
    (query, key, _), options = planted(case)
    tokens = torch.stack([torch.randperm(case.keys)[: case.tokens] for _ in query]).to(torch.int32)
    known = torch.zeros(case.batch, case.query_heads, case.rows) if lse else None
    with interpreter.traffic() as traffic:
        capture.forward(query, key, tokens, CaptureOptions(**options, lse=known))
    element_bytes = query.element_size()
    work = capture_work(
        layers=1, batch=case.batch, query_heads=case.query_heads, key_heads=case.key_heads, rows=case.rows,
        keys=case.keys, size=case.size, tokens=case.tokens, element_bytes=element_bytes, lse=lse,
        architecture="interpreter",
    )  # fmt: skip
    assert traffic.read_bytes == pytest.approx(work.read_bytes, rel=0.05)
    assert traffic.written_bytes == pytest.approx(work.written_bytes, rel=0.05)
    assert len(traffic.launches) == work.launches


def test_the_keys_are_read_once_and_again_at_the_tokens() -> None:
    sizes: dict[str, Any] = {"layers": 6, "batch": 1, "query_heads": 28, "key_heads": 4, "size": 128}
    for keys, tokens in ((4096, 256), (32768, 1024)):
        work = capture_work(rows=1, keys=keys, tokens=tokens, element_bytes=2, **sizes)
        once = 6 * 4 * 128 * 2 * (keys + tokens)
        assert once < work.read_bytes < 1.05 * once
        assert work.launches == 2
    again = capture_work(rows=1, keys=4096, tokens=256, element_bytes=2, lse=True, **sizes)
    assert again.launches == 1 and again.read_bytes < 1.2 * 6 * 4 * 128 * 2 * 256


@given(
    keys=st.integers(0, 2**20), rows=st.integers(1, 300), key_heads=st.integers(1, 8), group=st.integers(1, 80),
    size=st.integers(1, 256), element_size=st.sampled_from([2, 4]),
)  # fmt: skip
def test_splits_follow_keys_and_rows_and_tiles_cover_everything(
    keys: int, rows: int, key_heads: int, group: int, size: int, element_size: int
) -> None:
    divided = plan(key_heads * group, key_heads, rows, keys, size, element_size)
    another = plan(4, 4, rows, keys, 64, 2)
    assert (divided.splits, divided.span) == (another.splits, another.span)
    assert 1 <= divided.splits <= MOST_SPLITS
    assert divided.splits * divided.span >= keys and (keys == 0 or (divided.splits - 1) * divided.span < keys)
    assert divided.row_tiles * divided.block_row >= rows and divided.group_tiles * divided.block_group >= group
    assert LEAST_LANES <= divided.block_row * divided.block_group <= MOST_LANES[element_size]
    assert size <= divided.block_size < max(2 * size, 17)
