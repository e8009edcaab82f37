"""The tiles of a device: its row in the table."""

from __future__ import annotations

import functools
import os

import torch
import triton

from carve_kernels.backends.triton import interpreted, tiles
from carve_kernels.backends.triton.launch import on


@functools.cache
def tiles_of(device: torch.device, element_size: int, lanes: int, size: int) -> tiles.Tiles:
    """The tiles of capture on a device, cached."""
    return tiles.row_of(architecture_of(device), element_size, lanes, size, os.environ.get(tiles.ENVIRONMENT))


def architecture_of(device: torch.device) -> str:
    """The architecture whose row a device uses: its own, or the nearest older one."""
    if interpreted():
        return "interpreter"
    with on(device):
        target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        # The row with the least shared memory; devices of other vendors have at least as much.
        return "gfx942"
    known = [int(name.removeprefix("sm_")) for name in tiles.STAGES if name.startswith("sm_")]
    return f"sm_{max([one for one in known if one <= target.arch], default=min(known))}"
