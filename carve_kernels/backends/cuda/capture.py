"""Capture by CUDA kernels for up to 8 rows: two launches for all layers, neither of which reads a key twice."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

import torch

from carve_kernels.backends.cuda import foreign
from carve_kernels.backends.cuda.plan import LAYERS_AT_ONCE, MOST_ROWS, MOST_SIZE, scratch_bytes
from carve_kernels.backends.cuda.stream import stream_of
from carve_kernels.types import Capture

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class _Scratch(threading.local):
    """Memory that the launches of one stream hand over in, kept for each thread, device and stream.

    Two threads on one stream may not share it, since the launches of their calls can interleave. What is outgrown, or
    was a thread's that has ended, goes back to torch's allocator, which reuses it in the order of its stream.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.device, int], torch.Tensor] = {}

    def take(self, device: torch.device, stream: int, needed: int) -> torch.Tensor:
        """At least so many bytes of any value."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A graph is replayed on any stream and beside other calls, so it gets memory of its own pool.
            return torch.empty(needed, dtype=torch.uint8, device=device)
        kept = self.kept.get((device, stream))
        if kept is None or kept.numel() < needed:
            # A tensor made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                kept = torch.empty(1 << (needed - 1).bit_length(), dtype=torch.uint8, device=device)
            self.kept[device, stream] = kept
        return kept


_SCRATCH = _Scratch()


def supports(
    query: torch.Tensor, key: torch.Tensor, _tokens: torch.Tensor, *, out: Capture | None = None, **_options: Any
) -> str | None:
    """Why these arguments cannot be served, or None."""
    if query.dtype not in _FLOATS:
        return f"query is {query.dtype}, this room serves float32, float16 and bfloat16; use backend='reference'"
    if not query.shape[1]:
        return "query has no heads; use backend='reference'"
    if query.shape[2] > MOST_ROWS:
        return f"query has {query.shape[2]} rows, this room serves up to {MOST_ROWS}; use backend='triton'"
    if query.shape[3] > MOST_SIZE:
        return f"heads have {query.shape[3]} elements, this room serves up to {MOST_SIZE}; use backend='reference'"
    if key.stride(3) != 1 and key.shape[3] > 1:
        return f"the elements of a key are {key.stride(3)} apart and not side by side; use key.contiguous()"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "query or key requires a gradient, which this room does not have; use backend='reference'"
    if out is not None and any(part.dtype != torch.float32 for part in out):
        return "out is float64, this room writes torch.float32; use backend='reference'"
    return foreign(query.device.index) if query.device.type == "cuda" else None


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
    if out is None:
        batch, query_heads, rows, _ = query.shape
        middle = (query_heads,) if heads == "each" else ()
        places = ((batch, *middle, rows, tokens.shape[1]), (batch, rows), (batch, rows))
        out = Capture(*(query.new_empty(shape, dtype=torch.float32) for shape in places))
    _launch(
        [query], [key], tokens, mask, positions, [] if sink is None else [sink],
        None if lse is None else _dense(lse), scale, softcap, window, heads == "each", None, 0, out,
    )  # fmt: skip
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
    if len({(one.shape, other.shape, one.dtype, one.device) for one, other in zip(query, key, strict=True)}) > 1:
        return False
    for layer in range(len(query)):
        if supports(query[layer], key[layer], tokens, out=out) is not None:
            return False
    _launch(query, key, tokens, mask, positions, sink, None, scale, softcap, window, False, step, first, out)
    return True


def _launch(
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    sink: Sequence[torch.Tensor],
    lse: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    each: bool,
    step: torch.Tensor | None,
    first: int,
    out: Capture,
) -> None:
    batch, query_heads, rows, _ = query[0].shape
    device = query[0].device
    stream = stream_of(device)
    needed = scratch_bytes(
        layers=min(len(query), LAYERS_AT_ONCE), batch=batch, query_heads=query_heads, rows=rows, keys=key[0].shape[2],
        tokens=tokens.shape[1], lse=lse is not None, each=each,
    )  # fmt: skip
    torch.ops.carve_kernels.capture_cuda.default(
        query, key, tokens, mask, positions, _dense_sinks(sink), lse, scale, softcap or 0.0, window or 0,
        each, step, first, stream, _SCRATCH.take(device, stream, needed), *out,
    )  # fmt: skip


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _dense_sinks(sinks: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The layers' sinks in float32: nothing to do where they are, else two launches for all layers and not for each."""
    if all(sink.dtype == torch.float32 and sink.is_contiguous() and not sink.requires_grad for sink in sinks):
        return sinks
    return torch.stack([sink.detach() for sink in sinks]).to(torch.float32).unbind()
