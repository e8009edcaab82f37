"""What six captured layers take the Triton kernels on an H100 in a CUDA graph: predicted, beside what it measured.

No GPU has run these kernels. The first one does what the statistics kernel of 0.3.0 did, in the same tiles of 16 lanes,
and stores scores besides; the times of that kernel on one H100 (2026, by Nsight Compute) give its start and its rates.
The scores cost what they cost the cuda backend, and the second kernel starts later than cuda's by as much more as it
has more instructions.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.gpu.predicted import LAYERS, key_bytes
from benchmarks.support.cases import DTYPES, GEOMETRIES, VISUAL_SHARE, Case
from carve_kernels.backends.triton.capture_plan import ceiling, plan

# Seconds of the statistics kernel of 0.3.0, by lanes of a tile, and the bytes of K that it read.
STATISTICS = {
    (16, 25.2e6): 14.24e-6,
    (16, 201.4e6): 75.06e-6,
    (32, 25.2e6): 15.66e-6,
    (64, 25.2e6): 18.00e-6,
}
# Its start, and the bytes of K a second behind it, by lanes: with 16 they come at the memory's rate.
_FIRST = 5.5e-6
_RATES = {16: 2.89e12, 32: 2.48e12, 64: 2.02e12}
# Bytes of scores a second as in `predicted`, and the least time of a second kernel there, 4.3 us, with 2.8 more.
_FEW, _MANY, _MERGED = 5.0e12, 2.0e12, 2.2e12
_SECOND = 7.1e-6
# A graph of the kernels of 0.3.0 took so much longer than its two kernels, within 7 % in the four cells of KERNELS.
_GRAPH, _SHARE = 2.1e-6, 1.07


class Measured(NamedTuple):
    """Microseconds in a graph on one H100 on 2026-11-28: the cuda backend, and the Triton kernels of 0.3.0."""

    cuda: float
    triton: float


_7B, _3B, _LLAVA = "qwen2.5-vl-7b", "qwen2.5-vl-3b", "llava-1.5-7b"
# Microseconds of both kernels of 0.3.0 by Nsight Compute.
KERNELS = {
    Case(_7B, 4096, 1, "bf16"): (14.2, 25.4),
    Case(_7B, 32768, 1, "bf16"): (75.1, 109.5),
    Case(_7B, 4096, 4, "bf16"): (15.7, 35.5),
    Case(_7B, 4096, 8, "bf16"): (18.0, 46.8),
}
H100 = {
    Case(_7B, 4096, 1, "bf16"): Measured(21.1, 41.7),
    Case(_7B, 1024, 1, "bf16"): Measured(14.1, 23.4),
    Case(_7B, 16384, 1, "bf16"): Measured(49.2, 106.5),
    Case(_7B, 32768, 1, "bf16"): Measured(85.8, 198.0),
    Case(_LLAVA, 1024, 1, "bf16"): Measured(30.5, 85.6),
    Case(_LLAVA, 4096, 1, "bf16"): Measured(79.6, 214.8),
    Case(_LLAVA, 16384, 1, "bf16"): Measured(277.0, 661.2),
    Case(_3B, 4096, 1, "bf16"): Measured(17.2, 30.9),
    Case(_7B, 4096, 2, "bf16"): Measured(23.6, 42.3),
    Case(_7B, 4096, 4, "bf16"): Measured(27.0, 56.5),
    Case(_7B, 4096, 8, "bf16"): Measured(35.7, 74.9),
    Case(_7B, 4096, 32, "bf16"): Measured(83.6, 220.0),
    Case(_7B, 32768, 8, "bf16"): Measured(222.6, 421.7),
}


def first_kernel(lanes: int, tiles: int, keys: float, scores: float) -> float:
    """Predicted seconds of the first kernel for the bytes of K and of stored scores.

    With more lanes than 16 arithmetic and stores overlap: the longer of both counts.
    """
    if lanes == min(_RATES):
        return _FIRST + tiles * keys / _RATES[lanes] + scores / _FEW
    return _FIRST + max(tiles * keys / _RATES[lanes], keys / _RATES[min(_RATES)] + scores / _MANY)


def seconds(case: Case, layers: int = LAYERS) -> float:
    """Predicted seconds on an H100 in a graph."""
    heads, key_heads, size = GEOMETRIES[case.geometry]
    tokens = int(VISUAL_SHARE * case.length)
    element_bytes = DTYPES[case.dtype].itemsize
    grid = plan(layers, 1, heads, key_heads, case.rows, case.length, size, element_bytes)
    total = 0.0
    for layer in range(0, layers, grid.layers):
        some = min(grid.layers, layers - layer)
        for row in range(0, case.rows, grid.rows):
            rows = min(grid.rows, case.rows - row)
            scores = 4.0 * some * heads * rows * tokens
            tiles = ceiling(rows, grid.block_row) * grid.group_tiles
            total += first_kernel(grid.block_row * grid.block_group, tiles, key_bytes(case, some), scores)
            total += _SECOND + scores / _MERGED
    return in_graph(total)


def in_graph(kernels: float) -> float:
    """Seconds of a graph from the sum of those of its kernels."""
    return _GRAPH + _SHARE * kernels
