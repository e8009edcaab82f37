"""Builds the compiled operators: one library against torch's stable ABI, so that it also loads in later torches.

Whatever stands in its way, the install goes on and says what is missing: the reference room needs no compiler.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(str(path) for kind in ("*.h", "*/*.h", "*/*.inc") for path in Path("csrc").glob(kind))
# No -march: the library must run on every machine of its architecture. No contraction: the same bits on all of them.
# Nobody reads errno or the floating-point flags, for whose sake loops with a condition would not become wide code.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *ARITHMETIC, "-Wall", "-shared"]
OLDEST_TORCH = "0x020a000000000000"  # 2.10


def find_compiler() -> list[str] | None:
    """The C++ compiler of $CXX or of the path, as the start of a command line."""
    if "CXX" in os.environ:
        command = shlex.split(os.environ["CXX"])
        return command if command and shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def find_torch() -> Path | None:
    """The folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def build(sources: list[str], target: Path) -> str | None:
    """Compile and link in one command; why it did not work, or None."""
    compiler, torch = find_compiler(), find_torch()
    if compiler is None:
        return "no C++ compiler was found (set CXX to name one)"
    if torch is None:
        return "torch is not installed where the build runs (install it first, then use --no-build-isolation)"
    target.parent.mkdir(parents=True, exist_ok=True)
    # libtorch_cpu has to be named as needed, but not where it is: whoever loads the library has imported torch.
    command = [
        *compiler,
        *FLAGS,
        f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
        "-Icsrc",
        f"-I{torch / 'include'}",
        *sources,
        "-o",
        str(target),
        f"-L{torch / 'lib'}",
        "-ltorch_cpu",
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"{shlex.join(compiler)} does not run: {error}"
    if result.returncode != 0:
        return f"{shlex.join(command)} failed with status {result.returncode}\n{result.stderr}"
    return None


class BuildOperators(build_ext):
    """Builds with one plain command line, since the flags Python itself was built with are no part of this project."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        reason = build(ext.sources, target)
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
        Extension("carve_kernels._C", SOURCES, depends=HEADERS, py_limited_api=True, optional=True),
    ],
    cmdclass={"build_ext": BuildOperators},
)
