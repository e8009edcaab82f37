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
