"""Peak memory of the ways to an answer, each in a fresh process; see `memory` for how it is counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.memory import in_fresh_process, peak_of_tensors, peak_resident
from benchmarks.models import Shape, noise
from benchmarks.one_look import Case, Ways

ENGINE, EAGER, RELEASE, PRICE = "engine", "eager", "release", "price"


class Peak(NamedTuple):
    """Bytes above what stood before the call, the weights above all, and the size of the refined picture."""

    tensors: int
    resident: int
    refined: tuple[int, int]


def peak(what: str, case: Case, refined: tuple[int, int] | None = None) -> Peak:
    """The peak of one way; `refined` is the size of the refined picture, which the engine itself finds out."""
    task = {
        "what": what, "shape": case.shape._asdict(), "preset": case.preset_name, "visual": case.visual,
        "new_tokens": case.new_tokens, "refined": refined,
    }  # fmt: skip
    found = in_fresh_process("benchmarks.one_look_memory", task)
    return Peak(found["tensors"], found["resident"], tuple(found["refined"]))


def _run(what: str, ways: Ways) -> Callable[[], Any]:
    return {
        ENGINE: ways.engine,
        EAGER: lambda: ways.last(ways.eager_task(), ways.eager_general()),
        RELEASE: lambda: ways.last(ways.release_task(), ways.release_general()),
        PRICE: lambda: (ways.plain(), ways.answer_refined()),
    }[what]


def measured(task: dict[str, Any]) -> Peak:
    """The peak of one way, taken in this process."""
    size = task["refined"]
    case = Case(Shape(**task["shape"]), task["preset"], task["visual"], task["new_tokens"])
    ways = Ways(case, None if size is None else noise(max(size)).resize(size))
    run = _run(task["what"], ways)
    # What is there before any question.
    _ = case.processor, case.model, task["what"] in (EAGER, RELEASE) and case.eager
    # In this order, since the first call also loads what libraries load late.
    tensors = peak_of_tensors(run)
    resident = peak_resident(run)
    return Peak(tensors, resident, tuple(size or ways.refined.size))


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))._asdict()))
