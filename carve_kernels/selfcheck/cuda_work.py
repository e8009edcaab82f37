"""What the CUDA kernels move and compute, from their loop bounds; tests compare it with counted loads."""

from __future__ import annotations

from carve_kernels.backends.cuda.plan import FLOAT, LAYERS_AT_ONCE, MOST_BLOCKS, STAT, split_keys, splits
from carve_kernels.backends.native.region_buffers import most_regions
from carve_kernels.selfcheck.work import CaptureSizes, Work

# As in csrc/cuda/capture/capture.cuh and tile.cuh.
_THREADS = 256
_TILE = 32
_AT_ONCE = 4
_KEYS_OF_A_LANE = 4

# As in csrc/cuda/regions/regions.cuh and rank.cu.
_STEPS = 8
_DIGIT_BITS = 11
_TILE_REGIONS = 1 << 10
_MERGED_RUNS = 128

_TOKEN = 4
_STEP = 8


def capture_work(*, lse: bool = False, **sizes: int) -> Work:
    """What `capture` of `CaptureSizes` moves for up to 8 rows that see all keys, int32 tokens and a given step.

    With `lse` the log-sum-exp is given, and there is one launch, not two. The first launch reads each key once, and the
    second each visual token's key again::

        layers * batch * key_heads * (keys + tokens) * size * element_bytes

    The rest of `read_bytes` is queries and statistics, which every block reads again, mostly from the second-level
    cache; `roofline` counts them as memory's. With 28 heads in groups of 7, D = 128, 4096 keys of bf16 and 3276
    tokens they are 0.4 of the bytes above for one row and 3.7 for eight; with 32 heads without groups and 8192 keys
    0.1 and 0.9.
    """
    layers, batch, query_heads, key_heads, rows, keys, size, tokens, element_bytes = CaptureSizes(**sizes)
    queries = query_heads // key_heads * rows
    slots = _slots(size, element_bytes)
    vector = size * element_bytes
    counted = not lse and keys > 0 and tokens > 0
    read = written = pairs = 0
    for start in range(0, keys if counted else 0, split_keys(keys)):
        length = min(split_keys(keys), keys - start)
        passes = -(-length // slots)
        staged = passes if queries > _TILE else 1
        read += key_heads * (length * vector + staged * queries * vector + (passes - 1) * queries * STAT)
        written += key_heads * passes * queries * STAT
        pairs += key_heads * length * _padded(queries, _TILE)
    written += 4 if counted else 0

    heads_at_once = min(8, 1 << (key_heads.bit_length() - 1))
    blocks = max(1, -(-tokens // (slots // heads_at_once)))
    of_query = FLOAT if lse else STAT * splits(keys)
    read += blocks * (query_heads * rows * (vector + of_query) + _THREADS // 32 * _STEP)
    read += tokens * (_TOKEN + key_heads * vector) + rows * tokens * (2 * FLOAT + _TOKEN)
    written += rows * (tokens + 2) * FLOAT
    pairs += key_heads * tokens * _padded(queries, _TILE // heads_at_once)
    launches = -(-layers // LAYERS_AT_ONCE) * (2 if counted else 1)
    lines = layers * batch
    return Work(lines * read, lines * written, lines * pairs * size * 2, launches)


def _slots(size: int, element_bytes: int) -> int:
    """Keys that a block holds at a time, each on 8, 16 or 32 lanes: one for every 16 bytes of a key."""
    vectors = -(-size * element_bytes // 16)
    lanes = next((lanes for lanes in (8, 16) if vectors <= lanes), 32)
    return _THREADS // lanes * _KEYS_OF_A_LANE


def _padded(queries: int, tile: int) -> int:
    """Queries that are multiplied: those of each tile, padded to a multiple of four."""
    return sum(-(-min(tile, queries - start) // _AT_ONCE) * _AT_ONCE for start in range(0, queries, tile))


def regions_work(*, height: int, width: int, element_bytes: int = 4, keep: float = 0.4, connectivity: int = 4) -> Work:
    """What `regions` moves for a smooth saliency, with few regions of long runs in the share `keep` of its pixels.

    Equals, without the counts of the selection, which every block reads, and other small terms::

        read_bytes = height * width * ((passes + 1 + keep) * element_bytes + (4 + 5 * keep) * 4)
    """
    pixels = height * width
    passes = -(-8 * element_bytes // _DIGIT_BITS)
    histogram = 4 << _DIGIT_BITS
    blocks = max(1, min(-(-pixels // (_THREADS * _STEPS)), MOST_BLOCKS))
    # The selection reads the saliency once in each pass, labelling once, the sums the pixels above the threshold.
    read = (passes + 1 + keep) * pixels * element_bytes
    # Union-find reads a label, and above the threshold the left, upper and diagonal ones; numbers and sums read it
    # once; the mask follows it to the run's first pixel and to the region.
    read += ((1 + 3 * keep) + 1 + 1 + (1 + 2 * keep)) * pixels * 4
    # Each block finds the digits again: from the second pass on, and for the threshold together with the range.
    read += blocks * (passes * (histogram + _THREADS * 12) + _THREADS * 32)
    # The sums are in shares of the peak, which each thread reads from the range.
    read += blocks * _THREADS * 16
    # The sort and its merges are launched for the most regions possible, and each thread reads how many there are.
    most = most_regions(height, width, connectivity)
    merges, run = 0, _TILE_REGIONS
    while run < most:
        merges, run = merges + 1, run * _MERGED_RUNS
    read += min(-(-most // _TILE_REGIONS), MOST_BLOCKS) * _TILE_REGIONS // 2 * 4
    read += merges * min(-(-most // _THREADS), MOST_BLOCKS) * _THREADS * 4
    # In union-find, numbering and the mask each warp reads whether there are regions.
    read += 3 * pixels // 32 * 4
    written = passes * histogram + 4 * pixels + pixels
    return Work(round(read), round(written), 0, 1 + passes + 4 + 1 + merges + 2)
