"""carve-kernels doctor: what it says here, and with things missing or broken."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from carve_kernels import extension
from tests.cli.conftest import Invoke


def test_here_everything_needed_works(carve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = carve("doctor")
    assert done.exit_code == 0, done.output
    for word in (
        "torch",
        "transformers",
        "reference",
        "capture",
        "extension",
        "CPU",
        "GPU",
        "llava processor",
        "Ready.",
    ):
        assert word in done.stdout, word


def test_the_architectures_inside_are_shown(carve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    if reason := extension.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(extension, "architectures", lambda: (75, 90))
    assert re.search(r"CUDA kernels .* yes .* sm_75, sm_90", carve("doctor").stdout)
    monkeypatch.setattr(extension, "architectures", lambda: ())
    assert re.search(r"CUDA kernels .* no .* none; build with nvcc on the path or in CUDACXX", carve("doctor").stdout)


def test_a_broken_reference_room_is_told(carve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **settings: Any) -> None:
        raise RuntimeError("scipy does\nnot fit")

    monkeypatch.setattr("carve_kernels.backends.reference.regions.forward", broken)
    monkeypatch.setenv("COLUMNS", "200")
    done = carve("doctor")
    assert done.exit_code == 1
    assert "scipy does not fit" in done.stdout
    assert "Needs mending: regions in the reference room." in done.stdout


def doctor_with(preparation: str) -> subprocess.CompletedProcess[str]:
    """The doctor in a fresh process, after some lines that break something."""
    call = "import runpy\nsys.argv = ['x', 'doctor']\nrunpy.run_module('carve_kernels', run_name='__main__')"
    code = f"{textwrap.dedent(preparation)}\n{call}"
    return subprocess.run(
        [sys.executable, "-c", "import os, sys\nos.environ['COLUMNS'] = '300'\n" + code],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_transformers_missing() -> None:
    done = doctor_with("sys.modules['transformers'] = None")
    assert done.returncode == 1, done.stderr
    assert "pip install 'transformers" in done.stdout
    assert "Needs mending: transformers." in done.stdout
    assert done.stderr == ""


def test_torch_missing() -> None:
    done = doctor_with("sys.modules['torch'] = None")
    assert done.returncode == 1, done.stderr
    assert "torch." in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_torchvision_that_does_not_fit() -> None:
    done = doctor_with(
        """
        import tempfile
        from pathlib import Path

        folder = tempfile.mkdtemp()
        Path(folder, "torchvision").mkdir()
        Path(folder, "torchvision", "__init__.py").write_text(
            "raise RuntimeError('operator torchvision::nms does not exist')"
        )
        sys.path.insert(0, folder)
        """
    )
    assert "does not fit torch" in done.stdout, done.stderr
    assert "pip uninstall torchvision" in done.stdout
    assert done.stderr == ""
