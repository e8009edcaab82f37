"""The required and the installed NVIDIA driver: the answer of the extension and the line of doctor."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carve_kernels.backends.cuda import driver
from carve_kernels.backends.cuda.driver import OLDEST, Driver
from carve_kernels.backends.native import extension

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("found", "fits", "message"),
    [
        (Driver(13000, 13010, "580.95.05"), True, "CUDA 13.0 is compiled in and needs an NVIDIA driver 580 or newer; "),
        (Driver(13000, 13010, "580.95.05"), True, "; 580.95.05 is installed, for CUDA up to 13.1"),
        # Any driver of the same major version serves.
        (
            Driver(12080, 12020, None),
            True,
            "CUDA 12.8 is compiled in and needs an NVIDIA driver 525 or newer; one is",
        ),
        (Driver(13000, 12080, "570.1"), False, "570.1 is installed, for CUDA up to 12.8"),
        (Driver(13000, 0, None), False, "580 or newer; none is installed"),
        (Driver(21040, 0, None), False, "CUDA 21.4 is compiled in and needs an NVIDIA driver for CUDA 21; "),
    ],
)
def test_the_message(found: Driver, fits: bool, message: str) -> None:
    assert found.fits is fits and message in str(found)


def test_the_extension_knows_its_cuda_runtime() -> None:
    if reason := extension.unavailable():
        pytest.skip(reason)
    found = driver.find()
    assert (found.runtime > 0) is bool(extension.architectures())
    if found.runtime:
        assert found.runtime >= 11000 and found.runtime % 10 == 0
    if not torch.cuda.is_available():
        assert found.version is None or found.serves
    with pytest.raises(RuntimeError, match="two contiguous int64"):
        torch.ops.carve_kernels.cuda_versions(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("text", "version"),
    [("echo 580.95.05; echo 580.95.05", "580.95.05"), ("echo broken; exit 9", None), ("true", None)],
)
def test_the_version_is_that_of_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: str | None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert driver._version() == version


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, tuple[bool, str]]]:
    """The lines of doctor on a machine whose kernels are for these architectures."""
    if reason := extension.unavailable():
        pytest.skip(reason)

    def ask(inside: tuple[int, ...], find: Callable[[], Driver]) -> dict[str, tuple[bool, str]]:
        monkeypatch.setattr(extension, "architectures", lambda: inside)
        monkeypatch.setattr(driver, "find", find)
        module = importlib.import_module("carve_kernels.cli.doctor")
        return {name: (works, more) for name, works, more in module._machine()}

    return ask


def test_doctor(lines: Any) -> None:
    works, more = lines((90,), lambda: Driver(13000, 13000, "580.95.05"))["GPU driver"]
    assert works and "580 or newer; 580.95.05 is installed" in more
    works, more = lines((90,), lambda: Driver(13000, 0, None))["GPU driver"]
    assert not works and "needs an NVIDIA driver 580 or newer; none is installed" in more
    assert "GPU driver" not in lines((), lambda: Driver(0, 0, None))


def test_a_library_of_an_older_package_is_named(lines: Any) -> None:
    def missing() -> Driver:
        raise NotImplementedError("Could not run 'carve_kernels::cuda_versions'")

    works, more = lines((90,), missing)["GPU driver"]
    assert not works and "older than this package; build it again" in more


def test_the_table_in_the_docs_matches_the_code() -> None:
    page = (ROOT / "docs/platforms.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| CUDA (\d+) \| (\d+) or newer \|$", page, re.MULTILINE)
    assert {int(cuda): int(oldest) for cuda, oldest in rows} == OLDEST
