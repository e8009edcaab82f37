"""The parts of both capture kernels: lanes, loads, visibility, logits and their reduction."""

# Triton's tensors have no types that mypy knows.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from carve_kernels.backends.triton import capture_plan, launch

PARTIALS = tl.constexpr(capture_plan.PARTIALS)
MOST_SPLITS = tl.constexpr(capture_plan.MOST_SPLITS)
LOG2E = tl.constexpr(capture_plan.LOG2E)
LOG2E_LOW = tl.constexpr(capture_plan.LOG2E_LOW)
# The maximum of no scores: finite, so that no difference of maxima is NaN.
LOWEST = tl.constexpr(-3.402823466e38)
VECTOR_BYTES = tl.constexpr(launch.VECTOR_BYTES)
# Splits are of whole units.
SPLIT_UNIT = tl.constexpr(capture_plan.SPLIT_UNIT)
# Blocks of tokens of several rows that are summed at a time.
BLOCK_PARTIAL = tl.constexpr(32)
SOFTCAP = tl.constexpr(capture_plan.SOFTCAP)
NEGATIVE = tl.constexpr(capture_plan.NEGATIVE)


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
    key_ptr, stride_s, stride_d, column, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr,
    IS_DENSE: tl.constexpr,
):  # fmt: skip
    """[N, D] of some key columns of one head."""
    dim = tl.arange(0, BLOCK_SIZE)
    at = column.to(tl.int64)[:, None] * whole(stride_s, UNIT)
    if IS_DENSE:
        at += dim[None, :]
    else:
        at += dim.to(tl.int64)[None, :] * stride_d
    if HEAD_SIZE == BLOCK_SIZE:
        return tl.load(key_ptr + at)
    return tl.load(key_ptr + at, mask=(dim < HEAD_SIZE)[None, :], other=0.0)


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
def visible(mask_ptr, at, stride_s, live, column, stop, after, last, HAS_WINDOW: tl.constexpr):
    """Which columns [N] each lane [M] sees, as [M, N]: those after < column <= last that the mask has below `stop`."""
    visible = column[None, :] <= last[:, None]
    if HAS_WINDOW:
        visible &= column[None, :] > after[:, None]
    if mask_ptr is not None:
        at = at[:, None] + column.to(tl.int64)[None, :] * stride_s
        visible &= tl.load(mask_ptr + at, mask=live[:, None] & (column < stop)[None, :], other=0) != 0
    return visible


@triton.jit
def scores(query, key, inner, KIND: tl.constexpr):
    """Scores [M, N] of query [M, D] and key [N, D]: their product, or of it the tanh in base 2 or the negative.

    A score is computed once and not rounded again: its exponent factor * score - maximum is one fma, so the digits
    that large logits lose are those that all of a row have in common.
    """
    # Half precision is exact in any mode; TF32 would round the logits of float32 to three digits.
    products = tl.dot(query, tl.trans(key), input_precision="ieee")
    if KIND == SOFTCAP:
        products *= inner
        decay = tl.exp2(-tl.abs(products))
        capped = (1.0 - decay) / (1.0 + decay)
        products = tl.where(products < 0, -capped, capped)
    if KIND == NEGATIVE:
        products = -products
    return products


@triton.jit
def above(natural, top, residual):
    """A natural logit in base 2, less a maximum of scores times their factor.

    Either may be of thousands, whose digits the product with LOG2E would lose: its low part is added, and what the
    factor lost of its own digits, the residual, is taken from the maximum.
    """
    return tl.fma(natural, LOG2E, -top) + tl.fma(natural, LOG2E_LOW, -top * residual)


@triton.jit
def normaliser(statistics_ptr, sums, sink_ptr, stride_sink, head, splits, rows, heads, residual):
    """(top, share) of each head: the probability of a score is 2^(factor * score - top) * share.

    They come from the statistics of the splits, maxima [splits, rows, heads] and as many sums: neighbouring threads
    load neighbouring heads.
    """
    # All splits at once, so that the order of the sum does not depend on which program was first.
    split = tl.arange(0, MOST_SPLITS)
    live = head < heads
    there = (split < splits)[:, None] & live[None, :]
    at = statistics_ptr + (split * (rows * heads))[:, None] + head[None, :]
    maximum = tl.load(at, mask=there, other=LOWEST, cache_modifier=".cg")
    partial = tl.load(at + sums, mask=there, other=0.0, cache_modifier=".cg")
    top = tl.max(maximum, 0)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head * stride_sink, mask=live, other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.maximum(sink * LOG2E, LOWEST))
    total = tl.sum(partial * tl.exp2(maximum - top[None, :]), 0)
    if sink_ptr is not None:
        total += tl.where(sink == float("-inf"), 0.0, tl.exp2(above(sink, top, residual)))
    # A row that sees no key has a total of 0 and gives zeros; a row that sees a NaN gives NaN.
    return top, 1.0 / tl.where(total == 0, float("inf"), total)


