"""Which room serves which stage, and why a room does not: `SUPPORT`, `resolve` and `explain`.

A room is a package with `unavailable() -> str | None` and `devices() -> tuple[str, ...]`, the types of device that it
serves (none named: every one); its stage modules have `forward(...)` and `supports(...) -> str | None`, with the
signature of the reference. Rooms are imported when they are first asked.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch

from carve_kernels import checks

STAGES = ("capture", "contrast", "regions")
ROOMS = ("reference", "cpu", "triton", "cuda")

_TRITON = "Triton's, whose kernel has no launch cost to save here; use backend='auto' or backend='triton'"

_FOREST = (
    "CUDA's, since a forest of runs is joined by loops that end at another time for every pixel, which Triton's blocks "
    "cannot; use backend='auto' or backend='cuda'"
)

# Why a cell is empty, or None for a cell that is there.
SUPPORT: dict[str, dict[str, str | None]] = {
    "capture": {"reference": None, "cpu": None, "triton": None, "cuda": None},
    "contrast": {"reference": None, "cpu": None, "triton": None, "cuda": _TRITON},
    "regions": {"reference": None, "cpu": None, "triton": _FOREST, "cuda": None},
}

# The rooms that `auto` tries on a type of device, best first; the reference comes after them on every device.
PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda",)}

_BACKENDS = ("auto", *ROOMS)

_log = logging.getLogger("carve_kernels")


def resolve(stage: str, backend: str, device: torch.device, *args: Any, **kwargs: Any) -> ModuleType:
    """The module whose `forward(*args, **kwargs)` serves a stage for tensors on a device.

    A room that is asked for by name serves or raises `BackendUnavailable`; `auto` takes the first that serves.
    """
    checks.choice("stage", stage, STAGES)
    checks.choice("backend", backend, _BACKENDS)
    rooms = (*PREFERRED.get(device.type, ()), "reference") if backend == "auto" else (backend,)
    reasons: list[str] = []
    for room in rooms:
        reason = _why_not(stage, room, device) or _module(stage, room).supports(*args, **kwargs)
        if reason is None:
            _log.debug("%s: %s serves on %s (backend=%r)", stage, room, device, backend)
            return _module(stage, room)
        _log.debug("%s: %s does not serve on %s: %s", stage, room, device, reason)
        reasons.append(f"{room} cannot serve {stage}: {reason}")
    raise checks.BackendUnavailable(f"backend={backend!r}: " + "; ".join(reasons))


def explain() -> str:
    """A table of every stage and room: whether it serves here, why not and how to mend it, and what `auto` takes."""
    cells = [(stage, room, _why_not(stage, room)) for stage in STAGES for room in ROOMS]
    lines = [f"torch {torch.__version__}", f"{'stage':<10}{'room':<11}{'serves':<8}why not, and how to mend it"]
    lines += [f"{stage:<10}{room:<11}{'no' if why else 'yes':<8}{why or ''}".rstrip() for stage, room, why in cells]
    serving = {(stage, room) for stage, room, why in cells if why is None}
    for where, rooms in [*PREFERRED.items(), ("other", ())]:
        picks = (
            f"{stage}={next((room for room in (*rooms, 'reference') if (stage, room) in serving), 'none')}"
            for stage in STAGES
        )
        lines.append(f"backend='auto' on {where} tensors: {', '.join(picks)}")
    lines.append("A room that does not serve some arguments says so when it is asked for by name; auto passes it over.")
    return "\n".join(lines)


def _why_not(stage: str, room: str, device: torch.device | None = None) -> str | None:
    """Why a room cannot serve a stage whatever the arguments, or None."""
    missing = SUPPORT[stage][room]
    if missing is not None:
        return missing
    unavailable: str | None = _package(room).unavailable()
    if unavailable is not None:
        return unavailable
    devices: tuple[str, ...] = _package(room).devices()
    if device is not None and devices and device.type not in devices:
        return f"the tensors are on {device}, this room serves {' and '.join(devices)}; use backend='auto'"
    try:
        _module(stage, room)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("carve_kernels"):
            raise
        return f"the package {error.name} is missing; pip install {error.name}"
    return None


@functools.cache
def _module(stage: str, room: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{room}.{stage}")


@functools.cache
def _package(room: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{room}")
