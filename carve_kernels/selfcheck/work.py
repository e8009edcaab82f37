"""What a kernel moves and computes, counted from its loop bounds, for the roofline and the tests."""

from __future__ import annotations

from typing import NamedTuple


class CaptureSizes(NamedTuple):
    """The sizes of a capture.

    ===============  =====  ==========================================
    name             dtype  meaning
    ===============  =====  ==========================================
    layers           int    layers of one call
    batch            int    B
    query_heads      int    A
    key_heads        int    KV
    rows             int    R
    keys             int    S
    size             int    D
    tokens           int    N
    element_bytes    int    bytes of an element of query and key, 2 or 4
    ===============  =====  ==========================================
    """

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
    """The work of one call on a device.

    =============  =====  ===================================================================
    name           dtype  meaning
    =============  =====  ===================================================================
    read_bytes     int    bytes that the kernels load from device memory, each load once
    written_bytes  int    bytes that they store
    operations     int    multiplications and additions of the matrix products, 2 for each pair
    launches       int    kernels that are launched
    =============  =====  ===================================================================
    """

    read_bytes: int
    written_bytes: int
    operations: int
    launches: int

    def __add__(self, other: object) -> Work:
        if not isinstance(other, Work):
            return NotImplemented
        return Work(*(mine + yours for mine, yours in zip(self, other, strict=True)))
