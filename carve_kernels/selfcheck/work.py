"""What a kernel moves and computes, counted from its loop bounds, for the roofline and the tests."""

from __future__ import annotations

from typing import NamedTuple


class CaptureSizes(NamedTuple):
    """The numbers L, B, A, KV, R, S, D and N of a capture, and the bytes of an element of query and key, 2 or 4."""

    layers: int
    batch: int
    query_heads: int
    key_heads: int
    rows: int
    keys: int
    size: int
    tokens: int
    element_bytes: int


class Work(NamedTuple):
    """The work of one call: bytes that its kernels load (each load once) and store in device memory, operations of
    the matrix products (2 for each pair, a product and a sum), and the number of kernels.
    """

    read_bytes: int
    written_bytes: int
    operations: int
    launches: int

    def __add__(self, other: object) -> Work:
        if not isinstance(other, Work):
            return NotImplemented
        return Work(*(mine + yours for mine, yours in zip(self, other, strict=True)))


def cells_of_tiles(cells: int, pixels: int, tile: int) -> int:
    """How many cells of an axis tiles of pixels read to resize it, counting a cell once for each tile."""
    count = 0
    for first in range(0, pixels, tile):
        last = min(first + tile, pixels) - 1
        # A pixel has weights for the cells whose centre is nearer than the filter's radius, both ends excluded.
        low = ((2 * first + 1) * cells - 2 * max(cells, pixels) - pixels) // (2 * pixels) + 1
        high = -(-((2 * last + 1) * cells + 2 * max(cells, pixels) - pixels) // (2 * pixels)) - 1
        count += min(high, cells - 1) - max(low, 0) + 1
    return count
