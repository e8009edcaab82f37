"""Tree attention: what it returns under any tree, and where it needs no mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carve_kernels.hf.decoding import tree_attention
from carve_kernels.hf.decoding.prefix_cache import BLOCKS, PrefixCache, Segment, TokenTree

NONE = torch.zeros(0, dtype=torch.int64)


def segment_of(length: int, *branches: tuple[int, int], past: int, fresh: int = 0) -> Segment:
    """The tokens after `past` columns of a prefix of `length` and branches (branch id, count)."""
    tree = TokenTree(PrefixCache(torch.zeros(length, dtype=torch.int64)), 9999)
    for branch, count in branches:
        tree.append(branch, count)
    return Segment(tree, 0, len(tree) - past, past, fresh, NONE, NONE)


def attend(
    segment: Segment, dtype: torch.dtype, window: int | None, values: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tree attention, and the same in float64 under the full mask: [1, n, A, D]."""
    generator = torch.Generator().manual_seed(3)
    columns, rows = len(segment.tree), segment.stop
    # Slices of longer caches, as the keys of a prefix are.
    query = torch.randn(1, rows, 6, 16, generator=generator).to(dtype).transpose(1, 2)
    keys = torch.randn(1, 2, columns + 5, 16, generator=generator).to(dtype)[:, :, :columns]
    value_cache = torch.randn(1, 2, columns + 5, values, generator=generator).to(dtype)[:, :, :columns]
    view = window, BLOCKS[0]
    found = tree_attention._sdpa(segment, query, keys, value_cache, view, {"scaling": 0.3})
    seen = segment.tree.visible(segment.past, window)
    truth = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys.double(), value_cache.double(), attn_mask=seen, scale=0.3, enable_gqa=True
    )
    return found, truth.transpose(1, 2)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("count", [64, 67, 300])
@pytest.mark.parametrize("past", [1, 63, 500])
def test_a_long_continuation_needs_no_mask(
    past: int, count: int, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Segment, "additive_mask", None)
    found, truth = attend(segment_of(past, (0, count), past=past), dtype, None)
    assert found.dtype == dtype and found.shape == truth.shape
    assert float((found - truth).abs().max()) <= bound * float(truth.abs().max())


@pytest.mark.parametrize(
    ("segment", "window", "values"),
    [
        (segment_of(50, (0, 40), (1, 40), past=50), None, 16),  # two branches
        (segment_of(50, (1, 40), (0, 80), past=90), None, 16),  # another branch lies between
        (segment_of(50, (0, 80), past=50), 30, 16),  # a window
        (segment_of(50, (0, 80), past=50), None, 24),  # values of another size
        (segment_of(0, (0, 80), past=0), None, 16),  # nothing before
        (segment_of(80, (0, 70), past=0, fresh=80), None, 16),  # after a prefix of the same forward
        (segment_of(50, (0, 40), (0, 80), past=90), None, 16),  # after its own branch
    ],
)
def test_other_trees(segment: Segment, window: int | None, values: int) -> None:
    found, truth = attend(segment, torch.float32, window, values)
    assert float((found - truth).abs().max()) <= 2e-6 * float(truth.abs().max())


@given(
    length=st.integers(0, 5),
    branches=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 3)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 9),
    data=st.data(),
)
def test_a_continuation_sees_all_up_to_itself(
    length: int, branches: list[tuple[int, int]], window: int | None, data: st.DataObject
) -> None:
    columns = length + sum(count for _, count in branches)
    past = data.draw(st.integers(0, columns - 1))
    segment = segment_of(length, *branches, past=past)
    first = data.draw(st.integers(0, segment.stop - 1))
    seen = segment.tree.visible(past + first, window)
    rows = [[column <= past + first + number for column in range(columns)] for number in range(segment.stop - first)]
    expected = seen is not None and past + first > 0 and seen.tolist() == rows
    assert segment.is_causal_continuation(first, window) == expected
