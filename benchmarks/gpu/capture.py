"""Capture of six layers in one call, against the usual ways to the same maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from benchmarks import bench_capture
from benchmarks.gpu import predicted
from benchmarks.gpu.stack import Stack
from benchmarks.gpu.timing import Clock, in_graph
from benchmarks.support.cases import Case, Problem
from benchmarks.support.lines import Goal, Line, line, over
from benchmarks.support.timing import Run, Spread
from carve_kernels import BackendUnavailable
from carve_kernels.backends import resolve
from carve_kernels.types import CaptureOptions

LAYERS = predicted.LAYERS
BACKENDS = ("cuda", "triton")
IDIOM, FOLDED, FOLDED_GRAPH = "common idiom, launched", "folded, launched", "folded, graph"
EAGER, SDPA, FLASH = "eager, one layer, all rows", "sdpa, one layer, one row", "FlashAttention, one layer, all rows"
# The longest sequences whose [S, S] probabilities are computed, and whose prefill is timed.
EAGER_LENGTH, PREFILL_LENGTH = 4096, 16384
TITLE = f"capture of {LAYERS} layers: ms, and times capture in a graph"
GEOMETRIES = ("qwen2.5-vl-7b", "llava-1.5-7b", "qwen2.5-vl-3b")
LENGTHS, ROWS = (1024, 2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 32, 64)

# Those that an H100 has measured before, then all others.
FIRST = list(predicted.H100)
OTHERS = [
    case
    for rows, length, geometry in product(ROWS, LENGTHS, GEOMETRIES)
    if (case := Case(geometry, length, rows, "bf16")) not in predicted.H100
]


def measure(
    case: Case, clock: Clock, *, rate: float, layers: int = LAYERS, backends: Sequence[str] = BACKENDS
) -> Iterator[Line]:
    """A line for a case. Answers, those of the graphs included, are checked first; `rate` is that of a copy."""
    stack = Stack(case, clock.device, layers)
    served = [name for name in backends if _serves(stack, name)]
    launched: dict[str, Run] = {f"{name}, launched": stack.public(name) for name in served}
    # The call of a session, which allocates before its steps.
    graphs = {f"{name}, graph": in_graph(stack.operator(name, layers), clock.device) for name in served}
    for name, run in (launched | graphs).items():
        stack.check(name, run)
    for name, way in ((IDIOM, bench_capture.repeat), (FOLDED, bench_capture.folded)):
        launched[name] = lambda way=way: [way(layer) for layer in stack.layers]
        stack.check_opponent(name, torch.cat(launched[name]()))
    graphs[FOLDED_GRAPH] = in_graph(launched[FOLDED], clock.device)
    seconds = clock.replayed(graphs)
    seconds |= clock.launched(launched, max(3, clock.rounds // 3))
    if case.rows == 1:
        seconds |= clock.replayed(_one_layer(stack.layers[0]), max(3, clock.rounds // 3))
    yield _line(case, stack, served, seconds, rate)


def _line(case: Case, stack: Stack, served: list[str], seconds: dict[str, list[float]], rate: float) -> Line:
    floor = predicted.key_bytes(case, len(stack.layers)) / rate
    labels = {
        "geometry": case.geometry,
        "S": case.length,
        "R": case.rows,
        "floor, us": f"{1e6 * floor:.1f}",
        "predicted on an H100, us": f"{1e6 * predicted.seconds(case, len(stack.layers)):.1f}",
        "trial on an H100, us": getattr(predicted.H100.get(case), "trial", "-"),
    }
    if not served:
        return line(TITLE, labels, {}, [], seconds=seconds)
    own = f"{served[0]}, graph"
    graph = Spread.of([1e6 * one for one in seconds[own]])
    replays = {name: seconds[name] for name in seconds if name.endswith("graph")}
    ratios = {**over(replays, own), "us": graph, "floors": Spread.of([one / floor for one in seconds[own]])}
    goals = [Goal(FOLDED_GRAPH, 1.0)]
    if case in predicted.TARGETS:
        goals.append(Goal("us", predicted.TARGETS[case], most=True))
    return line(TITLE, labels, ratios, goals, seconds=seconds)


def _serves(stack: Stack, backend: str) -> bool:
    first = stack.layers[0]
    options = CaptureOptions(**first.options)
    try:
        resolve("capture", backend, stack.device, first.query, first.key, first.tokens, options)
    except BackendUnavailable:
        return False
    return True


def _one_layer(inputs: Problem) -> dict[str, Run]:
    """Attention of one layer: of all rows of a prefill, and of the last row as in a decode step."""
    attend = torch.nn.functional.scaled_dot_product_attention
    value = torch.randn_like(inputs.key)
    options = {"scale": inputs.scale, "enable_gqa": True}
    runs: dict[str, Run] = {SDPA: lambda: attend(inputs.query, inputs.key, value, **options)}
    if inputs.key.shape[2] <= PREFILL_LENGTH:

        def flash() -> torch.Tensor:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                return attend(inputs.queries, inputs.key, value, is_causal=True, **options)

        runs[FLASH] = flash
    if inputs.key.shape[2] <= EAGER_LENGTH:
        runs[EAGER] = lambda: bench_capture.eager(inputs)
    return runs


def summary(lines: list[Line]) -> Line | None:
    """How many of the measured cells are at least as fast as folded torch in a graph, by the median."""
    ratios = [entry["ratios"][FOLDED_GRAPH]["median"] for entry in lines if FOLDED_GRAPH in entry["ratios"]]
    if not ratios:
        return None
    goal = Goal("least ratio to folded torch", 1.0)
    return line("capture: all cells", {"cells": len(ratios)}, {goal.ratio: Spread.of([min(ratios)])}, [goal])
