"""Paired timing in one process: opponents take turns, so that noise affects all of them alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from carve_kernels.selfcheck.timing import Run, Spread, last_level_cache

Before = Callable[[Run], Any]


class Flush:
    """Flushes the caches by reading more than the last level holds, so that the next call is cold."""

    def __init__(self) -> None:
        # Ones: untouched zeros share one page of memory.
        self._buffer = torch.ones(last_level_cache() * 5 // 4 // 4)

    def __call__(self, _run: Run) -> None:
        self._buffer.sum()


def warm(run: Run) -> None:
    """Before a warm call: the same call, so that the caches hold its data and not an opponent's."""
    run()


def no_preparation(_run: Run) -> None:
    """Before a call that is so long that the state of the caches does not matter: nothing."""


def paired(
    runs: Mapping[str, Run],
    *,
    rounds: int,
    before: Before,
    budget: float = math.inf,
    least: int = 3,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each opponent in each round A B C, A B C, ...; after `least` rounds the budget (seconds) ends them.

    All run once before the first round; `warm_up=False` is for runs of many seconds.
    """
    for run in runs.values() if warm_up else ():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + budget
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= least and time.perf_counter() > end:
                break
            for name, run in runs.items():
                before(run)
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, other: str) -> Spread:
    """The time of `name` divided by that of `other`, round by round."""
    return Spread.of([a / b for a, b in zip(seconds[name], seconds[other], strict=True)])
