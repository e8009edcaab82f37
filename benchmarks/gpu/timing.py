"""Times on a GPU by CUDA events, launched by the host and replayed from a graph, after a flush that reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.support.timing import Run, Spread

# More than any second-level cache. They are read: a write would leave lines in the cache, and bringing them back to
# memory takes up to 16 us of the call that is timed next.
FLUSH = 256 * 2**20


class Clock:
    """Seconds of runs that take turns, each after a flush of the caches."""

    def __init__(self, device: torch.device, *, rounds: int, flush: int = FLUSH) -> None:
        self.device, self.rounds = device, rounds
        self._lines = torch.ones(flush // 4, device=device)

    def replayed(self, runs: Mapping[str, Run], rounds: int | None = None) -> dict[str, list[float]]:
        """By the device alone: each run was issued while the device still flushed. For replays and single kernels."""
        return self._by_events(runs, rounds, idle=False)

    def launched(self, runs: Mapping[str, Run], rounds: int | None = None) -> dict[str, list[float]]:
        """From an idle device on: what the host needs to launch is included."""
        return self._by_events(runs, rounds, idle=True)

    def called(self, runs: Mapping[str, Run], rounds: int | None = None) -> dict[str, list[float]]:
        """By the host's clock, from the call until the device is done."""

        def seconds(run: Run) -> Callable[[], float]:
            self._lines.sum()
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            run()
            torch.cuda.synchronize(self.device)
            spent = time.perf_counter() - start
            return lambda: spent

        return self._in_turns(runs, rounds, seconds)

    def issued(self, runs: Mapping[str, Run], calls: int, rounds: int | None = None) -> dict[str, list[float]]:
        """Seconds of the host until one of many calls returns; the device may still be busy."""

        def seconds(run: Run) -> Callable[[], float]:
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            spent = (time.perf_counter() - start) / calls
            return lambda: spent

        return self._in_turns(runs, rounds, seconds)

    def _by_events(self, runs: Mapping[str, Run], rounds: int | None, *, idle: bool) -> dict[str, list[float]]:
        def seconds(run: Run) -> Callable[[], float]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._lines.sum()
            if idle:
                torch.cuda.synchronize(self.device)
            start.record()
            run()
            end.record()
            return lambda: 1e-3 * start.elapsed_time(end)

        return self._in_turns(runs, rounds, seconds)

    def _in_turns(
        self, runs: Mapping[str, Run], rounds: int | None, seconds: Callable[[Run], Callable[[], float]]
    ) -> dict[str, list[float]]:
        for run in runs.values():
            run()
        torch.cuda.synchronize(self.device)
        later: dict[str, list[Callable[[], float]]] = {name: [] for name in runs}
        for _ in range(rounds or self.rounds):
            for name, run in runs.items():
                later[name].append(seconds(run))
        torch.cuda.synchronize(self.device)
        return {name: [read() for read in reads] for name, reads in later.items()}


class Replay(NamedTuple):
    """A captured run; the tensors that it uses live as long as the run does."""

    graph: torch.cuda.CUDAGraph
    run: Run

    def __call__(self) -> None:
        self.graph.replay()


def in_graph(run: Run, device: torch.device) -> Replay:
    """The replay of a run that a CUDA graph has captured.

    `torch.cuda.graph` collects garbage and empties the allocator's cache at each capture, which takes longer than most
    measurements here.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph.capture_begin()
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return Replay(graph, run)


def microseconds(seconds: list[float]) -> Spread:
    return Spread.of([1e6 * one for one in seconds])


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second, read and written, of the fastest of some copies of `size` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize(device)
        best = min(best, 1e-3 * start.elapsed_time(end))
    return 2 * size / best


def card(device: torch.device) -> dict[str, Any]:
    """The GPU, for a report."""
    properties = torch.cuda.get_device_properties(device)
    names = ("name", "multi_processor_count", "L2_cache_size", "total_memory", "memory_clock_rate")
    return {name: getattr(properties, name, None) for name in names} | {"cuda": torch.version.cuda}
