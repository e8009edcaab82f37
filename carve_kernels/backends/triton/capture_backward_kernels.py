"""The kernels of the gradients of a capture: of tokens summed at their keys, then of the keys, then of the query.

All read the scores of `capture_scores_kernel`; `line_ptr` has for each head and row the maximum and the factor that
make a probability of a score, and the sum of probability times its gradient, as [3, B, A, R].
"""

# Triton's tensors have no types that mypy knows.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from carve_kernels.backends.triton import capture_parts as parts
from carve_kernels.backends.triton.launch import Kernel


@Kernel
def capture_given_kernel(
    given_ptr, tokens_ptr, sums_ptr,
    stride_tokens_b: tl.int64, stride_tokens_n: tl.int64,
    lines: tl.int32, tokens: tl.int32, keys: tl.int32, padded: tl.int32,
    BLOCK_TOKEN: tl.constexpr,
):  # fmt: skip
    """Add the gradients [lines, N] of each line of a batch at the keys of their tokens, into zeros [lines, padded].

    One program has a line, and its blocks follow each other: a token that is listed twice is added in a fixed order.
    """
    line = tl.program_id(0).to(tl.int64)
    b = line // lines
    given_ptr += line * tokens
    sums_ptr += line * padded
    for first in tl.range(0, tokens, BLOCK_TOKEN, num_stages=1):
        slot = (first + tl.arange(0, BLOCK_TOKEN)).to(tl.int64)
        token = tl.load(tokens_ptr + b * stride_tokens_b + slot * stride_tokens_n, mask=slot < tokens, other=-1)
        used = (token >= 0) & (token < keys)
        given = tl.load(given_ptr + slot, mask=used, other=0.0)
        # All slots of one key hold the sum of its slots, and store the same.
        merged = tl.sum(tl.where(token[:, None] == token[None, :], given[None, :], 0.0), 1)
        before = tl.load(sums_ptr + token, mask=used, other=0.0)
        tl.debug_barrier()
        tl.store(sums_ptr + token, before + merged, mask=used)
        tl.debug_barrier()


@triton.jit
def products(
    scratch_ptr, sums_ptr, line_ptr, at, sums_at, of_line, lines, column, seen, factor, scale, KIND: tl.constexpr,
):  # fmt: skip
    """The gradients [M, N] of the products of some lanes and columns, 0 where a lane does not see a column."""
    score = tl.load(scratch_ptr + at[:, None] + column[None, :], mask=seen, other=float("-inf"))
    given = tl.load(sums_ptr + sums_at[:, None] + column[None, :], mask=seen, other=0.0)
    top, share = tl.load(line_ptr + of_line), tl.load(line_ptr + lines + of_line)
    total = tl.load(line_ptr + 2 * lines + of_line)
    probability = tl.exp2(tl.fma(score, factor, -top[:, None])) * share[:, None]
    gradient = probability * (given - total[:, None]) * scale
    if KIND == parts.SOFTCAP:
        # The score of a hidden key is -inf.
        capped = tl.where(probability == 0, 0.0, score)
        gradient *= 1.0 - capped * capped
    return gradient


