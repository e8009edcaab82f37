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

from carve_kernels.backends import cuda
from carve_kernels.backends.native import schemas

ROOT = Path(__file__).resolve().parents[2]
# Under the package's own names, other kernels serve tensors on a CPU.
NAMESPACE = "carve_emulated"
OPERATORS = (
    "capture_layers",
    "capture_plan_cuda",
    "attend_layer",
    "attention_plan_cuda",
    "contrast_cuda",
    "regions_cuda",
    "saliency",
)
schemas.define(NAMESPACE, OPERATORS)
operators = getattr(torch.ops, NAMESPACE)
# Bytes of scores that a launch stores: less than on a GPU, so that small captures take the launches of large ones.
MOST_SCORES = 1 << 18
# Sorted runs of regions that a launch merges, for the same reason.
MOST_RUNS = 16
ORDERS = ("forward", "reverse", "shuffled")
# nvcc fuses a product and a sum into one operation with one rounding; so does this build where the CPU has FMA.
CPU_INFO = Path("/proc/cpuinfo")
FUSED = ["-ffp-contract=fast"]
if CPU_INFO.exists() and " fma " in CPU_INFO.read_text():
    FUSED += ["-mfma"]
# -O2 takes twice as long to compile; g++ fuses only among the expensive optimizations.
FLAGS = ["-std=c++17", "-O1", "-fexpensive-optimizations", "-U_FORTIFY_SOURCE", *FUSED, "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas"]


class Counters(NamedTuple):
    """What the kernels moved since the last reading."""

    read_bytes: int
    written_bytes: int
    launches: int
    switches: int


class Library(NamedTuple):
    """The stages whose kernels a library has, and the bindings that it registers, of those that exist."""

    kernels: tuple[str, ...]
    bindings: tuple[str, ...]


LIBRARIES = {
    # The kernels of attention use those of capture.
    "capture": Library(("capture", "attention"), ("capture_cuda", "capture_plan", "attention_cuda", "attention_plan")),
    "contrast": Library(("contrast",), ("contrast_cuda",)),
    "regions": Library(("regions",), ("regions_cuda",)),
    # An operator that runs the kernels of three stages; each of them has operators of its own above.
    "saliency": Library(("capture", "contrast", "regions"), ("saliency_cuda",)),
}


def sources(library: str, root: Path = ROOT) -> list[Path]:
    kernels, bindings = LIBRARIES[library]
    patterns = ["csrc/cuda/*.cu", *(f"csrc/cuda/{stage}/{kind}" for stage in kernels for kind in ("*.cu", "*.cpp"))]
    paths = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    return [*paths, *(root / f"csrc/bindings/{name}.cpp" for name in bindings)]


def headers(root: Path = ROOT) -> list[Path]:
    """The headers of the kernels, and those of the emulator that replace CUDA's."""
    folders = (root / "csrc", root / "tests/emulator")
    return sorted(path for folder in folders for kind in ("*.h", "*.cuh") for path in folder.rglob(kind))


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(stage: str, root: Path = ROOT) -> Path:
    """The library of a stage's kernels, registered for tensors on a CPU; built again where a source has changed."""
    torch_headers = Path(torch.__file__).parent / "include"
    include = [f"-I{root / 'tests/emulator/emulated'}", f"-I{root / 'csrc'}", f"-I{torch_headers}"]
    options = [
        *FLAGS,
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-DCARVE_MOST_SCORES={MOST_SCORES}",
        f"-DCARVE_MOST_RUNS={MOST_RUNS}",
        "-DCARVE_CUDA_KEY=CPU",
        f"-DCARVE_CUDA_NAMESPACE={NAMESPACE}",
        *include,
    ]
    common = hashlib.sha256(repr([options, torch.__version__, compiler()]).encode())
    for path in headers(root):
        common.update(path.read_bytes())
    folder = ROOT / "build/emulated"
    folder.mkdir(parents=True, exist_ok=True)
    objects = {path: folder / f"{path.stem}-{_digest(common, path)}.o" for path in sources(stage, root)}
    names = "".join(path.name for path in objects.values())
    target = folder / f"{stage}-{hashlib.sha256(names.encode()).hexdigest()[:16]}.so"
    with target.with_suffix(".lock").open("w") as lock:
        # One of several test processes compiles; the others wait for it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_library(objects, options, target)
    return target


def _digest(common: hashlib._Hash, path: Path) -> str:
    digest = common.copy()
    digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(objects: dict[Path, Path], options: list[str], target: Path) -> None:
    """Link the objects, and compile those of them that no other library has compiled."""
    torch_root = Path(torch.__file__).parent
    command = compiler() or "g++"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        missing = {path: built for path, built in objects.items() if not built.exists()}
        jobs = [
            subprocess.Popen(
                [command, *options, "-x", "c++", "-c", str(path), "-o", str(Path(folder, built.name))],
                stderr=subprocess.PIPE,
                text=True,
            )
            for path, built in missing.items()
        ]
        errors = [job.communicate()[1] for job in jobs]
        if any(job.returncode for job in jobs):
            raise RuntimeError("\n".join(errors)[:4000])
        for built in missing.values():
            os.replace(Path(folder, built.name), built)
        fresh = Path(folder, target.name)
        link = [command, "-shared", *map(str, objects.values()), "-o", str(fresh), f"-L{torch_root / 'lib'}"]
        subprocess.run([*link, "-ltorch_cpu"], check=True)
        os.replace(fresh, target)


@functools.cache
def library(stage: str) -> ctypes.CDLL:
    """The library of a stage, loaded into this process: from then on its operators serve tensors on a CPU."""
    path = str(build(stage))
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


@contextmanager
def serving(stage: str) -> Iterator[None]:
    """Within this context the CUDA backend of a stage serves tensors on a CPU."""
    if compiler() is None:
        pytest.skip("no C++ compiler builds the emulator")
    library(next(name for name, parts in LIBRARIES.items() if stage in (name, *parts.kernels)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "devices", lambda: ("cpu",))
        patch.setattr(cuda, "unavailable", lambda: None)
        patch.setattr(cuda, "operators", operators)
        yield


@contextmanager
def running(stage: str, order: str = "forward", *, resident: int = 1, seed: int = 1, fail: int = 0) -> Iterator[None]:
    """Threads run in this order, `resident` blocks at a time; call number `fail` of the CUDA runtime fails."""
    configure = library(stage).emulator_configure
    configure(ORDERS.index(order), resident, seed, fail)
    try:
        yield
    finally:
        configure(0, 1, 1, 0)


def counters(stage: str) -> Counters:
    """What was moved since the last call of this function."""
    values = (ctypes.c_int64 * 4)()
    library(stage).emulator_counters(values, True)
    return Counters(*values)
