"""Registers and stack of the CUDA kernels; `python -m tests.backends.cuda.resources` rewrites the table."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from carve_kernels.backends.native import extension

TABLE = Path(__file__).with_name("registers.txt")
HEADER = "# nvcc 13.0: architecture, kernel, its template arguments as they are mangled, registers of a thread"


class Kernel(NamedTuple):
    """A kernel, compiled for one architecture."""

    architecture: str
    name: str
    arguments: str


class Resources(NamedTuple):
    """The resources of a kernel by ptxas; values that do not fit into registers are on the stack or in local memory."""

    registers: int
    stack: int
    local: int


def find_cuobjdump() -> str | None:
    """The tool of the CUDA toolkit, or the copy in triton."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))


@functools.cache
def read() -> dict[Kernel, Resources]:
    """The kernels inside the extension."""
    command = [find_cuobjdump() or "cuobjdump", "--dump-resource-usage", str(extension.LIBRARY)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[Kernel, Resources] = {}
    architecture = ""
    mangled = ""
    for line in output.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            mangled = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            kernels[_kernel(architecture, mangled)] = Resources(*map(int, match.groups()))
    return kernels


def _kernel(architecture: str, mangled: str) -> Kernel:
    """The name without its unnamed namespace, in which nvcc includes the path of the source."""
    inner = re.search(r"_cu_[0-9a-f]{8}(?:_\d+)?(\d+)(\w+)$", mangled)
    if inner is None:
        return Kernel(architecture, mangled, "-")
    length = int(inner[1])
    name, rest = inner[2][:length], inner[2][length:]
    arguments = re.match(r"I(.*)EEv", rest)
    return Kernel(architecture, name, arguments[1] if arguments else "-")


def lines(kernels: dict[Kernel, Resources]) -> list[str]:
    return [HEADER, *sorted(f"{' '.join(kernel)} {resources.registers}" for kernel, resources in kernels.items())]


if __name__ == "__main__":
    TABLE.write_text("\n".join(lines(read())) + "\n")
