"""One warm call of the engine runs through few files, and is few calls deep."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

import carve_kernels
from carve_kernels import CarveEngine, load
from carve_kernels.models import scenes

PACKAGE = Path(carve_kernels.__file__).parent


class Trace(NamedTuple):
    """The files of the package in which a function was called, and the most frames of the package on the stack."""

    files: set[str]
    depth: int


def traced(call: Any) -> Trace:
    files: set[str] = set()
    depth = deepest = 0

    def profile(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal depth, deepest
        path = frame.f_code.co_filename
        if event not in ("call", "return") or not path.startswith(f"{PACKAGE}/"):
            return
        if event == "call":
            files.add(path[len(f"{PACKAGE}/") :])
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Trace(files, deepest)


@pytest.fixture(scope="module")
def trace() -> Trace:
    engine = CarveEngine(*load("small", dtype="float32"))
    warm, scene = (scenes.draw_scene(seed=seed, level=3, split="test") for seed in (4, 3))
    engine(warm.image, warm.question)
    return traced(lambda: engine(scene.image, scene.question))


def test_a_call_runs_through_few_files(trace: Trace) -> None:
    hf = sorted(file for file in trace.files if file.startswith("hf/"))
    others = sorted(trace.files - set(hf))
    # The trace is one of a whole answer: both passes, and the kernels between them.
    assert {"hf/engine/passes.py", "hf/decoding/tree_decoder.py", "ops/contrast.py"} <= trace.files
    assert len(hf) <= 31, hf
    assert len(others) <= 16, others


def test_a_call_is_few_frames_deep(trace: Trace) -> None:
    assert 8 <= trace.depth <= 16
