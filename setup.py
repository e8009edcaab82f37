"""Builds the compiled operators: one library against torch's stable ABI, which later versions of torch also load.

If it cannot be built, the install continues and says what is missing: the reference backend needs no compiler.
CARVE_KERNELS_BUILD=required makes it an error instead.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError, PlatformError

NAME = "carve_kernels._C"
# The plans of CUDA kernels are plain C++.
KERNELS = sorted(path.as_posix() for folder in ("csrc/cpu", "csrc/cuda") for path in Path(folder).rglob("*.cpp"))
# Only these sources include headers of torch.
BINDINGS = sorted(path.as_posix() for path in Path("csrc/bindings").glob("*.cpp"))
HEADERS = sorted(path.as_posix() for kind in ("*.h", "*.cuh") for path in Path("csrc").rglob(kind))
# No -march: the library must run on every machine of its architecture. No contraction: the same bits on all of them.
# errno and the floating-point flags are never read; preserving them would prevent vectorized loops with a condition.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *ARITHMETIC, "-Wall", "-Icsrc"]
OLDEST_TORCH = (2, 10)

CUDA_KERNELS = sorted(path.as_posix() for path in Path("csrc/cuda").rglob("*.cu"))
CUDA_BINDINGS = [path for path in BINDINGS if path.endswith("_cuda.cpp")]
# A100, H100, B200 and the consumer Blackwells; later GPUs run the PTX of the last one.
CUDA_ARCHITECTURES = "80;90;100;120"
# -t0 compiles all architectures in parallel.
CUDA_FLAGS = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all", "-t0"]

# Objects are kept here between builds.
BUILD = Path("build/extension")
RULES = """\
builddir = build/extension
rule compile
  command = $line
  depfile = $out.d
  deps = gcc
rule link
  command = $line
"""

# The newest GLIBC, GLIBCXX and CXXABI that a manylinux tag allows (the policies of auditwheel 6.8).
MANYLINUX = {
    "2_34": {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)},
    "2_35": {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)},
    "2_39": {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15)},
}


class Cuda(NamedTuple):
    """The CUDA compiler, the architectures to compile for, and the linker options for its libraries."""

    nvcc: str
    numbers: list[str]
    folders: list[str]


class Tools(NamedTuple):
    """The tools that compile the operators of a CPU."""

    ninja: str
    compiler: list[str]
    torch: Path


def find_compiler() -> list[str] | None:
    """The C++ compiler of $CXX or on the path, as the start of a command line."""
    if "CXX" in os.environ:
        try:
            command = shlex.split(os.environ["CXX"])
        except ValueError:
            return None
        return command if command and shutil.which(command[0]) else None
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [compiler] if compiler else None


def find_ninja() -> str | None:
    """The ninja of the environment, which need not be on the path, else the one on the path."""
    # Another version of ninja discards the log and builds everything again: prefer the one that wrote it.
    return shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")


def find_nvcc() -> str | None:
    """The CUDA compiler: that of $CUDACXX, else of $CUDA_HOME, else on the path."""
    if "CUDACXX" in os.environ:
        return shutil.which(os.environ["CUDACXX"])
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def site_folders() -> list[str]:
    """The package folders of the target environment, which pip's build isolation removes from sys.path."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        return [*folders, site.getusersitepackages()]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if settings.exists() and re.search(r"(?im)^include-system-site-packages\s*=\s*true", settings.read_text()):
        folders += site.getsitepackages([sys.base_prefix])
    return folders


