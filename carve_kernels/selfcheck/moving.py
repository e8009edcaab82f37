"""Copies of arguments and results on another device, with their memory layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch


def move(value: Any, device: torch.device | str) -> Any:
    """A copy with every tensor on a device: same strides, and the same values between and after its elements.

    `Tensor.to` would pack a slice of a longer cache, and lose the poison after it.
    """
    if isinstance(value, torch.Tensor):
        whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.detach().untyped_storage())
        copy = whole.to(device, copy=True).as_strided(value.shape, value.stride(), value.storage_offset())
        return copy.requires_grad_(value.requires_grad)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, device) for item in value)
    if isinstance(value, dict):
        return {name: move(item, device) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: move(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors inside a value, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def same_bits(one: Any, other: Any) -> bool:
    """Whether two values hold the same tensors to the bit, NaN included."""
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(left.shape == right.shape and torch.equal(_bytes(left), _bytes(right)) for left, right in pairs)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
