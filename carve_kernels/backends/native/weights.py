"""Weights of layers and steps on a device."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=1024)
def on_device(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Weights in float64, cached: the host waits for each copy to a device."""
    return torch.tensor(weights, dtype=torch.float64, device="cpu").to(device)
