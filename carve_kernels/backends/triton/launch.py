"""Kernels that are compiled once and then launched directly, with alignment hints from the host.

Triton's launcher inspects every argument of every call to choose a compiled kernel: about ten times the cost of
`torch.empty`, and for one captured row more than the kernel itself. Here a kernel depends on the dtypes of its
arguments alone, so that a short signature finds the compiled one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton

# The alignment of a load of 128 bits.
VECTOR_BYTES = 16


class Several(NamedTuple):
    """Tensors of one dtype that a kernel gets as one tuple, inspected once for all their launches."""

    tensors: tuple[torch.Tensor, ...]
    addresses: tuple[int, ...]
    kind: tuple[Any, ...]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Several:
        addresses = tuple([one.data_ptr() for one in tensors])
        # Triton specialises pointers in a tuple by alignment, even where the parameter forbids it.
        return cls(tuple(tensors), addresses, (tensors[0].dtype, *[one % VECTOR_BYTES == 0 for one in addresses]))


class Kernel:
    """A kernel and its compiled versions; a decorator instead of `triton.jit`.

    The parameters are, in this order: pointers (tensors, `Several` of them, or None; their names end in `_ptr` or
    `_ptrs`), numbers (with a type as annotation, such as `tl.int64`, or tuples of integers without one) and
    constants (`tl.constexpr`).
    """

    def __init__(self, function: Callable[..., None]) -> None:
        parameters = inspect.signature(function).parameters.values()
        runtime = [one for one in parameters if "constexpr" not in str(one.annotation)]
        numbers = [one for one in runtime if not one.name.endswith(("_ptr", "_ptrs"))]
        self._tuples = [index for index, one in enumerate(numbers) if one.annotation is inspect.Parameter.empty]
        # No value of an argument selects another kernel: neither 1, nor a multiple of 16, nor an aligned pointer.
        self.jit = triton.jit(function, do_not_specialize=[one.name for one in runtime])
        self._interpreted = not isinstance(self.jit, triton.JITFunction)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        pointers: tuple[torch.Tensor | Several | None, ...],
        numbers: tuple[int | float | tuple[int, ...], ...],
        constants: tuple[Any, ...],
        *,
        device: torch.device,
        warps: int,
        stages: int,
        registers: int | None = None,
        overlaps: bool = False,
    ) -> None:
        """Launch on the current stream of the tensors' device; the first launch of a signature compiles.

        `registers` is the most that a thread may use on NVIDIA's GPUs: by default their assembler aims at an occupancy
        and spills a few bytes for it. `overlaps`: the kernel may start before the one before it has ended, and waits
        for it itself.
        """
        if self._interpreted:
            self.jit[grid](*map(_argument, pointers), *numbers, *constants)
            return
        addresses: list[Any] = []
        signature: list[Any] = [device, constants, warps, stages, overlaps]
        for pointer in pointers:
            if pointer is None:
                addresses.append(None)
                signature.append(None)
            elif type(pointer) is Several:
                addresses.append(pointer.addresses)
                signature.append(pointer.kind)
            else:
                addresses.append(pointer.data_ptr())  # type: ignore[union-attr]
                signature.append(pointer.dtype)  # type: ignore[union-attr]
        signature += [_kind_of_integers(numbers[index]) for index in self._tuples]
        compiled = self._compiled.get(tuple(signature))
        with on(device):
            if compiled is None:
                # The default of fusion differs between versions of Triton, which warn without it.
                options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
                if registers is not None and triton.runtime.driver.active.get_current_target().backend == "cuda":
                    options["maxnreg"] = registers
                if overlaps:
                    options["launch_pdl"] = True
                self._compiled[tuple(signature)] = self.jit[grid](
                    *map(_argument, pointers), *numbers, *constants, **options
                )
            else:
                # Addresses as plain integers: for a tensor, the driver is queried for its device every time.
                compiled[grid](*addresses, *numbers, *constants)


def alignment(addresses: Iterable[int], strides: Iterable[int], element_size: int) -> int:
    """The largest power of two, at most 16, that divides every address and every stride, in bytes.

    Without a hint, loads have 16 bits instead of 128; a wrong hint reads wrong bytes or faults.
    """
    merged = VECTOR_BYTES
    for address in addresses:
        merged |= address
    for stride in strides:
        merged |= stride * element_size
    return merged & -merged


def strides_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides, with 0 for dimensions of one element, whose stride is not used."""
    return _strides(tensor.shape, tensor.stride())


# Most tensors of a step have the shapes and strides of the step before.
@functools.lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([stride if size > 1 else 0 for stride, size in zip(strides, shape, strict=True)])


def _argument(pointer: torch.Tensor | Several | None) -> Any:
    return pointer.tensors if isinstance(pointer, Several) else pointer


def _kind_of_integers(numbers: Any) -> tuple[Any, ...]:
    """What selects another kernel for a tuple of integers: a 1, multiples of 16, and values of 64 bits."""
    return tuple([(one == 1, one % 16 == 0, -(2**31) <= one < 2**31) for one in numbers])


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the device current, which Triton launches on; a null context where it is already."""
    if device.index is None or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
