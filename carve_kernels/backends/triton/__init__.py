"""The Triton backend: kernels for GPUs; with TRITON_INTERPRET=1, Triton's interpreter runs them on a CPU."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import os
import re
import shutil

import torch

# The oldest Triton that compiles the kernels for every target.
OLDEST = (3, 6)

_INSTALL = "pip install 'triton>=3.6'"


def devices() -> tuple[str, ...]:
    return ("cuda", "xpu", "cpu") if interpreted() else ("cuda", "xpu")


@functools.cache
def unavailable() -> str | None:
    """Import Triton once; why it cannot serve, and the command that fixes it, or None."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return f"the package triton is missing; {_INSTALL}"
    except (ImportError, OSError) as error:
        return f"the package triton failed to load ({error}); {_INSTALL}"
    version = importlib.metadata.version("triton")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST))}; {_INSTALL}"
    if not interpreted() and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton builds its launcher with a C compiler and finds none; install gcc, or name a compiler in CC"
    return None if interpreted() else _no_gpu()


def _no_gpu() -> str | None:
    if torch.xpu.is_available():
        return None
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU; install its driver and a build of torch for it"
    reasons = [too_old(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@functools.cache
def too_old(device: int) -> str | None:
    """Why a CUDA device is too old for this backend, or None."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"cuda:{device} has compute capability {major}.{minor}, this backend needs 8.0; use backend='reference'"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, by the variable that Triton reads when it makes a kernel."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def warn_of_bfloat16() -> None:
    """Warn once that Triton's interpreter multiplies and adds bfloat16 wrongly."""
    logging.getLogger("carve_kernels").warning(
        "TRITON_INTERPRET is set, and Triton's interpreter computes bfloat16 wrongly: use float32 or float16 there"
    )
