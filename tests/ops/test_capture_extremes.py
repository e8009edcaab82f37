"""Capture where floats lack digits: logits of thousands, and a token with all the mass of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from carve_kernels import capture
from carve_kernels.backends.reference import capture as reference
from carve_kernels.selfcheck.planted import Case, exact, planted
from carve_kernels.types import CaptureOptions
from tests.support.capture_backends import BACKENDS, entered
from tests.support.tolerances import relative, roundings

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Heights of the logits, and what they are computed from.
HIGH = [(1e2, torch.float32), (1e3, torch.float32), *((1e4, dtype) for dtype in DTYPES)]
# Numbers of few digits, which all three dtypes hold and whose products and sums are exact: 100, 1024 and 10240.
FACTORS = {1e2: (10.0, 10.0), 1e3: (32.0, 32.0), 1e4: (128.0, 80.0)}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with entered(request.param) as backend:
        yield backend


def towering(height: float, dtype: torch.dtype, known: str) -> tuple[Any, dict[str, Any]]:
    """Logits up to 8 below a height, in the second batch row below its negative: none needs a rounding."""
    generator = torch.Generator().manual_seed(0)
    up, along = FACTORS[height]
    query, key = torch.zeros(2, 4, 1, 32), torch.zeros(2, 2, 600, 32)
    query[..., 3], key[..., 3] = torch.tensor([2 * up, -2 * up]).view(2, 1, 1), along
    query[..., 17] = torch.tensor([2.0, 1.0, 0.5, 2.0]).view(4, 1)
    key[..., 17] = -torch.randint(0, 65, key.shape[:-1], generator=generator) / 8
    tokens = torch.randperm(600, generator=generator)[:40].expand(2, 40).int()
    options: dict[str, Any] = {"scale": 0.5}
    if known == "sink":
        options["sink"] = torch.tensor([1, 1, -1, -1]) * up * along + 0.5
    elif known == "lse":
        logits = (query @ key.repeat_interleave(2, 1).mT).double() * 0.5
        options["lse"] = logits.logsumexp(-1).float()
    return (query.to(dtype), key.to(dtype), tokens), options


@pytest.mark.parametrize("height, dtype", HIGH)
def test_exact_logits_lose_nothing_to_their_height(backend: str, height: float, dtype: torch.dtype) -> None:
    check_exact(backend, height, dtype)


@pytest.mark.parametrize("known", ["sink", "lse"])
def test_a_sink_or_a_known_sum_loses_nothing_to_its_height(backend: str, known: str) -> None:
    check_exact(backend, 1e4, torch.float32, known)


def check_exact(backend: str, height: float, dtype: torch.dtype, known: str = "") -> None:
    arguments, options = towering(height, dtype, known)
    exact_arguments, exact_options = exact(arguments, options)
    truth = reference.forward(*exact_arguments, CaptureOptions(**exact_options, heads="each")).maps
    found = capture(*arguments, **options, heads="each", backend=backend).maps
    there = truth > 1e-30
    # Powers of up to 12 in base 2 and some sums, each rounded once.
    assert there.any() and relative(found[there], truth[there]) < roundings(32)
    assert not found[~there].any()


@pytest.mark.parametrize("height, dtype", HIGH)
def test_high_logits_are_as_accurate_as_the_reference(backend: str, height: float, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, keys=151, rows=2)
    arguments, options = planted(case)
    query, key, _ = (part.double() if part.is_floating_point() else part for part in arguments)
    visible = options["mask"].expand(-1, case.query_heads, -1, -1)
    options["scale"] = height / float((query @ key.repeat_interleave(3, 1).mT)[visible].abs().max())
    exact_arguments, exact_options = exact(arguments, options)
    truth = reference.forward(*exact_arguments, CaptureOptions(**exact_options, heads="each")).maps
    own = reference.forward(*arguments, CaptureOptions(**options, heads="each")).maps
    found = capture(*arguments, **options, heads="each", backend=backend).maps
    there = truth > 1e-30
    # A logit that is rounded where it is as high as the others are moves its probability by as many roundings.
    bound = relative(own[there], truth[there]) + roundings(2) * height
    assert relative(found[there], truth[there]) < bound
    # The highest logit has the rounding that it has in the sum.
    whole = truth > 1 - 1e-9
    assert height < 1e3 or (whole.any() and relative(found[whole], truth[whole]) < roundings(4))


def alone(dtype: torch.dtype, tokens: int) -> tuple[Any, dict[str, Any]]:
    """Rows that see one of the tokens, and of the other keys the first one none and the second one all."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 6, 2, 64, generator=generator), torch.randn(1, 2, 400, 64, generator=generator)
    mask = torch.ones(1, 1, 2, 400, dtype=torch.bool)
    mask[:, :, 0] = False
    mask[..., 400 - tokens :] = False
    mask[..., 400 - tokens // 2] = True
    where = torch.arange(400 - tokens, 400, dtype=torch.int32)[None]
    return (query.to(dtype), key.to(dtype), where), {"scale": 0.125, "mask": mask}


@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 2), *((dtype, 301) for dtype in DTYPES)])
def test_a_token_with_all_the_mass_has_no_entropy(backend: str, dtype: torch.dtype, tokens: int) -> None:
    arguments, options = alone(dtype, tokens)
    found = capture(*arguments, **options, backend=backend)
    assert found.mass[0, 0] == pytest.approx(1, rel=1e-6) and 0 < found.mass[0, 1] < 0.9
    assert not found.entropy.any()


def test_a_window_of_one_key_has_no_entropy(backend: str) -> None:
    (query, key, tokens), _ = alone(torch.float32, 301)
    shape = (6, -1, -1, -1)
    found = capture(
        query.expand(shape), key.expand(shape), tokens.expand(6, -1), scale=0.125, window=1,
        positions=torch.arange(110, 398, 24).view(6, 2), backend=backend,
    )  # fmt: skip
    assert not found.entropy.any() and torch.allclose(found.mass, torch.ones(6, 2), rtol=1e-6)
