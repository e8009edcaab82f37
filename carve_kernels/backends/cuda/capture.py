"""Capture by CUDA kernels for up to 8 rows: two launches for all layers, and neither reads a key twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from carve_kernels.backends.cuda import foreign, stream_of
from carve_kernels.backends.cuda.plan import LAYERS_AT_ONCE, MOST_ROWS, MOST_SIZE, scratch_bytes
from carve_kernels.backends.native.limits import capture_limit, dense_key_limit, is_one_call, operands
from carve_kernels.backends.native.scratch import Scratch
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot

_SCRATCH = Scratch(torch.uint8)


def supports(query: Tensor, key: Tensor, *_: object, out: Capture | None = None) -> str | None:
    """Why these arguments cannot be served, or None."""
    if reason := capture_limit(query, key, out) or dense_key_limit(key):
        return reason
    if query.shape[2] > MOST_ROWS:
        return f"query has {query.shape[2]} rows, this backend serves up to {MOST_ROWS}; use backend='triton'"
    if query.shape[3] > MOST_SIZE:
        return f"heads have {query.shape[3]} elements, this backend serves up to {MOST_SIZE}; use backend='reference'"
    return foreign(query.device.index) if query.device.type == "cuda" else None


def forward(
    query: Tensor, key: Tensor, tokens: Tensor, options: CaptureOptions, *, out: Capture | None = None
) -> Capture:
    """Capture(maps, mass, entropy) in float32; see `carve_kernels.capture`."""
    out = out or Capture.empty(query, tokens, options.heads)
    _launch(Layers.single(query, key, options.sink), tokens, options, Slot(out))
    return out


def forward_layers(layers: Layers, tokens: Tensor, options: CaptureOptions, slot: Slot) -> bool:
    """Capture several layers into one step of buffers by one call; False where the layers differ too much for that."""
    if not is_one_call(supports, layers, slot.out):
        return False
    _launch(layers, tokens, options, slot)
    return True


def _launch(layers: Layers, tokens: Tensor, options: CaptureOptions, slot: Slot) -> None:
    query, key, sink = layers
    batch, query_heads, rows, _ = query[0].shape
    device = query[0].device
    stream = stream_of(device)
    needed = scratch_bytes(
        layers=min(len(query), LAYERS_AT_ONCE), batch=batch, query_heads=query_heads, rows=rows, keys=key[0].shape[2],
        tokens=tokens.shape[1], lse=options.lse is not None, each=options.heads == "each",
    )  # fmt: skip
    torch.ops.carve_kernels.capture_cuda.default(
        *operands(layers, tokens, options, _dense_sinks(sink)), slot.step, slot.first, stream,
        _SCRATCH.take(device, stream, needed), *slot.out,
    )  # fmt: skip


def _dense_sinks(sinks: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The layers' sinks in float32. Where they are not, two launches convert those of all layers."""
    if all(sink.dtype == torch.float32 and sink.is_contiguous() and not sink.requires_grad for sink in sinks):
        return sinks
    return torch.stack([sink.detach() for sink in sinks]).to(torch.float32).unbind()
