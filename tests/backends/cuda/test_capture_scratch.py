"""What the CUDA backend of capture allocates and converts before its launches: cached scratch memory, and sinks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from carve_kernels import capture
from carve_kernels.backends.cuda import capture as cuda_capture
from carve_kernels.backends.cuda.plan import scratch_bytes
from carve_kernels.types import Capture, CaptureOptions, Layers, Slot
from tests.emulator import emulator
from tests.support.attention import Case, planted, poisoned
from tests.support.cuda_capture import LONG, captured, layered, same


@pytest.fixture(autouse=True)
def _served() -> Iterator[None]:
    with emulator.serving("capture"):
        yield


@pytest.mark.parametrize("each", [False, True])
def test_the_scratch_has_the_documented_size_and_no_state(each: bool) -> None:
    case = LONG.but(keys=700)
    (query, key, tokens), options = planted(case)
    heads = "each" if each else "mean"
    needed = scratch_bytes(layers=1, batch=2, query_heads=6, rows=3, keys=700, tokens=83, lse=False, each=each)
    out = poisoned(case, heads)
    results = []
    for filling in (0, 255, 93):
        memory = torch.full((needed + 64,), 7, dtype=torch.uint8)
        memory[:needed] = filling
        torch.ops.carve_kernels.capture_cuda(
            [query], [key], tokens, None, options["positions"], [], None, options["scale"], 0.0, 0, each, None, 0, 0,
            memory[:needed], *out,
        )  # fmt: skip
        assert bool((memory[needed:] == 7).all())
        results.append(Capture(*(part.clone() for part in out)))
    assert same(results[0], results[1]) and same(results[0], results[2])
    with pytest.raises(RuntimeError, match=f"scratch: expected at least {needed} bytes, got {needed - 1}"):
        torch.ops.carve_kernels.capture_cuda(
            [query], [key], tokens, None, options["positions"], [], None, options["scale"], 0.0, 0, each, None, 0, 0,
            memory[: needed - 1], *out,
        )  # fmt: skip


def test_scratch_from_inference_mode_serves_outside_of_it() -> None:
    cuda_capture._SCRATCH.cached.clear()
    with torch.inference_mode():
        inside = captured(Case())
    assert same(captured(Case()), inside)
    cached = [memory.data_ptr() for memory in cuda_capture._SCRATCH.cached.values()]
    captured(Case())
    assert [memory.data_ptr() for memory in cuda_capture._SCRATCH.cached.values()] == cached and len(cached) == 1
    captured(LONG.but(view="all", batch=1))
    assert [memory.data_ptr() for memory in cuda_capture._SCRATCH.cached.values()] != cached


def test_a_captured_graph_gets_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may be replayed concurrently with other calls, so it must not use the scratch that those share."""
    sizes = []
    monkeypatch.setattr(torch, "empty", lambda size, **_: sizes.append(size) or torch.zeros(size))
    device = torch.device("cuda", 0)
    for capturing, expected in ((True, [100, 100]), (False, [128])):
        cuda_capture._SCRATCH.cached.clear()
        sizes.clear()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        first, second = cuda_capture._SCRATCH.take(device, 7, 100), cuda_capture._SCRATCH.take(device, 7, 100)
        assert sizes == expected and (first is second) != capturing and bool(cuda_capture._SCRATCH.cached) != capturing
    assert cuda_capture._SCRATCH.take(device, 8, 100) is not first
    cuda_capture._SCRATCH.cached.clear()


def test_threads_and_streams_do_not_share_scratch() -> None:
    device = torch.device("cpu")
    scratch = [cuda_capture._SCRATCH.take(device, stream, 100) for stream in (0, 7, 0)]
    worker = threading.Thread(target=lambda: scratch.append(cuda_capture._SCRATCH.take(device, 0, 100)))
    worker.start()
    worker.join()
    assert scratch[2] is scratch[0] and len({memory.data_ptr() for memory in scratch}) == 3


class Conversions(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "wanted"), [(torch.float32, []), (torch.bfloat16, ["stack", "_to_copy", "unbind"])])
def test_sinks_become_float32_in_two_launches_for_all_layers(dtype: torch.dtype, wanted: list[str]) -> None:
    problems, out = layered(Case(view="all", batch=1), 5)
    sinks = [torch.randn(6).to(dtype) for _ in problems]
    step = torch.tensor(0)
    with Conversions() as conversions:
        layers = Layers([query for query, _, _ in problems], [key for _, key, _ in problems], sinks)
        cuda_capture.forward_layers(layers, problems[0][2], CaptureOptions(0.1), Slot(out, step))
    before = conversions.ran[: conversions.ran.index("capture_cuda")]
    assert [name for name in before if name not in ("detach", "empty")] == wanted
    for place, ((query, key, _), sink) in enumerate(zip(problems, sinks, strict=True)):
        alone = capture(query, key, problems[0][2], scale=0.1, sink=sink, backend="cuda")
        assert same(Capture(*(part[0, place] for part in out)), alone)
