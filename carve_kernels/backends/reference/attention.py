"""Attention in plain torch: the outputs of some rows, and their capture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from carve_kernels.backends.reference import capture
from carve_kernels.types import Attended, Capture, CaptureOptions


def supports(*_: object, **_outputs: object) -> str | None:
    """The reference serves everything."""
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    options: CaptureOptions,
    *,
    output: Tensor | None = None,
    out: Capture | None = None,
) -> Attended:
    """Attended(output, capture); see `carve_kernels.attention`."""
    captured = capture.forward(query, key, tokens, options, out=out)
    attended = attend(query, key, value, options)
    if output is None:
        return Attended(attended, captured)
    output.copy_(attended)
    return Attended(output, captured)


def attend(query: Tensor, key: Tensor, value: Tensor, options: CaptureOptions) -> Tensor:
    """The output [B, A, R, E] in the dtype of the query, computed in float32, or in float64 for float64 input."""
    scores = capture.logits(query, key, options)
    batch, query_heads, rows, keys = scores.shape
    key_heads, size = value.shape[1], value.shape[3]
    top = scores.amax(-1, keepdim=True) if keys else scores.new_full((batch, query_heads, rows, 1), -math.inf)
    sink = None if options.sink is None else options.sink.to(scores.dtype).view(1, -1, 1, 1)
    if sink is not None:
        top = torch.maximum(top, sink)
    # Of a row that sees nothing all weights are 0, and so is its output.
    top = top.masked_fill(top == -math.inf, 0.0)
    summed = torch.zeros_like(top) if sink is None else torch.exp(sink - top)
    seen = seen_keys(options, keys)
    group_rows = query_heads // key_heads * rows
    folded = scores.new_zeros(batch, key_heads, group_rows, size)
    for start in range(0, keys, capture.KEY_BLOCK):
        block = slice(start, start + capture.KEY_BLOCK)
        weights = torch.exp(scores[..., block] - top)
        summed = summed + weights.sum(-1, keepdim=True)
        values = value[:, :, block].to(scores.dtype)
        if seen is not None:
            values = values.masked_fill(~seen[:, None, block, None], 0.0)
        folded = folded + torch.matmul(weights.reshape(batch, key_heads, group_rows, weights.shape[-1]), values)
    attended = folded.view(batch, query_heads, rows, size) / summed.masked_fill(summed == 0, 1.0)
    return attended.to(query.dtype)


def seen_keys(options: CaptureOptions, keys: int) -> Tensor | None:
    """The keys that any row or head of a batch entry sees, bool [B, S]; None for all. Others may hold any value."""
    visible = capture.visible_keys(options, keys)
    return None if visible is None else visible.any(2).any(1)
