"""The keys of a shared prefix, written in place; and what the branches behind it see."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from carve_kernels.hf.decoding.prefix_cache import PrefixCache, TokenTree, common_length


def tokens(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that say which column they are; values have a size of their own, strides are real."""
    columns = torch.arange(start, start + count, dtype=torch.float32)
    key = columns[None, :, None, None].expand(1, count, 2, 4).transpose(1, 2)
    return key, -key[..., :3]


def test_keys_are_written_behind_the_prefix_and_over_what_was_there() -> None:
    prefix = PrefixCache(torch.arange(5))
    for layer in range(2):
        keys, values = prefix.write(layer, 0, *tokens(0, 5), capacity=12)
        assert keys.shape == (1, 2, 5, 4) and values.shape == (1, 2, 5, 3)
    assert len(prefix) == 5 and prefix.nbytes == 2 * 2 * 12 * (4 + 3) * 4
    first, _ = prefix.write(0, 5, *tokens(5, 3), capacity=12)
    again, values = prefix.write(0, 5, *tokens(50, 2), capacity=12)
    assert again.data_ptr() == first.data_ptr()
    assert again[0, 1, :, 0].tolist() == [0, 1, 2, 3, 4, 50, 51] and values[0, 0, :, 2].tolist()[-2:] == [-50, -51]


def test_capacity_grows_if_needed() -> None:
    prefix = PrefixCache(torch.arange(3))
    prefix.write(0, 0, *tokens(0, 3), capacity=3)
    before = prefix.nbytes
    keys, values = prefix.write(0, 3, *tokens(3, 2), capacity=4)
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4] and values[0, 1, :, 0].tolist() == [0, -1, -2, -3, -4]
    assert prefix.nbytes == before // 3 * 5


def test_a_cut_prefix_keeps_its_first_tokens() -> None:
    prefix = PrefixCache(torch.tensor([4, 5, 6, 7]))
    prefix.write(0, 0, *tokens(0, 4), capacity=6)
    prefix.truncate(2)
    keys, _ = prefix.write(0, len(prefix), *tokens(9, 1), capacity=6)
    assert prefix.ids.tolist() == [4, 5] and keys[0, 0, :, 0].tolist() == [0, 1, 9]


def test_trim_frees_spare_columns() -> None:
    prefix = PrefixCache(torch.arange(4))
    prefix.write(0, 0, *tokens(0, 4), capacity=9)
    before, _ = prefix.write(0, 4, *tokens(4, 2), capacity=9)
    prefix.trim()
    assert prefix.nbytes == 2 * 4 * (4 + 3) * 4
    keys, values = prefix.write(0, 4, *tokens(7, 1), capacity=6)
    assert keys[0, 1, :, 0].tolist() == [0, 1, 2, 3, 7] and values[0, 0, :, 0].tolist() == [0, -1, -2, -3, -7]
    # A few spare columns are not worth a copy.
    small = PrefixCache(torch.arange(8))
    kept, _ = small.write(0, 0, *tokens(0, 8), capacity=10)
    small.trim()
    assert small.write(0, 8, *tokens(8, 1), capacity=10)[0].data_ptr() == kept.data_ptr() != before.data_ptr()


def test_a_prefix_on_a_device_of_its_own_dtype() -> None:
    prefix = PrefixCache(torch.arange(2))
    key, value = (part.bfloat16() for part in tokens(0, 2))
    keys, values = prefix.write(3, 0, key, value, capacity=2)
    assert keys.dtype == values.dtype == torch.bfloat16


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_what_two_prompts_share(first: list[int], second: list[int]) -> None:
    expected = next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    count = common_length(torch.tensor(first), torch.tensor(second))
    assert count == (min(len(first), len(second)) if expected is None else expected)


@given(
    length=st.integers(1, 6),
    branches=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 8),
    data=st.data(),
)
def test_a_token_sees_its_own_prompt_and_nothing_else(
    length: int, branches: list[tuple[int, int]], window: int | None, data: st.DataObject
) -> None:
    tree = TokenTree(PrefixCache(torch.zeros(length, dtype=torch.int64)), 99)
    # Each column as (branch or None, place in the branch's prompt).
    columns: list[tuple[int | None, int]] = [(None, place) for place in range(length)]
    for branch, count in branches:
        here = length + sum(owner == branch for owner, _ in columns)
        columns += [(branch, here + step) for step in range(count)]
        tree.append(branch, count)
    assert len(tree) == len(columns)
    first = data.draw(st.integers(0, len(columns) - 1))
    expected = torch.tensor(
        [
            [
                owner in (None, own) and seen <= place and (window is None or seen > place - window)
                for owner, seen in columns
            ]
            for own, place in columns[first:]
        ]
    )
    seen = tree.visible(first, window)
    assert torch.equal(expected, torch.ones_like(expected) if seen is None else seen)
