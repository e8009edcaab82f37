"""What setup.py builds with the tools it finds, and its messages if it cannot; compilers are scripts here."""

from __future__ import annotations

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from carve_kernels.backends.native import extension
from tests import constrain

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "carve_kernels/_C.abi3.so"
# Replaces a compiler: writes its arguments to the file after -o and to a log, and each source depends on carve.h.
COMPILER = """\
echo "$*" >> {log}; arguments="$*"
while [ $# -gt 0 ]; do case "$1" in -o) out=$2;; -MF) depends=$2;; -c) source=$2;; esac; shift; done
[ -z "$out" ] || printf '%s \\0GLIBC_2.17\\0' "$arguments" > "$out"
[ -z "$depends" ] || echo "$out: $source csrc/carve.h" > "$depends"
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files a build needs, as the working directory, with the library of an earlier build and no nvcc."""
    folder = tmp_path / "a tree"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "MANIFEST.in", "Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    folder.joinpath("carve_kernels/backends/native").mkdir(parents=True)
    for name in ("__init__.py", "backends/native/extension.py", "py.typed"):
        shutil.copy(ROOT / "carve_kernels" / name, folder / "carve_kernels" / name)
    folder.joinpath(LIBRARY).write_text("left by an earlier build")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CXX", script(tmp_path / "c++", COMPILER.format(log=tmp_path / "log")))
    monkeypatch.setenv("CUDACXX", "no-such-compiler")
    for name in ("CARVE_KERNELS_BUILD", "CARVE_KERNELS_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def parts(tree: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, without a build."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path("setup.py")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def commands(tree: Path) -> list[str]:
    """The command lines of the compiler since the last call."""
    log = tree.parent / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def setup(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *words], env={**os.environ, **environment}, capture_output=True, text=True
    )


def install(**environment: str) -> str:
    """Build like an editable install; the messages to the user."""
    done = setup("build_ext", "--inplace", **environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_compiler_that_fails_is_a_reason(parts: Any, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tree.parent / "broken", "echo it is broken >&2; exit 3"))
    reason, _ = parts["build"](tree / "library.so")
    assert "FAILED" in reason and "it is broken" in reason and str(tree.parent / "broken") in reason
    assert not (tree / "library.so").exists()


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("compiler", "no C++ compiler was found"),
        ("ninja", "ninja was not found"),
        ("torch", "torch is neither in the build environment nor in "),
        ("a newer torch", "torch 2.9.1+cpu is older than 2.10"),
        ("what a compiler needs", "FAILED"),
    ],
)
def test_nothing_is_compiled_for_a_gpu_without_the_rest(
    parts: Any, tree: Path, monkeypatch: pytest.MonkeyPatch, missing: str, reason: str
) -> None:
    monkeypatch.setenv("CUDACXX", script(tree.parent / "nvcc", f'[ "$1" = --dryrun ] || echo "$*" >> {tree}/nvcc'))
    none: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    if missing == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif missing == "ninja":
        monkeypatch.setitem(parts["find_tools"].__globals__, "find_ninja", none)
    elif missing == "torch":
        monkeypatch.setattr("importlib.util.find_spec", none)
        monkeypatch.setattr("sysconfig.get_path", lambda _: str(tree / "empty"))
    elif missing == "a newer torch":
        tree.joinpath("torch").mkdir()
        tree.joinpath("torch/version.py").write_text("__version__ = '2.9.1+cpu'\n")
        monkeypatch.setitem(parts["find_tools"].__globals__, "find_torch", lambda: tree / "torch")
    else:
        monkeypatch.setenv("CXX", "/bin/false")
    assert reason in parts["build"](tree / "library.so")[0]
    assert not (tree / "nvcc").exists() and not (tree / "library.so").exists()


def test_no_compiler_on_the_path_is_a_reason(parts: Any, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tree))
    assert parts["find_compiler"]() is None


