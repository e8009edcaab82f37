"""Attention of planted inputs, its truth in float64, and the backends that it runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from carve_kernels import BackendUnavailable
from carve_kernels.backends import resolve
from carve_kernels.backends.reference import attention as reference
from carve_kernels.selfcheck.planted import planted_value as planted_value
from carve_kernels.types import Attended, CaptureOptions
from tests.emulator import emulator
from tests.support.attention import Case, exact, planted, poisoned
from tests.support.planted_maps import on_gpu
from tests.support.tolerances import close, roundings

# "sdpa and capture" is what `auto` takes on a CPU; the backend cuda runs in the emulator.
FALLBACK, REFERENCE, CUDA = "sdpa and capture", "reference", "cuda"
BACKENDS = [FALLBACK, REFERENCE, CUDA, *on_gpu("attention"), pytest.param("auto on gpu", marks=pytest.mark.gpu)]


@contextmanager
def entered(name: str) -> Iterator[str]:
    """The backend of a name in BACKENDS; skips the test where it cannot serve."""
    if name == CUDA:
        # The library of capture has the kernels of attention, too.
        with emulator.serving("capture"):
            yield name
        return
    backend, _, device = {FALLBACK: "auto"}.get(name, name).partition(" on ")
    if device and backend != "auto":
        (query, key, tokens), options = planted(served(Case(), name))
        try:
            resolve("attention", backend, torch.device("cuda"), query, key, key, tokens, CaptureOptions(**options))
        except BackendUnavailable as error:
            pytest.skip(str(error))
    yield backend


def served(case: Case, name: str) -> Case:
    """A case as a backend serves it: the CUDA kernels take one row of halves."""
    if not name.startswith(CUDA):
        return case
    half = case.dtype if case.dtype != torch.float32 else torch.bfloat16
    return case.but(rows=1, dtype=half)


def problem(case: Case, value_size: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The arguments of `attention`, positional and by name."""
    (query, key, tokens), options = planted(case)
    return (query, key, planted_value(case, value_size, options), tokens), options


def truth_of(
    arguments: tuple[torch.Tensor, ...], options: dict[str, Any], heads: str = "mean"
) -> tuple[Attended, torch.Tensor]:
    """What the reference returns in float64, and the sums of the sizes of what its outputs are sums of."""
    query, key, value, tokens = arguments
    (query, key, tokens), doubled = exact((query, key, tokens), options)
    chosen = CaptureOptions(**doubled, heads=heads)  # type: ignore[arg-type]
    value = value.double()
    return (
        reference.forward(query, key, value, tokens, chosen),
        reference.attend(query, key, value.abs(), chosen),
    )


def poisoned_output(arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """An output [B, A, R, E] full of NaN, the transpose of [B, R, A, E]."""
    query, _, value, _ = arguments
    batch, heads, rows, _ = query.shape
    return torch.full((batch, rows, heads, value.shape[3]), torch.nan, dtype=query.dtype).transpose(1, 2)


def check_attended(
    found: Attended, case: Case, arguments: tuple[torch.Tensor, ...], options: dict[str, Any], heads: str = "mean"
) -> None:
    """The output is right to the rounding of its dtype, the capture to that of a capture."""
    query, key, value, tokens = arguments
    truth, sizes = truth_of(arguments, options, heads)
    chosen = CaptureOptions(**options, heads=heads)  # type: ignore[arg-type]
    own = reference.forward(query, key, value, tokens, chosen)
    slack = roundings(case.size + 64 + case.query_heads)
    for part, mine, right in zip(found.capture, own.capture, truth.capture, strict=True):
        assert part.dtype == torch.float32
        close(part, mine, right, slack)
    output = found.output
    assert output.dtype == case.dtype and output.shape == truth.output.shape and bool(output.isfinite().all())
    # Weights and outputs are rounded to the dtype, and logits of up to 50 to float32.
    allowed = (torch.finfo(case.dtype).eps + 2 * slack) * sizes + torch.finfo(torch.float16).tiny * 1e-3
    assert bool(((output.double() - truth.output).abs() <= allowed).all())


def outputs(case: Case, arguments: tuple[torch.Tensor, ...], heads: str = "mean") -> dict[str, Any]:
    """The tensors to write into, full of NaN."""
    return {"output": poisoned_output(arguments), "out": poisoned(case, heads)}
