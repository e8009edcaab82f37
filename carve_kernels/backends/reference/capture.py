"""Capture in plain torch: the probabilities of a few rows over all keys, gathered at the visual tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from carve_kernels.numerics import entropy
from carve_kernels.types import Capture, CaptureOptions

# Keys converted to the dtype of the computation at a time: scratch grows with rows x S, not with S x D.
KEY_BLOCK = 1024


def supports(*_: object, **_out: object) -> str | None:
    """The reference serves everything."""
    return None


def forward(
    query: Tensor, key: Tensor, tokens: Tensor, options: CaptureOptions, *, out: Capture | None = None
) -> Capture:
    """Capture(maps, mass, entropy) in float32, or in float64 for float64 input; see `carve_kernels.capture`."""
    scores = logits(query, key, options)
    top, summed, dead = normaliser(scores, options)

    used = (tokens >= 0) & (tokens < key.shape[2])
    if key.shape[2]:
        index = tokens.clamp(0, key.shape[2] - 1).long()[:, None, None, :].expand(*scores.shape[:-1], -1)
        picked = scores.gather(-1, index)
    else:
        picked = scores.new_zeros(*scores.shape[:-1], tokens.shape[-1])
    probabilities = torch.exp(picked - top) / summed
    probabilities = probabilities.masked_fill(dead | ~used[:, None, None, :], 0.0)

    mean = probabilities.mean(1)
    mass = mean.sum(-1)
    result = Capture(mean if options.heads == "mean" else probabilities, mass, entropy(mean, used))
    if out is None:
        return result
    for target, values in zip(out, result, strict=True):
        target.copy_(values)
    return out


def normaliser(scores: Tensor, options: CaptureOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(top, summed, dead), each [B, A, R, 1]: probabilities are exp(scores - top) / summed, and 0 in dead rows.

    The maximum and the sum below it stay two numbers: one logarithm would be rounded to the digits of the maximum.
    """
    dtype, sink = scores.dtype, options.sink
    if options.lse is not None:
        top = options.lse.to(dtype).unsqueeze(-1)
        dead = (scores == -math.inf).all(-1, keepdim=True) | (top == -math.inf)
        return top.masked_fill(dead, 0.0), torch.ones_like(top), dead
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -math.inf)
    if sink is not None:
        sink = sink.to(dtype).view(1, -1, 1, 1)
        top = torch.maximum(top, sink)
    dead = top == -math.inf
    top = top.masked_fill(dead, 0.0)
    summed = torch.zeros_like(top)
    for block in scores.split(KEY_BLOCK, -1):
        summed += torch.exp(block - top).sum(-1, keepdim=True)
    if sink is not None:
        summed += torch.exp(sink - top)
    return top, summed, dead


def logits(query: Tensor, key: Tensor, options: CaptureOptions) -> Tensor:
    """The logits [B, A, R, S], -inf at keys that a row does not see, in float64 for float64 input, else in float32."""
    scores = _scores(query, key, options.scale)
    if options.softcap is not None:
        capped = torch.tanh_(scores.div_(options.softcap))
        # The gradient of a tanh is computed from its result, which is therefore kept.
        scores = capped * options.softcap if capped.requires_grad else capped.mul_(options.softcap)
    visible = visible_keys(options, key.shape[2])
    return scores if visible is None else scores.masked_fill_(~visible, -math.inf)


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """scale * query @ key^T as [B, A, R, S]."""
    batch, query_heads, rows, size = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    # The heads of a group become rows of one product, so the keys are never repeated.
    folded = query.to(dtype).reshape(batch, key_heads, query_heads // key_heads * rows, size)
    scores = torch.empty(*folded.shape[:-1], keys, dtype=dtype, device=query.device)
    for start in range(0, keys, KEY_BLOCK):
        block = key[:, :, start : start + KEY_BLOCK].to(dtype)
        scores[..., start : start + KEY_BLOCK] = torch.matmul(folded, block.transpose(-1, -2))
    return scores.mul_(scale).view(batch, query_heads, rows, keys)


def visible_keys(options: CaptureOptions, keys: int) -> Tensor | None:
    """Which keys each row sees, as bool [B, 1 | A, R, S], or None for all; a mask hides more beside positions."""
    if options.positions is None:
        return options.mask
    column = torch.arange(keys, device=options.positions.device)
    last = options.positions[:, None, :, None]
    visible = column <= last
    if options.window is not None:
        # In int64: a window may be beyond int32, that of the positions.
        visible &= column - last > -options.window
    return visible if options.mask is None else visible & options.mask
