"""Wraps the attention functions in use: the original runs unchanged, then the module's recorders get its arguments.

While a session is open, the entry of the implementation in use is wrapped where the model looks it up: in the registry
of its modeling file (`sdpa`, `flex_attention`, the flash names), or as that file's function for eager. The config, the
implementation's name and so the masks stay unchanged. Only modules that carry recorders, or a function that replaces
their attention (tree decoding), are affected.

Captured layers of one forward wait in a `LayerBatch`: one call captures those that are alike. A `CaptureCalls` makes
that call, with memory that its owner keeps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from carve_kernels.backends.native.scratch import Memory, ScratchNeeds, no_scratch
from carve_kernels.hf.model import is_capturing, version_of
from carve_kernels.hf.names import Attention, own_entry, set_entry
from carve_kernels.ops.attention_operator import AttentionOperator, attention_operator
from carve_kernels.ops.layer_operator import LayerOperator, layer_operator
from carve_kernels.types import Capture

# Attribute of a module: (recorder, index) pairs, whose `record` is called after each call of its attention. The
# `attend` of the first that is `fused` may replace that call, and is its record then.
RECORDERS = "_carve_recorders"
# Attribute of a module: a function that is called in place of its attention, with that as first argument; it returns
# None for forwards that it leaves alone.
INSTEAD = "_carve_instead"
# The wrapped entries of all open sessions: the number of users, the wrapper, and the original.
_PATCHED: dict[tuple[int, str], tuple[int, Attention, Attention | None]] = {}
_LOCK = threading.RLock()
# The dtypes of scratch and of tickets.
_MEMORY = torch.uint8, torch.int32


def wrap(attention: Attention) -> Attention:
    """An attention function that calls another one and then the module's recorders."""

    def recorded_attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        instead = getattr(module, INSTEAD, None)
        if instead is not None:
            output = instead(attention, module, query, key, value, attention_mask, *args, **options)
            if output is not None:
                return output
        recorders = getattr(module, RECORDERS, ())
        output = recorded = None
        for recorder, index in recorders:
            if recorder.fused:
                output = recorder.attend(index, attention, module, query, key, value, attention_mask, args, options)
                recorded = None if output is None else recorder
                break
        if output is None:
            output = attention(module, query, key, value, attention_mask, *args, **options)
        for recorder, index in recorders:
            if recorder is not recorded:
                recorder.record(index, module, query, key, attention_mask, options)
        return output

    return recorded_attention


@contextmanager
def patched(registry: Any, name: str) -> Iterator[None]:
    """Wrap an entry. Its users are counted, so that sessions may close in any order; the last one restores it."""
    key = id(registry), name
    with _LOCK:
        count, wrapper, original = _PATCHED.get(key, (0, None, None))
        if wrapper is None:
            original = own_entry(registry, name)
            wrapper = wrap(original if original is not None else registry[name])
            set_entry(registry, name, wrapper)
        _PATCHED[key] = (count + 1, wrapper, original)
    try:
        yield
    finally:
        with _LOCK:
            count, wrapper, original = _PATCHED.pop(key)
            if count > 1:
                _PATCHED[key] = (count - 1, wrapper, original)
            # An entry that other code has replaced meanwhile is left alone.
            elif own_entry(registry, name) is wrapper:
                set_entry(registry, name, original)


class LayerSizes(NamedTuple):
    """The sizes of a captured layer: [B, A, R, D] of the query, KV and S of the key, N of the tokens."""

    batch: int
    query_heads: int
    key_heads: int
    rows: int
    keys: int
    size: int
    tokens: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor) -> LayerSizes:
        batch, query_heads, rows, size = query.shape
        return cls(batch, query_heads, key.shape[1], rows, key.shape[2], size, tokens.shape[1])

    def rounded_up(self) -> LayerSizes:
        """These sizes with more keys, up to a power of two: there is one more at each step."""
        return self._replace(keys=1 << (self.keys - 1).bit_length())

    def covers(self, other: LayerSizes) -> bool:
        """Whether memory for these sizes is enough for a layer of the other ones; fewer rows may need more of it."""
        alike = self._replace(keys=other.keys, tokens=other.tokens) == other
        return alike and self.keys >= other.keys and self.tokens >= other.tokens


