"""What the kernels of several backends do not serve, and small steps before their launch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from carve_kernels.types import Capture, Layers

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
    pairs = list(zip(layers.query, layers.key, strict=True))
    is_alike = len({(query.shape, key.shape, query.dtype, query.device) for query, key in pairs}) == 1
    return is_alike and all(supports(query, key, out=out) is None for query, key in pairs)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float32).contiguous()
