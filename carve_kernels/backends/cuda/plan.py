"""What the CUDA kernels need and how they divide their work, in plain numbers."""

from __future__ import annotations

import functools

import torch

from carve_kernels.backends import cuda
from carve_kernels.backends.native.scratch import ScratchNeeds

# As in csrc/cuda/capture.
LAYERS_AT_ONCE = 34
MOST_SIZE = 256
_SPLIT_KEYS = 64
_MOST_SPLITS = 32
STAT = 8  # bytes of a maximum and a sum
FLOAT = 4

# As in csrc/cuda/regions/regions.cuh. About as many blocks as 132 multiprocessors of 2048 threads run at a time. The
# result does not depend on it.
MOST_BLOCKS = 1024


def scratch_needs(
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
    each: bool = False,
    aligned: bool = True,
) -> ScratchNeeds:
    """The scratch and the tickets of one call of the operator `capture_layers` on a GPU.

    `lse`: the log-sum-exp is given. `each`: each head has its maps. `aligned`: every key starts at a multiple of 16
    bytes and has whole vectors of them.
    """
    sizes = (layers, batch, query_heads, key_heads, rows, keys, size, tokens, element_bytes, lse, each, aligned)
    return _ask(cuda.operators, sizes)


def most_scratch(*sizes: int, lse: bool, each: bool) -> ScratchNeeds:
    """What `scratch_needs` asks for at most, whether keys are aligned or not; the sizes are those up to `lse`."""
    aligned, other = (_ask(cuda.operators, (*sizes, lse, each, one)) for one in (True, False))
    return ScratchNeeds(max(aligned.bytes, other.bytes), max(aligned.tickets, other.tickets))


# Most calls of a process have the sizes of an earlier one.
@functools.lru_cache(maxsize=1024)
def _ask(operators: torch._ops._OpNamespace, sizes: tuple[int, ...]) -> ScratchNeeds:
    out = torch.empty(2, dtype=torch.int64, device="cpu")
    operators.capture_scratch_cuda.default([int(one) for one in sizes], out)
    return ScratchNeeds(*out.tolist())


def split_keys(keys: int) -> int:
    return _SPLIT_KEYS * max(1, -(-keys // (_SPLIT_KEYS * _MOST_SPLITS)))


def splits(keys: int) -> int:
    return -(-keys // split_keys(keys))
