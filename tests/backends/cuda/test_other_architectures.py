"""Kernels compile for GPUs that the build has no code of their own for, whose code is that of sm_80."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(path for stage in ("capture", "contrast") for path in (ROOT / "csrc/cuda" / stage).glob("*.cu"))
USAGE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, without a build."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


@pytest.mark.slow
@pytest.mark.parametrize("number", [86, 89])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills_or_has_a_stack(parts: dict[str, Any], tmp_path: Path, source: Path, number: int) -> None:
    nvcc = parts["find_nvcc"]()
    if nvcc is None:
        pytest.skip("no nvcc")
    target = f"-gencode=arch=compute_{number},code=sm_{number}"
    command = [nvcc, *parts["CUDA_FLAGS"], target, "-Xptxas=-v", "-c", str(source), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # capture.cu and contrast.cu have no kernel.
    kernels = USAGE.findall(done.stderr)
    assert bool(kernels) == (source.stem != source.parent.name)
    assert set(kernels) <= {("0", "0", "0")}, done.stderr