@Kernel
def capture_key_gradient_kernel(
    query_ptr, positions_ptr, scratch_ptr, sums_ptr, line_ptr, to_key_ptr,
    stride_query_b: tl.int64, stride_query_a: tl.int64, stride_query_r: tl.int64, stride_query_d: tl.int64,
    stride_positions_b: tl.int64, stride_positions_r: tl.int64,
    stride_sums_b: tl.int64, stride_sums_a: tl.int64,
    batch: tl.int32, query_heads: tl.int32, group: tl.int32, rows: tl.int32, keys: tl.int32, padded: tl.int32,
    window: tl.int64, factor: tl.float32, scale: tl.float32,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    BLOCK_KEY: tl.constexpr, UNIT: tl.constexpr, IS_DENSE: tl.constexpr, KIND: tl.constexpr,
    HAS_WINDOW: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients [BLOCK_KEY, D] of a block of keys of a key head, from all rows and heads of its group."""
    block, key_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = block * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    query_ptr += b * parts.whole(stride_query_b, UNIT)
    row_tiles = tl.cdiv(rows, BLOCK_ROW)
    result = tl.zeros([BLOCK_KEY, BLOCK_SIZE], tl.float32)
    for tile in tl.range(0, row_tiles * tl.cdiv(group, BLOCK_GROUP), num_stages=1):
        row, member, live = parts.lanes(tile % row_tiles, tile // row_tiles, rows, group, BLOCK_ROW, BLOCK_GROUP)
        head = key_head * group + member
        after, last = parts.range_of_rows(
            positions_ptr, b * stride_positions_b + row * stride_positions_r, live, keys, window, HAS_WINDOW
        )
        line = tl.where(live, (b * query_heads + head) * rows + row, 0)
        seen = parts.visible(None, line, 0, live, column, keys, after, last, HAS_WINDOW) & live[:, None]
        sums_at = tl.where(live, b * stride_sums_b + head * stride_sums_a + row * padded, 0)
        lines = batch.to(tl.int64) * query_heads * rows
        gradient = products(
            scratch_ptr, sums_ptr, line_ptr, line * padded, sums_at, line, lines, column, seen, factor, scale, KIND
        )
        query = parts.load_query(
            query_ptr, stride_query_a, stride_query_r, stride_query_d, head, row, live, HEAD_SIZE, BLOCK_SIZE, UNIT,
            IS_DENSE,
        )  # fmt: skip
        result = tl.dot(tl.trans(gradient), query.to(tl.float32), result, input_precision=PRECISION)
    dim = tl.arange(0, BLOCK_SIZE)
    key_heads = query_heads // group
    at = (((b * key_heads + key_head) * keys + column) * HEAD_SIZE)[:, None] + dim[None, :]
    there = (column < keys)[:, None] & (dim < HEAD_SIZE)[None, :]
    if ADDS:
        result += tl.load(to_key_ptr + at, mask=there, other=0.0)
    tl.store(to_key_ptr + at, result, mask=there)


@Kernel
def capture_query_gradient_kernel(
    key_ptr, positions_ptr, scratch_ptr, sums_ptr, line_ptr, partial_ptr,
    stride_key_b: tl.int64, stride_key_k: tl.int64, stride_key_s: tl.int64, stride_key_d: tl.int64,
    stride_positions_b: tl.int64, stride_positions_r: tl.int64,
    stride_sums_b: tl.int64, stride_sums_a: tl.int64,
    batch: tl.int32, query_heads: tl.int32, group: tl.int32, rows: tl.int32, keys: tl.int32, padded: tl.int32,
    span: tl.int32, window: tl.int64, factor: tl.float32, scale: tl.float32,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    BLOCK_KEY: tl.constexpr, UNIT: tl.constexpr, IS_DENSE: tl.constexpr, KIND: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HIDES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part [splits, B, A, R, D] of a split of the keys in the gradients of a tile of rows and heads."""
    row_tiles = tl.cdiv(rows, BLOCK_ROW)
    tiles = row_tiles * tl.cdiv(group, BLOCK_GROUP)
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    key_head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, member, live = parts.lanes(tile % row_tiles, tile // row_tiles, rows, group, BLOCK_ROW, BLOCK_GROUP)
    head = key_head * group + member
    after, last = parts.range_of_rows(
        positions_ptr, b * stride_positions_b + row * stride_positions_r, live, keys, window, HAS_WINDOW
    )
    line = tl.where(live, (b * query_heads + head) * rows + row, 0)
    sums_at = tl.where(live, b * stride_sums_b + head * stride_sums_a + row * padded, 0)
    lines = batch.to(tl.int64) * query_heads * rows
    key_ptr += b * parts.whole(stride_key_b, UNIT) + key_head * parts.whole(stride_key_k, UNIT)
    start = split * parts.whole(span, parts.SPLIT_UNIT)
    stop = tl.minimum(start + span, keys)
    result = tl.zeros([BLOCK_ROW * BLOCK_GROUP, BLOCK_SIZE], tl.float32)
    for first in tl.range(start, stop, BLOCK_KEY, num_stages=1):
        column = first + tl.arange(0, BLOCK_KEY)
        seen = parts.visible(None, line, 0, live, column, keys, after, last, HAS_WINDOW)
        seen &= live[:, None] & (column < stop)[None, :]
        gradient = products(
            scratch_ptr, sums_ptr, line_ptr, line * padded, sums_at, line, lines, column, seen, factor, scale, KIND
        )
        key = parts.load_key(
            key_ptr, stride_key_s, stride_key_d, tl.minimum(column, stop - 1), HEAD_SIZE, BLOCK_SIZE, UNIT, IS_DENSE
        ).to(tl.float32)
        if HIDES:
            # A key that no row sees may hold NaN, which times 0 would be NaN.
            is_read = tl.max((gradient != 0).to(tl.int32), 0) > 0
            key = tl.where(is_read[:, None], key, 0.0)
        result = tl.dot(gradient, key, result, input_precision=PRECISION)
    dim = tl.arange(0, BLOCK_SIZE)
    at = ((split * lines + line) * HEAD_SIZE)[:, None] + dim[None, :]
    tl.store(partial_ptr + at, result, mask=live[:, None] & (dim < HEAD_SIZE)[None, :])
