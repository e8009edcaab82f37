"""The gradients of a capture in plain torch: the probabilities of a few rows over all keys are computed again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from carve_kernels.backends.reference import capture
from carve_kernels.backends.reference.attention import seen_keys
from carve_kernels.numerics import of_probabilities
from carve_kernels.types import CaptureOptions, Given, Gradients

# Scores of one part of the rows: scratch is a few times as many numbers, or those of one row where that has more.
_SCORES = 2**22


def supports(*_: object) -> str | None:
    """The reference serves everything."""
    return None


def backward(
    query: Tensor, key: Tensor, tokens: Tensor, options: CaptureOptions, given: Given, *, of_key: bool = True
) -> Gradients:
    """The gradients with respect to the query, the key (None unless `of_key`) and the sink, in their dtypes.

    A given log-sum-exp is that of the logits, so it changes with the query and the key, as if it were computed here.
    Sums are in float32, or in float64 for float64 input.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, rows, _ = query.shape
    keys, sink = key.shape[2], options.sink
    to_query = torch.zeros_like(query)
    to_key = torch.zeros(key.shape, dtype=dtype, device=key.device) if of_key else None
    to_sink = None if sink is None else torch.zeros(heads, dtype=dtype, device=query.device)
    step = max(1, _SCORES // max(batch * heads * keys, 1))
    for start in range(0, rows if keys and tokens.shape[1] and heads else 0, step):
        part = slice(start, start + step)
        some = options.of_rows(part)
        products, sinks = _of_products(query[:, :, part], key, tokens, some, given.of_rows(part))
        if to_sink is not None and sinks is not None:
            to_sink += sinks
        to_query[:, :, part] = _into_query(products, query[:, :, part], key, seen_keys(some, keys), to_key)
    return (
        to_query,
        None if to_key is None else to_key.to(key.dtype),
        None if sink is None or to_sink is None else to_sink.to(sink.dtype),
    )


def _of_products(
    query: Tensor, key: Tensor, tokens: Tensor, options: CaptureOptions, given: Given
) -> tuple[Tensor, Tensor | None]:
    """The gradients [B, A, R, S] with respect to the products of query and key, and those [A] of the sink."""
    logits = capture.logits(query, key, options)
    top, summed, dead = capture.normaliser(logits, options)
    keys, softcap = key.shape[2], options.softcap
    used = ((tokens >= 0) & (tokens < keys))[:, None, None, :]
    index = tokens.clamp(0, keys - 1).long()[:, None, None, :].expand(*logits.shape[:-1], -1)
    slope = None
    if softcap is not None:
        # A hidden key's logit is -inf, and its slope 0.
        slope = torch.div(logits, softcap).square_().neg_().add_(1.0)
        slope.masked_fill_(slope == -math.inf, 0.0)
    probabilities = logits.sub_(top).exp_().div_(summed).masked_fill_(dead, 0.0)
    picked = probabilities.gather(-1, index).masked_fill_(~used, 0.0)
    # A probability times the gradient of the loss with respect to it.
    weighted = picked * of_probabilities(picked, used[:, 0], options.heads, given)
    total = weighted.sum(-1, keepdim=True)
    products = probabilities.mul_(-total).scatter_add_(-1, index, weighted)
    if slope is not None:
        products.mul_(slope)
    sinks = None
    if options.sink is not None:
        share = torch.exp(options.sink.to(products.dtype).view(1, -1, 1, 1) - top).div_(summed).masked_fill_(dead, 0.0)
        sinks = -(share * total).sum((0, 2, 3))
    return products.mul_(options.scale), sinks


def _into_query(products: Tensor, query: Tensor, key: Tensor, seen: Tensor | None, to_key: Tensor | None) -> Tensor:
    """The gradients of some rows of the query from those of their products; those of the key are added to `to_key`."""
    batch, heads, rows, size = query.shape
    key_heads, keys = key.shape[1:3]
    # The heads of a group become rows of one product, so the keys are never repeated.
    folded = query.to(products.dtype).reshape(batch, key_heads, heads // key_heads * rows, size)
    products = products.view(batch, key_heads, heads // key_heads * rows, keys)
    to_query = torch.zeros_like(folded)
    for start in range(0, keys, capture.KEY_BLOCK):
        block = slice(start, start + capture.KEY_BLOCK)
        some = key[:, :, block].to(products.dtype)
        if seen is not None:
            # A key that no row sees may hold any value, also NaN.
            some = some.masked_fill(~seen[:, None, block, None], 0.0)
        to_query += torch.matmul(products[..., block], some)
        if to_key is not None:
            to_key[:, :, block] += torch.matmul(products[..., block].transpose(-1, -2), folded)
    return to_query.view(batch, heads, rows, size)
