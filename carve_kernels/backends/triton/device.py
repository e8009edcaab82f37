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


@functools.cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a launch may begin before the one before it has ended, and wait for it: from sm_90 on."""
    return _number(architecture_of(device)) >= 90


@functools.cache
def warps_of(device: torch.device, threads: int) -> int:
    """The warps that hold so many threads."""
    if interpreted():
        return 4
    with on(device):
        return max(threads // triton.runtime.driver.active.get_current_target().warp_size, 1)


def architecture_of(device: torch.device) -> str:
    """The architecture whose row a device uses: its own, or the nearest older one."""
    if interpreted():
        return "interpreter"
    with on(device):
        target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        # The row with the least shared memory; devices of other vendors have at least as much.
        return "gfx942"
    known = [_number(name) for name in tiles.STAGES if name.startswith("sm_")]
    return f"sm_{max([one for one in known if one <= target.arch], default=min(known))}"


def _number(architecture: str) -> int:
    """The compute capability of an architecture of NVIDIA, times 10, or 0."""
    return int(architecture.removeprefix("sm_")) if architecture.startswith("sm_") else 0
