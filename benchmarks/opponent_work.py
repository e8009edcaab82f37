"""Traffic and arithmetic of the opponents of capture, counted while their operators run on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_capture
from benchmarks.support.cases import DTYPES, GEOMETRIES, VISUAL_SHARE, Case, Problem
from carve_kernels.selfcheck.work import Work

_ATEN = torch.ops.aten
# Allocations, and views of dense tensors.
_FREE = {_ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN._unsafe_view.default}


def counted(run: Callable[[], Any]) -> Work:
    """The work of plain torch: every operator a launch that reads its inputs once and writes its outputs once.

    Views are free. Repeated reads within an operator (of a row by a softmax) and along an axis of stride 0 are left to
    the caches: the count favours the opponent.
    """
    with FlopCounterMode(display=False) as operations, _Traffic() as traffic:
        run()
    return Work(traffic.read_bytes, traffic.written_bytes, operations.get_total_flops(), traffic.launches)


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.read_bytes = self.written_bytes = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func not in _FREE:
            # A gather reads only the elements that it picks.
            read = (args[1:], result) if func is _ATEN.index.Tensor else (args, kwargs)
            self.read_bytes += sum(map(_bytes, tree_iter(read)))
            self.written_bytes += sum(map(_bytes, tree_iter(result)))
            self.launches += 1
        return result


def _bytes(value: Any) -> int:
    if not isinstance(value, torch.Tensor):
        return 0
    distinct = value.element_size()
    for size, stride in zip(value.shape, value.stride(), strict=True):
        distinct *= size if stride else min(size, 1)
    return distinct


def idiom(case: Case) -> Work:
    """Maps of the chosen rows of a layer by the common idiom: repeat K, q @ K^T, softmax, gather, mean."""
    return counted(lambda: bench_capture.repeat(_without_memory(case)))


def eager(case: Case, queries: int) -> Work:
    """Eager attention of a layer over so many query rows, and maps sliced from its probabilities."""
    inputs = _without_memory(case._replace(rows=queries))
    mask = torch.empty(1, 1, queries, case.length, dtype=inputs.query.dtype, device="meta")

    def run() -> None:
        _, probabilities = eager_attention(inputs.query, inputs.key, torch.empty_like(inputs.key), mask, inputs.scale)
        probabilities[:, :, -case.rows :][..., inputs.tokens[0]].mean(1, dtype=torch.float32)

    return counted(run)


def eager_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The eager attention of transformers, operator by operator."""
    batch, heads, _, size = query.shape
    key, value = (
        part[:, :, None].expand(-1, -1, heads // part.shape[1], -1, -1).reshape(batch, heads, -1, size)
        for part in (key, value)
    )
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    probabilities = (scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


def flash(case: Case) -> Work:
    """One causal FlashAttention forward of a layer: queries, keys, values and output once, half of both products."""
    heads, key_heads, size = GEOMETRIES[case.geometry]
    width = DTYPES[case.dtype].itemsize
    outer = case.length * heads * size * width
    inner = 2 * case.length * key_heads * size * width
    pairs = case.length * (case.length + 1) // 2
    return Work(outer + inner, outer + 4 * case.length * heads, 4 * heads * size * pairs, 1)


def _without_memory(case: Case) -> Problem:
    heads, key_heads, size = GEOMETRIES[case.geometry]
    length, rows, dtype = case.length, case.rows, DTYPES[case.dtype]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query = empty(1, rows, heads, size).transpose(1, 2)
    return Problem(
        queries=query,
        query=query,
        key=empty(1, key_heads, length, size),
        tokens=empty(1, int(VISUAL_SHARE * length), dtype=torch.int32),
        positions=None,
        hidden=empty(rows, length, dtype=torch.bool) if rows > 1 else None,
        scale=size**-0.5,
    )
