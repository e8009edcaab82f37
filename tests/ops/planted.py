"""Maps with something to find: noise and sinks that task and general share, and a spot that only the task sees."""

from __future__ import annotations

import pytest
import torch

from carve_kernels import BackendUnavailable
from carve_kernels.backends import SUPPORT, resolve
from carve_kernels.selfcheck.planted import maps as maps

CPU = torch.device("cpu")


def rooms(stage: str) -> list[str]:
    """The rooms that claim a stage and serve tensors on a CPU."""
    return [room for room in ("reference", "cpu") if SUPPORT[stage][room] is None]


def serving(stage: str, room: str, *args: torch.Tensor, **options: object) -> str:
    """The room, or a skipped test where it cannot serve."""
    try:
        resolve(stage, room, CPU, *args, **options)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return room
