"""Checks of answers before anything is timed, also that they are not trivial."""

from __future__ import annotations

import torch

PEAK = 4.0
"""The least peak of a row, in its medians."""


class WrongAnswer(RuntimeError):
    """An opponent gives a wrong answer, or the true answer is too flat for a check."""


def check_truth(name: str, truth: torch.Tensor, least: float = PEAK) -> None:
    """Truth [..., N] must be finite and positive with a peak in every row, since a wrong map may equal a flat one."""
    if not bool(truth.isfinite().all()) or bool((truth <= 0).any()):
        raise WrongAnswer(f"{name}: expected a finite and positive truth, got other values")
    peak = float((truth.amax(-1) / truth.median(-1).values).min())
    if peak < least:
        raise WrongAnswer(
            f"{name}: expected a peak of {least:g} medians in every row of the truth, got {peak:.2f}, a flat row"
        )


def check_maps(name: str, maps: torch.Tensor, truth: torch.Tensor, *, relative: float, correlation: float) -> None:
    """Maps must equal the truth by the largest relative error of an element and by correlation."""
    if maps.shape != truth.shape:
        raise WrongAnswer(f"{name}: expected maps {tuple(truth.shape)}, got {tuple(maps.shape)}")
    maps, truth = maps.double(), truth.double()
    error = float(((maps - truth).abs() / truth).max())
    # `not <=` instead of `>`, so that NaN fails.
    if not error <= relative:
        raise WrongAnswer(f"{name}: expected a relative error of at most {relative:.1e}, got {error:.1e}")
    measured = correlate(maps, truth)
    if not measured >= correlation:
        raise WrongAnswer(f"{name}: expected a correlation of at least {correlation}, got {measured:.6f}")


def correlate(maps: torch.Tensor, truth: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([maps.double().flatten(), truth.double().flatten()]))[0, 1])
