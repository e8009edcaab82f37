"""What both kernels of capture are made of: lanes, loads, logits, and who sees whom."""

# Triton's tensors have no types that mypy knows.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from carve_kernels.backends.triton import capture_plan

PARTS = tl.constexpr(capture_plan.PARTS)
MOST_SPLITS = tl.constexpr(capture_plan.MOST_SPLITS)
# Blocks of tokens that are added up at a time.
BLOCK_PART = tl.constexpr(32)


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
    """The row and the head within its group of each lane of a tile, and which lanes there are."""
    lane = tl.arange(0, BLOCK_ROW * BLOCK_GROUP)
    row = row_tile * BLOCK_ROW + lane // BLOCK_GROUP
    member = group_tile * BLOCK_GROUP + lane % BLOCK_GROUP
    return row.to(tl.int64), member.to(tl.int64), (row < rows) & (member < group)


@triton.jit
def load_query(
    query_ptr, stride_a, stride_r, stride_d, head, row, live, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr, IS_DENSE: tl.constexpr,
):  # fmt: skip
    """[M, D] of the rows and heads of the lanes, 0 where there are none."""
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
    """[N, D] of some columns of the keys of one head, 0 where there are none."""
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
    seen = there[None, :] & (column[None, :] > after[:, None]) & (column[None, :] <= last[:, None])
    if mask_ptr is not None:
        at = at[:, None] + column.to(tl.int64)[None, :] * stride_s
        seen &= tl.load(mask_ptr + at, mask=live[:, None] & there[None, :], other=0) != 0
    return seen


@triton.jit
def scores(query, key, seen, scale, cap, HAS_SOFTCAP: tl.constexpr):
    """Logits [M, N] of query [M, D] and key [N, D], -inf where they are not seen.

    With a soft cap the scale is 2 log2(e) / softcap times itself, for a tanh in base 2.
    """
    # Half precision is exact in any mode; TF32 would round the logits of float32 to three digits.
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        decay = tl.exp2(-tl.abs(logits))
        bent = cap * (1.0 - decay) / (1.0 + decay)
        logits = tl.where(logits < 0, -bent, bent)
    # Keys that nobody sees may hold NaN, so their scores are replaced and never multiplied by 0.
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def normaliser(statistics_ptr, statistics, lse_ptr, lse_at, sink_ptr, sink_at, line, splits, live):
    """(top, share) of each lane: the probability of a score is exp(score - top) * share.

    Without a log-sum-exp they come from the statistics: maxima [lines, splits], and as many sums behind them.
    """
    if lse_ptr is not None:
        known = tl.load(lse_ptr + lse_at, mask=live, other=0.0).to(tl.float32)
        total = tl.where(known == float("-inf"), 0.0, 1.0)
        top = tl.where(known == float("-inf"), 0.0, known)
    else:
        # All splits at once, so that their order is the same whoever was first.
        split = tl.arange(0, MOST_SPLITS)
        there = live[:, None] & (split < splits)[None, :]
        at = line[:, None] * splits + split[None, :]
        maximum = tl.load(statistics_ptr + at, mask=there, other=float("-inf"))
        part = tl.load(statistics_ptr + statistics + at, mask=there, other=0.0)
        top = tl.max(maximum, 1)
        if sink_ptr is not None:
            sink = tl.load(sink_ptr + sink_at, mask=live, other=0.0).to(tl.float32)
            top = tl.maximum(top, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(part * tl.exp(maximum - top[:, None]), 1)
        if sink_ptr is not None:
            total += tl.exp(sink - top)
    # A row that sees nothing has a total of 0, and gets zeros; one that sees a NaN gets NaN.
    return top, 1.0 / tl.where(total == 0, float("inf"), total)


@triton.jit
def last_of_row(part_at, ticket_ptr, mean, used, fits, block, blocks):
    """Store (mass, entropy in base 2, used tokens) of this block of tokens; whether it is the last one to do so.

    The parts of each row are [blocks, PARTS]. The last one leaves the ticket at 0, for the next call or graph replay.
    """
    mass = tl.sum(mean, 1)
    # A plain division is off by up to two units: a token that holds all would have an entropy.
    share = tl.div_rn(mean, tl.where(mass > 0, mass, 1.0)[:, None])
    spread = tl.sum(-share * tl.log2(tl.where(share > 0, share, 1.0)), 1)
    at = part_at + block * PARTS
    tl.store(at, mass, mask=fits)
    tl.store(at + 1, spread, mask=fits)
    tl.store(at + 2, tl.zeros_like(mass) + tl.sum(used.to(tl.float32), 0), mask=fits)
    # All threads' parts stand before the ticket is drawn: it releases them, and it shows those of the others.
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == blocks - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def summary(part_at, fits, blocks, BLOCK_ROW: tl.constexpr):
    """(mass, entropy) of rows from the parts [blocks, PARTS] of each.

    By the chain rule of entropy, where no term is below 0 and nothing cancels: H = sum of share * H(block) + H(shares).
    """
    part = tl.arange(0, BLOCK_PART)
    mass = tl.zeros([BLOCK_ROW, BLOCK_PART], tl.float32)
    count = tl.zeros([BLOCK_ROW, BLOCK_PART], tl.float32)
    for first in tl.range(0, blocks, BLOCK_PART, num_stages=1):
        there = fits[:, None] & (first + part < blocks)[None, :]
        at = part_at[:, None] + (first + part)[None, :] * PARTS
        mass += tl.load(at, mask=there, other=0.0)
        count += tl.load(at + 2, mask=there, other=0.0)
    total = tl.sum(mass, 1)
    used = tl.sum(count, 1)
    spread = tl.zeros([BLOCK_ROW, BLOCK_PART], tl.float32)
    for first in tl.range(0, blocks, BLOCK_PART, num_stages=1):
        there = fits[:, None] & (first + part < blocks)[None, :]
        at = part_at[:, None] + (first + part)[None, :] * PARTS
        share = tl.div_rn(tl.load(at, mask=there, other=0.0), tl.where(total > 0, total, 1.0)[:, None])
        inner = tl.load(at + 1, mask=there, other=0.0)
        spread += share * (inner - tl.log2(tl.where(share > 0, share, 1.0)))
    return total, tl.where(used > 1, tl.sum(spread, 1) / tl.log2(tl.maximum(used, 2.0)), 0.0)
