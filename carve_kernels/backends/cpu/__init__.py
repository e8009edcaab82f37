"""The CPU room: compiled C++ operators from the extension that stands next to the package."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

import carve_kernels.schemas  # noqa: F401  (the operators' schemas must stand before their implementations register)

_MEND = "pip install --no-build-isolation -e . with a C++ compiler"
_LIBRARY = Path(__file__).resolve().parents[2] / "_C.abi3.so"


@functools.cache
def unavailable() -> str | None:
    """Load the extension once; why it is not there, and the line that would mend it, or None."""
    if not _LIBRARY.exists():
        return f"the extension {_LIBRARY.name} is not built; {_MEND}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the extension {_LIBRARY.name} failed to load ({error}); {_MEND}"
    return None
