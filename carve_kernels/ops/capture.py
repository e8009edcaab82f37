"""Capture: attention of selected rows to the visual tokens, computed next to the model's own attention."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Literal

import torch

from carve_kernels import checks
from carve_kernels.backends import BACKENDS, resolve
from carve_kernels.backends.native.scratch import NONE, Memory
from carve_kernels.ops.capture_checks import check_arguments, check_out, check_values
from carve_kernels.ops.capture_gradient import needs_gradient, with_gradient
from carve_kernels.ops.layer_operator import LayerOperator as LayerOperator
from carve_kernels.ops.layer_operator import layer_operator as layer_operator
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot

_NUMBERS = (float, int)


def capture(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    heads: Literal["mean", "each"] = "mean",
    out: Capture | None = None,
    backend: str = "auto",
    check: bool | None = None,
) -> Capture:
    """Attention probabilities of R rows, taken over all keys that each row may see, at the N visual tokens.

    Equals, for one batch row without mask::

        probabilities = (scale * query @ key.repeat_interleave(A // KV, 0).mT).softmax(-1)  # [A, R, S]
        maps = probabilities[..., tokens].mean(0)                                           # [R, N]

    ===========  ================  ==================  =============================================================
    name         dtype             shape               meaning
    ===========  ================  ==================  =============================================================
    query        float             [B, A, R, D]        the captured rows, any strides
    key          as query          [B, KV, S, D]       all keys, any strides; A is a multiple of KV
    tokens       int32, int64      [B, N]              columns of the visual tokens; -1 is padding
    scale        float                                 factor of the logits, usually D ** -0.5
    mask         bool              [B, 1 or A, R, S]   True where a row sees a key
    positions    int32, int64      [B, R]              last key that a row sees, instead of a mask
    softcap      float                                 logits become softcap * tanh(logits / softcap)
    window       int                                   with positions: a row sees its last `window` keys only
    sink         float             [A]                 one more logit for each head, without a key
    lse          float             [B, A, R]           natural log-sum-exp of the logits, if it is already known
    heads        str                                   "mean" over the heads, or "each" head by itself
    out          Capture                               tensors to write into, of the shapes below
    check        bool                                  check query, tokens, lse of the first row; default: on a CPU
    ===========  ================  ==================  =============================================================

    Returns Capture(maps [B, R, N] or [B, A, R, N], mass [B, R], entropy [B, R]) in float32 (float64 for float64
    input). `mass` is the sum of the head mean over the tokens; `entropy` is H / ln N of the head mean renormalised over
    the tokens, 0 where fewer than two tokens are used or the mass is 0. A row that sees no key gives zeros.

    Maps, mass and entropy are differentiable, once, in the query, the key and the sink, after every backend: the rows'
    probabilities are computed again, a few rows at a time, in memory of rows x S; `explain()` says by which backend.
    An `lse` counts as the log-sum-exp of the logits, whose change with the query and the key is part of the gradients.
    Where nothing requires a gradient, and under `torch.no_grad`, nothing is kept.

    Raises TypeError or ValueError for arguments that do not fit, BackendUnavailable for a backend that cannot serve.
    Source: A[l, t] of CARVE, arXiv 2509.06461, section 3.
    """
    options = CaptureOptions(scale, mask, positions, softcap, window, sink, lse, heads)
    check_arguments(query, key, tokens, options)
    checks.number("scale", scale)
    checks.choice("heads", heads, ("mean", "each"))
    checks.flag("check", check)
    if out is not None:
        check_out(query, tokens, heads, out)
    differentiable = needs_gradient(query, key, sink)
    tensors = (query.detach(), key.detach()) if differentiable else (query, key)
    module = resolve("capture", backend, query.device, *tensors, tokens, options, out=out)
    if check or (check is None and query.device.type == "cpu"):
        check_values(*tensors, tokens, options)
    if differentiable:
        return with_gradient(query, key, tokens, options, module, out)
    result: Capture = module.forward(query, key, tokens, options, out=out)
    return result


def capture_layers(
    query: Sequence[torch.Tensor],
    key: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    *,
    scale: float,
    step: torch.Tensor,
    out: Capture,
    first: int = 0,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: Sequence[torch.Tensor] = (),
    backend: str = "auto",
) -> None:
    """Capture several layers of one forward into one step of preallocated buffers; one operator of torch.library.

    Equals::

        for l in range(len(query)):
            captured = capture(query[l], key[l], tokens, scale=scale, ...)
            out.maps[step, first + l], out.mass[step, first + l], out.entropy[step, first + l] = captured

    ===========  ================  ==================  =====================================================
    name         dtype             shape               meaning
    ===========  ================  ==================  =====================================================
    query        float             L x [B, A, R, D]    the captured rows of each layer
    key          as query          L x [B, KV, S, D]   the keys of each layer
    tokens       int32, int64      [B, N]              columns of the visual tokens, -1 is padding
    step         int64             []                  step to write, on the device: no recompilation by step
    out.maps     float32           [T, M, B, R, N]     M layers of buffers, first + L <= M
    out.mass     float32           [T, M, B, R]
    out.entropy  float32           [T, M, B, R]
    sink         float             L x [A], or none    sinks of each layer
    ===========  ================  ==================  =====================================================

    The other arguments are those of `capture` and apply to all layers. A step outside [0, T) is an error on a CPU and
    undefined elsewhere. Raises TypeError or ValueError for arguments that do not fit, BackendUnavailable for a backend
    that cannot serve. Source: A[l, t] of CARVE, arXiv 2509.06461, section 3.
    """
    layers, slot = Layers(query, key, sink), Slot(out, step, first)
    options = CaptureOptions(scale, mask, positions, softcap, window)
    # A compiler sees one operator, which chooses its backend when it runs.
    if not torch.compiler.is_compiling():
        # The compiled operator refuses bad tensors in a small part of the time of the checks below, which say more.
        with contextlib.suppress(Exception):
            if _capture_in_one_call(layers, tokens, options, slot, backend):
                return
    _check_layers(layers, tokens, options, slot)
    checks.choice("backend", backend, ("auto", *BACKENDS))
    memory = Memory.new(NONE, query[0].device)
    torch.ops.carve_kernels.capture_layers_in.default(
        list(query), list(key), tokens, None, mask, positions, list(sink), None, float(scale), float(softcap or 0.0),
        int(window or 0), False, step, first, *memory, *out, backend,
    )  # fmt: skip


def _capture_in_one_call(
    layers: Layers, tokens: torch.Tensor, options: CaptureOptions, slot: Slot, backend: str
) -> bool:
    """Capture by a compiled operator, which checks the tensors; False for what it might take and should not."""
    scale, mask, positions, softcap, window, *_ = options
    query, key, sink = layers
    numbers = type(scale) in _NUMBERS and math.isfinite(scale) and type(slot.first) is int
    if softcap is not None:
        numbers = numbers and type(softcap) in _NUMBERS and 0 < softcap < math.inf
    if window is not None:
        numbers = numbers and type(window) is int and window > 0
    if not numbers or (mask is not None and positions is not None) or slot.step is None or slot.step.dim():
        return False
    # Loops: any() over a generator takes three times as long.
    for one in sink:
        if one.dtype != torch.float32 or one.requires_grad or not one.is_contiguous():
            return False
    if torch.is_grad_enabled():
        for one in (*query, *key):
            if one.requires_grad:
                return False
    # Beside one tensor without data, every operator does nothing.
    for given in (*query, *key, *sink, tokens, mask, positions, slot.step, *slot.out):
        if given is not None and given.is_meta:
            return False
    module = resolve("capture", backend, query[0].device, query[0], key[0], tokens, options, out=slot.out)
    if not hasattr(module, "layers_operator"):
        return False
    module.call(layers, tokens, options, slot)
    return True


def _check_layers(layers: Layers, tokens: torch.Tensor, options: CaptureOptions, slot: Slot) -> None:
    (query, key, sink), (out, step, first) = layers, slot
    checks.layers(query, key, sink)
    for layer in range(len(query)):
        check_arguments(query[layer], key[layer], tokens, options._replace(sink=sink[layer] if sink else None))
    checks.number("scale", options.scale)
    checks.integer("first", first, low=0)
    step = checks.tensor("step", step, shape=(), dtypes=(torch.int64,))
    checks.device("step", step, query[0])
    check_out(query[0], tokens, "mean", out, in_steps=True)
    is_known = step.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_known and not 0 <= int(step) < len(out.maps):
        raise ValueError(f"step: expected a step from 0 to {len(out.maps) - 1}, got {int(step)}")
    if first + len(query) > out.maps.shape[1]:
        raise ValueError(f"first: expected first + {len(query)} layers to fit in {out.maps.shape[1]}, got {first}")