@triton.jit
def known_normaliser(lse_ptr, lse_at, live, residual):
    """The same where the log-sum-exp is known."""
    given = tl.load(lse_ptr + lse_at, mask=live, other=float("-inf")).to(tl.float32)
    is_empty = given == float("-inf")
    natural = tl.where(is_empty, 0.0, given)
    top = natural * LOG2E
    return top, tl.where(is_empty, 0.0, tl.exp2(-above(natural, top, residual)))


@triton.jit
def last_of_row(partial_at, ticket_ptr, mean, used, token, fits, blocks, AXIS: tl.constexpr):
    """Store (mass, entropy in base 2, used tokens) of this block of tokens; whether it is the last of `blocks`.

    The tokens, numbered by `token`, are the last axis, AXIS, of `mean` and `used`, which is 1 long in `partial_at` and
    `fits`. The partials of each row are [blocks, PARTIALS]. The last block resets the ticket to 0 for the next call or
    replay.
    """
    nothing = tl.zeros_like(mean)
    mass = tl.sum(mean, AXIS, keep_dims=True) + nothing
    # A plain division is off by up to two units: a token with all the mass would have an entropy above 0.
    share = tl.div_rn(mean, tl.where(mass > 0, mass, 1.0))
    spread = tl.sum(-share * tl.log2(tl.where(share > 0, share, 1.0)), AXIS, keep_dims=True) + nothing
    count = tl.sum(used.to(tl.float32) + nothing, AXIS, keep_dims=True) + nothing
    # By the thread of the first token, where the sums are: nothing is moved between threads.
    fits &= token == 0
    at = partial_at + token * 0
    tl.store(at, mass, mask=fits)
    tl.store(at + 1, spread, mask=fits)
    tl.store(at + 2, count, mask=fits)
    # All threads store before the ticket is taken: it releases their partials and acquires those of other blocks.
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == blocks - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def summary(partial_at, fits, blocks, AXIS: tl.constexpr, BLOCK_PARTIAL: tl.constexpr):
    """(mass, entropy) of rows from the partials [blocks, PARTIALS] of each, BLOCK_PARTIAL at a time.

    By the chain rule of entropy, where no term is below 0 and nothing cancels: H = sum of share * H(block) + H(shares).
    """
    offset = tl.arange(0, BLOCK_PARTIAL)
    mass = tl.where(fits, 0.0, 0.0) + tl.zeros([BLOCK_PARTIAL], tl.float32)
    count = mass
    for first in tl.range(0, blocks, BLOCK_PARTIAL, num_stages=1):
        there = fits & (first + offset < blocks)
        at = partial_at + (first + offset) * PARTIALS
        mass += tl.load(at, mask=there, other=0.0)
        count += tl.load(at + 2, mask=there, other=0.0)
    total = tl.sum(mass, AXIS, keep_dims=True)
    used = tl.sum(count, AXIS, keep_dims=True)
    spread = tl.zeros_like(mass)
    for first in tl.range(0, blocks, BLOCK_PARTIAL, num_stages=1):
        there = fits & (first + offset < blocks)
        at = partial_at + (first + offset) * PARTIALS
        share = tl.div_rn(tl.load(at, mask=there, other=0.0), tl.where(total > 0, total, 1.0) + tl.zeros_like(mass))
        inner = tl.load(at + 1, mask=there, other=0.0)
        spread += share * (inner - tl.log2(tl.where(share > 0, share, 1.0)))
    entropy = tl.sum(spread, AXIS, keep_dims=True) / tl.log2(tl.maximum(used, 2.0))
    return total, tl.where(used > 1, entropy, 0.0)
