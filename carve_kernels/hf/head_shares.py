"""Tensor parallelism: each process attends with a share of the heads, and a map is the mean over those of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

from carve_kernels.hf import names
from carve_kernels.hf.model import tensor_parallel_group, text_backbone
from carve_kernels.numerics import entropy
from carve_kernels.types import Capture


class HeadShares:
    """The processes of a model that divide its heads among themselves; `heads` are all of them."""

    def __init__(self, group: Any, heads: int) -> None:
        self._group, self._heads = group, heads

    def check(self, layer: int, heads: int) -> None:
        """Raise ValueError for a share of the heads where it is not known which processes have the others."""
        if self._group is None and 0 < heads < self._heads and self._heads % heads == 0:
            raise ValueError(
                f"layers: layer {layer} attends with {heads} of its {self._heads} heads in this process, and the "
                "processes that have the others are unknown; load the model with tp_plan='auto', or in one process"
            )

    def average(
        self, out: Capture, slot: torch.Tensor, first: int, layers: int, heads: int, tokens: torch.Tensor
    ) -> None:
        """Replace captures of this process's heads by the means over the heads of all processes.

        `slot`, int64 [], is the step of the buffers [T, L, B, Q, N] and `first` the first of the layers in them; the
        visual tokens are int32 [B, N]. All processes of a group call it at the same place of a forward, as they do in
        the layers that tensor parallelism divides.
        """
        if self._group is None:
            return
        step = slot.view(1)
        maps = out.maps[:, first : first + layers].index_select(0, step)
        # Shares may differ in size: the last process has what is left.
        sums = torch.cat([(maps * heads).flatten(), torch.full((1,), float(heads), device=maps.device)])
        distributed.all_reduce(sums, group=self._group)
        maps = (sums[:-1] / sums[-1]).view_as(maps)
        spread = entropy(maps[0].transpose(0, 1), tokens >= 0).transpose(0, 1)[None]
        for buffer, values in zip(out, (maps, maps.sum(-1), spread), strict=True):
            buffer[:, first : first + layers].index_copy_(0, step, values)


def head_shares(model: nn.Module, modules: list[nn.Module]) -> HeadShares | None:
    """How the heads of these attention modules are divided among processes; None in one process."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    groups = (tensor_parallel_group(module) for module in modules)
    group = next((group for group in groups if group is not None), None)
    return HeadShares(group, names.heads_of(text_backbone(model).config)[0])
