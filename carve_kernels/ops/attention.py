"""Attention of some rows and its capture in one call: a decode step's attention gives its map."""

from __future__ import annotations

from typing import Any, Literal

import torch

from carve_kernels import checks
from carve_kernels.backends.native.scratch import NONE, Memory
from carve_kernels.ops.attention_operator import attend
from carve_kernels.ops.capture_checks import check_arguments, check_out, check_values
from carve_kernels.types import Attended, Capture, CaptureOptions


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    heads: Literal["mean", "each"] = "mean",
    output: torch.Tensor | None = None,
    out: Capture | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Attended:
    """The output of attention, and the attention probabilities of its rows at the N visual tokens.

    Equals, for one batch row without mask::

        group = A // KV
        probabilities = (scale * query @ key.repeat_interleave(group, 0).mT).softmax(-1)  # [A, R, S]
        output = probabilities @ value.repeat_interleave(group, 0)                        # [A, R, E]
        maps = probabilities[..., tokens].mean(0)                                         # [R, N]

    ===========  ================  ==================  =============================================================
    name         dtype             shape               meaning
    ===========  ================  ==================  =============================================================
    query        float             [B, A, R, D]        the rows: one for each entry of the batch in a decode step
    key          as query          [B, KV, S, D]       all keys; A is a multiple of KV
    value        as query          [B, KV, S, E]       all values, whose size E may differ from D
    output       as query          [B, A, R, E]        a tensor to write the output into
    ===========  ================  ==================  =============================================================

    The other arguments, and errors of their values, are those of `capture`, but for `lse`, which is computed. Returns
    Attended(output [B, A, R, E] in the dtype of the query, Capture), a pair. A row that sees no key gives zeros. Keys
    and values that no row of an entry of the batch sees may hold any value. Outputs must not overlap inputs.

    The backend cuda reads keys and values once for both. It serves one row in bfloat16 or float16, head sizes that are
    multiples of 8 up to 256, and rows of keys and values that are dense and start at multiples of 16 bytes. What it
    does not serve, `auto` computes by scaled_dot_product_attention and `capture`, one after the other, and one line in
    the log `carve_kernels` says why. There, a mask or positions cost a copy of keys and values; outputs with a softcap
    or a sink, which sdpa does not know, are computed in float32 by plain torch.

    Raises TypeError or ValueError for arguments that do not fit, BackendUnavailable for a backend that cannot serve.
    Source: A[l, t] of CARVE, arXiv 2509.06461, section 3; splits of the keys as in Flash-Decoding.
    """
    options = CaptureOptions(scale, mask, positions, softcap, window, sink, None, heads)
    check_arguments(query, key, tokens, options)
    _check_value(query, key, value, output)
    checks.number("scale", scale)
    checks.choice("heads", heads, ("mean", "each"))
    checks.flag("check", check)
    if out is not None:
        check_out(query, tokens, heads, out)
    if torch.compiler.is_compiling() and not _needs_gradient(query, key, value):
        # A compiler sees one operator, which chooses its backend when it runs.
        return _compiled(query, key, value, tokens, options, backend, output, out)
    if check or (check is None and query.device.type == "cpu"):
        check_values(query, key, tokens, options)
    return attend(query, key, value, tokens, options, backend, output=output, out=out)


def _check_value(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor | None) -> None:
    batch, key_heads, keys, _ = key.shape
    checks.tensor("value", value, shape=(batch, key_heads, keys, "E"), dtypes=(query.dtype,))
    checks.device("value", value, query)
    if output is not None:
        checks.tensor("output", output, shape=(*query.shape[:3], value.shape[3]), dtypes=(query.dtype,))
        checks.device("output", output, query)
        if any(count > 1 and stride == 0 for count, stride in zip(output.shape, output.stride(), strict=True)):
            raise ValueError("output: expected memory of its own for each element, got an expanded tensor")


def _needs_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _compiled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: torch.Tensor, options: CaptureOptions,
    backend: str, output: torch.Tensor | None, out: Capture | None,
) -> Attended:  # fmt: skip
    if output is None:
        output = query.new_empty(*query.shape[:3], value.shape[3])
    if out is None:
        out = Capture.empty(query, tokens, options.heads)
        if query.dtype == torch.float64:
            out = Capture(*(part.double() for part in out))
    scale, mask, positions, softcap, window, sink, _, heads = options
    operands: tuple[Any, ...] = (query, key, value, tokens, None, mask, positions, sink, float(scale))
    torch.ops.carve_kernels.attend_layer_in.default(
        *operands, float(softcap or 0.0), int(window or 0), heads == "each", None, 0,
        *Memory.new(NONE, query.device), output, *out, backend,
    )  # fmt: skip
    return Attended(output, out)
