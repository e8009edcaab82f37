"""How contrast is divided among programs, in plain integers: for its launcher and for the count of its work."""

from __future__ import annotations

import math
from typing import NamedTuple

from carve_kernels.types import Size

# 1024 pixels for 128 threads, 8 each: a row of 64 stores 256 bytes, and 448 x 448 pixels make 196 programs, more than
# a GPU has multiprocessors.
BLOCK_Y, BLOCK_X = 16, 64

# Positions on an axis are compared as integers of up to 8 * tokens * pixels, which must stay below 2^31.
MOST_TOKENS_TIMES_PIXELS = 2**28 - 1


class GridPlan(NamedTuple):
    """The programs of the token grid: `chunks` runs of `maps` maps times `blocks` blocks of `block_token` tokens."""

    chunks: int
    maps: int
    blocks: int
    block_token: int
    warps: int


def plan_grid(maps: int, tokens: int) -> GridPlan:
    """Divide `maps` maps (layers times steps) of `tokens` tokens.

    With lam="mean" a program reads the whole of its general maps, so that B blocks read them B times: four blocks at
    most, unless a block would pass 4096 tokens. A program then reads (1 + 2 / B) * tokens for each map of its chunk,
    and the last program of a block reads tokens / B for each chunk: with B = 4 the two are equal at
    chunks = sqrt(6 * maps), without the mean at sqrt(2 * maps). sqrt(4 * maps) is near both; 6 layers and 32 steps
    make 28 * 4 programs. In a long block each thread holds 8 tokens: with 32 it spills.
    """
    block_token = min(max(1 << (-(-tokens // 4) - 1).bit_length(), 128), 4096)
    maps_of_chunk = -(-maps // math.ceil(math.sqrt(4 * maps)))
    warps = max(block_token // 256, 4)
    return GridPlan(-(-maps // maps_of_chunk), maps_of_chunk, -(-tokens // block_token), block_token, warps)


def is_too_long(grid: Size, size: Size) -> bool:
    """Whether 32-bit integers cannot hold the positions on an axis of a view."""
    return any(tokens * pixels > MOST_TOKENS_TIMES_PIXELS for tokens, pixels in zip(grid, size, strict=True))
