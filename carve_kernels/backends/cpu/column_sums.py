"""Column sums by the compiled operator: blocks of rows against chunks of keys, in their dtype and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from carve_kernels.backends.native.limits import capture_limit, dense, dense_key_limit
from carve_kernels.types import CaptureOptions


def supports(query: Tensor, key: Tensor, *_: object) -> str | None:
    """Why these arguments cannot be served, or None."""
    return capture_limit(query, key, None) or dense_key_limit(key)


def forward(query: Tensor, key: Tensor, options: CaptureOptions) -> Tensor:
    """The sums [B, A, S] in float32; see `carve_kernels.column_sums`."""
    scale, mask, positions, softcap, window, sink, lse, _ = options
    out = torch.empty(*query.shape[:2], key.shape[2], dtype=torch.float32, device=query.device)
    torch.ops.carve_kernels.column_sums_cpu.default(
        query, key, mask, positions, None if sink is None else dense(sink), None if lse is None else dense(lse),
        float(scale), float(softcap or 0.0), int(window or 0), out,
    )  # fmt: skip
    return out
