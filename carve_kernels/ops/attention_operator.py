"""Attention by the first backend that serves it, else by sdpa and capture; the operator of a session's decode steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from carve_kernels import checks
from carve_kernels.backends import FALLBACK, choose, resolve, warn_once
from carve_kernels.backends.native import schemas  # noqa: F401  (an operator is defined before it is implemented)
from carve_kernels.backends.native.scratch import NONE, ScratchNeeds
from carve_kernels.backends.reference import attention as reference
from carve_kernels.backends.reference.capture import visible_keys
from carve_kernels.ops.capture_gradient import needs_gradient, with_gradient
from carve_kernels.types import Attended, Capture, CaptureOptions

# Rows of a prefill whose mask over all keys is made at a time.
_ROWS = 256


class AttentionOperator(NamedTuple):
    """How a backend attends and captures in a decode step.

    ========  ==========================================================================================================
    backend   the name of the backend
    run       `run(query, key, value, tokens, span, mask, positions, sink, scale, softcap, window, each, step, first,
              scratch, tickets, output, maps, mass, entropy)`, positional: the schema of `carve_kernels::attend_layer`
    needs     `needs(batch=, query_heads=, key_heads=, keys=, size=, value_size=, tokens=)`: the `ScratchNeeds` of such
              a call, never more for fewer keys or tokens
    limit     `limit(query, key, value)`: why these tensors cannot be served, or None; a compiler can read it
    ========  ==========================================================================================================
    """

    backend: str
    run: Callable[..., None]
    needs: Callable[..., ScratchNeeds]
    limit: Callable[..., str | None]


def attention_operator(
    backend: str, device: torch.device, *, dtype: torch.dtype, size: int, value_size: int
) -> AttentionOperator | str:
    """The operator of a backend for one row of a dtype and head sizes on a device, or why it has none.

    `auto` takes the first backend that serves them; sdpa and capture are no operator.
    """
    query, value = (torch.empty(0, 1, 1, count, dtype=dtype, device=device) for count in (size, value_size))
    tokens = torch.empty(0, 0, dtype=torch.int32, device=device)
    module = choose("attention", backend, device, query, query, value, tokens, CaptureOptions(1.0))
    if isinstance(module, str):
        return module
    name = module.__name__.split(".")[-2]
    if hasattr(module, "attention_operator"):
        return AttentionOperator(name, module.attention_operator(), module.scratch_needs, module.limit)
    run = functools.partial(torch.ops.carve_kernels.attend_layer_in.default, backend=name)
    return AttentionOperator(name, run, lambda **_sizes: NONE, module.supports)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: torch.Tensor,
    options: CaptureOptions,
    backend: str,
    *,
    output: torch.Tensor | None = None,
    out: Capture | None = None,
) -> Attended:
    """Attended(output, capture) by a backend, or under `auto` by sdpa and capture; see `carve_kernels.attention`."""
    call = (query, key, value, tokens, options)
    module = choose("attention", backend, query.device, *call, output=output, out=out)
    if not isinstance(module, str):
        attended: Attended = module.forward(*call, output=output, out=out)
        return attended
    if backend != "auto":
        advice = f"use backend='auto', which calls {FALLBACK['attention']}"
        raise checks.BackendUnavailable(f"backend={backend!r}: {module}; {advice}")
    warn_once(module, f"attention is computed by {FALLBACK['attention']}, one after the other: {module}")
    return sdpa_and_capture(*call, output=output, out=out)


def sdpa_and_capture(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: torch.Tensor,
    options: CaptureOptions,
    *,
    output: torch.Tensor | None = None,
    out: Capture | None = None,
) -> Attended:
    """The output by scaled_dot_product_attention, the capture by the backend that `auto` takes for it."""
    captured = _captured(query, key, tokens, options, out)
    # Without a mask all rows go into one call.
    step = _ROWS if options.mask is not None or options.positions is not None else max(query.shape[2], 1)
    parts = [
        _output(query[:, :, rows], key, value, options.of_rows(rows))
        for rows in (slice(start, start + step) for start in range(0, query.shape[2], step))
    ]
    attended = torch.cat(parts, 2) if parts else query.new_empty(*query.shape[:3], value.shape[3])
    if output is None:
        return Attended(attended, captured)
    output.copy_(attended)
    return Attended(output, captured)


def _captured(
    query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor, options: CaptureOptions, out: Capture | None
) -> Capture:
    differentiable = needs_gradient(query, key, options.sink)
    tensors = (query.detach(), key.detach()) if differentiable else (query, key)
    module = resolve("capture", "auto", query.device, *tensors, tokens, options, out=out)
    if differentiable:
        return with_gradient(query, key, tokens, options, module, out)
    captured: Capture = module.forward(query, key, tokens, options, out=out)
    return captured


def _output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: CaptureOptions) -> torch.Tensor:
    if options.softcap is not None or options.sink is not None or not query.numel() or not key.numel():
        return reference.attend(query, key, value, options)
    visible, seen = visible_keys(options, key.shape[2]), reference.seen_keys(options, key.shape[2])
    if seen is not None:
        # A hidden NaN would reach the output: sdpa adds -inf to its logit, and multiplies its value by 0.
        key, value = (torch.where(seen[:, None, :, None], each, 0.0) for each in (key, value))
    batch, heads, rows, size = query.shape
    key_heads = key.shape[1]
    if rows != 1 or heads == key_heads:
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=options.scale, enable_gqa=heads != key_heads
        )
    else:
        # The heads of a group as rows of one head: keys are not repeated, whatever the mask.
        group = heads // key_heads
        folded, mask = query.reshape(batch, key_heads, group, size), visible
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(batch, key_heads, group, key.shape[2])
        attended = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=options.scale)
        attended = attended.reshape(batch, heads, 1, value.shape[3])
    # Of a row that sees nothing sdpa returns NaN, or anything.
    return attended if visible is None else attended.masked_fill(~visible.any(-1, keepdim=True), 0.0)


def _attend_layer_in(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: torch.Tensor, span: torch.Tensor | None,
    mask: torch.Tensor | None, positions: torch.Tensor | None, sink: torch.Tensor | None, scale: float, softcap: float,
    window: int, each: bool, step: torch.Tensor | None, first: int, scratch: torch.Tensor, tickets: torch.Tensor,
    output: torch.Tensor, maps: torch.Tensor, mass: torch.Tensor, entropy: torch.Tensor, backend: str,
) -> None:  # fmt: skip
    heads: Literal["mean", "each"] = "each" if each else "mean"
    options = CaptureOptions(scale, mask, positions, softcap or None, window or None, sink, None, heads)
    captured = attend(query, key, value, tokens, options, backend, output=output).capture
    for buffer, values in zip((maps, mass, entropy), captured, strict=True):
        if step is None:
            buffer.copy_(values)
        else:
            buffer[:, first].index_copy_(0, step.view(1), values.to(buffer.dtype)[None])


# On every device: sdpa and capture serve those that no backend does.
torch.library.impl("carve_kernels::attend_layer_in", "default", _attend_layer_in)
