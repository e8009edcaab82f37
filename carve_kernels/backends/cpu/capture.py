"""Capture by the compiled operator: the keys are read once for each block of rows, in their own dtype and strides."""

from __future__ import annotations

from collections.abc import Sequence
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
    if not query.shape[1]:
        return "query has no heads; use backend='reference'"
    if key.stride(3) != 1 and key.shape[3] > 1:
        return f"the elements of a key are {key.stride(3)} apart and not side by side; use key.contiguous()"
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
    if out is not None and out.maps.stride(-1) == 1:
        written = out
    else:
        batch, query_heads, rows, _ = query.shape
        middle = (query_heads,) if heads == "each" else ()
        written = Capture(
            query.new_empty((batch, *middle, rows, tokens.shape[1]), dtype=torch.float32),
            query.new_empty((batch, rows), dtype=torch.float32),
            query.new_empty((batch, rows), dtype=torch.float32),
        )
    torch.ops.carve_kernels.capture_cpu.default(
        [query], [key], tokens, mask, positions, [] if sink is None else [_dense(sink)],
        None if lse is None else _dense(lse), scale, softcap or 0.0, window or 0, heads == "each", None, 0, *written,
    )  # fmt: skip
    if out is None or out is written:
        return written
    for target, part in zip(out, written, strict=True):
        target.copy_(part)
    return out


def forward_layers(
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    *,
    sink: Sequence[torch.Tensor],
    step: torch.Tensor,
    first: int,
    out: Capture,
    scale: float,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    softcap: float | None,
    window: int | None,
) -> bool:
    """Capture several layers into one step of `out`, in one call; False where the layers differ too much for that."""
    if out.maps.stride(-1) != 1 or supports(query[0], key[0], tokens, out=out) is not None:
        return False
    if len({(one.shape, other.shape, one.dtype, one.device) for one, other in zip(query, key, strict=True)}) > 1:
        return False
    for layer in range(1, len(query)):
        if supports(query[layer], key[layer], tokens) is not None:
            return False
    torch.ops.carve_kernels.capture_cpu.default(
        query, key, tokens, mask, positions, [_dense(one) for one in sink], None, scale, softcap or 0.0, window or 0,
        False, step, first, *out,
    )  # fmt: skip
    return True


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32).contiguous()
