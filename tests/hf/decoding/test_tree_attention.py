"""torch's attention for the tokens of one row: what it gives under any tree, and where it needs no mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carve_kernels.hf.decoding import tree_attention
from carve_kernels.hf.decoding.prefix_cache import Prefix
from carve_kernels.hf.decoding.token_tree import Part, Tree

NONE = torch.zeros(0, dtype=torch.int64)


def part_of(length: int, *grown: tuple[int, int], past: int, fresh: int = 0) -> Part:
    """The tokens behind `past` columns of a prefix of `length` and branches (number, count)."""
    tree = Tree(Prefix(torch.zeros(length, dtype=torch.int64)), 9999)
    for branch, count in grown:
        tree.grow(branch, count)
    return Part(tree, 0, len(tree) - past, past, fresh, NONE, NONE)


def attend(part: Part, dtype: torch.dtype, window: int | None, values: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """What the row gives, and the same in float64 under the whole mask: [1, n, A, D]."""
    generator = torch.Generator().manual_seed(3)
    columns, rows = len(part.tree), part.stop
    # Slices of longer caches, as the keys of a prefix are.
    query = torch.randn(1, rows, 6, 16, generator=generator).to(dtype).transpose(1, 2)
    keys = torch.randn(1, 2, columns + 5, 16, generator=generator).to(dtype)[:, :, :columns]
    held = torch.randn(1, 2, columns + 5, values, generator=generator).to(dtype)[:, :, :columns]
    found = tree_attention._sdpa(part, query, keys, held, window, {"scaling": 0.3})
    seen = part.tree.sees(part.past, window)
    truth = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys.double(), held.double(), attn_mask=seen, scale=0.3, enable_gqa=True
    )
    return found, truth.transpose(1, 2)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("count", [64, 67, 300])
@pytest.mark.parametrize("past", [1, 63, 500])
def test_a_long_continuation_needs_no_mask(
    past: int, count: int, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_attention, "_additive", None)
    found, truth = attend(part_of(past, (0, count), past=past), dtype, None)
    assert found.dtype == dtype and found.shape == truth.shape
    assert float((found - truth).abs().max()) <= bound * float(truth.abs().max())


@pytest.mark.parametrize(
    ("part", "window", "values"),
    [
        (part_of(50, (0, 40), (1, 40), past=50), None, 16),  # two branches
        (part_of(50, (1, 40), (0, 80), past=90), None, 16),  # another's branch stands between
        (part_of(50, (0, 80), past=50), 30, 16),  # a window
        (part_of(50, (0, 80), past=50), None, 24),  # values of another size
        (part_of(0, (0, 80), past=0), None, 16),  # nothing comes before
        (part_of(80, (0, 70), past=0, fresh=80), None, 16),  # behind a prefix of the same forward
        (part_of(50, (0, 40), (0, 80), past=90), None, 16),  # behind its own branch
    ],
)
def test_other_trees(part: Part, window: int | None, values: int) -> None:
    found, truth = attend(part, torch.float32, window, values)
    assert float((found - truth).abs().max()) <= 2e-6 * float(truth.abs().max())


@given(
    length=st.integers(0, 5),
    grown=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 3)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 9),
    data=st.data(),
)
def test_a_continuation_sees_all_up_to_itself(
    length: int, grown: list[tuple[int, int]], window: int | None, data: st.DataObject
) -> None:
    columns = length + sum(count for _, count in grown)
    past = data.draw(st.integers(0, columns - 1))
    part = part_of(length, *grown, past=past)
    first = data.draw(st.integers(0, part.stop - 1))
    seen = part.tree.sees(past + first, window)
    rows = [[column <= past + first + number for column in range(columns)] for number in range(part.stop - first)]
    expected = seen is not None and past + first > 0 and seen.tolist() == rows
    assert part.continues(first, window) == expected
