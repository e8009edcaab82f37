"""What the kernels of several backends do not serve, and what precedes their launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from carve_kernels.backends.native.scratch import Memory
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def capture_limit(query: torch.Tensor, key: torch.Tensor, out: Capture | None) -> str | None:
    """Why no kernel captures these tensors, or None."""
    if query.dtype not in _FLOATS:
        return f"query is {query.dtype}, this backend serves float32, float16 and bfloat16; use backend='reference'"
    if not query.shape[1]:
        return "query has no heads; use backend='reference'"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "query or key requires a gradient, which this backend does not compute; use backend='reference'"
    if out is not None and {out.maps.dtype, out.mass.dtype, out.entropy.dtype} != {torch.float32}:
        return "out is float64, this backend writes torch.float32; use backend='reference'"
    return None


def dense_key_limit(key: torch.Tensor) -> str | None:
    """Why a kernel that loads whole vectors cannot read a key, or None."""
    if key.stride(3) != 1 and key.shape[3] > 1:
        return f"key has stride {key.stride(3)} in its last dimension, this backend serves 1; use key.contiguous()"
    return None


def contrast_limit(task: torch.Tensor, general: torch.Tensor) -> str | None:
    """Why no kernel contrasts these maps, or None."""
    for name, maps in (("task", task), ("general", general)):
        if maps.dtype != torch.float32:
            return f"{name} is {maps.dtype}, this backend serves torch.float32; use backend='reference'"
        if maps.requires_grad and torch.is_grad_enabled():
            return f"{name} requires a gradient, which this backend does not compute; use backend='reference'"
    return None


def is_one_call(supports: Callable[..., str | None], layers: Layers, out: Capture) -> bool:
    """Whether one call captures all layers: the backend serves each, and their shapes, dtypes and devices agree."""
    kinds = set()
    for query, key in zip(layers.query, layers.key, strict=True):
        kinds.add((query.shape, key.shape, query.dtype, query.device))
        if len(kinds) > 1 or supports(query, key, out=out) is not None:
            return False
    return True


def operands(
    layers: Layers, tokens: torch.Tensor, options: CaptureOptions, slot: Slot, span: torch.Tensor | None, memory: Memory
) -> list[Any]:
    """The arguments of the operator `capture_layers`."""
    scale, mask, positions, softcap, window, _, lse, heads = options
    query, key, sink = layers
    known = None if lse is None else dense(lse)
    return [
        query, key, tokens, span, mask, positions, dense_sinks(sink), known, scale, softcap or 0.0, window or 0,
        heads == "each", slot.step, slot.first, *memory, *slot.out,
    ]  # fmt: skip


def dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def dense_sinks(sinks: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The layers' sinks in float32. Where they are not, two launches convert those of all layers."""
    if all(sink.dtype == torch.float32 and sink.is_contiguous() and not sink.requires_grad for sink in sinks):
        return sinks
    return torch.stack([sink.detach() for sink in sinks]).to(torch.float32).unbind()
