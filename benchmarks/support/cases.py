"""The measured shapes, and inputs for them whose answer has a peak."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch

VISUAL_SHARE = 0.8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LENGTHS = (512, 2048, 8192)
FULL_LENGTHS = (*LENGTHS, 32768)


class Geometry(NamedTuple):
    """Attention of one layer of a model."""

    heads: int
    key_heads: int
    size: int


GEOMETRIES = {
    "qwen2.5-vl-3b": Geometry(16, 2, 128),
    "qwen2.5-vl-7b": Geometry(28, 4, 128),
    "llava-1.5-7b": Geometry(32, 32, 128),
    "smolvlm": Geometry(9, 3, 64),
}


class Case(NamedTuple):
    """A line of the table of capture."""

    geometry: str
    length: int
    rows: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.geometry}-S{self.length}-R{self.rows}-{self.dtype}"


QUICK = [Case("smolvlm", 512, rows, dtype) for rows, dtype in ((1, "bf16"), (8, "fp32"))]


def standard(geometries: Iterable[str] = GEOMETRIES, lengths: Iterable[int] = LENGTHS) -> Iterator[Case]:
    for geometry, length, dtype, rows in product(geometries, lengths, DTYPES, (1, 8, 32)):
        yield Case(geometry, length, rows, dtype)


@dataclass(frozen=True)
class Problem:
    """Inputs of capture with the layouts of a model.

    =========  ======  ==============  ==============================================================
    name       dtype   shape           meaning
    =========  ======  ==============  ==============================================================
    queries    float   [1, A, S, D]    all rows of the layer: the transposed view of a projection
    query      float   [1, A, R, D]    the last R of them
    key        float   [1, KV, S, D]   the filled part of a larger cache
    tokens     int32   [1, N]          the visual tokens
    positions  int64   [1, R] or None  last key that a row sees; None where one row sees all
    hidden     bool    [R, S] or None  the same as a mask of hidden keys, for plain torch
    =========  ======  ==============  ==============================================================
    """

    queries: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor | None
    hidden: torch.Tensor | None
    scale: float

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "positions": self.positions}


def problem(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Problem:
    heads, key_heads, size = GEOMETRIES[case.geometry]
    length, rows, dtype = case.length, case.rows, DTYPES[case.dtype]
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, device=device)

    visual = int(VISUAL_SHARE * length)
    first = (length - visual) // 2
    # Queries share a direction with the keys of one spot: a peak in every row and head.
    common = torch.nn.functional.normalize(normal(size), dim=0) * size**0.5
    projection = normal(1, length, heads, size).add_(common)
    cache = normal(1, key_heads, length + 256, size)
    spot = first + visual // 3
    cache[:, :, spot : spot + 8] += 0.4 * common
    queries = projection.to(dtype).transpose(1, 2)
    positions = hidden = None
    if rows > 1:
        positions = torch.arange(length - rows, length, device=device)[None]
        hidden = torch.arange(length, device=device) > positions[0][:, None]
    return Problem(
        queries=queries,
        query=queries[:, :, length - rows :],
        key=cache.to(dtype)[:, :, :length],
        tokens=torch.arange(first, first + visual, dtype=torch.int32, device=device)[None],
        positions=positions,
        hidden=hidden,
        scale=size**-0.5,
    )


def truth(problem: Problem) -> torch.Tensor:
    """The maps [1, R, N] in float64, one key head at a time."""
    rows, length = problem.query.shape[2], problem.key.shape[2]
    total = torch.zeros(rows, length, dtype=torch.float64, device=problem.key.device)
    for head, key in enumerate(problem.key[0]):
        query = problem.query[0, head * problem.group : (head + 1) * problem.group].double()
        scores = problem.scale * query @ key.double().T
        if problem.hidden is not None:
            scores.masked_fill_(problem.hidden, -torch.inf)
        total += scores.softmax(-1).sum(0)
    return (total / problem.query.shape[1])[None, :, problem.tokens[0]]
