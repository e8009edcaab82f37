"""What the room's kernels move and compute, from their own loop bounds; needs neither Triton nor a GPU."""

from __future__ import annotations

import math

from carve_kernels.backends.triton.capture_plan import PARTS, ceiling, plan
from carve_kernels.backends.triton.contrast_plan import BLOCK_X, BLOCK_Y, plan_grid
from carve_kernels.backends.triton.tiles import row_of
from carve_kernels.selfcheck.work import Work
from carve_kernels.types import Size

_FLOAT = 4
_TOKEN = 4


def capture_work(
    *,
    layers: int,
    batch: int,
    query_heads: int,
    key_heads: int,
    rows: int,
    keys: int,
    size: int,
    tokens: int,
    element_bytes: int,
    lse: bool = False,
    architecture: str = "sm_90",
) -> Work:
    """The work of one call of capture without a mask, where all tokens are used.

    Each program counts what it loads once. That is the keys once and the keys at the tokens once for each tile of rows
    and heads (of which there is one up to 64 of them together), and small terms: the query, the statistics, the parts.
    The operations are those of whole tiles.
    """
    divided = plan(query_heads, key_heads, rows, keys, size, element_bytes)
    lanes = divided.block_row * divided.block_group
    tiles = row_of(architecture, element_bytes, lanes, divided.block_size)
    copies = layers * batch
    row_of_keys = key_heads * size * element_bytes
    query = query_heads * rows * size * element_bytes
    lines = query_heads * rows
    work = Work(0, 0, 0, 0)
    if not copies or not rows:
        return work

    if not lse:
        groups = divided.row_tiles * divided.group_tiles
        spans = [min(divided.span, keys - start) for start in range(0, keys, divided.span)]
        columns = sum(tiles.statistics.block * ceiling(span, tiles.statistics.block) for span in spans)
        work += Work(
            copies * (groups * keys * row_of_keys + divided.splits * query),
            copies * lines * divided.splits * 2 * _FLOAT,
            copies * groups * key_heads * 2 * lanes * divided.block_size * columns,
            1,
        )

    blocks = max(ceiling(tokens, tiles.map.block), 1)
    known = _FLOAT if lse else 2 * _FLOAT * divided.splits
    parts = rows * blocks * PARTS * _FLOAT
    steps = divided.row_tiles * divided.group_tiles * key_heads * blocks
    work += Work(
        copies * (divided.row_tiles * tokens * (row_of_keys + _TOKEN) + blocks * (query + lines * known) + parts),
        copies * (rows * tokens * _FLOAT + parts + rows * 2 * _FLOAT + divided.row_tiles * _TOKEN),
        copies * steps * 2 * lanes * divided.block_size * tiles.map.block,
        1,
    )
    return work


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
