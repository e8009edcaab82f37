"""Capture in plain torch: the probabilities of a few rows over all keys, gathered at the visual tokens."""

from __future__ import annotations

import math
from typing import Literal

import torch

from carve_kernels.types import Capture

# Keys converted to the computing dtype at a time, so that scratch grows with rows x S and not with S x D.
KEY_BLOCK = 1024


def supports(*_args: object, **_kwargs: object) -> str | None:
    return None


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
    scores = _scores(query, key, scale)
    if softcap is not None:
        scores = torch.tanh_(scores.div_(softcap)).mul_(softcap)
    seen = _visible(mask, positions, window, key.shape[2])
    if seen is not None:
        scores = scores.masked_fill_(~seen, -math.inf)
    dtype = scores.dtype

    # The maximum and the sum below it stay apart: the logarithm of both would be rounded to the digits of the maximum.
    if lse is not None:
        top = lse.to(dtype).unsqueeze(-1)
        summed = torch.ones_like(top)
        dead = (scores == -math.inf).all(-1, keepdim=True) | (top == -math.inf)
        top = top.masked_fill(dead, 0.0)
    else:
        top = scores.amax(-1, keepdim=True) if key.shape[2] else scores.new_full((*scores.shape[:-1], 1), -math.inf)
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
    values = mean if heads == "mean" else probabilities
    result = Capture(values, mass, entropy(mean, used))
    if out is None:
        return Capture(*(part if part.dtype == torch.float64 else part.float() for part in result))
    for target, part in zip(out, result, strict=True):
        target.copy_(part)
    return out


def entropy(maps: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """H / ln N of maps [B, ..., N] over the used tokens [B, N]; 0 where fewer than two are used or the mass is 0."""
    mass = maps.sum(-1, keepdim=True)
    share = maps / mass.masked_fill(mass == 0, 1.0)
    total = torch.special.entr(share).sum(-1)
    count = used.sum(-1).to(maps.dtype).view(-1, *[1] * (total.ndim - 1))
    return torch.where(count > 1, total / torch.log(count.clamp(min=2.0)), 0.0)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * query @ key^T as [B, A, R, S], in float64 for float64 input and in float32 for all other."""
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


def _visible(
    mask: torch.Tensor | None, positions: torch.Tensor | None, window: int | None, keys: int
) -> torch.Tensor | None:
    """Which keys each row sees, as bool [B, 1 | A, R, S], or None for all."""
    if mask is not None:
        return mask
    if positions is None:
        return None
    column = torch.arange(keys, device=positions.device)
    last = positions[:, None, :, None]
    seen = column <= last
    return seen & (column > last - window) if window is not None else seen