@dataclass
class LayerBatch:
    """Consecutive layers that differ in query, key and sink only and are captured with one call.

    `first` is the index of the first of them among the captured layers. `alike` and `attention_mask` (the mask that
    the model passed, compared by identity) decide whether the next layer belongs to the batch. `span` are the lowest
    and the highest token, int32 [2]. `hidden` are the tokens that rows do not see, bool [B, R, N], where it is noted.
    """

    first: int
    alike: tuple[Any, ...]
    tokens: torch.Tensor
    span: torch.Tensor | None
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    scale: float
    softcap: float
    window: int | None
    attention_mask: Any = None
    hidden: torch.Tensor | None = None
    query: list[torch.Tensor] = field(default_factory=list)
    key: list[torch.Tensor] = field(default_factory=list)
    sink: list[torch.Tensor] = field(default_factory=list)
    key_versions: list[int | None] = field(default_factory=list)

    def accepts(self, index: int, alike: tuple[Any, ...], attention_mask: Any = None) -> bool:
        """Whether layer `index` can be captured in the same call."""
        same = self.attention_mask is attention_mask and self.alike == alike
        return same and index == self.first + len(self.query)

    def add(self, query: torch.Tensor, key: torch.Tensor, sink: torch.Tensor | None) -> None:
        """Add the next layer: the captured rows of its query, and its keys."""
        self.query.append(query)
        self.key.append(key)
        self.key_versions.append(version_of(key))
        if sink is not None:
            self.sink.append(sink)

    def keys_changed(self) -> bool:
        """Whether keys were written to after they were added, as far as tensors count their writes."""
        return [version_of(key) for key in self.key] != self.key_versions


