"""The CUDA kernels in the extension: their compiled form, and the messages where they are missing or cannot run."""

from __future__ import annotations

import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from carve_kernels import BackendUnavailable, backends, capture
from carve_kernels.backends import cuda
from carve_kernels.backends.native import extension
from tests.backends.cuda import resources

ROOT = Path(__file__).resolve().parents[3]
# Of a thread, for as many blocks on a multiprocessor of 65536 registers as the kernels that have more than 128 ask for.
MOST_REGISTERS = {"attend_stream": 255, "capture_stream": 255, "capture_reread": 255}


@pytest.fixture
def architectures() -> set[str]:
    """The architectures of the kernels in the extension; the test is skipped if there are none, or no cuobjdump."""
    if reason := extension.unavailable():
        pytest.skip(reason)
    if not extension.architectures():
        pytest.skip("the extension was built without CUDA kernels")
    if resources.find_cuobjdump() is None:
        pytest.skip("no cuobjdump, of a CUDA toolkit or of triton")
    return {f"sm_{number}" for number in extension.architectures()}


def test_every_kernel_is_inside_for_every_architecture(architectures: set[str]) -> None:
    kernels = resources.read()
    assert {kernel.architecture for kernel in kernels} == architectures
    named = {kernel[1:] for kernel in kernels}
    assert {(architecture, *kernel) for architecture in architectures for kernel in named} == set(map(tuple, kernels))
    captures = {"capture_stream", "capture_maps", "capture_reread", "capture_plain", "capture_span"}
    assert {*captures, "contrast_grid", "contrast_pixels"} <= {kernel.name for kernel in kernels}


def test_no_kernel_spills_or_has_a_stack(architectures: set[str]) -> None:
    kernels = resources.read()
    assert {kernel: found for kernel, found in kernels.items() if found.stack or found.local} == {}
    assert all(found.registers <= MOST_REGISTERS.get(kernel.name, 128) for kernel, found in kernels.items())


def test_registers_are_those_of_the_table(architectures: set[str], parts: dict[str, Any]) -> None:
    nvcc = parts["find_nvcc"]() or "false"
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if "release 13.0" not in release:
        pytest.skip("the table is nvcc 13.0's")
    table = [line for line in resources.TABLE.read_text().splitlines()[1:] if line.split()[0] in architectures]
    # After a change to a kernel: python -m tests.backends.cuda.resources
    assert resources.lines(resources.read())[1:] == table


@pytest.fixture
def fresh() -> Iterator[pytest.MonkeyPatch]:
    """A backend without cached answers, before the test and after it."""
    if reason := extension.unavailable():
        pytest.skip(reason)
    caches = (cuda.unavailable, cuda.foreign, backends._why_missing)
    for cache in caches:
        cache.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    for cache in caches:
        cache.cache_clear()


def gpus(
    patch: pytest.MonkeyPatch, *capabilities: tuple[int, int], architectures: tuple[int, ...] = (80, 90, 100, 120)
) -> None:
    patch.setattr(extension, "architectures", lambda: architectures)
    patch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    patch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    patch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)])
def test_a_gpu_whose_architecture_is_inside_serves(fresh: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpus(fresh, (7, 5), capability)
    assert cuda.unavailable() is None and cuda.foreign(1) is None
    assert "GPU 0 is sm_75" in str(cuda.foreign(0))


@pytest.mark.parametrize("capability", [(7, 5), (11, 0)])
def test_for_another_gpu_the_message_says_what_to_build(fresh: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpus(fresh, capability)
    number = f"{capability[0]}{capability[1]}"
    message = str(cuda.unavailable())
    assert f"GPU 0 is sm_{number}, and the compiled kernels are for sm_80, sm_90, sm_100, sm_120" in message
    assert f"CARVE_KERNELS_CUDA_ARCHITECTURES={number} pip install " in message


def test_a_lower_minor_version_is_another_gpu(fresh: pytest.MonkeyPatch) -> None:
    gpus(fresh, (8, 6), architectures=(89, 120))
    assert "is sm_86" in str(cuda.unavailable())


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ((), "was built without CUDA kernels; pip install .* with nvcc on the path"),
        ((80,), "sees no GPU; install NVIDIA"),
    ],
)
def test_a_call_without_kernels_or_driver_names_what_is_missing(
    fresh: pytest.MonkeyPatch, architectures: tuple[int, ...], message: str
) -> None:
    gpus(fresh, architectures=architectures)
    query = torch.ones(1, 2, 1, 32)
    with pytest.raises(BackendUnavailable, match=message):
        capture(query, query, torch.zeros(1, 1, dtype=torch.int32), scale=1.0, backend="cuda")


def test_without_the_library_of_the_extension_this_backend_is_unavailable_too(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(extension, "unavailable", lambda: "it is missing")
    assert cuda.unavailable() == "it is missing"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, without a build."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CARVE_KERNELS_CUDA_ARCHITECTURES", raising=False)
    return runpy.run_path("setup.py")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_nvcc_is_searched_where_users_name_it(parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_path = script(tmp_path / "path/nvcc", "")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert parts["find_nvcc"]() == str(on_path)
    home = script(tmp_path / "home/bin/nvcc", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert parts["find_nvcc"]() == str(home)
    monkeypatch.setenv("CUDACXX", str(script(tmp_path / "own", "")))
    assert parts["find_nvcc"]() == str(tmp_path / "own")


def test_no_nvcc_and_one_that_does_not_run_are_reasons(
    parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDACXX", "no-such-compiler")
    assert "nvcc was not found" in parts["find_cuda"]()
    monkeypatch.setenv("CUDACXX", str(script(tmp_path / "nvcc", "")))
    tmp_path.joinpath("nvcc").write_text("#!/no/such/interpreter\n")
    assert "does not run" in parts["find_cuda"]()
    monkeypatch.setenv("CARVE_KERNELS_CUDA_ARCHITECTURES", "80;new")
    assert "expected numbers such as 80;90;100;120, got 80;new" in parts["find_cuda"]()


def test_nvcc_compiles_for_every_architecture_and_names_its_libraries(
    parts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = """[ "$1" = --dryrun ] && echo '#$ LIBRARIES=  "-L/a b/stubs" "-L/c"' >&2; true"""
    monkeypatch.setenv("CUDACXX", str(script(tmp_path / "nvcc", text)))
    monkeypatch.setenv("CARVE_KERNELS_CUDA_ARCHITECTURES", "75;90")
    tools = parts["Tools"]("ninja", ["c++"], tmp_path)
    lines = [
        line for line in "".join(parts["statements"](tools, parts["find_cuda"]())).splitlines() if "line =" in line
    ]
    compiled = [line for line in lines if ".cu -o " in line]
    assert len(compiled) == len(list((ROOT / "csrc/cuda").rglob("*.cu")))
    for line in compiled:
        assert "arch=compute_75,code=sm_75" in line and "arch=compute_90,code=compute_90" in line
    assert sum("-DCARVE_CUDA_ARCHITECTURES=75,90," in line for line in lines) == 1
    [linked] = [line for line in lines if "-lcudart_static" in line]
    assert "'-L/a b/stubs' -L/c" in linked
