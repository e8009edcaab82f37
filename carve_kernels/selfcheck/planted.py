"""Planted inputs: a query that attends to some keys, task maps with a spot, non-dense strides, garbage outside.

Noise would not do: its maps are flat, and a kernel that returns a flat map would pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from carve_kernels.types import Capture


@dataclass(frozen=True)
class Case:
    """Inputs of a capture: sizes, options and a seed."""

    batch: int = 2
    query_heads: int = 6
    key_heads: int = 2
    rows: int = 3
    keys: int = 77
    size: int = 64
    tokens: int = 19
    dtype: torch.dtype = torch.float32
    view: str = "mask"  # mask, head mask, positions, all
    softcap: float | None = None
    window: int | None = None
    sink: bool = False
    ragged: bool = True
    gain: float = 3.0
    seed: int = 0

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


def planted(case: Case) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]]:
    """Arguments of `capture`: the query is a transposed view, the keys a slice of a longer cache that holds NaN."""
    random = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    query = normal(case.batch, case.rows, case.query_heads, case.size)
    cache = torch.full((case.batch, case.key_heads, case.keys + 5, case.size + 8), float("nan"))
    cache[:, :, : case.keys, : case.size] = normal(case.batch, case.key_heads, case.keys, case.size)
    attended = torch.randint(0, max(case.keys, 1), (max(case.keys // 7, 1),), generator=random)
    if case.keys:
        # A few keys point along the queries of their group, so that the map is not flat.
        group = case.query_heads // case.key_heads
        toward = query.mean(1).view(case.batch, case.key_heads, group, case.size).mean(2)
        cache[:, :, attended, : case.size] += case.gain * toward[:, :, None]
    cache, query = cache.to(case.dtype), query.to(case.dtype)
    key = cache[:, :, : case.keys, : case.size]
    tokens = torch.randint(0, max(case.keys, 1), (case.batch, case.tokens), generator=random, dtype=torch.int32)
    if case.tokens and case.keys:
        tokens[:, : min(len(attended), case.tokens)] = attended[: case.tokens].to(torch.int32)
    if case.ragged and case.tokens > 3:
        tokens[-1, -2:] = -1
    options: dict[str, Any] = {"scale": case.size**-0.5, "softcap": case.softcap}
    if case.view in ("mask", "head mask"):
        heads = case.query_heads if case.view == "head mask" else 1
        mask = torch.rand(case.batch, heads, case.rows, case.keys, generator=random) < 0.7
        mask[..., attended] = True
        if case.batch > 1 and case.keys > 2:
            # Left padding, which no row sees, may hold any value.
            mask[-1, :, :, :2] = False
            key[-1, :, 0], key[-1, :, 1] = float("inf"), float("nan")
        options["mask"] = mask
    elif case.view == "positions":
        low = min(case.keys - 1, max(case.keys // 2, 0))
        options["positions"] = torch.randint(low, max(case.keys, 1), (case.batch, case.rows), generator=random)
        options["window"] = case.window
    if case.sink:
        options["sink"] = normal(case.query_heads)
    return (query.transpose(1, 2), key, tokens), options


def planted_value(case: Case, size: int, options: dict[str, Any]) -> torch.Tensor:
    """Values [B, KV, S, size] beside the result of `planted`: a slice of a longer cache of NaN, as are hidden keys."""
    random = torch.Generator().manual_seed(case.seed + 1)
    cache = torch.full((case.batch, case.key_heads, case.keys + 3, size + 8), float("nan"))
    value = cache[:, :, : case.keys, :size]
    value.copy_(torch.randn(value.shape, generator=random))
    value = cache.to(case.dtype)[:, :, : case.keys, :size]
    if (mask := options.get("mask")) is not None:
        value.masked_fill_(~mask.any(2).any(1)[:, None, :, None], float("nan"))
    if (positions := options.get("positions")) is not None:
        for entry, last in enumerate(positions.amax(1).tolist() if case.rows else ()):
            value[entry, :, last + 1 :] = float("inf")
    return value


def exact(arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor], options: dict[str, Any]) -> tuple[Any, Any]:
    """The same arguments in float64, for the reference."""
    query, key, tokens = arguments
    doubled = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }
    return (query.double(), key.double(), tokens), doubled


def poisoned(case: Case, heads: str = "mean", lead: tuple[int, ...] = ()) -> Capture:
    """Output tensors full of NaN, with more dimensions in front."""
    middle = (case.query_heads,) if heads == "each" else ()
    rows = (*lead, case.batch, case.rows)
    shapes = ((*lead, case.batch, *middle, case.rows, case.tokens), rows, rows)
    return Capture(*(torch.full(shape, float("nan")) for shape in shapes))


def maps(
    grid: tuple[int, int], *, layers: int = 3, steps: int = 2, seed: int = 0, spot: tuple[int, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Task and general maps [layers, steps, N] in float32, of about 1e-4, with non-dense strides."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = grid
    store = torch.full((2, layers, rows * columns, steps + 1, 2), float("nan"))
    task, general = (values[:, :, :steps, 1].transpose(1, 2) for values in store)
    sinks = torch.ones(rows * columns).index_fill(0, torch.tensor([0, rows * columns - 1]), 40.0)
    for values in (task, general):
        values.copy_(1e-4 * sinks * torch.empty(values.shape).exponential_(1.0, generator=random).add(0.5))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row, column = spot if spot is not None else (rows // 3, 2 * columns // 3)
    bump = torch.exp(-((y - row) ** 2 + (x - column) ** 2) / 4.0).flatten()
    task.mul_(1 + 25 * bump)
    return task, general
