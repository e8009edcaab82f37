"""The kernels of column sums: the normaliser of each row over all keys, then the sums of each key over all rows.

A program of the first kernel holds some rows of one query head and loops over the keys; one of the second holds some
keys and loops over the rows, so that every sum has one order and nothing is written twice.
"""

# Triton's tensors have no types that mypy knows.
# mypy: disable-error-code="no-untyped-def"

import triton.language as tl

from carve_kernels.backends.triton import capture_parts as parts
from carve_kernels.backends.triton.launch import Kernel


@Kernel
def column_normaliser_kernel(
    query_ptrs, key_ptrs, mask_ptr, positions_ptr, sink_ptr, top_ptr, share_ptr,
    stride_query_b: tl.int64, stride_query_a: tl.int64, stride_query_r: tl.int64, stride_query_d: tl.int64,
    stride_key_b: tl.int64, stride_key_k: tl.int64, stride_key_s: tl.int64, stride_key_d: tl.int64,
    stride_mask_b: tl.int64, stride_mask_a: tl.int64, stride_mask_r: tl.int64, stride_mask_s: tl.int64,
    stride_positions_b: tl.int64, stride_positions_r: tl.int64, stride_sink_a: tl.int64,
    group: tl.int32, rows: tl.int32, keys: tl.int32, window: tl.int64, inner: tl.float32, factor: tl.float32,
    residual: tl.float32,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_KEY: tl.constexpr,
    ALIGN: tl.constexpr, UNIT: tl.constexpr, IS_DENSE: tl.constexpr, KIND: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """(top, share) of some rows of a query head, each [B, A, R]: a probability is 2^(factor * score - top) * share."""
    tile, a, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, _, live = parts.lanes(tile, 0, rows, 1, BLOCK_ROW, 1)
    head = row * 0 + a
    positions_at = b * stride_positions_b + row * stride_positions_r
    after, last = parts.range_of_rows(positions_ptr, positions_at, live, keys, window, HAS_WINDOW)
    start, stop = 0, tl.max(last, 0) + 1
    if HAS_WINDOW:
        start += tl.maximum(tl.min(after, 0) + 1, 0) // BLOCK_KEY * BLOCK_KEY
    key_ptr = b * parts.whole(stride_key_b, UNIT) + (a // group) * parts.whole(stride_key_k, UNIT)
    key_ptr += parts.pick(key_ptrs, 0, ALIGN)
    query = parts.load_query(
        parts.pick(query_ptrs, 0, ALIGN) + b * parts.whole(stride_query_b, UNIT), stride_query_a, stride_query_r,
        stride_query_d, head, row, live, HEAD_SIZE, BLOCK_SIZE, UNIT, IS_DENSE,
    )  # fmt: skip
    mask_at = b * stride_mask_b + head * stride_mask_a + row * stride_mask_r
    maximum = tl.full([BLOCK_ROW], parts.LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROW], tl.float32)
    for first in tl.range(start, stop, BLOCK_KEY):
        column = first + tl.arange(0, BLOCK_KEY)
        # Beyond the last key it is loaded again, which costs less than to select zeros.
        key = parts.load_key(
            key_ptr, stride_key_s, stride_key_d, tl.minimum(column, stop - 1), HEAD_SIZE, BLOCK_SIZE, UNIT, IS_DENSE
        )
        visible = parts.visible(mask_ptr, mask_at, stride_mask_s, live, column, stop, after, last, HAS_WINDOW)
        # A key that no row sees may hold NaN, so its scores are replaced and never multiplied by 0.
        score = tl.where(visible, parts.scores(query, key, inner, KIND), float("-inf"))
        higher = tl.maximum(maximum, tl.max(score, 1) * factor)
        total = total * tl.exp2(maximum - higher) + tl.sum(tl.exp2(tl.fma(score, factor, -higher[:, None])), 1)
        maximum = higher
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + a * stride_sink_a).to(tl.float32)
        higher = tl.maximum(maximum, tl.maximum(sink * parts.LOG2E, parts.LOWEST))
        total *= tl.exp2(maximum - higher)
        total += tl.where(sink == float("-inf"), 0.0, tl.exp2(parts.above(sink, higher, residual)))
        maximum = higher
    at = (b * tl.num_programs(1) + head) * rows + row
    tl.store(top_ptr + at, maximum, mask=live)
    # A row that sees no key has a total of 0 and gives zeros; a row that sees a NaN gives NaN.
    tl.store(share_ptr + at, 1.0 / tl.where(total == 0, float("inf"), total), mask=live)


