"""Which prompt a cache belongs to: the ids that went through it, its record, and whether it is as it was left."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from carve_kernels.hf import caches
from carve_kernels.hf.session.recording import STEPS, Record


class Followed:
    """One prompt and the tokens behind it, which one cache holds, or none where each forward reads all anew."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.ids = _Ids()
        # How many tokens went through it, and where the first step begins.
        self.length = 0
        self.prompt = 0
        self._marks: list[caches.Mark | None] | None = None
        # Some of its keys, where no counter tells whether they were written to.
        self._sample: torch.Tensor | None = None
        self._noted = 0
        # What modules had noted of its positions when its last forward ended.
        self._positions: list[Any] = []

    def known(self, ids: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """All ids on the CPU, those of a forward behind them, where there are `length` of them."""
        before = self.ids.all()
        if ids is None or before is None or before.shape[0] not in (0, ids.shape[0]):
            return None
        whole = torch.cat([before.cpu().view(ids.shape[0], -1), ids.detach().cpu()], 1)
        return whole if whole.shape[1] == length else None

    def note(
        self, ids: torch.Tensor | None, length: int, cache: Any, modules: Sequence[nn.Module], positions: list[Any]
    ) -> None:
        """After a forward of so many ids: how it left the cache, and what the model noted of positions."""
        self._positions = positions
        self.ids.append(ids)
        self.length = length
        self._marks = [caches.mark(cache, module) for module in modules]
        uncounted = any(left is not None and left.version is None for left in self._marks)
        self._sample = caches.sample(cache, modules[0], length) if uncounted else None
        self._noted = length

    def follow(self, cache: Any, modules: Sequence[nn.Module], layers: Sequence[int], held: int) -> None:
        """Before a forward: go back to where the cache was cropped to, if it was.

        Raises ValueError for a cache that was changed in another way: what its columns are is not known then.
        """
        if self._marks is None:
            raise ValueError(
                f"cache: expected one whose last forward came to its end, got one of {held} tokens that was "
                "interrupted; run the prompt anew"
            )
        for layer, module, left in zip(layers, modules, self._marks, strict=True):
            found = caches.mark(cache, module, left)
            # Nothing was done to it; where no counter tells, `was_written` does.
            if found is left and left is not None and held == self.length:
                continue
            # A layer that uses the keys of another one has none.
            if found is None and left is None and held == self.length and caches.has_layers(cache):
                continue
            if found is None or left is None or not _only_cropped(left, found, self.length, held):
                raise ValueError(
                    f"cache: expected it as the last forward left it, with {self.length} tokens, but layer {layer} has "
                    f"{'none' if found is None else found.keys} of the keys and the cache says {held}: keys were "
                    "evicted, replaced or reordered, so it is not known which columns they are; run the prompt anew"
                )
        if held < self.length:
            self._cut(held)

    def has_positions(self, positions: list[Any]) -> bool:
        """Whether what the model has noted of positions is still what it noted of this prompt."""
        return all(
            now is then or (isinstance(now, torch.Tensor) and isinstance(then, torch.Tensor) and torch.equal(now, then))
            for now, then in zip(positions, self._positions, strict=True)
        )

    def was_written(self, cache: Any, module: nn.Module) -> torch.Tensor | None:
        """Whether keys are others than those noted, on their device; None where a counter has told it already."""
        if self._sample is None:
            return None
        found = caches.sample(cache, module, self._noted)
        return None if found is None or found.shape != self._sample.shape else (found != self._sample).any()

    def _cut(self, length: int) -> None:
        self.length = length
        self.ids.cut(length)


class _Ids:
    """Ids [B, S] in a buffer with room behind them: a caller may use a tensor again, and a step allocates nothing."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, 0, dtype=torch.int64)
        # How many columns of it are written; None where some that went by are not known.
        self._count: int | None = 0

    def all(self) -> torch.Tensor | None:
        return None if self._count is None else self._buffer[:, : self._count]

    def append(self, ids: torch.Tensor | None) -> None:
        if ids is None or self._count is None or (self._count and ids.shape[0] != self._buffer.shape[0]):
            self._count = None
            return
        count, end = self._count, self._count + ids.shape[1]
        if end > self._buffer.shape[1]:
            longer = ids.new_empty(ids.shape[0], max(2 * count, end + STEPS))
            if count:
                longer[:, :count] = self._buffer[:, :count]
            self._buffer = longer
        self._buffer[:, count:end].copy_(ids.detach())
        self._count = end

    def cut(self, length: int) -> None:
        """Keep the first so many."""
        if self._count is not None:
            self._count = length if length <= self._count else None


class Caches:
    """The prompt of each cache that is alive, told by the cache itself and not by what it holds."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Any], Followed]] = {}

    def get(self, cache: Any) -> Followed | None:
        """What went through this very cache in the session, or None."""
        alive, followed = self._found.get(id(cache), (None, None))
        return followed if alive is not None and alive() is cache else None

    def bind(self, cache: Any, followed: Followed) -> None:
        """From here on this cache, and no other, holds the prompt."""
        self._found = {
            key: (alive, other)
            for key, (alive, other) in self._found.items()
            if alive() is not None and other is not followed
        }
        self._found[id(cache)] = (weakref.ref(cache), followed)


class Whole:
    """A forward that read a whole prompt, for telling whether a later one repeats it with one more token.

    Inside `generate` nobody changes what was given; outside of it a tensor may be used again for other numbers.
    """

    def __init__(self, followed: Followed, given: Mapping[str, Any], generating: bool) -> None:
        self.followed = followed
        self._given = dict(given) if generating else {name: _copied(value) for name, value in given.items()}

    def repeated(self, ids: torch.Tensor | None, given: Mapping[str, Any]) -> bool:
        """Whether the arguments are those of this forward, pixels included, with one more token."""
        before = self._given.get("input_ids")
        if ids is None or before is None or ids.shape != (before.shape[0], before.shape[1] + 1):
            return False
        return all(
            _continues(self._given.get(name), given.get(name), before.shape[1]) for name in {**self._given, **given}
        )


# What says how a forward works and not what it reads.
_SETTINGS = (bool, int, float, str, type(None))


def _only_cropped(left: caches.Mark, found: caches.Mark, length: int, held: int) -> bool:
    """Whether keys are those that a forward left behind, of which the first `held` may have been kept alone."""
    if not left.same_place(found) or held > length:
        return False
    if held == length:
        return found.keys == left.keys
    # A buffer stays as it is; keys that are all there are cut to the first ones.
    return found.keys == left.keys > length or (left.keys == length and found.keys in (held, length))


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, (list, tuple)) else value


def _continues(before: Any, after: Any, length: int) -> bool:
    """Whether an argument is the same, or the same with one more column on its axes of `length`; settings are none."""
    if before is after:
        return True
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        if before.ndim != after.ndim or before.dtype != after.dtype:
            return False
        sides = list(zip(before.shape, after.shape, strict=True))
        if any(new != old and (old, new) != (length, length + 1) for old, new in sides):
            return False
        return bool(torch.equal(after[tuple(slice(0, old) for old, _ in sides)].detach(), before.detach()))
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return all(_continues(before.get(name), after.get(name), length) for name in {**before, **after})
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        return len(before) == len(after) and all(map(_continues, before, after, [length] * len(before)))
    return isinstance(before, _SETTINGS) and isinstance(after, _SETTINGS)
