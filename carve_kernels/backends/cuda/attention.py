"""Attention of decode steps by CUDA kernels: one call attends and captures, and reads each key and value once."""

from __future__ import annotations

import torch
from torch import Tensor

from carve_kernels.backends import cuda
from carve_kernels.backends.cuda import plan
from carve_kernels.backends.native.limits import capture_limit, dense, dense_key_limit
from carve_kernels.backends.native.scratch import Memory, ScratchNeeds
from carve_kernels.types import Attended, Capture, CaptureOptions

_HALVES = (torch.bfloat16, torch.float16)
# The kernels load vectors of 16 bytes.
_VECTOR = 16
_FIX = "use backend='auto'"


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: object,
    output: Tensor | None = None,
    out: Capture | None = None,
) -> str | None:
    """Why these arguments cannot be served, or None."""
    if output is not None and output.stride(3) != 1:
        return f"output has stride {output.stride(3)} in its last dimension, this backend serves 1; {_FIX}"
    # Two elements are stored at a time.
    if output is not None and not _starts_at(output, 4, axes=2):
        return f"output has heads that do not start at multiples of 4 bytes; {_FIX}"
    if reason := capture_limit(query, key, out) or limit(query, key, value):
        return reason
    return cuda.foreign(query.device.index) if query.device.type == "cuda" else None


def limit(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why a GPU that the kernels are for cannot serve these tensors, or None; a compiler can read it."""
    if query.shape[2] != 1:
        return f"query has other than one row for each entry of the batch, as a prefill has; {_FIX}"
    if query.dtype not in _HALVES:
        return f"query is {query.dtype}, this backend serves bfloat16 and float16; {_FIX}"
    for name, size in (("query", query.shape[3]), ("value", value.shape[3])):
        if size % 8 or not 0 < size <= plan.MOST_SIZE:
            wanted = f"multiples of 8 up to {plan.MOST_SIZE}"
            return f"{name} has heads of {size} elements, this backend serves {wanted}; {_FIX}"
    if torch.is_grad_enabled() and value.requires_grad:
        return f"value requires a gradient, which this backend does not compute; {_FIX}"
    if reason := dense_key_limit(key):
        return reason
    if value.stride(3) != 1:
        return (
            f"value has stride {value.stride(3)} in its last dimension, this backend serves 1; use value.contiguous()"
        )
    for name, tensor in (("key", key), ("value", value)):
        if not _starts_at(tensor, _VECTOR):
            return f"{name} has rows that do not start at multiples of {_VECTOR} bytes; use {name}.contiguous()"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    options: CaptureOptions,
    *,
    output: Tensor | None = None,
    out: Capture | None = None,
) -> Attended:
    """Attended(output, capture); see `carve_kernels.attention`."""
    if output is None:
        output = query.new_empty(*query.shape[:3], value.shape[3])
    out = out or Capture.empty(query, tokens, options.heads)
    batch, query_heads, _, size = query.shape
    needs = scratch_needs(
        batch=batch, query_heads=query_heads, key_heads=key.shape[1], keys=key.shape[2], size=size,
        value_size=value.shape[3], tokens=tokens.shape[1],
    )  # fmt: skip
    scale, mask, positions, softcap, window, sink, _, heads = options
    attention_operator()(
        query, key, value, tokens, None, mask, positions, None if sink is None else dense(sink), scale, softcap or 0.0,
        window or 0, heads == "each", None, 0, *Memory.new(needs, query.device), output, *out,
    )  # fmt: skip
    return Attended(output, out)


def attention_operator() -> torch._ops.OpOverload:
    """The operator that attends and captures."""
    return cuda.operators.attend_layer.default


def scratch_needs(**sizes: int) -> ScratchNeeds:
    """The scratch of a call with the arguments of `plan.attention_plan`."""
    divided = plan.attention_plan(**sizes)
    return ScratchNeeds(divided.scratch_bytes, divided.tickets)


def _starts_at(tensor: Tensor, multiple: int, *, axes: int = 3) -> bool:
    """Whether all that the first axes have starts at a multiple of some bytes."""
    width = tensor.element_size()
    # A compiler knows no addresses; the operator refuses what starts elsewhere, and no cache does.
    if not torch.compiler.is_compiling() and tensor.data_ptr() % multiple:
        return False
    return all(tensor.shape[axis] <= 1 or tensor.stride(axis) * width % multiple == 0 for axis in range(axes))
