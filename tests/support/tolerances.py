"""Tolerances: relative errors per element, with the reference in float64 as the truth."""

from __future__ import annotations

import torch


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest |found - truth| / |truth|; a NaN or another shape is infinitely wrong."""
    if found.shape != truth.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float(((found.double() - truth.double()).abs() / truth.double().abs()).max())


def correlation(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([found.double().flatten(), truth.double().flatten()]))[0, 1])


def roundings(count: int, dtype: torch.dtype = torch.float32) -> float:
    """What `count` roundings of a dtype may add up to, relative."""
    return count * torch.finfo(dtype).eps


def close(found: torch.Tensor, own: torch.Tensor, truth: torch.Tensor, slack: float) -> None:
    """Compare each element: its error is at most the largest of the reference in this dtype, plus roundings."""
    assert found.shape == truth.shape and bool(found.isfinite().all())
    tiny = torch.finfo(torch.float32).tiny
    normal = truth.abs() > tiny
    allowed = ((own.double() - truth).abs() / truth.abs())[normal].amax() if bool(normal.any()) else 0.0
    assert bool(((found.double() - truth).abs() <= (allowed + slack) * truth.abs() + tiny).all())
