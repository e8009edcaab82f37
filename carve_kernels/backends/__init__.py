"""Which backend serves which stage, and why one does not: `SUPPORT`, `resolve` and `explain`.

A backend is a package with `unavailable() -> str | None` and `devices() -> tuple[str, ...]`, the types of device that
it serves (empty: every type). Its stage modules have `forward(...)` and `supports(...) -> str | None`, with the
signature of the reference. A backend is imported when it is first needed.
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

STAGES = ("capture", "contrast", "regions", "attention", "column_sums")
BACKENDS = ("reference", "cpu", "triton", "cuda")

# Why a backend does not implement a stage, or None where it does.
SUPPORT: dict[str, dict[str, str | None]] = {
    "capture": {"reference": None, "cpu": None, "triton": None, "cuda": None},
    "contrast": {"reference": None, "cpu": None, "triton": None, "cuda": None},
    "regions": {
        "reference": None,
        "cpu": None,
        "triton": "not implemented in Triton: union-find needs per-pixel data-dependent loops; "
        "use backend='auto' or backend='cuda'",
        "cuda": None,
    },
    "attention": {
        "reference": None,
        "cpu": "no kernel of this backend attends and captures at once",
        "triton": "no kernel of this backend attends and captures at once",
        "cuda": None,
    },
    "column_sums": {
        "reference": None,
        "cpu": None,
        "triton": None,
        "cuda": "not written in CUDA C++, since Triton's kernels serve the same GPUs; use backend='auto' or "
        "backend='triton'",
    },
}

# The backends that `auto` tries on a type of device, best first; the reference comes after them on every device, or
# what FALLBACK says.
PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

# What the public function of a stage does under `auto` where none of those backends serves, instead of the reference.
FALLBACK: dict[str, str] = {"attention": "sdpa and capture"}

# What a backend is best for on its own device. Its stage's `supports` decides for given arguments.
BEST_FOR: dict[tuple[str, str], str] = {
    ("capture", "cuda"): "any number of rows, layers and heads in one call, which C++ checks and launches",
    (
        "capture",
        "triton",
    ): "GPUs that the compiled kernels are not for: Triton compiles its own; on one H100 its kernels "
    "of 0.3.0 took 1.4 to 2.9 times as long as cuda, those since then are predicted to take 1.1 to 1.3 times as long",
    ("contrast", "cuda"): "two launches that C++ makes, the second beside the end of the first",
    ("contrast", "triton"): "GPUs that the compiled kernels are not for: Triton compiles its own",
    ("regions", "cuda"): "the labels stay on the device, only boxes and scores leave it",
    ("attention", "cuda"): "decode steps in bfloat16 or float16: keys and values are read once",
    ("column_sums", "triton"): "every GPU; compiled for five targets and run in Triton's interpreter, not timed yet",
}

# The backend that computes the gradients of a capture after each one's maps; the reference where that does not serve.
BACKWARD: dict[str, str] = {"reference": "reference", "cpu": "cpu", "triton": "triton", "cuda": "triton"}

_CHOICES = ("auto", *BACKENDS)
_BACKWARD = "capture_backward"

_log = logging.getLogger("carve_kernels")
_warned: set[str] = set()


def resolve(stage: str, backend: str, device: torch.device, *args: Any, **kwargs: Any) -> ModuleType:
    """The module whose `forward(*args, **kwargs)` serves a stage for tensors on a device.

    A backend requested by name serves or raises `BackendUnavailable`; `auto` takes the first that serves. It warns once
    about a backend that is missing or broken here, and silently skips one that does not serve these arguments.
    """
    # `choice` builds the message; calling it every time would be a tenth of what a call costs.
    if stage not in SUPPORT or type(backend) is not str or backend not in _CHOICES:
        checks.choice("stage", stage, STAGES)
        checks.choice("backend", backend, _CHOICES)
    candidates = tried(stage, device.type) if backend == "auto" else (backend,)
    reasons: list[str] = []
    for name in candidates:
        missing = why_not(stage, name, device)
        reason = missing or _module(stage, name).supports(*args, **kwargs)
        if reason is None:
            _log.debug("%s: %s serves on %s (backend=%r)", stage, name, device, backend)
            return _module(stage, name)
        _log.debug("%s: %s does not serve on %s: %s", stage, name, device, reason)
        if missing and backend == "auto" and SUPPORT[stage][name] is None and stage not in FALLBACK:
            warn_once(missing, f"backend {name} unavailable, using the next one: {missing}")
        reasons.append(f"{name} cannot serve {stage}: {reason}")
    why = "; ".join(reasons) or f"no backend but the reference serves {stage} on {device}"
    raise checks.BackendUnavailable(_prefix(backend) + why)


def choose(stage: str, backend: str, device: torch.device, *args: Any, **kwargs: Any) -> ModuleType | str:
    """As `resolve`, but where no backend serves, the reasons."""
    try:
        return resolve(stage, backend, device, *args, **kwargs)
    except checks.BackendUnavailable as error:
        return str(error).removeprefix(_prefix(backend))


def resolve_backward(forward: ModuleType, device: torch.device, *args: Any) -> ModuleType:
    """The module whose `backward` computes the gradients of a capture by another module, by `BACKWARD`.

    It warns once where a backend is missing here, and silently leaves what it does not serve to the reference.
    """
    chosen = BACKWARD.get(forward.__name__.split(".")[-2], "reference")
    missing = why_no_backward(chosen, device)
    if missing:
        warn_once(missing, f"gradients of capture are computed by the reference, {chosen} is unavailable: {missing}")
    elif _module(_BACKWARD, chosen).supports(*args) is None:
        return _module(_BACKWARD, chosen)
    return _module(_BACKWARD, "reference")


def why_no_backward(backend: str, device: torch.device | None = None) -> str | None:
    """Why a backend cannot compute gradients of a capture whatever the arguments, or None."""
    package = _package(backend)
    return _why_missing(_BACKWARD, backend, device, package.devices, package.unavailable)


def _prefix(backend: str) -> str:
    return f"backend={backend!r}: "


def warn_once(reason: str, message: str) -> None:
    """Log a warning, unless one was logged for the same reason."""
    if reason not in _warned:
        _warned.add(reason)
        _log.warning("%s", message)


def tried(stage: str, device: str) -> tuple[str, ...]:
    """The backends that `auto` tries for a stage on a type of device, in this order."""
    preferred = PREFERRED.get(device, ())
    return preferred if stage in FALLBACK else (*preferred, "reference")


def explain() -> str:
    """A table of every stage and backend: whether it serves here, why not and how to fix it, and what `auto` takes."""
    missing = {(stage, backend): why_not(stage, backend) for stage in STAGES for backend in BACKENDS}
    lines = [f"torch {torch.__version__}", f"{'stage':<12}{'backend':<11}{'serves':<8}why not, and how to fix it"]
    for (stage, backend), why in missing.items():
        lines.append(f"{stage:<12}{backend:<11}{'no' if why else 'yes':<8}{why or ''}".rstrip())
    for where in (*PREFERRED, "other"):
        order = {stage: [name for name in tried(stage, where) if SUPPORT[stage][name] is None] for stage in STAGES}
        serving = {stage: [name for name in order[stage] if missing[stage, name] is None] for stage in STAGES}
        picks = ", ".join(f"{stage}={(*serving[stage], FALLBACK.get(stage, 'none'))[0]}" for stage in STAGES)
        lines.append(f"backend='auto' on {where} tensors: {picks}")
        for stage in STAGES:
            if any((stage, name) in BEST_FOR for name in order[stage]):
                remarks = [_describe(stage, name, missing[stage, name] is not None) for name in order[stage]]
                lines.append(f"  {stage}: {', then '.join([*remarks, *filter(None, [FALLBACK.get(stage)])])}")
    after = [f"after {name} by {_by_whom(name, missing['capture', name] is None)}" for name in BACKENDS]
    lines.append(f"gradients of capture: {', '.join(after)}; the probabilities of the rows are computed again")
    lines.append("A backend requested by name says which arguments it does not serve; auto uses the next one.")
    return "\n".join(lines)


def _by_whom(backend: str, serves: bool) -> str:
    """The backend of the gradients after one's maps, and what replaces it where only those of the maps serve."""
    chosen = BACKWARD.get(backend, "reference")
    missing = why_no_backward(chosen) if serves else None
    return f"{chosen} (here by reference: {missing})" if missing else chosen


