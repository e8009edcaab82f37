"""Capture by CUDA kernels for up to 8 rows: two launches for all layers, and neither reads a key twice."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from carve_kernels.backends.cuda import foreign, stream_of
from carve_kernels.backends.cuda.plan import LAYERS_AT_ONCE, MOST_ROWS, MOST_SIZE, scratch_bytes
from carve_kernels.backends.native.limits import capture_limit, dense, dense_key_limit, same_shapes
from carve_kernels.types import Capture, CaptureOptions


class _Scratch(threading.local):
    """Memory through which the launches of one stream pass their results, cached by thread, device and stream.

    Two threads on one stream must not share it, since the launches of their calls can interleave. Memory that is too
    small, or of a thread that has ended, returns to torch's allocator, which reuses it in the order of its stream.
    """

    def __init__(self) -> None:
        self.cached: dict[tuple[torch.device, int], torch.Tensor] = {}

    def take(self, device: torch.device, stream: int, needed: int) -> torch.Tensor:
        """At least `needed` bytes of any value."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A graph is replayed on any stream and beside other calls, so it gets memory from its own pool.
            return torch.empty(needed, dtype=torch.uint8, device=device)
        scratch = self.cached.get((device, stream))
        if scratch is None or scratch.numel() < needed:
            # A tensor made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                scratch = torch.empty(1 << (needed - 1).bit_length(), dtype=torch.uint8, device=device)
            self.cached[device, stream] = scratch
        return scratch


_SCRATCH = _Scratch()


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    _tokens: torch.Tensor,
    _options: CaptureOptions,
    *,
    out: Capture | None = None,
) -> str | None:
    """Why these arguments cannot be served, or None."""
    if reason := capture_limit(query, key, out) or dense_key_limit(key):
        return reason
    if query.shape[2] > MOST_ROWS:
        return f"query has {query.shape[2]} rows, this backend serves up to {MOST_ROWS}; use backend='triton'"
    if query.shape[3] > MOST_SIZE:
        return f"heads have {query.shape[3]} elements, this backend serves up to {MOST_SIZE}; use backend='reference'"
    return foreign(query.device.index) if query.device.type == "cuda" else None


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: torch.Tensor,
    options: CaptureOptions,
    *,
    out: Capture | None = None,
) -> Capture:
    """Capture(maps, mass, entropy) in float32; see `carve_kernels.capture`."""
    out = out or Capture.empty(query, tokens, options.heads)
    _launch([query], [key], tokens, options, [] if options.sink is None else [options.sink], None, 0, out)
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
    if not same_shapes(query, key):
        return False
    if any(supports(*layer, tokens, options, out=out) is not None for layer in zip(query, key, strict=True)):
        return False
    _launch(query, key, tokens, options, sink, step, first, out)
    return True


def _launch(
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    options: CaptureOptions,
    sink: Sequence[torch.Tensor],
    step: torch.Tensor | None,
    first: int,
    out: Capture,
) -> None:
    batch, query_heads, rows, _ = query[0].shape
    device = query[0].device
    stream, each = stream_of(device), options.heads == "each"
    lse = None if options.lse is None else dense(options.lse)
    needed = scratch_bytes(
        layers=min(len(query), LAYERS_AT_ONCE), batch=batch, query_heads=query_heads, rows=rows, keys=key[0].shape[2],
        tokens=tokens.shape[1], lse=lse is not None, each=each,
    )  # fmt: skip
    torch.ops.carve_kernels.capture_cuda.default(
        query, key, tokens, options.mask, options.positions, _dense_sinks(sink), lse, options.scale,
        options.softcap or 0.0, options.window or 0, each, step, first, stream,
        _SCRATCH.take(device, stream, needed), *out,
    )  # fmt: skip


def _dense_sinks(sinks: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The layers' sinks in float32. Where they are not, two launches convert those of all layers."""
    if all(sink.dtype == torch.float32 and sink.is_contiguous() and not sink.requires_grad for sink in sinks):
        return sinks
    return torch.stack([sink.detach() for sink in sinks]).to(torch.float32).unbind()
