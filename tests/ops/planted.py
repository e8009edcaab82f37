"""Maps with something to find: noise and sinks that task and general share, and a spot that only the task sees."""

from __future__ import annotations

import importlib

import pytest
import torch

from carve_kernels import BackendUnavailable
from carve_kernels.backends import ROOMS, SUPPORT, resolve

CPU = torch.device("cpu")


def maps(
    grid: tuple[int, int], *, layers: int = 3, steps: int = 2, seed: int = 0, spot: tuple[int, int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Task and general maps [layers, steps, N] in float32, about 1e-4 in size, with strides that are not dense."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = grid
    store = torch.full((2, layers, rows * columns, steps + 1, 2), float("nan"))
    task, general = (part[:, :, :steps, 1].transpose(1, 2) for part in store)
    sinks = torch.ones(rows * columns).index_fill(0, torch.tensor([0, rows * columns - 1]), 40.0)
    for part in (task, general):
        part.copy_(1e-4 * sinks * torch.empty(part.shape).exponential_(1.0, generator=random).add(0.5))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row, column = spot if spot is not None else (rows // 3, 2 * columns // 3)
    bump = torch.exp(-((y - row) ** 2 + (x - column) ** 2) / 4.0).flatten()
    task.mul_(1 + 25 * bump)
    return task, general


def rooms(stage: str) -> list[str]:
    """The rooms that claim a stage and serve tensors on a CPU: Triton's by its interpreter, CUDA's in an emulator."""
    return [room for room in ROOMS if SUPPORT[stage][room] is None and _serves_the_cpu(room)]


def _serves_the_cpu(room: str) -> bool:
    devices: tuple[str, ...] = importlib.import_module(f"carve_kernels.backends.{room}").devices()
    return room == "cuda" or not devices or "cpu" in devices


def serving(stage: str, room: str, *args: torch.Tensor, **options: object) -> str:
    """The room, or a skipped test where it cannot serve."""
    try:
        resolve(stage, room, CPU, *args, **options)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return room
