"""The three stages of a saliency as one compiled operator."""

from __future__ import annotations

from typing import Any

import torch

from carve_kernels.backends.native.scratch import NONE, ScratchNeeds

OUTCOME_ROWS = 0
MOST_BLOCKS = 1


def operator() -> torch._ops.OpOverload:
    """The operator of capture, contrast and regions in one."""
    return torch.ops.carve_kernels.saliency.default


def scratch_needs(*_sizes: Any, **_more: Any) -> ScratchNeeds:
    """A CPU uses no scratch."""
    return NONE
