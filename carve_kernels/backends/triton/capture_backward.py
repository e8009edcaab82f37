"""The gradients of a capture: the scores of a few rows are computed again, then the gradients of keys and query.

What is as small as the tokens, or as the heads and rows, is plain torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from carve_kernels.backends.triton.capture import (
    division_of,
    exponent,
    launch_scores,
    operands_of,
    reach,
    strides_of_positions,
)
from carve_kernels.backends.triton.capture import supports as supports
from carve_kernels.backends.triton.capture_backward_kernels import (
    capture_given_kernel,
    capture_key_gradient_kernel,
    capture_query_gradient_kernel,
)
from carve_kernels.backends.triton.capture_plan import LOG2E, Plan, Scratch, ceiling
from carve_kernels.backends.triton.launch import strides_of
from carve_kernels.backends.triton.tiles import Tiles
from carve_kernels.numerics import of_probabilities
from carve_kernels.types import CaptureOptions, Given, Gradients, Layers

# Tokens of a line that are compared with each other at a time.
_BLOCK_TOKEN = 64
_REGISTERS = 255

Division = tuple[Plan, Scratch, Tiles]


class _Lines(NamedTuple):
    """What every key of a head and row shares: [B, A, R] each; `sink` is the sink's probability, or None."""

    top: Tensor
    share: Tensor
    sink: Tensor | None


def backward(
    query: Tensor, key: Tensor, tokens: Tensor, options: CaptureOptions, given: Given, *, of_key: bool = True
) -> Gradients:
    """The gradients with respect to the query, the key (None unless `of_key`) and the sink, in their dtypes."""
    batch, heads, rows, size = query.shape
    key_heads, keys, device, sink = key.shape[1], key.shape[2], query.device, options.sink
    to_query = torch.zeros(query.shape, dtype=query.dtype, device=device)
    to_key = torch.zeros(key.shape, dtype=torch.float32, device=device) if of_key else None
    to_sink = None if sink is None else torch.zeros(heads, dtype=torch.float32, device=device)
    if batch and rows and keys and tokens.shape[1]:
        sizes = 1, batch, heads, key_heads, rows, keys, size, query.element_size(), False
        division = division_of(device, sizes, tokens.shape[1])
        scratch = torch.empty(division[1].floats, dtype=torch.float32, device=device)
        for start in range(0, rows, division[0].rows):
            part = slice(start, start + division[0].rows)
            some, layers = options.of_rows(part), Layers.single(query[:, :, part], key, None)
            launch_scores(layers, some, None, scratch, division)
            sinks = _add_gradients(
                layers, tokens, some, given.of_rows(part), division, scratch, to_query[:, :, part], to_key, start > 0
            )
            if to_sink is not None and sinks is not None:
                to_sink -= sinks
    return (
        to_query,
        None if to_key is None else to_key.to(key.dtype),
        None if to_sink is None or sink is None else to_sink.to(sink.dtype),
    )


def _add_gradients(
    layers: Layers,
    tokens: Tensor,
    options: CaptureOptions,
    given: Given,
    division: Division,
    scratch: Tensor,
    to_query: Tensor,
    to_key: Tensor | None,
    adds: bool,
) -> Tensor | None:
    """Write the gradients of some rows of the query and add to those of the key; what the sink's lose, or None."""
    query, key = layers.query[0], layers.key[0]
    grid = division[0]
    (batch, heads, rows, _), (key_heads, keys) = query.shape, key.shape[1:3]
    _, _, factor, _ = exponent(options.scale, options.softcap)
    lines = _lines(query, options, division, scratch)
    picked, used = _picked(query, tokens, keys, options, grid, scratch, lines)
    of_tokens = of_probabilities(picked, used[:, None], options.heads, given).contiguous()
    total = (picked * of_tokens).sum(-1)
    stacked = torch.stack([lines.top, lines.share, total])
    # The gradients with respect to the probabilities of all keys.
    sums = torch.zeros(*of_tokens.shape[:3], grid.padded, dtype=torch.float32, device=query.device)
    of_batch = of_tokens.shape[1] * rows
    capture_given_kernel.launch(
        (batch * of_batch, 1, 1), (of_tokens, tokens, sums),
        (*strides_of(tokens), of_batch, tokens.shape[1], keys, grid.padded), (_BLOCK_TOKEN,),
        device=query.device, warps=4, stages=1,
    )  # fmt: skip

    common = operands_of(layers, options, grid)
    of_query, of_key = common.strides[:4], common.strides[4:8]
    positions = strides_of_positions(options.positions)
    of_sums = (sums.stride(0), sums.stride(1) if sums.shape[1] > 1 else 0)
    counts = batch, heads, heads // key_heads, rows, keys, grid.padded
    _, unit, dense, kind, has_window = common.flags
    block, warps = _tile(query.element_size(), grid)
    # TF32 holds every half exactly, and rounds a gradient to three digits, as a product of halves would.
    precision = "tf32" if query.element_size() == 2 and torch.version.hip is None else "ieee"
    numbers = reach(options.window), factor, options.scale
    if to_key is not None:
        capture_key_gradient_kernel.launch(
            (ceiling(keys, block), key_heads, batch),
            (query, options.positions, scratch, sums, stacked, to_key),
            (*of_query, *positions, *of_sums, *counts, *numbers),
            (*common.shape, block, unit, dense, kind, has_window, adds, precision),
            device=query.device, warps=warps, stages=1, registers=_REGISTERS,
        )  # fmt: skip
    partials = torch.empty(grid.splits, *query.shape, dtype=torch.float32, device=query.device)
    hides = options.mask is not None or options.positions is not None
    capture_query_gradient_kernel.launch(
        (grid.splits * ceiling(rows, grid.block_row) * grid.group_tiles, key_heads, batch),
        (key, options.positions, scratch, sums, stacked, partials),
        (*of_key, *positions, *of_sums, *counts, grid.span, *numbers),
        (*common.shape, block, unit, dense, kind, has_window, hides, precision),
        device=query.device, warps=warps, stages=1, registers=_REGISTERS,
    )  # fmt: skip
    to_query.copy_(partials.sum(0))
    return None if lines.sink is None else (lines.sink * total).sum((0, 2))


