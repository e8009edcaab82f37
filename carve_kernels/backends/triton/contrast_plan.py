"""How the contrast is cut into programs, in plain numbers: shared by its launcher and by its count of work."""

from __future__ import annotations

import math
from typing import NamedTuple

from carve_kernels.types import Size
from carve_kernels.work import Work

# 1024 pixels for 128 threads, 8 each: a row of 64 stores 256 bytes, and 448 x 448 pixels make 196 programs, more than
# a GPU has multiprocessors.
BLOCK_Y, BLOCK_X = 16, 64

# Positions on an axis are compared in whole numbers of up to 8 * tokens * pixels, which must stay below 2^31.
MOST_TOKENS_TIMES_PIXELS = 2**28 - 1


class GridPlan(NamedTuple):
    """The programs of the token grid: `chunks` runs of `maps` maps times `blocks` blocks of `block_token` tokens."""

    chunks: int
    maps: int
    blocks: int
    block_token: int
    warps: int


def plan_grid(maps: int, tokens: int) -> GridPlan:
    """Cut `maps` maps (layers times steps) of `tokens` tokens.

    With lam="mean" a program reads the whole of its general maps, so that B blocks read them B times: four blocks at
    most, unless a block would pass 4096 tokens. A program then reads (1 + 2 / B) * tokens for each map of its chunk,
    and the last program of a block reads tokens / B for each chunk: with B = 4 the two are equal at
    chunks = sqrt(6 * maps), without the mean at sqrt(2 * maps). sqrt(4 * maps) is near both; 6 layers and 32 steps
    make 28 * 4 programs. Of a long block a thread holds 8 tokens: with 32 it spills.
    """
    block_token = min(max(1 << (-(-tokens // 4) - 1).bit_length(), 128), 4096)
    maps_of_chunk = -(-maps // math.ceil(math.sqrt(4 * maps)))
    warps = max(block_token // 256, 4)
    return GridPlan(-(-maps // maps_of_chunk), maps_of_chunk, -(-tokens // block_token), block_token, warps)


def is_too_long(grid: Size, size: Size) -> bool:
    """Whether whole numbers of 32 bits do not hold the positions on an axis of a view."""
    return any(tokens * pixels > MOST_TOKENS_TIMES_PIXELS for tokens, pixels in zip(grid, size, strict=True))


def contrast_work(*, layers: int, steps: int, grid: Size, size: Size, general_steps: int | None = None) -> Work:
    """The work of `contrast` with lam="mean" on one view without normalisation, from the loop bounds of its kernels.

    What a program reads twice is counted once, since it stays in its cache: the part of a general map that is first
    added to the mean, and the tokens that neighbouring pixels share.
    """
    maps, tokens, pixels = layers * steps, grid[0] * grid[1], size[0] * size[1]
    plan = plan_grid(maps, tokens)
    chunks = [range(first, min(first + plan.maps, maps)) for first in range(0, maps, plan.maps)]
    general = sum(len({map // steps if general_steps == 1 else map for map in chunk}) for chunk in chunks)
    of_grid = maps * tokens + plan.blocks * (maps + general * tokens) + plan.chunks * tokens
    of_pixels = _tokens_of_tiles(grid[0], size[0], BLOCK_Y) * _tokens_of_tiles(grid[1], size[1], BLOCK_X)
    written = plan.chunks * tokens + tokens + 4 * plan.blocks + pixels
    taps = math.prod(-(-2 * max(pair) // pair[1]) for pair in zip(grid, size, strict=True))
    return Work(4 * (of_grid + of_pixels), 4 * written, 2 * (maps * tokens + taps * pixels), 2)


def _tokens_of_tiles(tokens: int, pixels: int, block: int) -> int:
    """How many tokens of an axis the tiles of pixels look at, a token once for each tile."""
    found = 0
    for first in range(0, pixels, block):
        last = min(first + block, pixels) - 1
        # A pixel weighs the tokens whose middle is nearer than the reach: both ends are left out.
        low = ((2 * first + 1) * tokens - 2 * max(tokens, pixels) - pixels) // (2 * pixels) + 1
        high = -(-((2 * last + 1) * tokens + 2 * max(tokens, pixels) - pixels) // (2 * pixels)) - 1
        found += min(high, tokens - 1) - max(low, 0) + 1
    return found
