"""What the Triton kernels move and compute, from their loop bounds; needs neither Triton nor a GPU."""

from __future__ import annotations

import math

from carve_kernels.backends.triton.capture_plan import PARTIALS, ceiling, plan
from carve_kernels.backends.triton.contrast_plan import BLOCK_X, BLOCK_Y, plan_grid
from carve_kernels.backends.triton.tiles import row_of
from carve_kernels.selfcheck.work import CaptureSizes, Work
from carve_kernels.types import Size

_FLOAT = 4
_TOKEN = 4


def capture_work(*, lse: bool = False, architecture: str = "sm_90", **sizes: int) -> Work:
    """The work of one capture of `CaptureSizes` without a mask, where all tokens are used.

    Each load of a program counts once: all keys and the keys at the tokens, for each tile of rows and heads (one tile
    up to 64 of them), and small terms for the query, the statistics and the partial sums. The operations are those of
    whole tiles.
    """
    layers, batch, query_heads, key_heads, rows, keys, size, tokens, element_bytes = CaptureSizes(**sizes)
    grid = plan(query_heads, key_heads, rows, keys, size, element_bytes)
    lanes = grid.block_row * grid.block_group
    tiles = row_of(architecture, element_bytes, lanes, grid.block_size)
    copies = layers * batch
    row_of_keys = key_heads * size * element_bytes
    query = query_heads * rows * size * element_bytes
    lines = query_heads * rows
    work = Work(0, 0, 0, 0)
    if not copies or not rows:
        return work

    if not lse:
        groups = grid.row_tiles * grid.group_tiles
        spans = [min(grid.span, keys - start) for start in range(0, keys, grid.span)]
        columns = sum(tiles.statistics.block * ceiling(span, tiles.statistics.block) for span in spans)
        work += Work(
            copies * (groups * keys * row_of_keys + grid.splits * query),
            copies * lines * grid.splits * 2 * _FLOAT,
            copies * groups * key_heads * 2 * lanes * grid.block_size * columns,
            1,
        )

    blocks = max(ceiling(tokens, tiles.map.block), 1)
    statistics = _FLOAT if lse else 2 * _FLOAT * grid.splits
    partials = rows * blocks * PARTIALS * _FLOAT
    steps = grid.row_tiles * grid.group_tiles * key_heads * blocks
    work += Work(
        copies * (grid.row_tiles * tokens * (row_of_keys + _TOKEN) + blocks * (query + lines * statistics) + partials),
        copies * (rows * tokens * _FLOAT + partials + rows * 2 * _FLOAT + grid.row_tiles * _TOKEN),
        copies * steps * 2 * lanes * grid.block_size * tiles.map.block,
        1,
    )
    return work


def contrast_work(*, layers: int, steps: int, grid: Size, size: Size, general_steps: int | None = None) -> Work:
    """The work of `contrast` with lam="mean" on one view without normalisation, from the loop bounds of its kernels.

    What a program reads twice counts once, since it is in the cache: the part of a general map that is first summed for
    the mean, and the tokens that neighbouring pixels share.
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
    """How many tokens of an axis the tiles of pixels read, counting a token once for each tile."""
    count = 0
    for first in range(0, pixels, block):
        last = min(first + block, pixels) - 1
        # A pixel has weights for the tokens whose centre is nearer than the filter's radius, both ends excluded.
        low = ((2 * first + 1) * tokens - 2 * max(tokens, pixels) - pixels) // (2 * pixels) + 1
        high = -(-((2 * last + 1) * tokens + 2 * max(tokens, pixels) - pixels) // (2 * pixels)) - 1
        count += min(high, tokens - 1) - max(low, 0) + 1
    return count
