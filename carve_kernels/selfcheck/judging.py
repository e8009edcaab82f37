"""Tolerances: an element may have the reference's error in the backend's dtype, plus a few roundings.

Errors are relative to each element of the float64 result: a mean probability is about 1e-5, so zeros would pass a usual
absolute tolerance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from carve_kernels.types import Attended, Capture, Regions

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


def close(name: str, result: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, slack: float) -> Verdict:
    """Compare a tensor with the truth in float64, given the result of the reference in the backend's dtype."""
    if result.shape != truth.shape:
        return _wrong(f"{name}: expected shape {list(truth.shape)}, got {list(result.shape)}")
    if not bool(result.isfinite().all()):
        return _wrong(f"{name}: {int((~result.isfinite()).sum())} of {result.numel()} elements are NaN or inf")
    result, reference, size = result.double(), reference.double(), truth.abs()
    normal = size > _TINY
    error, mine = (_largest((values - truth).abs(), size, normal) for values in (result, reference))
    allowed = mine + slack
    within = (result - truth).abs() <= allowed * size + _TINY
    correlation = _correlation(result, truth)
    problem = None
    if not bool(within.all()):
        problem = f"{name}: relative error {error:.1e}, allowed {allowed:.1e}, {int((~within).sum())} elements beyond"
    elif correlation is not None and correlation < LEAST_CORRELATION:
        problem = f"{name}: correlation {correlation:.8f} with the truth, expected {LEAST_CORRELATION}"
    return Verdict(problem, error, allowed, correlation)


def captures(result: Capture, reference: Capture, truth: Capture, slack: float) -> Verdict:
    fields = zip(Capture._fields, result, reference, truth, strict=True)
    return worst([close(*field, slack) for field in fields])


def attended(result: Attended, reference: Attended, truth: Attended, sizes: torch.Tensor, slack: float) -> Verdict:
    """Compare an attention: `sizes` [B, A, R, E] are the sums of the weighted sizes of the values of each output.

    An output may be far smaller than what it is a sum of, whose weights are rounded to its dtype.
    """
    output = result.output
    if output.shape != truth.output.shape or output.dtype != reference.output.dtype:
        return _wrong(f"output: expected {reference.output.dtype} of shape {list(truth.output.shape)}, got another")
    if not bool(output.isfinite().all()):
        return _wrong(f"output: {int((~output.isfinite()).sum())} of {output.numel()} elements are NaN or inf")
    error = float(((output.double() - truth.output).abs() / sizes.clamp(min=_TINY)).amax()) if output.numel() else 0.0
    allowed = torch.finfo(output.dtype).eps + 2 * slack
    problem = f"output: error {error:.1e} of its summands, allowed {allowed:.1e}" if error > allowed else None
    return worst([Verdict(problem, error, allowed), captures(result.capture, reference.capture, truth.capture, slack)])


def identical(result: Regions, truth: Regions) -> Verdict:
    """Compare regions bit by bit."""
    for name in ("reason", "box"):
        if getattr(result, name) != getattr(truth, name):
            return _wrong(f"{name}: expected {getattr(truth, name)}, got {getattr(result, name)}")
    for name in ("mask", "boxes", "scores"):
        one, other = getattr(result, name), getattr(truth, name)
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


def _correlation(result: torch.Tensor, truth: torch.Tensor) -> float | None:
    """The correlation, or None for tensors that are flat up to their last digits."""
    if truth.numel() <= 8 or float(truth.std()) <= 1e-2 * float(truth.abs().mean()):
        return None
    return float(torch.corrcoef(torch.stack([result.flatten(), truth.flatten()]))[0, 1])
