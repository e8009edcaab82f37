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


def test_a_failed_build_installs_without_the_library(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    package = tmp_path / "carve_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_C.abi3.so").write_text("left by an earlier build")
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CXX": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "the compiled operators are NOT built" in result.stderr
    assert "pip install --no-build-isolation -e . with a C++ compiler" in result.stderr
    assert not (package / "_C.abi3.so").exists()