def _tile(element_bytes: int, grid: Plan) -> tuple[int, int]:
    """Keys of a tile and warps of a program: what a program adds up, and its operands, stay in registers."""
    block = 16 if grid.block_size == 256 else 32
    lanes = grid.block_row * grid.block_group
    return block, 8 if element_bytes == 4 or lanes * grid.block_size > 4096 else 4


def _lines(query: Tensor, options: CaptureOptions, division: Division, scratch: Tensor) -> _Lines:
    """The maximum and the factor of each head and row, by which a probability is 2^(factor * score - top) * share."""
    grid, parts, _ = division
    batch, heads, rows, _ = query.shape
    # Not all GPUs of Intel have float64.
    dtype = torch.float32 if query.device.type == "xpu" else torch.float64
    exact = 1.0 + exponent(options.scale, options.softcap)[3]
    sink = None if options.sink is None else options.sink.to(dtype).view(1, -1, 1) * LOG2E
    if options.lse is not None:
        known = options.lse.to(dtype) * LOG2E
        is_empty = known == -torch.inf
        top = known.masked_fill(is_empty, 0.0).float()
        share = torch.exp2(top.to(dtype) * exact - known).masked_fill(is_empty, 0.0)
        of_sink = None if sink is None else torch.exp2(sink - known).masked_fill(is_empty, 0.0)
        return _Lines(top, share.float(), None if of_sink is None else of_sink.float())
    count = batch * grid.splits * rows * heads
    maxima, sums = (
        scratch[start : start + count].view(batch, grid.splits, rows, heads).permute(0, 3, 2, 1)
        for start in (parts.statistics, parts.statistics + count)
    )
    top = maxima.amax(-1)
    if sink is not None:
        top = torch.maximum(top, sink.float().clamp(min=torch.finfo(torch.float32).min))
    total = (sums.to(dtype) * torch.exp2((maxima - top[..., None]).to(dtype))).sum(-1)
    of_sink = None if sink is None else torch.exp2(sink - top.to(dtype) * exact)
    if of_sink is not None:
        total = total + of_sink
    share = torch.where(total == 0, 0.0, 1.0 / total)
    return _Lines(top, share.float(), None if of_sink is None else (of_sink * share).float())


def _picked(
    query: Tensor, tokens: Tensor, keys: int, options: CaptureOptions, grid: Plan, scratch: Tensor, lines: _Lines
) -> tuple[Tensor, Tensor]:
    """The probabilities [B, A, R, N] of the tokens, 0 for padding, and which tokens are used, bool [B, N]."""
    batch, heads, rows, _ = query.shape
    factor = exponent(options.scale, options.softcap)[2]
    used = (tokens >= 0) & (tokens < keys)
    column = tokens.clamp(0, keys - 1).long()
    scores = scratch[: batch * heads * rows * grid.padded].view(batch, heads, rows, grid.padded)
    picked = scores.gather(-1, column[:, None, None].expand(batch, heads, rows, -1))
    seen = used[:, None, None]
    if options.positions is not None:
        # Tiles of keys that no row sees were left out, and their scores are anything.
        last = options.positions[:, None, :, None]
        seen = seen & (column[:, None, None] <= last)
        if options.window is not None:
            seen = seen & (column[:, None, None] - last > -options.window)
    dtype = torch.float32 if query.device.type == "xpu" else torch.float64
    exponents = picked.to(dtype).mul_(factor).sub_(lines.top[..., None])
    probabilities = torch.exp2(exponents).float().mul_(lines.share[..., None])
    return probabilities.masked_fill_(~seen, 0.0), used
