"""The build of the compiled operators: without a compiler the install goes on, and says what is missing."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, without a build."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


def test_a_compiler_that_fails_is_a_reason(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    reason = parts["build"](parts["SOURCES"], tmp_path / "_C.abi3.so")
    assert reason is not None and "failed with status 1" in reason
    assert not list(tmp_path.iterdir())


def test_no_compiler_is_a_reason(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in parts["build"](parts["SOURCES"], tmp_path / "_C.abi3.so")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in parts["build"](parts["SOURCES"], tmp_path / "_C.abi3.so")


def test_no_torch_is_a_reason(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec: Callable[[str], Any] = lambda name: None  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    monkeypatch.setenv("CXX", "/bin/false")
    assert "--no-build-isolation" in parts["build"](parts["SOURCES"], tmp_path / "_C.abi3.so")


def install(folder: Path, **environment: str) -> str:
    """Build in a copy of what a build needs; what was said to the user."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    package = folder / "carve_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_C.abi3.so").write_text("left by an earlier build")
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_failed_build_installs_without_the_library(tmp_path: Path) -> None:
    said = install(tmp_path, CXX="/bin/false", CUDACXX="no-such-compiler")
    assert "the compiled operators are NOT built" in said
    assert "pip install --no-build-isolation -e . with a C++ compiler" in said
    assert not (tmp_path / "carve_kernels/_C.abi3.so").exists()


# Stands for a C++ compiler: writes the name after -o, and what it was asked.
COMPILER = 'asked="$*"; while [ "$1" != -o ]; do shift; done; echo "$asked" > "$2"'


@pytest.mark.parametrize(("nvcc", "reason"), [("", "nvcc was not found"), ("echo broken >&2; exit 3", "broken")])
def test_without_cuda_the_rest_is_built(tmp_path: Path, nvcc: str, reason: str) -> None:
    (tmp_path / "tree").mkdir()
    cudacxx = script(tmp_path / "nvcc", nvcc) if nvcc else "no-such-compiler"
    said = install(tmp_path / "tree", CXX=script(tmp_path / "compiler", COMPILER), CUDACXX=cudacxx)
    assert said.count("the CUDA kernels are NOT built") == 1 and reason in said
    assert "the compiled operators are NOT built" not in said
    asked = (tmp_path / "tree/carve_kernels/_C.abi3.so").read_text()
    assert "csrc/cpu/capture.cpp" in asked and "csrc/cuda" not in asked and "cudart" not in asked


def test_cuda_that_does_not_link_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    compiler = script(tmp_path / "compiler", f'case "$*" in *cudart*) echo no cudart >&2; exit 1;; esac; {COMPILER}')
    said = install(tmp_path / "tree", CXX=compiler, CUDACXX=script(tmp_path / "nvcc", "true"))
    assert said.count("the CUDA kernels are NOT built") == 1 and "no cudart" in said
    assert "csrc/cuda" not in (tmp_path / "tree/carve_kernels/_C.abi3.so").read_text()
