"""What the CUDA backend of capture and its operator refuse, and their messages when CUDA itself fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from carve_kernels import BackendUnavailable, capture
from carve_kernels.types import Capture
from tests.emulator import emulator
from tests.support.attention import Case, planted, poisoned
from tests.support.operators import capture_cuda, operator


@pytest.fixture(autouse=True)
def _served() -> Iterator[None]:
    with emulator.serving("capture"):
        yield


def test_capture_cuda_refuses_what_it_cannot_use() -> None:
    op = operator("carve_kernels::capture_cuda")
    good = capture_cuda()
    wrong: list[tuple[dict[int, Any], str]] = [
        ({0: [part.repeat(1, 1, 9, 1) for part in good[0]]}, "mask: expected the batch"),
        ({n: [*good[n][:-1], good[n][-1].half()] for n in (0, 1)}, "query: expected the same dtype in all layers"),
        ({9: 3}, "window: expected positions"),
        ({11: torch.tensor(1.0)}, "step: expected one int64"),
        ({12: 2}, "expected first"),
        ({14: good[14].float()}, "scratch: expected contiguous uint8"),
        ({14: good[14][1:]}, "scratch: expected 8 bytes of alignment"),
        ({14: good[14][:64]}, "scratch: expected at least"),
    ]
    for changes, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*(changes.get(index, value) for index, value in enumerate(good)))
    with pytest.raises(RuntimeError, match="out: expected at least"):
        operator("carve_kernels::cuda_build")(torch.zeros(1, dtype=torch.int64))


def test_a_refusal_of_the_backend_says_why() -> None:
    (query, key, tokens), options = planted(Case())
    for changed, reason in (
        ((query.double(), key.double(), tokens), "float64"),
        ((query[:, :0], key, tokens), "query has no heads; use backend='reference'"),
        ((query.repeat(1, 1, 3, 1), key, tokens), "9 rows, this backend serves up to 8; use backend='triton'"),
        ((query.repeat(1, 1, 1, 5), key.repeat(1, 1, 1, 5), tokens), "320 elements"),
        ((query, key.transpose(2, 3).contiguous().transpose(2, 3), tokens), "key has stride"),
        ((query.clone().requires_grad_(), key, tokens), "gradient"),
    ):
        with pytest.raises(BackendUnavailable, match=re.escape(reason)):
            capture(*changed, **{**options, "mask": None}, backend="cuda")
    out = Capture(*(part.double() for part in poisoned(Case())))
    with pytest.raises(BackendUnavailable, match="out is float64"):
        capture(query, key, tokens, **options, out=out, backend="cuda")


@pytest.mark.parametrize(
    ("call", "name"), [(1, "cudaGetDevice"), (2, "cudaSetDevice"), (3, "capture_stats"), (4, "capture_maps")]
)
def test_every_failed_call_of_the_runtime_is_an_error_with_its_name(call: int, name: str) -> None:
    arguments, options = planted(Case())
    with (
        emulator.running("capture", fail=call),
        pytest.raises(RuntimeError, match=f"{name}: planted failure"),
    ):
        capture(*arguments, **options, backend="cuda")
    assert bool(capture(*arguments, **options, backend="cuda").maps.isfinite().all())
