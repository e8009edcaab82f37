"""An engine call against two plain answers, on a random model with the shape of Qwen2.5-VL-7B."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch

from benchmarks.bench_engine import ENGINE, PLAIN, PRICE, REFINED
from benchmarks.support.answers import WrongAnswer, check_truth, correlate
from benchmarks.support.engine_opponents import Case, Opponents
from benchmarks.support.lines import Goal, Line, line
from benchmarks.support.models import Shape
from benchmarks.support.timing import Spread, no_preparation, paired

# The layers, widths and heads of the 7B and of its tower; the vocabulary is that of the benchmarks, 512 words.
SHAPE = Shape(28, 3584, "bfloat16", tower_layers=32, tower_hidden=1280, group=7, inner=18944)
VISUAL, NEW_TOKENS, PRESET = (576, 2304, 9216), 16, "paper"
# Above so many tokens, the [S, S] probabilities of all layers do not fit.
EAGER_VISUAL = 576


def measure(
    shape: Shape, visual: int, device: torch.device, *, rounds: int = 3, new_tokens: int = NEW_TOKENS
) -> Iterator[Line]:
    case = Case(shape, PRESET, visual, new_tokens, str(device))
    opponents = Opponents(case)
    _check(opponents)
    stages: dict[str, list[float]] = {}

    def engine() -> None:
        for stage, spent in opponents.engine().seconds.items():
            stages.setdefault(stage, []).append(spent)

    runs = {ENGINE: engine, PLAIN: opponents.plain, REFINED: opponents.answer_refined}
    seconds = paired(runs, rounds=rounds, before=no_preparation, warm_up=False)
    price = [a + b for a, b in zip(seconds[PLAIN], seconds[REFINED], strict=True)]
    over = Spread.of([a / b for a, b in zip(seconds[ENGINE], price, strict=True)])
    labels = {"preset": PRESET, "visual tokens": visual, "new tokens": new_tokens}
    goals = [Goal("(a) / (d)", 1.15, most=True)]
    yield line("engine: ms", labels, {"(a) / (d)": over}, goals, seconds={ENGINE: seconds[ENGINE], PRICE: price})
    total = sum(median(values) for values in stages.values())
    yield line("stages of the engine: ms", {**labels, "sum": f"{1e3 * total:.0f}"}, {}, [], seconds=stages)


def _check(opponents: Opponents) -> None:
    """The lengths of the answers, and a map with a peak that is eager's where its probabilities fit."""
    case, result = opponents.case, opponents.result
    for ids in (result.answer_ids, result.refined_ids, opponents.plain(), opponents.answer_refined()):
        if len(ids) != case.new_tokens:
            raise WrongAnswer(f"{ENGINE}: expected answers of {case.new_tokens} tokens, got {len(ids)}")
    maps = result.task.values[0, :, 0, 0]
    check_truth(ENGINE, maps)
    if case.visual <= EAGER_VISUAL:
        found = correlate(maps.cpu(), opponents.eager_task().maps[:, 0].cpu())
        if not found >= 0.98:
            raise WrongAnswer(f"{ENGINE}: expected maps with a correlation of 0.98 with eager's, got {found:.4f}")
