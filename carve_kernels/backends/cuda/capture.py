"""Capture by CUDA kernels: one call launches them for all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carve_kernels.backends import cuda
from carve_kernels.backends.cuda import plan
from carve_kernels.backends.native.limits import capture_limit, dense_key_limit, is_one_call, operands
from carve_kernels.backends.native.scratch import Memory, ScratchNeeds
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot


def supports(query: Tensor, key: Tensor, *_: object, out: Capture | None = None) -> str | None:
    """Why these arguments cannot be served, or None."""
    if reason := capture_limit(query, key, out) or dense_key_limit(key):
        return reason
    if query.shape[3] > plan.MOST_SIZE:
        return (
            f"heads have {query.shape[3]} elements, this backend serves up to {plan.MOST_SIZE}; use backend='reference'"
        )
    return cuda.foreign(query.device.index) if query.device.type == "cuda" else None


def forward(
    query: Tensor, key: Tensor, tokens: Tensor, options: CaptureOptions, *, out: Capture | None = None
) -> Capture:
    """Capture(maps, mass, entropy) in float32; see `carve_kernels.capture`."""
    out = out or Capture.empty(query, tokens, options.heads)
    call(Layers.single(query, key, options.sink), tokens, options, Slot(out))
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
    if not is_one_call(supports, layers, slot.out):
        return False
    call(layers, tokens, options, slot, span, memory)
    return True


def layers_operator() -> torch._ops.OpOverload:
    """The operator that captures several layers."""
    return cuda.operators.capture_layers.default


def scratch_needs(_device: torch.device, **sizes: Any) -> ScratchNeeds:
    """The scratch of a call of these sizes; see `plan.scratch_needs`."""
    return plan.scratch_needs(**sizes)


def call(
    layers: Layers,
    tokens: Tensor,
    options: CaptureOptions,
    slot: Slot,
    span: Tensor | None = None,
    memory: Memory | None = None,
) -> None:
    """Call the operator, with memory of its own if there is none."""
    if memory is None:
        query, key = layers.query[0], layers.key[0]
        batch, query_heads, rows, size = query.shape
        sizes = (len(layers.query), batch, query_heads, key.shape[1], rows, key.shape[2], size, tokens.shape[1])
        needs = plan.most_scratch(*sizes, query.element_size(), lse=options.lse is not None)
        memory = Memory.new(needs, query.device)
    layers_operator()(*operands(layers, tokens, options, slot, span, memory))
