"""The operator that captures several layers in one call: chosen once, then called without a look at its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from carve_kernels.backends import resolve
from carve_kernels.backends.native import schemas  # noqa: F401  (an operator is defined before it is implemented)
from carve_kernels.backends.native.scratch import Memory, ScratchNeeds, no_scratch
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot


class LayerOperator(NamedTuple):
    """How a backend captures the layers of a step.

    =======  ====================================================================================================
    backend  the name of the backend
    run      `run(query, key, tokens, span, mask, positions, sink, lse, scale, softcap, window, each, step, first,
             scratch, tickets, maps, mass, entropy)`, positional: the schema of `carve_kernels::capture_layers`.
             All layers of a call have the same shapes and dtypes, sinks are contiguous float32
    needs    `needs(layers=, batch=, query_heads=, key_heads=, rows=, keys=, size=, tokens=, element_bytes=,
             lse=False, aligned=True)`: the `ScratchNeeds` of such a call, never more for fewer layers
    =======  ====================================================================================================
    """

    backend: str
    run: Callable[..., None]
    needs: Callable[..., ScratchNeeds]


def layer_operator(
    backend: str, device: torch.device, *, dtype: torch.dtype, size: int, dense: bool = True
) -> LayerOperator:
    """The operator of a backend for queries and keys of a dtype and a head size on a device.

    `auto` takes the first backend that serves them; a backend requested by name serves or raises `BackendUnavailable`.
    `dense` says whether the elements of each key are neighbours in memory. Tensors that require a gradient are not
    served: detach them.
    """
    query = torch.empty(0, 1, 1, size, dtype=dtype, device=device)
    key = query if dense else torch.empty(0, 1, size, 2, dtype=dtype, device=device).transpose(2, 3)
    tokens = torch.empty(0, 0, dtype=torch.int32, device=device)
    return operator_of(resolve("capture", backend, device, query, key, tokens, CaptureOptions(1.0)), device)


def operator_of(module: Any, device: torch.device) -> LayerOperator:
    """The operator of a backend's module for the stage `capture`."""
    name = module.__name__.split(".")[-2]
    if hasattr(module, "layers_operator"):
        run = module.layers_operator()
    else:
        run = functools.partial(torch.ops.carve_kernels.capture_layers_in.default, backend=name)
    needs = functools.partial(module.scratch_needs, device) if hasattr(module, "scratch_needs") else no_scratch
    return LayerOperator(name, run, needs)


def _capture_layers_in(
    query: list[torch.Tensor], key: list[torch.Tensor], tokens: torch.Tensor, span: torch.Tensor | None,
    mask: torch.Tensor | None, positions: torch.Tensor | None, sink: list[torch.Tensor], lse: torch.Tensor | None,
    scale: float, softcap: float, window: int, each: bool, step: torch.Tensor | None, first: int,
    scratch: torch.Tensor, tickets: torch.Tensor, maps: torch.Tensor, mass: torch.Tensor, entropy: torch.Tensor,
    backend: str,
) -> None:  # fmt: skip
    heads: Literal["mean", "each"] = "each" if each else "mean"
    options = CaptureOptions(scale, mask, positions, softcap or None, window or None, None, lse, heads)
    slot = Slot(Capture(maps, mass, entropy), step, first)
    module = resolve("capture", backend, query[0].device, query[0], key[0], tokens, options)
    # Without scratch, a backend that needs some allocates it.
    memory = Memory(scratch, tickets) if scratch.numel() else None
    batched = getattr(module, "forward_layers", None)
    if batched is not None and batched(Layers(query, key, sink), tokens, options, slot, span, memory):
        return
    for layer in range(len(query)):
        call = (query[layer], key[layer], tokens, options._replace(sink=sink[layer] if sink else None))
        module = resolve("capture", backend, query[layer].device, *call)
        captured: Capture = module.forward(*call)
        for buffer, values in zip(slot.out, captured, strict=True):
            if step is None:
                buffer.copy_(values)
            else:
                buffer[:, first + layer].index_copy_(0, step.view(1), values.to(buffer.dtype)[None])


# On every device: the reference serves those that no other backend does.
torch.library.impl("carve_kernels::capture_layers_in", "default", _capture_layers_in)
