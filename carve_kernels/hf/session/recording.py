"""The record of one prefill and its decode steps: buffers, the checks of each attention call, the maps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from carve_kernels.hf import names
from carve_kernels.hf.attention_patch import LayerBatch
from carve_kernels.hf.caches import Reach
from carve_kernels.hf.model import version_of
from carve_kernels.hf.query_rows import Rows
from carve_kernels.hf.session.attention_masks import bias_error, check_mask, refuse_packed, visibility
from carve_kernels.maps import UNCAPTURED, AttentionMaps, assemble, new_buffers
from carve_kernels.types import Capture, RowsSpec, VisualLayout

_LOG = logging.getLogger("carve_kernels")

OnLayer = Callable[[int, int, Capture], None]
_EVICTED = "keys were evicted or added, so their columns are unknown; run the prompt again"
# Conditions that are read from the device at the end only, and the error of each.
_DEFERRED: dict[str, Callable[[], ValueError]] = {
    "cache": lambda: ValueError(f"cache: expected all keys that were written to it in this session; {_EVICTED}"),
    "attention_mask": bias_error,
}
# The number of decode steps of the first buffers; they double when a generation is longer.
STEPS = 64


class SessionOptions(NamedTuple):
    """What a session captures: the checked arguments of `capture_attention`."""

    layers: tuple[int, ...]
    rows: RowsSpec
    tokens: torch.Tensor | None
    layout: VisualLayout | None
    processor: Any
    max_steps: int
    on_layer: OnLayer | None
    backend: str


class Record:
    """Captures of one prefill and its decode steps; `record` is called for each attention of a captured layer."""

    def __init__(
        self,
        options: SessionOptions,
        rows: Rows,
        tokens: torch.Tensor,
        *,
        reaches: list[tuple[Reach | None, ...]],
        device: torch.device,
        past: int,
        length: int,
        rows_kept: int | None,
        eos: tuple[int, ...],
    ) -> None:
        batch, captured = rows.columns.shape
        self.layers, self.layout, self.max_steps = options.layers, options.layout, options.max_steps
        self.on_layer, self.backend = options.on_layer, options.backend
        self.last, self.weight = rows.last, rows.weight
        self.tokens = tokens.to(device)
        self.rows = (rows.columns - past).to(device)
        # How many keys each layer may get.
        self.reaches = reaches
        self.total = torch.full((), past + length, dtype=torch.int64, device=device)
        self.slot = torch.zeros((), dtype=torch.int64, device=device)
        self.first = new_buffers((1, len(self.layers), batch, captured), tokens.shape[1], device)
        self.later: Capture | None = None
        self.target = self.first
        self.active = True
        self.step = 0
        self.eos = eos
        self.length = self.prompt = past + length
        # The number of tokens in the current forward, and the last captured layer that ran in it.
        self.forward_length, self.last_layer = length, -1
        # How many last rows layers with other layers' keys process (None: all), and the first captured row.
        self.rows_kept, self.lowest_row = rows_kept, int(rows.columns.min()) - past
        # Why there are no maps: an error of a forward, and conditions that stay on the device until the end.
        self.error: ValueError | None = None
        self.deferred = {name: torch.zeros((), dtype=torch.bool, device=device) for name in _DEFERRED}
        # The token fed at each decode step. Nothing is allocated per step.
        self.fed = torch.empty(0, batch, dtype=torch.int64, device=device)
        self.dtype = ""
        # Whether layers are captured in batches: their keys must stay in memory until then, as in a cache.
        self.batching = True
        self.batch: LayerBatch | None = None

    def advance(self, ids: torch.Tensor | None, total: int, row: int) -> None:
        """Prepare for a decode step, after which there are `total` tokens; `row` of its query is captured."""
        self.step += 1
        self.forward_length, self.last_layer, self.lowest_row = row + 1, -1, row
        self.length = total
        self.total.fill_(total)
        self.batch = None
        if self.last and self.step == self.max_steps:
            _LOG.warning(
                "max_steps: steps of this generation from %d on are not captured; raise max_steps for them", self.step
            )
        self.active = self.last and self.step < self.max_steps
        if not self.active:
            return
        allocated = 0 if self.later is None else self.later.mass.shape[0]
        if self.step > allocated:
            self._grow(allocated, min(self.max_steps - 1, max(STEPS, 2 * allocated)))
        if ids is not None:
            self.fed[self.step - 1].copy_(ids[:, -1].detach())
        self.slot.fill_(self.step - 1)
        self.rows.fill_(row)

    def _grow(self, allocated: int, steps: int) -> None:
        batch, device = self.tokens.shape[0], self.tokens.device
        later = new_buffers((steps, len(self.layers), batch, 1), self.tokens.shape[1], device)
        # -1 is not a token, so a step with unknown ids does not end a generation.
        fed = torch.full((steps, batch), -1, dtype=torch.int64, device=device)
        if self.later is None:
            self.rows = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        else:
            for target, values in zip((*later, fed), (*self.later, self.fed), strict=True):
                target[:allocated] = values
        self.later = self.target = later
        self.fed = fed

    def rewind(self, total: int) -> None:
        """Drop the steps after the first `total` tokens, before one of them is captured again."""
        self.step = total - self.prompt
        if self.later is not None:
            self.later.mass[self.step :] = UNCAPTURED

    def record(self, index: int, *call: Any) -> None:
        """Capture a layer from the arguments of its attention; after an error there are no maps."""
        if not self.active:
            return
        try:
            self._record(index, *call)
        except ValueError as error:
            self.error = error
            raise

    def _record(
        self, index: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, keywords: dict[str, Any]
    ) -> None:
        options = names.attention_options(query, keywords)
        query, key = query.detach(), key.detach()
        self._check(index, query, key, options)
        _, heads, length, size = query.shape
        alike = (options.scale, options.softcap, key.shape[2], options.window, length, version_of(mask))
        rows = self.rows if length == self.forward_length else self.rows - (self.forward_length - length)
        batch = self.batch
        if batch is None or not batch.accepts(index, alike, mask):
            self._flush()
            batch = self.batch = self._new_batch(index, module, alike, mask, rows, options)
        if length > 1 or self.rows.shape[1] > 1:
            query = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, size))
        batch.add(query, key, options.sink)
        self.dtype = str(query.dtype).removeprefix("torch.")
        if index == len(self.layers) - 1 or not self.batching:
            self._flush()
        if self.on_layer is not None:
            slot = int(self.slot)
            self.on_layer(self.layers[index], self.step, Capture(*(buffer[slot, index] for buffer in self.target)))

    def _check(self, index: int, query: torch.Tensor, key: torch.Tensor, options: names.AttentionOptions) -> None:
        """Check that a layer attends over the columns of the prompt as it was passed to the model."""
        layer, compiling = self.layers[index], torch.compiler.is_compiling()
        if options.bias is not None:
            raise ValueError(f"layers: layer {layer} adds a position bias, which cannot be captured")
        if options.paged is not None:
            raise ValueError("model: a paged cache (continuous batching) cannot be captured; use generate")
        batch, _, rows, _ = query.shape
        complete = rows == self.forward_length
        if not complete and rows == self.rows_kept:
            complete = self.lowest_row >= self.forward_length - rows >= 0
        if batch != self.tokens.shape[0] or not complete:
            raise ValueError(
                f"layers: layer {layer} has {batch} x {rows} rows, but the model was given {self.tokens.shape[0]} x "
                f"{self.forward_length} tokens: tokens were dropped or added inside the forward, so the columns of a "
                "map are unknown; capture earlier layers, or open the session on the model after that point"
            )
        if not compiling:
            if index <= self.last_layer:
                raise ValueError(f"layers: layer {layer} runs twice in one forward, but only one map is recorded")
            self.last_layer = index
        keys = key.shape[2]
        possible = [Reach(options.window, None) if each is None else each for each in self.reaches[index]]
        if not compiling:
            if keys != self.length and not any(each.allows(keys, self.length, rows) for each in possible):
                raise ValueError(f"cache: layer {layer} has {keys} keys, expected {self.length}; {_EVICTED}")
        elif all(each.window is None and keys != each.capacity for each in possible):
            self.deferred["cache"].logical_or_(self.total != keys)

    def _new_batch(
        self,
        index: int,
        module: nn.Module,
        alike: tuple[Any, ...],
        mask: Any,
        rows: torch.Tensor,
        options: names.AttentionOptions,
    ) -> LayerBatch:
        keys, window, length = alike[2:5]
        implementation = names.implementation_of(module) or ""
        check_mask(implementation, mask, keys)
        refuse_packed(implementation, mask, options.segments, options.positions, length)
        causal = names.is_causal(module) if options.causal is None else options.causal
        visible = visibility(implementation, mask, rows, length, keys, causal=causal, window=window)
        if visible.biased is not None:
            if torch.compiler.is_compiling() or visible.biased.device.type != "cpu":
                self.deferred["attention_mask"].logical_or_(visible.biased)
            elif bool(visible.biased):
                raise bias_error()
        columns = self._columns(keys)
        return LayerBatch(
            index, alike, columns, visible.mask, visible.positions, options.scale, options.softcap, visible.window, mask
        )

    def _columns(self, keys: int) -> torch.Tensor:
        """The columns of the tokens among these keys: a sliding cache passes only the last keys, so they move left."""
        # A compiled forward must not depend on the number of tokens so far, or each step would compile again.
        if not torch.compiler.is_compiling() and self.length <= keys:
            return self.tokens
        return (self.tokens - (self.total - keys).clamp(min=0)).to(torch.int32)

    def _flush(self) -> None:
        batch, self.batch = self.batch, None
        if batch is None:
            return
        if batch.keys_changed():
            raise ValueError(
                f"cache: keys of layer {self.layers[batch.first]} or a later one were written to between their "
                "attention and their capture; use on_layer, which captures each layer immediately"
            )
        batch.capture(self.target, self.slot, self.backend)

    def result(self) -> AttentionMaps:
        """A copy of what has been captured so far; raises the ValueError of a forward that was refused."""
        if self.error is not None:
            raise self.error
        for name, condition in self.deferred.items():
            if bool(condition):
                raise _DEFERRED[name]()
        steps = min(self.step + 1, self.max_steps) if self.last else 1
        later = self.later if steps > 1 else None
        return assemble(
            Capture(*(buffer[0] for buffer in self.first)),
            None if later is None else Capture(*(buffer[: steps - 1, :, :, 0] for buffer in later)),
            self._running(steps),
            self.weight,
            layers=self.layers,
            tokens=self.tokens,
            dtype=self.dtype,
            layout=self.layout,
        )

    def _running(self, steps: int) -> torch.Tensor:
        """Which rows of the batch still run at each step, bool [B, T]: the end token is never a query."""
        running = torch.ones(self.tokens.shape[0], steps, dtype=torch.bool, device=self.tokens.device)
        if not self.eos:
            return running
        ends = torch.tensor(self.eos, device=self.tokens.device)
        for step, ids in enumerate(self.fed[: min(steps - 1, self.step)], start=1):
            running[:, step] = running[:, step - 1] & ~torch.isin(ids, ends)
        return running
