"""Just enough of torch.cuda in this machine's memory to run code that times a GPU; what runs in a graph is replayed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    def __init__(self, _device: Any = None) -> None:
        pass

    def wait_stream(self, _other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    """Records nothing: a test gives it what it replays."""

    def __init__(self) -> None:
        self.open = False
        self.captured = False

    def capture_begin(self) -> None:
        assert not self.open and not self.captured
        self.open = True

    def capture_end(self) -> None:
        assert self.open
        self.open, self.captured = False, True

    def replay(self) -> None:
        assert self.captured


PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, L2_cache_size=2**14,
    total_memory=2**33, memory_clock_rate=2_619_000, memory_bus_width=5120,
)  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def stream(_stream: Stream) -> Iterator[None]:
        yield

    stubs: dict[str, Callable[..., Any]] = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": stream,
        "current_stream": Stream,
        "synchronize": lambda _device=None: None,
        "get_device_properties": lambda _device: PROPERTIES,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
