"""The record of one prefill and its decode steps: buffers, the checks of each attention call, the maps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from carve_kernels.hf import names
from carve_kernels.hf.attention_patch import LayerBatch
from carve_kernels.hf.caches import Reach
from carve_kernels.hf.fused_attention import log_unfused, why_not
from carve_kernels.hf.head_shares import HeadShares
from carve_kernels.hf.model import is_capturing, version_of
from carve_kernels.hf.query_rows import Rows
from carve_kernels.hf.session.attention_masks import bias_error, check_mask, refuse_packed, visibility
from carve_kernels.hf.session.device_state import DeviceState
from carve_kernels.hf.session.graphs import EachHead, LayerGraphs
from carve_kernels.hf.session.hidden_tokens import LayerWindows, hidden_tokens
from carve_kernels.hf.session.kept_columns import KeptColumns, Selection
from carve_kernels.maps import UNCAPTURED, AttentionMaps, assemble
from carve_kernels.ops.attention_operator import AttentionOperator
from carve_kernels.types import Capture, HeadsSpec, RowsSpec, VisualLayout

_LOG = logging.getLogger("carve_kernels")

OnLayer = Callable[[int, int, Capture], torch.Tensor | Sequence[int] | None]
_EVICTED = "keys were evicted or added, so their columns are unknown; run the prompt again"
# Conditions that are read from the device at the end only, and the error of each.
_DEFERRED: dict[str, Callable[[], ValueError]] = {
    "cache": lambda: ValueError(f"cache: expected all keys that were written to it in this session; {_EVICTED}"),
    "attention_mask": bias_error,
}
CONDITIONS = tuple(_DEFERRED)
# The number of decode steps of the first buffers where a cache can grow; they double when a generation is longer.
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
    fused: bool = False
    grad: bool = False
    heads: HeadsSpec = "mean"


class Drops(Protocol):
    """Drops tokens in the current forward."""

    def drop(self, record: Record, layer: int, returned: Any) -> None:
        """Let the layers behind `layer` process the columns that `on_layer` returned for it, in all sessions."""


class Record:
    """Captures of one prefill and its decode steps; `record` is called for each attention of a captured layer."""

    def __init__(
        self,
        options: SessionOptions,
        rows: Rows,
        tokens: torch.Tensor,
        *,
        state: DeviceState,
        reaches: list[tuple[Reach | None, ...]],
        past: int,
        length: int,
        rows_kept: int | None,
        eos: tuple[int, ...],
        windows: LayerWindows,
        attended: torch.Tensor,
        drops: Drops,
        shares: HeadShares | None = None,
    ) -> None:
        self.layers, self.layout, self.max_steps = options.layers, options.layout, options.max_steps
        self.on_layer, self.fused = options.on_layer, options.fused
        self.last, self.weight = rows.last, rows.weight
        self.state, self.shares = state, shares
        # The columns of the prompt that are not padding, bool [B, S] on the CPU.
        self.attended = attended
        # What layers process after tokens were dropped behind others, in the order of these.
        self.kept: list[KeptColumns] = []
        self.drops = drops
        state.start(tokens, past + length)
        # The captured rows of the current forward, and where it is written.
        self.rows, self.target, self.slot = (rows.columns - past).to(state.device), state.first, state.zero
        # How many keys each layer may get.
        self.reaches, self.windows = reaches, windows
        self.active = True
        self.step = 0
        self.eos = eos
        self.length = self.prompt = past + length
        # The number of tokens in the current forward, and the last captured layer that ran in it.
        self.forward_length, self.last_layer = length, -1
        # How many last rows layers with other layers' keys process (None: all), and the first captured row.
        self.rows_kept, self.lowest_row = rows_kept, int(rows.columns.min()) - past
        # Why there are no maps: an error of a forward; conditions of `state` stay on the device until the end.
        self.error: ValueError | None = None
        self.sinks: dict[int, tuple[torch.Tensor, int | None, torch.Tensor]] = {}
        self.dtype = ""
        # Whether layers are captured in batches: their keys must stay in memory until then, as in a cache.
        self.batching = True
        self.graphs = LayerGraphs(options.heads, options.backend) if options.grad else None
        self.each = EachHead(options.backend) if options.heads == "each" and not options.grad else None
        self.batch: LayerBatch | None = None
        # Whether the current forward is a decode step, and what its layers that attend and capture have in common.
        self.decoding = False
        self.shared: LayerBatch | None = None

    def advance(self, ids: torch.Tensor | None, total: int, row: int) -> None:
        """Prepare for a decode step, after which there are `total` tokens; `row` of its query is captured."""
        if self.kept and row:
            raise ValueError(
                "use_cache: expected True where tokens were dropped, got a forward that reads the prompt again; its "
                "tokens would have to be dropped again"
            )
        state, last = self.state, self.step
        self.step += 1
        self.length = total
        self._begin(row)
        self.active = self.last and self.step < self.max_steps
        self._warn(last)
        if self.active and self.step > state.steps:
            state.grow(min(self.max_steps - 1, max(STEPS, 2 * state.steps)))
        if self.active and self.step == 1 and (self.windows.any or state.hidden_later is not None):
            state.follow_hidden()
        state.move(total, self.step - 1)
        state.select(row)
        if self.active:
            self._feed(ids)

    def advance_in_graph(self, ids: torch.Tensor | None) -> None:
        """Prepare for a decode step that goes into a CUDA graph: it runs at each replay, but not now."""
        self._begin(0)
        self.active = self.last and self.max_steps > 1
        self.state.move_in_graph()
        if self.active:
            self._feed(ids)

    def _begin(self, row: int) -> None:
        self.forward_length, self.last_layer, self.lowest_row = row + 1, -1, row
        self.batch = self.shared = None
        self.decoding = True
        self.rows, self.slot = self.state.row, self.state.slot

    def _feed(self, ids: torch.Tensor | None) -> None:
        state = self.state
        if state.later is not None:
            self.target = state.later
        if ids is None:
            # -1 is not a token, so a step with unknown ids does not end a generation.
            state.fed.index_fill_(1, state.slots, -1)
            return
        column = ids if ids.shape[1] == 1 else ids[:, -1:]
        state.fed.index_copy_(1, state.slots, column.to(state.device, torch.int64))

    def _warn(self, last: int) -> None:
        """Warn once of steps that are not captured, unless none are; `last` is the step before."""
        if self.last and self.max_steps > 1 and last < self.max_steps <= self.step:
            _LOG.warning(
                "max_steps: steps of this generation from %d on are not captured; raise max_steps for them",
                self.max_steps,
            )

    def synchronise(self) -> None:
        """Read how many steps the replays of a CUDA graph have taken; waits for the device."""
        if not self.state.graphed:
            return
        last = self.step
        self.length = self.state.read()
        self.step = self.length - self.prompt
        self._warn(last)

    def keep(self, layer: int, columns: Selection) -> None:
        """From now on layers behind `layer` process these columns of the prompt."""
        kept = KeptColumns(layer, columns, self.state.tokens)
        dropped = (kept.places(self.rows) < 0).any(0).nonzero().flatten().tolist()
        if dropped and self.layers[-1] > layer:
            column = int(self.rows[:, dropped[0]].min())
            raise ValueError(
                f"rows: expected rows that all captured layers process, got column {column}, which is dropped behind "
                f"layer {layer}; capture layers up to it, or other rows"
            )
        self.kept.append(kept)

    def kept_behind(self, layer: int) -> KeptColumns | None:
        """What the layer behind `layer` processes; None if that is all columns."""
        return next((each for each in reversed(self.kept) if each.layer <= layer), None)

    def has_fed(self, start: int, stop: int) -> bool:
        """Whether the tokens in columns `start` to `stop` are those fed at captured steps."""
        return start >= self.prompt and stop - self.prompt <= min(self.state.steps, self.max_steps - 1)

    def fed(self, start: int, stop: int) -> torch.Tensor | None:
        """The ids [B, n] of these tokens; None unless all were fed at captured steps."""
        return self.state.fed[:, start - self.prompt : stop - self.prompt] if self.has_fed(start, stop) else None

    def rewind(self, total: int) -> None:
        """Drop the steps after the first `total` tokens, before one of them is captured again."""
        self.step = total - self.prompt
        if self.state.later is not None:
            self.state.later.mass[self.step :] = UNCAPTURED

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
        if self.graphs is not None:
            self.graphs.check(self.layers[index], query, key)
        elif torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
            query, key = query.detach(), key.detach()
        alike = self._check(index, query, key, mask, options)
        _, heads, length, size = query.shape
        kept = self._kept(index)
        if kept is not None and not self.decoding:
            rows = kept.places(self.rows)
        else:
            rows = self.rows if length == self.forward_length else self.rows - (self.forward_length - length)
        batch = self.batch
        if batch is None or not batch.accepts(index, alike, mask):
            self._flush()
            batch = self.batch = self._new_batch(index, module, alike, mask, rows, options)
        if length > 1 or self.rows.shape[1] > 1:
            query = query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, size))
        batch.add(query, key, None if options.sink is None else self._sink(index, options.sink))
        if index == len(self.layers) - 1 or not self.batching:
            self._flush()
        self._finish(index, query)

    def attend(
        self, index: int, attention: names.Attention, module: nn.Module, query: torch.Tensor, key: torch.Tensor,
        value: torch.Tensor, mask: Any, args: tuple[Any, ...], keywords: dict[str, Any],
    ) -> tuple[torch.Tensor, None] | None:  # fmt: skip
        """Attend and capture a layer of a decode step by one operator; returns what its attention would.

        None, and nothing is captured, in other forwards, and where the operator does not serve: once, a line in the log
        says why. After an error there are no maps.
        """
        if not (self.fused and self.active and self.decoding):
            return None
        options = names.attention_options(query, keywords)
        tensors = query, key, value
        operator: AttentionOperator | str | None = why_not(attention, module, tensors, mask, args, options)
        if operator is None:
            operator = self.state.calls.attention_for(*tensors, self.state.tokens)
        if isinstance(operator, str):
            log_unfused(operator)
            return None
        try:
            alike = self._check(index, query, key, mask, options)
            self._flush()
            shared = self.shared
            if shared is None or shared.alike != alike or shared.attention_mask is not mask:
                shared = self.shared = self._new_batch(index, module, alike, mask, self.rows, options)
            sink = None if options.sink is None else self._sink(index, options.sink)
        except ValueError as error:
            self.error = error
            raise
        output = self.state.calls.attend(operator, shared, index, tensors, sink, self.target, self.slot)
        if shared.hidden is not None:
            self.state.hide(shared.hidden, index, 1, self.decoding)
        self._average(shared, index, 1, query.shape[1])
        self._finish(index, query)
        return output.transpose(1, 2), None

    @property
    def written(self) -> int:
        """The step of the buffers that the current forward is written to."""
        return max(0, self.step - 1)

    def _finish(self, index: int, query: torch.Tensor) -> None:
        """After a layer was captured, or put into a batch."""
        if index == len(self.layers) - 1:
            # It holds the mask of the step.
            self.shared = None
        self.dtype = str(query.dtype).removeprefix("torch.")
        if self.on_layer is not None:
            source = self.graphs or self.each
            if source is not None:
                captured = source.of_layer(index)
            else:
                captured = Capture(*(buffer[self.written, index] for buffer in self.target))
            returned = self.on_layer(self.layers[index], self.step, captured)
            if returned is not None:
                self.drops.drop(self, self.layers[index], returned)

    def _sink(self, index: int, sink: torch.Tensor) -> torch.Tensor:
        """A layer's sink as the operator takes it; converted once, or as it is where it is a part of a graph."""
        if self.graphs is not None:
            return sink
        needs_grad = torch.is_grad_enabled() and sink.requires_grad
        if sink.dtype == torch.float32 and sink.is_contiguous() and not needs_grad:
            return sink
        if torch.compiler.is_compiling():
            return sink.detach().to(torch.float32).contiguous()
        before, version, converted = self.sinks.get(index, (None, None, None))
        if before is not sink or converted is None or version is None or version != version_of(sink):
            converted = sink.detach().to(torch.float32).contiguous()
            if not is_capturing(sink.device):
                self.sinks[index] = sink, version_of(sink), converted
        return converted

    def _check(
        self, index: int, query: torch.Tensor, key: torch.Tensor, mask: Any, options: names.AttentionOptions
    ) -> tuple[Any, ...]:
        """Check that a layer attends over the columns of the prompt as it was passed to the model.

        Returns what layers that are captured in one call have in common, also whether they may see the last keys only.
        """
        layer, compiling = self.layers[index], torch.compiler.is_compiling()
        if options.bias is not None:
            raise ValueError(f"layers: layer {layer} adds a position bias, which cannot be captured")
        if options.paged is not None:
            raise ValueError("model: a paged cache (continuous batching) cannot be captured; use generate")
        batch, _, rows, _ = query.shape
        kept = self._kept(index)
        dropped = 0 if kept is None else self.prompt - kept.count
        complete = rows == self.forward_length - (0 if self.decoding else dropped)
        if not complete and rows == self.rows_kept:
            complete = self.lowest_row >= self.forward_length - rows >= 0
        expected = self.state.tokens.shape[0]
        if self.shares is not None:
            self.shares.check(layer, query.shape[1])
        if batch != expected or not complete:
            raise ValueError(
                f"layers: layer {layer} has {batch} x {rows} rows, but the model was given {expected} x "
                f"{self.forward_length} tokens: tokens were dropped or added inside the forward, so the columns of a "
                "map are unknown; capture earlier layers, or open the session on the model after that point"
            )
        if not compiling:
            if index <= self.last_layer:
                raise ValueError(f"layers: layer {layer} runs twice in one forward, but only one map is recorded")
            self.last_layer = index
        keys = key.shape[2]
        possible = [Reach(options.window, None) if each is None else each for each in self.reaches[index]]
        windowed = any(each.window is not None for each in possible)
        if kept is not None and windowed:
            raise ValueError(f"model: layer {layer} has a window, which counts keys, after tokens were dropped")
        if not compiling and not self.state.graphed:
            total = self.length - dropped
            if keys != total and not any(each.allows(keys, total, rows) for each in possible):
                raise ValueError(f"cache: layer {layer} has {keys} keys, expected {total}; {_EVICTED}")
        elif not windowed and all(keys != each.capacity for each in possible):
            self.state.deferred["cache"].logical_or_(self.state.total != keys)
        _, heads, length, size = query.shape
        kind = (query.dtype, heads, key.shape[1], size, key.stride(3))
        hides = not self.decoding or windowed or self.windows.may_hide(index, options.window)
        if hides and self.decoding and self.state.hidden_later is None and (compiling or is_capturing(query.device)):
            raise ValueError(
                f"model: layer {layer} has a window that the config does not name, and its first step is compiled or "
                "goes into a CUDA graph, where no memory can be allocated for what it hides; run a step before it"
            )
        view = hides, self.windows.by_position[index], id(kept)
        return options.scale, options.softcap, keys, options.window, length, version_of(mask), windowed, kind, view

    def _new_batch(
        self,
        index: int,
        module: nn.Module,
        alike: tuple[Any, ...],
        mask: Any,
        rows: torch.Tensor,
        options: names.AttentionOptions,
    ) -> LayerBatch:
        keys, window, length, _, windowed = alike[2:7]
        hides, *_ = alike[-1]
        implementation = names.implementation_of(module) or ""
        check_mask(implementation, mask, keys)
        refuse_packed(implementation, mask, options.segments, options.positions, length)
        causal = names.is_causal(module) if options.causal is None else options.causal
        visible = visibility(implementation, mask, rows, length, keys, causal=causal, window=window)
        if visible.biased is not None:
            if torch.compiler.is_compiling() or self.state.graphed or visible.biased.device.type != "cpu":
                self.state.deferred["attention_mask"].logical_or_(visible.biased)
            elif bool(visible.biased):
                raise bias_error()
        tokens, span = self._columns(index, keys, windowed)
        hidden = None
        if hides:
            hidden = hidden_tokens(tokens, self.state.tokens >= 0, rows, visible, self.windows.by_position[index])
        return LayerBatch(
            index, alike, tokens, span, visible.mask, visible.positions, options.scale, options.softcap, visible.window,
            mask, hidden,
        )  # fmt: skip

    def _kept(self, index: int) -> KeptColumns | None:
        """What a captured layer processes; None if that is all columns."""
        return self.kept_behind(self.layers[index] - 1)

    def _columns(self, index: int, keys: int, windowed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens among these keys, and their span: a sliding cache passes only the last keys, so they move left."""
        state, kept = self.state, self._kept(index)
        if kept is not None:
            return kept.tokens, kept.span
        # A compiled or replayed forward must not depend on the number of tokens so far.
        if torch.compiler.is_compiling() or self.state.graphed:
            if not windowed:
                return state.tokens, state.span
            return state.split(state.columns - (state.total - keys).clamp(min=0), state.tokens.shape[0])
        if self.length <= keys:
            return state.tokens, state.span
        return state.split(state.columns - (self.length - keys), state.tokens.shape[0])

    def _flush(self) -> None:
        batch, self.batch = self.batch, None
        if batch is None:
            return
        if batch.keys_changed():
            raise ValueError(
                f"cache: keys of layer {self.layers[batch.first]} or a later one were written to between their "
                "attention and their capture; use on_layer, which captures each layer immediately"
            )
        if self.graphs is not None:
            self.graphs.capture(batch, self.target)
        elif self.each is not None:
            self.each.capture(batch, self.target, self.written)
        else:
            self.state.calls.run(batch, self.target, self.slot)
        if batch.hidden is not None:
            self.state.hide(batch.hidden, batch.first, len(batch.query), self.decoding)
        self._average(batch, batch.first, len(batch.query), batch.query[0].shape[1])

    def _average(self, batch: LayerBatch, first: int, layers: int, heads: int) -> None:
        """After layers were captured: the means over the heads of all processes, where each has a share of them."""
        if self.shares is not None:
            self.shares.average(self.target, self.slot, first, layers, heads, batch.tokens)

    def result(self) -> AttentionMaps:
        """A copy of what has been captured so far; raises the ValueError of a forward that was refused."""
        if self.error is not None:
            raise self.error
        self.synchronise()
        state = self.state
        for name, condition in state.deferred.items():
            if bool(condition):
                raise _DEFERRED[name]()
        steps = min(self.step + 1, self.max_steps, state.steps + 1) if self.last else 1
        later = state.later if steps > 1 else None
        first = Capture(*(buffer[0] for buffer in state.first))
        return assemble(
            first if self.graphs is None else self.graphs.joined(first),
            None if later is None else Capture(*(buffer[: steps - 1, :, :, 0] for buffer in later)),
            self._running(steps),
            self.weight,
            layers=self.layers,
            tokens=state.tokens,
            dtype=self.dtype,
            layout=self.layout,
            hidden=state.hidden_tokens(steps - 1),
        )

    def _running(self, steps: int) -> torch.Tensor:
        """Which rows of the batch still run at each step, bool [B, T]: the end token is never a query."""
        state = self.state
        running = torch.ones(state.tokens.shape[0], steps, dtype=torch.bool, device=state.device)
        if not self.eos:
            return running
        ends = torch.tensor(self.eos, device=state.device)
        for step, ids in enumerate(state.fed.T[: steps - 1], start=1):
            running[:, step] = running[:, step - 1] & ~torch.isin(ids, ends)
        return running
