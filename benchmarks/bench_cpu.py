"""The CPU room against its goals: capture, contrast, regions, a model with a session, and the price of a call."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import cpu_capture, cpu_model, cpu_pixels
from benchmarks.cases import Case
from benchmarks.lines import Line
from benchmarks.models import Shape

SIDE, SMALL_SIDE = 1024, 64
SHAPE, SMALL_SHAPE = Shape(28, 1024, "bfloat16"), Shape(2, 256, "bfloat16")
# One for contrast, two for regions.
PIXELS = 3


def cases_of(cells: str, quick: bool) -> list[Case]:
    if quick:
        return cpu_capture.QUICK
    return cpu_capture.HEADLINE if cells == "headline" else cpu_capture.everything()


def budget_of(cells: str, quick: bool) -> float:
    """Seconds of a cell: the whole table shall take some ten minutes."""
    if quick:
        return 0.0
    return 1.0 if cells == "headline" else 0.6


def total(cases: list[Case], threads: list[int], lengths: list[int]) -> int:
    return (len(cases) + PIXELS) * len(threads) + len(lengths) + 3


def measure(
    cases: list[Case],
    threads: list[int],
    lengths: list[int],
    *,
    quick: bool,
    budget: float,
    advance: Callable[[str], None],
) -> list[Line]:
    """Capture, contrast and regions at each number of threads, the rest at the most of them."""
    lines = list(cpu_capture.measure(cases, threads, budget=budget, advance=advance))
    for count in threads:
        lines += cpu_pixels.measure(SMALL_SIDE if quick else SIDE, count, budget=budget, advance=advance)
    torch.set_num_threads(max(threads))
    shape = SMALL_SHAPE if quick else SHAPE
    lines += cpu_model.decode(shape, lengths, rounds=3 if quick else 40, advance=advance)
    lines += cpu_model.prefill(shape, lengths[0], rounds=2 if quick else 3, advance=advance)
    lines += cpu_model.one_row(256 if quick else cpu_model.ROW_LENGTH, budget=budget, advance=advance)
    lines += cpu_model.overhead(budget=budget, advance=advance)
    # Small shapes have no goals.
    return [{**entry, "goals": []} for entry in lines] if quick else lines
