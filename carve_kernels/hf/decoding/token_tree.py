"""The columns of a prefix and of the branches behind it: which of them a token sees, and where it stands itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from carve_kernels.hf.decoding.prefix_cache import Prefix
from carve_kernels.types import Capture

_PREFIX = -1


class Tree:
    """A prefix with branches: every column of the keys is the prefix's or one branch's, in the order they came.

    `own` names the branch of each column (-1 is the prefix), `place` where the column stands in that branch's prompt;
    both int64 [S] on the CPU. `room` is how many columns there will be at most.
    """

    def __init__(self, prefix: Prefix, room: int) -> None:
        self.prefix, self.room = prefix, room
        self.own = torch.full((len(prefix),), _PREFIX)
        self.place = torch.arange(len(prefix))

    def __len__(self) -> int:
        return len(self.own)

    def grow(self, branch: int, count: int) -> None:
        """Add columns of a branch."""
        here = len(self.prefix) + int((self.own == branch).sum())
        self.own = torch.cat([self.own, torch.full((count,), branch)])
        self.place = torch.cat([self.place, torch.arange(here, here + count)])

    def shrink(self, length: int) -> None:
        """Forget the columns from `length` on: what not every layer has written, nobody may read."""
        self.own, self.place = self.own[:length], self.place[:length]

    def sees(self, first: int, window: int | None) -> torch.Tensor | None:
        """What the columns from `first` on see, bool [Q, S]: the prefix and their own branch, up to themselves.

        None where that is everything.
        """
        own, place = self.own[first:, None], self.place[first:, None]
        seen = ((self.own == _PREFIX) | (self.own == own)) & (self.place <= place)
        if window is not None:
            seen &= self.place > place - window
        return None if bool(seen.all()) else seen


@dataclass
class Part:
    """The tokens of one forward that belong to one tree: `start` to `stop` in the row, behind `past` columns.

    The first `fresh` of them are the prefix itself. `rows` are the captured ones, counted from `start` and none of the
    prefix, `tokens` the columns int32 [1, N] whose probabilities are kept, `taken` what was captured, maps [L, R, N].
    """

    tree: Tree
    start: int
    stop: int
    past: int
    fresh: int
    rows: torch.Tensor
    tokens: torch.Tensor
    taken: Capture | None = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What all layers of the forward share, made for the first of them."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def sees(self, first: int, window: int | None) -> torch.Tensor | None:
        """What the tokens from the first-th on see, bool [Q, S] on the CPU; None where it is everything."""
        seen: torch.Tensor | None = self.kept(
            ("sees", first, window), lambda: self.tree.sees(self.past + first, window)
        )
        return seen

    def continues(self, first: int, window: int | None) -> bool:
        """Whether the tokens from the first-th on come behind others and each sees all up to itself."""

        def staircase() -> bool:
            seen = self.sees(first, window)
            before = self.past + first
            return seen is not None and before > 0 and torch.equal(seen, torch.ones_like(seen).tril(before))

        found: bool = self.kept(("continues", first, window), staircase)
        return found