def find_torch() -> Path | None:
    """The folder of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch") or PathFinder.find_spec("torch", site_folders())
    return Path(spec.origin).parent if spec and spec.origin else None


def find_tools() -> Tools | str:
    """The tools that every build needs, or what is missing."""
    compiler, ninja, torch = find_compiler(), find_ninja(), find_torch()
    if torch is None:
        return (
            f"torch is neither in the build environment nor in {site_folders()[0]}; install it first, and build "
            "without isolation if your tool builds in a separate environment"
        )
    text = torch.joinpath("version.py").read_text(encoding="utf-8") if torch.joinpath("version.py").exists() else ""
    version = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text)
    if version and (int(version[2]), int(version[3])) < OLDEST_TORCH:
        return f"torch {version[1]} is older than {'.'.join(map(str, OLDEST_TORCH))}; install a newer one first"
    if compiler is None:
        return "no C++ compiler was found (install g++ or clang++, or set CXX to name one)"
    if ninja is None:
        return "ninja was not found (pip install ninja, or build with isolation, which installs it)"
    return Tools(ninja, compiler, torch)


def find_cuda() -> Cuda | str:
    """The tools that compile the CUDA kernels, or the reason why there are none."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "nvcc was not found (put it on the path, or set CUDACXX or CUDA_HOME)"
    numbers = os.environ.get("CARVE_KERNELS_CUDA_ARCHITECTURES", CUDA_ARCHITECTURES).split(";")
    if not all(number.isdecimal() for number in numbers):
        return (
            f"CARVE_KERNELS_CUDA_ARCHITECTURES: expected numbers such as {CUDA_ARCHITECTURES}, got {';'.join(numbers)}"
        )
    try:
        # Only nvcc knows where its libraries are.
        dry_run = subprocess.run([nvcc, "--dryrun", "-o", "library", "object.o"], capture_output=True, text=True)
    except OSError as error:
        return f"{nvcc} does not run: {error}"
    line = next((line for line in dry_run.stderr.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    return Cuda(nvcc, numbers, re.findall(r'"(-L[^"]+)"', line))


def library(kind: str) -> str:
    return (BUILD / kind / "library.so").as_posix()


def step(rule: str, output: str, inputs: list[str], command: list[str]) -> str:
    """A statement of ninja's language."""
    target, *sources = (re.sub(r"([$ :])", r"$\1", path) for path in (output, *inputs))
    line = shlex.join(command).replace("$", "$$")
    return f"build {target}: {rule} {' '.join(sources)}\n  line = {line}\n"


def statements(tools: Tools, cuda: Cuda | None) -> Iterator[str]:
    """Every compilation and both libraries: one for a CPU only and one with CUDA."""
    yield RULES
    numbers = cuda.numbers if cuda is not None else []
    objects: dict[str, list[str]] = {"cpu": [], "cuda": []}

    def compile(source: str, command: list[str], *kinds: str) -> str:
        target = (BUILD / "-".join(kinds) / source).as_posix() + ".o"
        for kind in kinds:
            objects[kind].append(target)
        return step("compile", target, [source], [*command, "-MD", "-MF", f"{target}.d", "-c", source, "-o", target])

    cxx = [*tools.compiler, *FLAGS]
    # Kernels that include no header of torch are not compiled again for another torch.
    version = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
    against_torch = [*cxx, f"-DTORCH_TARGET_VERSION={version}", f"-I{tools.torch / 'include'}"]
    for source in KERNELS:
        yield compile(source, cxx, "cpu", "cuda")
    for source in BINDINGS:
        if source == "csrc/bindings/build.cpp":
            architectures = "".join(f"{number}," for number in numbers)
            yield compile(source, against_torch, "cpu")
            yield compile(source, [*against_torch, f"-DCARVE_CUDA_ARCHITECTURES={architectures}"], "cuda")
        elif source not in CUDA_BINDINGS:
            yield compile(source, against_torch, "cpu", "cuda")
    # The library names libtorch_cpu but not its path: the process that loads it has imported torch.
    link = [*tools.compiler, "-shared", f"-L{tools.torch / 'lib'}"]
    yield step("link", library("cpu"), objects["cpu"], [*link, *objects["cpu"], "-o", library("cpu"), "-ltorch_cpu"])
    if cuda is None:
        return
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    targets.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    for source in CUDA_KERNELS:
        yield compile(source, [cuda.nvcc, *CUDA_FLAGS, *targets], "cuda")
    for source in CUDA_BINDINGS:
        yield compile(source, against_torch, "cuda")
    # The CUDA runtime is linked statically and hidden: torch has its own. It finds the driver on the first call.
    runtime = [*cuda.folders, "-lcudart_static", "-ldl", "-lpthread", "-lrt", "-Wl,--exclude-libs,ALL"]
    command = [*link, *objects["cuda"], "-o", library("cuda"), "-ltorch_cpu", *runtime]
    yield step("link", library("cuda"), objects["cuda"], command)


def make(ninja: str, kind: str, target: Path) -> str | None:
    """Bring a library up to date and copy it; the reason if that failed, else None."""
    try:
        done = subprocess.run([ninja, "-f", str(BUILD / "build.ninja"), library(kind)], capture_output=True, text=True)
    except OSError as error:
        return f"{ninja} does not run: {error}"
    if done.returncode != 0:
        output = done.stdout + done.stderr
        return output[max(output.find("FAILED:"), 0) :].strip() or f"{ninja} ended with status {done.returncode}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced atomically: a process that has loaded the library keeps its file, and none loads half of one.
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copy(library(kind), fresh)
        fresh.replace(target)
    except OSError as error:
        return f"the library cannot be copied: {error}"
    return None


def build(target: Path) -> tuple[str | None, str | None]:
    """Build the library; the reason if there is none, and the reason if it has no CUDA kernels, else None."""
    tools = find_tools()
    if isinstance(tools, str):
        return tools, None
    cuda = find_cuda()
    try:
        BUILD.mkdir(parents=True, exist_ok=True)
        BUILD.joinpath("build.ninja").write_text("".join(statements(tools, None if isinstance(cuda, str) else cuda)))
    except OSError as error:
        return f"{BUILD} cannot be written to: {error}", None
    reason = make(tools.ninja, "cpu", target)
    if reason is not None:
        return reason, None
    return None, cuda if isinstance(cuda, str) else make(tools.ninja, "cuda", target)


class BuildOperators(build_ext):
    """Builds with its own command lines, without the flags that Python was built with."""

    def finalize_options(self) -> None:
        super().finalize_options()
        wanted = os.environ.get("CARVE_KERNELS_BUILD", "") or "auto"
        if wanted not in ("auto", "required"):
            raise OptionError(f"CARVE_KERNELS_BUILD: expected auto or required, got {wanted}")
        self.required = wanted == "required"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        reason, cuda_reason = build(target)
        if cuda_reason is not None:
            warnings.warn(
                f"carve_kernels: the CUDA kernels are NOT built: {cuda_reason}\nThe CPU operators do not need them.",
                stacklevel=1,
            )
        if reason is not None:
            message = f"carve_kernels: the compiled operators are NOT built: {reason}"
            if self.required:
                ext.optional = False
                raise PlatformError(f"CARVE_KERNELS_BUILD=required: {message}")
            slower = runpy.run_path("carve_kernels/backends/native/extension.py")["SLOWER"]
            command = "pip install -e ." if self.editable_mode else "pip install ."
            warnings.warn(f"{message}\nOn a CPU: {slower}. Once this is fixed, build them: {command}", stacklevel=1)

    def copy_extensions_to_source(self) -> None:
        # A library of an earlier build must not remain in the source tree after this build has failed.
        for ext in self.extensions:
            Path("carve_kernels", Path(self.get_ext_fullpath(ext.name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """A wheel for every Python: torch loads the library, which is not a Python module."""

    def run(self) -> None:
        # Built first: the layout of the wheel depends on whether there is a library.
        self.run_command("build")
        if not self._library().exists():
            self.root_is_pure, self.distribution.ext_modules = True, []
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag: tuple[str, str, str] = super().get_tag()
        if self.root_is_pure:
            return tag
        needed = manylinux(self._library()) if self._library().exists() else None
        return "py3", "none", tag[2].replace("linux", f"manylinux_{needed}", 1) if needed else tag[2]

    def _library(self) -> Path:
        return Path(self.get_finalized_command("build_ext").get_ext_fullpath(NAME))


def manylinux(path: Path) -> str | None:
    """The first manylinux tag with the GLIBC and C++ versions that a library needs; None without GLIBC."""
    # An ELF file names the versions it needs in its string table.
    versions = re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI)_([0-9.]+)(?=\0)", path.read_bytes())
    needed = [(name.decode(), tuple(map(int, version.split(b".")))) for name, version in versions]
    if not any(name == "GLIBC" for name, _ in needed):
        return None
    return next((tag for tag, has in MANYLINUX.items() if all(version <= has[name] for name, version in needed)), None)


def plain_links(text: str) -> str:
    """Markdown for a page outside the repository: relative links become plain text."""
    return re.sub(r"!?\[([^\]]+)\]\((?!https?://)[^)]*\)", r"\1", text)


setup(
    long_description=plain_links(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(
            NAME,
            [*KERNELS, *(path for path in BINDINGS if path not in CUDA_BINDINGS)],
            depends=[*HEADERS, *CUDA_KERNELS, *CUDA_BINDINGS],
            py_limited_api=True,
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildOperators, "bdist_wheel": Wheel},
)
