"""The compiled extension in the package's folder: loaded once, by the first backend that needs it."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[2] / "_C.abi3.so"

# As docs/performance.md has it under "Without the extension".
SLOWER = "reference backend only: on one core of an AMD EPYC 2.4 to 11 times slower"

_MOST_ARCHITECTURES = 16


def not_built() -> str | None:
    """That there is no library, and the command that builds it, or None."""
    return None if LIBRARY.exists() else f"the extension {LIBRARY.name} is not built; {_fix()}"


@functools.cache
def unavailable() -> str | None:
    """Load the extension once; why it is unavailable, and the command that fixes it, or None."""
    if reason := not_built():
        return reason
    import torch

    import carve_kernels.backends.native.schemas  # noqa: F401  (an operator is defined before it is implemented)

    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the extension {LIBRARY.name} failed to load ({error}); {_fix()}"
    return None


def architectures() -> tuple[int, ...]:
    """The GPU architectures of the compiled kernels, such as 90 for sm_90; none if built without nvcc."""
    import torch

    out = torch.zeros(_MOST_ARCHITECTURES, dtype=torch.int64, device="cpu")
    torch.ops.carve_kernels.cuda_build(out)
    return tuple(number for number in out.tolist() if number)


def install_command() -> str:
    """The command that installs the package from its source again, where the source is known."""
    source = Path(__file__).resolve().parents[3]
    if (source / "setup.py").exists():
        return f"pip install -e {shlex.quote(str(source))}"
    return "pip install . in the folder of its source"


def _fix() -> str:
    return f"with a C++ compiler: {install_command()}"