class CaptureCalls:
    """The calls that capture layers on one device, in batches or beside the attention of one: their operators and the
    memory they share.

    The memory is allocated by `reserve`, before a forward, so that no graph's memory pool holds it. A larger call
    allocates again, but not in a step that is compiled or goes into a CUDA graph.
    """

    def __init__(self, backend: str, device: torch.device, layers: int) -> None:
        self._backend, self._device, self._layers = backend, device, layers
        self._operators: dict[tuple[Any, ...], LayerOperator] = {}
        self._reserved: list[tuple[tuple[Any, ...], LayerSizes]] = []
        self._attending: dict[tuple[Any, ...], AttentionOperator | str] = {}
        self._former: list[Memory] = []
        self._unprepared = partial(torch.ops.carve_kernels.capture_layers_in.default, backend=backend)
        self._none = self._memory = Memory(*(torch.empty(0, dtype=kind, device=device) for kind in _MEMORY))

    def reserve(self, dtype: torch.dtype, sizes: LayerSizes, *, dense: bool = True) -> None:
        """Allocate memory for calls of these rows and up to these keys and tokens, and choose their operator."""
        kind = (dtype, sizes.size, dense)
        if kind not in self._operators:
            self._operators[kind] = layer_operator(
                self._backend, self._device, dtype=dtype, size=sizes.size, dense=dense
            )
        self._reserved.append((kind, sizes))
        needs = self._operators[kind].needs
        if needs is no_scratch:
            return
        asked = {**sizes._asdict(), "layers": self._layers, "element_bytes": dtype.itemsize}
        self._allocate(*(needs(**asked, aligned=aligned) for aligned in (True, False)))

    def _allocate(self, *needs: ScratchNeeds) -> None:
        scratch, tickets = self._memory
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            if scratch.numel() < (count := max(each.bytes for each in needs)):
                scratch = torch.empty(count, dtype=torch.uint8, device=self._device)
            if tickets.numel() < (count := max(each.tickets for each in needs)):
                tickets = torch.zeros(count, dtype=torch.int32, device=self._device)
        if scratch is not self._memory.scratch or tickets is not self._memory.tickets:
            # A CUDA graph may hold the address of the former.
            self._memory, self._former = Memory(scratch, tickets), [*self._former, self._memory]

    def reserve_attention(self, dtype: torch.dtype, sizes: LayerSizes, value_size: int) -> AttentionOperator | str:
        """Allocate memory for attention of one row and up to these keys and tokens, and choose its operator.

        Returns the operator, or why there is none.
        """
        kind = ("attention", dtype, sizes.size, value_size)
        if kind not in self._attending:
            self._attending[kind] = attention_operator(
                self._backend, self._device, dtype=dtype, size=sizes.size, value_size=value_size
            )
        operator = self._attending[kind]
        if not isinstance(operator, str):
            self._reserved.append((kind, sizes))
            asked = {name: count for name, count in sizes._asdict().items() if name != "rows"}
            self._allocate(operator.needs(**asked, value_size=value_size))
        return operator

    def attention_for(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: torch.Tensor
    ) -> AttentionOperator | str:
        """The operator that attends and captures one row of a layer, with its memory, or why there is none."""
        kind = ("attention", query.dtype, query.shape[3], value.shape[3])
        operator = self._attending.get(kind)
        if torch.compiler.is_compiling():
            if operator is None:
                return "a compiled step is the first with these head sizes"
        elif not isinstance(operator, str):
            sizes = LayerSizes.of(query, key, tokens)
            if not self._is_reserved(kind, sizes):
                if is_capturing(self._device):
                    return "a step in a CUDA graph is the first of these sizes"
                operator = self.reserve_attention(query.dtype, sizes.rounded_up(), value.shape[3])
        if operator is None or isinstance(operator, str):
            return operator or "there is no operator"
        return operator.limit(query, key, value) or operator

    def attend(
        self,
        operator: AttentionOperator,
        batch: LayerBatch,
        index: int,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sink: torch.Tensor | None,
        out: Capture,
        step: torch.Tensor,
    ) -> torch.Tensor:
        """Attend over a query, keys and values, and capture them as layer `index`; the output [B, A, 1, E].

        What layers have in common is in `batch`, whose own layers are left alone. `step` and `out` as in `run`.
        """
        query, _, value = tensors
        output = query.new_empty(*query.shape[:3], value.shape[3])
        operator.run(
            *tensors, batch.tokens, batch.span, batch.mask, batch.positions, sink, batch.scale, batch.softcap,
            batch.window or 0, False, step, index, *self._memory, output, *out,
        )  # fmt: skip
        return output

    def _is_reserved(self, kind: tuple[Any, ...], sizes: LayerSizes) -> bool:
        return any(reserved == kind and others.covers(sizes) for reserved, others in self._reserved)

    def run(self, batch: LayerBatch, out: Capture, step: torch.Tensor) -> None:
        """Capture all layers of a batch into step `step`, an int64 tensor [] on the device, of buffers `out`."""
        query, key = batch.query[0], batch.key[0]
        kind = (query.dtype, query.shape[3], key.stride(3) == 1 or key.shape[3] == 1)
        if not torch.compiler.is_compiling():
            sizes = LayerSizes.of(query, key, batch.tokens)
            if not self._is_reserved(kind, sizes):
                if is_capturing(self._device):
                    raise self._too_late(sizes)
                self.reserve(query.dtype, sizes.rounded_up(), dense=kind[2])
        # A kind that a compiled step meets first brings its own scratch, and keeps none.
        known = kind in self._operators
        run = self._operators[kind].run if known else self._unprepared
        memory = self._memory if known else self._none
        run(
            batch.query, batch.key, batch.tokens, batch.span, batch.mask, batch.positions, batch.sink, None,
            batch.scale, batch.softcap, batch.window or 0, False, step, batch.first, *memory, *out,
        )  # fmt: skip

    @staticmethod
    def _too_late(sizes: LayerSizes) -> ValueError:
        return ValueError(
            f"model: a layer has {sizes}, more than was expected, while its step goes into a CUDA graph, where no "
            "memory can be allocated for its capture; run a step before the graph is captured"
        )
