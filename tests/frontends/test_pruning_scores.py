"""The scores of H2O, SnapKV and PyramidDrop against their own formulas under eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from carve_kernels.frontends.pruning.scores import h2o, keep, pyramid_drop, snapkv
from tests.support.attention import Case, planted
from tests.support.tolerances import correlation, relative, roundings

SCALE = 24**-0.5


def qk(rows: int = 61, keys: int = 61, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A query that attends to some keys, with NaN between the keys, and three query heads a key head."""
    case = Case(batch=2, query_heads=6, key_heads=2, rows=rows, keys=keys, size=24, tokens=0, view="all", dtype=dtype)
    (query, key, _), _ = planted(case)
    return query, key


def eager(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Probabilities [B, A, R, S] in float64, as eager attention masks them: by the lowest number, added."""
    rows, keys = query.shape[2], key.shape[2]
    scores = SCALE * query.double() @ key.double().repeat_interleave(3, 1).mT
    hidden = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)[None, None]
    if seen is not None:
        hidden = hidden | ~seen[:, None, None]
    return (scores + hidden.double() * torch.finfo(torch.float32).min).softmax(-1)


def padding(keys: int = 61) -> torch.Tensor:
    """The second prompt of a batch is 9 tokens shorter, padded at the left."""
    return torch.arange(keys) >= torch.tensor([[0], [9]])


@pytest.mark.parametrize("rows", [61, 7, 1])
def test_h2o_is_its_formula(rows: int) -> None:
    query, key = qk(rows)
    found = h2o(query, key, scale=SCALE)
    truth = eager(query, key).sum(-2)
    assert found.shape == (2, 6, 61) and found.dtype == torch.float32
    # Keys that few rows see have sums of few terms; none is 0 but behind the last row.
    assert relative(found, truth) < 1e-5 and correlation(found, truth) > 1 - 1e-6


def test_h2o_adds_up_over_steps() -> None:
    query, key = qk()
    parts = h2o(query[:, :, :50], key[:, :, :50], scale=SCALE)
    for step in range(50, 61):
        new = h2o(query[:, :, step : step + 1], key[:, :, : step + 1], scale=SCALE)
        parts = functional.pad(parts, (0, 1)) + new
    assert relative(parts, h2o(query, key, scale=SCALE)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
def test_h2o_of_a_padded_batch_is_that_of_each_prompt(dtype: torch.dtype) -> None:
    query, key = qk()
    found = h2o(query, key, scale=SCALE, attention_mask=padding().to(dtype))
    alone = h2o(query[1:, :, 9:], key[1:, :, 9:], scale=SCALE)
    assert relative(found[1:, :, 9:], alone) < roundings(64)
    assert bool((found[1, :, :9] == 0).all())
    assert torch.equal(found[:1], h2o(query[:1], key[:1], scale=SCALE))


def test_h2o_by_the_log_sum_exp_of_a_fused_attention() -> None:
    query, key = qk()
    key = key.contiguous()
    repeated = key.repeat_interleave(3, 1)
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _, lse = call(query.contiguous(), repeated, repeated, 0.0, True, scale=SCALE)
    assert relative(h2o(query, key, scale=SCALE, lse=lse), eager(query, key).sum(-2)) < 1e-5


@pytest.mark.parametrize("pooling", ["avgpool", "maxpool"])
@pytest.mark.parametrize("kernel_size", [1, 5, 7])
@pytest.mark.parametrize("rows", [61, 16])
def test_snapkv_is_its_formula(pooling: str, kernel_size: int, rows: int) -> None:
    query, key = qk(rows)
    found = snapkv(query, key, scale=SCALE, window_size=16, kernel_size=kernel_size, pooling=pooling)
    summed = eager(query[:, :, -16:], key)[..., :-16].sum(-2)
    pool = functional.avg_pool1d if pooling == "avgpool" else functional.max_pool1d
    truth = pool(summed, kernel_size=kernel_size, padding=kernel_size // 2, stride=1)
    assert found.shape == (2, 6, 45)
    assert relative(found, truth) < 1e-5 and correlation(found, truth) > 1 - 1e-6


def test_snapkv_keeps_what_its_program_keeps() -> None:
    query, key = qk()
    scores = snapkv(query, key, scale=SCALE, window_size=16)
    kept = keep(scores, 20, recent=16)
    summed = functional.avg_pool1d(eager(query[:, :, -16:], key)[..., :-16].sum(-2), 5, padding=2, stride=1)
    program = summed.topk(20, dim=-1).indices.sort(-1).values
    assert torch.equal(kept[..., :20], program)
    assert torch.equal(kept[..., 20:], torch.arange(45, 61).expand(2, 6, 16))


def test_snapkv_of_a_padded_batch_is_that_of_each_prompt() -> None:
    query, key = qk()
    found = snapkv(query, key, scale=SCALE, window_size=16, attention_mask=padding())
    alone = snapkv(query[1:, :, 9:], key[1:, :, 9:], scale=SCALE, window_size=16)
    assert relative(found[1:, :, 9:], alone) < roundings(64)
    assert bool((found[1, :, :9] == 0).all())


@pytest.mark.parametrize("rows", [61, 1])
def test_pyramid_drop_is_its_formula(rows: int) -> None:
    query, key = qk(rows)
    tokens = torch.tensor([[5, 6, 7, 8, 30, 31], [12, 13, 14, 15, 40, -1]])
    found = pyramid_drop(query, key, tokens, scale=SCALE)
    mean = eager(query, key).mean(1)[:, -1]
    truth = torch.stack([mean[0, tokens[0]], torch.cat([mean[1, tokens[1, :5]], mean.new_zeros(1)])])
    assert found.shape == (2, 6) and float(found[1, 5]) == 0
    assert relative(found[found > 0], truth[truth > 0]) < 1e-5


def test_pyramid_drop_of_a_padded_batch_is_that_of_each_prompt() -> None:
    query, key = qk()
    tokens = torch.arange(12, 30).expand(2, -1)
    found = pyramid_drop(query, key, tokens, scale=SCALE, attention_mask=padding())
    alone = pyramid_drop(query[1:, :, 9:], key[1:, :, 9:], tokens[1:] - 9, scale=SCALE)
    assert relative(found[1:], alone) < roundings(64)


def test_half_precision_is_summed_in_float32() -> None:
    query, key = qk(dtype=torch.bfloat16)
    assert relative(h2o(query, key, scale=SCALE), eager(query, key).sum(-2)) < 1e-5
    assert h2o(query, key, scale=SCALE).dtype == torch.float32


def test_of_equal_scores_the_first_are_kept() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert keep(scores, 3, recent=2).tolist() == [[0, 1, 3, 5, 6], [0, 1, 2, 5, 6]]
    assert keep(scores, 0, recent=1).tolist() == [[5], [5]]
    assert keep(scores[0], 5).tolist() == [0, 1, 2, 3, 4]


QUERY, KEY = torch.ones(2, 4, 6, 8), torch.ones(2, 2, 9, 8)
WRONG: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (h2o, {"query": torch.ones(2, 4, 10, 8)}, ValueError, "query: expected at most as many rows as the 9 keys"),
    (h2o, {"query": [[1.0]]}, TypeError, "query: expected a tensor, got list"),
    (h2o, {"key": KEY[..., :7]}, ValueError, r"key: expected shape \[2, KV, S, 8\]"),
    (h2o, {"attention_mask": torch.ones(2, 8)}, ValueError, r"attention_mask: expected shape \[2, 9\]"),
    (h2o, {"attention_mask": torch.ones(2, 9)}, TypeError, "attention_mask: expected dtype torch.bool"),
    (h2o, {"scale": None}, TypeError, "scale: expected a number"),
    (h2o, {"lse": torch.zeros(2, 4, 6)}, ValueError, "lse: expected the natural log-sum-exp"),
    (snapkv, {"window_size": 7}, ValueError, "window_size: expected at most the 6 rows of query and fewer than the 9"),
    (snapkv, {"query": torch.ones(2, 4, 9, 8), "window_size": 9}, ValueError, "fewer than the 9 keys, got 9"),
    (snapkv, {"window_size": 0}, ValueError, "window_size: expected an integer of at least 1"),
    (snapkv, {"kernel_size": 4}, ValueError, "kernel_size: expected an odd number, got 4"),
    (snapkv, {"kernel_size": 2.5}, TypeError, "kernel_size: expected an integer"),
    (snapkv, {"pooling": "mean"}, ValueError, "pooling: expected one of 'avgpool', 'maxpool', got str 'mean'"),
    (snapkv, {"attention_mask": torch.arange(9).expand(2, 9) < 8}, ValueError, "attention_mask: .* within the window"),
    (pyramid_drop, {"query": QUERY[:, :, :0]}, ValueError, "query: expected at least one row"),
    (pyramid_drop, {"tokens": torch.tensor([[9], [0]])}, ValueError, "tokens: expected columns from 0 to 8"),
    (pyramid_drop, {"attention_mask": torch.arange(9).expand(2, 9) < 8}, ValueError, "attention_mask: .* got padding"),
]


@pytest.mark.parametrize(("score", "changes", "error", "message"), WRONG)
def test_an_error_names_the_argument(score: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"query": QUERY, "key": KEY, "scale": 1.0} | changes
    if score is snapkv:
        arguments.setdefault("window_size", 4)
    if score is pyramid_drop:
        arguments.setdefault("tokens", torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(error, match=message):
        score(**arguments)


@pytest.mark.parametrize(
    ("scores", "count", "recent", "error", "message"),
    [
        ([1.0], 1, 0, TypeError, "scores: expected a tensor of floats"),
        (torch.ones(3).long(), 1, 0, TypeError, "scores: expected a tensor of floats"),
        (torch.tensor(1.0), 1, 0, ValueError, "scores: expected at least one dimension"),
        (torch.tensor([1.0, torch.nan]), 1, 0, ValueError, "scores: expected numbers, got NaN"),
        (torch.ones(3), 4, 0, ValueError, "count: expected an integer from 0 to 3, got int 4"),
        (torch.ones(3), 1.5, 0, TypeError, "count: expected an integer"),
        (torch.ones(3), 1, -1, ValueError, "recent: expected an integer of at least 0"),
    ],
)
def test_keep_refuses(scores: Any, count: Any, recent: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        keep(scores, count, recent=recent)
