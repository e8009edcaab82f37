"""Capture by the compiled operator: the keys are read once for each block of rows, in their dtype and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from carve_kernels.backends.native.limits import capture_limit, dense_key_limit, is_one_call, operands
from carve_kernels.backends.native.scratch import NONE, Memory
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot


def supports(query: Tensor, key: Tensor, *_: object, out: Capture | None = None) -> str | None:
    """Why these arguments cannot be served, or None."""
    return capture_limit(query, key, out) or dense_key_limit(key)


def forward(
    query: Tensor, key: Tensor, tokens: Tensor, options: CaptureOptions, *, out: Capture | None = None
) -> Capture:
    """Capture(maps, mass, entropy) in float32; see `carve_kernels.capture`."""
    is_direct = out is not None and out.maps.stride(-1) == 1
    written = out if out is not None and is_direct else Capture.empty(query, tokens, options.heads)
    call(Layers.single(query, key, options.sink), tokens, options, Slot(written))
    if out is None or out is written:
        return written
    for target, values in zip(out, written, strict=True):
        target.copy_(values)
    return out


def forward_layers(
    layers: Layers,
    tokens: Tensor,
    options: CaptureOptions,
    slot: Slot,
    span: Tensor | None = None,
    memory: Memory | None = None,
) -> bool:
    """Capture several layers into one step of buffers by one call; False where the layers differ too much for that."""
    if slot.out.maps.stride(-1) != 1 or not is_one_call(supports, layers, slot.out):
        return False
    call(layers, tokens, options, slot, span, memory)
    return True


def layers_operator() -> torch._ops.OpOverload:
    """The operator that captures several layers."""
    return torch.ops.carve_kernels.capture_layers.default


def call(
    layers: Layers,
    tokens: Tensor,
    options: CaptureOptions,
    slot: Slot,
    span: Tensor | None = None,
    memory: Memory | None = None,
) -> None:
    """Call the operator; it ignores `memory` and `span`."""
    unused = memory or Memory.new(NONE, layers.query[0].device)
    layers_operator()(*operands(layers, tokens, options, slot, span, unused))
