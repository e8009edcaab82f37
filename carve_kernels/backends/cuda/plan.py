"""How the CUDA kernels divide their work, in plain numbers: for the launchers and for the count of their work."""

from __future__ import annotations

# As in csrc/cuda/capture/capture.cuh and tile.cuh.
LAYERS_AT_ONCE = 34
MOST_ROWS = 8
MOST_SIZE = 256
_SPLIT_KEYS = 64
_MOST_SPLITS = 32

# As in csrc/cuda/regions/regions.cuh. About as many blocks as 132 multiprocessors of 2048 threads run at a time. The
# result does not depend on it.
MOST_BLOCKS = 1024

STAT = 8  # bytes of a maximum and a sum
FLOAT = 4


def scratch_bytes(
    *, layers: int, batch: int, query_heads: int, rows: int, keys: int, tokens: int, lse: bool, each: bool
) -> int:
    """The scratch between the launches: statistics of the splits, means if there is a map for each head, tickets."""
    stats = 0 if lse else layers * batch * query_heads * rows * splits(keys) * STAT
    means = layers * batch * rows * tokens * FLOAT if each else 0
    return stats + means + layers * batch * 4


def split_keys(keys: int) -> int:
    return _SPLIT_KEYS * max(1, -(-keys // (_SPLIT_KEYS * _MOST_SPLITS)))


def splits(keys: int) -> int:
    return -(-keys // split_keys(keys))
