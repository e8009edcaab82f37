"""The compiled extension that stands next to the package: loaded once, for whichever backend asks first."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[2] / "_C.abi3.so"

# Measured in docs/performance.md, "Without the extension".
SLOWER = "reference backend only: 2 to 11 times slower"

_MOST_ARCHITECTURES = 16


def not_built() -> str | None:
    """That there is no library, and the line that would mend it, or None; found out without torch."""
    return None if LIBRARY.exists() else f"the extension {LIBRARY.name} is not built; {_mend()}"


@functools.cache
def unavailable() -> str | None:
    """Load the extension once; why it is not there, and the line that would mend it, or None."""
    if reason := not_built():
        return reason
    import torch

    import carve_kernels.backends.native.schemas  # noqa: F401  (the operators' schemas must stand before their implementations)

    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the extension {LIBRARY.name} failed to load ({error}); {_mend()}"
    return None


def architectures() -> tuple[int, ...]:
    """The GPU architectures that kernels inside are compiled for, such as 90 for sm_90; none without nvcc."""
    import torch

    out = torch.zeros(_MOST_ARCHITECTURES, dtype=torch.int64, device="cpu")
    torch.ops.carve_kernels.cuda_build(out)
    return tuple(number for number in out.tolist() if number)


def install_command() -> str:
    """What installs the package anew from its source, where that is known."""
    source = Path(__file__).resolve().parents[3]
    if (source / "setup.py").exists():
        return f"pip install -e {shlex.quote(str(source))}"
    return "pip install . in the folder of its source"


def _mend() -> str:
    return f"with a C++ compiler: {install_command()}"
