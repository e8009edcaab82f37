"""What the Triton kernels move and compute, from their loop bounds; needs neither Triton nor a GPU."""

from __future__ import annotations

import math

from carve_kernels.backends.triton.capture_plan import BLOCK_PARTIAL, BLOCK_TOKEN, PARTIALS, Plan, ceiling, plan
from carve_kernels.backends.triton.contrast_plan import BLOCK_X, BLOCK_Y, plan_grid
from carve_kernels.backends.triton.tiles import Tiles, row_of
from carve_kernels.selfcheck.work import CaptureSizes, Work
from carve_kernels.types import Size

_FLOAT = 4
_TOKEN = 4
_STAT = 8
# What is stored of scores is whole vectors.
_VECTORS = 64


def capture_work(*, lse: bool = False, span: int | None = None, architecture: str = "sm_90", **sizes: int) -> Work:
    """The work of one capture of `CaptureSizes` without a mask, where all tokens are used.

    `span`: the keys from the lowest to the highest token, whose scores are stored; all keys by default. Each load of a
    program counts once: all keys for each tile of rows and heads (one tile up to 64 of them), the scores of the tokens
    or, with `lse`, their keys, and small terms for the query, the statistics and the partial sums. The operations are
    those of whole tiles.
    """
    given = CaptureSizes(**sizes)
    work = Work(0, 0, 0, 0)
    if not given.batch or not given.rows or not given.query_heads:
        return work
    _, batch, query_heads, key_heads, rows, keys, size, _, element_bytes = given
    grid = plan(given.layers, batch, query_heads, key_heads, rows, keys, size, element_bytes, lse)
    tiles = row_of(architecture, element_bytes, grid.block_row * grid.block_group, grid.block_size)
    for layer in range(0, given.layers, grid.layers):
        for row in range(0, rows, grid.rows):
            part = given._replace(layers=min(grid.layers, given.layers - layer), rows=min(grid.rows, rows - row))
            work += _reread(part, grid, tiles) if lse else _scores(part, grid, tiles, span) + _maps(part, grid)
    return work


def _scores(sizes: CaptureSizes, grid: Plan, tiles: Tiles, span: int | None) -> Work:
    """The first kernel: every program reads a split of the keys, and the queries of its tile."""
    block, lanes = tiles.scores.block, grid.block_row * grid.block_group
    groups = ceiling(sizes.rows, grid.block_row) * grid.group_tiles
    lines = sizes.query_heads * sizes.rows
    vector = sizes.size * sizes.element_bytes
    splits = [min(grid.span, sizes.keys - start) for start in range(0, sizes.keys, grid.span)] or [0]
    columns = sum(block * ceiling(length, block) for length in splits)
    kept = sum(min(block * ceiling(length, block), grid.span) for length in splits)
    kept = min(kept, grid.padded, _VECTORS * ceiling(sizes.keys if span is None else span, _VECTORS))
    read = groups * sizes.key_heads * sizes.keys * vector + len(splits) * lines * vector
    written = lines * (kept * _FLOAT + len(splits) * _STAT)
    operations = groups * sizes.key_heads * 2 * lanes * grid.block_size * columns
    copies = sizes.layers * sizes.batch
    return Work(copies * read, copies * written, copies * operations, 1)


def _maps(sizes: CaptureSizes, grid: Plan) -> Work:
    """The second kernel: every program reads the scores of all heads at its tokens, and their statistics."""
    blocks = max(ceiling(sizes.tokens, BLOCK_TOKEN), 1)
    partials = blocks * (BLOCK_TOKEN // BLOCK_PARTIAL) * PARTIALS * _FLOAT
    scores = sizes.query_heads * sizes.tokens * _FLOAT if sizes.keys else 0
    read = sizes.tokens * _TOKEN + scores + blocks * sizes.query_heads * grid.splits * _STAT + partials
    written = sizes.tokens * _FLOAT + partials + 2 * _FLOAT + _TOKEN
    copies = sizes.layers * sizes.batch * sizes.rows
    return Work(copies * read, copies * written, 0, 1)


def _reread(sizes: CaptureSizes, grid: Plan, tiles: Tiles) -> Work:
    """The kernel that reads the keys of the tokens where the log-sum-exp is given."""
    block, lanes = tiles.reread.block, grid.block_row * grid.block_group
    blocks = max(ceiling(sizes.tokens, block), 1)
    vector = sizes.size * sizes.element_bytes
    partials = sizes.rows * blocks * PARTIALS * _FLOAT
    lines = sizes.query_heads * sizes.rows
    steps = grid.row_tiles * grid.group_tiles * sizes.key_heads * blocks
    read = grid.row_tiles * sizes.tokens * (sizes.key_heads * vector + _TOKEN)
    read += blocks * lines * (vector + _FLOAT) + partials
    written = sizes.rows * (sizes.tokens + 2) * _FLOAT + partials + grid.row_tiles * _TOKEN
    copies = sizes.layers * sizes.batch
    return Work(copies * read, copies * written, copies * steps * 2 * lanes * grid.block_size * block, 1)


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
