"""Tile sizes by architecture, element size and head size; a JSON file named by CARVE_KERNELS_TILES replaces some."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

ENVIRONMENT = "CARVE_KERNELS_TILES"


class Tile(NamedTuple):
    """Keys or tokens of one tile, warps of a program, and stages of its asynchronous loads."""

    block: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of the two kernels of capture."""

    statistics: Tile
    map: Tile


_Table = dict[str, dict[int, dict[int, Tiles]]]


def _cached(stages: int, warps: int = 4) -> dict[int, dict[int, Tiles]]:
    """Tiles of 16 KiB of keys for half precision: 256 dimensions x 2 bytes x 32 keys, and so on down.

    That is one load of 128 bits for each of 128 threads 8 times over, and with `stages` of them in flight and 2 to 4
    programs a multiprocessor more than the 12 to 43 KiB that cover the latency of memory (bandwidth x 0.7 us / SMs).
    float32 multiplies without matrix units, so its tiles are what the registers of 128 threads hold.
    """
    half = {
        size: Tiles(Tile(min(16384 // (2 * size), 128), warps, stages), Tile(min(16384 // (2 * size), 64), warps, stages))
        for size in (16, 32, 64, 128, 256)
    }
    full = {size: Tiles(Tile(32, 4, 2), Tile(32, 4, 2)) for size in (16, 32, 64, 128, 256)}
    return {2: half, 4: full}


TABLE: _Table = {
    "sm_80": _cached(3),
    "sm_86": _cached(3),
    "sm_90": _cached(4),
    "sm_100": _cached(4),
    "sm_120": _cached(3),
    "gfx942": _cached(2),
    # A step of the interpreter costs the same whatever the size of its tile.
    "interpreter": {
        bytes_: {size: Tiles(Tile(256, 4, 1), Tile(256, 4, 1)) for size in (16, 32, 64, 128, 256)} for bytes_ in (2, 4)
    },
}


@functools.cache
def of(device: torch.device, size: int, element_size: int) -> Tiles:
    """The tiles for a device, a head size that is a power of two, and an element size in bytes."""
    architecture = architecture_of(device)
    return _table()[architecture][element_size][size]


@functools.cache
def too_old(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"{device} has compute capability {capability[0]}.{capability[1]}, this room needs 8.0"
    return None


def architecture_of(device: torch.device) -> str:
    return "interpreter"


def _table() -> _Table:
    return TABLE
