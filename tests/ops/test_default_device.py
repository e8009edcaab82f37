"""Another default device of torch does not change results on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from carve_kernels import BackendUnavailable, attention, capture, capture_layers, column_sums, contrast, regions
from carve_kernels.backends import STAGES, cpu
from carve_kernels.backends.native import extension
from carve_kernels.types import Capture
from tests.emulator import emulator
from tests.support.attended import planted_value
from tests.support.attention import Case, planted
from tests.support.planted_maps import backends, maps

META = torch.device("meta")


def _capture() -> Callable[[str], list[torch.Tensor]]:
    case = Case(sink=True)
    (query, key, tokens), options = planted(case)
    shape = (1, 1, case.batch, case.rows)
    out = Capture(torch.zeros(*shape, case.tokens), torch.zeros(shape), torch.zeros(shape))
    step = torch.tensor(0)

    def call(backend: str) -> list[torch.Tensor]:
        found = capture(query, key, tokens, **options, backend=backend)
        layered = {**options, "sink": [options["sink"].bfloat16()]}
        capture_layers([query], [key], tokens, step=step, out=out, **layered, backend=backend)
        return [*found, *(part.clone() for part in out)]

    return call


def _attention() -> Callable[[str], list[torch.Tensor]]:
    case = Case(rows=1, sink=True, dtype=torch.bfloat16)
    (query, key, tokens), options = planted(case)
    value = planted_value(case, 64, options)

    def call(backend: str) -> list[torch.Tensor]:
        output, captured = attention(query, key, value, tokens, **options, backend=backend)
        return [output, *captured]

    return call


def _contrast() -> Callable[[str], list[torch.Tensor]]:
    task, general = maps((4, 6))
    weighted = {"layer_weights": [0.3] * len(task), "step_weights": [0.7] * task.shape[1]}

    def call(backend: str) -> list[torch.Tensor]:
        return [contrast(task, general, (4, 6), (9, 13), **more, backend=backend) for more in ({}, weighted)]  # type: ignore[misc]

    return call


def _regions() -> Callable[[str], list[torch.Tensor]]:
    saliency = torch.rand(31, 17, generator=torch.Generator().manual_seed(1))

    def call(backend: str) -> list[torch.Tensor]:
        found = regions(saliency, keep=0.4, top=3, backend=backend)
        return [found.mask, found.boxes, found.scores]

    return call


def _column_sums() -> Callable[[str], list[torch.Tensor]]:
    (query, key, _), options = planted(Case(view="positions", sink=True))
    return lambda backend: [column_sums(query, key, **options, backend=backend)]


PROBLEMS: dict[str, Callable[[], Any]] = {
    "capture": _capture,
    "contrast": _contrast,
    "regions": _regions,
    "attention": _attention,
    "column_sums": _column_sums,
}


@pytest.mark.parametrize(("stage", "chosen"), [(stage, name) for stage in STAGES for name in backends(stage)])
def test_a_default_device_changes_no_result(stage: str, chosen: str) -> None:
    call = PROBLEMS[stage]()
    with emulator.serving(stage) if chosen == "cuda" else nullcontext():
        try:
            # This call is the first, so that nothing is cached.
            with META:
                found = call(chosen)
        except BackendUnavailable as error:
            pytest.skip(str(error))
        wanted = call(chosen)
    assert all(torch.equal(part, right) for part, right in zip(found, wanted, strict=True))


def test_the_extension_works_under_any_default_device() -> None:
    if reason := extension.unavailable():
        pytest.skip(reason)
    wanted = extension.architectures(), cpu.isa()
    with META:
        assert (extension.architectures(), cpu.isa()) == wanted
