"""Capture by the compiled operator: the keys are read once for each block of rows, in their dtype and strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from carve_kernels.backends.native.limits import capture_limit, dense, dense_key_limit, same_shapes
from carve_kernels.types import Capture, CaptureOptions


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    _tokens: torch.Tensor,
    _options: CaptureOptions,
    *,
    out: Capture | None = None,
) -> str | None:
    """Why these arguments cannot be served, or None."""
    return capture_limit(query, key, out) or dense_key_limit(key)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: torch.Tensor,
    options: CaptureOptions,
    *,
    out: Capture | None = None,
) -> Capture:
    """Capture(maps, mass, entropy) in float32; see `carve_kernels.capture`."""
    direct = out is not None and out.maps.stride(-1) == 1
    written = out if out is not None and direct else Capture.empty(query, tokens, options.heads)
    _call([query], [key], tokens, options, [] if options.sink is None else [options.sink], None, 0, written)
    if out is None or out is written:
        return written
    for target, values in zip(out, written, strict=True):
        target.copy_(values)
    return out


def forward_layers(
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    options: CaptureOptions,
    *,
    sink: Sequence[torch.Tensor],
    step: torch.Tensor,
    first: int,
    out: Capture,
) -> bool:
    """Capture several layers into one step of `out` by one call; False where the layers differ too much for that."""
    if out.maps.stride(-1) != 1 or not same_shapes(query, key):
        return False
    if any(supports(*layer, tokens, options, out=out) is not None for layer in zip(query, key, strict=True)):
        return False
    _call(query, key, tokens, options, sink, step, first, out)
    return True


def _call(
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    options: CaptureOptions,
    sink: Sequence[torch.Tensor],
    step: torch.Tensor | None,
    first: int,
    out: Capture,
) -> None:
    torch.ops.carve_kernels.capture_cpu.default(
        query, key, tokens, options.mask, options.positions, [dense(one) for one in sink],
        None if options.lse is None else dense(options.lse), options.scale, options.softcap or 0.0,
        options.window or 0, options.heads == "each", step, first, *out,
    )  # fmt: skip
