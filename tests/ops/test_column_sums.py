"""Column sums: the reference against eager attention, every backend against it in float64, laws, and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carve_kernels import BackendUnavailable, column_sums, explain
from carve_kernels.backends import PREFERRED, SUPPORT, cpu
from carve_kernels.backends.reference import column_sums as reference
from carve_kernels.types import CaptureOptions
from tests.support.attention import Case, exact, planted
from tests.support.capture_backends import backends_of, entered
from tests.support.tolerances import close, correlation, relative, roundings

CASES = {
    "plain": Case(view="all", rows=21),
    "one row": Case(rows=1, keys=131, view="all"),
    "mask": Case(rows=29),
    "head mask": Case(view="head mask", rows=5),
    "positions": Case(view="positions", rows=37),
    "window": Case(view="positions", rows=15, window=23),
    "softcap": Case(softcap=2.5),
    "sink": Case(sink=True),
    "sink, softcap, window": Case(sink=True, softcap=4.0, view="positions", window=31, rows=2),
    "groups of seven": Case(batch=1, query_heads=14, key_heads=2, size=128, keys=203, rows=17, view="all"),
    "no groups": Case(query_heads=3, key_heads=3, size=40, rows=130),
    "more heads than lines": Case(batch=1, query_heads=97, key_heads=1, size=32, rows=2, keys=29),
    "longer than a chunk": Case(batch=1, rows=3, keys=1301, query_heads=2, key_heads=1, size=32),
    "one key": Case(keys=1, view="all", ragged=False),
    "no keys": Case(keys=0, view="all", ragged=False),
    "no rows": Case(rows=0, view="all"),
    "no batch": Case(batch=0, view="all", ragged=False),
}
SIZES = (40, 96, 256)
MORE_SIZES = (32, 64, 72, 80, 128, 192)


def eager(query: torch.Tensor, key: torch.Tensor, scale: float, visible: torch.Tensor | None = None) -> torch.Tensor:
    """The probabilities [B, A, R, S] of eager attention, 0 in rows that see nothing, in the dtype of the query."""
    scores = scale * query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def causal(rows: int, keys: int) -> torch.Tensor:
    """Positions [1, R] of the last rows of a sequence."""
    return torch.arange(keys - rows, keys)[None]


@pytest.fixture(params=backends_of("column_sums"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with entered(request.param, "column_sums") as backend:
        yield backend


def check(backend: str, case: Case, query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    (doubled, doubled_key, _), exact_options = exact((query, key, query), options)
    truth = reference.forward(doubled, doubled_key, CaptureOptions(**exact_options))
    own = reference.forward(query, key, CaptureOptions(**options))
    found = column_sums(query, key, **options, backend=backend)
    assert found.dtype == torch.float32
    # One rounding of a logit of 50 changes its probability by 50 roundings; sums of R rows add up as many.
    close(found, own, truth, roundings(case.size + 64 + case.rows))
    if truth.numel() > 8 and float(truth.std()) > 1e-2 * float(truth.mean()):
        assert correlation(found, truth) > 1 - 1e-6
    return found


def of(name: str, **changes: Any) -> tuple[Case, torch.Tensor, torch.Tensor, dict[str, Any]]:
    case = CASES[name].but(**changes)
    (query, key, _), options = planted(case)
    return case, query, key, options


def visible_of(case: Case, options: dict[str, Any]) -> torch.Tensor | None:
    if case.view != "positions":
        return options.get("mask")
    column, last = torch.arange(case.keys), options["positions"][:, None, :, None]
    return (column <= last) & (column > last - (case.window or case.keys))


@pytest.mark.parametrize("name", ["plain", "one row", "mask", "head mask", "positions", "window", "groups of seven"])
def test_the_reference_is_eager_attention(name: str) -> None:
    case, query, key, options = of(name)
    query, key = query.double(), key.double().nan_to_num(0.0, 0.0, 0.0)
    truth = eager(query, key, options["scale"], visible_of(case, options)).sum(2)
    found = column_sums(query, key, **options, backend="reference")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("name", CASES)
def test_every_backend_is_the_reference(backend: str, name: str) -> None:
    check(backend, *of(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mask", "positions", "sink, softcap, window", "groups of seven"])
def test_half_precision(backend: str, name: str, dtype: torch.dtype) -> None:
    check(backend, *of(name, dtype=dtype))


@pytest.mark.parametrize("size", [*SIZES, *(pytest.param(size, marks=pytest.mark.slow) for size in MORE_SIZES)])
def test_head_sizes(backend: str, size: int) -> None:
    check(backend, *of("positions", size=size, rows=5))


def test_the_sums_of_two_thousand_rows_are_those_of_eager(backend: str) -> None:
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("the interpreter would take minutes; shorter rows are in the other tests")
    keys = 2048
    (query, key, _), options = planted(Case(batch=1, query_heads=2, key_heads=1, rows=keys, keys=keys, view="all"))
    visible = torch.ones(keys, keys, dtype=torch.bool).tril()
    truth = eager(query.double(), key.double(), options["scale"], visible).sum(2)
    own = eager(query, key, options["scale"], visible).sum(2)
    found = column_sums(query, key, **options, positions=causal(keys, keys), backend=backend)
    close(found, own, truth, roundings(64))


@pytest.mark.parametrize("sink", [False, True])
def test_a_given_lse_gives_the_same_sums(backend: str, sink: bool) -> None:
    case, query, key, options = of("positions", sink=sink)
    logits = options["scale"] * query.double() @ key.double().repeat_interleave(3, 1).mT
    logits = logits.masked_fill(~visible_of(case, options), -torch.inf)  # type: ignore[operator]
    if sink:
        extra = options["sink"].double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], -1)
    # With the strides of torch's fused attention, whose log-sum-exp is [B, R, A] in memory.
    lse = logits.logsumexp(-1).float().transpose(1, 2).contiguous().transpose(1, 2)
    given = column_sums(query, key, **options, lse=lse, backend=backend)
    assert relative(given, column_sums(query, key, **options, backend=backend)) < roundings(32)


def test_a_mask_hides_more_beside_positions(backend: str) -> None:
    case = Case(rows=40, keys=40, view="all")
    (query, key, _), options = planted(case)
    padding = torch.arange(40) >= torch.tensor([[0], [7]])
    key[1, :, :7] = torch.nan
    expanded = padding[:, None, None].expand(2, 1, 40, 40)
    both = column_sums(query, key, **options, positions=causal(40, 40).expand(2, 40), mask=expanded, backend=backend)
    alone = expanded & torch.ones(40, 40, dtype=torch.bool).tril()
    assert relative(both + 1, column_sums(query, key, **options, mask=alone, backend=backend) + 1) < roundings(16)
    assert bool((both[1, :, :7] == 0).all())
    # Of the second entry, 7 rows see nothing; each other row adds 1.
    torch.testing.assert_close(both.sum(-1), torch.tensor([[40.0], [33.0]]).expand(2, 6), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf, 3.0])
def test_a_row_that_sees_nothing_adds_nothing_whatever_its_lse(backend: str, value: float) -> None:
    (query, key, _), options = planted(Case(rows=3, view="all"))
    mask = torch.ones(2, 1, 3, 77, dtype=torch.bool)
    mask[:, :, 1] = False
    lse = (options["scale"] * query @ key.repeat_interleave(3, 1).mT).logsumexp(-1)
    lse[:, :, 1] = value
    found = column_sums(query, key, **options, mask=mask, lse=lse, backend=backend)
    torch.testing.assert_close(found.sum(-1), torch.full((2, 6), 2.0), rtol=1e-5, atol=0)
    positions = torch.tensor([[76, -1, 76]]).expand(2, 3)
    again = column_sums(query, key, **options, positions=positions, lse=lse, backend=backend)
    assert relative(again, found) < roundings(16)


def test_heads_may_be_summed(backend: str) -> None:
    _, query, key, options = of("groups of seven")
    each = column_sums(query, key, **options, backend=backend)
    summed = column_sums(query, key, **options, heads="sum", backend=backend)
    assert summed.shape == (1, 203)
    assert relative(summed, each.double().sum(1)) < roundings(14)


def test_strides_of_every_kind(backend: str) -> None:
    case, query, key, options = of("mask", size=24)
    wide = torch.full((*query.shape, 2), torch.nan)
    wide[..., 0] = query
    mask = torch.zeros((*options["mask"].shape, 3), dtype=torch.bool)
    mask[..., 1] = options["mask"]
    found = column_sums(wide[..., 0], key, **options | {"mask": mask[..., 1]}, backend=backend)
    assert torch.equal(found, column_sums(query, key, **options, backend=backend))
    positions = torch.tensor([[60, 5, 76], [3, 70, 0]], dtype=torch.int32).repeat(1, 10)[:, :29]
    other = {"scale": options["scale"], "positions": positions.T.contiguous().T}
    check(backend, case, query, key.nan_to_num(0.0, 0.0, 0.0), other)


def test_large_logits_keep_their_digits(backend: str) -> None:
    case, query, key, options = of("plain", gain=40.0)
    check(backend, case, query, key, options | {"scale": 20 * options["scale"]})


def test_a_negative_scale_and_a_scale_of_zero(backend: str) -> None:
    for scale in (-0.125, 0.0):
        check(backend, *of("plain")[:3], {"scale": scale})


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_sums_of_a_batch_add_up_to_its_rows(data: Any) -> None:
    case = Case(
        batch=data.draw(st.integers(1, 3)), query_heads=6, key_heads=data.draw(st.sampled_from([1, 2, 6])),
        rows=data.draw(st.integers(1, 70)), keys=data.draw(st.integers(1, 600)), size=32, tokens=0, ragged=False,
        view="positions", window=data.draw(st.sampled_from([None, 1, 40])), seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    (query, key, _), options = planted(case)
    for name in ("cpu", "reference"):
        if name == "cpu" and cpu.unavailable():
            continue
        found = column_sums(query, key, **options, backend=name)
        wanted = torch.full((case.batch, 6), float(case.rows))
        torch.testing.assert_close(found.sum(-1), wanted, rtol=1e-5, atol=0)
        # Each row of a batch is a problem of its own, to the bit.
        last = column_sums(query[-1:], key[-1:], **options | {"positions": options["positions"][-1:]}, backend=name)
        assert name == "reference" or torch.equal(last, found[-1:])


@pytest.mark.parametrize("lse", [False, True])
def test_any_number_of_threads_gives_the_same_bits(lse: bool) -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)
    (query, key, _), options = planted(Case(batch=1, query_heads=4, key_heads=2, rows=200, keys=1700, view="all"))
    options["positions"] = causal(200, 1700)
    if lse:
        options["lse"] = torch.full((1, 4, 200), 9.0)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(column_sums(query, key, **options, check=False))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_triton_serves_on_cuda_devices_and_explain_says_so() -> None:
    assert PREFERRED["cuda"] == ("cuda", "triton")
    assert "backend='triton'" in str(SUPPORT["column_sums"]["cuda"]) and SUPPORT["column_sums"]["triton"] is None
    assert "column_sums: triton (every GPU" in explain()
    with pytest.raises(BackendUnavailable, match=r"cuda cannot serve column_sums: .*use backend='auto'"):
        column_sums(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 3, 4), scale=1.0, backend="cuda")


def test_float64_is_served_by_the_reference_alone() -> None:
    query, key = torch.ones(1, 2, 3, 4).double(), torch.ones(1, 1, 5, 4).double()
    torch.testing.assert_close(column_sums(query, key, scale=1.0), torch.full((1, 2, 5), 0.6).double())
    if cpu.unavailable() is None:
        with pytest.raises(BackendUnavailable, match=r"query is torch\.float64"):
            column_sums(query, key, scale=1.0, backend="cpu")


QUERY, KEY = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [[1.0]]}, TypeError, "query: expected a tensor, got list"),
    ({"query": QUERY[0]}, ValueError, r"query: expected shape \[B, A, R, D\], got"),
    ({"query": QUERY.long()}, TypeError, "query: expected dtype"),
    ({"key": KEY[..., :7]}, ValueError, r"key: expected shape \[2, KV, S, 8\], got"),
    ({"key": KEY.half()}, TypeError, "key: expected dtype torch.float32, got"),
    ({"key": KEY[:, :1].repeat(1, 3, 1, 1)}, ValueError, "key: expected a number of heads that divides the query's 4"),
    ({"scale": "x"}, TypeError, "scale: expected a number, got str"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
    ({"mask": torch.ones(2, 1, 3, 4, dtype=torch.bool)}, ValueError, "mask: expected shape"),
    ({"mask": torch.ones(2, 1, 3, 5)}, TypeError, "mask: expected dtype torch.bool"),
    ({"mask": torch.ones(2, 3, 3, 5, dtype=torch.bool)}, ValueError, "mask: expected 1 or 4 heads"),
    ({"positions": torch.ones(2, 4, dtype=torch.int64)}, ValueError, r"positions: expected shape \[2, 3\]"),
    ({"positions": torch.ones(2, 3)}, TypeError, "positions: expected dtype"),
    ({"window": 4}, ValueError, "window: expected positions beside a window, got none"),
    ({"window": 0, "positions": torch.ones(2, 3).long()}, ValueError, "window: expected an integer of at least 1"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a positive number"),
    ({"sink": torch.ones(3)}, ValueError, r"sink: expected shape \[4\]"),
    ({"lse": torch.ones(2, 4, 4)}, ValueError, r"lse: expected shape \[2, 4, 3\]"),
    ({"lse": torch.ones(2, 4, 3)}, ValueError, "lse: expected the natural log-sum-exp"),
    ({"heads": "mean"}, ValueError, "heads: expected one of 'each', 'sum', got str 'mean'"),
    ({"backend": "gpu"}, ValueError, "backend: expected one of"),
    ({"query": QUERY * torch.nan}, ValueError, "query: expected finite values"),
    ({"query": QUERY.clone().requires_grad_()}, ValueError, "query: .* requires no gradient"),
    ({"key": KEY.clone().requires_grad_()}, ValueError, "key: .* requires no gradient"),
    ({"sink": torch.ones(4).requires_grad_()}, ValueError, "sink: .* requires no gradient"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_an_error_names_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"query": QUERY, "key": KEY, "scale": 1.0} | changes
    with pytest.raises(error, match=message):
        column_sums(arguments.pop("query"), arguments.pop("key"), **arguments)


def test_without_gradients_tensors_that_require_one_are_summed() -> None:
    with torch.no_grad():
        found = column_sums(QUERY.clone().requires_grad_(), KEY, scale=1.0)
    torch.testing.assert_close(found, torch.full((2, 4, 5), 0.6))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_window_beyond_int32_hides_nothing(backend: str) -> None:
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 6, 8)
    positions = torch.tensor([[3, 4, 5]], dtype=torch.int32)
    far = column_sums(query, key, scale=0.3, positions=positions, window=2**40, backend=backend)
    assert torch.allclose(far, column_sums(query, key, scale=0.3, positions=positions, backend="reference"))


@pytest.mark.parametrize("wrong", [float("inf"), -float("inf")])
def test_an_infinite_lse_of_a_row_that_sees_keys_is_refused(wrong: float) -> None:
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 6, 8)
    with pytest.raises(ValueError, match=r"^lse: expected the natural log-sum-exp"):
        column_sums(query, key, scale=0.3, lse=torch.full((1, 2, 3), wrong))
    dead = torch.full((1, 3), -1)
    assert not column_sums(query, key, scale=0.3, positions=dead, lse=torch.full((1, 2, 3), -float("inf"))).any()
