"""Every kernel of every room that serves a device: checked against the reference in float64, then timed.

`carve-kernels check` prints and writes what `examine` finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from carve_kernels.backends import PREFERRED, STAGES, why_not
from carve_kernels.checks import BackendUnavailable
from carve_kernels.selfcheck.judging import Verdict
from carve_kernels.selfcheck.moving import moved, same_bits, tensors
from carve_kernels.selfcheck.roofline import UNITS, Gpu, gpu_of, predict, work_of
from carve_kernels.selfcheck.timing import Clock
from carve_kernels.selfcheck.trials import Trial, trials
from carve_kernels.types import float64_device

Report = dict[str, Any]

# Bytes that flush the caches of a quick check, which measures nothing.
_QUICK_FLUSH = 2**20


def count(*, quick: bool) -> int:
    """How many problems there are."""
    return len(trials(quick=quick))


def examine(device: torch.device, *, quick: bool, announce: Callable[[str], None]) -> Report:
    """Check and time all rooms on a device; `announce` is called with a text before each problem.

    Returns {"rooms": why a cell is shut, or None; "checks": one entry a problem and room; "timings": one entry a
    timed problem and room; "gpu": the rates that predictions rest on, or None}. An entry of "checks" is right,
    wrong (with the problem), or neither where the room does not serve such arguments.
    """
    rooms = (*PREFERRED.get(device.type, ()), "reference")
    cells = [{"stage": stage, "room": room, "shut": why_not(stage, room, device)} for stage in STAGES for room in rooms]
    shut = {(cell["stage"], cell["room"]) for cell in cells if cell["shut"] is not None}
    gpu = gpu_of(torch.cuda.get_device_properties(device)) if device.type == "cuda" else None
    clock = Clock(device, 5 if quick else 51 if device.type == "cuda" else 11, _QUICK_FLUSH if quick else None)
    found: Report = {"rooms": cells, "gpu": gpu and known(gpu), "checks": [], "timings": []}
    # Triton launches on the current device, whichever its tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for build in trials(quick=quick):
            trial = build()
            announce(f"{trial.stage}: {trial.name}")
            for room in rooms:
                if (trial.stage, room) in shut:
                    continue
                entry = _check(trial, room, device)
                found["checks"].append(entry)
                if trial.sizes is not None and entry["right"]:
                    found["timings"].append(_time(trial, room, clock, gpu))
    return found


def known(gpu: Gpu) -> Report:
    """The rates of a GPU for JSON, which has no infinity: None where there is no bound."""
    return {name: None if value == float("inf") else value for name, value in gpu._asdict().items()}


def _check(trial: Trial, room: str, device: torch.device) -> Report:
    entry: Report = {"stage": trial.stage, "room": room, "case": trial.name, "right": False}
    given = tensors([trial.arguments, *trial.options.values()])
    if float64_device(device) != device and any(part.dtype == torch.float64 for part in given):
        return {**entry, "right": None, "problem": f"{device.type} has no float64"}
    try:
        first, second = (_run(trial, room, device) for _ in range(2))
        verdict = trial.judge(first)
        if verdict.problem is None and room != "reference" and not same_bits(first, second):
            verdict = verdict._replace(problem="two calls gave different bits")
    except BackendUnavailable as error:
        return {**entry, "right": None, "problem": str(error)}
    # Whatever goes wrong on the device is what a check is there to find.
    except Exception as error:
        verdict = Verdict(f"{type(error).__name__}: {error}", float("inf"), 0.0)
    numbers = {name: value if value is None or value < float("inf") else None for name, value in _numbers(verdict)}
    return {**entry, "right": verdict.problem is None, "problem": verdict.problem, **numbers}


def _numbers(verdict: Verdict) -> list[tuple[str, float | None]]:
    return [("error", verdict.error), ("allowed", verdict.allowed), ("correlation", verdict.correlation)]


def _run(trial: Trial, room: str, device: torch.device) -> Any:
    result = trial.call(*moved(trial.arguments, device), **moved(trial.options, device), backend=room)
    return moved(result, "cpu")


def _time(trial: Trial, room: str, clock: Clock, gpu: Gpu | None) -> Report:
    arguments, options = moved(trial.arguments, clock.device), moved(trial.options, clock.device)
    # Regions hands boxes to the host, and a graph that waits for its host cannot be captured.
    timing = clock.time(lambda: trial.call(*arguments, **options, backend=room), graphs=trial.stage != "regions")
    work = work_of(trial.stage, room, **(trial.sizes or {}))
    predicted = None
    if work is not None and gpu is not None:
        unit = UNITS[trial.stage, room]
        # A device that is never kept waiting starts its kernels as a graph does.
        predicted = {
            name: predict(work, gpu, unit=unit, graphs=name == "device")._asdict() for name in ("device", "host")
        }
    return {
        "stage": trial.stage,
        "room": room,
        "case": trial.name,
        "seconds": timing.seconds._asdict(),
        "host": timing.host._asdict(),
        "graph": timing.graph and timing.graph._asdict(),
        "why_no_graph": timing.why_no_graph,
        "work": work and work._asdict(),
        "predicted": predicted,
    }
