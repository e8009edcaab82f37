"""The gradients of a capture by the compiled operator, which computes the probabilities of a few rows again."""

from __future__ import annotations

import torch
from torch import Tensor

from carve_kernels.backends.cpu.capture import supports as supports
from carve_kernels.backends.native.limits import dense
from carve_kernels.types import CaptureOptions, Given, Gradients


def backward(
    query: Tensor, key: Tensor, tokens: Tensor, options: CaptureOptions, given: Given, *, of_key: bool = True
) -> Gradients:
    """The gradients with respect to the query, the key (None unless `of_key`) and the sink, in their dtypes."""
    scale, mask, positions, softcap, window, sink, lse, heads = options
    to_query = torch.empty(query.shape, dtype=torch.float32)
    to_key = torch.empty(key.shape, dtype=torch.float32) if of_key else None
    to_sink = None if sink is None else torch.empty(sink.shape, dtype=torch.float32)
    known, of_sink = (None if each is None else dense(each) for each in (lse, sink))
    parts = (None if each is None else dense(each) for each in given)
    torch.ops.carve_kernels.capture_backward.default(
        query, key, tokens, mask, positions, of_sink, known, scale, softcap or 0.0, window or 0, heads == "each",
        *parts, to_query, to_key, to_sink,
    )  # fmt: skip
    return (
        to_query.to(query.dtype),
        None if to_key is None else to_key.to(key.dtype),
        None if sink is None or to_sink is None else to_sink.to(sink.dtype),
    )
