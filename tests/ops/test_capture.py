"""Capture: the reference against a textbook, every backend against the reference in float64, laws, and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carve_kernels import capture
from carve_kernels.backends.reference import capture as reference
from carve_kernels.types import Capture, CaptureOptions
from tests.support.attention import Case, exact, planted, poisoned, textbook
from tests.support.capture_backends import BACKENDS, entered
from tests.support.tolerances import close, correlation, roundings

CASES = {
    "plain": Case(),
    "one row": Case(rows=1, keys=131, view="all"),
    "positions": Case(view="positions", rows=5),
    "window": Case(view="positions", window=23),
    "head mask": Case(view="head mask"),
    "softcap": Case(softcap=2.5),
    "sink": Case(sink=True),
    "sink, softcap, window": Case(sink=True, softcap=4.0, view="positions", window=31, rows=2),
    "many heads": Case(query_heads=28, key_heads=4, size=128, keys=203, tokens=51),
    "no groups": Case(query_heads=3, key_heads=3, size=40),
    "more rows than tokens": Case(rows=33, tokens=2, ragged=False),
    "two tiles of rows": Case(rows=13, query_heads=8, key_heads=2, size=72, keys=161),
    "longer than a block": Case(batch=1, rows=2, keys=2300, tokens=700, query_heads=2, key_heads=1, size=32),
    "one key": Case(keys=1, tokens=1, view="all", ragged=False),
    "no tokens": Case(tokens=0, ragged=False),
    "one token": Case(tokens=1, ragged=False),
    "every token padded": Case(tokens=5),
    "no keys": Case(keys=0, view="all", ragged=False),
    "no batch": Case(batch=0, view="all", ragged=False),
}
SIZES = (32, 40, 64, 72, 80, 96, 128, 192, 256)


def arguments_of(name: str, **changes: Any) -> tuple[Case, Any, dict[str, Any]]:
    case = CASES[name].but(**changes)
    arguments, options = planted(case)
    if name == "every token padded":
        arguments[2].fill_(-1)
    return case, arguments, options


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with entered(request.param) as backend:
        yield backend


def check(backend: str, case: Case, arguments: Any, options: dict[str, Any], heads: str = "mean") -> None:
    exact_arguments, exact_options = exact(arguments, options)
    truth = reference.forward(*exact_arguments, CaptureOptions(**exact_options, heads=heads))  # type: ignore[arg-type]
    own = reference.forward(*arguments, CaptureOptions(**options, heads=heads))  # type: ignore[arg-type]
    out = poisoned(case, heads)
    found = capture(*arguments, **options, heads=heads, out=out, backend=backend)  # type: ignore[arg-type]
    assert all(part is target for part, target in zip(found, out, strict=True))
    # One rounding of a logit of 50 changes its probability by 50 roundings.
    slack = roundings(case.size + 64 + case.query_heads)
    for part, mine, right in zip(found, own, truth, strict=True):
        assert part.dtype == torch.float32
        close(part, mine, right, slack)
    # Maps that are flat up to their last digits have no correlation.
    if truth.maps.numel() > 8 and float(truth.maps.std()) > 1e-2 * float(truth.maps.mean()):
        assert correlation(found.maps, truth.maps) > 1 - 1e-6


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keys < 1000])
def test_the_reference_is_the_textbook(name: str) -> None:
    _, arguments, options = arguments_of(name)
    exact_arguments, exact_options = exact(arguments, options)
    for part, right in zip(
        reference.forward(*exact_arguments, CaptureOptions(**exact_options)), textbook(arguments, options), strict=True
    ):
        assert torch.allclose(part, right, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_a_backend_is_as_accurate_as_the_reference(backend: str, name: str, dtype: torch.dtype, heads: str) -> None:
    check(backend, *arguments_of(name, dtype=dtype), heads=heads)


@pytest.mark.parametrize("size", SIZES)
def test_every_head_size(backend: str, size: int) -> None:
    check(backend, *arguments_of("plain", size=size, dtype=torch.bfloat16))


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        query_heads=st.sampled_from([2, 4, 6]),
        key_heads=st.sampled_from([1, 2]),
        rows=st.integers(1, 9),
        keys=st.integers(1, 150),
        size=st.sampled_from(SIZES),
        tokens=st.integers(0, 40),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        view=st.sampled_from(["mask", "head mask", "positions", "all"]),
        softcap=st.sampled_from([None, 3.0]),
        window=st.sampled_from([None, 1, 17]),
        sink=st.booleans(),
        gain=st.sampled_from([0.0, 3.0]),
        seed=st.integers(0, 1000),
    )
)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape_and_mask(name: str, case: Case) -> None:
    arguments, options = planted(case)
    with entered(name) as backend:
        check(backend, case, arguments, options)


def test_a_row_that_sees_nothing_gives_zeros(backend: str) -> None:
    case, arguments, options = arguments_of("plain")
    options["mask"][0, :, 1] = False
    found = capture(*arguments, **options, out=poisoned(case), backend=backend)
    assert not found.maps[0, 1].any() and not found.mass[0, 1] and not found.entropy[0, 1]
    assert found.mass[0, 0] > 0 and bool(found.maps.isfinite().all())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_affects_every_row_that_sees_it(backend: str, wrong: float) -> None:
    _, (query, key, tokens), options = arguments_of("positions", rows=3)
    options["positions"] = torch.tensor([[20, 63, 76], [57, 64, 76]])
    visible = (tokens >= 0)[:, None] & (tokens[:, None] <= options["positions"][..., None])
    clean = capture(query, key, tokens, **options, backend=backend)
    for columns in (slice(21, 22), slice(64, None)):
        spoiled = key.clone()
        spoiled[0, 1, columns] = wrong
        found = capture(query, spoiled, tokens, **options, backend=backend)
        hit = options["positions"] >= columns.start
        hit[1] = False
        assert torch.equal(found.mass.isnan(), hit) and torch.equal(found.entropy.isnan(), hit)
        assert torch.equal(found.maps.isnan() & visible, hit[..., None] & visible)
        for part, right in zip(found, clean, strict=True):
            assert torch.allclose(part[~hit], right[~hit], rtol=2e-5, atol=0)


@pytest.mark.parametrize("stray", [[-2, 0], [4, 1], [2**31 - 1, 0], [4, 5]])
def test_tokens_outside_the_keys(stray: list[int]) -> None:
    query, key = torch.randn(1, 2, 1, 32), torch.randn(1, 1, 4, 32)
    with pytest.raises(ValueError, match=r"^tokens: "):
        capture(query, key, torch.tensor([stray]), scale=0.1)
    assert not capture(query, key, torch.tensor([stray]), scale=0.1, check=False).maps[..., 0].any()


@pytest.mark.parametrize("view", ["mask", "positions"])
def test_huge_logits_pick_one_key(backend: str, view: str) -> None:
    case, arguments, options = arguments_of("plain", view=view)
    options["scale"] = 1e4
    check_found = capture(*arguments, **options, out=poisoned(case), backend=backend)
    exact_arguments, exact_options = exact(arguments, options)
    truth = reference.forward(*exact_arguments, CaptureOptions(**exact_options))
    assert bool(check_found.maps.isfinite().all())
    assert torch.allclose(check_found.maps.double(), truth.maps, rtol=1e-3, atol=1e-6)
    assert float(truth.maps.max()) > 0.1


def test_a_batch_is_its_rows_and_tokens_may_be_in_any_order(backend: str) -> None:
    _, (query, key, tokens), options = arguments_of("positions")
    whole = capture(query, key, tokens, **options, backend=backend)
    # The reference uses a BLAS, whose order of sums depends on the shape, and torch's exp depends on the position.
    slack = 2e-5 if backend == "reference" else 0.0
    for b in range(len(query)):
        part = slice(b, b + 1)
        alone = capture(
            query[part],
            key[part],
            tokens[part],
            **{**options, "positions": options["positions"][part]},
            backend=backend,
        )
        assert torch.allclose(alone.maps[0], whole.maps[b], rtol=slack, atol=0)
        assert torch.allclose(alone.mass[0], whole.mass[b], rtol=slack, atol=0)
    order = torch.randperm(tokens.shape[1])
    mixed = capture(query, key, tokens[:, order], **options, backend=backend)
    assert torch.allclose(mixed.maps, whole.maps[..., order], rtol=slack, atol=0)


def test_groups_equal_repeated_heads(backend: str) -> None:
    _, (query, key, tokens), options = arguments_of("positions")
    grouped = capture(query, key, tokens, **options, backend=backend)
    repeated = capture(query, key.repeat_interleave(3, 1), tokens, **options, backend=backend)
    assert torch.allclose(grouped.maps, repeated.maps, rtol=1e-5, atol=0)


def test_a_given_lse_gives_the_same_maps(backend: str) -> None:
    _, arguments, options = arguments_of("positions")
    query, key, _ = arguments
    logits = query @ key.repeat_interleave(3, 1).mT * options["scale"]
    visible = torch.arange(key.shape[2]) <= options["positions"][:, None, :, None]
    lse = logits.masked_fill(~visible, -torch.inf).logsumexp(-1)
    found = capture(*arguments, **options, lse=lse, backend=backend)
    assert torch.allclose(found.maps, capture(*arguments, **options, backend=backend).maps, rtol=2e-5, atol=0)
    with pytest.raises(ValueError, match="lse: expected the natural"):
        capture(*arguments, **options, lse=lse / torch.log(torch.tensor(2.0)), backend=backend)


def test_entropy_is_1_for_a_flat_map_and_0_for_one_token() -> None:
    query, key = torch.zeros(1, 2, 1, 64), torch.randn(1, 1, 40, 64)
    tokens = torch.arange(10)[None]
    flat = capture(query, key, tokens, scale=1.0)
    assert torch.allclose(flat.entropy, torch.ones(1, 1)) and torch.allclose(flat.mass, torch.tensor([[0.25]]))
    assert capture(query, key, tokens[:, :1], scale=1.0).entropy.item() == 0.0


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "query no tensor": (TypeError, "query: expected a tensor", {"query": [1.0]}),
    "query 3-D": (ValueError, r"query: expected shape \[B, A, R, D\]", {"query": torch.zeros(2, 6, 64)}),
    "query int": (TypeError, "query: expected dtype", {"query": torch.zeros(2, 6, 3, 64, dtype=torch.int64)}),
    "key dtype": (TypeError, "key: expected dtype", {"key": torch.zeros(2, 2, 77, 64, dtype=torch.float16)}),
    "key batch": (ValueError, "key: expected shape", {"key": torch.zeros(1, 2, 77, 64)}),
    "key heads": (ValueError, "key: expected a number of heads that divides", {"key": torch.zeros(2, 4, 77, 64)}),
    "tokens float": (TypeError, "tokens: expected dtype", {"tokens": torch.zeros(2, 3)}),
    "tokens 1-D": (ValueError, "tokens: expected shape", {"tokens": torch.zeros(3, dtype=torch.int32)}),
    "tokens elsewhere": (
        ValueError,
        "tokens: expected a tensor on cpu as the query, got one on meta",
        {"tokens": torch.zeros(2, 3, dtype=torch.int32, device="meta")},
    ),
    "mask float": (TypeError, "mask: expected dtype", {"mask": torch.zeros(2, 1, 3, 77)}),
    "mask heads": (ValueError, "mask: expected 1 or 6", {"mask": torch.ones(2, 2, 3, 77, dtype=torch.bool)}),
    "mask keys": (ValueError, "mask: expected shape", {"mask": torch.ones(2, 1, 3, 76, dtype=torch.bool)}),
    "both": (ValueError, "positions: expected None beside", {"positions": torch.zeros(2, 3, dtype=torch.int64)}),
    "softcap": (ValueError, "softcap: expected a positive", {"softcap": 0.0}),
    "window": (ValueError, "window: expected positions", {"window": 4}),
    "scale": (TypeError, "scale: expected a number", {"scale": None}),
    "scale nan": (ValueError, "scale: expected a finite", {"scale": float("nan")}),
    "heads": (ValueError, "heads: expected one of", {"heads": "max"}),
    "sink": (ValueError, "sink: expected shape", {"sink": torch.zeros(5)}),
    "lse": (ValueError, "lse: expected shape", {"lse": torch.zeros(2, 3, 6)}),
    "backend": (ValueError, "backend: expected one of", {"backend": "gpu"}),
    "mask elsewhere": (
        ValueError,
        "mask: expected a tensor on cpu as the query",
        {"mask": torch.ones(2, 1, 3, 77, dtype=torch.bool, device="meta")},
    ),
    **{
        f"out.{field} elsewhere": (
            ValueError,
            rf"out\.{field}: expected a tensor on cpu as the query, got one on meta",
            {"out": poisoned(Case())._replace(**{field: getattr(poisoned(Case()), field).to("meta")})},
        )
        for field in Capture._fields
    },
    "inf": (ValueError, "query: expected finite values", {"query": torch.full((2, 6, 3, 64), torch.inf)}),
    "nan": (ValueError, "query: expected finite values", {"query": torch.full((2, 6, 3, 64), torch.nan)}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    error, message, changes = BAD[name]
    (query, key, tokens), options = planted(Case())
    given_arguments = {"query": query, "key": key, "tokens": tokens, **options, **changes}
    with pytest.raises(error, match=message):
        capture(**given_arguments)


def test_a_sum_that_overflows_is_not_an_error_of_the_query() -> None:
    (query, key, tokens), options = planted(Case(dtype=torch.float16))
    query = query.abs().clamp(1.0, 2.0) * 100
    assert query.sum() == torch.inf
    assert bool(capture(query, key, tokens, **options, check=True).maps.isfinite().all())
