"""Tensors, NumPy arrays and nested lists of numbers as tensors."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from carve_kernels import checks

_KINDS = "biuf"
_MANY = (list, tuple, numpy.ndarray, torch.Tensor)


def as_tensor(name: str, value: Any, *, floating: bool = False, like: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor of an argument: tensors unchanged, arrays in their dtype, lists as float32, int64 or bool.

    With `floating` also lists of integers are float32. Arrays and lists go to the device of `like`. Raises TypeError
    for anything else, and ValueError for lists of different lengths.
    """
    if isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, _MANY):
        raise TypeError(f"{name}: expected a tensor, a NumPy array or a list of numbers, got {checks.describe(value)}")
    made = _part(name, value)
    if floating and not isinstance(value, numpy.ndarray) and not made.is_floating_point():
        made = made.float()
    return made if like is None else made.to(like.device)


def as_array(name: str, value: Any) -> numpy.ndarray:
    """A NumPy array of an argument: arrays unchanged, tensors from any device, lists in the dtype that NumPy takes.

    Raises what `as_tensor` raises.
    """
    if isinstance(value, numpy.ndarray) and value.dtype.kind in _KINDS:
        return value
    made = as_tensor(name, value)
    if not isinstance(value, torch.Tensor):
        return numpy.asarray(value)
    plain = made.detach().cpu()
    # NumPy has no bfloat16.
    array: numpy.ndarray = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return array


def _part(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, numpy.ndarray):
        return _of_array(name, value)
    if not any(isinstance(item, _MANY) for item in value):
        numbers = numpy.asarray(value)
        # Python's floats have no dtype that was chosen.
        return _of_array(name, numbers.astype(numpy.float32) if numbers.dtype == numpy.float64 else numbers)
    parts = []
    for index, item in enumerate(value):
        if not isinstance(item, _MANY):
            raise ValueError(f"{name}[{index}]: expected a list as other items of {name}, got {checks.describe(item)}")
        parts.append(_part(f"{name}[{index}]", item))
        if parts[-1].shape != parts[0].shape:
            raise ValueError(
                f"{name}[{index}]: expected shape {list(parts[0].shape)} as of {name}[0], got {list(parts[-1].shape)}"
            )
    return torch.stack(parts)


def _of_array(name: str, value: numpy.ndarray) -> torch.Tensor:
    if value.dtype.kind not in _KINDS:
        raise TypeError(f"{name}: expected numbers, got {checks.describe(value.tolist())}")
    # torch shares memory only with arrays that are writable, of this machine's byte order and not reversed.
    shared = value.flags.writeable and value.dtype.isnative and all(stride >= 0 for stride in value.strides)
    native = value.dtype.newbyteorder("=")
    return torch.from_numpy(value if shared else numpy.array(value, dtype=native, order="C"))
