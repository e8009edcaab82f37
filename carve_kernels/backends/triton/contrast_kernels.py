"""The two kernels of contrast: the fused token grid with its minimum, maximum and sum, then the pixels of each view."""

# Triton's tensors have no types that mypy knows.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from carve_kernels.backends.triton.launch import Kernel


@Kernel
def contrast_grid_kernel(
    task_ptr, general_ptr, weights_ptr, scratch_ptr, tickets_ptr,
    stride_task_l: tl.int64, stride_task_t: tl.int64, stride_task_n: tl.int64,
    stride_general_l: tl.int64, stride_general_t: tl.int64, stride_general_n: tl.int64,
    maps: tl.int32, steps: tl.int32, tokens: tl.int32, maps_of_chunk: tl.int32, lam: tl.float32,
    HAS_MEAN: tl.constexpr, BLOCK_TOKEN: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    block = tl.program_id(1)
    lanes = tl.arange(0, BLOCK_TOKEN)
    token = block * BLOCK_TOKEN + lanes
    real = token < tokens
    fused = tl.zeros([BLOCK_TOKEN], tl.float32)
    for one in tl.range(chunk * maps_of_chunk, tl.minimum(chunk * maps_of_chunk + maps_of_chunk, maps)):
        layer = one // steps
        step = one % steps
        general_row = general_ptr + layer * stride_general_l + step * stride_general_t
        added = lam
        if HAS_MEAN:
            total = tl.zeros([BLOCK_TOKEN], tl.float32)
            for first in tl.range(0, tokens, BLOCK_TOKEN):
                other = first + lanes
                total += tl.load(general_row + other * stride_general_n, mask=other < tokens, other=0.0)
            added = tl.sum(total, 0) / tokens
        divisor = tl.load(general_row + token * stride_general_n, mask=real, other=0.0) + added
        task_row = task_ptr + layer * stride_task_l + step * stride_task_t
        task = tl.load(task_row + token * stride_task_n, mask=real, other=0.0)
        # A divisor of 0 gives a ratio of 0, not NaN.
        ratio = tl.where(divisor > 0, task / tl.where(divisor > 0, divisor, 1.0), 0.0)
        fused += tl.load(weights_ptr + one) * ratio
    chunks = tl.num_programs(0)
    summary_ptr = scratch_ptr + tokens
    partial_ptr = summary_ptr + 3 * tl.num_programs(1) + token
    tl.store(partial_ptr + chunk.to(tl.int64) * tokens, fused, mask=real)

    # The last program of a block of tokens sums the chunks in order, so the bits do not depend on which one is last.
    # The barrier completes the stores of all threads before one of them takes the ticket.
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets_ptr + block, 1, sem="acq_rel", scope="gpu")
    if ticket == chunks - 1:
        total = tl.zeros([BLOCK_TOKEN], tl.float32)
        for other in tl.range(0, chunks):
            total += tl.load(partial_ptr + tl.cast(other, tl.int64) * tokens, mask=real, other=0.0)
        tl.store(scratch_ptr + token, total, mask=real)
        tl.store(summary_ptr + block * 3, tl.min(tl.where(real, total, float("inf")), 0))
        tl.store(summary_ptr + block * 3 + 1, tl.max(tl.where(real, total, float("-inf")), 0))
        tl.store(summary_ptr + block * 3 + 2, tl.sum(total, 0))
        # Reset for the next call or graph replay.
        tl.store(tickets_ptr + block, 0)


@triton.jit
def _pick(items, index, COUNT: tl.constexpr):
    """items[index] of a tuple of numbers that are passed as 2 n + 1."""
    chosen = items[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, items[i], chosen)
    return chosen >> 1


@triton.jit
def _sum_before(lefts, rights, index, COUNT: tl.constexpr):
    """The sum of lefts[i] * rights[i] over all i < index, of numbers that are passed as 2 n + 1."""
    total = tl.zeros([], tl.int64)
    for i in tl.static_range(COUNT):
        total += tl.where(i < index, tl.cast(lefts[i] >> 1, tl.int64) * (rights[i] >> 1), 0)
    return total