@Kernel
def column_sums_kernel(
    query_ptrs, key_ptrs, mask_ptr, positions_ptr, lse_ptr, top_ptr, share_ptr, out_ptr,
    stride_query_b: tl.int64, stride_query_a: tl.int64, stride_query_r: tl.int64, stride_query_d: tl.int64,
    stride_key_b: tl.int64, stride_key_k: tl.int64, stride_key_s: tl.int64, stride_key_d: tl.int64,
    stride_mask_b: tl.int64, stride_mask_a: tl.int64, stride_mask_r: tl.int64, stride_mask_s: tl.int64,
    stride_positions_b: tl.int64, stride_positions_r: tl.int64,
    stride_lse_b: tl.int64, stride_lse_a: tl.int64, stride_lse_r: tl.int64,
    group: tl.int32, rows: tl.int32, keys: tl.int32, window: tl.int64, inner: tl.float32, factor: tl.float32,
    residual: tl.float32,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_KEY: tl.constexpr,
    BLOCK_SCAN: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr, IS_DENSE: tl.constexpr, KIND: tl.constexpr,
    HAS_WINDOW: tl.constexpr, KEEPS_KEY: tl.constexpr,
):  # fmt: skip
    """The sums [B, A, S] of some keys over the rows from the first to the last one that sees any of them."""
    tile, a, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tile * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    lowest, highest = tile * BLOCK_KEY, tl.minimum((tile + 1) * BLOCK_KEY, keys) - 1
    start, stop = 0, rows
    if positions_ptr is not None:
        start, stop = rows, 0
        for first in tl.range(0, rows, BLOCK_SCAN, num_stages=1):
            row, _, live = parts.lanes(first // BLOCK_SCAN, 0, rows, 1, BLOCK_SCAN, 1)
            positions_at = b * stride_positions_b + row * stride_positions_r
            after, last = parts.range_of_rows(positions_ptr, positions_at, live, keys, window, HAS_WINDOW)
            sees = live & (last >= lowest) & (after < highest)
            start = tl.minimum(start, tl.min(tl.where(sees, row, rows), 0).to(tl.int32))
            stop = tl.maximum(stop, tl.max(tl.where(sees, row + 1, 0), 0).to(tl.int32))
    key_ptr = b * parts.whole(stride_key_b, UNIT) + (a // group) * parts.whole(stride_key_k, UNIT)
    key_ptr += parts.pick(key_ptrs, 0, ALIGN)
    if KEEPS_KEY:
        key = parts.load_key(
            key_ptr, stride_key_s, stride_key_d, tl.minimum(column, keys - 1), HEAD_SIZE, BLOCK_SIZE, UNIT, IS_DENSE
        )
    query_ptr = parts.pick(query_ptrs, 0, ALIGN) + b * parts.whole(stride_query_b, UNIT)
    # Added up for each lane, and over the lanes once: a sum over the lanes of every tile would cross the warps.
    sums = tl.zeros([BLOCK_ROW, BLOCK_KEY], tl.float32)
    for tile_of_rows in tl.range(start // BLOCK_ROW, tl.cdiv(stop, BLOCK_ROW)):
        if not KEEPS_KEY:
            # The bound is always the last key; as the compiler cannot tell, it does not move the load out of the loop,
            # where the keys, which no matrix unit reads from shared memory, would need more registers than there are.
            bound = tl.where(tile_of_rows < 0, 0, keys - 1)
            key = parts.load_key(
                key_ptr, stride_key_s, stride_key_d, tl.minimum(column, bound), HEAD_SIZE, BLOCK_SIZE, UNIT, IS_DENSE
            )
        row, _, live = parts.lanes(tile_of_rows, 0, rows, 1, BLOCK_ROW, 1)
        head = row * 0 + a
        query = parts.load_query(
            query_ptr, stride_query_a, stride_query_r, stride_query_d, head, row, live, HEAD_SIZE, BLOCK_SIZE, UNIT,
            IS_DENSE,
        )  # fmt: skip
        if lse_ptr is not None:
            lse_at = b * stride_lse_b + head * stride_lse_a + row * stride_lse_r
            top, share = parts.known_normaliser(lse_ptr, lse_at, live, residual)
        else:
            at = (b * tl.num_programs(1) + head) * rows + row
            top = tl.load(top_ptr + at, mask=live, other=0.0)
            share = tl.load(share_ptr + at, mask=live, other=0.0)
        positions_at = b * stride_positions_b + row * stride_positions_r
        after, last = parts.range_of_rows(positions_ptr, positions_at, live, keys, window, HAS_WINDOW)
        mask_at = b * stride_mask_b + head * stride_mask_a + row * stride_mask_r
        seen = parts.visible(mask_ptr, mask_at, stride_mask_s, live, column, keys, after, last, HAS_WINDOW)
        seen &= live[:, None]
        # A key that the row does not see may hold NaN, and so may the log-sum-exp of a row that sees none.
        score = tl.where(seen, parts.scores(query, key, inner, KIND), float("-inf"))
        probability = tl.exp2(tl.fma(score, factor, -top[:, None])) * share[:, None]
        sums += tl.where(seen, probability, 0.0)
    out_at = (b * tl.num_programs(1) + a) * keys + column
    tl.store(out_ptr + out_at, tl.sum(sums, 0), mask=column < keys)
