"""Kernels that are compiled once and then launched directly, with alignment hints that the host derives.

Triton's own launcher looks at every argument of every call to find out which compiled kernel it needs: about ten times
the cost of `torch.empty`, which for one captured row is more than the kernel takes. Here nothing of an argument matters
but its dtype, so that a short key finds the compiled kernel.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton

# What a load of 128 bits needs of its address.
VECTOR_BYTES = 16

_Pointer = torch.Tensor | tuple[torch.Tensor, ...] | None


class Kernel:
    """A kernel and what it was compiled to; a decorator instead of `triton.jit`.

    The parameters are, in this order: pointers (tensors, tuples of tensors of one dtype, or None; their names end in
    `_ptr` or `_ptrs`), numbers (with a type as annotation, such as `tl.int64`, or tuples of integers without one) and
    constants (`tl.constexpr`).
    """

    def __init__(self, function: Callable[..., None]) -> None:
        parameters = inspect.signature(function).parameters.values()
        runtime = [one for one in parameters if "constexpr" not in str(one.annotation)]
        numbers = [one for one in runtime if not one.name.endswith(("_ptr", "_ptrs"))]
        self._tuples = [place for place, one in enumerate(numbers) if one.annotation is inspect.Parameter.empty]
        # No value of an argument makes another kernel: neither 1, nor a multiple of 16, nor an aligned pointer.
        self.jit = triton.jit(function, do_not_specialize=[one.name for one in runtime])
        self._interpreted = not isinstance(self.jit, triton.JITFunction)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        pointers: tuple[_Pointer, ...],
        numbers: tuple[int | float | tuple[int, ...], ...],
        constants: tuple[Any, ...],
        *,
        device: torch.device,
        warps: int,
        stages: int,
    ) -> None:
        """Launch on the current stream of the tensors' device; the first launch of a key compiles."""
        if self._interpreted:
            self.jit[grid](*pointers, *numbers, *constants)
            return
        addresses = [_address(one) for one in pointers]
        key = (device, constants, warps, stages, *map(_kind, pointers, addresses))
        for place in self._tuples:
            key += (_kind_of_integers(numbers[place]),)
        compiled = self._compiled.get(key)
        with on(device):
            if compiled is None:
                # The default of fusion differs between versions of Triton, and leaving it out warns.
                options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
                self._compiled[key] = self.jit[grid](*pointers, *numbers, *constants, **options)
            else:
                # Addresses as plain integers: of a tensor the driver is asked each time where it lives.
                compiled[grid](*addresses, *numbers, *constants)


def alignment(addresses: Iterable[int], strides: Iterable[int], element_size: int) -> int:
    """The largest power of two, at most 16, that divides every address and every stride, in bytes.

    A hint that is missing costs 16-bit loads instead of 128-bit ones; a false one reads wrong bytes or faults.
    """
    merged = VECTOR_BYTES
    for address in addresses:
        merged |= address
    for stride in strides:
        merged |= stride * element_size
    return merged & -merged


def strides_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides, with 0 for dimensions of one element: no index moves along those, so any stride may stand there."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _address(pointer: _Pointer) -> Any:
    if isinstance(pointer, tuple):
        return tuple([one.data_ptr() for one in pointer])
    return None if pointer is None else pointer.data_ptr()


def _kind(pointer: _Pointer, address: Any) -> Any:
    """What of a pointer argument makes another kernel."""
    if isinstance(pointer, tuple):
        # Triton specialises what stands in a tuple, whatever it was told of the parameter.
        return pointer[0].dtype, *[one % VECTOR_BYTES == 0 for one in address]
    return None if pointer is None else pointer.dtype


def _kind_of_integers(numbers: Any) -> tuple[Any, ...]:
    """What of a tuple of integers makes another kernel: a 1, multiples of 16, and what needs 64 bits."""
    return tuple([(one == 1, one % 16 == 0, -(2**31) <= one < 2**31) for one in numbers])


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The device made current, which Triton launches on; nothing where it is already."""
    if device.index is None or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
