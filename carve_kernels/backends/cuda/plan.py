"""What the CUDA kernels need and how they divide their work, in plain numbers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from carve_kernels.backends import cuda
from carve_kernels.backends.native.scratch import ScratchNeeds

# As in csrc/cuda/capture.
MOST_SIZE = 256

# As in csrc/cuda/regions/regions.cuh. About as many blocks as 132 multiprocessors of 2048 threads run at a time. The
# result does not depend on it.
MOST_BLOCKS = 1024

# As in csrc/cuda/contrast/contrast.cuh: maps in flight in a thread, and the chunks that they are divided into.
MAPS_AT_ONCE = 8
FEW_CHUNKS, MOST_CHUNKS = 8, 32
MOST_MAPS = MOST_CHUNKS * 4096


class CapturePlan(NamedTuple):
    """How a call of the operator `capture_layers` is divided into launches; csrc/cuda/capture/plan.h describes each."""

    scratch_bytes: int
    tickets: int
    is_plain: bool
    is_reread: bool
    layers: int
    rows: int
    query_blocks: int
    split_keys: int
    splits: int
    token_chunks: int
    token_blocks: int


class AttentionPlan(NamedTuple):
    """How a call of the operator `attend_layer` is divided; csrc/cuda/attention/plan.h describes each."""

    scratch_bytes: int
    tickets: int
    split_keys: int
    splits: int
    token_chunks: int
    token_blocks: int


def capture_plan(
    *,
    layers: int,
    batch: int,
    query_heads: int,
    key_heads: int,
    rows: int,
    keys: int,
    size: int,
    tokens: int,
    element_bytes: int,
    lse: bool = False,
    aligned: bool = True,
) -> CapturePlan:
    """The plan of one call.

    `lse`: the log-sum-exp is given. `aligned`: every key starts at a multiple of 16 bytes and is whole vectors of them.
    """
    sizes = (layers, batch, query_heads, key_heads, rows, keys, size, tokens, element_bytes, lse, aligned)
    return _ask(cuda.operators, sizes)


def scratch_needs(**sizes: Any) -> ScratchNeeds:
    """The scratch and the tickets of one call with the arguments of `capture_plan`, also for maps of each head."""
    plan = capture_plan(**sizes)
    return ScratchNeeds(plan.scratch_bytes, plan.tickets)


def most_scratch(*sizes: int, lse: bool) -> ScratchNeeds:
    """What `scratch_needs` asks for at most, whether keys are aligned or not; the sizes are those up to `lse`."""
    aligned, other = (_ask(cuda.operators, (*sizes, lse, one)) for one in (True, False))
    return ScratchNeeds(max(aligned.scratch_bytes, other.scratch_bytes), max(aligned.tickets, other.tickets))


# Most calls of a process have the sizes of an earlier one.
@functools.lru_cache(maxsize=1024)
def _ask(operators: torch._ops._OpNamespace, sizes: tuple[int, ...]) -> CapturePlan:
    out = torch.empty(len(CapturePlan._fields), dtype=torch.int64, device="cpu")
    operators.capture_plan_cuda.default([int(one) for one in sizes], out)
    numbers = out.tolist()
    plan = CapturePlan._make(numbers)
    return plan._replace(is_plain=bool(plan.is_plain), is_reread=bool(plan.is_reread))


def attention_plan(
    *, batch: int, query_heads: int, key_heads: int, keys: int, size: int, value_size: int, tokens: int
) -> AttentionPlan:
    """The plan of one call; a call with fewer keys or tokens never needs more scratch."""
    return _ask_attention(cuda.operators, (batch, query_heads, key_heads, keys, size, value_size, tokens))


@functools.lru_cache(maxsize=1024)
def _ask_attention(operators: torch._ops._OpNamespace, sizes: tuple[int, ...]) -> AttentionPlan:
    out = torch.empty(len(AttentionPlan._fields), dtype=torch.int64, device="cpu")
    operators.attention_plan_cuda.default([int(one) for one in sizes], out)
    return AttentionPlan._make(out.tolist())


def contrast_chunks(maps: int) -> int:
    """The chunks of the maps (layers times steps) of a contrast; each leaves a value for every token."""
    return min(max(min(maps, FEW_CHUNKS), -(-maps // MAPS_AT_ONCE)), MOST_CHUNKS)


def contrast_scratch(maps: int, tokens: int) -> int:
    """The bytes of the scratch of the operator `contrast_cuda`."""
    return contrast_chunks(maps) * tokens * torch.float32.itemsize
