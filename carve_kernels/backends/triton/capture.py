"""Capture in two launches for all layers of a step: statistics of the keys by split, then the maps of the tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from carve_kernels.backends.triton import interpreted, too_old, warn_of_bfloat16
from carve_kernels.backends.triton.capture_kernels import capture_map_kernel, capture_statistics_kernel
from carve_kernels.backends.triton.capture_plan import LOG2E, PARTS, ceiling, plan
from carve_kernels.backends.triton.device import tiles_of
from carve_kernels.backends.triton.launch import Several, alignment, strides_of
from carve_kernels.backends.triton.workspace import Workspace
from carve_kernels.types import Capture

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NOWHERE = (0, 0, 0, 0)
# All that a thread can address: 8 warps of them are 65,280 of the 65,536 of a multiprocessor.
_REGISTERS = 255
# A window that reaches beyond every position, and that no position overflows.
_FARTHEST = 2**62

_workspace = Workspace()


class _Shared(NamedTuple):
    """What all layers of a call have in common."""

    tokens: torch.Tensor
    scale: float
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    softcap: float | None
    window: int | None
    lse: torch.Tensor | None


class _Slot(NamedTuple):
    """Where maps are written: tensors, with strides of step, layer, batch, head, row and token."""

    out: Capture
    step: torch.Tensor | None
    steps: int
    first: int
    map_strides: tuple[int, ...]
    mass_strides: tuple[int, ...]
    entropy_strides: tuple[int, ...]
    each: bool


def supports(
    query: torch.Tensor, key: torch.Tensor, _tokens: torch.Tensor, *, out: Capture | None = None, **_options: Any
) -> str | None:
    """Why these arguments cannot be served, or None."""
    if query.dtype not in _FLOATS:
        return f"query is {query.dtype}, this room serves float32, float16 and bfloat16; use backend='reference'"
    if not 1 <= query.shape[3] <= 256:
        return f"query has heads of size {query.shape[3]}, this room serves 1 to 256; use backend='reference'"
    if not query.shape[1]:
        return "query has no heads; use backend='reference'"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "query or key requires a gradient, which this room does not have; use backend='reference'"
    if out is not None and any(part.dtype != torch.float32 for part in out):
        return "out is float64, this room writes torch.float32; use backend='reference'"
    if out is not None and any(part.device != query.device for part in out):
        return f"out is on {out.maps.device} and the query on {query.device}, this room writes where it reads"
    if query.dtype == torch.bfloat16 and interpreted():
        warn_of_bfloat16()
    return too_old(query.device.index) if query.device.type == "cuda" else None


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    heads: Literal["mean", "each"] = "mean",
    out: Capture | None = None,
) -> Capture:
    """Capture(maps, mass, entropy) in float32; see `carve_kernels.capture`."""
    batch, query_heads, rows, _ = query.shape
    each = heads == "each"
    if out is None:
        middle = (query_heads,) if each else ()
        out = Capture(
            query.new_empty((batch, *middle, rows, tokens.shape[1]), dtype=torch.float32),
            query.new_empty((batch, rows), dtype=torch.float32),
            query.new_empty((batch, rows), dtype=torch.float32),
        )
    by_batch, *by_head, by_row, by_token = out.maps.stride()
    slot = _Slot(
        out, None, 1, 0, (0, 0, by_batch, *(by_head or (0,)), by_row, by_token), (0, 0, *out.mass.stride()),
        (0, 0, *out.entropy.stride()), each,
    )  # fmt: skip
    shared = _Shared(tokens, scale, mask, positions, softcap, window, lse)
    _launch((query,), (key,), None if sink is None else (sink,), shared, slot)
    return out


def forward_layers(
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    *,
    sink: Sequence[torch.Tensor],
    step: torch.Tensor,
    first: int,
    out: Capture,
    scale: float,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    softcap: float | None,
    window: int | None,
) -> bool:
    """Capture several layers into one step of `out`, neighbours that are alike in two launches; False where one cannot.

    Layers are alike where shapes, strides and dtypes are equal, as they are in every cache of one kind.
    """
    kinds = [_kind(*layer) for layer in itertools.zip_longest(query, key, sink)]
    for layer, kind in enumerate(kinds):
        if (not layer or kind != kinds[layer - 1]) and supports(query[layer], key[layer], tokens, out=out) is not None:
            return False
    # Keys, masks and the like are on their query's device already: the operator's checks say so.
    if any(part.device != query[0].device for part in (*query[1:], step)):
        return False
    shared = _Shared(tokens, scale, mask, positions, softcap, window, None)
    by_step, by_layer, by_batch, by_row, by_token = out.maps.stride()
    start = 0
    for _, alike in itertools.groupby(kinds):
        stop = start + len(list(alike))
        slot = _Slot(
            out, step, out.maps.shape[0], first + start, (by_step, by_layer, by_batch, 0, by_row, by_token),
            out.mass.stride(), out.entropy.stride(), False,
        )  # fmt: skip
        _launch(tuple(query[start:stop]), tuple(key[start:stop]), tuple(sink[start:stop]) or None, shared, slot)
        start = stop
    return True


def _kind(query: torch.Tensor, key: torch.Tensor, sink: torch.Tensor | None) -> tuple[Any, ...]:
    """What layers must have in common to go together."""
    gradient = query.requires_grad or key.requires_grad
    shapes = query.dtype, gradient, query.shape, key.shape, query.stride(), key.stride()
    return shapes if sink is None else (*shapes, sink.dtype, sink.stride())


def _launch(
    query: tuple[torch.Tensor, ...],
    key: tuple[torch.Tensor, ...],
    sink: tuple[torch.Tensor, ...] | None,
    shared: _Shared,
    slot: _Slot,
) -> None:
    """Both kernels for layers that are alike; the second alone where the log-sum-exp is known."""
    tokens, scale, mask, positions, softcap, window, lse = shared
    batch, query_heads, rows, size = query[0].shape
    key_heads, keys = key[0].shape[1:3]
    if not batch or not rows:
        return
    device, element_size = query[0].device, query[0].element_size()
    divided = plan(query_heads, key_heads, rows, keys, size, element_size)
    tile = tiles_of(device, element_size, divided.block_row * divided.block_group, divided.block_size)
    blocks = max(ceiling(tokens.shape[1], tile.map.block), 1)
    layers = len(query)
    statistics = 0 if lse is not None else layers * batch * query_heads * rows * divided.splits
    scratch, tickets = _workspace.take(
        device, 2 * statistics + layers * batch * rows * blocks * PARTS, layers * batch * divided.row_tiles
    )

    query_strides, key_strides = strides_of(query[0]), strides_of(key[0])
    queries, all_keys, sinks = Several.of(query), Several.of(key), None if sink is None else Several.of(sink)
    addresses = queries.addresses + all_keys.addresses
    aligned = alignment(addresses, query_strides[:3] + key_strides[:3], element_size)
    strides = (
        *query_strides, *key_strides, *(_NOWHERE if mask is None else strides_of(mask)),
        *(_NOWHERE[:2] if positions is None else strides_of(positions)),
    )  # fmt: skip
    factors = (scale, 0.0) if softcap is None else (scale * 2 * LOG2E / softcap, softcap)
    counts = batch, query_heads, key_heads, rows, keys, divided.splits
    shape = size, divided.block_size, divided.block_row, divided.block_group
    dense = size == 1 or query_strides[3] == key_strides[3] == 1
    flags = aligned, aligned // element_size, dense, softcap is not None, window is not None
    limit = min(window or 0, _FARTHEST)
    if lse is None:
        capture_statistics_kernel.launch(
            (divided.row_tiles * divided.group_tiles * divided.splits * key_heads * batch, 1, layers),
            (queries, all_keys, mask, positions, scratch),
            (*strides, *counts, divided.span, statistics, limit, *factors),
            (*shape, tile.statistics.block, *flags),
            device=device, warps=tile.statistics.warps, stages=tile.statistics.stages,
        )  # fmt: skip
    capture_map_kernel.launch(
        (blocks * divided.row_tiles * batch, 1, layers),
        (queries, all_keys, mask, positions, scratch, lse, sinks, tokens, slot.step, tickets, *slot.out),
        (
            *strides, *strides_of(tokens), *(_NOWHERE[:3] if lse is None else strides_of(lse)),
            0 if sink is None else sink[0].stride(0), *slot.map_strides, *slot.mass_strides, *slot.entropy_strides,
            *counts, tokens.shape[1], statistics, slot.steps, slot.first, limit, *factors,
        ),
        (*shape, tile.map.block, *flags, slot.each),
        device=device, warps=tile.map.warps, stages=tile.map.stages, registers=_REGISTERS,
    )  # fmt: skip
