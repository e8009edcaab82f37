"""`carve-kernels check` on a simulated GPU: what is checked, timed, predicted and reported."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from carve_kernels import backends, selfcheck
from carve_kernels.backends import SUPPORT
from carve_kernels.selfcheck import timing
from carve_kernels.selfcheck.work import Work
from carve_kernels.types import CaptureOptions

CUDA = torch.device("cuda")


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Graph:
    """A stand-in for a CUDA graph, which replays what ran while it was captured."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU in this machine's memory: backends with the reference's modules, and just enough of torch.cuda."""

    @contextlib.contextmanager
    def capturing(_graph: Graph) -> Iterator[None]:
        yield

    memory = {"memory_clock_rate": 2_619_000, "memory_bus_width": 5120, "L2_cache_size": 2**14}
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, **memory)
    ones, move = torch.ones, selfcheck.move
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **more: ones(*size, **more))
    monkeypatch.setattr(selfcheck, "move", lambda value, _device: move(value, "cpu"))
    for name, stub in {
        "device": lambda _device: contextlib.nullcontext(),
        "get_device_properties": lambda _device: properties,
        "synchronize": lambda _device=None: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    package = SimpleNamespace(devices=lambda: (), unavailable=lambda: None)
    real_package, real_module = backends._package, backends._module
    monkeypatch.setattr(backends, "_package", lambda backend: package if backend == "cuda" else real_package(backend))
    monkeypatch.setattr(
        backends, "_module", lambda stage, backend: real_module(stage, "reference" if backend == "cuda" else backend)
    )
    for stage in SUPPORT:
        monkeypatch.setitem(SUPPORT[stage], "cuda", None)
        monkeypatch.setitem(SUPPORT[stage], "triton", "a stand-in is enough")
    monkeypatch.setattr(selfcheck, "work_of", lambda *_args, **_sizes: Work(10**6, 0, 10**3, 2))
    monkeypatch.setitem(selfcheck.UNITS, ("contrast", "cuda"), "vector")
    monkeypatch.setitem(selfcheck.UNITS, ("contrast", "reference"), "vector")
    monkeypatch.setitem(selfcheck.UNITS, ("capture", "reference"), "matrix")
    monkeypatch.setitem(selfcheck.UNITS, ("attention", "reference"), "matrix")
    monkeypatch.setitem(selfcheck.UNITS, ("regions", "reference"), "vector")
    yield


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_checked_timed_and_predicted() -> None:
    Graph.replays = 0
    said: list[str] = []
    found = selfcheck.examine(CUDA, quick=True, announce=said.append)
    assert len(said) == selfcheck.count(quick=True) and said[0].startswith("capture: one row")
    assert {cell["backend"]: cell["unavailable"] for cell in found["backends"]} == {
        "cuda": None, "triton": "a stand-in is enough", "reference": None,
    }  # fmt: skip
    assert all(entry["right"] is True for entry in found["checks"])
    assert {entry["backend"] for entry in found["checks"]} == {"cuda", "reference"}
    assert found["gpu"]["bandwidth"] == pytest.approx(3.35e12, rel=1e-3)
    timed = [entry for entry in found["timings"] if entry["backend"] == "cuda"]
    assert [entry["stage"] for entry in timed] == ["capture", "attention", "capture", "contrast", "regions"]
    for entry in timed:
        # Two launches, and a third of a microsecond for a megabyte.
        predicted = entry["predicted"]
        assert predicted["device"]["bound"] == predicted["host"]["bound"] == "launch"
        assert predicted["device"]["launch"] == pytest.approx(5.5e-6)
        assert predicted["host"]["launch"] == pytest.approx(5.9e-6)
        assert predicted["device"]["seconds"] == pytest.approx(5.5e-6 + 1e6 / (0.9 * 3.35e12), rel=1e-3)
        assert (entry["graph"] is None) == (entry["stage"] == "regions") == (entry["why_no_graph"] is not None)
        assert 0 < entry["seconds"]["p10"] <= entry["seconds"]["median"] <= entry["seconds"]["p90"]
    assert Graph.replays > 0
    json.dumps(found, allow_nan=False)


@pytest.mark.usefixtures("gpu")
def test_a_call_that_no_graph_can_capture_is_still_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refusing(_graph: Graph) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(torch.cuda, "graph", refusing)
    found = timing.Clock(CUDA, rounds=3, flush=2**10).time(lambda: None)
    assert found.graph is None and found.why_no_graph == "operation not permitted when stream is capturing"
    assert found.seconds.rounds == found.host.rounds == 3


@pytest.mark.usefixtures("gpu")
def test_a_backend_that_fails_or_varies_or_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backends._module
    calls = 0

    def forward(
        query: torch.Tensor, key: torch.Tensor, tokens: torch.Tensor, options: CaptureOptions, **out: Any
    ) -> Any:
        nonlocal calls
        calls += 1
        if options.heads == "each":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        found = real("capture", "reference").forward(query, key, tokens, options, **out)
        return found._replace(mass=found.mass.mul_(1 + 1e-6 * (calls % 2))) if query.shape[2] == 1 else found

    def supports(_query: Any, _key: Any, _tokens: Any, options: CaptureOptions, **_out: Any) -> str | None:
        return "no lse" if options.lse is not None else None

    backend = SimpleNamespace(forward=forward, supports=supports)
    monkeypatch.setattr(
        backends,
        "_module",
        lambda stage, backend_: backend if (stage, backend_) == ("capture", "cuda") else real(stage, backend_),
    )
    checks = selfcheck.examine(CUDA, quick=True, announce=lambda _text: None)["checks"]
    problems = {entry["case"]: entry for entry in checks if entry["backend"] == "cuda" and entry["problem"] is not None}
    assert problems["each head"]["right"] is False and "illegal memory access" in problems["each head"]["problem"]
    assert problems["one row, float32"]["problem"] == "two calls gave different bits"
    assert problems["known lse"]["right"] is None and "no lse" in problems["known lse"]["problem"]
    assert all(entry["right"] for entry in checks if entry["backend"] == "reference" or entry["stage"] != "capture")
