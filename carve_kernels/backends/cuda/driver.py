"""Which NVIDIA driver the CUDA runtime inside the extension needs, and which one is here."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple

import torch

# By CUDA's major version: the oldest driver that serves every minor version of it, as NVIDIA's "CUDA Compatibility" has
# it (docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
OLDEST = {11: 450, 12: 525, 13: 580}
_PATIENCE = 20


class Driver(NamedTuple):
    """`runtime` is the CUDA version inside and `serves` the newest one that the driver serves, 13000 for 13.0.

    Both are 0 where there is none. `version` is the driver's own, None where nothing tells it.
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
        here = "none is here"
        if self.serves:
            here = f"{self.version or 'one'} is here, for CUDA up to {_shown(self.serves)}"
        return f"CUDA {_shown(self.runtime)} is inside and needs an NVIDIA driver {wanted}; {here}"


def find() -> Driver:
    """Ask the extension, which has to be loaded and to have CUDA kernels inside, and nvidia-smi."""
    out = torch.zeros(2, dtype=torch.int64, device="cpu")
    torch.ops.carve_kernels.cuda_versions(out)
    runtime, serves = out.tolist()
    return Driver(runtime, serves, _version() if serves else None)


def _version() -> str | None:
    """The driver's own version, which CUDA does not tell."""
    asked = shutil.which("nvidia-smi")
    if asked is None:
        return None
    try:
        told = subprocess.run(
            [asked, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = told.stdout.split()
    return lines[0] if told.returncode == 0 and lines else None


def _shown(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
