"""Tolerances: an element may have the reference's error in the backend's dtype, plus a few roundings.

Errors are relative to each element of the float64 result: a mean probability is about 1e-5, so zeros would pass a usual
absolute tolerance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from carve_kernels.types import Capture, Regions

LEAST_CORRELATION = 1 - 1e-6
_TINY = torch.finfo(torch.float32).tiny


class Verdict(NamedTuple):
    """The problem or None, the largest relative error of an element, the tolerance, and the correlation."""

    problem: str | None
    error: float
    allowed: float
    correlation: float | None = None


def roundings(count: int) -> float:
    """The relative error that `count` roundings of float32 may add up to."""
    return count * torch.finfo(torch.float32).eps


def close(name: str, found: torch.Tensor, own: torch.Tensor, truth: torch.Tensor, slack: float) -> Verdict:
    """Compare a tensor with the truth in float64, given the reference's result `own` in the backend's dtype."""
    if found.shape != truth.shape:
        return _wrong(f"{name}: expected shape {list(truth.shape)}, got {list(found.shape)}")
    if not bool(found.isfinite().all()):
        return _wrong(f"{name}: {int((~found.isfinite()).sum())} of {found.numel()} elements are NaN or inf")
    found, own, size = found.double(), own.double(), truth.abs()
    normal = size > _TINY
    error, mine = (_largest((values - truth).abs(), size, normal) for values in (found, own))
    allowed = mine + slack
    within = (found - truth).abs() <= allowed * size + _TINY
    likeness = _correlation(found, truth)
    problem = None
    if not bool(within.all()):
        problem = f"{name}: relative error {error:.1e}, allowed {allowed:.1e}, {int((~within).sum())} elements beyond"
    elif likeness is not None and likeness < LEAST_CORRELATION:
        problem = f"{name}: correlation {likeness:.8f} with the truth, expected {LEAST_CORRELATION}"
    return Verdict(problem, error, allowed, likeness)


def captures(found: Capture, own: Capture, truth: Capture, slack: float) -> Verdict:
    fields = zip(Capture._fields, found, own, truth, strict=True)
    return worst([close(*field, slack) for field in fields])


def identical(found: Regions, truth: Regions) -> Verdict:
    """Compare regions bit by bit."""
    for name in ("reason", "box"):
        if getattr(found, name) != getattr(truth, name):
            return _wrong(f"{name}: expected {getattr(truth, name)}, got {getattr(found, name)}")
    for name in ("mask", "boxes", "scores"):
        one, other = getattr(found, name), getattr(truth, name)
        if one.shape != other.shape:
            return _wrong(f"{name}: expected shape {list(other.shape)}, got {list(one.shape)}")
        if not torch.equal(one, other):
            return _wrong(f"{name}: {int((one != other).sum())} of {other.numel()} elements differ")
    return Verdict(None, 0.0, 0.0)


def worst(verdicts: list[Verdict]) -> Verdict:
    """The first wrong verdict, else the one closest to its tolerance."""
    wrong = [verdict for verdict in verdicts if verdict.problem is not None]
    return wrong[0] if wrong else max(verdicts, key=lambda verdict: verdict.error / verdict.allowed)


def _wrong(problem: str) -> Verdict:
    return Verdict(problem, float("inf"), 0.0)


def _largest(error: torch.Tensor, size: torch.Tensor, normal: torch.Tensor) -> float:
    return float((error / size)[normal].amax()) if bool(normal.any()) else 0.0


def _correlation(found: torch.Tensor, truth: torch.Tensor) -> float | None:
    """The correlation, or None for tensors that are flat up to their last digits."""
    if truth.numel() <= 8 or float(truth.std()) <= 1e-2 * float(truth.abs().mean()):
        return None
    return float(torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1])
