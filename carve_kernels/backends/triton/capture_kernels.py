"""The kernels of capture: scores and statistics of all keys, then probabilities of the visual tokens.

A program of the first kernel holds a tile of rows times query heads of one key head, so that a key is loaded once for
all of them; one of the second has all heads of some tokens of a row. Where the log-sum-exp is known, a third kernel
alone reads the keys of the tokens. The layer is in the last axis of the grid, and its tensors are chosen from tuples.
"""

# Triton's tensors have no types that mypy knows.
# mypy: disable-error-code="no-untyped-def"

import triton.language as tl

from carve_kernels.backends.triton import capture_parts as parts
from carve_kernels.backends.triton.launch import Kernel


@Kernel
def capture_scores_kernel(
    query_ptrs, key_ptrs, mask_ptr, positions_ptr, span_ptr, scratch_ptr,
    stride_query_b: tl.int64, stride_query_a: tl.int64, stride_query_r: tl.int64, stride_query_d: tl.int64,
    stride_key_b: tl.int64, stride_key_k: tl.int64, stride_key_s: tl.int64, stride_key_d: tl.int64,
    stride_mask_b: tl.int64, stride_mask_a: tl.int64, stride_mask_r: tl.int64, stride_mask_s: tl.int64,
    stride_positions_b: tl.int64, stride_positions_r: tl.int64,
    batch: tl.int32, query_heads: tl.int32, group: tl.int32, rows: tl.int32, keys: tl.int32, splits: tl.int32,
    span: tl.int32, padded: tl.int32, sums: tl.int64, statistics: tl.int64, window: tl.int64, inner: tl.float32,
    factor: tl.float32,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    BLOCK_KEY: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr, IS_DENSE: tl.constexpr, KIND: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_TILES: tl.constexpr, HAS_BATCH: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Scores of one split of the keys as [L, B, A, R, padded]; their maximum and the sum of 2^(logit - maximum).

    The statistics are [L, B, splits, R, A], in base 2. Of the scores, those between the lowest and the highest token
    are stored.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    split, key_head, layer, b = tl.program_id(0), tl.program_id(1), tl.program_id(2), 0
    row_tile, group_tile = 0, 0
    if HAS_TILES:
        # Tiles that read the same keys are neighbours, for the cache.
        row_tiles = tl.cdiv(rows, BLOCK_ROW)
        tiles = row_tiles * tl.cdiv(group, BLOCK_GROUP)
        split, tile = split // tiles, split % tiles
        row_tile, group_tile = tile % row_tiles, tile // row_tiles
    key_ptr = key_head * parts.whole(stride_key_k, UNIT)
    if HAS_BATCH:
        layer, b = layer // batch, (layer % batch).to(tl.int64)
        key_ptr += b * parts.whole(stride_key_b, UNIT)
    key_ptr += parts.pick(key_ptrs, layer, ALIGN)
    row, member, live = parts.lanes(row_tile, group_tile, rows, group, BLOCK_ROW, BLOCK_GROUP)
    head = key_head * group + member
    positions_at = b * stride_positions_b + row * stride_positions_r
    after, last = parts.range_of_rows(positions_ptr, positions_at, live, keys, window, HAS_WINDOW)
    start = split * parts.whole(span, parts.SPLIT_UNIT)
    end = tl.minimum(start + span, padded)
    stop = tl.minimum(tl.minimum(start + span, keys), tl.max(last, 0) + 1)
    if HAS_WINDOW:
        start += tl.maximum(tl.min(after, 0) + 1 - start, 0) // BLOCK_KEY * BLOCK_KEY
    last = tl.minimum(last, stop - 1)
    query_ptr = parts.pick(query_ptrs, layer, ALIGN)
    if HAS_BATCH:
        query_ptr += b * parts.whole(stride_query_b, UNIT)
    query = parts.load_query(
        query_ptr, stride_query_a, stride_query_r, stride_query_d, head, row, live, HEAD_SIZE, BLOCK_SIZE, UNIT,
        IS_DENSE,
    )  # fmt: skip
    low = 0
    if span_ptr is not None:
        # Whole vectors.
        low = tl.load(span_ptr).to(tl.int32) // parts.SPLIT_UNIT * parts.SPLIT_UNIT
        high = tl.load(span_ptr + 1).to(tl.int32) // parts.SPLIT_UNIT * parts.SPLIT_UNIT
        end = tl.minimum(end, high + parts.SPLIT_UNIT)
    mask_at = b * stride_mask_b + head * stride_mask_a + row * stride_mask_r
    line = (tl.program_id(2).to(tl.int64) * query_heads + head) * rows + row
    # Stored by vectors; a hint on an argument of a kernel would be lost.
    score_ptr = tl.multiple_of(scratch_ptr + line * padded, parts.VECTOR_BYTES)
    maximum = tl.full([BLOCK_ROW * BLOCK_GROUP], parts.LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROW * BLOCK_GROUP], tl.float32)
    for first in tl.range(start, stop, BLOCK_KEY):
        column = first + tl.arange(0, BLOCK_KEY)
        # Beyond the last key it is loaded again, which costs less than to select zeros.
        key = parts.load_key(
            key_ptr, stride_key_s, stride_key_d, tl.minimum(column, stop - 1), HEAD_SIZE, BLOCK_SIZE, UNIT, IS_DENSE
        )
        visible = parts.visible(mask_ptr, mask_at, stride_mask_s, live, column, stop, after, last, HAS_WINDOW)
        # A key that no row sees may hold NaN, so its scores are replaced and never multiplied by 0.
        score = tl.where(visible, parts.scores(query, key, inner, KIND), float("-inf"))
        kept = (column >= low) & (column < tl.multiple_of(end, parts.SPLIT_UNIT))
        tl.store(score_ptr[:, None] + column[None, :], score, mask=live[:, None] & kept[None, :])
        higher = tl.maximum(maximum, tl.max(score, 1) * factor)
        total = total * tl.exp2(maximum - higher) + tl.sum(tl.exp2(tl.fma(score, factor, -higher[:, None])), 1)
        maximum = higher
    at = statistics + ((tl.program_id(2).to(tl.int64) * splits + split) * rows + row) * query_heads + head
    tl.store(scratch_ptr + at, maximum, mask=live)
    tl.store(scratch_ptr + sums + at, total, mask=live)


