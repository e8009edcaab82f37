"""The three stages of a saliency as one compiled operator, which launches all of their kernels."""

from __future__ import annotations

import torch

from carve_kernels.backends import cuda
from carve_kernels.backends.cuda import plan
from carve_kernels.backends.cuda.regions import OUTCOME_ROWS as OUTCOME_ROWS
from carve_kernels.backends.cuda.regions import scratch_bytes
from carve_kernels.backends.native.scratch import ScratchNeeds
from carve_kernels.types import RegionOptions, Size

MOST_BLOCKS = plan.MOST_BLOCKS


def operator() -> torch._ops.OpOverload:
    """The operator of capture, contrast and regions in one."""
    return cuda.operators.saliency.default


def scratch_needs(
    query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor, layers: int, size: Size, regions: RegionOptions | None
) -> ScratchNeeds:
    """What a call with these tensors of one layer takes; the stages follow each other and share the scratch."""
    batch, heads, rows, head_size = query.shape
    sizes = (layers, batch, heads, key.shape[1], rows, key.shape[2], head_size, tokens.shape[1], query.element_size())
    capture = plan.most_scratch(*sizes, lse=False)
    contrast = plan.contrast_scratch(layers, tokens.shape[1])
    selection = 0 if regions is None else scratch_bytes(size, regions.connectivity)
    return ScratchNeeds(max(capture.bytes, contrast, selection), capture.tickets)
