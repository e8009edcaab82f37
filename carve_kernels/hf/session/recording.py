"""The record of one prefill and the steps behind it: buffers, tensors that the attention reads, bookkeeping by step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import carve_kernels.ops.capture  # noqa: F401  (registers the operator)
from carve_kernels.hf import names
from carve_kernels.hf.attention_patch import check_mask, refuse_packed, steering, visible
from carve_kernels.hf.caches import Reach
from carve_kernels.hf.query_rows import Rows
from carve_kernels.maps import AttentionMaps
from carve_kernels.numerics import entropy
from carve_kernels.types import Capture, VisualLayout

_LOG = logging.getLogger("carve_kernels")

OnLayer = Callable[[int, int, Capture], None]
# What a buffer of masses holds until something is captured; a mass is never negative.
_UNSEEN = -1.0
_EVICTED = (
    "keys were evicted, or others stand beside them, so it is not known which columns they are; run the prompt anew"
)
# What is asked of a device at the end only, and the error for it.
_DOUBTS: dict[str, Callable[[], ValueError]] = {
    "cache": lambda: ValueError(f"cache: expected all keys that went through it in this session; {_EVICTED}"),
    "attention_mask": steering,
}
# Decode steps that buffers are made for at first; they double when an answer is longer.
STEPS = 64


# Scale, softcap, keys, window and rows of a layer's attention.
_Like = tuple[float, float, int, int | None, int]


@dataclass
class _Batch:
    """Layers of one forward that wait to be captured together, since they share all but query, key and sink."""

    first: int
    like: _Like
    given: Any
    version: int | None
    tokens: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    window: int | None
    query: list[torch.Tensor] = field(default_factory=list)
    key: list[torch.Tensor] = field(default_factory=list)
    written: list[int | None] = field(default_factory=list)
    sink: list[torch.Tensor] = field(default_factory=list)

    def takes(self, index: int, like: _Like, given: Any) -> bool:
        same = self.given is given and self.version == _version(given)
        return same and self.like == like and index == self.first + len(self.query)


class Record:
    """Captures of one prefill and its decode steps. The attention of a module calls `record`; the session the rest."""

    def __init__(
        self,
        layers: tuple[int, ...],
        rows: Rows,
        tokens: torch.Tensor,
        layout: VisualLayout | None,
        *,
        reaches: tuple[Reach | None, ...],
        shared: tuple[Reach, ...],
        device: torch.device,
        past: int,
        length: int,
        kept: int | None,
        max_steps: int,
        eos: tuple[int, ...],
        on_layer: OnLayer | None,
        backend: str,
    ) -> None:
        batch, captured = rows.columns.shape
        self.layers, self.layout = layers, layout
        self.last, self.weight = rows.last, rows.weight
        self.tokens = tokens.to(device)
        self.rows = (rows.columns - past).to(device)
        # How many keys each layer is handed; one that uses another layer's keys is handed as many as some layer is.
        self.reaches, self.shared = reaches, shared
        self.seen = torch.full((), past + length, dtype=torch.int64, device=device)
        self.slot = torch.zeros((), dtype=torch.int64, device=device)
        self.buffers = _buffers(1, len(layers), batch, captured, tokens.shape[1], device)
        self.later: Capture | None = None
        self.target = self.buffers
        self.active = True
        self.step = 0
        self.max_steps = max_steps
        self.eos = eos
        self.length = self.prompt = past + length
        # How many tokens the forward under way reads, and the layer that was met last in it.
        self.reads, self.met = length, -1
        # How many of them, the last ones, may be all that a layer reads, and the first row that is captured.
        self.kept, self.lowest = kept, int(rows.columns.min()) - past
        # Why its maps are no maps: what was found in a forward, and what a device knows and is asked for at the end.
        self.refused: ValueError | None = None
        self.doubts = {name: torch.zeros((), dtype=torch.bool, device=device) for name in _DOUBTS}
        # The tokens fed at each decode step: a record allocates nothing after its first one.
        self.fed = torch.empty(0, batch, dtype=torch.int64, device=device)
        self.columns = self.tokens.to(torch.int32)
        self.dtype = ""
        self.on_layer, self.backend = on_layer, backend
        # Whether layers wait for each other: a cache holds their keys anyway; without one they would be held for this.
        self.together = True
        self.pending: _Batch | None = None

    def advance(self, ids: torch.Tensor | None, seen: int, column: int) -> None:
        """Prepare for a decode step: `seen` tokens stand in the cache then, row `column` of the query is captured."""
        self.step += 1
        self.reads, self.met, self.lowest = column + 1, -1, column
        self.length = seen
        self.seen.fill_(seen)
        self.pending = None
        if self.last and self.step == self.max_steps:
            _LOG.warning(
                "max_steps: steps of this generation from %d on are not captured; raise max_steps for them", self.step
            )
        self.active = self.last and self.step < self.max_steps
        if not self.active:
            return
        room = 0 if self.later is None else self.later.mass.shape[0]
        if self.step > room:
            self._make_room(room, min(self.max_steps - 1, max(STEPS, 2 * room)))
        if ids is not None:
            self.fed[self.step - 1].copy_(ids[:, -1].detach())
        self.slot.fill_(self.step - 1)
        self.rows.fill_(column)

    def _make_room(self, room: int, steps: int) -> None:
        batch, device = self.tokens.shape[0], self.tokens.device
        later = _buffers(steps, len(self.layers), batch, 1, self.tokens.shape[1], device)
        # No token has this number, so a step whose ids nobody knows ends nothing.
        fed = torch.full((steps, batch), -1, dtype=torch.int64, device=device)
        if self.later is None:
            self.rows = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        else:
            for target, part in zip((*later, fed), (*self.later, self.fed), strict=True):
                target[:room] = part
        self.later = self.target = later
        self.fed = fed

    def rewind(self, seen: int) -> None:
        """Forget the steps behind the first `seen` tokens, before one of them is taken anew."""
        self.step = seen - self.prompt
        if self.later is not None:
            self.later.mass[self.step :] = _UNSEEN

    def record(self, index: int, *call: Any) -> None:
        """Take a layer's attention as it was called; what is refused in it leaves no maps."""
        if not self.active:
            return
        try:
            self._record(index, *call)
        except ValueError as error:
            self.refused = error
            raise

    def _record(
        self,
        index: int,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: Any,
        options: dict[str, Any],
    ) -> None:
        told = names.attention_options(query, options)
        query, key = query.detach(), key.detach()
        self._check(index, query, key, told)
        _, heads, length, size = query.shape
        like = (told.scale, told.softcap, key.shape[2], told.window, length)
        picked = self.rows if length == self.reads else self.rows - (self.reads - length)
        pending = self.pending
        if pending is None or not pending.takes(index, like, attention_mask):
            self._flush()
            pending = self._batch(index, module, like, attention_mask, picked, length, told)
            self.pending = pending
        if length > 1 or self.rows.shape[1] > 1:
            query = query.gather(2, picked[:, None, :, None].expand(-1, heads, -1, size))
        pending.query.append(query)
        pending.key.append(key)
        pending.written.append(_version(key))
        if told.sink is not None:
            pending.sink.append(told.sink)
        self.dtype = str(query.dtype).removeprefix("torch.")
        if index == len(self.layers) - 1 or not self.together:
            self._flush()
        if self.on_layer is not None:
            slot = int(self.slot)
            self.on_layer(self.layers[index], self.step, Capture(*(part[slot, index] for part in self.target)))

    def _check(self, index: int, query: torch.Tensor, key: torch.Tensor, told: names.AttentionOptions) -> None:
        """Whether this layer attends over the columns of the prompt as the model was given it."""
        layer, compiling = self.layers[index], torch.compiler.is_compiling()
        if told.bias is not None:
            raise ValueError(f"layers: layer {layer} adds a position bias, which cannot be captured")
        if told.paged is not None:
            raise ValueError("model: a paged cache (continuous batching) cannot be captured; use generate")
        batch, _, rows, _ = query.shape
        whole = rows == self.reads or (rows == self.kept and self.lowest >= self.reads - rows >= 0)
        if batch != self.tokens.shape[0] or not whole:
            raise ValueError(
                f"layers: layer {layer} has {batch} x {rows} rows, the model was given {self.tokens.shape[0]} x "
                f"{self.reads} tokens: tokens were dropped or added inside the forward, so the columns of a map are "
                "not known; capture layers before that, or open the session around the part behind it"
            )
        if not compiling:
            if index <= self.met:
                raise ValueError(f"layers: layer {layer} runs again in one forward, and one map of it is kept")
            self.met = index
        reach, keys = self.reaches[index], key.shape[2]
        known = (reach,) if reach is not None else (Reach(told.window, None), *self.shared)
        if not compiling:
            if keys != self.length and not any(each.hands_over(keys, self.length, rows) for each in known):
                raise ValueError(f"cache: layer {layer} has {keys} keys, {self.length} were seen; {_EVICTED}")
        elif all(each.window is None and keys != each.capacity for each in known):
            self.doubts["cache"].logical_or_(self.seen != keys)

    def _batch(
        self,
        index: int,
        module: nn.Module,
        like: _Like,
        attention_mask: Any,
        picked: torch.Tensor,
        length: int,
        told: names.AttentionOptions,
    ) -> _Batch:
        keys, window = like[2:4]
        implementation = names.implementation_of(module) or ""
        check_mask(implementation, attention_mask, keys)
        refuse_packed(implementation, attention_mask, told.segments, told.positions, length)
        seen = visible(
            implementation,
            attention_mask,
            picked,
            length,
            keys,
            causal=names.is_causal(module) if told.causal is None else told.causal,
            window=window,
        )
        if seen.steered is not None:
            if torch.compiler.is_compiling() or seen.steered.device.type != "cpu":
                self.doubts["attention_mask"].logical_or_(seen.steered)
            elif bool(seen.steered):
                raise steering()
        return _Batch(
            index,
            like,
            attention_mask,
            _version(attention_mask),
            self._columns(keys),
            seen.mask,
            seen.positions,
            seen.window,
        )

    def _columns(self, keys: int) -> torch.Tensor:
        """Where the tokens stand among these keys: a sliding cache hands over its last ones only, so they move left."""
        # A compiled forward must not depend on how many keys have been seen, or it would compile anew at each step.
        if not torch.compiler.is_compiling() and self.length <= keys:
            return self.columns
        return (self.tokens - (self.seen - keys).clamp(min=0)).to(torch.int32)

    def _flush(self) -> None:
        pending = self.pending
        self.pending = None
        if pending is None:
            return
        if [_version(key) for key in pending.key] != pending.written:
            raise ValueError(
                f"cache: keys of layer {self.layers[pending.first]} or behind it were written to after their attention "
                "and before their capture; use on_layer, which captures each layer at once"
            )
        scale, softcap = pending.like[:2]
        torch.ops.carve_kernels.capture_layers(
            pending.query, pending.key, pending.tokens, pending.mask, pending.positions, pending.sink, scale, softcap,
            pending.window or 0, self.slot, pending.first, self.backend, *self.target,
        )  # fmt: skip

    def result(self) -> AttentionMaps:
        """What has been captured so far, as tensors of its own; raises ValueError where something was refused."""
        if self.refused is not None:
            raise self.refused
        for name, doubt in self.doubts.items():
            if bool(doubt):
                raise _DOUBTS[name]()
        steps = min(self.step + 1, self.max_steps) if self.last else 1
        first = Capture(*(part[0] for part in self.buffers))
        used = self.tokens >= 0
        alive = self._alive(steps)
        if self.weight is not None:
            first = averaged(first, self.weight.to(used.device), used)
        _, batch, rows = first.mass.shape
        shape = (batch, len(self.layers), steps, rows)
        values = torch.zeros(*shape, self.tokens.shape[1], device=used.device)
        mass, spread = torch.zeros(shape, device=used.device), torch.zeros(shape, device=used.device)
        values[:, :, 0], mass[:, :, 0], spread[:, :, 0] = (part.transpose(0, 1) for part in first)
        valid = torch.zeros(shape, dtype=torch.bool, device=used.device)
        valid[:, :, 0] = True
        if steps > 1 and self.later is not None:
            later = Capture(*(part[: steps - 1, :, :, 0] for part in self.later))
            for target, part in zip((values, mass, spread), later, strict=True):
                target[:, :, 1:, -1] = part.movedim((0, 1, 2), (2, 1, 0))
            valid[:, :, 1:, -1] = True
        unseen = ((mass == _UNSEEN) & valid).any(-1).any(0)
        # A step that was interrupted is not there yet.
        finished = steps - int(steps > 1 and bool(unseen[:, -1].any()))
        if bool(unseen[:, :finished].any()):
            missing = [layer for layer, gone in zip(self.layers, unseen[:, :finished].any(-1), strict=True) if gone]
            raise RuntimeError(
                f"layers: nothing was captured in layers {missing}; their attention was not called in the captured "
                "forward (was the implementation switched inside the session?)"
            )
        # All tokens out of a row's window give exactly 0: the map is missing, it is not black. So is that of no tokens.
        valid &= alive[:, None, :, None] & (mass != 0)
        values[~valid], mass[~valid], spread[~valid] = 0.0, 0.0, 0.0
        kept = int(alive[:, :finished].any(0).nonzero()[-1]) + 1
        return AttentionMaps(
            values[:, :, :kept], mass[:, :, :kept], spread[:, :, :kept], valid[:, :, :kept],
            self.layers, tuple(range(kept)), self.tokens.clone(), self.dtype, self.layout,
        )  # fmt: skip

    def _alive(self, steps: int) -> torch.Tensor:
        """Which rows of the batch still run at each step, bool [B, T]: the end token is never a query."""
        batch = self.tokens.shape[0]
        alive = torch.ones(batch, steps, dtype=torch.bool, device=self.tokens.device)
        if not self.eos:
            return alive
        ends = torch.tensor(self.eos, device=self.tokens.device)
        for step, ids in enumerate(self.fed[: min(steps - 1, self.step)], start=1):
            alive[:, step] = alive[:, step - 1] & ~torch.isin(ids, ends)
        return alive


def _version(value: Any) -> int | None:
    """How often a tensor was written to; None where nobody counts, as for a mask that is none."""
    if torch.compiler.is_compiling() or not isinstance(value, torch.Tensor) or value.is_inference():
        return None
    return value._version


def _buffers(steps: int, layers: int, batch: int, rows: int, tokens: int, device: torch.device) -> Capture:
    shape = (steps, layers, batch, rows)
    return Capture(
        torch.zeros(*shape, tokens, device=device),
        torch.full(shape, _UNSEEN, device=device),
        torch.zeros(shape, device=device),
    )


def averaged(first: Capture, weight: torch.Tensor, used: torch.Tensor) -> Capture:
    """The mean over groups of rows: maps [L, B, Q, N] with weight [B, R, Q]; an unseen row keeps its mark."""
    maps = weight @ first.maps
    mass = torch.where((first.mass == _UNSEEN).any(-1, keepdim=True), _UNSEEN, maps.sum(-1))
    spread = torch.stack([entropy(layer, used) for layer in maps])
    return Capture(maps, mass, spread)
