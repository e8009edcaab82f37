"""The columns of a prefix and of its branches: which of them a token sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from carve_kernels.hf.decoding.prefix_cache import PrefixCache
from carve_kernels.types import Capture

_PREFIX = -1


class TokenTree:
    """A prefix with branches: each key column belongs to the prefix or to one branch, in the order of their forwards.

    `branch_ids` has the branch of each column (-1 is the prefix), `positions` the index of the column in the prompt of
    that branch; both int64 [S] on the CPU. `capacity` is the largest number of columns.
    """

    def __init__(self, prefix: PrefixCache, capacity: int) -> None:
        self.prefix, self.capacity = prefix, capacity
        self.branch_ids = torch.full((len(prefix),), _PREFIX)
        self.positions = torch.arange(len(prefix))

    def __len__(self) -> int:
        return len(self.branch_ids)

    def append(self, branch: int, count: int) -> None:
        """Add columns of a branch."""
        start = len(self.prefix) + int((self.branch_ids == branch).sum())
        self.branch_ids = torch.cat([self.branch_ids, torch.full((count,), branch)])
        self.positions = torch.cat([self.positions, torch.arange(start, start + count)])

    def truncate(self, length: int) -> None:
        """Drop the columns from `length` on: columns that some layers have not written must not be read."""
        self.branch_ids, self.positions = self.branch_ids[:length], self.positions[:length]

    def visible(self, first: int, window: int | None) -> torch.Tensor | None:
        """What the columns from `first` on see, bool [Q, S]: the prefix and their branch, up to themselves.

        None if they see everything.
        """
        branch, position = self.branch_ids[first:, None], self.positions[first:, None]
        visible = ((self.branch_ids == _PREFIX) | (self.branch_ids == branch)) & (self.positions <= position)
        if window is not None:
            visible &= self.positions > position - window
        return None if bool(visible.all()) else visible


@dataclass
class Segment:
    """The tokens of one packed forward that belong to one tree.

    ========  ======  ========  ==================================================================================
    name      dtype   shape     meaning
    ========  ======  ========  ==================================================================================
    start     int               the first token in the forward; `stop` is one past the last
    past      int               columns of the tree before this forward
    fresh     int               how many tokens, the first ones, are the prefix itself
    rows      int64   [R]       captured rows, counted from `start`, none of them in the prefix
    tokens    int32   [1, N]    columns of the visual tokens
    captured          [L, R, N] the result
    ========  ======  ========  ==================================================================================
    """

    tree: TokenTree
    start: int
    stop: int
    past: int
    fresh: int
    rows: torch.Tensor
    tokens: torch.Tensor
    captured: Capture | None = None
    # What all layers of the forward share.
    _cache: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def visible(self, first: int, window: int | None) -> torch.Tensor | None:
        """What the tokens from the first-th on see, bool [Q, S] on the CPU; None if they see everything."""
        key = ("visible", first, window)
        if key not in self._cache:
            self._cache[key] = self.tree.visible(self.past + first, window)
        visible: torch.Tensor | None = self._cache[key]
        return visible

    def additive_mask(
        self, first: int, window: int | None, like: torch.Tensor, hidden: float, repeats: int = 1
    ) -> torch.Tensor | None:
        """`visible` as a mask that is added, [1, 1, repeats * Q, S] in the dtype of `like`."""
        key = ("additive", first, window, hidden, repeats)
        if key not in self._cache:
            visible = self.visible(first, window)
            if visible is not None:
                mask = torch.zeros(visible.shape, dtype=like.dtype).masked_fill_(~visible, hidden)
                visible = mask.repeat(repeats, 1)[None, None].to(like.device)
            self._cache[key] = visible
        mask_or_none: torch.Tensor | None = self._cache[key]
        return mask_or_none

    def is_causal_continuation(self, first: int, window: int | None) -> bool:
        """Whether the tokens from the first-th on have columns before them and each sees all columns up to itself."""
        key = ("causal continuation", first, window)
        if key not in self._cache:
            visible, before = self.visible(first, window), self.past + first
            self._cache[key] = (
                visible is not None and before > 0 and torch.equal(visible, torch.ones_like(visible).tril(before))
            )
        is_causal: bool = self._cache[key]
        return is_causal