def test_torch_is_found_where_isolation_hides_it(parts: Any, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip removes the packages from sys.path, but sysconfig still names their folder."""
    package = tree / "environment/torch"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text("raise RuntimeError('imported')")
    none: Callable[..., None] = lambda name: None  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", none)
    for scheme in ("purelib", "platlib"):
        places = {"purelib": "elsewhere", "platlib": "elsewhere", scheme: str(package.parent)}
        monkeypatch.setattr("sysconfig.get_path", places.get)
        assert parts["find_torch"]() == package


@pytest.mark.parametrize("seen", [True, False])
def test_torch_of_the_system_is_found_if_the_environment_includes_it(
    parts: Any, tree: Path, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    tree.joinpath("pyvenv.cfg").write_text(f"home = /usr\ninclude-system-site-packages = {str(seen).lower()}\n")
    monkeypatch.setattr(sys, "prefix", str(tree))
    monkeypatch.setattr(sys, "base_prefix", str(tree / "base"))
    assert any(folder.startswith(str(tree / "base")) for folder in parts["site_folders"]()) == seen


def test_a_failed_build_installs_without_the_library(tree: Path) -> None:
    message = install(CXX="/bin/false")
    assert "the compiled operators are NOT built: FAILED" in message
    assert "On a CPU: reference backend only: " in message and "times slower" in message and "pip install ." in message
    assert not tree.joinpath(LIBRARY).exists()


def test_a_folder_that_cannot_be_written_to_is_a_reason(tree: Path) -> None:
    tree.joinpath("build").mkdir(exist_ok=True)
    tree.joinpath("build/extension").write_text("no folder")
    message = install()
    assert "the compiled operators are NOT built: build/extension cannot be written to" in message
    assert not tree.joinpath(LIBRARY).exists()


def test_a_build_that_is_required_fails_with_its_reason(tree: Path) -> None:
    done = setup("build_ext", "--inplace", CARVE_KERNELS_BUILD="required", CXX="no-such-compiler")
    assert done.returncode != 0 and "CARVE_KERNELS_BUILD=required" in done.stderr
    assert "no C++ compiler was found" in done.stderr
    done = setup("build_ext", "--inplace", CARVE_KERNELS_BUILD="always")
    assert done.returncode != 0 and "CARVE_KERNELS_BUILD: expected auto or required, got always" in done.stderr
    assert "the compiled operators are NOT built" not in install(CARVE_KERNELS_BUILD="required")
    assert "csrc/cpu/capture/capture.cpp" in tree.joinpath(LIBRARY).read_text()


@pytest.mark.parametrize(("nvcc", "reason"), [("", "nvcc was not found"), ("echo broken >&2; exit 3", "broken")])
def test_without_cuda_the_rest_is_built(tree: Path, nvcc: str, reason: str) -> None:
    message = install(CUDACXX=script(tree.parent / "nvcc", nvcc) if nvcc else "no-such-compiler")
    assert message.count("the CUDA kernels are NOT built") == 1 and reason in message
    assert "the compiled operators are NOT built" not in message
    linked = tree.joinpath(LIBRARY).read_text()
    assert "csrc/cpu/capture/capture.cpp" in linked and ".cu.o" not in linked and "cudart" not in linked
    assert not any("CARVE_CUDA_ARCHITECTURES" in line and line.split()[-1] in linked for line in commands(tree))


def test_cuda_kernels_that_do_not_link_are_left_out(tree: Path) -> None:
    broken = f'case "$*" in *cudart*) echo no cudart >&2; exit 1;; esac\n{COMPILER.format(log="/dev/null")}'
    message = install(CXX=script(tree.parent / "linker", broken), CUDACXX=script(tree.parent / "nvcc", "true"))
    assert message.count("the CUDA kernels are NOT built") == 1 and "no cudart" in message
    assert ".cu.o" not in tree.joinpath(LIBRARY).read_text()


def test_cuda_kernels_are_linked_in(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", os.environ["CXX"])
    assert "NOT built" not in install()
    linked = tree.joinpath(LIBRARY).read_text()
    assert (
        "csrc/cuda/capture/capture.cu.o" in linked
        and "csrc/cpu/capture/capture.cpp.o" in linked
        and "-lcudart_static" in linked
    )
    with_numbers = [line for line in commands(tree) if "-DCARVE_CUDA_ARCHITECTURES=80,90,100,120," in line]
    assert len(with_numbers) == 1 and with_numbers[0].split()[-1] in linked


def test_only_what_a_change_reaches_is_compiled_again(parts: Any, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled() -> set[str]:
        assert parts["build"](tree / "library.so")[0] is None
        return {re.findall(r"-c (\S+)", line)[0] for line in commands(tree) if " -c " in line}

    found = [path for folder in ("cpu", "cuda", "bindings") for path in tree.glob(f"csrc/{folder}/**/*.cpp")]
    sources = {path.relative_to(tree).as_posix() for path in found if not path.name.endswith("_cuda.cpp")}
    assert compiled() == sources
    assert compiled() == set()
    (tree / "csrc/cpu/capture/capture.cpp").touch()
    assert compiled() == {"csrc/cpu/capture/capture.cpp"}
    (tree / "library.so").write_text("not ours")
    (tree / "csrc/carve.h").touch()
    assert compiled() == sources, "every source includes the header"
    assert "not ours" not in (tree / "library.so").read_text()
    monkeypatch.setenv("CXX", f"{os.environ['CXX']} -DANOTHER")
    assert compiled() == sources, "the command is another"
    torch = tree / "other/torch"
    torch.mkdir(parents=True)
    monkeypatch.setitem(parts["find_tools"].__globals__, "find_torch", lambda: torch)
    assert compiled() == {name for name in sources if "torch/" in through_headers(tree / name)}


def through_headers(path: Path) -> str:
    """A source, with the headers of the project that it includes."""
    text = path.read_text()
    headers = re.findall(r'^#include "(.+)"', text, re.MULTILINE)
    return text + "".join(through_headers(ROOT / "csrc" / name) for name in headers)


def wheel(tree: Path, **environment: str) -> zipfile.ZipFile:
    done = setup("-q", "bdist_wheel", "--dist-dir", str(tree / "made"), **environment)
    assert done.returncode == 0, done.stderr
    [made] = tree.joinpath("made").iterdir()
    return zipfile.ZipFile(made)


def test_a_wheel_with_the_library_is_for_every_python_of_the_machine(tree: Path) -> None:
    with wheel(tree) as made:
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        tag = platform.replace("linux", "manylinux_2_34")
        assert Path(str(made.filename)).name == f"carve_kernels-{version()}-py3-none-{tag}.whl"
        assert "csrc/cpu/capture/capture.cpp" in made.read(LIBRARY).decode()
        assert "Root-Is-Purelib: false" in made.read(f"carve_kernels-{version()}.dist-info/WHEEL").decode()
        described = email.message_from_bytes(made.read(f"carve_kernels-{version()}.dist-info/METADATA"))
    assert described["Version"] == version() == runpy.run_path(str(ROOT / "carve_kernels/__init__.py"))["__version__"]
    page = str(described.get_payload())
    assert page.startswith("# carve_kernels") and described["Description-Content-Type"] == "text/markdown"
    # Relative links do not work on a page of an index.
    assert re.findall(r"\]\((?!https://)[^)]*\)", page) == []
    assert re.findall(r"\]\((?!https://)[^)]*\)", (ROOT / "README.md").read_text("utf-8")) != []


def test_a_wheel_without_the_library_is_for_every_machine(tree: Path) -> None:
    with wheel(tree, CXX="/bin/false") as made:
        assert str(made.filename).endswith("-py3-none-any.whl")
        assert "Root-Is-Purelib: true" in made.read(f"carve_kernels-{version()}.dist-info/WHEEL").decode()
        names = made.namelist()
    assert "carve_kernels/__init__.py" in names and not any(name.endswith(".so") for name in names)


def version() -> str:
    [found] = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return found


@pytest.mark.parametrize(
    ("names", "tag"),
    [
        (["GLIBC_2.2.5", "GLIBC_2.34", "GLIBCXX_3.4.29", "CXXABI_1.3.13"], "2_34"),
        (["GLIBC_2.34", "GLIBCXX_3.4.30"], "2_35"),
        (["GLIBC_2.36", "GLIBCXX_3.4.9"], "2_39"),
        (["GLIBC_2.17", "CXXABI_1.3.15"], "2_39"),
        (["GLIBC_2.43"], None),
        (["GLIBCXX_3.4.9"], None),
    ],
)
def test_a_tag_promises_what_the_library_needs(parts: Any, tree: Path, names: list[str], tag: str | None) -> None:
    (tree / "library.so").write_bytes("\0".join(["", *names, ""]).encode())
    assert parts["manylinux"](tree / "library.so") == tag


@pytest.mark.skipif(sys.platform != "linux", reason="manylinux is Linux's")
def test_the_library_needs_no_more_than_its_tag_promises(parts: Any) -> None:
    if reason := extension.unavailable():
        pytest.skip(reason)
    read = ["readelf", "--wide", "--dynamic", "--version-info", "--dyn-syms", str(extension.LIBRARY)]
    output = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    promised = parts["MANYLINUX"][parts["manylinux"](extension.LIBRARY)]
    needed = {name: set[tuple[int, ...]]() for name in promised}
    for name, number in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([0-9.]+)", output):
        needed[name].add(tuple(map(int, number.split("."))))
    assert {name for name, found in needed.items() if max(found) > promised[name]} == set()
    # A process that loads it has imported torch, so the library has no path to the torch it was built against.
    assert "libtorch_cpu.so" in output and "RPATH" not in output and "RUNPATH" not in output
    assert "PyInit" not in output


def test_an_editable_install_is_a_plain_path(tree: Path) -> None:
    """Type checkers follow a path but cannot run an import hook."""
    code = "from setuptools import build_meta; print(build_meta.build_editable('.'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "transitional" not in done.stderr, done.stderr
    with zipfile.ZipFile(done.stdout.splitlines()[-1]) as made:
        [name] = [name for name in made.namelist() if name.endswith(".pth")]
        assert made.read(name).decode().strip() == str(tree)
    assert "csrc/cpu/capture/capture.cpp" in tree.joinpath(LIBRARY).read_text()


def test_an_sdist_holds_what_a_build_needs(tree: Path) -> None:
    done = setup("-q", "sdist", "--dist-dir", str(tree / "made"))
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tree.joinpath("made").iterdir())) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {path.relative_to(tree).as_posix() for path in tree.joinpath("csrc").rglob("*") if path.is_file()}
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt"}
    assert needed <= names and LIBRARY not in names


def test_requirements_do_not_break_an_install() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    [build] = re.findall(r"^requires = (\[.*\])", text, re.MULTILINE)
    assert "torch" not in build and "ninja" in build
    [needed] = re.findall(r"^dependencies = (\[.*\])", text, re.MULTILINE)
    assert re.findall(r'"(\w+)', needed) == ["torch", "numpy"]
    assert not re.search(r'"[\w-]+[^"]*(<|==|~=)[^"]*"', re.sub(r";[^\"]*", "", text.split("[project.scripts]")[0]))


def test_constraints_are_written_by_python() -> None:
    resolved = {
        "3.11": {"a": "2", "b": "1", "c": "1"},
        "3.9": {"a": "1", "b": "1"},
        "3.10": {"a": "1", "b": "1", "c": "1"},
        "3.12": {"a": "3", "b": "1", "c": "2"},
    }
    assert constrain.lines(resolved) == [
        'a==1; python_version < "3.11"',
        'a==2; python_version >= "3.11" and python_version < "3.12"',
        'a==3; python_version >= "3.12"',
        "b==1",
        'c==1; python_version < "3.12"',
        'c==2; python_version >= "3.12"',
    ]


def test_the_constraints_leave_the_build_of_torch_to_the_user() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {(name, number) for name, number in re.findall(r"^([\w-]+)==([\w.]+)", "\n".join(lines), re.MULTILINE)}
    names = {name for name, _ in pins}
    assert {"transformers", "numpy", "pillow", "huggingface-hub", "typer", "pytest", "ninja"} <= names
    assert not any(constrain.LEFT_OUT.match(name) for name in names)
    # What gradio takes.
    assert all(int(number.split(".")[0]) < 13 for name, number in pins if name == "pillow")
    assert all(int(number.split(".")[0]) < 3 for name, number in pins if name == "huggingface-hub")
