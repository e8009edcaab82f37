"""The parts of both capture kernels: lanes, loads, visibility, logits and their reduction."""

# Triton's tensors have no types that mypy knows.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from carve_kernels.backends.triton import capture_plan

PARTIALS = tl.constexpr(capture_plan.PARTIALS)
MOST_SPLITS = tl.constexpr(capture_plan.MOST_SPLITS)
# Blocks of tokens that are summed at a time.
BLOCK_PARTIAL = tl.constexpr(32)


@triton.jit
def pick(tensors, layer, ALIGN: tl.constexpr):
    """tensors[layer] by a chain of selects, which keeps the addresses in registers."""
    chosen = tensors[0]
    for index in tl.static_range(1, len(tensors)):
        chosen = tl.where(layer == index, tensors[index], chosen)
    return tl.multiple_of(chosen, ALIGN)


@triton.jit
def whole(stride, UNIT: tl.constexpr):
    """A stride that is a multiple of UNIT, which the compiler can see: a hint on an argument of a kernel is lost."""
    return tl.multiple_of(stride, UNIT) // UNIT * UNIT


@triton.jit
def lanes(row_tile, group_tile, rows, group, BLOCK_ROW: tl.constexpr, BLOCK_GROUP: tl.constexpr):
    """The row of each lane of a tile, its head within the group, and whether the lane is used."""
    lane = tl.arange(0, BLOCK_ROW * BLOCK_GROUP)
    row = row_tile * BLOCK_ROW + lane // BLOCK_GROUP
    member = group_tile * BLOCK_GROUP + lane % BLOCK_GROUP
    return row.to(tl.int64), member.to(tl.int64), (row < rows) & (member < group)


