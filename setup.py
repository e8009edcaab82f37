"""Builds the compiled operators: one library against torch's stable ABI, so that it also loads in later torches.

Whatever stands in its way, the install goes on and says what is missing: the reference room needs no compiler.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(str(path) for kind in ("*.h", "*/*.h", "*/*.inc") for path in Path("csrc").glob(kind))
# No -march: the library must run on every machine of its architecture. No contraction: the same bits on all of them.
# Nobody reads errno or the floating-point flags, for whose sake loops with a condition would not become wide code.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *ARITHMETIC, "-Wall", "-shared"]
OLDEST_TORCH = "0x020a000000000000"  # 2.10

CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
CUDA_BINDINGS = sorted(str(path) for path in Path("csrc/cuda").glob("*.cpp"))
# A100, H100, B200 and the consumer Blackwells; what comes after them runs the last one's PTX.
CUDA_ARCHITECTURES = "80;90;100;120"
CUDA_FLAGS = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]


class CudaParts(NamedTuple):
    """What the CUDA kernels add to the command that links the library."""

    sources: list[str]
    options: list[str]


def find_compiler() -> list[str] | None:
    """The C++ compiler of $CXX or of the path, as the start of a command line."""
    if "CXX" in os.environ:
        command = shlex.split(os.environ["CXX"])
        return command if command and shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def find_nvcc() -> str | None:
    """CUDA's compiler: that of $CUDACXX, else of $CUDA_HOME, else of the path."""
    if "CUDACXX" in os.environ:
        return shutil.which(os.environ["CUDACXX"])
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def find_torch() -> Path | None:
    """The folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def compile_cuda(folder: Path) -> CudaParts | str:
    """Compile the CUDA kernels, which see no header of torch; why there are none where it did not work."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was not found (put it on the path, or set CUDACXX or CUDA_HOME)"
    numbers = os.environ.get("CARVE_KERNELS_CUDA_ARCHITECTURES", CUDA_ARCHITECTURES).split(";")
    if not all(number.isdecimal() for number in numbers):
        return (
            f"CARVE_KERNELS_CUDA_ARCHITECTURES: expected numbers such as {CUDA_ARCHITECTURES}, got {';'.join(numbers)}"
        )
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    targets.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    folder.mkdir(parents=True, exist_ok=True)
    objects = [str(folder / Path(source).with_suffix(".o").name) for source in CUDA_SOURCES]
    commands = [
        [nvcc, *CUDA_FLAGS, *targets, "-c", source, "-o", out]
        for source, out in zip(CUDA_SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reason = next(filter(None, pool.map(run, commands)), None)
    if reason is not None:
        return reason
    # nvcc alone knows where its libraries are.
    told = subprocess.run([nvcc, "--dryrun", "-o", "library", "object.o"], capture_output=True, text=True)
    line = next((line for line in told.stderr.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    folders = re.findall(r'"(-L[^"]+)"', line)
    # The runtime stands inside, out of sight: it finds the driver when it is first called, and torch's own is another.
    libraries = ["-lcudart_static", "-ldl", "-lpthread", "-lrt", "-Wl,--exclude-libs,ALL"]
    inside = f"-DCARVE_CUDA_ARCHITECTURES={','.join(numbers)},"
    return CudaParts(CUDA_BINDINGS, [inside, *objects, *folders, *libraries])


def build(sources: list[str], target: Path, cuda: CudaParts | None = None) -> str | None:
    """Compile and link in one command; why it did not work, or None."""
    compiler, torch = find_compiler(), find_torch()
    if compiler is None:
        return "no C++ compiler was found (set CXX to name one)"
    if torch is None:
        return "torch is not installed where the build runs (install it first, then use --no-build-isolation)"
    target.parent.mkdir(parents=True, exist_ok=True)
    more = cuda if cuda is not None else CudaParts([], [])
    # libtorch_cpu has to be named as needed, but not where it is: whoever loads the library has imported torch.
    return run([
        *compiler,
        *FLAGS,
        f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
        "-Icsrc",
        f"-I{torch / 'include'}",
        *sources,
        *more.sources,
        "-o",
        str(target),
        f"-L{torch / 'lib'}",
        "-ltorch_cpu",
        *more.options,
    ])  # fmt: skip


def run(command: list[str]) -> str | None:
    """Run a command; why it did not work, or None."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"{command[0]} does not run: {error}"
    if result.returncode != 0:
        return f"{shlex.join(command)} failed with status {result.returncode}\n{result.stderr}"
    return None


class BuildOperators(build_ext):
    """Builds with one plain command line, since the flags Python itself was built with are no part of this project."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        cuda = compile_cuda(Path(self.build_temp, "cuda"))
        without = cuda if isinstance(cuda, str) else build(ext.sources, target, cuda)
        # What fails with the CUDA kernels may work without.
        reason = build(ext.sources, target) if without is not None else None
        if reason is None and without is not None:
            warnings.warn(
                f"carve_kernels: the CUDA kernels are NOT built: {without}\nThe rooms of a CPU are complete without.",
                stacklevel=1,
            )
        if reason is not None:
            warnings.warn(
                f"carve_kernels: the compiled operators are NOT built: {reason}\n"
                "The reference room serves. To build: pip install --no-build-isolation -e . with a C++ compiler.",
                stacklevel=1,
            )

    def copy_extensions_to_source(self) -> None:
        # A library of an earlier build in the source tree must not pass for one that was not built this time.
        for ext in self.extensions:
            Path("carve_kernels", Path(self.get_ext_fullpath(ext.name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()


setup(
    ext_modules=[
        Extension(
            "carve_kernels._C",
            SOURCES,
            depends=[*HEADERS, *CUDA_SOURCES, *CUDA_BINDINGS],
            py_limited_api=True,
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildOperators},
)
