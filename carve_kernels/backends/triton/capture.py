"""Capture in two launches for all layers of a step: scores and statistics of the keys, then the maps."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carve_kernels.backends.native.limits import capture_limit
from carve_kernels.backends.native.scratch import Memory, ScratchNeeds, check_memory
from carve_kernels.backends.triton import interpreted, too_old, warn_of_bfloat16
from carve_kernels.backends.triton.capture_kernels import (
    capture_map_kernel,
    capture_reread_kernel,
    capture_scores_kernel,
)
from carve_kernels.backends.triton.capture_plan import (
    BLOCK_HEAD,
    BLOCK_PARTIAL,
    BLOCK_TOKEN,
    LOG2E,
    MOST_PROGRAMS,
    NEGATIVE,
    PLAIN,
    SOFTCAP,
    Plan,
    Scratch,
    ceiling,
    plan,
    plan_scratch,
)
from carve_kernels.backends.triton.device import overlaps_launches, tiles_of, warps_of
from carve_kernels.backends.triton.launch import Several, alignment, strides_of
from carve_kernels.backends.triton.tiles import Tiles
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot

_NO_STRIDES = (0, 0, 0, 0)
# The most that a thread can address: 8 warps have 65,280 of the 65,536 of a multiprocessor.
_REGISTERS = 255
# A window wider than every position, small enough that a position plus it does not overflow.
_FARTHEST = 2**62
# Scores are stored, and memory is shared, by vectors of so many bytes.
_SCRATCH_ALIGNMENT = 16


def supports(query: Tensor, key: Tensor, *_: object, out: Capture | None = None) -> str | None:
    """Why these arguments cannot be served, or None."""
    if reason := capture_limit(query, key, out):
        return reason
    if not 1 <= query.shape[3] <= 256:
        return f"query has heads of size {query.shape[3]}, this backend serves 1 to 256; use backend='reference'"
    if query.shape[0] > MOST_PROGRAMS:
        return f"query has a batch of {query.shape[0]}, this backend serves up to {MOST_PROGRAMS}; split it"
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
    _capture(Layers.single(query, key, options.sink), tokens, options, Slot(out))
    return out


def forward_layers(
    layers: Layers,
    tokens: Tensor,
    options: CaptureOptions,
    slot: Slot,
    span: Tensor | None = None,
    memory: Memory | None = None,
) -> bool:
    """Capture several layers into one step of buffers, two launches for each run of like ones; False if one cannot be.

    Layers are alike where shapes, strides and dtypes are equal, as they are in every cache of one kind. The runs use
    the same memory one after another. `span`: the lowest and the highest token, whose keys' scores are enough.
    """
    query, key, _ = layers
    kinds = [_kind(*layer) for layer in itertools.zip_longest(*layers)]
    runs = [list(run) for _, run in itertools.groupby(range(len(kinds)), kinds.__getitem__)]
    if any(supports(query[run[0]], key[run[0]], out=slot.out) is not None for run in runs):
        return False
    # The operator has checked that a layer's other tensors are on the device of its query.
    if any(tensor is not None and tensor.device != query[0].device for tensor in (*query, slot.step, span)):
        return False
    for run in runs:
        alike = Layers(*(tensors[run[0] : run[-1] + 1] for tensors in layers))
        _capture(alike, tokens, options, slot._replace(first=slot.first + run[0]), span, memory)
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
    sizes = layers, batch, query_heads, key_heads, rows, keys, size, element_bytes, lse
    scratch = division_of(device, sizes, tokens)[1]
    return ScratchNeeds(scratch.floats * torch.float32.itemsize, scratch.tickets)


def division_of(
    device: torch.device, sizes: tuple[int, int, int, int, int, int, int, int, bool], tokens: int
) -> tuple[Plan, Scratch, Tiles]:
    """How a call is divided; `sizes` are the arguments of `plan`."""
    layers, batch, query_heads, _, rows, keys, _, element_bytes, lse = sizes
    grid = plan(*sizes)
    tile = tiles_of(device, element_bytes, grid.block_row * grid.block_group, grid.block_size)
    blocks = (
        ceiling(tokens, tile.reread.block) if lse else ceiling(tokens, BLOCK_TOKEN) * (BLOCK_TOKEN // BLOCK_PARTIAL)
    )
    return grid, plan_scratch(layers, batch, query_heads, rows, keys, blocks, lse), tile


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


def exponent(scale: float, softcap: float | None) -> tuple[int, float, float, float]:
    """(kind of the scores, inner, factor, residual): a logit in base 2 is factor * (1 + residual) * score.

    `inner` multiplies the products before a tanh in base 2.
    """
    exact = abs(scale if softcap is None else softcap) * LOG2E
    # Not exactly 0: the score of a hidden key, -inf, times 0 would be NaN.
    (factor,) = struct.unpack("f", struct.pack("f", max(exact, 1e-30)))
    residual = (exact - factor) / factor
    if softcap is None:
        return (NEGATIVE if scale < 0 else PLAIN), 1.0, factor, residual
    return SOFTCAP, scale * 2 * LOG2E / abs(softcap), factor, residual


def _capture(
    layers: Layers,
    tokens: Tensor,
    options: CaptureOptions,
    slot: Slot,
    span: Tensor | None = None,
    memory: Memory | None = None,
) -> None:
    """Capture layers of one kind: all at once, or in turns where all their scores would take too much memory."""
    query, key, _ = layers
    batch, query_heads, rows, size = query[0].shape
    key_heads, keys = key[0].shape[1:3]
    if not batch or not rows:
        return
    device, element_bytes = query[0].device, query[0].element_size()
    sizes = len(query), batch, query_heads, key_heads, rows, keys, size, element_bytes, options.lse is not None
    division = division_of(device, sizes, tokens.shape[1])
    grid, scratch, _ = division
    needs = ScratchNeeds(scratch.floats * torch.float32.itemsize, scratch.tickets)
    memory = memory or Memory.new(needs, device)
    check_memory(memory, needs)
    if memory.scratch.data_ptr() % _SCRATCH_ALIGNMENT:
        raise ValueError(
            f"scratch: expected {_SCRATCH_ALIGNMENT} bytes of alignment, got {memory.scratch.data_ptr():#x}"
        )
    for layer in range(0, len(query), grid.layers):
        some = Layers(*(tensors[layer : layer + grid.layers] for tensors in layers))
        at = slot._replace(first=slot.first + layer)
        for row in range(0, rows, grid.rows):
            part = (some, options, at)
            if grid.rows < rows:
                part = _rows_of(*part, row, min(grid.rows, rows - row))
            _launch(*part, tokens, span, memory, division)


def _rows_of(
    layers: Layers, options: CaptureOptions, slot: Slot, first: int, count: int
) -> tuple[Layers, CaptureOptions, Slot]:
    """Some rows of a call."""
    mask = None if options.mask is None else options.mask.narrow(2, first, count)
    positions = None if options.positions is None else options.positions.narrow(1, first, count)
    maps, mass, entropy = slot.out
    out = Capture(maps.narrow(-2, first, count), mass.narrow(-1, first, count), entropy.narrow(-1, first, count))
    layers = layers._replace(query=[query.narrow(2, first, count) for query in layers.query])
    return layers, options._replace(mask=mask, positions=positions), slot._replace(out=out)


def _launch(
    layers: Layers,
    options: CaptureOptions,
    slot: Slot,
    tokens: Tensor,
    span: Tensor | None,
    memory: Memory,
    division: tuple[Plan, Scratch, Tiles],
) -> None:
    """Both kernels, or the one that reads keys again where the log-sum-exp is given."""
    query, key, sink = layers
    scale, mask, positions, softcap, window, _, lse, heads = options
    grid, parts, tile = division
    batch, query_heads, rows, _ = query[0].shape
    key_heads, keys = key[0].shape[1:3]
    device, depth = query[0].device, len(query)
    _, inner, factor, residual = exponent(scale, softcap)
    limit = reach(window)
    steps = 1 if slot.step is None else slot.out.maps.shape[0]
    scratch = memory.scratch[: parts.floats * torch.float32.itemsize].view(torch.float32)
    of_positions = strides_of_positions(positions)
    if lse is not None:
        given = operands_of(layers, options, grid)
        row_tiles = ceiling(rows, grid.block_row)
        capture_reread_kernel.launch(
            (max(ceiling(tokens.shape[1], tile.reread.block), 1) * row_tiles * batch, 1, depth),
            (*given.tensors, mask, positions, scratch, lse, tokens, slot.step, memory.tickets, *slot.out),
            (
                *given.strides, *strides_of(tokens), *strides_of(lse), *_output_strides(slot), batch, query_heads,
                key_heads, rows, keys, tokens.shape[1], steps, slot.first, limit, inner, factor, residual,
            ),
            (*given.shape, tile.reread.block, *given.flags, heads == "each"),
            device=device, warps=tile.reread.warps, stages=tile.reread.stages, registers=_REGISTERS,
        )  # fmt: skip
        return

    launch_scores(layers, options, span, scratch, division)
    sums, has_batch, overlaps = _sums(layers, grid), batch > 1, overlaps_launches(device)
    capture_map_kernel.launch(
        (max(ceiling(tokens.shape[1], BLOCK_TOKEN), 1), rows, depth * batch),
        (positions, tokens, Several.of(sink) if sink else None, slot.step, scratch, memory.tickets, *slot.out),
        (
            *of_positions, *strides_of(tokens), sink[0].stride(0) if sink else 0, *_output_strides(slot), batch,
            query_heads, rows, keys, grid.splits, tokens.shape[1], grid.padded, sums, parts.statistics, parts.partials,
            steps, slot.first, limit, factor, residual,
        ),
        (BLOCK_HEAD, BLOCK_TOKEN, BLOCK_PARTIAL, window is not None, heads == "each", has_batch, overlaps),
        device=device, warps=warps_of(device, BLOCK_TOKEN), stages=1, registers=_REGISTERS, overlaps=overlaps,
    )  # fmt: skip


def launch_scores(
    layers: Layers, options: CaptureOptions, span: Tensor | None, scratch: Tensor, division: tuple[Plan, Scratch, Tiles]
) -> None:
    """The first kernel: scores of all keys, or of those around the tokens, and the statistics of their splits."""
    query, key, _ = layers
    grid, parts, tile = division
    batch, query_heads, rows, _ = query[0].shape
    key_heads, keys = key[0].shape[1:3]
    _, inner, factor, _ = exponent(options.scale, options.softcap)
    given = operands_of(layers, options, grid)
    tiles = ceiling(rows, grid.block_row) * grid.group_tiles
    capture_scores_kernel.launch(
        (grid.splits * tiles, key_heads, len(query) * batch),
        (*given.tensors, options.mask, options.positions, span, scratch),
        (
            *given.strides, batch, query_heads, query_heads // key_heads, rows, keys, grid.splits, grid.span,
            grid.padded, _sums(layers, grid), parts.statistics, reach(options.window), inner, factor,
        ),
        (*given.shape, tile.scores.block, *given.flags, tiles > 1, batch > 1, overlaps_launches(query[0].device)),
        device=query[0].device, warps=tile.scores.warps, stages=tile.scores.stages, registers=_REGISTERS,
    )  # fmt: skip


def _sums(layers: Layers, grid: Plan) -> int:
    """How far the sums of the statistics are from their maxima, in floats."""
    batch, query_heads, rows, _ = layers.query[0].shape
    return len(layers.query) * batch * query_heads * rows * grid.splits


class Operands(NamedTuple):
    """What the kernels that multiply keys have in common: tensors, strides, and the constants around the block."""

    tensors: tuple[Several, Several]
    strides: tuple[int, ...]
    shape: tuple[int, int, int, int]
    flags: tuple[int, int, bool, int, bool]


def operands_of(layers: Layers, options: CaptureOptions, grid: Plan) -> Operands:
    """The queries and the keys, with the strides of the mask and the positions."""
    query, key, _ = layers
    size, element_bytes, mask = query[0].shape[3], query[0].element_size(), options.mask
    query_strides, key_strides = strides_of(query[0]), strides_of(key[0])
    queries, all_keys = Several.of(query), Several.of(key)
    aligned = alignment(queries.addresses + all_keys.addresses, query_strides[:3] + key_strides[:3], element_bytes)
    of_mask = _NO_STRIDES if mask is None else strides_of(mask)
    kind, dense = exponent(options.scale, options.softcap)[0], size == 1 or query_strides[3] == key_strides[3] == 1
    return Operands(
        (queries, all_keys),
        (*query_strides, *key_strides, *of_mask, *strides_of_positions(options.positions)),
        (size, grid.block_size, grid.block_row, grid.block_group),
        (aligned, aligned // element_bytes, dense, kind, options.window is not None),
    )


def strides_of_positions(positions: Tensor | None) -> tuple[int, ...]:
    return _NO_STRIDES[:2] if positions is None else strides_of(positions)


def reach(window: int | None) -> int:
    """The window of a kernel, 0 for none."""
    return min(window or 0, _FARTHEST)
