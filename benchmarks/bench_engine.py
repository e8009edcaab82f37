"""The price of one look: the engine beside three calls under eager, the release's procedure and two plain answers.

`python -m benchmarks engine` gives the tables; `pytest benchmarks/bench_engine.py` times the embedded model's engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import one_look_memory
from benchmarks.answers import WrongAnswer, check_maps, check_truth, correlate
from benchmarks.lines import Goal, Line, line
from benchmarks.models import Shape, noise
from benchmarks.one_look import QUESTION, Case, Counted, Look, Ways, Work
from benchmarks.timing import Spread, as_it_comes, paired
from carve_kernels import CarveEngine, load
from carve_kernels.maps import AttentionMaps
from carve_kernels.models import small

ENGINE, SECOND = "(a) engine", "second question"
EAGER, RELEASE, PRICE = "(b) eager", "(c) release", "(d) plain + refined"
PLAIN, REFINED, EAGER_TASK, EAGER_REST = "plain", "refined", "eager task", "eager rest"
# A picture small enough for a check in float32, large enough for a map with a peak.
CHECK_VISUAL, CHECK_TOKENS = 256, 3
# Layers and width of Qwen2.5-VL's tower at a quarter of its width; the language model has 1024 of the 7B's 3584.
TOWER = 32, 320
VISUAL, NEW_TOKENS, PRESETS = (256, 1024, 2304), (8, 32), ("paper", "release")
# The release's procedure takes minutes at 1024 tokens: beyond it, and beyond 8 new ones, it is not waited for.
RELEASE_VISUAL, RELEASE_TOKENS = 1024, 8
MIB = 2**20
_MARGIN = 1.01


def cases(shape: Shape, presets: Iterable[str], visual: Iterable[int], new_tokens: Iterable[int]) -> list[Case]:
    return [Case(shape, name, tokens, count) for name in presets for count in new_tokens for tokens in visual]


def check(shape: Shape, presets: Iterable[str]) -> None:
    """In float32 all ways give the same tokens and maps; the question that comes second as well."""
    for name in presets:
        ways = Ways(Case(shape._replace(dtype="float32"), name, CHECK_VISUAL, CHECK_TOKENS))
        alone = ways.case.preset.images == "refined"
        engine, second, task, general = ways.seen, ways.second(), ways.eager_task(), ways.eager_general()
        plain, last = ways.plain(), ways.last(task, general)
        for way, result in ((ENGINE, engine), (SECOND, second)):
            _same_tokens(f"{way}, {name}, plain answer", result.answer_ids, plain)
            _same_tokens(f"{way}, {name}, refined answer", result.refined_ids, ways.answer_refined() if alone else last)
            _same_maps(f"{way}, {name}, task", result.task, task)
            _same_maps(f"{way}, {name}, general", result.general, general)
        for way, found, truth in (("task", ways.release_task(), task), ("general", ways.release_general(), general)):
            _same_tokens(f"{RELEASE}, {name}, {way}", found.ids, truth.ids)
            check_maps(f"{RELEASE}, {name}, {way}", found.maps, truth.maps, relative=2e-4, correlation=1 - 1e-6)
        if alone:
            _same_tokens(f"{EAGER}, {name}, refined answer", last, ways.answer_refined())


def measure(chosen: Sequence[Case], *, rounds: int, slow_rounds: int, advance: Callable[[str], None]) -> list[Line]:
    """Seconds of all ways against the goals, and the work they do, a line for each case."""
    timed, compared, worked = [], [], []
    growth: dict[tuple[str, int], list[tuple[int, list[float]]]] = {}
    for case in chosen:
        ways = Ways(case)
        look = _check_rounded(ways)
        runs = {ENGINE: ways.engine, SECOND: ways.second, PLAIN: ways.plain, REFINED: ways.answer_refined}
        fast = {name: Counted(case, run) for name, run in runs.items()}
        slow = {name: Counted(case, run) for name, run in _slow(ways, look).items()}
        seconds = paired(fast, rounds=rounds, before=as_it_comes)
        seconds_slow = paired(slow, rounds=slow_rounds, before=as_it_comes, warm_up=False)
        timed.append(_seconds(case, seconds, seconds_slow))
        compared.append(_ratios(case, seconds, seconds_slow))
        worked.append(_work(ways, {name: run.work for name, run in (fast | slow).items()}))
        ratios = _over(seconds[ENGINE], _sum(seconds, PLAIN, REFINED))
        growth.setdefault((case.preset_name, case.new_tokens), []).append((case.visual, ratios))
        advance(f"{case.preset_name}, {case.visual} visual tokens, {case.new_tokens} new")
    return [*timed, *compared, *_growth(growth), *worked]


def memory(chosen: Sequence[Case], *, slow: bool, advance: Callable[[str], None]) -> list[Line]:
    """Peaks in fresh processes: what the engine takes above two plain answers, and what the slow ways take."""
    found = []
    for case in chosen:
        engine = one_look_memory.peak(one_look_memory.ENGINE, case)
        price = one_look_memory.peak(one_look_memory.PRICE, case, engine.refined)
        others = {EAGER: one_look_memory.EAGER} if slow else {}
        if slow and _is_waited_for(case):
            others[RELEASE] = one_look_memory.RELEASE
        peaks = {name: one_look_memory.peak(what, case, engine.refined).tensors for name, what in others.items()}
        extra, bound = engine.tensors - price.tensors, case.prefix_bytes
        share = extra / bound
        labels = {
            **_labels(case),
            PRICE: f"{price.tensors / MIB:.1f}",
            "(a) - (d)": f"{extra / MIB:.1f}",
            "(a) - (d), resident": f"{(engine.resident - price.resident) / MIB:.1f}",
            "one prefix": f"{bound / MIB:.1f}",
            **{f"{name} - (d)": f"{(tensors - price.tensors) / MIB:.1f}" for name, tensors in peaks.items()},
        }
        goal = Goal("((a) - (d)) / one prefix", _MARGIN, most=True)
        found.append(line("peak memory: MiB of tensors", labels, {goal.ratio: Spread(share, share, share, 1)}, [goal]))
        advance(f"memory of {case.preset_name}, {case.visual} visual tokens")
    return found


def has_small() -> bool:
    return (small() / "config.json").is_file()


def stages(directory: Path, *, rounds: int, advance: Callable[[str], None]) -> Line:
    """Seconds of each stage of CarveEngine on a checkpoint, without its memory."""
    engine = CarveEngine(*load(directory), memory=False)
    picture = noise(336)
    saliency = engine(picture, QUESTION).saliency
    if not bool(saliency.isfinite().all()) or float(saliency.max()) <= float(saliency.min()):
        raise WrongAnswer(f"engine: expected a saliency with a peak, got {saliency.min()} to {saliency.max()}")
    found = [engine(picture, QUESTION).seconds for _ in range(rounds)]
    advance("stages")
    return line(
        "stages of the engine: ms", {"model": directory.name}, {}, [],
        seconds={stage: [seconds[stage] for seconds in found] for stage in found[0]},
    )  # fmt: skip


def _slow(ways: Ways, task: Look) -> dict[str, Callable[[], Any]]:
    """The ways under eager, with what they are compared with; `task` is what `eager_task` gives."""

    def rest() -> None:
        ways.last(task, ways.eager_general())

    def release() -> None:
        ways.last(ways.release_task(), ways.release_general())

    runs = {ENGINE: ways.engine, PLAIN: ways.plain, EAGER_TASK: ways.eager_task, EAGER_REST: rest}
    return runs | ({RELEASE: release} if _is_waited_for(ways.case) else {})


def _is_waited_for(case: Case) -> bool:
    return case.visual <= RELEASE_VISUAL and case.new_tokens <= RELEASE_TOKENS


def _seconds(case: Case, fast: Mapping[str, list[float]], slow: Mapping[str, list[float]]) -> Line:
    found = {
        ENGINE: fast[ENGINE],
        SECOND: fast[SECOND],
        PRICE: _sum(fast, PLAIN, REFINED),
        EAGER: _sum(slow, EAGER_TASK, EAGER_REST),
    }
    found |= {RELEASE: slow[RELEASE]} if RELEASE in slow else {}
    return line("one look: ms", _labels(case), {}, [], seconds=found)


def _ratios(case: Case, fast: Mapping[str, list[float]], slow: Mapping[str, list[float]]) -> Line:
    """Round by round; what runs under eager is compared with the rounds of the engine that it took turns with."""
    allowed = [0.6 * plain + refined for plain, refined in zip(fast[PLAIN], fast[REFINED], strict=True)]
    eager_to_engine = _over(_sum(slow, EAGER_TASK, EAGER_REST), slow[ENGINE])
    eager_to_sdpa = _over(slow[EAGER_TASK], slow[PLAIN])
    found = {
        "(a) / (d)": _over(fast[ENGINE], _sum(fast, PLAIN, REFINED)),
        "second / (0.6 plain + refined)": _over(fast[SECOND], allowed),
        "(b) / (a)": eager_to_engine,
        "eager / sdpa": eager_to_sdpa,
        "(b) / (a) / (eager / sdpa)": _over(eager_to_engine, eager_to_sdpa),
    }
    found |= {"(c) / (a)": _over(slow[RELEASE], slow[ENGINE])} if RELEASE in slow else {}
    ratios = {name: Spread.of(values) for name, values in found.items()}
    return line("one look: ratios", _labels(case), ratios, _goals(case))


def _labels(case: Case) -> dict[str, Any]:
    return {"preset": case.preset_name, "visual tokens": case.visual, "new tokens": case.new_tokens}


def _goals(case: Case) -> list[Goal]:
    goals = []
    if case.new_tokens == 8:
        goals.append(Goal("(a) / (d)", 1.15, most=True))
        goals.append(Goal("(c) / (a)", 4 if case.visual < 1024 else 14))
    if case.visual < 1024:
        goals.append(Goal("(b) / (a)", 1.4))
    else:
        goals.append(Goal("(b) / (a) / (eager / sdpa)", 1.3))
        if case.new_tokens == 8:
            goals.append(Goal("second / (0.6 plain + refined)", 1, most=True))
    return goals


def _growth(found: Mapping[tuple[str, int], list[tuple[int, list[float]]]]) -> list[Line]:
    """The median of (a) / (d) of the largest picture over that of the smallest; 5 % of growth is their noise.

    The pictures took no turns with each other, so that their rounds are no pairs.
    """
    lines = []
    for (preset, new_tokens), entries in found.items():
        (least, small_ratios), (most, large_ratios) = min(entries), max(entries)
        if least < most:
            labels = {"preset": preset, "new tokens": new_tokens, "from": least, "to": most}
            goal = Goal("growth of (a) / (d)", 1.05, most=True)
            growth = median(large_ratios) / median(small_ratios)
            ratios = {goal.ratio: Spread(growth, growth, growth, 1)}
            lines.append(line("growth with the visual tokens", labels, ratios, [goal]))
    return lines


def _work(ways: Ways, done: Mapping[str, Work | None]) -> Line:
    """Language-model tokens and calls of the vision tower of each way, and what the engine keeps of a picture."""
    parts = {
        ENGINE: (ENGINE,), SECOND: (SECOND,), EAGER: (EAGER_TASK, EAGER_REST), RELEASE: (RELEASE,),
        PRICE: (PLAIN, REFINED),
    }  # fmt: skip
    case = ways.case
    labels = _labels(case)
    for name, counted in parts.items():
        works = [work for part in counted if (work := done.get(part)) is not None]
        if works:
            labels[name] = f"{sum(work.tokens for work in works)} + {sum(work.pictures for work in works)}"
    held = ways.remembering.memory.held()
    labels["kept: MiB"] = f"{(held.prefix_bytes + held.maps_bytes) / MIB:.1f}"
    return line("work: tokens of the language model + calls of the vision tower", labels, {}, [])


def _check_rounded(ways: Ways) -> Look:
    """As it is timed: as many tokens as asked for; in bfloat16 eager itself wanders off, its first maps are alike."""
    result, task, second = ways.seen, ways.eager_task(), ways.second()
    for ids in (result.answer_ids, result.refined_ids, second.answer_ids, second.refined_ids):
        if len(ids) != ways.case.new_tokens:
            raise WrongAnswer(f"{ENGINE}: expected answers of {ways.case.new_tokens} tokens, got {len(ids)}")
    found = result.task.values[0, :, 0, 0]
    check_truth(ENGINE, found)
    likeness = correlate(found, task.maps[:, 0])
    if not likeness >= 0.98:
        raise WrongAnswer(f"{ENGINE}: expected maps with a correlation of 0.98 with eager's, got {likeness:.4f}")
    return task


def _same_tokens(name: str, found: Sequence[int], truth: Sequence[int]) -> None:
    if list(found) != list(truth):
        raise WrongAnswer(f"{name}: expected the tokens {list(truth)}, got {list(found)}")


def _same_maps(name: str, found: AttentionMaps, truth: Look) -> None:
    maps = found.values[0, :, :, 0]
    check_truth(name, truth.maps)
    check_maps(name, maps, truth.maps[:, : maps.shape[1]], relative=2e-4, correlation=1 - 1e-6)


def _sum(seconds: Mapping[str, list[float]], *names: str) -> list[float]:
    return [sum(parts) for parts in zip(*(seconds[name] for name in names), strict=True)]


def _over(found: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(found, other, strict=True)]


def test_engine(benchmark: Any) -> None:
    import pytest

    if not has_small():
        pytest.skip("the embedded model is not in this checkout")
    engine = CarveEngine(*load(small()), memory=False)
    result = benchmark(engine, noise(336), QUESTION)
    assert float(result.saliency.max()) > float(result.saliency.min())
