"""The prompt of each KV cache: its ids, its record, and whether the cache is unchanged since its last forward."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from carve_kernels.hf import caches
from carve_kernels.hf.session.recording import STEPS, Record


class TrackedPrompt:
    """One prompt and its new tokens, in one cache, or in none if each forward reads all tokens again."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.ids = _IdBuffer()
        # The number of tokens so far, and that of the prompt, where the first decode step begins.
        self.length = 0
        self.prompt = 0
        self._keys: list[caches.KeyState | None] | None = None
        # Some elements of its keys, where no version counter tells whether they were written to.
        self._sample: torch.Tensor | None = None
        self._sampled_length = 0
        # The position offsets that modules stored in its last forward.
        self._positions: list[Any] = []

    def all_ids(self, ids: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """All ids, those of a new forward included, on the CPU; None unless there are `length` of them."""
        self._read_fed()
        before = self.ids.all()
        if ids is None or before is None or before.shape[0] not in (0, ids.shape[0]):
            return None
        complete = torch.cat([before.cpu().view(ids.shape[0], -1), ids.detach().cpu()], 1)
        return complete if complete.shape[1] == length else None

    def update(
        self, ids: torch.Tensor | None, length: int, cache: Any, modules: Sequence[nn.Module], positions: list[Any]
    ) -> None:
        """After a forward: note its ids, the state of the cache, and the position offsets that the model stored."""
        self._positions = positions
        record, step = self.record, ids is not None and ids.shape[1] == 1 and length == self.length + 1
        # The record has a copy of what it was fed, so that a step is copied once.
        if not step or record is None or not record.has_fed(self.length, length):
            self._read_fed()
            self.ids.append(ids)
        self.length = length
        self.note_keys(cache, modules)
        uncounted = any(keys is not None and keys.version is None for keys in self._keys or ())
        self._sample = caches.sample(cache, modules[0], length) if uncounted else None
        self._sampled_length = length

    def note_keys(self, cache: Any, modules: Sequence[nn.Module]) -> None:
        """Note where the keys of the cache are, and how often they were written to."""
        before = self._keys or [None] * len(modules)
        self._keys = [caches.key_state(cache, *each) for each in zip(modules, before, strict=True)]

    def synchronise(self) -> None:
        """Read how many tokens the replays of a CUDA graph have added."""
        if self.record is not None and self.record.state.graphed:
            self.record.synchronise()
            self.length = self.record.length

    def _read_fed(self) -> None:
        """Copy the ids of steps that only the record has."""
        count = self.ids.count
        if count is not None and count < self.length and self.record is not None:
            self.ids.append(self.record.fed(count, self.length))

    def check_cache(
        self, cache: Any, modules: Sequence[nn.Module], layers: Sequence[int], count: int, new: int
    ) -> None:
        """Before a forward of `new` tokens: follow the cache back if it was cropped to `count`; else ValueError."""
        if self._keys is None:
            raise ValueError(
                f"cache: expected a cache whose last forward finished, got one of {count} tokens that was interrupted; "
                "run the prompt again"
            )
        if self.record is not None and self.record.kept and (new > 1 or count < self.length):
            raise ValueError(
                f"cache: expected one token after the {self.length} of a prompt whose tokens were dropped, got {new} "
                f"after {count}; its layers hold different tokens: it cannot be cropped, or go on with another text"
            )
        for layer, module, left in zip(layers, modules, self._keys, strict=True):
            state = caches.key_state(cache, module, left)
            # Unchanged; without a version counter `was_written` tells.
            if state is left and left is not None and count == self.length:
                continue
            # A layer that reuses another layer's keys has no keys itself.
            if state is None and left is None and count == self.length and caches.has_layers(cache):
                continue
            if state is None or left is None or not _only_cropped(left, state, self.length, count):
                raise ValueError(
                    f"cache: expected it as the last forward left it, with {self.length} tokens, but layer {layer} has "
                    f"{'no' if state is None else state.keys} keys and the cache counts {count}: keys were evicted, "
                    "replaced or reordered, so their columns are unknown; run the prompt again"
                )
        if count < self.length:
            self.length = count
            self.ids.truncate(count)

    def has_positions(self, positions: list[Any]) -> bool:
        """Whether the position offsets in the model are still those of this prompt."""
        return all(
            now is then or (isinstance(now, torch.Tensor) and isinstance(then, torch.Tensor) and torch.equal(now, then))
            for now, then in zip(positions, self._positions, strict=True)
        )

    def was_written(self, cache: Any, module: nn.Module) -> torch.Tensor | None:
        """Whether keys have changed, as a bool tensor on their device; None where version counters tell."""
        if self._sample is None:
            return None
        sample = caches.sample(cache, module, self._sampled_length)
        return None if sample is None or sample.shape != self._sample.shape else (sample != self._sample).any()


class _IdBuffer:
    """Ids [B, S] in a buffer that grows: callers may reuse their tensors, and a step allocates nothing."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, 0, dtype=torch.int64)
        # The number of columns written; None if some ids are unknown.
        self.count: int | None = 0

    def all(self) -> torch.Tensor | None:
        return None if self.count is None else self._buffer[:, : self.count]

    def append(self, ids: torch.Tensor | None) -> None:
        if ids is None or self.count is None or (self.count and ids.shape[0] != self._buffer.shape[0]):
            self.count = None
            return
        count, end = self.count, self.count + ids.shape[1]
        if end > self._buffer.shape[1]:
            longer = ids.new_empty(ids.shape[0], max(2 * count, end + STEPS))
            if count:
                longer[:, :count] = self._buffer[:, :count]
            self._buffer = longer
        self._buffer[:, count:end].copy_(ids)
        self.count = end

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` columns."""
        if self.count is not None:
            self.count = min(length, self.count)


class CacheTable:
    """The prompt of each live cache, by the identity of the cache rather than its content."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[weakref.ref[Any], TrackedPrompt]] = {}

    def get(self, cache: Any) -> TrackedPrompt | None:
        """The prompt that this cache object holds, or None."""
        reference, prompt = self._prompts.get(id(cache), (None, None))
        return prompt if reference is not None and reference() is cache else None

    def bind(self, cache: Any, prompt: TrackedPrompt) -> None:
        """From now on this cache, and no other, holds the prompt."""
        self._prompts = {
            number: (reference, other)
            for number, (reference, other) in self._prompts.items()
            if reference() is not None and other is not prompt
        }
        self._prompts[id(cache)] = (weakref.ref(cache), prompt)


class CompleteForward:
    """The arguments of a forward over a complete prompt, to recognise one that repeats it with one more token.

    Inside `generate` arguments are not modified; outside of it they are copied, since a caller may reuse tensors.
    """

    def __init__(self, prompt: TrackedPrompt, arguments: Mapping[str, Any], generating: bool) -> None:
        self.prompt = prompt
        self._arguments = dict(arguments) if generating else {name: _copy(value) for name, value in arguments.items()}

    def is_repeated(self, ids: torch.Tensor | None, arguments: Mapping[str, Any]) -> bool:
        """Whether the arguments are those of this forward, pixels included, with one more token."""
        before = self._arguments.get("input_ids")
        if ids is None or before is None or ids.shape != (before.shape[0], before.shape[1] + 1):
            return False
        return all(
            _is_continuation(self._arguments.get(name), arguments.get(name), before.shape[1])
            for name in {**self._arguments, **arguments}
        )


# Types of arguments that are settings rather than inputs.
_SETTINGS = (bool, int, float, str, type(None))


def _only_cropped(left: caches.KeyState, state: caches.KeyState, length: int, count: int) -> bool:
    """Whether keys are those that a forward left, all of them or the first `count`."""
    if not left.same_storage(state) or count > length:
        return False
    if count == length:
        return state.keys == left.keys
    # A static buffer keeps its size; dynamic keys are cut to the first ones.
    return state.keys == left.keys > length or (left.keys == length and state.keys in (count, length))


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {name: _copy(each) for name, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, (list, tuple)) else value


def _is_continuation(before: Any, after: Any, length: int) -> bool:
    """Whether an argument is unchanged, or has one more column on its axes of size `length`, or is a setting."""
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
        return all(_is_continuation(before.get(name), after.get(name), length) for name in {**before, **after})
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
        return len(before) == len(after) and all(map(_is_continuation, before, after, [length] * len(before)))
    return isinstance(before, _SETTINGS) and isinstance(after, _SETTINGS)
