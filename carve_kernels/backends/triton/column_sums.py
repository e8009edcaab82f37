"""Column sums in two launches, or in one where the log-sum-exp is given; scratch has two floats for each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from carve_kernels.backends.native.limits import dense
from carve_kernels.backends.triton import capture, interpreted
from carve_kernels.backends.triton.capture import exponent
from carve_kernels.backends.triton.capture_plan import MOST_PROGRAMS, ceiling, power_of_two
from carve_kernels.backends.triton.column_kernels import column_normaliser_kernel, column_sums_kernel
from carve_kernels.backends.triton.launch import Several, alignment, strides_of
from carve_kernels.types import CaptureOptions

_NO_STRIDES = (0, 0, 0, 0)
_REGISTERS = 255
_FARTHEST = 2**62
# Positions that a program of the second kernel looks at together, before it reads any query.
_BLOCK_SCAN = 1024


class _Tile(NamedTuple):
    rows: int
    keys: int
    warps: int
    stages: int


def supports(query: Tensor, key: Tensor, *_: object) -> str | None:
    """Why these arguments cannot be served, or None."""
    if query.shape[1] > MOST_PROGRAMS:
        return f"query has {query.shape[1]} heads, this backend serves up to {MOST_PROGRAMS}; use backend='reference'"
    return capture.supports(query, key)


def forward(query: Tensor, key: Tensor, options: CaptureOptions) -> Tensor:
    """The sums [B, A, S] in float32; see `carve_kernels.column_sums`."""
    scale, mask, positions, softcap, window, sink, lse, _ = options
    batch, query_heads, rows, size = query.shape
    key_heads, keys = key.shape[1:3]
    out = query.new_empty((batch, query_heads, keys), dtype=torch.float32)
    if not out.numel():
        return out
    if not rows:
        return out.zero_()
    element_bytes, device = query.element_size(), query.device
    block_size = max(power_of_two(size), 16)
    tile = _tile_of(element_bytes, block_size)
    kind, inner, factor, residual = exponent(scale, softcap)
    query_strides, key_strides = strides_of(query), strides_of(key)
    queries, all_keys = Several.of([query]), Several.of([key])
    aligned = alignment(queries.addresses + all_keys.addresses, query_strides[:3] + key_strides[:3], element_bytes)
    of_positions = _NO_STRIDES[:2] if positions is None else strides_of(positions)
    strides = *query_strides, *key_strides, *(_NO_STRIDES if mask is None else strides_of(mask)), *of_positions
    is_dense = size == 1 or query_strides[3] == key_strides[3] == 1
    limit = min(window or 0, _FARTHEST)
    sizes = query_heads // key_heads, rows, keys, limit, inner, factor, residual
    blocks = size, block_size, tile.rows, tile.keys
    flags = aligned, aligned // element_bytes, is_dense, kind, window is not None
    top, share = query.new_empty((2, 0 if lse is not None else batch * query_heads * rows), dtype=torch.float32)
    if lse is None:
        given = None if sink is None else dense(sink)
        column_normaliser_kernel.launch(
            (ceiling(rows, tile.rows), query_heads, batch),
            (queries, all_keys, mask, positions, given, top, share),
            (*strides, 0 if given is None else 1, *sizes),
            (*blocks, *flags),
            device=device, warps=tile.warps, stages=tile.stages, registers=_REGISTERS,
        )  # fmt: skip
    column_sums_kernel.launch(
        (ceiling(keys, tile.keys), query_heads, batch),
        (queries, all_keys, mask, positions, lse, top, share, out),
        (*strides, *(_NO_STRIDES[:3] if lse is None else strides_of(lse)), *sizes),
        (*blocks, _BLOCK_SCAN, *flags, element_bytes == 2),
        device=device, warps=tile.warps, stages=tile.stages, registers=_REGISTERS,
    )  # fmt: skip
    return out


def _tile_of(element_bytes: int, block_size: int) -> _Tile:
    """Rows and keys of a tile, warps and stages, so that no target spills."""
    if interpreted():
        # A step of the interpreter costs the same for any tile.
        return _Tile(64, 128, 4, 1)
    if element_bytes == 4:
        return _Tile(16, 16 if block_size == 256 else 32, 8, 2)
    return _Tile(64, 64 if block_size < 256 else 32, 4, 2)
