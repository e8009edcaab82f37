"""The outputs of the region operators: what reaches the host, and in how many copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from carve_kernels.backends.native.region_buffers import RegionBuffers, allocate, read
from carve_kernels.types import RegionOptions

ELSEWHERE = torch.device("mps", 0)


class Elsewhere(torch.Tensor):
    """A tensor in this machine's memory that claims to be on another device; counts what reads it."""

    held: torch.Tensor
    readers: list[str]

    @staticmethod
    def __new__(cls, held: torch.Tensor, readers: list[str]) -> Any:
        found = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=ELSEWHERE)
        found.held, found.readers = held, readers
        return found

    def __getitem__(self, which: Any) -> Elsewhere:
        return Elsewhere(self.held[which], self.readers)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one for one in args if isinstance(one, cls)]
        plain = [one.held if isinstance(one, cls) else one for one in args]
        assert func is torch.ops.aten.copy_.default, func
        given[0].readers.append(func.__name__)
        return func(*plain, **(kwargs or {}))


def planted(count: int, *, rows: int, capacity: int) -> RegionBuffers:
    """Buffers as an operator fills them, the rows that it does not write poisoned."""
    plain = allocate(torch.empty(8, 2 * capacity // 8), RegionOptions(keep=1.0, floor=1), outcome_rows=rows)
    assert len(plain.boxes) == capacity and len(plain.outcome) == 6 + 5 * min(rows, capacity)
    plain.boxes.fill_(-1)
    plain.scores.fill_(torch.nan)
    plain.outcome.fill_(-1)
    plain.boxes[:count] = torch.arange(4 * count).view(count, 4)
    plain.scores[:count] = torch.arange(count) / 3
    plain.outcome[:6] = torch.tensor([count, 0, 1, 2, 3, 4])
    rows = min(rows, capacity)
    again = min(count, rows)
    plain.outcome[6 : 6 + 4 * again] = plain.boxes[:again].view(-1)
    plain.outcome[6 + 4 * rows :][:again] = plain.scores[:again].view(torch.int64)
    return plain


@pytest.mark.parametrize(
    ("count", "rows", "capacity", "copies"),
    [(3, 8, 40, 1), (8, 8, 40, 1), (9, 8, 40, 3), (40, 8, 40, 3), (4, 64, 4, 1), (2048, 8, 2048, 3)],
)
def test_boxes_and_scores_come_with_the_box(count: int, rows: int, capacity: int, copies: int) -> None:
    plain = planted(count, rows=rows, capacity=capacity)
    readers: list[str] = []
    mask, *others = (Elsewhere(part, readers) for part in plain)
    found = read(RegionBuffers(mask, *others))
    assert len(readers) == copies
    wanted = plain.boxes[:count].tolist(), plain.scores[:count].tolist()
    for part in plain:
        part.zero_()
    assert (found.boxes.tolist(), found.scores.tolist()) == wanted and found.box == (1, 2, 3, 4)
    assert found.mask is mask and found.boxes.device == found.scores.device == torch.device("cpu")
    assert len(readers) == copies


@pytest.mark.parametrize("rows", [0, 8])
def test_what_is_on_the_host_is_not_copied_as_a_whole(rows: int) -> None:
    plain = planted(3, rows=rows, capacity=2048)
    found = read(plain)
    assert found.boxes.tolist() == plain.boxes[:3].tolist() and found.scores.tolist() == plain.scores[:3].tolist()
    assert found.boxes.untyped_storage().nbytes() == 96
