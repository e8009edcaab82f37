"""CUDA graphs of a decode step: real ones on a GPU, and on a CPU ones that behave alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from carve_kernels.hf import attention_patch
from carve_kernels.hf.session import forward_tracker, recording

# Operators that wait for the device, which a stream refuses while a graph is captured.
_WAITING = ("aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default")


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def pool_bytes() -> int:
    """The memory in the pools of all CUDA graphs."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))


class FakeGraph(TorchDispatchMode):
    """Records operators on the CPU; at the end of the capture memory is as it was before, as after a capture on a GPU.

    `replay` runs them again, with the tensors of the capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if str(function) in _WAITING:
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")
        schema = function._schema.arguments
        named = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
        for argument in schema:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_in(named.get(argument.name)):
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    self._before.setdefault(address(tensor), (whole, whole.clone()))
        output = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, output))
        return output

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for whole, before in self._before.values():
            whole.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, recorded in self.calls:
                operands = tensors_in((args, kwargs))
                given = {address(tensor) for tensor in operands}
                # A replay on a GPU is not counted as a write either.
                with torch.autograd._unsafe_preserve_version_counter(tuple(operands)):
                    output = function(*args, **kwargs)
                for target, values in zip(tensors_in(recorded), tensors_in(output), strict=True):
                    if address(target) not in given:
                        target.copy_(values)


class Graphs:
    """Captures calls into graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def capture(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        """A graph of a call, and what the call returned."""
        with torch.no_grad():
            if self.device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    return graph, call()
            with capturing(), FakeGraph() as fake:
                return fake, call()


@contextmanager
def capturing() -> Iterator[None]:
    """Whatever asks is told that operators go into a graph."""
    with ExitStack() as stack:
        for module in (attention_patch, recording, forward_tracker):
            stack.enter_context(mock.patch.object(module, "is_capturing", lambda _device: True))
        yield


class Operators(TorchDispatchMode):
    """Notes the operators that run, and the memory that they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._allocated: dict[int, tuple[StorageWeakRef, str]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        given = {address(tensor) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(output):
            if address(tensor) not in given:
                reference = StorageWeakRef(tensor.untyped_storage())
                self._allocated[address(tensor)] = reference, f"{function} {list(tensor.shape)}"
        return output

    def left(self) -> list[str]:
        """What still has memory that was allocated: the operator and the shape."""
        return [what for reference, what in self._allocated.values() if not reference.expired()]
