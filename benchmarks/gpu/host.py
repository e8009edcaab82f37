"""What a call costs the host, in units of one operator of torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.stack import Stack
from benchmarks.gpu.timing import Clock, microseconds
from benchmarks.support.cases import Case
from benchmarks.support.lines import Goal, Line, line
from benchmarks.support.timing import Run, ratio
from carve_kernels import contrast

ADD, PUBLIC, OPERATOR, ONE = "torch.add_", "capture_layers", "operator", "operator, one layer"
# Short enough that the device is done before the next call.
CASE = Case("qwen2.5-vl-7b", 1024, 1, "bf16")
# Fewer than the launches that a driver queues before it makes the host wait.
CALLS = 100


def measure(case: Case, backend: str, clock: Clock, *, layers: int, calls: int = CALLS) -> Iterator[Line]:
    stack = Stack(case, clock.device, layers)
    one = torch.zeros(1, device=clock.device)
    task = torch.rand(1, 1, 16, device=clock.device)
    runs: dict[str, Run] = {
        ADD: lambda: one.add_(1.0),
        PUBLIC: stack.public(backend),
        OPERATOR: stack.operator(backend, layers),
        ONE: stack.operator(backend, 1),
    }
    stack.check(PUBLIC, runs[PUBLIC])
    stack.check(OPERATOR, runs[OPERATOR])
    stack.check(ONE, runs[ONE], layers=1)
    runs["contrast"] = lambda: contrast(task, task, (4, 4), (8, 8))
    seconds = clock.issued(runs, calls)
    goals = {OPERATOR: [Goal("times torch.add_", 3, most=True)]}
    for name in runs:
        ratios = {"us": microseconds(seconds[name]), "times torch.add_": ratio(seconds, name, ADD)}
        labels = {"call": name, "backend": backend if name != ADD else "-", "layers": 1 if name == ONE else layers}
        yield line("what a call costs the host", labels, ratios, goals.get(name, []))
