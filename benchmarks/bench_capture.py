"""capture beside the ways that people take today, and beside a plain read of the keys: the floor.

`python -m benchmarks capture` gives the table; `pytest benchmarks/bench_capture.py` the same runs one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from rich.table import Table

from benchmarks.answers import check_maps, check_truth
from benchmarks.cases import Case, Problem, problem, standard, truth
from benchmarks.timing import Flush, Run, Spread, paired, ratio, warm
from carve_kernels import BackendUnavailable, capture
from carve_kernels.backends import BACKENDS, resolve
from carve_kernels.types import CaptureOptions

AUTO, EAGER, REPEAT, FOLDED, READ = "capture", "(a) eager", "(b) repeat", "(c) folded", "(f) read"
# The longest sequence whose [S, S] probabilities are computed.
EAGER_LENGTH = 2048


def eager(given: Problem) -> torch.Tensor:
    """The probabilities of all rows, as eager attention returns them, then a slice."""
    length, rows = given.key.shape[2], given.query.shape[2]
    key = given.key.repeat_interleave(given.group, 1)
    scores = (given.queries @ key.mT * given.scale).masked_fill_(_future(length), -torch.inf)
    probabilities = scores.softmax(-1, dtype=torch.float32).to(key.dtype)
    return probabilities[:, :, length - rows :, given.tokens[0]].mean(1, dtype=torch.float32)


def repeat(given: Problem) -> torch.Tensor:
    """The chosen rows only, with the keys repeated over the heads: the idiom of today's code."""
    key = given.key.repeat_interleave(given.group, 1)
    scores = _hide(given.query @ key.mT * given.scale, given)
    return scores.softmax(-1, dtype=torch.float32)[..., given.tokens[0]].mean(1)


def folded(given: Problem) -> torch.Tensor:
    """The heads of a group as rows of one product, the mean before the gather: the best of plain torch."""
    batch, heads, rows, size = given.query.shape
    query = given.query.reshape(batch, given.key.shape[1], given.group * rows, size) * given.scale
    scores = _hide((query @ given.key.mT).view(batch, heads, rows, -1), given)
    return scores.softmax(-1, dtype=torch.float32).mean(1)[..., given.tokens[0]]


def read(given: Problem) -> torch.Tensor:
    return given.key.view(torch.float32).sum()


def opponents(given: Problem) -> dict[str, Run]:
    """Every way to the maps [1, R, N] that can serve here."""
    runs: dict[str, Run] = {AUTO: lambda: capture(given.query, given.key, given.tokens, **given.options).maps}
    options = CaptureOptions(**given.options)
    for room in BACKENDS:
        try:
            resolve("capture", room, given.query.device, given.query, given.key, given.tokens, options)
        except BackendUnavailable:
            continue
        runs[f"{AUTO} {room}"] = _room(given, room)
    ways: dict[str, Callable[[Problem], torch.Tensor]] = {REPEAT: repeat, FOLDED: folded}
    if given.key.shape[2] <= EAGER_LENGTH:
        ways = {EAGER: eager, **ways}
    return runs | {name: _way(way, given) for name, way in ways.items()}


def checked(case: Case) -> tuple[Problem, dict[str, Run]]:
    """The inputs of a case and its opponents, whose answers are right."""
    given = problem(case)
    expected = truth(given)
    check_truth(str(case), expected)
    runs = opponents(given)
    for name, run in runs.items():
        # Plain torch rounds scores, and eager its probabilities, to bf16; a room computes in float32 in any case.
        rounded = case.dtype == "bf16" and not name.startswith(AUTO)
        bounds = {"relative": 0.1, "correlation": 0.999} if rounded else {"relative": 1e-4, "correlation": 1 - 1e-6}
        check_maps(f"{name}, {case}", run(), expected, **bounds)
    return given, {**runs, READ: _way(read, given)}


def measure(
    cases: Iterable[Case], *, rounds: int, budget: float, advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Cold and warm seconds of every opponent in every case, and the ratios that count, each round by round."""
    flush = Flush()
    results = []
    for case in cases:
        given, runs = checked(case)
        for caches, before in (("cold", flush), ("warm", warm)):
            seconds = paired(runs, rounds=rounds, before=before, budget=budget)
            others = [name for name in seconds if name != AUTO]
            results.append(
                {
                    **case._asdict(),
                    "caches": caches,
                    "key_bytes": given.key.numel() * given.key.element_size(),
                    "seconds": {name: Spread.of(values)._asdict() for name, values in seconds.items()},
                    "ratio_to_capture": {name: ratio(seconds, name, AUTO)._asdict() for name in others},
                }
            )
        advance(str(case))
    return results


def tables(results: list[dict[str, Any]]) -> list[Table]:
    """Median milliseconds, and how many times the time of capture each opponent takes: median (p10-p90)."""
    found = []
    for caches in ("cold", "warm"):
        lines = [result for result in results if result["caches"] == caches]
        names = list(dict.fromkeys(name for line in lines for name in line["seconds"]))
        table = Table(title=f"capture, caches {caches}: ms, and times capture")
        for heading in ("geometry", "S", "R", "dtype", *names):
            table.add_column(heading, justify="left" if heading == "geometry" else "right")
        for line in lines:
            cells = [_cell(line, name) for name in names]
            table.add_row(line["geometry"], str(line["length"]), str(line["rows"]), line["dtype"], *cells)
        found.append(table)
    return found


def _cell(line: dict[str, Any], name: str) -> str:
    if name not in line["seconds"]:
        return "-"
    cell = f"{1e3 * line['seconds'][name]['median']:.3g}"
    if name in line["ratio_to_capture"]:
        cell += f"\nx {Spread(**line['ratio_to_capture'][name]).show()}"
    return cell


def _hide(scores: torch.Tensor, given: Problem) -> torch.Tensor:
    return scores if given.hidden is None else scores.masked_fill_(given.hidden, -torch.inf)


def _way(way: Callable[[Problem], torch.Tensor], given: Problem) -> Run:
    return lambda: way(given)


def _room(given: Problem, room: str) -> Run:
    return lambda: capture(given.query, given.key, given.tokens, **given.options, backend=room).maps


# A model builds its causal mask once for all layers.
@lru_cache(maxsize=1)
def _future(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


_checked_once = lru_cache(maxsize=1)(checked)


def pytest_generate_tests(metafunc: Any) -> None:
    names = (AUTO, *(f"{AUTO} {room}" for room in BACKENDS), EAGER, REPEAT, FOLDED, READ)
    pairs = list(product(standard(("qwen2.5-vl-7b",)), names))
    metafunc.parametrize(("case", "opponent"), pairs, ids=[f"{case} {name}" for case, name in pairs])


def test_capture(benchmark: Any, case: Case, opponent: str) -> None:
    import pytest

    _, runs = _checked_once(case)
    if opponent not in runs:
        pytest.skip(f"{opponent} does not serve {case}")
    benchmark.group = str(case)
    benchmark(runs[opponent])
