"""Which room serves which stage, and why a room does not: `SUPPORT`, `resolve` and `explain`.

A room is a package with `unavailable() -> str | None` and `devices() -> tuple[str, ...]`, the types of device that it
serves (none named: every one); its stage modules have `forward(...)` and `supports(...) -> str | None`, with the
signature of the reference. Rooms are imported when they are first asked.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from carve_kernels import checks

STAGES = ("capture", "contrast", "regions")
BACKENDS = ("reference", "cpu", "triton", "cuda")

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
PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

# What a room is taken for on its own device. Where it ends, the `supports` of its stage says so for the arguments.
BEST_FOR: dict[tuple[str, str], str] = {
    ("capture", "cuda"): "up to eight rows, where launching costs more than reading, and C++ launches cheapest",
    ("capture", "triton"): "any number of rows: matrix units use each key that was read for all of them",
    ("contrast", "triton"): "two launches, whatever the number of layers, steps and views",
    ("regions", "cuda"): "the labels stay on the device, only boxes and scores leave it",
}

_CHOICES = ("auto", *BACKENDS)

_log = logging.getLogger("carve_kernels")
_warned: set[str] = set()


def resolve(stage: str, backend: str, device: torch.device, *args: Any, **kwargs: Any) -> ModuleType:
    """The module whose `forward(*args, **kwargs)` serves a stage for tensors on a device.

    A room that is asked for by name serves or raises `BackendUnavailable`; `auto` takes the first that serves. It warns
    once of a room that is missing or broken here, and passes over one that does not serve these arguments in silence.
    """
    # `choice` says what is wrong; asking it at every call would be a tenth of what a call costs.
    if stage not in SUPPORT or type(backend) is not str or backend not in _CHOICES:
        checks.choice("stage", stage, STAGES)
        checks.choice("backend", backend, _CHOICES)
    rooms = (*PREFERRED.get(device.type, ()), "reference") if backend == "auto" else (backend,)
    reasons: list[str] = []
    for room in rooms:
        shut = why_not(stage, room, device)
        reason = shut or _module(stage, room).supports(*args, **kwargs)
        if reason is None:
            _log.debug("%s: %s serves on %s (backend=%r)", stage, room, device, backend)
            return _module(stage, room)
        _log.debug("%s: %s does not serve on %s: %s", stage, room, device, reason)
        if shut and backend == "auto" and SUPPORT[stage][room] is None and shut not in _warned:
            _warned.add(shut)
            _log.warning("the %s room is passed over: %s", room, shut)
        reasons.append(f"{room} cannot serve {stage}: {reason}")
    raise checks.BackendUnavailable(f"backend={backend!r}: " + "; ".join(reasons))


def explain() -> str:
    """A table of every stage and room: whether it serves here, why not and how to mend it, and what `auto` takes."""
    cells = [(stage, room, why_not(stage, room)) for stage in STAGES for room in BACKENDS]
    lines = [f"torch {torch.__version__}", f"{'stage':<10}{'room':<11}{'serves':<8}why not, and how to mend it"]
    lines += [f"{stage:<10}{room:<11}{'no' if why else 'yes':<8}{why or ''}".rstrip() for stage, room, why in cells]
    shut = {(stage, room): why for stage, room, why in cells}
    for where, rooms in [*PREFERRED.items(), ("other", ())]:
        order = {stage: [room for room in (*rooms, "reference") if SUPPORT[stage][room] is None] for stage in STAGES}
        opened = {stage: [room for room in order[stage] if shut[stage, room] is None] for stage in STAGES}
        picks = ", ".join(f"{stage}={(*opened[stage], 'none')[0]}" for stage in STAGES)
        lines.append(f"backend='auto' on {where} tensors: {picks}")
        for stage in STAGES:
            if any((stage, room) in BEST_FOR for room in order[stage]):
                tried = (_described(stage, room, shut[stage, room] is not None) for room in order[stage])
                lines.append(f"  {stage}: {', then '.join(tried)}")
    lines.append("A room that does not serve some arguments says so when it is asked for by name; auto passes it over.")
    return "\n".join(lines)


def _described(stage: str, room: str, shut: bool) -> str:
    remarks = [BEST_FOR.get((stage, room), ""), "does not serve here" if shut else ""]
    remark = "; ".join(filter(None, remarks))
    return f"{room} ({remark})" if remark else room


def why_not(stage: str, room: str, device: torch.device | None = None) -> str | None:
    """Why a room cannot serve a stage whatever the arguments, or None."""
    missing = SUPPORT[stage][room]
    if missing is not None:
        return missing
    package = _package(room)
    return _shut(stage, room, device, package.devices, package.unavailable)


@functools.cache
def _shut(
    stage: str,
    room: str,
    device: torch.device | None,
    devices: Callable[[], tuple[str, ...]],
    unavailable: Callable[[], str | None],
) -> str | None:
    """What a room says of itself, asked once: a decode step resolves its room for every captured layer."""
    reason = unavailable()
    if reason is not None:
        return reason
    served = devices()
    if device is not None and served and device.type not in served:
        return f"the tensors are on {device}, this room serves {' and '.join(served)}; use backend='auto'"
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
