"""A simulated MPS device of Apple: its tensors report that device and use the CPU's memory.

It raises the errors that stop a program on a real one before any kernel runs: float64, tensors of two devices in one
operator, and operators without a kernel. It does not test the numbers of MPS kernels.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchgen
import yaml
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from carve_kernels.ops import layer_operator

DEVICE = torch.device("mps:0")
# Their numbers in c10::DeviceType.
_MPS, _META = 13, 14
# The message of torch.
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
# Operators that accept tensors of two devices.
_CROSSING = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
_KERNELS = ("MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


class _OnMps(torch.Tensor):
    """A wrapper of a CPU tensor."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        if inner.dtype == torch.float64:
            raise TypeError(NO_FLOAT64)
        wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner} on {DEVICE}"

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def mps() -> Iterator[torch.device]:
    """A context in which the yielded device can hold tensors."""
    # C++ calls a device's guard before every operation; that of "meta" does nothing and exists in every build.
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[_MPS] = guards[_MPS], guards[_META]
    try:
        # A CPU needs no synchronisation.
        with _Calls(), _Operators(), mock.patch("torch.Event"):
            yield DEVICE
    finally:
        guards[_MPS] = before


class _Calls(TorchFunctionMode):
    """Functions that torch does not dispatch to a tensor subclass, or that need the device's kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist:
            return func(*_inside(args))
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            tensor = func(*_inside(args), **kwargs)
            return tensor if device is None else tensor.to(device)
        if func is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=args[0].dtype).to(args[0].device)
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(args[0], _OnMps):
            return _OnMps(func(*_inside(args), **_inside(kwargs)))
        return func(*args, **kwargs)


def _inside(values: Any) -> Any:
    return tree_map_only(_OnMps, lambda leaf: leaf.inner, values)


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    there = [leaf for leaf in given if isinstance(leaf, _OnMps)]
    here = [leaf for leaf in given if not isinstance(leaf, _OnMps)]
    if there and func.namespace == "carve_kernels":
        return _ours(func, args, kwargs)
    requested = kwargs.get("device")
    if there and func.overloadpacket.__name__ not in _CROSSING:
        _refuse(func, here)
    target = bool(there) if requested is None else torch.device(requested).type == "mps"
    if target and requested is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*_inside(args), **_inside(kwargs))
    if func is torch.ops.aten.copy_.default:
        return given[0]
    known = {id(leaf.inner): leaf for leaf in there}

    def back(leaf: torch.Tensor) -> torch.Tensor:
        return known[id(leaf)] if id(leaf) in known else _OnMps(leaf) if target else leaf

    return tree_map_only(torch.Tensor, back, found)


def _ours(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator of this package in Python, with its calls checked as well."""
    name = func.name()
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "MPS"):
        raise NotImplementedError(f"Could not run '{name}' with arguments from the 'MPS' backend")
    with _Operators():
        return getattr(layer_operator, f"_{name.removeprefix('carve_kernels::')}")(*args, **kwargs)


def _refuse(func: Any, here: list[torch.Tensor]) -> None:
    if any(leaf.ndim for leaf in here):
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found mps and cpu")
    if not _has_kernel(func.name().removeprefix("aten::")):
        raise NotImplementedError(f"The operator '{func.name()}' is not currently implemented for the MPS device")


@functools.cache
def _has_kernel(name: str) -> bool:
    entry = _table()[name]
    if "structured_delegate" in entry:
        return _has_kernel(entry["structured_delegate"])
    kinds = {
        kind.strip() for kinds in entry.get("dispatch", {"CompositeImplicitAutograd": ""}) for kind in kinds.split(",")
    }
    return not kinds.isdisjoint(_KERNELS)


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    """Torch's list of its operators and of the devices with a kernel for each."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].split("(")[0]: entry for entry in entries}
