"""Every kernel that serves a device: checked against the reference in float64, then timed.

`carve-kernels check` prints and writes what `examine` returns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch

from carve_kernels.backends import PREFERRED, STAGES, why_not
from carve_kernels.checks import BackendUnavailable
from carve_kernels.numerics import float64_device
from carve_kernels.selfcheck.judging import Verdict
from carve_kernels.selfcheck.moving import move, same_bits, tensors
from carve_kernels.selfcheck.roofline import UNITS, Gpu, gpu_of, predict, work_of
from carve_kernels.selfcheck.timing import Clock
from carve_kernels.selfcheck.trials import Trial, trials

Report = dict[str, Any]

# Bytes that flush the caches in a quick check, whose timings are not used.
_QUICK_FLUSH = 2**20


def count(*, quick: bool) -> int:
    """The number of trials."""
    return len(trials(quick=quick))


def examine(device: torch.device, *, quick: bool, announce: Callable[[str], None]) -> Report:
    """Check and time all backends on a device; `announce` is called with a text before each trial.

    Returns {"backends": why a backend cannot serve a stage, or None; "checks": one entry for each trial and backend;
    "timings": one for each timed trial and backend; "gpu": the rates used for the predictions, or None}. An entry of
    "checks" is right, wrong (with the problem), or neither where the backend does not serve such arguments.
    """
    backends = (*PREFERRED.get(device.type, ()), "reference")
    cells = [
        {"stage": stage, "backend": backend, "unavailable": why_not(stage, backend, device)}
        for stage in STAGES
        for backend in backends
    ]
    unavailable = {(cell["stage"], cell["backend"]) for cell in cells if cell["unavailable"] is not None}
    gpu = gpu_of(torch.cuda.get_device_properties(device)) if device.type == "cuda" else None
    clock = Clock(device, 5 if quick else 51 if device.type == "cuda" else 11, _QUICK_FLUSH if quick else None)
    report: Report = {"backends": cells, "gpu": gpu and for_json(gpu), "checks": [], "timings": []}
    # Triton launches on the current device, not on that of its tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for build in trials(quick=quick):
            trial = build()
            announce(f"{trial.stage}: {trial.name}")
            for backend in backends:
                if (trial.stage, backend) in unavailable:
                    continue
                entry = _check(trial, backend, device)
                report["checks"].append(entry)
                if trial.sizes is not None and entry["right"]:
                    report["timings"].append(_time(trial, backend, clock, gpu))
    return report


def for_json(values: Gpu | Verdict) -> Report:
    """The fields by name for JSON, which has no infinity: None in its place."""
    fields = values._asdict().items()
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields}


def _check(trial: Trial, backend: str, device: torch.device) -> Report:
    entry: Report = {"stage": trial.stage, "backend": backend, "case": trial.name, "right": False}
    inputs = tensors([trial.arguments, *trial.options.values()])
    if float64_device(device) != device and any(tensor.dtype == torch.float64 for tensor in inputs):
        return {**entry, "right": None, "problem": f"{device.type} has no float64"}
    try:
        first, second = (_run(trial, backend, device) for _ in range(2))
        verdict = trial.judge(first)
        if verdict.problem is None and backend != "reference" and not same_bits(first, second):
            verdict = verdict._replace(problem="two calls gave different bits")
    except BackendUnavailable as error:
        return {**entry, "right": None, "problem": str(error)}
    # A check reports every error of the device.
    except Exception as error:
        verdict = Verdict(f"{type(error).__name__}: {error}", float("inf"), 0.0)
    return {**entry, "right": verdict.problem is None, **for_json(verdict)}


def _run(trial: Trial, backend: str, device: torch.device) -> Any:
    result = trial.call(*move(trial.arguments, device), **move(trial.options, device), backend=backend)
    return move(result, "cpu")


def _time(trial: Trial, backend: str, clock: Clock, gpu: Gpu | None) -> Report:
    arguments, options = move(trial.arguments, clock.device), move(trial.options, clock.device)
    # `regions` copies boxes to the host, and a graph that waits for its host cannot be captured.
    timing = clock.time(lambda: trial.call(*arguments, **options, backend=backend), graphs=trial.stage != "regions")
    work = work_of(trial.stage, backend, **(trial.sizes or {}))
    predicted = None
    if work is not None and gpu is not None:
        unit = UNITS[trial.stage, backend]
        # A device that never waits for its host starts kernels as fast as a graph does.
        predicted = {
            name: predict(work, gpu, unit=unit, graphs=name == "device")._asdict() for name in ("device", "host")
        }
    return {
        "stage": trial.stage,
        "backend": backend,
        "case": trial.name,
        "seconds": timing.seconds._asdict(),
        "host": timing.host._asdict(),
        "graph": timing.graph and timing.graph._asdict(),
        "why_no_graph": timing.why_no_graph,
        "work": work and work._asdict(),
        "predicted": predicted,
    }
