"""What the CUDA kernels move and compute, from their loop bounds; tests compare it with counted loads."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from carve_kernels.backends import cuda
from carve_kernels.backends.cuda.plan import (
    MAPS_AT_ONCE,
    MOST_BLOCKS,
    CapturePlan,
    attention_plan,
    capture_plan,
    contrast_chunks,
)
from carve_kernels.backends.native import extension
from carve_kernels.backends.native.region_buffers import most_regions
from carve_kernels.checks import BackendUnavailable
from carve_kernels.selfcheck.work import CaptureSizes, Work, cells_of_tiles
from carve_kernels.types import Size

# As in csrc/cuda/capture: plan.h, tile.cuh, stream.cuh, plain.cu and reread.cuh.
_THREADS = 128
_SOME = 64
_ROWS_OF_A_TILE = 16
_PLAIN_KEYS, _PLAIN_QUERIES = 32, 8
# As in csrc/cuda/attention/plan.cpp.
_ATTENDED = 8

_FLOAT = 4
_TOKEN = 4
_STEP = 8
_STAT = 8
_PART = 16
_SPAN = 8

# As in csrc/cuda/contrast/contrast.cuh.
_CONTRAST_THREADS = 256
_TOKEN_BLOCKS = 8
_QUAD = 4
_WANTED_BLOCKS, _MOST_TILE_ROWS = 256, 16

# As in csrc/cuda/regions: regions.cuh, digits.cuh, select.cu and rank.cu.
_REGION_THREADS = 256
_WARP = 32
_STEPS = 8
_SELECT_THREADS, _SELECTED_BYTES = 512, 512 * 64
_DIGIT_BITS = {4: (13, 10, 9), 8: (13, 11, 10, 10, 10, 10)}
_LABEL_WIDTH, _LABEL_HEIGHT = 32, 64
_SORTED_REGIONS, _SORT_THREADS = 1 << 11, 512
_MERGED_RUNS = 256


def capture_work(
    *,
    lse: bool = False,
    span: int | None = None,
    seeks_span: bool = False,
    aligned: bool = True,
    **sizes: int,
) -> Work:
    """What `capture` of `CaptureSizes` moves for rows that see all keys, with int32 tokens and a given step.

    `lse`: the log-sum-exp is given. `span`: the keys from the lowest to the highest token, all keys by default;
    `seeks_span`: a launch of its own finds it. `aligned`: keys of 16 bits start at multiples of 16 bytes. The first
    kernel reads each key once, and the second the scores of the tokens or, again, their keys. With scores the bytes
    are, without queries and statistics, which every block reads::

        layers * batch * (key_heads * keys * size * element_bytes + 4 * query_heads * rows * (span + tokens))

    Raises BackendUnavailable where the library is not built: it has the plan that divides the work.
    """
    given = CaptureSizes(**sizes)
    work = Work(0, 0, 0, 0)
    if not given.batch or not given.rows or not given.query_heads:
        return work
    plan = _plan(given, lse=lse, aligned=aligned)
    has_scores = given.keys > 0 and given.tokens > 0
    if seeks_span and has_scores and not plan.is_reread:
        work += Work(given.batch * given.tokens * _TOKEN, _SPAN, 0, 1)
    for layers, rows in _parts(given, plan):
        part = given._replace(layers=layers, rows=rows)
        if has_scores and plan.is_plain:
            work += _plain(part, plan, span, lse)
        elif has_scores and not lse:
            work += _stream(part, plan, span)
        work += _reread(part, plan, lse) if plan.is_reread and has_scores else _maps(part, plan, lse)
    return work


def attention_work(
    *,
    batch: int,
    query_heads: int,
    key_heads: int,
    keys: int,
    size: int,
    value_size: int,
    tokens: int,
    span: int | None = None,
    seeks_span: bool = False,
) -> Work:
    """What `attention` moves for one row of halves that sees all keys, as `capture_work` counts it.

    Each key and each value is read once, by a block for every eight heads of a key head. The bytes are, without
    queries, statistics and the outputs of the splits::

        batch * (2 * key_heads * keys * (size + value_size) + query_heads * (4 * (span + tokens) + 2 * value_size))
    """
    _check_library()
    plan = attention_plan(
        batch=batch, query_heads=query_heads, key_heads=key_heads, keys=keys, size=size, value_size=value_size,
        tokens=tokens,
    )  # fmt: skip
    work = Work(0, 0, 0, 0)
    if seeks_span and keys and tokens:
        work += Work(batch * tokens * _TOKEN, _SPAN, 0, 1)
    widest = max(size, value_size)
    tile, width = _block_keys(widest) // 4, 64 if widest <= 64 else 128 if widest <= 128 else 256
    group = query_heads // key_heads
    at_once = _ceil(group, _ceil(group, _ATTENDED))
    kept = _up(keys if span is None else min(span, keys), tile)
    read = written = pairs = 0
    for queries in (min(at_once, group - start) for start in range(0, group, at_once)):
        for start in range(0, keys, plan.split_keys):
            length = _up(min(plan.split_keys, keys - start), tile)
            read += length * 2 * (size + value_size) + queries * 2 * size + (_THREADS * _SPAN if tokens else 0)
            written += queries * (_STAT + _FLOAT * value_size)
            pairs += length * (16 + _ATTENDED)
        written += (kept if tokens else 0) * queries * _FLOAT
    work += Work(batch * key_heads * read, batch * key_heads * written, batch * key_heads * pairs * width * 2, 1)
    # Each block of tokens merges the statistics of all heads; a head's block reads those of its splits in every lane.
    splits = plan.splits
    passes = _ceil(value_size, 4 * 32)
    read = query_heads * splits * (32 * passes * _STAT + _FLOAT * value_size)
    read += plan.token_blocks * (query_heads * _STAT * splits * bool(tokens) + _THREADS // 32 * _STEP + _PART)
    read += tokens * (_TOKEN + query_heads * _FLOAT)
    written = query_heads * 2 * value_size + plan.token_blocks * _PART + tokens * _FLOAT + 2 * _FLOAT
    return work + Work(batch * read, batch * written, 0, 1)


def _plan(sizes: CaptureSizes, *, lse: bool, aligned: bool) -> CapturePlan:
    _check_library()
    return capture_plan(**sizes._asdict(), lse=lse, aligned=aligned)


def _check_library() -> None:
    reason = extension.unavailable()
    # An emulator has operators of its own.
    if reason is not None and cuda.operators is torch.ops.carve_kernels:
        raise BackendUnavailable(reason)


def _parts(sizes: CaptureSizes, plan: CapturePlan) -> Iterator[tuple[int, int]]:
    """Layers and rows of each round of launches."""
    for layer in range(0, sizes.layers, plan.layers):
        for row in range(0, sizes.rows, plan.rows):
            yield min(plan.layers, sizes.layers - layer), min(plan.rows, sizes.rows - row)


def _splits(keys: int, plan: CapturePlan) -> list[int]:
    return [min(plan.split_keys, keys - start) for start in range(0, keys, plan.split_keys)]


def _query_blocks(sizes: CaptureSizes, plan: CapturePlan) -> list[int]:
    """Queries of each block of a key head."""
    group = sizes.query_heads // sizes.key_heads
    at_once = _ceil(group * plan.rows, plan.query_blocks)
    if plan.query_blocks > 1:
        at_once = _up(at_once, 32)
    return [min(at_once, group * sizes.rows - start) for start in range(0, group * sizes.rows, at_once)]


def _stream(sizes: CaptureSizes, plan: CapturePlan, span: int | None) -> Work:
    """The first kernel on tensor cores: a warp takes a tile of keys and multiplies tiles of 16 queries."""
    tile = _block_keys(sizes.size) // 4
    vector = sizes.size * sizes.element_bytes
    kept = 0 if plan.is_reread else _up(sizes.keys if span is None else min(span, sizes.keys), tile)
    read = written = pairs = 0
    for queries in _query_blocks(sizes, plan):
        for length in _splits(sizes.keys, plan):
            read += _up(length, tile) * vector + queries * vector + (0 if plan.is_reread else _THREADS * _SPAN)
            written += queries * _STAT
            pairs += _up(length, tile) * _up(queries, 32 if queries > _SOME else 16)
        written += kept * queries * _FLOAT
    copies = sizes.layers * sizes.batch * sizes.key_heads
    width = 64 if sizes.size <= 64 else 128 if sizes.size <= 128 else 256
    return Work(copies * read, copies * written, copies * pairs * width * 2, 1)


def _plain(sizes: CaptureSizes, plan: CapturePlan, span: int | None, lse: bool) -> Work:
    """The first kernel by fused multiply-adds; with a given log-sum-exp it reads only the keys around the tokens."""
    vector = sizes.size * sizes.element_bytes
    kept = _up(sizes.keys if span is None else min(span, sizes.keys), _PLAIN_KEYS)
    read = written = pairs = 0
    for queries in _query_blocks(sizes, plan):
        for length in _splits(min(kept, sizes.keys) if lse else sizes.keys, plan):
            tiles = _ceil(length, _PLAIN_KEYS)
            read += length * vector + (tiles if queries > _PLAIN_QUERIES else 1) * queries * vector
            written += 0 if lse else queries * _STAT
            pairs += tiles * _PLAIN_KEYS * _up(queries, _PLAIN_QUERIES)
        read += len(_splits(sizes.keys, plan)) * _THREADS * _SPAN
        written += min(kept, sizes.keys) * queries * _FLOAT
    copies = sizes.layers * sizes.batch * sizes.key_heads
    return Work(copies * read, copies * written, copies * pairs * _up(sizes.size, 4) * 2, 1)


def _maps(sizes: CaptureSizes, plan: CapturePlan, lse: bool) -> Work:
    """The second kernel where there are scores."""
    has_scores = sizes.keys > 0 and sizes.tokens > 0
    of_head = _FLOAT if lse else _STAT * len(_splits(sizes.keys, plan))
    of_block = sizes.query_heads * of_head * has_scores + _THREADS // 32 * _STEP + _PART
    read = plan.token_blocks * of_block + sizes.tokens * (_TOKEN + sizes.query_heads * _FLOAT * has_scores)
    written = plan.token_blocks * _PART + sizes.tokens * _FLOAT + 2 * _FLOAT
    copies = sizes.layers * sizes.batch * sizes.rows
    return Work(copies * read, copies * written, 0, 1)


def _reread(sizes: CaptureSizes, plan: CapturePlan, lse: bool) -> Work:
    """The second kernel where there are none: a block takes up to 16 rows of some tokens with all heads."""
    vector = sizes.size * sizes.element_bytes
    of_query = vector + (_FLOAT if lse else _STAT * len(_splits(sizes.keys, plan)))
    tokens = plan.token_blocks * _block_keys(sizes.size)
    read = written = pairs = 0
    for start in range(0, sizes.rows, _ROWS_OF_A_TILE):
        rows = min(_ROWS_OF_A_TILE, sizes.rows - start)
        read += tokens * sizes.key_heads * vector + sizes.tokens * _TOKEN
        read += plan.token_blocks * (sizes.query_heads * rows * of_query + rows * _PART + _THREADS // 32 * _STEP)
        written += rows * (plan.token_blocks * _PART + sizes.tokens * _FLOAT + 2 * _FLOAT)
        padded = min(_ROWS_OF_A_TILE, 1 << (sizes.rows - 1).bit_length())
        pairs += tokens * sizes.key_heads * _up(sizes.query_heads // sizes.key_heads * padded, _ROWS_OF_A_TILE)
    copies = sizes.layers * sizes.batch
    width = 64 if sizes.size <= 64 else 128 if sizes.size <= 128 else 256
    return Work(copies * read, copies * written, copies * pairs * width * 2, 1)


def _block_keys(size: int) -> int:
    """Keys that a block of four warps takes at a time on tensor cores."""
    return 128 if size <= 128 else 64


def _ceil(value: int, by: int) -> int:
    return -(-value // by)


def _up(value: int, unit: int) -> int:
    return _ceil(value, unit) * unit


def contrast_work(
    *,
    layers: int,
    steps: int,
    grid: Size,
    size: Size,
    general_steps: int | None = None,
    lam: float | str = "mean",
    normalize: str = "none",
) -> Work:
    """What `contrast` moves for one view of up to a few thousand tokens in a row.

    The first kernel reads every map once, and a general map once more for each block of tokens where its mean is added;
    the second reads the chunks of the cells of each row of pixels. `general_steps` changes what comes from memory, not
    what is loaded.
    """
    del general_steps
    maps, tokens, (height, width) = layers * steps, grid[0] * grid[1], size
    chunks = contrast_chunks(maps)
    of_chunk = _ceil(maps, chunks)
    chunks = _ceil(maps, of_chunk)
    blocks = _ceil(tokens, _CONTRAST_THREADS)
    if lam == "mean":
        blocks = _ceil(blocks, _ceil(blocks, _TOKEN_BLOCKS))
    read = 2 * maps * tokens * _FLOAT + blocks * maps * 2 * _STEP
    read += blocks * maps * tokens * _FLOAT if lam == "mean" else 0
    # The values of the padded maps of a chunk are not loaded, but divided.
    divided = chunks * _up(of_chunk, MAPS_AT_ONCE) * tokens

    quads = _ceil(width, _QUAD)
    across = _ceil(quads, _CONTRAST_THREADS)
    quads = _ceil(quads, across)
    at_once = _CONTRAST_THREADS // quads
    wanted = _WANTED_BLOCKS // (1 if normalize == "none" else 2)
    rows = min(max(_ceil(min(height * across // wanted, _MOST_TILE_ROWS), at_once), 1) * at_once, height)
    taps = _up(_ceil(2 * max(grid[0], height), height), 2)
    cells = height * taps * cells_of_tiles(grid[1], width, _QUAD * quads)
    read += chunks * cells * _FLOAT
    if normalize != "none":
        read += across * _ceil(height, rows) * chunks * tokens * _FLOAT
    operations = 2 * (divided + chunks * cells + 2 * height * width)
    return Work(read, chunks * tokens * _FLOAT + height * width * _FLOAT, operations, 2)


def regions_work(*, height: int, width: int, element_bytes: int = 4, keep: float = 0.4, connectivity: int = 4) -> Work:
    """What `regions` moves for a smooth saliency, with few regions of long runs in the share `keep` of its pixels.

    Equals, without the counts of the selection, which every block reads, and other small terms::

        read_bytes = height * width * ((passes + 1 + keep) * element_bytes + 4 + 12 * keep)
    """
    pixels = height * width
    counters = [4 << bits for bits in _DIGIT_BITS[element_bytes]]
    passes = len(counters)
    most = most_regions((height, width), connectivity)
    merges, runs = 0, 1
    while runs < -(-most // _SORTED_REGIONS):
        merges, runs = merges + 1, runs * _MERGED_RUNS
    across, down = -(-width // _LABEL_WIDTH), -(-height // _LABEL_HEIGHT)
    edges = (across - 1) * height + (down - 1) * width
    blocks = _blocks(pixels, _REGION_THREADS * _STEPS)
    # The selection reads the saliency once in each pass, labelling once and the pixels above the threshold again; the
    # mask reads the label of each pixel and, above the threshold, its region and the score of that.
    read = (passes + 1 + keep) * pixels * element_bytes + pixels * 4 + keep * pixels * 12
    # Each block finds the digits again: from the second pass on, and for the threshold together with the range.
    select_blocks = _blocks(pixels * element_bytes, _SELECTED_BYTES)
    read += select_blocks * (sum(counters[:-1]) + (passes - 1) * _SELECT_THREADS * 12)
    read += _blocks(across * down, 1) * (counters[-1] + _REGION_THREADS * 36)
    # On both sides of an edge between tiles, a pixel and the one before it.
    read += edges * 16 + _blocks(edges, _REGION_THREADS) * _REGION_THREADS // _WARP * 4
    # These are launched for the most regions possible: each warp reads whether there are regions, each thread how many.
    of_regions = _blocks(most, _REGION_THREADS) * _REGION_THREADS
    of_regions += merges * _blocks(most, _REGION_THREADS, -(-MOST_BLOCKS // 3)) * _REGION_THREADS
    of_regions += _blocks(most, _SORTED_REGIONS) * _SORT_THREADS
    read += of_regions * 4 + of_regions // _WARP * 4
    # And for the mask, what the last kept region is.
    read += blocks * _REGION_THREADS * 16 + blocks * _REGION_THREADS // _WARP * 4
    written = sum(4 << bits for bits in _DIGIT_BITS[8]) + 4 * pixels + pixels
    return Work(round(read), round(written), 0, 1 + passes + 4 + merges + 1)


def _blocks(elements: int, of_a_block: int, most: int = MOST_BLOCKS) -> int:
    return max(1, min(-(-elements // of_a_block), most))
