"""Capture by the compiled operator: the keys are read once for each block of rows, in their own dtype and strides."""

from __future__ import annotations

from typing import Any, Literal

import torch

from carve_kernels.types import Capture

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def supports(
    query: torch.Tensor, key: torch.Tensor, _tokens: torch.Tensor, *, out: Capture | None = None, **_options: Any
) -> str | None:
    """Why these arguments cannot be served, or None."""
    if query.dtype not in _FLOATS:
        return f"query is {query.dtype}, this room serves float32, float16 and bfloat16; use backend='reference'"
    if key.stride(3) != 1 and key.shape[3] > 1:
        return f"the elements of a key are {key.stride(3)} apart, this room wants them side by side; use key.contiguous()"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "query or key requires a gradient, which this room does not have; use backend='reference'"
    if out is not None and any(part.dtype != torch.float32 for part in out):
        return "out is float64, this room writes torch.float32; use backend='reference'"
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
    """Capture(maps, mass, entropy) in float32; see `carve_kernels.capture`."""
    batch, query_heads, rows, _ = query.shape
    each = heads == "each"
    count = tokens.shape[1]
    dense = out is None or out.maps.stride(-1) == 1
    if out is None or not dense:
        shape = (batch, query_heads, rows, count) if each else (batch, rows, count)
        written = Capture(
            torch.empty(shape), torch.empty(batch, rows), torch.empty(batch, rows)
        )
    else:
        written = out
    torch.ops.carve_kernels.capture_cpu(
        [query],
        [key],
        tokens,
        mask,
        positions,
        [] if sink is None else [sink.float()],
        None if lse is None else lse.float().contiguous(),
        scale,
        softcap or 0.0,
        window or 0,
        each,
        None,
        0,
        *written,
    )
    if out is None or dense:
        return written
    for target, part in zip(out, written, strict=True):
        target.copy_(part)
    return out