@triton.jit
def _first_tap(pixel, tokens, pixels):
    """The first token of an axis with a weight above 0 for a pixel."""
    beyond = (2 * pixel + 1) * tokens - 2 * tl.maximum(tokens, pixels) - pixels
    return tl.where(beyond < 0, 0, beyond // (2 * pixels) + 1)


@triton.jit
def _weight(token, pixel, tokens, pixels):
    """The triangle filter of a pixel at a token, as an integer: exact up to 2^24, whether the axis grows or shrinks."""
    distance = tl.abs((2 * token + 1) * pixels - (2 * pixel + 1) * tokens)
    inside = tl.maximum(2 * tl.maximum(tokens, pixels) - distance, 0)
    return tl.where(token < tokens, inside, 0).to(tl.float32)


@triton.jit
def _scale(summary_ptr, blocks, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    """What normalising subtracts, and its divisor: 0 where the result is 0 everywhere."""
    low = float("inf")
    high = float("-inf")
    total = 0.0
    for first in tl.range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        real = block < blocks
        low = tl.minimum(low, tl.min(tl.load(summary_ptr + block * 3, mask=real, other=float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.load(summary_ptr + block * 3 + 1, mask=real, other=float("-inf")), 0))
        total += tl.sum(tl.load(summary_ptr + block * 3 + 2, mask=real, other=0.0), 0)
    if NORMALIZE != "minmax":
        low = 0.0
    span = high - low
    if NORMALIZE == "sum":
        span = total
    # Minimum and maximum ignore a NaN, the sum does not.
    return low, tl.where((span > 0) & (total == total), span, 0.0)


@Kernel
def contrast_pixels_kernel(
    scratch_ptr, saliency_ptr,
    grid_rows, grid_columns, heights, widths, tokens: tl.int32, blocks: tl.int32,
    VIEWS: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(1)
    height = _pick(heights, view, VIEWS)
    width = _pick(widths, view, VIEWS)
    across = tl.cdiv(width, BLOCK_X)
    if tl.program_id(0) >= across * tl.cdiv(height, BLOCK_Y):
        return
    rows = _pick(grid_rows, view, VIEWS)
    columns = _pick(grid_columns, view, VIEWS)
    pixel_y = tl.program_id(0) // across * BLOCK_Y + tl.arange(0, BLOCK_Y)
    pixel_x = tl.program_id(0) % across * BLOCK_X + tl.arange(0, BLOCK_X)
    # Past the edge, the last pixel is repeated, so that no sum of weights is 0.
    y = tl.minimum(pixel_y, height - 1)
    x = tl.minimum(pixel_x, width - 1)
    first_y = _first_tap(y, rows, height)
    first_x = _first_tap(x, columns, width)
    # Two tokens where the axis grows, tokens / pixels on each side where it shrinks.
    taps_y = tl.cdiv(2 * tl.maximum(rows, height), height)
    taps_x = tl.cdiv(2 * tl.maximum(columns, width), width)
    low = 0.0
    if NORMALIZE != "none":
        low, span = _scale(scratch_ptr + tokens, blocks, NORMALIZE, 128)
    fused_ptr = scratch_ptr + _sum_before(grid_rows, grid_columns, view, VIEWS)
    total = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    sum_y = tl.zeros([BLOCK_Y], tl.float32)
    sum_x = tl.zeros([BLOCK_X], tl.float32)
    for tap_x in tl.range(0, taps_x):
        sum_x += _weight(first_x + tap_x, x, columns, width)
    for tap_y in tl.range(0, taps_y):
        weight_y = _weight(first_y + tap_y, y, rows, height)
        sum_y += weight_y
        for tap_x in tl.range(0, taps_x):
            weight_x = _weight(first_x + tap_x, x, columns, width)
            both = (weight_y > 0)[:, None] & (weight_x > 0)[None, :]
            at = (first_y + tap_y)[:, None] * columns + (first_x + tap_x)[None, :]
            value = tl.load(fused_ptr + at, mask=both, other=0.0) - low
            total += tl.where(both, weight_y[:, None] * weight_x[None, :] * value, 0.0)
    total = total / (sum_y[:, None] * sum_x[None, :])
    if NORMALIZE != "none":
        total = tl.where(span > 0, total / tl.where(span > 0, span, 1.0), 0.0)
    saliency_ptr += _sum_before(heights, widths, view, VIEWS)
    at = pixel_y.to(tl.int64)[:, None] * width + pixel_x[None, :]
    tl.store(saliency_ptr + at, total, mask=(pixel_y < height)[:, None] & (pixel_x < width)[None, :])
