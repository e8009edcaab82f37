"""Planted maps: noise and sinks that task and general maps share, and a spot in the task map alone."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from carve_kernels import BackendUnavailable
from carve_kernels.backends import BACKENDS, PREFERRED, SUPPORT, resolve
from carve_kernels.selfcheck.planted import maps as maps
from carve_kernels.types import Regions

CPU = torch.device("cpu")

# Saliencies of every kind, made from noise.
SALIENCIES: dict[str, Any] = {
    "noise": lambda noise: noise,
    "positive": lambda noise: noise.abs(),
    "ties": lambda noise: (noise * 2).round(),
    "plateaus": lambda noise: (noise > 0.5).to(noise.dtype),
    "magnitudes": lambda noise: (noise * 20).exp(),
    "mostly zero": lambda noise: noise * (noise > 1.2),
    "nearly flat": lambda noise: 1000 + noise * 1e-2,
    "overflow": lambda noise: noise * torch.finfo(noise.dtype).max / 4,
    "subnormal": lambda noise: noise.round() * torch.finfo(noise.dtype).smallest_normal / 8,
    "constant": lambda noise: torch.full_like(noise, -3.3),
}


def backends(stage: str) -> list[str]:
    """The backends with a stage that serve tensors on a CPU: Triton in its interpreter, CUDA in an emulator."""
    return [backend for backend in BACKENDS if SUPPORT[stage][backend] is None and _serves_the_cpu(backend)]


def _serves_the_cpu(backend: str) -> bool:
    devices: tuple[str, ...] = importlib.import_module(f"carve_kernels.backends.{backend}").devices()
    return backend == "cuda" or not devices or "cpu" in devices


def on_gpu(stage: str) -> list[Any]:
    """The backends with a stage that serve a GPU, as parameters for `pytest -m gpu`: "cuda on gpu"."""
    names = [backend for backend in (*PREFERRED["cuda"], "reference") if SUPPORT[stage][backend] is None]
    return [pytest.param(f"{backend} on gpu", marks=pytest.mark.gpu) for backend in names]


def serving(stage: str, name: str, *args: object, **options: object) -> str:
    """The backend of a name, which may end in "on gpu", or a skipped test where it cannot serve."""
    backend, _, device = name.partition(" on ")
    try:
        resolve(stage, backend, torch.device("cuda") if device else CPU, *args, **options)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return backend


def assert_same(found: Regions, wanted: Regions) -> None:
    assert found.reason == wanted.reason
    assert found.box == wanted.box
    for name in ("mask", "boxes", "scores"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0)
