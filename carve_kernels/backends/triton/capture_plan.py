"""How capture is divided among programs, in plain integers: the count of its work needs no Triton."""

from __future__ import annotations

import functools
from typing import NamedTuple

# Scores are in base 2, the base of the hardware's exponential; LOG2E_LOW is what LOG2E loses in float32.
LOG2E = 1.4426950408889634
LOG2E_LOW = 1.92596299e-08

# What a block of tokens stores for a row: mass, entropy, used tokens.
PARTIALS = 3

# All splits of a head are in one register tile of the second kernel: 32 heads x 32 splits x 2 floats are 16 registers
# for each of 128 threads.
MOST_SPLITS = 32

# Rows times heads of a tile, by the bytes of an element. 16 is the M of mma.sync, 64 that of wgmma and tcgen05; beyond,
# a query of 256 dimensions and its scores leave no registers. The only matrix units for float32 are TF32's, with three
# digits: without them each thread holds whole rows of its operands, and 16 lanes fit.
LEAST_LANES = 16
MOST_LANES = {2: 64, 4: 16}

# Tokens of a program of the second kernel: one for each thread, which has all heads of it, 32 at a time.
BLOCK_TOKEN = 128
BLOCK_HEAD = 32
# Tokens whose mass and entropy are added up by one warp.
BLOCK_PARTIAL = 32

# Three programs on each of an H100's 132 multiprocessors run at the same time. The result depends on the splits, so
# they depend neither on the device nor on the number of layers: six are captured, as the presets do.
_PROGRAMS = 3 * 132
_LAYERS = 6
SPLIT_UNIT = 64
_LONG_SPLIT = 2048

# What makes a score of a product, besides a factor that the exponents have.
PLAIN, SOFTCAP, NEGATIVE = 0, 1, 2

# Bytes of scores at a time, and rows times layers: more are captured in turns.
MOST_SCORES = 96 << 20
MOST_LINES = 1024
# Programs on the second and the third axis of a grid.
MOST_PROGRAMS = 65535


class Plan(NamedTuple):
    """The tiles and the grids of the kernels; `rows` and `layers` are captured at a time, or all if none are stored.

    The scratch of the scores has `padded` floats for each row and head.
    """

    block_row: int
    block_group: int
    row_tiles: int
    group_tiles: int
    splits: int
    span: int
    block_size: int
    rows: int
    layers: int
    padded: int


class Scratch(NamedTuple):
    """Where the parts of the scratch start, in floats, its length, and the tickets; the scores are at 0."""

    statistics: int
    partials: int
    floats: int
    tickets: int


# Most calls of a process have the sizes of an earlier one.
@functools.lru_cache(maxsize=1024)
def plan(
    layers: int, batch: int, query_heads: int, key_heads: int, rows: int, keys: int, size: int, element_bytes: int,
    lse: bool = False,
) -> Plan:  # fmt: skip
    """A tile of lanes, splits of the keys, and what is captured at a time."""
    padded = SPLIT_UNIT * ceiling(keys, SPLIT_UNIT)
    at_once, layers_at_once = rows, layers
    if not lse:
        most = min(max(MOST_SCORES // max(batch * query_heads * padded * 4, 1), 1), MOST_LINES)
        at_once = _evenly(rows, most)
        layers_at_once = _evenly(layers, max(min(most // at_once, MOST_PROGRAMS // batch), 1))
    group = query_heads // key_heads
    lanes = MOST_LANES[element_bytes]
    block_group = min(power_of_two(group), lanes)
    block_row = min(max(power_of_two(at_once), LEAST_LANES // block_group, 1), lanes // block_group)
    row_tiles, group_tiles = ceiling(at_once, block_row), ceiling(group, block_group)
    wanted = min(_wanted_splits(key_heads * row_tiles * group_tiles, keys), MOST_SPLITS)
    span = SPLIT_UNIT * ceiling(ceiling(keys, wanted), SPLIT_UNIT) or SPLIT_UNIT
    return Plan(
        block_row, block_group, row_tiles, group_tiles, max(ceiling(keys, span), 1), span, max(power_of_two(size), 16),
        at_once, layers_at_once, padded,
    )  # fmt: skip


def _wanted_splits(tiles: int, keys: int) -> int:
    """As many as make programs for a whole GPU; shorter ones of many keys, so that the last do not end alone."""
    return max(_PROGRAMS // (_LAYERS * tiles), ceiling(keys, _LONG_SPLIT), 1)


@functools.lru_cache(maxsize=1024)
def plan_scratch(
    layers: int, batch: int, query_heads: int, rows: int, keys: int, token_blocks: int, lse: bool = False
) -> Scratch:
    """The scratch of one call, never less for fewer keys, layers or rows: a session allocates it once."""
    lines = batch * (rows * layers if lse else min(rows * layers, MOST_LINES))
    partials = lines * max(token_blocks, BLOCK_TOKEN // BLOCK_PARTIAL) * PARTIALS
    if lse:
        return Scratch(0, 0, partials, lines)
    row = batch * query_heads * SPLIT_UNIT * ceiling(keys, SPLIT_UNIT)
    scores = min(row * rows * layers, max(row, MOST_SCORES // 4))
    statistics = lines * query_heads * min(max(ceiling(keys, SPLIT_UNIT), 1), MOST_SPLITS) * 2
    return Scratch(scores, scores + statistics, scores + statistics + partials, lines)


def _evenly(count: int, most: int) -> int:
    """How many at a time, so that all turns but the last are alike and none has more than `most`."""
    return ceiling(count, ceiling(count, most)) if count else 0


def ceiling(value: int, unit: int) -> int:
    """value / unit, rounded up."""
    return -(-value // unit)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least a positive number."""
    return 1 << (value - 1).bit_length()
