"""What H2O, SnapKV and PyramidDrop rank the keys of a cache by, from the queries and keys of a layer.

Each is the method's own formula, without the matrix of probabilities that its program forms for it; docs/frontends.md
lists what is equal and what is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from carve_kernels import checks
from carve_kernels.ops.capture import capture
from carve_kernels.ops.capture_checks import check_query_and_key
from carve_kernels.ops.column_sums import column_sums

POOLINGS: dict[str, Callable[..., torch.Tensor]] = {"avgpool": functional.avg_pool1d, "maxpool": functional.max_pool1d}


def h2o(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    attention_mask: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """H2O's accumulated attention: for each head, the sum over the rows of what each key gets.

    Equals, for causal rows, the last R of S::

        (scale * query @ key.mT + causal).softmax(-1).sum(-2)

    ==============  ============  ==============  ==========================================================
    name            dtype         shape           meaning
    ==============  ============  ==============  ==========================================================
    query           float         [B, A, R, D]    after the position encoding: all rows, or those of a step
    key             as query      [B, KV, S, D]   all keys, in the order of the sequence
    attention_mask  bool, int     [B, S]          1 for tokens, 0 for padding, whose score is 0
    lse             float         [B, A, R]       log-sum-exp of the rows, if the attention returned it
    ==============  ============  ==============  ==========================================================

    Returns [B, A, S] in float32. The sums of later rows are added to those of earlier ones, `functional.pad(earlier,
    (0, new)) + h2o(query_of_new, ...)`; a key that was dropped is no longer in `key`, nor in the sums.

    Raises TypeError or ValueError for arguments that do not fit. Source: H2O, arXiv 2306.14048, algorithm 1.
    """
    check_query_and_key(query, key)
    seen = _seen(attention_mask, query, key)
    positions = _last_keys(query, key)
    mask = None
    if seen is not None:
        # A row of padding adds nothing.
        rows = seen[:, -query.shape[2] :] if query.shape[2] else seen[:, :0]
        positions = positions.where(rows, -1)
        mask = seen[:, None, None].expand(-1, 1, query.shape[2], -1)
    return column_sums(query, key, scale=scale, mask=mask, positions=positions, lse=lse, backend=backend)


def snapkv(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    window_size: int = 32,
    kernel_size: int = 5,
    pooling: str = "avgpool",
    attention_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """SnapKV's score of the keys before its window: what the rows of the window give them, summed and pooled.

    Equals, for the last `window_size` rows::

        probabilities = (scale * query[:, :, -window_size:] @ key.mT + causal).softmax(-1)
        avg_pool1d(probabilities[..., :-window_size].sum(-2), kernel_size, stride=1, padding=kernel_size // 2)

    ==============  ============  ==============  ==========================================================
    name            dtype         shape           meaning
    ==============  ============  ==============  ==========================================================
    query           float         [B, A, R, D]    after the position encoding: the last R of S rows, R >= window_size
    key             as query      [B, KV, S, D]   all keys, S > window_size
    kernel_size     odd int                       of the pooling; its padding of 0 counts in the mean
    pooling         str                           "avgpool" or "maxpool"
    attention_mask  bool, int     [B, S]          1 for tokens, 0 for padding before them, whose score is 0
    ==============  ============  ==============  ==========================================================

    Returns [B, A, S - window_size] in float32, for each query head: the program repeats keys for the heads of a group.

    Raises TypeError or ValueError for arguments that do not fit. Source: SnapKV, arXiv 2404.14469, section 4.
    """
    check_query_and_key(query, key)
    checks.integer("window_size", window_size, low=1)
    if window_size > query.shape[2] or window_size >= key.shape[2]:
        raise ValueError(
            f"window_size: expected at most the {query.shape[2]} rows of query and fewer than the {key.shape[2]} keys, "
            f"got {window_size}"
        )
    if checks.integer("kernel_size", kernel_size, low=1) % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
    checks.choice("pooling", pooling, tuple(POOLINGS))
    seen = _seen(attention_mask, query, key)
    if seen is not None and not bool(seen[:, -window_size:].all()):
        raise ValueError("attention_mask: expected padding before the tokens, got some within the window")
    rows = query[:, :, -window_size:]
    mask = None if seen is None else seen[:, None, None].expand(-1, 1, window_size, -1)
    sums = column_sums(rows, key, scale=scale, mask=mask, positions=_last_keys(rows, key), backend=backend)
    before = sums[..., :-window_size]
    pooled = POOLINGS[pooling](before, kernel_size, stride=1, padding=kernel_size // 2)
    return pooled if seen is None else pooled.masked_fill_(~seen[:, None, :-window_size], 0.0)


def pyramid_drop(
    query: torch.Tensor,
    key: torch.Tensor,
    tokens: torch.Tensor,
    *,
    scale: float,
    attention_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """PyramidDrop's score of the visual tokens: what the last token of the instruction gives them, mean over heads.

    Equals, for the last of R rows, which is in the column S - 1::

        (scale * query[:, :, -1:] @ key.mT).softmax(-1).mean(1)[:, 0, tokens]

    ==============  ============  ==============  ==========================================================
    name            dtype         shape           meaning
    ==============  ============  ==============  ==========================================================
    query           float         [B, A, R, D]    of the layer that the tokens are dropped before; rows up to the
                                                  last token of the instruction
    key             as query      [B, KV, S, D]   the keys up to that token
    tokens          int32, int64  [B, N]          columns of the visual tokens, -1 for padding
    attention_mask  bool, int     [B, S]          1 for tokens, 0 for padding
    ==============  ============  ==============  ==========================================================

    Returns [B, N] in float32; padding has 0.

    Raises TypeError or ValueError for arguments that do not fit. Source: PyramidDrop, arXiv 2410.17247, section 3.2.
    """
    check_query_and_key(query, key)
    if not query.shape[2]:
        raise ValueError(f"query: expected at least one row, got {checks.describe(query)}")
    seen = _seen(attention_mask, query, key)
    if seen is not None and not bool(seen[:, -1].all()):
        raise ValueError("attention_mask: expected the last column to be a token, got padding")
    mask = None if seen is None else seen[:, None, None]
    return capture(query[:, :, -1:], key, tokens, scale=scale, mask=mask, backend=backend).maps[:, 0]


def keep(scores: torch.Tensor, count: int, *, recent: int = 0) -> torch.Tensor:
    """The columns of the `count` highest scores, and `recent` columns behind the last of them, ascending.

    =======  ======  =========  =======================================================================
    name     dtype   shape      meaning
    =======  ======  =========  =======================================================================
    scores   float   [..., C]   of the columns that compete; of equal scores the first wins
    count    int                how many of them are kept, at most C
    recent   int                how many columns C, C + 1, ... are kept beside them
    =======  ======  =========  =======================================================================

    Returns int64 [..., count + recent]. H2O: `keep(scores[..., :-recent], heavy, recent=recent)`; SnapKV:
    `keep(scores, capacity - window_size, recent=window_size)`; PyramidDrop: indices into the visual tokens,
    `keep(scores, int(ratio * N))`. Raises TypeError or ValueError for arguments that do not fit, and for NaN.
    """
    if not isinstance(scores, torch.Tensor) or not scores.is_floating_point():
        raise TypeError(f"scores: expected a tensor of floats, got {checks.describe(scores)}")
    if not scores.dim():
        raise ValueError(f"scores: expected at least one dimension, got {checks.describe(scores)}")
    if bool(scores.isnan().any()):
        raise ValueError("scores: expected numbers, got NaN among them")
    columns = scores.shape[-1]
    checks.integer("count", count, low=0, high=columns)
    checks.integer("recent", recent, low=0)
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    best = order[..., :count].sort(-1).values
    behind = torch.arange(columns, columns + recent, device=scores.device).expand(*scores.shape[:-1], recent)
    return torch.cat([best, behind], -1)


def _last_keys(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The last key [B, R] that each row sees, of rows that are the last of the sequence."""
    batch, _, rows, _ = query.shape
    keys = key.shape[2]
    if rows > keys:
        raise ValueError(f"query: expected at most as many rows as the {keys} keys, got {checks.describe(query)}")
    return torch.arange(keys - rows, keys, device=query.device).expand(batch, rows)


def _seen(attention_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Which keys are tokens, bool [B, S], or None for all."""
    if attention_mask is None:
        return None
    checks.tensor(
        "attention_mask",
        attention_mask,
        shape=(query.shape[0], key.shape[2]),
        dtypes=(torch.bool, torch.int64, torch.int32),
    )
    checks.device("attention_mask", attention_mask, query)
    return attention_mask != 0
