"""How a test body runs on a GPU: tensors are moved there and back; without a GPU it is skipped with a reason."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from carve_kernels import attention, capture, capture_layers, contrast, regions
from carve_kernels.types import Capture
from tests.ops.conftest import running_on
from tests.support.attention import Case, planted, poisoned
from tests.support.planted_maps import maps

ROOT = Path(__file__).resolve().parents[2]


def test_the_result_comes_back_into_the_tensors_that_were_given() -> None:
    case = Case()
    (query, key, tokens), options = planted(case)
    out = poisoned(case)
    calls = []

    def call(*arguments: torch.Tensor, out: Capture, check: bool | None = None, **more: object) -> Capture:
        calls.append((arguments, out, check))
        return capture(*arguments, out=out, check=check, **more)  # type: ignore[arg-type]

    found = running_on("cpu", call)(query, key, tokens, **options, out=out, backend="reference")
    (((moved_query, moved_key, _), moved_out, check),) = calls
    assert found is out and moved_out.maps.data_ptr() != out.maps.data_ptr()
    assert moved_query.data_ptr() != query.data_ptr() and moved_query.stride() == query.stride()
    # The tail of the moved cache holds NaN as well.
    tail = moved_key.as_strided((case.size + 8,), (1,), case.keys * (case.size + 8))
    assert moved_key.stride() == key.stride() and bool(tail.isnan().all())
    assert check is True
    for part, wanted in zip(found, capture(query, key, tokens, **options, backend="reference"), strict=True):
        assert torch.equal(part, wanted)


def test_every_public_function_can_be_moved() -> None:
    case = Case(batch=1, rows=1, view="all")
    (query, key, tokens), options = planted(case)
    out = Capture(
        torch.full((2, 1, 1, 1, case.tokens), torch.nan), *(torch.full((2, 1, 1, 1), torch.nan) for _ in "me")
    )
    arguments = {"scale": options["scale"], "step": torch.tensor(1), "out": out}
    assert running_on("cpu", capture_layers)([query], [key], tokens, **arguments) is None
    assert out.maps[0].isnan().all() and torch.equal(out.maps[1, 0], capture(query, key, tokens, **options).maps)
    value, output = torch.randn(*key.shape[:3], 24), torch.full((1, case.query_heads, 1, 24), torch.nan)
    wanted = attention(query, key, value, tokens, scale=options["scale"])
    for given in ({}, {"output": output}, {"output": output.clone(), "out": poisoned(case)}):
        attended = running_on("cpu", attention)(query, key, value, tokens, scale=options["scale"], **given)
        assert torch.equal(attended.output, wanted.output) and torch.equal(attended.capture.maps, wanted.capture.maps)
        assert attended.output is given.get("output", attended.output)
        assert attended.capture is given.get("out", attended.capture)
    task, general = maps((4, 6))
    saliency = running_on("cpu", contrast)(task, general, (4, 6), (9, 9))
    assert torch.equal(saliency, contrast(task, general, (4, 6), (9, 9)))
    found, wanted = running_on("cpu", regions)(saliency, keep=0.4, top=2), regions(saliency, keep=0.4, top=2)
    assert torch.equal(found.mask, wanted.mask) and found.box == wanted.box
    with pytest.raises(ValueError, match="task: expected finite values"):
        running_on("cpu", contrast)(task * torch.nan, general, (4, 6), (9, 9))


def test_without_a_gpu_its_items_are_skipped_for_one_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/ops/test_regions.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    reasons = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(reasons) == 1 and reasons[0].endswith("torch sees no CUDA device"), done.stdout
    assert re.search(r"^\d+ skipped, \d+ deselected", done.stdout.splitlines()[-1]), done.stdout


def test_by_default_neither_gpu_nor_slow_tests_are_selected(request: pytest.FixtureRequest) -> None:
    expression = request.config.option.markexpr
    assert expression, "the default expression"
    if expression == "not gpu and not slow":
        assert not any(item.get_closest_marker(mark) for item in request.session.items for mark in ("gpu", "slow"))
