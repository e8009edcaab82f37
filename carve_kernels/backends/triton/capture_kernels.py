"""The two kernels of capture: statistics of all keys by split, then probabilities of the visual tokens.

One program holds a tile of rows times query heads of one key head, so that a key is loaded once for all of them. The
layer is the last axis of the grid, and its tensors are chosen from tuples.
"""

# Triton's tensors have no types that mypy knows.
# mypy: disable-error-code="no-untyped-def"

import triton.language as tl

from carve_kernels.backends.triton import capture_parts as parts
from carve_kernels.backends.triton.launch import Kernel


@Kernel
def capture_statistics_kernel(
    query_ptrs, key_ptrs, mask_ptr, positions_ptr, scratch_ptr,
    stride_query_b: tl.int64, stride_query_a: tl.int64, stride_query_r: tl.int64, stride_query_d: tl.int64,
    stride_key_b: tl.int64, stride_key_k: tl.int64, stride_key_s: tl.int64, stride_key_d: tl.int64,
    stride_mask_b: tl.int64, stride_mask_a: tl.int64, stride_mask_r: tl.int64, stride_mask_s: tl.int64,
    stride_positions_b: tl.int64, stride_positions_r: tl.int64,
    batch: tl.int32, query_heads: tl.int32, key_heads: tl.int32, rows: tl.int32, keys: tl.int32, splits: tl.int32,
    span: tl.int32, statistics: tl.int64, window: tl.int64, scale: tl.float32, cap: tl.float32,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    BLOCK_KEY: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr, IS_DENSE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Maximum of the logits over one split of the keys, and sum of their exp below it, as [L, B, A, R, splits]."""
    group = query_heads // key_heads
    row_tiles = tl.cdiv(rows, BLOCK_ROW)
    tiles = row_tiles * tl.cdiv(group, BLOCK_GROUP)
    # Tiles that read the same keys are neighbours, for the cache.
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    unit = (tl.program_id(0) // tiles // splits).to(tl.int64)
    key_head = unit % key_heads
    b = unit // key_heads
    layer = tl.program_id(2)
    row, member, live = parts.lanes(tile % row_tiles, tile // row_tiles, rows, group, BLOCK_ROW, BLOCK_GROUP)
    head = key_head * group + member
    query = parts.load_query(
        parts.pick(query_ptrs, layer, ALIGN) + b * parts.whole(stride_query_b, UNIT), stride_query_a, stride_query_r,
        stride_query_d, head, row, live, HEAD_SIZE, BLOCK_SIZE, UNIT, IS_DENSE,
    )  # fmt: skip
    positions_at = b * stride_positions_b + row * stride_positions_r
    after, last = parts.range_of_rows(positions_ptr, positions_at, live, keys, window, HAS_WINDOW)
    start = split * span
    stop = tl.minimum(tl.minimum(start + span, keys), tl.max(last, 0) + 1)
    if HAS_WINDOW:
        start += tl.maximum(tl.min(after, 0) + 1 - start, 0) // BLOCK_KEY * BLOCK_KEY
    key_ptr = parts.pick(key_ptrs, layer, ALIGN) + b * parts.whole(stride_key_b, UNIT)
    key_ptr += key_head * parts.whole(stride_key_k, UNIT)
    mask_at = b * stride_mask_b + head * stride_mask_a + row * stride_mask_r
    maximum = tl.full([BLOCK_ROW * BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROW * BLOCK_GROUP], tl.float32)
    for first in tl.range(start, stop, BLOCK_KEY):
        column = first + tl.arange(0, BLOCK_KEY)
        there = column < stop
        key = parts.load_key(key_ptr, stride_key_s, stride_key_d, column, there, HEAD_SIZE, BLOCK_SIZE, UNIT, IS_DENSE)
        visible = parts.visible(mask_ptr, mask_at, stride_mask_s, live, column, there, after, last)
        score = parts.scores(query, key, visible, scale, cap, HAS_SOFTCAP)
        higher = tl.maximum(maximum, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(score - base[:, None]), 1)
        maximum = higher
    line = ((layer.to(tl.int64) * batch + b) * query_heads + head) * rows + row
    tl.store(scratch_ptr + line * splits + split, maximum, mask=live)
    tl.store(scratch_ptr + statistics + line * splits + split, total, mask=live)


@Kernel
def capture_map_kernel(
    query_ptrs, key_ptrs, mask_ptr, positions_ptr, scratch_ptr, lse_ptr, sink_ptrs, tokens_ptr, step_ptr, ticket_ptr,
    map_ptr, mass_ptr, entropy_ptr,
    stride_query_b: tl.int64, stride_query_a: tl.int64, stride_query_r: tl.int64, stride_query_d: tl.int64,
    stride_key_b: tl.int64, stride_key_k: tl.int64, stride_key_s: tl.int64, stride_key_d: tl.int64,
    stride_mask_b: tl.int64, stride_mask_a: tl.int64, stride_mask_r: tl.int64, stride_mask_s: tl.int64,
    stride_positions_b: tl.int64, stride_positions_r: tl.int64, stride_tokens_b: tl.int64, stride_tokens_n: tl.int64,
    stride_lse_b: tl.int64, stride_lse_a: tl.int64, stride_lse_r: tl.int64, stride_sink_a: tl.int64,
    stride_map_t: tl.int64, stride_map_l: tl.int64, stride_map_b: tl.int64, stride_map_a: tl.int64,
    stride_map_r: tl.int64, stride_map_n: tl.int64,
    stride_mass_t: tl.int64, stride_mass_l: tl.int64, stride_mass_b: tl.int64, stride_mass_r: tl.int64,
    stride_entropy_t: tl.int64, stride_entropy_l: tl.int64, stride_entropy_b: tl.int64, stride_entropy_r: tl.int64,
    batch: tl.int32, query_heads: tl.int32, key_heads: tl.int32, rows: tl.int32, keys: tl.int32, splits: tl.int32,
    tokens: tl.int32, statistics: tl.int64, steps: tl.int64, first: tl.int64, window: tl.int64, scale: tl.float32,
    cap: tl.float32,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    BLOCK_TOKEN: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr, IS_DENSE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Maps of a block of tokens for a tile of rows; the last block of the rows adds up their mass and entropy."""
    group = query_heads // key_heads
    group_tiles = tl.cdiv(group, BLOCK_GROUP)
    row_tiles = tl.cdiv(rows, BLOCK_ROW)
    blocks = tl.maximum(tl.cdiv(tokens, BLOCK_TOKEN), 1)
    block = tl.program_id(0) % blocks
    unit = tl.program_id(0) // blocks
    b = (unit // row_tiles).to(tl.int64)
    layer = tl.program_id(2)
    query_ptr = parts.pick(query_ptrs, layer, ALIGN) + b * parts.whole(stride_query_b, UNIT)
    key_ptr = parts.pick(key_ptrs, layer, ALIGN) + b * parts.whole(stride_key_b, UNIT)
    # Not in a function: in Triton 3.6 none can return None from one branch of an `if`.
    sink_ptr = sink_ptrs if sink_ptrs is None else parts.pick(sink_ptrs, layer, 1)
    slot = (block * BLOCK_TOKEN + tl.arange(0, BLOCK_TOKEN)).to(tl.int64)
    token = tl.load(tokens_ptr + b * stride_tokens_b + slot * stride_tokens_n, mask=slot < tokens, other=-1)
    used = (token >= 0) & (token < keys)
    column = tl.where(used, token, 0).to(tl.int32)
    step = steps * 0
    if step_ptr is not None:
        step += tl.load(step_ptr)
    # A step outside the buffers is the caller's mistake, and must not write into other memory.
    rows_to_write = tl.where((step >= 0) & (step < steps), rows, 0)
    out_layer = first + layer
    map_ptr += step * stride_map_t + out_layer * stride_map_l + b * stride_map_b + slot[None, :] * stride_map_n
    mean = tl.zeros([BLOCK_ROW, BLOCK_TOKEN], tl.float32)
    for index in tl.range(0, key_heads * group_tiles):
        key_head = index // group_tiles
        row, member, live = parts.lanes(unit % row_tiles, index % group_tiles, rows, group, BLOCK_ROW, BLOCK_GROUP)
        head = key_head * group + member
        key_at = key_ptr + key_head * parts.whole(stride_key_k, UNIT)
        key = parts.load_key(key_at, stride_key_s, stride_key_d, column, used, HEAD_SIZE, BLOCK_SIZE, UNIT, IS_DENSE)
        query = parts.load_query(
            query_ptr, stride_query_a, stride_query_r, stride_query_d, head, row, live, HEAD_SIZE, BLOCK_SIZE, UNIT,
            IS_DENSE,
        )  # fmt: skip
        line = ((layer.to(tl.int64) * batch + b) * query_heads + head) * rows + row
        lse_at = b * stride_lse_b + head * stride_lse_a + row * stride_lse_r
        sink_at = head * stride_sink_a
        top, share = parts.normaliser(scratch_ptr, statistics, lse_ptr, lse_at, sink_ptr, sink_at, line, splits, live)
        positions_at = b * stride_positions_b + row * stride_positions_r
        after, last = parts.range_of_rows(positions_ptr, positions_at, live, keys, window, HAS_WINDOW)
        mask_at = b * stride_mask_b + head * stride_mask_a + row * stride_mask_r
        visible = parts.visible(mask_ptr, mask_at, stride_mask_s, live, column, used, after, last) & live[:, None]
        score = parts.scores(query, key, visible, scale, cap, HAS_SOFTCAP)
        probability = tl.where(used[None, :], tl.exp(score - top[:, None]) * share[:, None], 0.0)
        if EACH:
            at = (head * stride_map_a + row * stride_map_r)[:, None]
            tl.store(map_ptr + at, probability, mask=(live & (row < rows_to_write))[:, None] & (slot < tokens)[None, :])
        mean += tl.sum(tl.reshape(probability, [BLOCK_ROW, BLOCK_GROUP, BLOCK_TOKEN]), 1)
    mean /= query_heads
    row = (unit % row_tiles * BLOCK_ROW + tl.arange(0, BLOCK_ROW)).to(tl.int64)
    if not EACH:
        at = (row * stride_map_r)[:, None]
        tl.store(map_ptr + at, mean, mask=(row < rows_to_write)[:, None] & (slot < tokens)[None, :])
    partial_at = (
        scratch_ptr + 2 * statistics + ((layer.to(tl.int64) * batch + b) * rows + row) * (blocks * parts.PARTIALS)
    )
    ticket_ptr += layer * (batch * row_tiles) + unit
    if parts.last_of_row(partial_at, ticket_ptr, mean, used, row < rows, block, blocks):
        mass, entropy = parts.summary(partial_at, row < rows, blocks, BLOCK_ROW)
        mass_at = step * stride_mass_t + out_layer * stride_mass_l + b * stride_mass_b + row * stride_mass_r
        entropy_at = (
            step * stride_entropy_t + out_layer * stride_entropy_l + b * stride_entropy_b + row * stride_entropy_r
        )
        tl.store(mass_ptr + mass_at, mass, mask=row < rows_to_write)
        tl.store(entropy_ptr + entropy_at, entropy, mask=row < rows_to_write)
