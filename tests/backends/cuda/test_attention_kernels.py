"""The CUDA kernels that attend and capture, in the emulator: thread orders, launches, bytes, guard bands and steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from carve_kernels import attention
from carve_kernels.backends.cuda.attention import scratch_needs
from carve_kernels.backends.native.scratch import Memory
from carve_kernels.selfcheck.cuda_work import attention_work
from carve_kernels.types import Attended, Capture
from tests.emulator import emulator
from tests.support.attended import outputs, problem
from tests.support.attention import Case

DECODE = Case(
    batch=2, query_heads=6, key_heads=2, rows=1, keys=300, size=64, tokens=83, dtype=torch.bfloat16, view="positions"
)


@pytest.fixture(autouse=True)
def _served() -> Iterator[None]:
    with emulator.serving("capture"):
        yield


def attended(case: Case, value_size: int = 64, heads: str = "mean") -> Attended:
    arguments, options = problem(case, value_size)
    return attention(*arguments, **options, heads=heads, **outputs(case, arguments, heads), backend="cuda")  # type: ignore[arg-type, misc]


def same(one: Attended, other: Attended) -> bool:
    parts = zip((one.output, *one.capture), (other.output, *other.capture), strict=True)
    return all(torch.equal(part, wanted) for part, wanted in parts)


@pytest.mark.parametrize("case", [DECODE, DECODE.but(sink=True, softcap=3.0, view="head mask", query_heads=20)])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(case: Case) -> None:
    first = attended(case)
    for order, resident, seed in (("reverse", 1, 1), ("shuffled", 1, 2), ("shuffled", 5, 3), ("reverse", 3, 1)):
        with emulator.running("capture", order, resident=resident, seed=seed):
            assert same(attended(case), first), (order, resident)


def test_each_row_of_a_batch_is_attended_alone() -> None:
    (query, key, value, tokens), options = problem(DECODE, 64)
    both = attended(DECODE)
    for b in range(2):
        part = slice(b, b + 1)
        alone = {**options, "positions": options["positions"][part]}
        found = attention(query[part], key[part], value[part], tokens[part], **alone, backend="cuda")
        assert same(found, Attended(both.output[part], Capture(*(one[part] for one in both.capture))))


@pytest.mark.parametrize(
    ("sizes", "value_size"),
    [
        (dict(query_heads=28, key_heads=4, keys=1100, size=128, tokens=300), 128),
        (dict(query_heads=8, key_heads=8, keys=2111, size=64, tokens=99), 64),
        (dict(query_heads=8, key_heads=2, keys=333, size=256, tokens=40), 256),
        (dict(query_heads=20, key_heads=1, keys=500, size=40, tokens=200), 72),
        (dict(query_heads=4, key_heads=1, keys=70, size=64, tokens=9), 64),
    ],
)
def test_the_kernels_move_the_bytes_of_the_roofline(sizes: dict[str, Any], value_size: int) -> None:
    case = Case(batch=1, rows=1, view="all", ragged=False, dtype=torch.bfloat16, gain=0.0, **sizes)
    arguments, options = problem(case, value_size)
    emulator.counters("capture")
    attention(*arguments, **options, backend="cuda")
    counted = emulator.counters("capture")
    span = int(arguments[3].max() - arguments[3].min()) + 1
    predicted = attention_work(batch=1, value_size=value_size, span=span, seeks_span=True, **sizes)
    assert counted.launches == predicted.launches == 3
    assert counted.read_bytes == pytest.approx(predicted.read_bytes, rel=0.01)
    # A tile of keys more or less around the tokens.
    assert counted.written_bytes == pytest.approx(predicted.written_bytes, rel=0.03)


def test_each_key_and_value_is_read_once() -> None:
    sizes: dict[str, Any] = dict(query_heads=28, key_heads=4, keys=4096, size=128, tokens=3276)
    work = attention_work(batch=1, value_size=128, **sizes)
    once = 2 * 4 * 4096 * 128 * 2
    assert work.read_bytes < 1.25 * once and work.launches == 2


def banded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of NaN between two bands of 64 sevens in the same memory, and that memory."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 128,), 7.0, dtype=dtype)
    memory[64 : 64 + size] = torch.nan
    return memory[64 : 64 + size].view(shape), memory


@pytest.mark.parametrize("value_size", [8, 128, 200])
def test_nothing_outside_the_outputs_is_written(value_size: int) -> None:
    case = DECODE.but(query_heads=10)
    arguments, options = problem(case, value_size)
    output, memory = banded((2, 10, 1, value_size), torch.bfloat16)
    parts = [banded(shape, torch.float32) for shape in ((2, 1, 83), (2, 1), (2, 1))]
    found = attention(*arguments, **options, output=output, out=Capture(*(part for part, _ in parts)), backend="cuda")
    assert found.output is output and bool(output.isfinite().all())
    for part, around in ((output, memory), *parts):
        assert bool((around[:64] == 7).all()) and bool((around[64 + part.numel() :] == 7).all())


def call(step: int, output: torch.Tensor, out: Capture) -> None:
    """The operator itself, with the third step and second layer of larger buffers."""
    (query, key, value, tokens), options = problem(DECODE, 64)
    needs = scratch_needs(batch=2, query_heads=6, key_heads=2, keys=300, size=64, value_size=64, tokens=83)
    memory = Memory.new(needs, query.device)
    memory.scratch.fill_(255)
    emulator.operators.attend_layer.default(
        query, key, value, tokens, None, None, options["positions"], None, options["scale"], 0.0, 0, False,
        torch.tensor(step), 1, *memory, output, *out,
    )  # fmt: skip
    assert not memory.tickets.any()


def stepped() -> tuple[torch.Tensor, Capture]:
    shape = (3, 2, 2, 1)
    out = Capture(*(torch.full(size, torch.nan) for size in ((*shape, 83), shape, shape)))
    return torch.full((2, 6, 1, 64), torch.nan, dtype=torch.bfloat16), out


def test_a_step_and_a_layer_of_larger_buffers_are_written() -> None:
    output, out = stepped()
    call(2, output, out)
    assert same(Attended(output, Capture(*(part[2, 1] for part in out))), attended(DECODE))
    for part in out:
        part[2, 1] = torch.nan
        assert bool(part.isnan().all())


@pytest.mark.parametrize("step", [-1, 3, 2**40])
def test_a_step_out_of_range_has_an_output_and_no_map(step: int) -> None:
    output, out = stepped()
    call(step, output, out)
    assert torch.equal(output, attended(DECODE).output) and all(bool(part.isnan().all()) for part in out)


@pytest.mark.parametrize("change", ["scratch", "tickets"])
def test_too_little_memory_is_refused(change: str) -> None:
    (query, key, value, tokens), options = problem(DECODE, 64)
    sizes: dict[str, Any] = {"scratch": (10**7, torch.uint8), "tickets": (64, torch.int32)}
    sizes[change] = (1, sizes[change][1])
    memory = [torch.zeros(count, dtype=dtype) for count, dtype in sizes.values()]
    output, out = stepped()
    flat = Capture(*(part[0, 0] for part in out))
    with pytest.raises(RuntimeError, match=f"attend_layer: {change}: expected at least [0-9]+.*, got 1"):
        emulator.operators.attend_layer.default(
            query, key, value, tokens, None, None, options["positions"], None, 0.1, 0.0, 0, False, None, 0, *memory,
            output, *flat,
        )  # fmt: skip
    assert bool(output.isnan().all())