def _describe(stage: str, backend: str, is_missing: bool) -> str:
    remarks = [BEST_FOR.get((stage, backend), ""), "does not serve here" if is_missing else ""]
    remark = "; ".join(filter(None, remarks))
    return f"{backend} ({remark})" if remark else backend


def why_not(stage: str, backend: str, device: torch.device | None = None) -> str | None:
    """Why a backend cannot serve a stage whatever the arguments, or None."""
    missing = SUPPORT[stage][backend]
    if missing is not None:
        return missing
    package = _package(backend)
    return _why_missing(stage, backend, device, package.devices, package.unavailable)


@functools.cache
def _why_missing(
    stage: str,
    backend: str,
    device: torch.device | None,
    devices: Callable[[], tuple[str, ...]],
    unavailable: Callable[[], str | None],
) -> str | None:
    """What a backend reports about itself, cached: a decode step resolves its backend for every captured layer."""
    reason = unavailable()
    if reason is not None:
        return reason
    served = devices()
    if device is not None and served and device.type not in served:
        return f"the tensors are on {device}, this backend serves {' and '.join(served)}; use backend='auto'"
    try:
        _module(stage, backend)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("carve_kernels"):
            raise
        return f"the package {error.name} is missing; pip install {error.name}"
    return None


@functools.cache
def _module(stage: str, backend: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{backend}.{stage}")


@functools.cache
def _package(backend: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{backend}")
