"""The KV cache of a prompt prefix, the branches that follow it, and which of its columns a token sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from carve_kernels.hf.caches import states_nbytes
from carve_kernels.types import Capture

PREFIX = -1
"""The prefix, among the ids of branches."""
NO_BLOCK = -1
"""Where a token belongs to no block."""
BLOCKS = ("whole", "within window", "causal")
"""How layers attend in blocks: to all of a block, to what the window leaves of it, or not beyond the token itself."""


class PrefixCache:
    """The first tokens of some prompts with their keys and values in each layer, and spare columns after them.

    The columns after the prefix are scratch space of the current user. The next user overwrites them, so reuse copies
    nothing, but a cache has one user at a time. `depth` counts the layers that have processed the prefix.

    ==========  =======  =======================  ============================================
    name        dtype    shape                    meaning
    ==========  =======  =======================  ============================================
    ids         int64    [P]                      the tokens, on the CPU
    blocks      int64    [P]                      the last column of each token's block, on the CPU
    keys        model's  [1, KV, capacity, D]     of one layer; values likewise with their size
    states                                        a cache with the states of recurrent layers
    ==========  =======  =======================  ============================================

    States are those after the last token, so a prefix with states is never truncated.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids
        self.blocks = torch.full((len(ids),), NO_BLOCK)
        self.depth = 0
        self.states: Any = None
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """The bytes of its keys and values, the spare columns included, and of its states."""
        cached = sum(tensor.untyped_storage().nbytes() for layer in self._layers.values() for tensor in layer)
        return cached + states_nbytes(self.states)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; their columns become spare."""
        self.ids, self.blocks = self.ids[:length], self.blocks[:length]

    @torch.inference_mode(False)
    @torch.no_grad()
    def trim(self) -> None:
        """Free the spare columns if they are more than a quarter of the prefix."""
        length = len(self)
        for layer, cached in self._layers.items():
            if cached[0].shape[2] > length + length // 4:
                keys, values = (_resize(tensor, tensor, length, length) for tensor in cached)
                self._layers[layer] = keys, values

    def write(
        self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [1, KV, n, D] at column `start`; returns views of all columns up to there."""
        end = start + key.shape[2]
        cached = self._layers.get(layer)
        if cached is None or cached[0].shape[2] < end:
            columns = max(end, capacity)
            cached = self._layers[layer] = (
                _resize(cached and cached[0], key, start, columns),
                _resize(cached and cached[1], value, start, columns),
            )
        for tensor, new in zip(cached, (key, value), strict=True):
            tensor[:, :, start:end] = new
        return cached[0][:, :, :end], cached[1][:, :, :end]


class TokenTree:
    """A prefix with branches: each key column belongs to the prefix or to one branch, in the order of their forwards.

    `branch_ids` has the branch of each column (-1 is the prefix), `positions` the index of the column in the prompt of
    that branch, `blocks` the last position of the block of tokens that attend to each other in both directions
    (NO_BLOCK: to none behind itself); all int64 [S] on the CPU. `capacity` is the largest number of columns. `states`
    are the caches of branches with the states of recurrent layers; `copied` has the branches and layers whose states
    are there.
    """

    def __init__(self, prefix: PrefixCache, capacity: int) -> None:
        self.prefix, self.capacity = prefix, capacity
        self.branch_ids = torch.full((len(prefix),), PREFIX)
        self.positions = torch.arange(len(prefix))
        self.blocks = prefix.blocks
        self.states: dict[int, Any] = {}
        self.copied: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self.branch_ids)

    def append(self, branch: int, count: int, blocks: torch.Tensor | None = None) -> None:
        """Add columns of a branch."""
        start = len(self.prefix) + int((self.branch_ids == branch).sum())
        self.branch_ids = torch.cat([self.branch_ids, torch.full((count,), branch)])
        self.positions = torch.cat([self.positions, torch.arange(start, start + count)])
        self.blocks = torch.cat([self.blocks, torch.full((count,), NO_BLOCK) if blocks is None else blocks])

    def truncate(self, length: int) -> None:
        """Drop the columns from `length` on: columns that some layers have not written must not be read."""
        self.branch_ids, self.positions = self.branch_ids[:length], self.positions[:length]
        self.blocks = self.blocks[:length]

    def visible(self, first: int, window: int | None, blocks: str = BLOCKS[0]) -> torch.Tensor | None:
        """Which columns those from `first` on attend to, bool [Q, S]: the prefix and their branch, up to themselves or
        to the end of their block.

        None if that is all of them.
        """
        branch, position, block = (each[first:, None] for each in (self.branch_ids, self.positions, self.blocks))
        visible = (self.branch_ids == PREFIX) | (self.branch_ids == branch)
        visible &= sees(position, self.positions, block, self.blocks, window, blocks)
        return None if bool(visible.all()) else visible

    @property
    def is_causal_prefix(self) -> bool:
        """Whether no token of the prefix attends to one behind itself."""
        return bool((self.prefix.blocks == NO_BLOCK).all())


