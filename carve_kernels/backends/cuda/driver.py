"""The NVIDIA driver that the extension's CUDA runtime needs, and the one of this machine."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple

import torch

# The oldest driver that serves every minor version of a major version of CUDA: NVIDIA's "CUDA Compatibility"
# (docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
OLDEST = {11: 450, 12: 525, 13: 580}
_PATIENCE = 20


class Driver(NamedTuple):
    """`runtime` is the extension's CUDA version and `serves` the newest one that the driver serves, 13000 for 13.0.

    Both are 0 where there is none. `version` is the driver's, None where it is unknown.
    """

    runtime: int
    serves: int
    version: str | None

    @property
    def fits(self) -> bool:
        return self.serves // 1000 >= self.runtime // 1000

    def __str__(self) -> str:
        oldest = OLDEST.get(self.runtime // 1000)
        wanted = f"{oldest} or newer" if oldest is not None else f"for CUDA {self.runtime // 1000}"
        here = "none is installed"
        if self.serves:
            here = f"{self.version or 'one'} is installed, for CUDA up to {_dotted(self.serves)}"
        return f"CUDA {_dotted(self.runtime)} is compiled in and needs an NVIDIA driver {wanted}; {here}"


def find() -> Driver:
    """From nvidia-smi and the extension, which must be loaded and have CUDA kernels."""
    out = torch.zeros(2, dtype=torch.int64, device="cpu")
    torch.ops.carve_kernels.cuda_versions(out)
    runtime, serves = out.tolist()
    return Driver(runtime, serves, _version() if serves else None)


def _version() -> str | None:
    """The driver's version, which CUDA does not report."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        result = subprocess.run(
            [program, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.split()
    return lines[0] if result.returncode == 0 and lines else None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
