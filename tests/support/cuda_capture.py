"""Problems for the CUDA kernels of capture, and calls of them."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels import capture
from carve_kernels.types import Capture
from tests.support.attention import Case, planted, poisoned

LONG = Case(batch=2, rows=3, keys=2300, tokens=83, query_heads=6, key_heads=3, size=72, gain=1.0, view="positions")
WIDE = Case(batch=2, rows=7, keys=150, tokens=45, query_heads=20, key_heads=2, size=40, sink=True, softcap=3.0)


def captured(case: Case, heads: str = "mean") -> Capture:
    arguments, options = planted(case)
    return capture(*arguments, **options, heads=heads, out=poisoned(case, heads), backend="cuda")  # type: ignore[arg-type]


def same(one: Capture, other: Capture) -> bool:
    return all(torch.equal(part, wanted) for part, wanted in zip(one, other, strict=True))


def alike(one: Capture, other: Capture) -> bool:
    """Whether captures are equal up to roundings: other numbers of splits add in other orders."""
    return all(torch.allclose(part, wanted, rtol=1e-5, atol=0.0) for part, wanted in zip(one, other, strict=True))


def layered(case: Case, layers: int, steps: int = 1) -> tuple[list[Any], Capture]:
    problems = [planted(case.but(seed=seed))[0] for seed in range(layers)]
    shape = (steps, layers, case.batch, case.rows)
    return problems, Capture(*(torch.full(size, torch.nan) for size in ((*shape, case.tokens), shape, shape)))
