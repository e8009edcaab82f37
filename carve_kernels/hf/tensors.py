"""Tensors of any kind as plain ones: what a quantised, packed, sparse or wrapped weight consists of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from carve_kernels.hf.model import is_spread

_FACTS = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout)
_SCALES = {
    torch.per_tensor_affine: ("q_scale", "q_zero_point"),
    torch.per_channel_affine: ("q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"),
    torch.per_channel_affine_float_qparams: ("q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"),
}


class Unidentified(Exception):
    """A model that cannot be told from another one: weights that cannot be read, code of somebody's own; the reason."""


def plain(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The dense tensors that a value of a model's state consists of, each under a name that says all else about it.

    A value is a tensor of any kind, or a list, tuple or mapping of such and of numbers and texts. Raises Unidentified
    for another one, and for a tensor whose numbers are not here.
    """
    try:
        yield from _plain(name, value)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, TypeError, AttributeError) as error:
        # How a tensor of a class of its own fails is its own affair.
        raise Unidentified(f"{name} is {type(value).__name__}, which cannot be read ({error})") from error


def _plain(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield from _of_tensor(name, value)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from plain(f"{name}[{key!r}]", part)
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        for place, part in enumerate(value):
            yield from plain(f"{name}[{place}]", part)
    elif isinstance(value, _FACTS):
        yield f"{name}={value!r}", torch.empty(0)
    else:
        raise Unidentified(f"{name} is {type(value).__name__}, which cannot be read")


def _of_tensor(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if value.device.type == "meta":
        raise Unidentified(f"{name} is parked elsewhere")
    if is_spread(value):
        raise Unidentified(f"parts of {name} are in other processes")
    if hasattr(value, "__tensor_flatten__"):
        inner, told = value.__tensor_flatten__()
        kind = f"{name}:{type(value).__module__}.{type(value).__qualname__}{list(value.shape)}{value.dtype}"
        # A repr with an address in it makes another identity of each process, never one of two models.
        for part in inner:
            yield from plain(f"{kind}({told!r}).{part}", getattr(value, part))
    elif value.is_quantized:
        for fact in _SCALES[value.qscheme()]:
            yield from plain(f"{name}.{fact}", getattr(value, fact)())
        yield f"{name}:{value.dtype}", value.int_repr()
    elif value.layout != torch.strided:
        yield f"{name}:{value.layout}", value.detach().to_dense()
    elif value.numel() and not value.untyped_storage().nbytes():
        raise Unidentified(f"{name} is parked elsewhere")
    else:
        yield name, value
