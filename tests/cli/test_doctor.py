"""carve-kernels doctor: what it says here, and with things missing or broken."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from typing import Any

import pytest

from carve_kernels import extras
from carve_kernels.backends.native import extension
from carve_kernels.cli.doctor import _models, _processors
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
        "torchvision",
        "av",
        "13 of 13 checks hold",
        "Ready.",
    ):
        assert word in done.stdout, word


def test_compiled_architectures_are_printed(carve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    if reason := extension.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(extension, "architectures", lambda: (75, 90))
    assert re.search(r"CUDA kernels .* yes .* sm_75, sm_90", carve("doctor").stdout)
    monkeypatch.setattr(extension, "architectures", lambda: ())
    assert re.search(r"CUDA kernels .* no .* none; build with nvcc on the path or in CUDACXX", carve("doctor").stdout)


def test_a_broken_reference_backend_is_reported(carve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **settings: Any) -> None:
        raise RuntimeError("scipy does\nnot fit")

    monkeypatch.setattr("carve_kernels.backends.reference.regions.forward", broken)
    monkeypatch.setenv("COLUMNS", "200")
    done = carve("doctor")
    assert done.exit_code == 1
    assert "scipy does not fit" in done.stdout
    assert "To fix: regions by the reference backend." in done.stdout


def test_what_a_session_and_an_engine_do_is_tried(carve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = carve("doctor").stdout
    assert re.search(r"session .* yes .* two new tokens of the embedded model", said)
    assert re.search(r"engine .* yes .* one question about one image", said)

    def broken(*args: Any, **settings: Any) -> None:
        raise RuntimeError("no maps today")

    monkeypatch.setattr("carve_kernels.hf.session.session.capture_attention", broken)
    monkeypatch.setattr("carve_kernels.hf.engine.engine.CarveEngine.__call__", broken)
    done = carve("doctor")
    assert done.exit_code == 1
    assert re.search(r"session .* no .* no maps today", done.stdout)
    assert "session, engine." in done.stdout.splitlines()[-1]


def test_a_broken_contract_is_reported(carve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from carve_kernels.hf import caches, names

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(names, "version", lambda: "5.99.0")
    monkeypatch.setattr(caches, "_CACHES", ("kv_store",))
    done = carve("doctor")
    assert done.exit_code == 1
    assert "of 13 checks hold; 5.99.0 is not tested, 5.12 to 5.24 are; cache on the second step" in done.stdout
    assert "pip install 'transformers>=5.12,<=5.24.99'" in done.stdout
    assert "To fix: contract with transformers" in done.stdout


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
    assert "To fix: transformers." in done.stdout
    assert done.stderr == ""


def test_the_versions_to_install_are_those_of_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["transformers-stream>=9", "transformers>=7.1,<8; extra == 'hf'", "torch>=3"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert extras.requirement("transformers") == "transformers>=7.1,<8" and extras.requirement("torch") == "torch>=3"
    assert extras.requirement("triton") == "triton"


def test_torchvision_missing() -> None:
    done = doctor_with("sys.modules['torchvision'] = None")
    assert done.returncode == 0, done.stderr
    for family, more in (("qwen2_vl", True), ("qwen2_5_vl", True), ("llava", False)):
        line = next(line for line in done.stdout.splitlines() if f"{family} processor" in line)
        assert "yes" in line and ("images work without torchvision, videos need it" in line) is more, line


def test_what_a_family_without_a_processor_class_needs_is_said() -> None:
    more = {what: why for what, _, why in _processors(None)}
    assert "its checkpoints work where their processor_config.json names one" in more["fast_vlm processor"]
    assert more["llava processor"] == ""


def test_pyav_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[_models.__module__]
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "av" else find_spec(name))
    (line,) = (line for line in _models(None) if line[0] == "av")
    assert not line[1] and line[2].startswith("missing; videos need it: pip install 'av")


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


def test_a_library_that_was_not_built() -> None:
    done = doctor_with(
        """
        from pathlib import Path
        import carve_kernels.backends.native.extension
        carve_kernels.backends.native.extension.LIBRARY = Path("_C.abi3.so")
        """
    )
    assert re.search(r"extension .* no .* reference backend only: .* times slower; .*pip install -e ", done.stdout)
    assert done.stderr.startswith("on a CPU: reference backend only: ")
