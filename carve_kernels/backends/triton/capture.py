"""Capture in two launches for all layers of a step: statistics of each split of the keys, then the maps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from carve_kernels.backends.native.limits import capture_limit
from carve_kernels.backends.native.scratch import Memory, ScratchNeeds, check_memory
from carve_kernels.backends.triton import interpreted, too_old, warn_of_bfloat16
from carve_kernels.backends.triton.capture_kernels import capture_map_kernel, capture_statistics_kernel
from carve_kernels.backends.triton.capture_plan import LOG2E, PARTIALS, ceiling, plan
from carve_kernels.backends.triton.device import tiles_of
from carve_kernels.backends.triton.launch import Several, alignment, strides_of
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot

_NO_STRIDES = (0, 0, 0, 0)
# The most that a thread can address: 8 warps have 65,280 of the 65,536 of a multiprocessor.
_REGISTERS = 255
# A window wider than every position, small enough that a position plus it does not overflow.
_FARTHEST = 2**62


def supports(query: Tensor, key: Tensor, *_: object, out: Capture | None = None) -> str | None:
    """Why these arguments cannot be served, or None."""
    if reason := capture_limit(query, key, out):
        return reason
    if not 1 <= query.shape[3] <= 256:
        return f"query has heads of size {query.shape[3]}, this backend serves 1 to 256; use backend='reference'"
    if out is not None and any(tensor.device != query.device for tensor in out):
        return f"out is on {out.maps.device} and the query on {query.device}, this backend needs them on one device"
    if query.dtype == torch.bfloat16 and interpreted():
        warn_of_bfloat16()
    return too_old(query.device.index) if query.device.type == "cuda" else None


def forward(
    query: Tensor, key: Tensor, tokens: Tensor, options: CaptureOptions, *, out: Capture | None = None
) -> Capture:
    """Capture(maps, mass, entropy) in float32; see `carve_kernels.capture`."""
    out = out or Capture.empty(query, tokens, options.heads)
    _launch(Layers.single(query, key, options.sink), tokens, options, Slot(out))
    return out


def forward_layers(
    layers: Layers,
    tokens: Tensor,
    options: CaptureOptions,
    slot: Slot,
    _span: Tensor | None = None,
    memory: Memory | None = None,
) -> bool:
    """Capture several layers into one step of buffers, two launches for each run of like ones; False if one cannot be.

    Layers are alike where shapes, strides and dtypes are equal, as they are in every cache of one kind. The runs use
    the same memory one after another.
    """
    query, key, _ = layers
    kinds = [_kind(*layer) for layer in itertools.zip_longest(*layers)]
    runs = [list(run) for _, run in itertools.groupby(range(len(kinds)), kinds.__getitem__)]
    if any(supports(query[run[0]], key[run[0]], out=slot.out) is not None for run in runs):
        return False
    # The operator has checked that a layer's other tensors are on the device of its query.
    if any(tensor is not None and tensor.device != query[0].device for tensor in (*query, slot.step)):
        return False
    for run in runs:
        alike = Layers(*(tensors[run[0] : run[-1] + 1] for tensors in layers))
        _launch(alike, tokens, options, slot._replace(first=slot.first + run[0]), memory)
    return True


def scratch_needs(
    device: torch.device,
    *,
    layers: int,
    batch: int,
    query_heads: int,
    key_heads: int,
    rows: int,
    keys: int,
    size: int,
    tokens: int,
    element_bytes: int,
    lse: bool = False,
    aligned: bool = True,
) -> ScratchNeeds:
    """The scratch and the tickets of one call on a device; neither depends on `aligned`."""
    if not batch or not rows:
        return ScratchNeeds(0, 0)
    grid = plan(query_heads, key_heads, rows, keys, size, element_bytes)
    tile = tiles_of(device, element_bytes, grid.block_row * grid.block_group, grid.block_size)
    blocks = max(ceiling(tokens, tile.map.block), 1)
    statistics = 0 if lse else layers * batch * query_heads * rows * grid.splits
    floats = 2 * statistics + layers * batch * rows * blocks * PARTIALS
    return ScratchNeeds(floats * torch.float32.itemsize, layers * batch * grid.row_tiles)


def _output_strides(slot: Slot) -> Iterator[int]:
    """Of the maps by step, layer, batch, head, row and token, then of mass and entropy without head and token."""
    for tensor in slot.out:
        strides = tensor.stride() if slot.step is not None else (0, 0, *tensor.stride())
        # Maps of the mean over the heads, which are the only outputs of five dimensions.
        yield from (*strides[:3], 0, *strides[3:]) if len(strides) == 5 else strides


def _kind(query: Tensor, key: Tensor, sink: Tensor | None) -> tuple[Any, ...]:
    """What layers of one launch have in common."""
    gradient = query.requires_grad or key.requires_grad
    shapes = query.dtype, gradient, query.shape, key.shape, query.stride(), key.stride()
    return shapes if sink is None else (*shapes, sink.dtype, sink.stride())


def _launch(layers: Layers, tokens: Tensor, options: CaptureOptions, slot: Slot, memory: Memory | None = None) -> None:
    """Both kernels for layers of one kind; the second alone where the log-sum-exp is given."""
    query, key, sink = layers
    scale, mask, positions, softcap, window, _, lse, heads = options
    batch, query_heads, rows, size = query[0].shape
    key_heads, keys = key[0].shape[1:3]
    if not batch or not rows:
        return
    device, element_size = query[0].device, query[0].element_size()
    grid = plan(query_heads, key_heads, rows, keys, size, element_size)
    tile = tiles_of(device, element_size, grid.block_row * grid.block_group, grid.block_size)
    blocks = max(ceiling(tokens.shape[1], tile.map.block), 1)
    depth, steps = len(query), 1 if slot.step is None else slot.out.maps.shape[0]
    statistics = 0 if lse is not None else depth * batch * query_heads * rows * grid.splits
    needs = scratch_needs(
        device, layers=depth, batch=batch, query_heads=query_heads, key_heads=key_heads, rows=rows, keys=keys,
        size=size, tokens=tokens.shape[1], element_bytes=element_size, lse=lse is not None,
    )  # fmt: skip
    memory = memory or Memory.new(needs, device)
    check_memory(memory, needs)
    scratch, tickets = memory.scratch[: needs.bytes].view(torch.float32), memory.tickets

    query_strides, key_strides = strides_of(query[0]), strides_of(key[0])
    queries, all_keys, sinks = Several.of(query), Several.of(key), Several.of(sink) if sink else None
    addresses = queries.addresses + all_keys.addresses
    aligned = alignment(addresses, query_strides[:3] + key_strides[:3], element_size)
    strides = (
        *query_strides, *key_strides, *(_NO_STRIDES if mask is None else strides_of(mask)),
        *(_NO_STRIDES[:2] if positions is None else strides_of(positions)),
    )  # fmt: skip
    factors = (scale, 0.0) if softcap is None else (scale * 2 * LOG2E / softcap, softcap)
    counts = batch, query_heads, key_heads, rows, keys, grid.splits
    shape = size, grid.block_size, grid.block_row, grid.block_group
    dense = size == 1 or query_strides[3] == key_strides[3] == 1
    flags = aligned, aligned // element_size, dense, softcap is not None, window is not None
    limit = min(window or 0, _FARTHEST)
    if lse is None:
        capture_statistics_kernel.launch(
            (grid.row_tiles * grid.group_tiles * grid.splits * key_heads * batch, 1, depth),
            (queries, all_keys, mask, positions, scratch),
            (*strides, *counts, grid.span, statistics, limit, *factors),
            (*shape, tile.statistics.block, *flags),
            device=device, warps=tile.statistics.warps, stages=tile.statistics.stages,
        )  # fmt: skip
    capture_map_kernel.launch(
        (blocks * grid.row_tiles * batch, 1, depth),
        (queries, all_keys, mask, positions, scratch, lse, sinks, tokens, slot.step, tickets, *slot.out),
        (
            *strides, *strides_of(tokens), *(_NO_STRIDES[:3] if lse is None else strides_of(lse)),
            sink[0].stride(0) if sink else 0, *_output_strides(slot), *counts, tokens.shape[1], statistics, steps,
            slot.first, limit, *factors,
        ),
        (*shape, tile.map.block, *flags, heads == "each"),
        device=device, warps=tile.map.warps, stages=tile.map.stages, registers=_REGISTERS,
    )  # fmt: skip
