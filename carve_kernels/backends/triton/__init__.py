"""The Triton room: kernels for GPUs, which Triton's interpreter also runs on a CPU where TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re
import shutil

# The oldest Triton that the kernels were compiled with for every target.
OLDEST = (3, 8)

_MEND = "pip install 'triton>=3.8'"


def devices() -> tuple[str, ...]:
    return ("cuda", "xpu", "cpu") if interpreted() else ("cuda", "xpu")


@functools.cache
def unavailable() -> str | None:
    """Import Triton once; why it cannot serve, and the line that would mend it, or None."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return f"the package triton is missing; {_MEND}"
    except (ImportError, OSError) as error:
        return f"the package triton failed to load ({error}); {_MEND}"
    version = importlib.metadata.version("triton")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST))}; {_MEND}"
    if not interpreted() and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton builds its launcher with a C compiler and finds none; install gcc, or name a compiler in CC"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, by the switch that Triton itself reads when it makes a kernel."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