def sees(
    position: torch.Tensor,
    of: torch.Tensor,
    block: torch.Tensor,
    blocks: torch.Tensor,
    window: int | None,
    kind: str,
) -> torch.Tensor:
    """Whether tokens at `position`, in `block`, attend to those at positions `of`, in `blocks`: bool, broadcast."""
    before = of <= position
    inside = (block == blocks) & (block != NO_BLOCK) if kind != "causal" else None
    if inside is not None and kind == "within window":
        before = before | inside
    if window is not None:
        before = before & (of > position - window)
    return before | inside if inside is not None and kind == "whole" else before


@dataclass
class Segment:
    """The tokens of one packed forward that belong to one tree.

    ========  ======  ========  ==================================================================================
    name      dtype   shape     meaning
    ========  ======  ========  ==================================================================================
    start     int               the first token in the forward; `stop` is one past the last
    past      int               columns of the tree before this forward
    fresh     int               how many of its first tokens are the prefix, in the forward that reads it
    rows      int64   [R]       captured rows, counted from `start`, none of them in the prefix
    tokens    int32   [1, N]    columns of the visual tokens
    runs                        (branch, first, one past last token) of the prefix and of each branch, in order
    captured          [L, R, N] the result
    hidden    bool    [L, R, N] visual tokens that the captured rows cannot attend to, on the CPU
    ========  ======  ========  ==================================================================================
    """

    tree: TokenTree
    start: int
    stop: int
    past: int
    fresh: int
    rows: torch.Tensor
    tokens: torch.Tensor
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    captured: Capture | None = None
    hidden: torch.Tensor | None = None
    # What all layers of the forward share.
    _cache: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def visible(self, first: int, window: int | None, blocks: str = BLOCKS[0]) -> torch.Tensor | None:
        """The columns that tokens from index `first` on attend to, bool [Q, S] on the CPU; None if that is all."""
        key = ("visible", first, window, blocks)
        if key not in self._cache:
            self._cache[key] = self.tree.visible(self.past + first, window, blocks)
        visible: torch.Tensor | None = self._cache[key]
        return visible

    def additive_mask(
        self,
        first: int,
        window: int | None,
        like: torch.Tensor,
        hidden: float,
        repeats: int = 1,
        blocks: str = BLOCKS[0],
    ) -> torch.Tensor | None:
        """`visible` as a mask that is added, [1, 1, repeats * Q, S] in the dtype of `like`."""
        key = ("additive", first, window, hidden, repeats, blocks)
        if key not in self._cache:
            visible = self.visible(first, window, blocks)
            if visible is not None:
                mask = torch.zeros(visible.shape, dtype=like.dtype).masked_fill_(~visible, hidden)
                visible = mask.repeat(repeats, 1)[None, None].to(like.device)
            self._cache[key] = visible
        mask_or_none: torch.Tensor | None = self._cache[key]
        return mask_or_none

    def is_causal_continuation(self, first: int, window: int | None, blocks: str = BLOCKS[0]) -> bool:
        """Whether tokens from index `first` on follow cached columns and each attends to all columns up to itself."""
        key = ("causal continuation", first, window, blocks)
        if key not in self._cache:
            visible, before = self.visible(first, window, blocks), self.past + first
            self._cache[key] = (
                visible is not None and before > 0 and torch.equal(visible, torch.ones_like(visible).tril(before))
            )
        is_causal: bool = self._cache[key]
        return is_causal


def common_length(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many tokens two prompts share at their beginning."""
    length = min(len(first), len(second))
    different = (first[:length] != second[:length]).nonzero()
    return int(different[0, 0]) if len(different) else length


def _resize(cached: torch.Tensor | None, like: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    resized = like.new_empty(*like.shape[:2], capacity, like.shape[3])
    if cached is not None:
        resized[:, :, :length] = cached[:, :, :length]
    return resized
