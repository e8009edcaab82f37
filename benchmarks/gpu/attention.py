"""Attention of one row and its capture in one layer, against sdpa alone and against sdpa and a capture."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import predicted
from benchmarks.gpu.stack import Stack
from benchmarks.gpu.timing import Clock, in_graph, microseconds
from benchmarks.support.answers import WrongAnswer
from benchmarks.support.cases import Case
from benchmarks.support.lines import Goal, Line, line, over
from benchmarks.support.timing import Run, Spread
from carve_kernels.backends.native.scratch import Memory
from carve_kernels.ops.attention_operator import attention_operator

ATTENTION, SDPA, BOTH = "attention, graph", "sdpa, graph", "sdpa and capture, graph"
TITLE = f"attention and capture of one layer: ms, and times {ATTENTION}"
# The geometries of a 7B with grouped heads, and of one without.
CASES = [
    Case(geometry, length, 1, "bf16")
    for length, geometry in product((4096, 32768, 1024, 16384), ("qwen2.5-vl-7b", "llava-1.5-7b"))
]
# Microseconds that sdpa alone took on an H100.
TARGETS = {
    case: predicted.SDPA[case] for case in CASES if case.geometry == "qwen2.5-vl-7b" and case.length in (4096, 32768)
}


class Layer:
    """One layer of a stack with values, and the output that attention must give."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.stack = case, Stack(case, device, 1)
        inputs = self.stack.layers[0]
        self.query, self.key = inputs.query, inputs.key
        self.value = torch.randn_like(self.key)
        query, key, value = (each.double() for each in (self.query, self.key, self.value))
        weights = (inputs.scale * query @ key.repeat_interleave(inputs.group, 1).mT).softmax(-1)
        self.truth = weights @ value.repeat_interleave(inputs.group, 1)
        self.output = torch.empty_like(self.truth, dtype=self.query.dtype)

    def sdpa(self) -> None:
        self.output = scaled_dot_product_attention(
            self.query, self.key, self.value, scale=self.stack.layers[0].scale, enable_gqa=True
        )

    def fused(self, backend: str) -> Run:
        """The operator with everything allocated beforehand, as a session calls it."""
        inputs, stack = self.stack.layers[0], self.stack
        size, value_size = self.query.shape[3], self.value.shape[3]
        chosen = attention_operator(backend, stack.device, dtype=self.query.dtype, size=size, value_size=value_size)
        if isinstance(chosen, str):
            raise RuntimeError(f"{ATTENTION}: {chosen}")
        needs = chosen.needs(
            batch=1, query_heads=self.query.shape[1], key_heads=self.key.shape[1], keys=self.key.shape[2], size=size,
            value_size=value_size, tokens=inputs.tokens.shape[1],
        )  # fmt: skip
        span, output = torch.stack([inputs.tokens.min(), inputs.tokens.max()]), torch.empty_like(self.output)
        arguments = (
            self.query, self.key, self.value, inputs.tokens, span, None, None, None, inputs.scale, 0.0, 0, False,
            stack.step, 0, *Memory.new(needs, stack.device), output, *stack.out,
        )  # fmt: skip

        def run() -> None:
            self.output = output
            chosen.run(*arguments)

        return run

    def check(self, name: str, run: Run) -> None:
        """The output must be right to the rounding of its dtype, relative to the largest one."""
        run()
        error = float((self.output.double() - self.truth).abs().max() / self.truth.abs().max())
        # `not <=` instead of `>`, so that NaN fails.
        if not error <= 2 * torch.finfo(self.output.dtype).eps:
            raise WrongAnswer(f"{name}, {self.case}: expected the output of attention, got an error of {error:.1e}")


def measure(case: Case, clock: Clock, *, rate: float, backend: str = "cuda") -> Iterator[Line]:
    """A line for a case. Outputs and maps, those of the graphs included, are checked first."""
    layer = Layer(case, clock.device)
    capture = layer.stack.operator(backend, 1)

    def both() -> None:
        layer.sdpa()
        capture()

    graphs: dict[str, Run] = {
        name: in_graph(run, clock.device)
        for name, run in {ATTENTION: layer.fused(backend), SDPA: layer.sdpa, BOTH: both}.items()
    }
    for name, run in graphs.items():
        layer.check(name, run)
        if name != SDPA:
            layer.stack.check(name, run)
    seconds = clock.replayed(graphs)
    floor = 2 * predicted.key_bytes(case, 1) / rate
    labels = {
        "geometry": case.geometry,
        "S": case.length,
        "floor, us": f"{1e6 * floor:.1f}",
        "predicted on an H100, us": f"{1e6 * predicted.attention_seconds(case):.1f}",
        "sdpa on an H100, us": predicted.SDPA.get(case, "-"),
    }
    ratios = {**over(seconds, ATTENTION), "us": microseconds(seconds[ATTENTION])}
    ratios["floors"] = Spread.of([one / floor for one in seconds[ATTENTION]])
    goals = [Goal(SDPA, 1.0), Goal(BOTH, 1.0)]
    if case in TARGETS:
        goals.append(Goal("us", TARGETS[case], most=True))
    yield line(TITLE, labels, ratios, goals, seconds=seconds)
