"""Builds the library for the GPU of this machine, in place, and checks it: `python -m tests.gpu.library`."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.gpu.steps import ROOT

# A library of an older source has kernels for this GPU, but not under the names that Python calls.
_CHECK = """
import sys, torch
from carve_kernels.backends import cuda
reason = cuda.unavailable()
if reason is None and not torch._C._dispatch_has_kernel_for_dispatch_key("carve_kernels::capture_layers", "CUDA"):
    reason = "the library does not have the operator capture_layers for CUDA"
sys.exit(reason)
"""


def missing() -> str | None:
    """Why the library that is there does not serve this GPU, or None; asked in a process that then unloads it."""
    found = subprocess.run([sys.executable, "-c", _CHECK], cwd=ROOT, capture_output=True, text=True)
    return None if found.returncode == 0 else (found.stderr.strip() or f"status {found.returncode}").splitlines()[-1]


def build(capability: tuple[int, int]) -> str | None:
    """Build for one architecture; why that failed, or None."""
    number = "".join(map(str, capability))
    environment = os.environ | {"CARVE_KERNELS_CUDA_ARCHITECTURES": number, "CARVE_KERNELS_BUILD": "required"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment)
    return f"{' '.join(command)} ended with status {done.returncode}" if done.returncode else missing()


if __name__ == "__main__":
    import torch

    sys.exit(build(torch.cuda.get_device_capability()))
