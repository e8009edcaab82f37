"""Maps with something to find: noise and sinks that task and general share, and a spot that only the task sees."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from carve_kernels import BackendUnavailable
from carve_kernels.backends import BACKENDS, PREFERRED, SUPPORT, resolve
from carve_kernels.selfcheck.planted import maps as maps

CPU = torch.device("cpu")


def rooms(stage: str) -> list[str]:
    """The rooms that claim a stage and serve tensors on a CPU: Triton's by its interpreter, CUDA's in an emulator."""
    return [room for room in BACKENDS if SUPPORT[stage][room] is None and _serves_the_cpu(room)]


def _serves_the_cpu(room: str) -> bool:
    devices: tuple[str, ...] = importlib.import_module(f"carve_kernels.backends.{room}").devices()
    return room == "cuda" or not devices or "cpu" in devices


def on_gpu(stage: str) -> list[Any]:
    """The rooms that claim a stage and serve tensors on a GPU, as parameters for `pytest -m gpu`: "cuda on gpu"."""
    names = [room for room in (*PREFERRED["cuda"], "reference") if SUPPORT[stage][room] is None]
    return [pytest.param(f"{room} on gpu", marks=pytest.mark.gpu) for room in names]


def serving(stage: str, name: str, *args: torch.Tensor, **options: object) -> str:
    """The room of a name, which may end in "on gpu", or a skipped test where it cannot serve."""
    room, _, device = name.partition(" on ")
    try:
        resolve(stage, room, torch.device("cuda") if device else CPU, *args, **options)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return room