@triton.jit
def load_query(
    query_ptr, stride_a, stride_r, stride_d, head, row, live, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr, IS_DENSE: tl.constexpr,
):  # fmt: skip
    """[M, D] of the rows and heads of the lanes, 0 for unused lanes."""
    dim = tl.arange(0, BLOCK_SIZE)
    at = head[:, None] * whole(stride_a, UNIT) + row[:, None] * whole(stride_r, UNIT)
    if IS_DENSE:
        at += dim[None, :]
    else:
        at += dim.to(tl.int64)[None, :] * stride_d
    return tl.load(query_ptr + at, mask=live[:, None] & (dim < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def load_key(
    key_ptr, stride_s, stride_d, column, there, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr, IS_DENSE: tl.constexpr,
):  # fmt: skip
    """[N, D] of some key columns of one head, 0 where `there` is False."""
    dim = tl.arange(0, BLOCK_SIZE)
    at = column.to(tl.int64)[:, None] * whole(stride_s, UNIT)
    if IS_DENSE:
        at += dim[None, :]
    else:
        at += dim.to(tl.int64)[None, :] * stride_d
    return tl.load(key_ptr + at, mask=there[:, None] & (dim < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def range_of_rows(positions_ptr, at, live, keys, window, HAS_WINDOW: tl.constexpr):
    """(after, last) of each lane, which sees the columns after < column <= last; both within [-1, keys]."""
    after = tl.full(live.shape, -1, tl.int64)
    last = tl.full(live.shape, 0, tl.int64) + (keys - 1)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + at, mask=live, other=-1).to(tl.int64)
        last = tl.maximum(tl.minimum(position, last), -1)
        if HAS_WINDOW:
            after = tl.where(live, tl.maximum(tl.minimum(position - window, keys), -1), keys)
    return after.to(tl.int32), last.to(tl.int32)


@triton.jit
def visible(mask_ptr, at, stride_s, live, column, there, after, last):
    """Which columns [N] each lane [M] sees, as [M, N]."""
    visible = there[None, :] & (column[None, :] > after[:, None]) & (column[None, :] <= last[:, None])
    if mask_ptr is not None:
        at = at[:, None] + column.to(tl.int64)[None, :] * stride_s
        visible &= tl.load(mask_ptr + at, mask=live[:, None] & there[None, :], other=0) != 0
    return visible


@triton.jit
def scores(query, key, visible, scale, cap, HAS_SOFTCAP: tl.constexpr):
    """Logits [M, N] of query [M, D] and key [N, D], -inf where a key is not visible.

    With a soft cap, `scale` is already multiplied by 2 log2(e) / softcap, for a tanh in base 2.
    """
    # Half precision is exact in any mode; TF32 would round the logits of float32 to three digits.
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        decay = tl.exp2(-tl.abs(logits))
        capped = cap * (1.0 - decay) / (1.0 + decay)
        logits = tl.where(logits < 0, -capped, capped)
    # A key that no row sees may hold NaN, so its scores are replaced and never multiplied by 0.
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def normaliser(statistics_ptr, statistics, lse_ptr, lse_at, sink_ptr, sink_at, line, splits, live):
    """(top, share) of each lane: the probability of a score is exp(score - top) * share.

    Without a log-sum-exp they come from the statistics: maxima [lines, splits], followed by as many sums.
    """
    if lse_ptr is not None:
        given = tl.load(lse_ptr + lse_at, mask=live, other=0.0).to(tl.float32)
        total = tl.where(given == float("-inf"), 0.0, 1.0)
        top = tl.where(given == float("-inf"), 0.0, given)
    else:
        # All splits at once, so that the order of the sum does not depend on which program was first.
        split = tl.arange(0, MOST_SPLITS)
        there = live[:, None] & (split < splits)[None, :]
        at = line[:, None] * splits + split[None, :]
        maximum = tl.load(statistics_ptr + at, mask=there, other=float("-inf"))
        partial = tl.load(statistics_ptr + statistics + at, mask=there, other=0.0)
        top = tl.max(maximum, 1)
        if sink_ptr is not None:
            sink = tl.load(sink_ptr + sink_at, mask=live, other=0.0).to(tl.float32)
            top = tl.maximum(top, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(partial * tl.exp(maximum - top[:, None]), 1)
        if sink_ptr is not None:
            total += tl.exp(sink - top)
    # A row that sees no key has a total of 0 and gives zeros; a row that sees a NaN gives NaN.
    return top, 1.0 / tl.where(total == 0, float("inf"), total)


@triton.jit
def last_of_row(partial_at, ticket_ptr, mean, used, fits, block, blocks):
    """Store (mass, entropy in base 2, used tokens) of this block of tokens; whether it is the last one to do so.

    The partials of each row are [blocks, PARTIALS]. The last block resets the ticket to 0 for the next call or replay.
    """
    mass = tl.sum(mean, 1)
    # A plain division is off by up to two units: a token with all the mass would have an entropy above 0.
    share = tl.div_rn(mean, tl.where(mass > 0, mass, 1.0)[:, None])
    spread = tl.sum(-share * tl.log2(tl.where(share > 0, share, 1.0)), 1)
    at = partial_at + block * PARTIALS
    tl.store(at, mass, mask=fits)
    tl.store(at + 1, spread, mask=fits)
    tl.store(at + 2, tl.zeros_like(mass) + tl.sum(used.to(tl.float32), 0), mask=fits)
    # All threads store before the ticket is taken: it releases their partials and acquires those of other blocks.
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == blocks - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def summary(partial_at, fits, blocks, BLOCK_ROW: tl.constexpr):
    """(mass, entropy) of rows from the partials [blocks, PARTIALS] of each.

    By the chain rule of entropy, where no term is below 0 and nothing cancels: H = sum of share * H(block) + H(shares).
    """
    offset = tl.arange(0, BLOCK_PARTIAL)
    mass = tl.zeros([BLOCK_ROW, BLOCK_PARTIAL], tl.float32)
    count = tl.zeros([BLOCK_ROW, BLOCK_PARTIAL], tl.float32)
    for first in tl.range(0, blocks, BLOCK_PARTIAL, num_stages=1):
        there = fits[:, None] & (first + offset < blocks)[None, :]
        at = partial_at[:, None] + (first + offset)[None, :] * PARTIALS
        mass += tl.load(at, mask=there, other=0.0)
        count += tl.load(at + 2, mask=there, other=0.0)
    total = tl.sum(mass, 1)
    used = tl.sum(count, 1)
    spread = tl.zeros([BLOCK_ROW, BLOCK_PARTIAL], tl.float32)
    for first in tl.range(0, blocks, BLOCK_PARTIAL, num_stages=1):
        there = fits[:, None] & (first + offset < blocks)[None, :]
        at = partial_at[:, None] + (first + offset)[None, :] * PARTIALS
        share = tl.div_rn(tl.load(at, mask=there, other=0.0), tl.where(total > 0, total, 1.0)[:, None])
        inner = tl.load(at + 1, mask=there, other=0.0)
        spread += share * (inner - tl.log2(tl.where(share > 0, share, 1.0)))
    return total, tl.where(used > 1, tl.sum(spread, 1) / tl.log2(tl.maximum(used, 2.0)), 0.0)
