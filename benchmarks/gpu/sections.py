"""The order of the sections, the most important first, their budget, and what is left out or fails."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import attention, capture, decode, engine, host, pixels
from benchmarks.gpu.timing import FLUSH, Clock, card, copy_rate, in_graph, microseconds
from benchmarks.support.cases import Case
from benchmarks.support.lines import Line, line
from benchmarks.support.models import Shape
from benchmarks.support.timing import Spread

SECTIONS = ("device", "capture", "attention", "host", "pixels", "decode", "engine")
Report = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What to measure; the defaults are for a GPU with 40 GB."""

    backends: Sequence[str] = capture.BACKENDS
    first: Sequence[Case] = tuple(capture.FIRST)
    others: Sequence[Case] = tuple(capture.OTHERS)
    layers: int = capture.LAYERS
    attended: Sequence[Case] = tuple(attention.CASES)
    host_case: Case = host.CASE
    calls: int = host.CALLS
    side: int = 1024
    decode_shape: Shape = decode.SHAPE
    large_shape: Shape = decode.LARGE_SHAPE
    length: int = decode.LENGTH
    engine_shape: Shape = engine.SHAPE
    visual: Sequence[int] = engine.VISUAL
    new_tokens: int = engine.NEW_TOKENS
    rounds: int = 31
    flush: int = FLUSH
    copied: int = 2**30


# A test of the benchmark, not a measurement.
QUICK = Sizes(
    first=(Case("smolvlm", 512, 1, "bf16"), Case("smolvlm", 512, 8, "bf16")),
    others=(),
    layers=2,
    attended=(Case("smolvlm", 512, 1, "bf16"),),
    host_case=Case("smolvlm", 512, 1, "bf16"),
    calls=2,
    side=64,
    decode_shape=Shape(4, 256, "bfloat16"),
    large_shape=Shape(4, 256, "bfloat16"),
    length=128,
    engine_shape=Shape(2, 256, "bfloat16"),
    visual=(64,),
    new_tokens=2,
    rounds=3,
    flush=2**16,
    copied=2**16,
)


class Task(NamedTuple):
    """A measurement, and the seconds that must be left for it; those of an H100, rounded up."""

    section: str
    name: str
    seconds: float
    run: Callable[[], Iterable[Line]]


def device() -> torch.device | None:
    """The first CUDA device, or None."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


def measure(
    report: Report,
    device: torch.device,
    sizes: Sizes,
    *,
    sections: Sequence[str] = SECTIONS,
    budget: float,
    save: Callable[[], None],
    announce: Callable[[str], None],
) -> None:
    """Fill `results`, `left_out` and `failed` of a report; `save` is called after each measurement.

    A measurement that fails, also by a wrong answer, does not end the others, unless the device is lost. The budget, in
    seconds, ends none: a measurement for which too little is left does not begin.
    """
    start = time.perf_counter()
    report["device"] = card(device)
    report |= {"results": [], "left_out": [], "failed": []}
    for task in _tasks(report, device, sizes):
        if task.section not in sections:
            continue
        spent = time.perf_counter() - start
        if spent + task.seconds > budget:
            report["left_out"].append({"task": task.name, "why": f"{budget - spent:.0f} of {budget:.0f} s were left"})
            continue
        try:
            lines = list(task.run())
        # One measurement of many: whatever is wrong with it is reported.
        except Exception as error:
            report["failed"].append({"task": task.name, "why": _reason(error), "trace": traceback.format_exc()[-4000:]})
            announce(f"{spent:6.1f} s  {task.name}: FAILED, {_reason(error)}")
            if _is_lost(device):
                announce("the device is lost: nothing more is measured")
                save()
                return
        else:
            report["results"] += lines
            announce(f"{spent:6.1f} s  {task.name}: {time.perf_counter() - start - spent:.1f} s")
        save()
        gc.collect()
        torch.cuda.empty_cache()
    report["results"] += filter(None, [capture.summary(report["results"])])
    report["seconds"] = time.perf_counter() - start
    save()


def _tasks(report: Report, device: torch.device, sizes: Sizes) -> Iterator[Task]:
    clock = Clock(device, rounds=sizes.rounds, flush=sizes.flush)
    rates = report["device"]

    def of_device() -> Iterator[Line]:
        yield from _of_device(rates, clock, sizes)

    def of_case(case: Case) -> Iterator[Line]:
        # Without the section on the device, the floor is that of an H100.
        rate = rates.get("copy_rate", 3.0e12)
        yield from capture.measure(case, clock, rate=rate, layers=sizes.layers, backends=sizes.backends)

    def of_attention(case: Case) -> Iterator[Line]:
        rate = rates.get("copy_rate", 3.0e12)
        yield from attention.measure(case, clock, rate=rate, backend=sizes.backends[0])

    yield Task("device", "device", 5, of_device)
    for case in sizes.first:
        yield Task("capture", f"capture {case}", 4, partial(of_case, case))
    for case in sizes.attended:
        yield Task("attention", f"attention {case}", 4, partial(of_attention, case))
    for backend in sizes.backends:
        run = partial(host.measure, sizes.host_case, backend, clock, layers=sizes.layers, calls=sizes.calls)
        yield Task("host", f"host, {backend}", 5, run)
    yield Task("pixels", "pixels", 10, partial(pixels.measure, sizes.side, clock))
    run = partial(decode.measure_in_one_graph, sizes.large_shape, sizes.length, clock)
    yield Task("decode", f"decode of a 7B, {decode.IN_ONE_GRAPH}", 40, run)
    for how in decode.MODES:
        enough = 15 if how == decode.EAGER else 70
        yield Task(
            "decode", f"decode, {how}", enough, partial(decode.measure, how, sizes.decode_shape, sizes.length, clock)
        )
    for tokens in sizes.visual:
        run = partial(engine.measure, sizes.engine_shape, tokens, device, new_tokens=sizes.new_tokens)
        yield Task("engine", f"engine, {tokens} visual tokens", 30 + tokens // 200, run)
    for case in sizes.others:
        yield Task("capture", f"capture {case}", 4, partial(of_case, case))


def _of_device(rates: Report, clock: Clock, sizes: Sizes) -> Iterator[Line]:
    """The copy rate, and graphs of small dependent kernels, events included: what is fixed in every other time."""
    rates["copy_rate"] = copy_rate(clock.device, sizes.copied)
    one = torch.zeros(1, device=clock.device)

    def add(count: int) -> None:
        for _ in range(count):
            one.add_(1.0)

    graphs = {f"{count} in a graph": in_graph(partial(add, count), clock.device) for count in (1, 2, 3)}
    ratios = {name: microseconds(values) for name, values in clock.replayed(graphs).items()}
    ratios["copy, TB/s"] = Spread.of([1e-12 * rates["copy_rate"]])
    yield line("small kernels: us", {"device": rates["name"]}, ratios, [])


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _is_lost(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
