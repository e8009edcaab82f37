"""TileConfig sizes of capture by architecture, element size, lanes and head size.

The environment variable CARVE_KERNELS_TILES may name a JSON file that replaces some of them, as
`python -m carve_kernels.backends.triton.tune` writes it on a GPU:
`{"sm_90/2/16/128": {"scores": [64, 4, 4], "reread": [64, 4, 4]}}`, with keys of `row_name` and values of `TileConfig`.
Results stay the same to a rounding; the number of splits is not in the table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

ENVIRONMENT = "CARVE_KERNELS_TILES"

# The head sizes, lanes and element sizes in bytes of the table's rows; a size in between is rounded up.
SIZES = (16, 32, 64, 128, 256)
LANES = (16, 64)
ELEMENT_SIZES = (2, 4)


class TileConfig(NamedTuple):
    """Keys or tokens of a tile, warps of a program, and stages of its asynchronous loads."""

    block: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of the kernel that reads all keys, and of the one that reads those of the tokens."""

    scores: TileConfig
    reread: TileConfig


# Tiles whose loads are in flight at a time: from the bytes in flight that keep the memory busy, which are
# bandwidth x latency / multiprocessors, and from the shared memory that holds them.
STAGES = {
    "sm_80": 3,  # 2.04 TB/s x 0.6 us / 108 = 11 KiB: 2 tiles of 16 KiB in flight, 3 programs fit into 163 KiB
    "sm_86": 3,  # 0.9 TB/s x 0.6 us / 84 = 6 KiB; 99 KiB hold 2 programs
    "sm_90": 4,  # 3.35 TB/s x 0.7 us / 132 = 18 KiB: 3 tiles in flight, 3 programs fit into 227 KiB
    "sm_100": 4,  # 8 TB/s x 0.8 us / 148 = 43 KiB: 3 tiles in each of 3 programs
    "sm_120": 3,  # 1.8 TB/s x 0.7 us / 170 = 7 KiB; 99 KiB hold 2 programs
    "gfx942": 2,  # 5.3 TB/s x 0.8 us / 304 = 14 KiB, and 64 KiB of LDS hold 1 program
}


def _tiles(architecture: str, element_size: int, lanes: int, size: int) -> Tiles:
    stages = STAGES[architecture]
    if element_size == 4:
        # Without matrix units each of 128 threads spills 376 bytes (16 lanes, 32 keys, 128 dimensions); 256 threads
        # need 58 registers. With 256 dimensions they hold 16 keys in 102 registers, and 32 keys spill.
        block = 16 if size == 256 else 32
        return Tiles(TileConfig(block, 8, 2), TileConfig(block, 8, 2))
    # 16 KiB of keys: 8 loads of 128 bits for each of 128 threads.
    block = 16384 // (2 * size)
    if lanes == 16:
        # 1,024 tokens by 64 are 16 programs for each of 6 layers; their loop over the key heads, mostly 4 to 8, is
        # too short for a fourth stage.
        return Tiles(TileConfig(min(block, 128), 4, stages), TileConfig(min(block, 64), 4, min(stages, 3)))
    # 64 lanes x 64 keys are 16 scores and their 64-bit mask addresses for each of 256 threads; 128 threads spill.
    # With 256 dimensions the query of the kernel that rereads keys and 32 tokens spill as well.
    return Tiles(TileConfig(min(block, 64), 4, 2), TileConfig(min(block, 64) if size < 256 else 16, 8, min(stages, 3)))


def row_name(architecture: str, element_size: int, lanes: int, size: int) -> str:
    """The name of a row in the table: architecture / bytes of an element / lanes of a tile / head size."""
    return f"{architecture}/{element_size}/{lanes}/{size}"


def table() -> dict[str, Tiles]:
    """The built-in rows."""
    return {
        row_name(architecture, element_size, lanes, size): _tiles(architecture, element_size, lanes, size)
        for architecture in STAGES
        for element_size in ELEMENT_SIZES
        for lanes in LANES
        for size in SIZES
    }


def row_of(architecture: str, element_size: int, lanes: int, size: int, path: str | None = None) -> Tiles:
    """The tiles for an architecture, an element size, the lanes of a tile, and a head size that is a power of two."""
    if architecture == "interpreter":
        # A step of the interpreter costs the same for any tile.
        return Tiles(TileConfig(256, 4, 1), TileConfig(256, 4, 1))
    row = row_name(architecture, element_size, next(most for most in LANES if lanes <= most), size)
    return (table() | replacements(path))[row]


def replacements(path: str | None) -> dict[str, Tiles]:
    """The rows of a JSON file, or none without a file; ValueError for any other file."""
    if not path:
        return {}
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{ENVIRONMENT}: expected a JSON file of tiles, got {path}: {error}") from None
    if not isinstance(rows, dict):
        raise ValueError(f"{ENVIRONMENT}: expected an object of rows in {path}, got {type(rows).__name__}")
    builtin = table()
    for name, row in rows.items():
        if name not in builtin:
            raise ValueError(f"{ENVIRONMENT}: expected keys such as {next(iter(builtin))!r} in {path}, got {name!r}")
        if not isinstance(row, dict) or set(row) != set(Tiles._fields):
            raise ValueError(f"{ENVIRONMENT}: expected 'scores' and 'reread' in {name!r} of {path}, got {row!r}")
    return {
        name: Tiles(**{kernel: _tile(path, name, value) for kernel, value in row.items()}) for name, row in rows.items()
    }


def _tile(path: str, name: str, value: Any) -> TileConfig:
    is_valid = (
        isinstance(value, list)
        and len(value) == 3
        and all(type(number) is int for number in value)
        and value[0] in (16, 32, 64, 128, 256)
        and value[1] in (1, 2, 4, 8)
        and 1 <= value[2] <= 8
    )
    if not is_valid:
        raise ValueError(
            f"{ENVIRONMENT}: expected [block, warps, stages] of powers of two, at most 8 warps and 1 to 8 stages in "
            f"{name!r} of {path}, got {value!r}"
        )
    return TileConfig(*value)
