"""Weights of layers and steps on a device."""

from __future__ import annotations

import functools

import torch

# What CUDA graphs hold the addresses of.
_IN_GRAPHS: dict[tuple[tuple[float, ...], torch.device], torch.Tensor] = {}


def on_device(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Weights in float64, cached: the host waits for each copy to a device, which a CUDA graph cannot contain."""
    tensor = _copied(weights, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _IN_GRAPHS[weights, device] = tensor
    return tensor


@functools.lru_cache(maxsize=1024)
def _copied(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64, device="cpu").to(device)
