"""The price of a layout: `layout_of` beside the processor's own call, for one image of about 1,024 tokens.

See `python -m benchmarks layouts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.support import memory
from benchmarks.support.answers import WrongAnswer
from benchmarks.support.lines import Goal, Line, line
from benchmarks.support.timing import Spread
from carve_kernels.types import Size

MODULE = "benchmarks.support.layouts"
TABLE = "layout_of beside the processor: ms"
# Milliseconds.
MOST = 5.0
QUICK, QUICK_PHOTO = ("qwen2_vl", "internvl"), (400, 1200)


def measure(names: Sequence[str], size: Size, *, rounds: int, advance: Callable[[str], None]) -> Iterator[Line]:
    """A line for each family, all of them measured in one process."""
    found = memory.in_fresh_process(MODULE, {"names": list(names), "size": size, "rounds": rounds}, environment={})
    advance("measured")
    if "wrong" in found:
        raise WrongAnswer(found["wrong"])
    for each in found["results"]:
        spreads = {
            f"{name}, {clock}": Spread.of([1e3 * value for value in values])
            for clock, key in (("by the clock", "seconds"), ("of the process", "process"))
            for name, values in each[key].items()
        }
        labels = {name: each[name] for name in ("name", "kind", "views", "tokens")}
        goals = [Goal(name, MOST, most=True) for name in spreads if name.startswith("layout_of")]
        yield line(TABLE, labels, spreads, goals)
