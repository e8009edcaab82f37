"""What the room's kernels move and compute, from their own loop bounds; needs neither Triton nor a GPU."""

from __future__ import annotations

from carve_kernels.backends.triton.capture_plan import PARTS, ceiling, plan
from carve_kernels.backends.triton.contrast_plan import contrast_work
from carve_kernels.backends.triton.tiles import row_of
from carve_kernels.work import Work

__all__ = ["capture_work", "contrast_work"]

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
