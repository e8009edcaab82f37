"""What captures and fused attention take on an H100 in a CUDA graph: predicted, beside what one H100 measured.

The prediction is a sum of four terms: the launches, the bytes of K, the scores of the first kernel, the second kernel.
Its rates were fitted to the times of a trial kernel of the same design (2026, one H100 80GB HBM3, torch 2.11), which
they give within 16 % from 14 us on. The trial reads K once for every eight rows, the kernels of the package once for
all rows: `row_blocks` is the only difference.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.support.cases import DTYPES, GEOMETRIES, VISUAL_SHARE, Case
from carve_kernels.backends.cuda.plan import capture_plan
from carve_kernels.backends.native import extension
from carve_kernels.selfcheck.roofline import GPUS, REACHED

LAYERS = 6

_RATE = REACHED * GPUS["H100"].bandwidth
# One kernel in a graph, events included; the second kernel, which waits for the first, is in its own term.
_FIRST, _SECOND, _SECOND_READ = 4.0e-6, 4.3e-6, 6.5e-6
# Bytes of K a second where the second-level cache has them.
_CACHED = 5.5e12
# Bytes of scores a second: eight queries are one tile in registers, more keep their statistics in shared memory.
_TILE = 8
_FEW = 0.5e-6, 5.0e12
_MANY = 2.0e-6, 2.0e12
_FEW_UNSTORED = 1.0e-6, 5.0e12
_MANY_UNSTORED = 4.0e-6, 7.0e12
_MERGED = 2.2e12
_COMPUTED_AGAIN = 2.6e12


class Measured(NamedTuple):
    """Microseconds on an H100: the trial in a graph, folded torch and the backends of 0.1.0 in graphs."""

    trial: float
    folded: float
    cuda: float | None
    triton: float


_7B, _3B, _LLAVA = "qwen2.5-vl-7b", "qwen2.5-vl-3b", "llava-1.5-7b"
# The cells that an H100 measured, in the order in which they matter.
H100 = {
    Case(_7B, 4096, 1, "bf16"): Measured(18.7, 91.9, 119.3, 41.2),
    Case(_7B, 1024, 1, "bf16"): Measured(12.8, 95.6, 49.9, 22.8),
    Case(_7B, 16384, 1, "bf16"): Measured(47.4, 156.4, 412.2, 109.5),
    Case(_7B, 32768, 1, "bf16"): Measured(84.6, 222.0, 772.9, 194.2),
    Case(_LLAVA, 1024, 1, "bf16"): Measured(28.4, 117.6, 173.3, 83.8),
    Case(_LLAVA, 4096, 1, "bf16"): Measured(77.5, 169.4, 525.8, 205.1),
    Case(_LLAVA, 16384, 1, "bf16"): Measured(278.9, 417.7, 1850.7, 607.4),
    Case(_3B, 4096, 1, "bf16"): Measured(15.4, 89.4, 64.0, 29.4),
    Case(_7B, 4096, 2, "bf16"): Measured(23.7, 154.6, 195.9, 43.8),
    Case(_7B, 4096, 4, "bf16"): Measured(26.1, 160.0, 330.7, 56.3),
    Case(_7B, 4096, 8, "bf16"): Measured(33.1, 180.4, 646.3, 72.8),
    Case(_7B, 4096, 32, "bf16"): Measured(95.6, 334.9, None, 194.5),
    Case(_7B, 32768, 8, "bf16"): Measured(185.0, 639.2, 4783.9, 388.2),
}
# Microseconds that the kernels have to reach on an H100.
TARGETS = {
    Case(_7B, 4096, 1, "bf16"): 18.5,
    Case(_7B, 16384, 1, "bf16"): 44.0,
    Case(_7B, 32768, 1, "bf16"): 84.0,
    Case(_LLAVA, 4096, 1, "bf16"): 80.0,
    Case(_LLAVA, 16384, 1, "bf16"): 300.0,
    Case(_7B, 4096, 8, "bf16"): 30.0,
    Case(_7B, 4096, 32, "bf16"): 60.0,
}


# Microseconds of one row of `scaled_dot_product_attention` in one layer, without a capture.
SDPA = {
    Case(_7B, 1024, 1, "bf16"): 11.4,
    Case(_7B, 2048, 1, "bf16"): 12.9,
    Case(_7B, 4096, 1, "bf16"): 15.1,
    Case(_7B, 16384, 1, "bf16"): 50.2,
    Case(_7B, 32768, 1, "bf16"): 43.0,
    Case(_LLAVA, 1024, 1, "bf16"): 18.0,
    Case(_LLAVA, 4096, 1, "bf16"): 41.1,
    Case(_LLAVA, 16384, 1, "bf16"): 107.7,
    Case(_3B, 4096, 1, "bf16"): 17.1,
}
# What the two kernels of a capture take beyond the bytes of K: those of the trial took 10.3 to 11.2 us on the day on
# which sdpa was measured and one empty kernel in a graph took 4.0 us; today's took 11.9 to 12.9 on a day on which that
# took 5.1. Multiplying by values and merging outputs is 0.5 us more, by the instructions on the path.
_ATTENDING = 11.4e-6


def key_bytes(case: Case, layers: int = LAYERS) -> int:
    _, key_heads, size = GEOMETRIES[case.geometry]
    return layers * key_heads * case.length * size * DTYPES[case.dtype].itemsize


def attention_seconds(case: Case) -> float:
    """Predicted seconds on an H100 in a graph for one layer and one row of `carve_kernels.attention`."""
    return _ATTENDING + 2 * key_bytes(case, 1) / _RATE


def score_bytes(case: Case, layers: int = LAYERS) -> int:
    """The scores of the visual tokens, in float32."""
    return layers * GEOMETRIES[case.geometry].heads * case.rows * int(VISUAL_SHARE * case.length) * 4


def reads_again(case: Case, layers: int = LAYERS) -> bool | None:
    """Whether the second kernel reads the keys of the tokens instead of stored scores; None without the library."""
    if extension.unavailable():
        return None
    heads, key_heads, size = GEOMETRIES[case.geometry]
    plan = capture_plan(
        layers=layers, batch=1, query_heads=heads, key_heads=key_heads, rows=case.rows, keys=case.length, size=size,
        tokens=int(VISUAL_SHARE * case.length), element_bytes=DTYPES[case.dtype].itemsize,
    )  # fmt: skip
    return plan.is_reread


def seconds(case: Case, layers: int = LAYERS, *, again: bool | None = None, row_blocks: int = 1) -> float:
    """Predicted seconds on an H100 in a graph; `again` chooses between stored scores and a second read of the keys.

    By default the plan of the kernels does, and where the library is not built the shorter time.
    """
    again = reads_again(case, layers) if again is None else again
    if again is None:
        return min(seconds(case, layers, again=one, row_blocks=row_blocks) for one in (False, True))
    keys, scores = key_bytes(case, layers), score_bytes(case, layers)
    streamed = keys / _RATE + (row_blocks - 1) * keys / _CACHED
    few = _queries(case) <= _TILE
    if again:
        start, rate = _FEW_UNSTORED if few else _MANY_UNSTORED
        first = _FIRST + start + streamed + scores / rate
        return first + _SECOND_READ + VISUAL_SHARE * streamed + scores / _COMPUTED_AGAIN
    start, rate = _FEW if few else _MANY
    return _FIRST + start + streamed + scores / rate + _SECOND + scores / _MERGED


def _queries(case: Case) -> int:
    heads, key_heads, _ = GEOMETRIES[case.geometry]
    return heads // key_heads * case.rows
