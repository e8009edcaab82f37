"""Capture where floats are short of digits: logits of thousands, and a token that holds all that a row sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from carve_kernels import capture
from carve_kernels.backends.reference import capture as reference
from tests.ops.attention import Case, exact, planted
from tests.ops.capture_rooms import ROOMS, entered
from tests.tolerances import relative, roundings

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Numbers of few digits, so that all three dtypes hold them and every sum of their products is exact.
HEIGHTS = {1e2: (10.0, 10.0), 1e3: (32.0, 32.0), 1e4: (128.0, 80.0)}


@pytest.fixture(params=ROOMS)
def room(request: pytest.FixtureRequest) -> Iterator[str]:
    with entered(request.param) as room:
        yield room


def towering(height: float, dtype: torch.dtype, sign: float = 1.0) -> tuple[Any, dict[str, Any]]:
    """Logits that lie up to 8 below a height, or below its negative, each of them exact in any order of sums."""
    generator = torch.Generator().manual_seed(0)
    up, along = HEIGHTS[height]
    query, key = torch.zeros(1, 4, 2, 32), torch.zeros(1, 2, 1100, 32)
    query[..., 3], key[..., 3] = 2 * sign * up, along
    query[..., 17] = torch.tensor([[2.0, 1.0], [1.0, 0.5], [0.25, 2.0], [0.5, 1.0]])
    key[..., 17] = -torch.randint(0, 65, key.shape[:-1], generator=generator) / 8
    tokens = torch.randperm(1100, generator=generator)[None, :40].int()
    return (query.to(dtype), key.to(dtype), tokens), {"scale": 0.5}


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("height", HEIGHTS)
def test_logits_that_are_exact_lose_nothing_to_their_height(
    room: str, height: float, dtype: torch.dtype, sign: float
) -> None:
    arguments, options = towering(height, dtype, sign)
    wide, wide_options = exact(arguments, options)
    truth = reference.forward(*wide, **wide_options, heads="each")
    found = capture(*arguments, **options, heads="each", backend=room)
    print("ERR", room, height, sign, dtype, relative(found.maps, truth.maps))
    # Powers of up to 12 in base 2, each rounded once, and some sums.
    assert relative(found.maps, truth.maps) < roundings(32)
