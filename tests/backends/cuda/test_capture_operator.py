"""What the CUDA backend of capture and its operator refuse, and their messages when CUDA itself fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from carve_kernels import BackendUnavailable, capture
from carve_kernels import capture_layers as capture_public
from carve_kernels.types import Capture
from tests.emulator import emulator
from tests.support.attention import Case, planted, poisoned
from tests.support.operators import capture_layers, capture_plan_cuda, operator


@pytest.fixture(autouse=True)
def _served() -> Iterator[None]:
    with emulator.serving("capture"):
        yield


def test_the_operator_refuses_what_it_cannot_use() -> None:
    op = operator("carve_emulated::capture_layers")
    good = dict(zip([argument.name for argument in op._schema.arguments], capture_layers(), strict=True))
    scratch, tickets = good["scratch"], good["tickets"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"scratch": scratch.float()}, "scratch: expected contiguous uint8, got a torch.float32"),
        ({"scratch": scratch[::2]}, "scratch: expected contiguous uint8, got .* not contiguous"),
        ({"scratch": scratch[1:]}, "scratch: expected .* alignment"),
        ({"scratch": scratch[:64]}, "scratch: expected at least .* bytes, got 64"),
        ({"tickets": tickets.long()}, "tickets: expected contiguous int32, got a torch.int64"),
        ({"tickets": tickets[::2]}, "tickets: expected contiguous int32, got .* not contiguous"),
        ({"tickets": tickets[:1]}, "tickets: expected at least .*, got 1"),
    ]
    for changes, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(**{**good, **changes})
    with pytest.raises(RuntimeError, match="out: expected at least"):
        operator("carve_kernels::cuda_build")(torch.zeros(1, dtype=torch.int64))


def test_the_needs_are_asked_for_by_sizes() -> None:
    op = operator("carve_emulated::capture_plan_cuda")
    sizes, out = capture_plan_cuda()
    wrong: list[tuple[list[int], torch.Tensor, str]] = [
        (sizes[1:], out, "sizes: expected 11 numbers, got 10"),
        ([*sizes[:3], -1, *sizes[4:]], out, "sizes: expected numbers of at least 0, got -1"),
        ([*sizes[:3], 0, *sizes[4:]], out, "sizes: expected a number of key heads that divides"),
        ([*sizes[:2], 2, *sizes[3:]], out, "sizes: expected a number of key heads .*, got 4 and 2"),
        ([*sizes[:8], 8, *sizes[9:]], out, "sizes: expected elements of 2 or 4 bytes, got 8"),
        (sizes, torch.zeros(3, dtype=torch.int64), "out: expected 11 numbers, got 3"),
        (sizes, torch.zeros(2), "out: unexpected dtype"),
    ]
    for numbers, target, message in wrong:
        with pytest.raises(RuntimeError, match=f"capture_plan_cuda: {message}"):
            op(numbers, target)


def test_more_key_heads_than_heads_are_named_before_anything_is_planned() -> None:
    query, key, tokens = torch.ones(1, 2, 1, 32), torch.ones(1, 4, 9, 32), torch.zeros(1, 3, dtype=torch.int32)
    out = Capture(torch.zeros(1, 1, 1, 1, 3), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    with pytest.raises(ValueError, match="key: expected a number of heads that divides the query's 2, got 4"):
        capture_public([query], [key], tokens, scale=1.0, step=torch.tensor(0), out=out, backend="cuda")


def test_more_tokens_than_a_row_has_parts_are_named() -> None:
    query, key = torch.ones(1, 1, 1, 32), torch.ones(1, 1, 4, 32)
    tokens = torch.full((1, 2**21 + 1), -1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="tokens: expected sizes whose blocks fit"):
        capture(query, key, tokens, scale=1.0, backend="cuda", check=False)


def test_a_refusal_of_the_backend_says_why() -> None:
    (query, key, tokens), options = planted(Case())
    for changed, reason in (
        ((query.double(), key.double(), tokens), "float64"),
        ((query[:, :0], key, tokens), "query has no heads; use backend='reference'"),
        ((query.repeat(1, 1, 1, 5), key.repeat(1, 1, 1, 5), tokens), "320 elements"),
        ((query, key.transpose(2, 3).contiguous().transpose(2, 3), tokens), "key has stride"),
    ):
        with pytest.raises(BackendUnavailable, match=re.escape(reason)):
            capture(*changed, **{**options, "mask": None}, backend="cuda")
    out = Capture(*(part.double() for part in poisoned(Case())))
    with pytest.raises(BackendUnavailable, match="out is float64"):
        capture(query, key, tokens, **options, out=out, backend="cuda")


@pytest.mark.parametrize(
    ("call", "name", "dtype"),
    [
        (1, "cudaGetDevice", torch.float32),
        (2, "cudaSetDevice", torch.float32),
        (3, "capture_span", torch.float32),
        (4, "capture_plain", torch.float32),
        (4, "capture_stream", torch.bfloat16),
        (5, "capture_maps", torch.bfloat16),
    ],
)
def test_every_failed_call_of_the_runtime_is_an_error_with_its_name(call: int, name: str, dtype: torch.dtype) -> None:
    arguments, options = planted(Case(dtype=dtype))
    with (
        emulator.running("capture", fail=call),
        pytest.raises(RuntimeError, match=f"{name}: planted failure"),
    ):
        capture(*arguments, **options, backend="cuda")
    assert bool(capture(*arguments, **options, backend="cuda").maps.isfinite().all())
