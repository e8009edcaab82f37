"""Column sums in plain torch: the probabilities of some rows at a time over all keys, summed over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from carve_kernels.backends.reference.capture import logits, normaliser
from carve_kernels.types import CaptureOptions

# Scores at a time: the scratch does not grow with rows x S.
_MOST_SCORES = 1 << 22


def supports(*_: object) -> str | None:
    """The reference serves everything."""
    return None


def forward(query: Tensor, key: Tensor, options: CaptureOptions) -> Tensor:
    """The sums [B, A, S] in float32, or in float64 for float64 input; see `carve_kernels.column_sums`."""
    batch, query_heads, rows, _ = query.shape
    keys = key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    sums = torch.zeros(batch, query_heads, keys, dtype=dtype, device=query.device)
    at_once = max(_MOST_SCORES // max(batch * query_heads * keys, 1), 1)
    for start in range(0, rows, at_once):
        some = rows_of(options, start, at_once)
        scores = logits(query[:, :, start : start + at_once], key, some)
        top, summed, dead = normaliser(scores, some)
        sums += (torch.exp(scores - top) / summed).masked_fill_(dead, 0.0).sum(2)
    return sums


def rows_of(options: CaptureOptions, start: int, count: int) -> CaptureOptions:
    """The options of some rows."""
    rows = slice(start, start + count)
    mask, positions, lse = options.mask, options.positions, options.lse
    return options._replace(
        mask=None if mask is None else mask[:, :, rows],
        positions=None if positions is None else positions[:, rows],
        lse=None if lse is None else lse[:, :, rows],
    )
