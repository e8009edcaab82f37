"""Builds the CUDA kernels of a stage for the CPU, loads them, and chooses the order in which their threads run."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import carve_kernels.backends.native.schemas  # noqa: F401  (the operators' schemas must stand before their implementations register)
from carve_kernels.backends import cuda

ROOT = Path(__file__).resolve().parents[2]
ORDERS = ("forward", "reverse", "shuffled")
# As nvcc has it, a product and a sum become one operation with one rounding, where the machine has such.
CPU_INFO = Path("/proc/cpuinfo")
FUSED = ["-ffp-contract=fast", "-fexpensive-optimizations"]
if CPU_INFO.exists() and " fma " in CPU_INFO.read_text():
    FUSED += ["-mfma"]
FLAGS = ["-std=c++17", "-O1", *FUSED, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]


class Counters(NamedTuple):
    """What the kernels moved since the last look."""

    read_bytes: int
    written_bytes: int
    launches: int
    switches: int


def sources(stage: str, root: Path = ROOT) -> list[Path]:
    return [*sorted((root / "csrc/cuda").glob(f"{stage}*.cu")), root / f"csrc/cuda/register_{stage}.cpp"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(stage: str, root: Path = ROOT) -> Path:
    """The library of a stage's kernels, registered for tensors on a CPU; built anew where a source has changed."""
    headers = Path(torch.__file__).parent / "include"
    include = [f"-I{root / 'tests/emulator/emulated'}", f"-I{root / 'csrc'}", f"-I{headers}"]
    options = [*FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DCARVE_CUDA_KEY=CPU", *include]
    digest = hashlib.sha256(repr([options, torch.__version__, compiler()]).encode())
    for path in sorted([*(root / "csrc").glob("**/*"), *(root / "tests/backends/cuda").glob("**/*.h")]):
        if path.suffix == ".h" or path in sources(stage, root):
            digest.update(path.read_bytes())
    target = ROOT / "build/emulated" / f"{stage}-{digest.hexdigest()[:16]}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        # Of several processes that test, one compiles, and the others wait for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_library(sources(stage, root), options, target)
    return target


def compile_library(paths: list[Path], options: list[str], target: Path) -> None:
    torch_root = Path(torch.__file__).parent
    command = compiler() or "g++"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [str(Path(folder, f"{path.stem}.o")) for path in paths]
        jobs = [
            subprocess.Popen(
                [command, *options, "-x", "c++", "-c", str(path), "-o", out], stderr=subprocess.PIPE, text=True
            )
            for path, out in zip(paths, objects, strict=True)
        ]
        errors = [job.communicate()[1] for job in jobs]
        if any(job.returncode for job in jobs):
            raise RuntimeError("\n".join(errors)[:4000])
        fresh = Path(folder, target.name)
        link = [command, "-shared", *objects, "-o", str(fresh), f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        subprocess.run(link, check=True)
        os.replace(fresh, target)


@functools.cache
def library(stage: str) -> ctypes.CDLL:
    """The library of a stage, loaded into this process: its operators serve tensors on a CPU from now on."""
    path = str(build(stage))
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


@contextmanager
def serving(stage: str) -> Iterator[None]:
    """Within this context the CUDA room of a stage serves tensors on a CPU."""
    if compiler() is None:
        pytest.skip("no C++ compiler builds the emulator")
    library(stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "devices", lambda: ("cpu",))
        patch.setattr(cuda, "unavailable", lambda: None)
        yield


@contextmanager
def running(stage: str, order: str = "forward", *, resident: int = 1, seed: int = 1, fail: int = 0) -> Iterator[None]:
    """Threads run in this order, `resident` blocks at a time; the call number `fail` of CUDA's runtime fails."""
    configure = library(stage).emulator_configure
    configure(ORDERS.index(order), resident, seed, fail)
    try:
        yield
    finally:
        configure(0, 1, 1, 0)


def counters(stage: str) -> Counters:
    """What was moved since the last call of this function."""
    found = (ctypes.c_int64 * 4)()
    library(stage).emulator_counters(found, True)
    return Counters(*found)
