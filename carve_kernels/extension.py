"""The compiled extension that stands next to the package: loaded once, for whichever room asks first."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

import carve_kernels.schemas  # noqa: F401  (the operators' schemas must stand before their implementations register)

LIBRARY = Path(__file__).with_name("_C.abi3.so")

_MEND = "pip install --no-build-isolation -e . with a C++ compiler"
_MOST_ARCHITECTURES = 16


@functools.cache
def unavailable() -> str | None:
    """Load the extension once; why it is not there, and the line that would mend it, or None."""
    if not LIBRARY.exists():
        return f"the extension {LIBRARY.name} is not built; {_MEND}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the extension {LIBRARY.name} failed to load ({error}); {_MEND}"
    return None


def architectures() -> tuple[int, ...]:
    """The GPU architectures that kernels inside are compiled for, such as 90 for sm_90; none without nvcc."""
    out = torch.zeros(_MOST_ARCHITECTURES, dtype=torch.int64, device="cpu")
    torch.ops.carve_kernels.cuda_build(out)
    return tuple(number for number in out.tolist() if number)