@Kernel
def capture_map_kernel(
    positions_ptr, tokens_ptr, sink_ptrs, step_ptr, scratch_ptr, ticket_ptr, map_ptr, mass_ptr, entropy_ptr,
    stride_positions_b: tl.int64, stride_positions_r: tl.int64, stride_tokens_b: tl.int64, stride_tokens_n: tl.int64,
    stride_sink_a: tl.int64,
    stride_map_t: tl.int64, stride_map_l: tl.int64, stride_map_b: tl.int64, stride_map_a: tl.int64,
    stride_map_r: tl.int64, stride_map_n: tl.int64,
    stride_mass_t: tl.int64, stride_mass_l: tl.int64, stride_mass_b: tl.int64, stride_mass_r: tl.int64,
    stride_entropy_t: tl.int64, stride_entropy_l: tl.int64, stride_entropy_b: tl.int64, stride_entropy_r: tl.int64,
    batch: tl.int32, query_heads: tl.int32, rows: tl.int32, keys: tl.int32, splits: tl.int32, tokens: tl.int32,
    padded: tl.int32, sums: tl.int64, statistics: tl.int64, partials: tl.int64, steps: tl.int64, first: tl.int64,
    window: tl.int64, factor: tl.float32, residual: tl.float32,
    BLOCK_HEAD: tl.constexpr, BLOCK_TOKEN: tl.constexpr, BLOCK_PARTIAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    EACH: tl.constexpr, HAS_BATCH: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Maps of a block of tokens of a row from stored scores; the last block of the row adds up mass and entropy."""
    block, row, layer, b = tl.program_id(0), tl.program_id(1), tl.program_id(2), 0
    unit = layer.to(tl.int64)
    if HAS_BATCH:
        layer, b = layer // batch, (layer % batch).to(tl.int64)
    slot = (block * BLOCK_TOKEN + tl.arange(0, BLOCK_TOKEN)).to(tl.int64)
    token = tl.load(tokens_ptr + b * stride_tokens_b + slot * stride_tokens_n, mask=slot < tokens, other=-1)
    used = (token >= 0) & (token < keys)
    column = tl.where(used, token, 0).to(tl.int32)
    here = tl.zeros([1], tl.int64) + row
    after, last = parts.range_of_rows(
        positions_ptr, b * stride_positions_b + here * stride_positions_r, here < rows, keys, window, HAS_WINDOW
    )
    # Keys that the row does not see have no scores where their whole tile was left out.
    seen = used & (column > after) & (column <= last)
    step = steps * 0
    if step_ptr is not None:
        step += tl.load(step_ptr)
    # A step outside the buffers is the caller's mistake, and must not write into other memory.
    written = tl.where((step >= 0) & (step < steps), tokens, 0)
    # Not in a function: in Triton 3.6 none can return None from one branch of an `if`.
    sink_ptr = sink_ptrs if sink_ptrs is None else parts.pick(sink_ptrs, layer, 1)
    map_ptr += step * stride_map_t + (first + layer) * stride_map_l + b * stride_map_b + row * stride_map_r
    map_ptr += slot * stride_map_n
    if OVERLAPS:
        # The first kernel may still run; nothing that it wrote is loaded above.
        tl.extra.cuda.gdc_wait()
    # Within a layer and a row of the batch 32 bits are enough.
    score_ptr = scratch_ptr + (unit * query_heads * rows + row) * padded
    statistics_ptr = scratch_ptr + statistics + (unit * splits * rows + row) * query_heads
    mean = tl.zeros([BLOCK_TOKEN], tl.float32)
    for start in tl.range(0, query_heads, BLOCK_HEAD, num_stages=1):
        head = start + tl.arange(0, BLOCK_HEAD)
        live = head < query_heads
        # In one dimension, whose elements all versions of Triton give to threads alike: neighbours to neighbours.
        at = tl.reshape((head * (rows * padded))[:, None] + column[None, :], [BLOCK_HEAD * BLOCK_TOKEN])
        there = tl.reshape(live[:, None] & seen[None, :], [BLOCK_HEAD * BLOCK_TOKEN])
        score = tl.load(score_ptr + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        score = tl.reshape(score, [BLOCK_HEAD, BLOCK_TOKEN])
        top, share = parts.normaliser(
            statistics_ptr, sums, sink_ptr, stride_sink_a, head, splits, rows, query_heads, residual
        )
        probability = tl.exp2(tl.fma(score, factor, -top[:, None])) * share[:, None]
        if EACH:
            to = map_ptr[None, :] + head.to(tl.int64)[:, None] * stride_map_a
            stored = tl.where(used[None, :], probability, 0.0)
            tl.store(to, stored, mask=live[:, None] & (slot < written)[None, :])
        mean += tl.sum(probability, 0)
    mean = tl.where(used, mean / query_heads, 0.0)
    if not EACH:
        tl.store(map_ptr, mean, mask=slot < written)
    # A warp's tokens are a block of their own, which needs no barrier.
    warp = tl.arange(0, BLOCK_TOKEN // BLOCK_PARTIAL)[:, None]
    blocks = tl.num_programs(0) * (BLOCK_TOKEN // BLOCK_PARTIAL)
    partial_at = scratch_ptr + partials + (unit * rows + here) * (blocks * parts.PARTIALS)
    own_at = partial_at + (block * (BLOCK_TOKEN // BLOCK_PARTIAL) + warp) * parts.PARTIALS
    mean = tl.reshape(mean, [BLOCK_TOKEN // BLOCK_PARTIAL, BLOCK_PARTIAL])
    used = tl.reshape(used, [BLOCK_TOKEN // BLOCK_PARTIAL, BLOCK_PARTIAL])
    ticket_ptr += unit * rows + row
    index = tl.arange(0, BLOCK_PARTIAL)[None, :]
    if parts.last_of_row(own_at, ticket_ptr, mean, used, index, warp >= 0, tl.num_programs(0), 1):
        mass, entropy = parts.summary(partial_at, here < rows, blocks, 0, BLOCK_TOKEN)
        mass_ptr += step * stride_mass_t + (first + layer) * stride_mass_l + b * stride_mass_b
        entropy_ptr += step * stride_entropy_t + (first + layer) * stride_entropy_l + b * stride_entropy_b
        fits = here < tl.where((step >= 0) & (step < steps), rows, 0)
        tl.store(mass_ptr + here * stride_mass_r, mass, mask=fits)
        tl.store(entropy_ptr + here * stride_entropy_r, entropy, mask=fits)


@Kernel
def capture_reread_kernel(
    query_ptrs, key_ptrs, mask_ptr, positions_ptr, scratch_ptr, lse_ptr, tokens_ptr, step_ptr, ticket_ptr,
    map_ptr, mass_ptr, entropy_ptr,
    stride_query_b: tl.int64, stride_query_a: tl.int64, stride_query_r: tl.int64, stride_query_d: tl.int64,
    stride_key_b: tl.int64, stride_key_k: tl.int64, stride_key_s: tl.int64, stride_key_d: tl.int64,
    stride_mask_b: tl.int64, stride_mask_a: tl.int64, stride_mask_r: tl.int64, stride_mask_s: tl.int64,
    stride_positions_b: tl.int64, stride_positions_r: tl.int64, stride_tokens_b: tl.int64, stride_tokens_n: tl.int64,
    stride_lse_b: tl.int64, stride_lse_a: tl.int64, stride_lse_r: tl.int64,
    stride_map_t: tl.int64, stride_map_l: tl.int64, stride_map_b: tl.int64, stride_map_a: tl.int64,
    stride_map_r: tl.int64, stride_map_n: tl.int64,
    stride_mass_t: tl.int64, stride_mass_l: tl.int64, stride_mass_b: tl.int64, stride_mass_r: tl.int64,
    stride_entropy_t: tl.int64, stride_entropy_l: tl.int64, stride_entropy_b: tl.int64, stride_entropy_r: tl.int64,
    batch: tl.int32, query_heads: tl.int32, key_heads: tl.int32, rows: tl.int32, keys: tl.int32, tokens: tl.int32,
    steps: tl.int64, first: tl.int64, window: tl.int64, inner: tl.float32, factor: tl.float32, residual: tl.float32,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    BLOCK_TOKEN: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr, IS_DENSE: tl.constexpr, KIND: tl.constexpr,
    HAS_WINDOW: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Maps of a block of tokens for a tile of rows whose log-sum-exp is known, from the keys of the tokens."""
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
        key = parts.load_key(key_at, stride_key_s, stride_key_d, column, HEAD_SIZE, BLOCK_SIZE, UNIT, IS_DENSE)
        query = parts.load_query(
            query_ptr, stride_query_a, stride_query_r, stride_query_d, head, row, live, HEAD_SIZE, BLOCK_SIZE, UNIT,
            IS_DENSE,
        )  # fmt: skip
        lse_at = b * stride_lse_b + head * stride_lse_a + row * stride_lse_r
        top, share = parts.known_normaliser(lse_ptr, lse_at, live, residual)
        positions_at = b * stride_positions_b + row * stride_positions_r
        after, last = parts.range_of_rows(positions_ptr, positions_at, live, keys, window, HAS_WINDOW)
        mask_at = b * stride_mask_b + head * stride_mask_a + row * stride_mask_r
        visible = parts.visible(mask_ptr, mask_at, stride_mask_s, live, column, keys, after, last, HAS_WINDOW)
        score = tl.where(visible & live[:, None], parts.scores(query, key, inner, KIND), float("-inf"))
        probability = tl.exp2(tl.fma(score, factor, -top[:, None])) * share[:, None]
        probability = tl.where(used[None, :], probability, 0.0)
        if EACH:
            at = (head * stride_map_a + row * stride_map_r)[:, None]
            tl.store(map_ptr + at, probability, mask=(live & (row < rows_to_write))[:, None] & (slot < tokens)[None, :])
        mean += tl.sum(tl.reshape(probability, [BLOCK_ROW, BLOCK_GROUP, BLOCK_TOKEN]), 1)
    mean /= query_heads
    row = (unit % row_tiles * BLOCK_ROW + tl.arange(0, BLOCK_ROW)).to(tl.int64)
    if not EACH:
        at = (row * stride_map_r)[:, None]
        tl.store(map_ptr + at, mean, mask=(row < rows_to_write)[:, None] & (slot < tokens)[None, :])
    partial_at = scratch_ptr + ((layer.to(tl.int64) * batch + b) * rows + row)[:, None] * (blocks * parts.PARTIALS)
    ticket_ptr += layer * (batch * row_tiles) + unit
    own_at = partial_at + block * parts.PARTIALS
    index = tl.arange(0, BLOCK_TOKEN)[None, :]
    if parts.last_of_row(own_at, ticket_ptr, mean, used[None, :], index, (row < rows)[:, None], blocks, 1):
        mass, entropy = parts.summary(partial_at, (row < rows)[:, None], blocks, 1, parts.BLOCK_PARTIAL)
        mass_ptr += step * stride_mass_t + out_layer * stride_mass_l + b * stride_mass_b
        entropy_ptr += step * stride_entropy_t + out_layer * stride_entropy_l + b * stride_entropy_b
        fits = (row < rows_to_write)[:, None]
        tl.store(mass_ptr + row[:, None] * stride_mass_r, mass, mask=fits)
        tl.store(entropy_ptr + row[:, None] * stride_entropy_r, entropy, mask=fits)
