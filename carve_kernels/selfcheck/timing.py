"""Seconds of a call after a cache flush: by CUDA events, by the host's clock, and from a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

Run = Callable[[], Any]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class Spread(NamedTuple):
    """The median of some measurements, their tenth and ninetieth percentiles, and their number."""

    median: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, middle, high = numpy.percentile(values, (10, 50, 90)).tolist()
        return cls(middle, low, high, len(values))

    def show(self, digits: int = 3) -> str:
        return f"{self.median:.{digits}g} ({self.p10:.{digits}g}-{self.p90:.{digits}g})"


class Timing(NamedTuple):
    """Spreads in seconds: the device's time (on a CPU, the call's), the host's until the call returns, and a replay's.

    `why_no_graph` is the reason where there is no replay.
    """

    seconds: Spread
    host: Spread
    graph: Spread | None
    why_no_graph: str | None


def last_level_cache() -> int:
    """Bytes of the largest cache of a core; 64 MiB where it is unknown."""
    sizes = [path.read_text(encoding="ascii").strip() for path in _CACHES.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes), default=64 * 2**20)


class Clock:
    """Times calls on one device, each after a read of more than its caches hold.

    A write would leave lines that go back to memory during the call: up to 16 us of an H100's time.
    """

    def __init__(self, device: torch.device, rounds: int, flush: int | None = None) -> None:
        self.device, self.rounds = device, rounds
        if flush is None:
            # Twice the cache: of a buffer as large as the cache, half would survive where it is not strictly LRU.
            flush = 2 * (_l2(device) if device.type == "cuda" else last_level_cache())
        self._buffer = torch.ones(flush // 4, dtype=torch.int32, device=device)

    def time(self, run: Run, *, graphs: bool = True) -> Timing:
        for _ in range(3):
            run()
        if self.device.type != "cuda":
            seconds = self._by_host(run)
            return Timing(seconds, seconds, None, "CUDA graphs are for CUDA devices")
        seconds, host = self._by_events(run), self._by_host(run)
        if not graphs:
            return Timing(seconds, host, None, "the host reads its result")
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            return Timing(seconds, host, None, str(error).splitlines()[0])
        return Timing(seconds, host, self._by_events(graph.replay), None)

    def _by_events(self, run: Run) -> Spread:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.rounds)]
        torch.cuda.synchronize(self.device)
        for start, end in pairs:
            # The host issues the call while the device still flushes, so that the time excludes the launch.
            self._buffer.sum()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return Spread.of([1e-3 * start.elapsed_time(end) for start, end in pairs])

    def _by_host(self, run: Run) -> Spread:
        seconds = []
        for _ in range(self.rounds):
            self._buffer.sum()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return Spread.of(seconds)


def _l2(device: torch.device) -> int:
    """Bytes of a GPU's second-level cache; 256 MiB where they are unknown."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 256 * 2**20
