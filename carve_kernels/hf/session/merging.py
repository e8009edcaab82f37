"""One AttentionMaps of a prompt from parts: those of the layers of each device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from carve_kernels.maps import AttentionMaps


def merge_layers(parts: Sequence[AttentionMaps]) -> AttentionMaps:
    """Maps of different layers of one prompt, in ascending order of the layers, on the device of the first part.

    A last step that was interrupted between two devices is in some of the parts only, and is dropped.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    device, steps = first.values.device, min((part.steps for part in parts), key=len)
    places = sorted((layer, part, index) for part, maps in enumerate(parts) for index, layer in enumerate(maps.layers))
    missing: list[Any] = [part.missing for part in parts]
    if any(each is not None for each in missing):
        missing = [
            torch.zeros_like(part.values, dtype=torch.bool) if each is None else each
            for part, each in zip(parts, missing, strict=True)
        ]
    merged: dict[str, Any] = {}
    for field in fields(first):
        tensors = missing if field.name == "missing" else [getattr(part, field.name) for part in parts]
        # Those that have layers have steps and rows as well: [B, L, T, R, ...].
        if isinstance(tensors[0], torch.Tensor) and tensors[0].ndim >= 4:
            moved = [tensor[:, :, : len(steps)].to(device) for tensor in tensors]
            merged[field.name] = torch.stack([moved[part][:, index] for _, part, index in places], 1)
    return replace(first, **merged, layers=tuple(layer for layer, _, _ in places), steps=steps)
