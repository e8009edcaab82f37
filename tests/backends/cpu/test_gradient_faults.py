"""Faults planted in the compiled gradients of a capture, each of which tests/native/gradient.cpp has to catch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.emulator.emulator import ROOT, compiler

FLAGS = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-pthread"]
# The plain kernels alone, in small waves.
FLAGS += ["-DCARVE_PLAIN_ALONE", "-DCARVE_GRADIENT_SCORES=2048"]
KERNELS = "csrc/cpu/capture"
SOURCES = [f"{KERNELS}/{name}.cpp" for name in ("gradient", "inputs", "unit", "plain")]
SOURCES += ["csrc/cpu/simd/isa.cpp", "tests/native/parallel.cpp", "tests/native/gradient.cpp"]


class Fault(NamedTuple):
    """A change of one line, and the source that includes it."""

    name: str
    file: str
    old: str
    new: str
    source: str = "gradient"


FAULTS = [
    Fault(
        "total of another line",
        "gradient.cpp",
        "totals_of(unit)[line] = static_cast",
        "totals_of(unit)[0] = static_cast",
    ),
    Fault("keys that no row sees", "gradient.cpp", "if (is_read[key]) columns", "if (key >= 0) columns"),
    Fault("waves that replace", "gradient.cpp", "keys, wave.first_row > 0, out}", "keys, false, out}"),
    Fault("waves that add to what was there", "gradient.cpp", "keys, wave.first_row > 0, out}", "keys, true, out}"),
    Fault("a token that is listed twice", "gradient.cpp", "given[key] += static_cast", "given[key] = static_cast"),
    Fault("padding counts", "gradient.cpp", "return key >= 0 && key < p_.keys;", "return key < p_.keys;"),
    Fault("the first chunk alone", "gradient.cpp", "out[element] += partial[element]", "out[element] += 0.0f"),
    Fault("the entropy of a sum", "gradient.cpp", "return sum / static_cast<double>(p_.heads);", "return sum;"),
    Fault(
        "a sink of the other sign",
        "unit.cpp",
        "sinks[line] = static_cast<float>(std::exp2",
        "sinks[line] = -static_cast<float>(std::exp2",
        "unit",
    ),
    Fault("a slope of the softcap", "rows-inl.h", "1.0f - capped * capped", "1.0f - capped", "plain"),
    Fault("a hidden key's slope", "gradient-inl.h", "probability == 0.0f ? Vector{} : value", "value", "plain"),
    Fault(
        "the next row",
        "gradient-inl.h",
        "splat(values[of_tile * g.stride + column])",
        "splat(values[column])",
        "plain",
    ),
    Fault(
        "near keys that replace",
        "gradient-inl.h",
        "begin == 0 ? Vector{} : load_part",
        "begin >= 0 ? Vector{} : load_part",
        "plain",
    ),
    Fault(
        "a part of a vector",
        "gradient-inl.h",
        "static_cast<size_t>(count) * sizeof(float)",
        "sizeof(float)",
        "plain",
    ),
]


def build(root: Path, sources: list[str], objects: Path) -> None:
    for source in sources:
        command = [compiler() or "g++", *FLAGS, f"-I{root / 'csrc'}", f"-I{root / 'tests'}", "-c", str(root / source)]
        subprocess.run([*command, "-o", str(objects / f"{source.replace('/', '.')}.o")], check=True)


def fails(objects: Path) -> bool:
    program = objects / "gradient"
    files = sorted(map(str, objects.glob("*.o")))
    subprocess.run([compiler() or "g++", "-pthread", *files, "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, timeout=300).returncode != 0


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("the kernels need a C++ compiler")
    folder = tmp_path_factory.mktemp("objects")
    build(ROOT, SOURCES, folder)
    return folder


def test_without_a_fault_the_gradients_are_right(objects: Path) -> None:
    assert not fails(objects)


@pytest.mark.parametrize(
    "fault", [FAULTS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in FAULTS[1:])], ids=lambda one: one.name
)
def test_a_planted_fault_is_caught(fault: Fault, objects: Path, tmp_path: Path) -> None:
    for name in ("csrc/cpu", "tests/native"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "csrc/carve.h", tmp_path / "csrc")
    path = tmp_path / KERNELS / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1
    path.write_text(text.replace(fault.old, fault.new))
    built = tmp_path / "objects"
    shutil.copytree(objects, built)
    build(tmp_path, [f"{KERNELS}/{fault.source}.cpp"], built)
    assert fails(built)
