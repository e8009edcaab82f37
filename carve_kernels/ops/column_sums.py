"""Column sums: the attention that each key gets from all rows, without a matrix of rows x keys."""

from __future__ import annotations

from typing import Literal

import torch

from carve_kernels import checks
from carve_kernels.backends import resolve
from carve_kernels.ops.capture_checks import check_options, check_query_and_key, check_values
from carve_kernels.ops.capture_gradient import needs_gradient
from carve_kernels.types import CaptureOptions


def column_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    heads: Literal["each", "sum"] = "each",
    backend: str = "auto",
    check: bool | None = None,
) -> torch.Tensor:
    """The attention that each of the S keys gets, summed over R rows.

    Equals, for one batch row without mask::

        probabilities = (scale * query @ key.repeat_interleave(A // KV, 0).mT).softmax(-1)  # [A, R, S]
        sums = probabilities.sum(1)                                                         # [A, S]

    ===========  ================  ==================  =============================================================
    name         dtype             shape               meaning
    ===========  ================  ==================  =============================================================
    query        float             [B, A, R, D]        the rows, all of a prefill or some, any strides
    key          as query          [B, KV, S, D]       all keys, any strides; A is a multiple of KV
    scale        float                                 factor of the logits, usually D ** -0.5
    mask         bool              [B, 1 or A, R, S]   True where a row sees a key; along rows it may be expanded
    positions    int32, int64      [B, R]              last key that a row sees, -1 for none; a mask hides more
    softcap      float                                 logits become softcap * tanh(logits / softcap)
    window       int                                   with positions: a row sees its last `window` keys only
    sink         float             [A]                 one more logit for each head, without a key
    lse          float             [B, A, R]           natural log-sum-exp of the logits, if it is already known
    heads        str                                   sums of "each" head, or their "sum" over the heads
    check        bool                                  check query, and lse of the first row; default: on a CPU
    ===========  ================  ==================  =============================================================

    Returns [B, A, S], or [B, S] where summed over the heads, in float32 (float64 for float64 input). Causal rows are
    `positions=torch.arange(S)`, whose hidden keys are not read; a padded batch adds its mask of keys, expanded along
    the rows. A row that sees no key adds nothing, so a padded row has position -1 or no key in the mask. Without an
    `lse`, which fused attentions can return, the scores are computed twice; scratch grows with A x (R + S).

    Raises TypeError or ValueError for arguments that do not fit and for tensors that require a gradient, which sums do
    not have; BackendUnavailable for a backend that cannot serve. Source: the scores of H2O, arXiv 2306.14048.
    """
    options = CaptureOptions(scale, mask, positions, softcap, window, sink, lse, "each")
    check_query_and_key(query, key)
    check_options(query, key, options)
    checks.number("scale", scale)
    checks.choice("heads", heads, ("each", "sum"))
    checks.flag("check", check)
    if needs_gradient(query, key, sink):
        name = next(
            name
            for name, tensor in (("query", query), ("key", key), ("sink", sink))
            if tensor is not None and tensor.requires_grad
        )
        raise ValueError(
            f"{name}: expected a tensor that requires no gradient, since column sums have none; detach it, or call "
            "under torch.no_grad()"
        )
    module = resolve("column_sums", backend, query.device, query, key, options)
    if check or (check is None and query.device.type == "cpu"):
        no_tokens = torch.empty(query.shape[0], 0, dtype=torch.int32, device=query.device)
        check_values(query, key, no_tokens, options)
    sums: torch.Tensor = module.forward(query, key, options)
    return sums if heads == "each" else sums.sum(1)
