"""How capture is divided among programs, in plain integers: the count of its work needs no Triton."""

from __future__ import annotations

from typing import NamedTuple

# Scores are in base 2, the base of the hardware's exponential.
LOG2E = 1.4426950408889634

# What a block of tokens stores for a row: mass, entropy, used tokens.
PARTIALS = 3

# All splits of a lane are in one register tile of the second kernel: 64 lanes x 32 splits x 2 floats are 32 registers
# for each of 128 threads.
MOST_SPLITS = 32

# Rows times heads of a tile, by the bytes of an element. 16 is the M of mma.sync, 64 that of wgmma and tcgen05; beyond,
# a query of 256 dimensions and its scores leave no registers. The only matrix units for float32 are TF32's, with three
# digits: without them each thread holds whole rows of its operands, and 16 lanes fit.
LEAST_LANES = 16
MOST_LANES = {2: 64, 4: 16}


class Plan(NamedTuple):
    """The grids of both kernels."""

    block_row: int
    block_group: int
    row_tiles: int
    group_tiles: int
    splits: int
    span: int
    block_size: int


def plan(query_heads: int, key_heads: int, rows: int, keys: int, size: int, element_size: int) -> Plan:
    """A tile of lanes, and splits of the keys, which depend on the number of keys and rows alone.

    Splits make programs: one row of Qwen2.5-VL-7B at 4,096 keys gives 16 splits x 4 key heads x 6 layers = 384 programs
    for the 108 to 148 multiprocessors of a GPU. Many rows are many programs without splits, which read less scratch.
    """
    group = query_heads // key_heads
    lanes = MOST_LANES[element_size]
    block_group = min(power_of_two(group), lanes)
    block_row = min(max(power_of_two(rows), LEAST_LANES // block_group, 1), lanes // block_group)
    most = MOST_SPLITS if rows <= 16 else MOST_SPLITS // 4
    wanted = min(max(keys // 256, 1), most)
    span = 128 * ceiling(ceiling(keys, wanted), 128) or 128
    return Plan(
        block_row,
        block_group,
        ceiling(rows, block_row),
        ceiling(group, block_group),
        max(ceiling(keys, span), 1),
        span,
        max(power_of_two(size), 16),
    )


def ceiling(value: int, unit: int) -> int:
    """value / unit, rounded up."""
    return -(-value // unit)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least a positive number."""
    return 1 << (value - 1).bit_length()
