"""The kernels of the gradients of a capture against the reference in float64, and how they divide their work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from carve_kernels.backends import BACKWARD, resolve_backward, why_no_backward
from carve_kernels.backends.cpu import capture as cpu_capture
from carve_kernels.backends.reference import capture_backward as reference
from carve_kernels.backends.triton import capture_plan
from carve_kernels.selfcheck.moving import move
from carve_kernels.types import CaptureOptions, Given
from tests.support.attention import Case, exact, planted
from tests.support.capture_backends import BACKENDS, entered


def has_kernel(backend: Any) -> bool:
    name = str(backend if isinstance(backend, str) else backend.values[0]).split()[0]
    return BACKWARD[name] == name != "reference"


KERNELS = [backend for backend in BACKENDS if has_kernel(backend)]
CASES = {
    "mask": Case(query_heads=6, key_heads=2, rows=3, keys=77, size=40, tokens=19),
    "positions": Case(query_heads=3, key_heads=3, rows=2, keys=530, size=33, tokens=40, view="positions", window=400),
    "head mask, softcap": Case(query_heads=14, key_heads=2, rows=2, keys=65, size=72, view="head mask", softcap=3.0),
    "sink": Case(query_heads=2, key_heads=1, rows=5, keys=1100, size=32, tokens=300, view="all", sink=True),
    "one row": Case(batch=1, query_heads=7, key_heads=1, rows=1, keys=600, size=128, tokens=500, view="positions"),
    "no tokens": Case(tokens=0, ragged=False),
    "no keys": Case(keys=0, view="all", ragged=False),
}


@pytest.fixture(params=KERNELS)
def backward(request: pytest.FixtureRequest) -> Iterator[Any]:
    with entered(request.param) as name:
        if reason := why_no_backward(name):
            pytest.skip(reason)
        yield Backward(name, "cuda" if request.param.endswith("on gpu") else "cpu")


class Backward:
    """The backward of a backend, with its arguments on its device."""

    def __init__(self, name: str, device: str) -> None:
        self.module = __import__(f"carve_kernels.backends.{name}.capture_backward", fromlist=["backward"])
        self.device = device

    def __call__(self, arguments: Any, options: Any, given: Given, **more: Any) -> list[torch.Tensor | None]:
        tensors, moved = move((arguments, options), self.device)
        parts = Given(*(None if each is None else each.to(self.device) for each in given))
        found = self.module.backward(*tensors, CaptureOptions(**moved), parts, **more)
        return [None if each is None else each.cpu() for each in found]


def planted_given(case: Case, heads: str) -> Given:
    random = torch.Generator().manual_seed(3)
    middle = (case.query_heads,) if heads == "each" else ()
    shapes = ((case.batch, *middle, case.rows, case.tokens), (case.batch, case.rows), (case.batch, case.rows))
    return Given(*(torch.randn(shape, generator=random) for shape in shapes))


def expected_of(arguments: Any, options: Any, given: Given) -> list[torch.Tensor | None]:
    doubled, more = exact(arguments, options)
    parts = Given(*(None if each is None else each.double() for each in given))
    return list(reference.backward(*doubled, CaptureOptions(**more), parts))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest norm of a row's difference, relative to the norm of the row or a hundredth of the largest one."""
    rows, others = (each.double().reshape(-1, each.shape[-1]) for each in (expected, found))
    lengths = rows.norm(dim=-1)
    return float(((others - rows).norm(dim=-1) / lengths.clamp(min=max(float(lengths.max()) / 100, 1e-30))).max())


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_the_reference_in_float64(
    backward: Backward, name: str, dtype: torch.dtype, heads: str
) -> None:
    case = CASES[name].but(dtype=dtype, gain=2.0)
    arguments, options = planted(case)
    options["heads"] = heads
    given = planted_given(case, heads)
    found, expected = backward(arguments, options, given), expected_of(arguments, options, given)
    for one, other, like in zip(found, expected, (*arguments[:2], options.get("sink")), strict=True):
        assert (one is None) == (other is None)
        if one is None or other is None:
            continue
        assert one.dtype == like.dtype and one.shape == like.shape
        if name.startswith("no "):
            assert not one.any()
            continue
        assert bool(other.any()) and distance(one, other) <= max(2e-5, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("left_out", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_parts_without_a_gradient_are_zeros(backward: Backward, left_out: tuple[int, ...]) -> None:
    case = CASES["sink"].but(keys=70, tokens=20)
    arguments, options = planted(case)
    given = planted_given(case, "mean")
    some = Given(*(None if index in left_out else part for index, part in enumerate(given)))
    zeros = Given(*(torch.zeros_like(part) if index in left_out else part for index, part in enumerate(given)))
    for one, other in zip(backward(arguments, options, some), backward(arguments, options, zeros), strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_the_key_may_be_left_out(backward: Backward) -> None:
    case = CASES["mask"]
    arguments, options = planted(case)
    given = planted_given(case, "mean")
    query, key, _ = backward(arguments, options, given, of_key=False)
    assert key is None and torch.equal(query, backward(arguments, options, given)[0])  # type: ignore[arg-type]


def test_any_strides(backward: Backward) -> None:
    """A query and keys of a projection, a mask that is expanded, gradients that are broadcast."""
    case = CASES["mask"].but(query_heads=4)
    arguments, options = planted(case.but(view="all"))
    query, key, tokens = arguments
    options["mask"] = (torch.arange(case.keys) % 5 != 2).expand(case.batch, 1, case.rows, -1)
    projected = (
        query.transpose(1, 2).contiguous().transpose(1, 2),
        key.transpose(1, 2).contiguous().transpose(1, 2),
        tokens,
    )
    given = Given(torch.tensor(0.5).expand(case.batch, case.rows, case.tokens), torch.ones(1).expand(2, 3), None)
    expected = expected_of(arguments, options, given)
    for one, other in zip(backward(projected, options, given)[:2], expected, strict=False):
        assert distance(one, other) <= 2e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_tokens_that_are_listed_twice_count_twice(backward: Backward, heads: str) -> None:
    """Next to each other, and farther from each other than a block of tokens."""
    case = CASES["mask"].but(tokens=150, ragged=False, query_heads=4)
    (query, key, tokens), options = planted(case)
    options["heads"] = heads
    arguments = query, key, torch.arange(150, dtype=tokens.dtype).expand(case.batch, -1) * 2 % 70 // 4
    given = planted_given(case, heads)
    expected = expected_of(arguments, options, given)
    for one, other in zip(backward(arguments, options, given)[:2], expected, strict=False):
        assert distance(one, other) <= 2e-5  # type: ignore[arg-type]


@pytest.fixture
def few_scores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if memory for the scores of Triton's kernels were scarce."""
    caches = capture_plan.plan, capture_plan.plan_scratch
    monkeypatch.setattr(capture_plan, "MOST_SCORES", 2**15)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("few_scores")
@pytest.mark.parametrize("batch", [1, 3])
def test_many_rows_are_computed_in_turns(backward: Backward, batch: int) -> None:
    is_triton = "triton" in backward.module.__name__
    case = Case(batch=batch, query_heads=4, key_heads=2, size=8, tokens=30, view="positions", gain=1.0)
    case = case.but(rows=7, keys=300) if is_triton else case.but(rows=700 // batch, keys=800)
    arguments, options = planted(case)
    given = planted_given(case, "mean")
    found, expected = backward(arguments, options, given), expected_of(arguments, options, given)
    for one, other in zip(found[:2], expected, strict=False):
        assert distance(one, other) <= 2e-5  # type: ignore[arg-type]


def test_the_result_does_not_depend_on_the_threads(backward: Backward) -> None:
    case = CASES["one row"].but(rows=4, batch=2)
    arguments, options = planted(case)
    given = planted_given(case, "mean")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(backward(arguments, options, given))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert torch.equal(found[0][0], others[0]) and torch.equal(found[0][1], others[1])  # type: ignore[arg-type]


def test_a_known_log_sum_exp_is_that_of_the_logits(backward: Backward) -> None:
    case = CASES["sink"].but(keys=70, tokens=20)
    arguments, options = planted(case)
    query, key, _ = arguments
    logits = options["scale"] * query.double() @ key.double().repeat_interleave(2, 1).mT
    sink = options["sink"].double().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
    given = planted_given(case, "mean")
    expected = expected_of(arguments, options, given)
    options["lse"] = torch.cat([logits, sink], -1).logsumexp(-1).float()
    for one, other in zip(backward(arguments, options, given), expected, strict=True):
        assert distance(one, other) <= 2e-5  # type: ignore[arg-type]


def test_float64_is_left_to_the_reference() -> None:
    query = torch.zeros(1, 2, 1, 8, dtype=torch.float64)
    chosen = resolve_backward(cpu_capture, query.device, query, query, torch.zeros(1, 1), CaptureOptions(1.0))
    assert chosen is reference


def test_a_window_beyond_int32_hides_nothing(backward: Any) -> None:
    arguments, options = planted(CASES["one row"])
    options["positions"] = options["positions"].to(torch.int32)
    given = planted_given(CASES["one row"], "mean")
    found, expected = (backward(arguments, {**options, "window": window}, given) for window in (2**40, None))
    assert found[0] is not None and found[0].any()
    for mine, other in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(mine, other)
