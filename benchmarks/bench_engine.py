"""The cost of an engine call against three calls with eager, the release's procedure and two plain answers.

`python -m benchmarks engine` prints the tables; `pytest benchmarks/bench_engine.py` times the embedded model's engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.bench_session import CHECKPOINT_PEAK, MEMORY_SHARE
from benchmarks.support import engine_opponents
from benchmarks.support.answers import PEAK, WrongAnswer, check_maps, check_truth, correlate
from benchmarks.support.engine_opponents import QUESTION, Case, CheckpointCase, Counted, Opponents, Pass, Work
from benchmarks.support.lines import Goal, Line, line
from benchmarks.support.machine import kilobytes
from benchmarks.support.models import Shape, noise
from benchmarks.support.timing import Spread, no_preparation, paired
from benchmarks.support.user_opponent import UserOpponent
from carve_kernels import CarveEngine, load
from carve_kernels.maps import AttentionMaps
from carve_kernels.models import small

ENGINE, SECOND = "(a) engine", "second question"
EAGER, RELEASE, PRICE = "(b) eager", "(c) release", "(d) plain + refined"
PLAIN, REFINED, EAGER_TASK, EAGER_REST = "plain", "refined", "eager task", "eager rest"
# An image small enough for a check in float32, large enough for a map with a peak.
CHECK_VISUAL, CHECK_TOKENS = 256, 3
# Layers and width of Qwen2.5-VL's tower at a quarter of its width; the language model has 1024 of the 7B's 3584.
TOWER = 32, 320
VISUAL, NEW_TOKENS, PRESETS = (256, 1024, 2304), (8, 32), ("paper", "release")
# The release's procedure takes minutes at 1024 tokens: with more, or with more than 8 new tokens, it is left out.
RELEASE_VISUAL, RELEASE_TOKENS = 1024, 8
MIB = 2**20
_MARGIN = 1.01


def cases(shape: Shape, presets: Iterable[str], visual: Iterable[int], new_tokens: Iterable[int]) -> list[Case]:
    return [Case(shape, name, tokens, count) for name in presets for count in new_tokens for tokens in visual]


def checkpoint_cases(
    directory: Path, presets: Iterable[str], pixels: int, new_tokens: Iterable[int]
) -> list[CheckpointCase]:
    return [CheckpointCase.of(directory, name, pixels, count) for name in presets for count in new_tokens]


def check(shape: Shape, presets: Iterable[str], user: UserOpponent | None = None) -> None:
    """In float32 all opponents give the same tokens and maps, also for the second question about an image."""
    for name in presets:
        check_exactly(Case(shape._replace(dtype="float32"), name, CHECK_VISUAL, CHECK_TOKENS), user)


def check_checkpoint(chosen: Iterable[CheckpointCase], user: UserOpponent | None = None) -> None:
    """The same for a checkpoint in float32; in another dtype `measure` checks what rounding leaves equal.

    Without eager there is no check, so that it must fit.
    """
    available = kilobytes("/proc/meminfo", "MemAvailable")
    for case in chosen:
        if case.eager_bytes >= MEMORY_SHARE * available:
            raise WrongAnswer(
                f"--model: the check needs {case.eager_bytes / MIB:.0f} MiB for the probabilities of eager, "
                f"and {available / MIB:.0f} MiB are free"
            )
        if case.exact:
            check_exactly(case, user)


def check_exactly(case: Case, user: UserOpponent | None = None) -> None:
    """All opponents give the same tokens and maps, also for the second question about an image.

    The user's function is checked last, by its tokens and saliency; the engine must give the same answer after it.
    """
    name, opponents = case.preset_name, Opponents(case)
    engine, second = opponents.result, opponents.second()
    task, general = opponents.eager_task(), opponents.eager_general()
    plain, last = opponents.plain(), opponents.last(task, general)
    refined_only = case.preset.images == "refined"
    refined = opponents.answer_refined() if refined_only else last
    for opponent, result in ((ENGINE, engine), (SECOND, second)):
        _same_tokens(f"{opponent}, {name}, plain answer", result.answer_ids, plain)
        _same_tokens(f"{opponent}, {name}, refined answer", result.refined_ids, refined)
        _same_maps(f"{opponent}, {name}, task", result.task, task, peak_of_case(case))
        _same_maps(f"{opponent}, {name}, general", result.general, general, peak_of_case(case))
    release = opponents.release_task(), opponents.release_general()
    for prompt, opponent, truth in zip(("task", "general"), release, (task, general), strict=True):
        _same_tokens(f"{RELEASE}, {name}, {prompt}", opponent.ids, truth.ids)
        check_maps(f"{RELEASE}, {name}, {prompt}", opponent.maps, truth.maps, relative=2e-4, correlation=1 - 1e-6)
    if refined_only:
        _same_tokens(f"{EAGER}, {name}, refined answer", last, refined)
    if user is not None:
        ids, saliency = opponents.own(user)
        _same_tokens(f"{user.name}, {name}, refined answer", ids.tolist(), engine.refined_ids)
        _same_saliency(f"{user.name}, {name}", saliency, engine.saliency)
        again = opponents.engine()
        if again.refined_ids != engine.refined_ids or not torch.allclose(again.saliency, engine.saliency):
            raise WrongAnswer(f"{user.name}: {ENGINE} gives another answer after it")


def peak_of_case(case: Case) -> float:
    """The least peak of a row, in its medians: a checkpoint need not have one as high as the random model's."""
    return CHECKPOINT_PEAK if isinstance(case, CheckpointCase) else PEAK


def measure(
    chosen: Sequence[Case],
    *,
    rounds: int,
    slow_rounds: int,
    advance: Callable[[str], None],
    user: UserOpponent | None = None,
) -> list[Line]:
    """Seconds of all opponents against the goals, and their work, a line for each case; the user's is a slow one."""
    timed, compared, worked = [], [], []
    growth: dict[tuple[str, int], list[tuple[int, list[float]]]] = {}
    for case in chosen:
        opponents = Opponents(case)
        task = _check_rounded(opponents)
        runs = {
            ENGINE: opponents.engine,
            SECOND: opponents.second,
            PLAIN: opponents.plain,
            REFINED: opponents.answer_refined,
        }
        fast = {name: Counted(case, run) for name, run in runs.items()}
        slow_runs = _slow(opponents, task)
        if user is not None:
            _check_user(opponents, user)
            slow_runs[user.name] = partial(opponents.own, user)
        slow = {name: Counted(case, run) for name, run in slow_runs.items()}
        seconds = paired(fast, rounds=rounds, before=no_preparation)
        seconds_slow = paired(slow, rounds=slow_rounds, before=no_preparation, warm_up=False)
        own = (user.name,) if user is not None else ()
        timed.append(_seconds(case, seconds, seconds_slow, own))
        compared.append(_ratios(case, seconds, seconds_slow, own))
        worked.append(_work(opponents, {name: run.work for name, run in (fast | slow).items()}))
        ratios = _over(seconds[ENGINE], _sum(seconds, PLAIN, REFINED))
        growth.setdefault((case.preset_name, case.new_tokens), []).append((case.visual, ratios))
        advance(f"{case.preset_name}, {case.visual} visual tokens, {case.new_tokens} new")
    return [*timed, *compared, *_growth(growth), *worked]


def memory(chosen: Sequence[Case], *, slow: bool, advance: Callable[[str], None]) -> list[Line]:
    """Peaks in fresh processes: of the engine above two plain answers, and of the slow opponents."""
    entries = []
    for case in chosen:
        engine = engine_opponents.peak_of(engine_opponents.ENGINE, case)
        price = engine_opponents.peak_of(engine_opponents.PRICE, case, engine.refined)
        others = {EAGER: engine_opponents.EAGER} if slow else {}
        if slow and _has_release(case):
            others[RELEASE] = engine_opponents.RELEASE
        peaks = {name: engine_opponents.peak_of(what, case, engine.refined).tensors for name, what in others.items()}
        extra, bound = engine.tensors - price.tensors, case.prefix_bytes
        share = extra / bound
        sizes = {
            PRICE: price.tensors,
            "(a) - (d)": extra,
            "(a) - (d), resident": engine.resident - price.resident,
            "one prefix": bound,
            **{f"{name} - (d)": tensors - price.tensors for name, tensors in peaks.items()},
        }
        goal = Goal("((a) - (d)) / one prefix", _MARGIN, most=True)
        goals = [] if isinstance(case, CheckpointCase) else [goal]
        ratios = {goal.ratio: Spread(share, share, share, 1)}
        entries.append(line("peak memory: MiB of tensors", _labels(case), ratios, goals, sizes=sizes))
        advance(f"memory of {case.preset_name}, {case.visual} visual tokens")
    return entries


def has_small() -> bool:
    return (small() / "config.json").is_file()


def stages(directory: Path, *, rounds: int, advance: Callable[[str], None]) -> Line:
    """Seconds of each stage of CarveEngine on a checkpoint, without its cache."""
    engine = CarveEngine(*load(directory), memory=False)
    image = noise(336)
    saliency = engine(image, QUESTION).saliency
    if not bool(saliency.isfinite().all()) or float(saliency.max()) <= float(saliency.min()):
        raise WrongAnswer(f"engine: expected a saliency with a peak, got {saliency.min()} to {saliency.max()}")
    runs = [engine(image, QUESTION).seconds for _ in range(rounds)]
    advance("stages")
    return line(
        "stages of the engine: ms", {"model": directory.name}, {}, [],
        seconds={stage: [seconds[stage] for seconds in runs] for stage in runs[0]},
    )  # fmt: skip


def _slow(opponents: Opponents, task: Pass) -> dict[str, Callable[[], Any]]:
    """The opponents with eager, and those that they are compared with; `task` is the result of `eager_task`."""

    def rest() -> None:
        opponents.last(task, opponents.eager_general())

    def release() -> None:
        opponents.last(opponents.release_task(), opponents.release_general())

    runs = {ENGINE: opponents.engine, PLAIN: opponents.plain, EAGER_TASK: opponents.eager_task, EAGER_REST: rest}
    return runs | ({RELEASE: release} if _has_release(opponents.case) else {})


def _has_release(case: Case) -> bool:
    return case.visual <= RELEASE_VISUAL and case.new_tokens <= RELEASE_TOKENS


def _seconds(
    case: Case, fast: Mapping[str, list[float]], slow: Mapping[str, list[float]], own: Iterable[str] = ()
) -> Line:
    seconds = {
        ENGINE: fast[ENGINE],
        SECOND: fast[SECOND],
        PRICE: _sum(fast, PLAIN, REFINED),
        EAGER: _sum(slow, EAGER_TASK, EAGER_REST),
    }
    seconds |= {RELEASE: slow[RELEASE]} if RELEASE in slow else {}
    seconds |= {name: slow[name] for name in own}
    return line("engine: ms", _labels(case), {}, [], seconds=seconds)


def _ratios(
    case: Case, fast: Mapping[str, list[float]], slow: Mapping[str, list[float]], own: Iterable[str] = ()
) -> Line:
    """Round by round; opponents with eager are compared with the engine's rounds that were timed in turns with them."""
    allowed = [0.6 * plain + refined for plain, refined in zip(fast[PLAIN], fast[REFINED], strict=True)]
    eager_to_engine = _over(_sum(slow, EAGER_TASK, EAGER_REST), slow[ENGINE])
    eager_to_sdpa = _over(slow[EAGER_TASK], slow[PLAIN])
    rounds = {
        "(a) / (d)": _over(fast[ENGINE], _sum(fast, PLAIN, REFINED)),
        "second / (0.6 plain + refined)": _over(fast[SECOND], allowed),
        "(b) / (a)": eager_to_engine,
        "eager / sdpa": eager_to_sdpa,
        "(b) / (a) / (eager / sdpa)": _over(eager_to_engine, eager_to_sdpa),
    }
    rounds |= {"(c) / (a)": _over(slow[RELEASE], slow[ENGINE])} if RELEASE in slow else {}
    rounds |= {f"{name} / (a)": _over(slow[name], slow[ENGINE]) for name in own}
    ratios = {name: Spread.of(values) for name, values in rounds.items()}
    return line("engine: ratios", _labels(case), ratios, _goals(case))


def _labels(case: Case) -> dict[str, Any]:
    named = {"model": case.directory.resolve().name} if isinstance(case, CheckpointCase) else {}
    return {**named, "preset": case.preset_name, "visual tokens": case.visual, "new tokens": case.new_tokens}


def _goals(case: Case) -> list[Goal]:
    if isinstance(case, CheckpointCase):
        return []
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


def _growth(ratios_by_case: Mapping[tuple[str, int], list[tuple[int, list[float]]]]) -> list[Line]:
    """The median of (a) / (d) of the largest image over that of the smallest; 5 % of growth is noise.

    The images were not timed in turns, so that their rounds are not pairs.
    """
    lines = []
    for (preset, new_tokens), entries in ratios_by_case.items():
        (least, small_ratios), (most, large_ratios) = min(entries), max(entries)
        if least < most:
            labels = {"preset": preset, "new tokens": new_tokens, "from": least, "to": most}
            goal = Goal("growth of (a) / (d)", 1.05, most=True)
            growth = median(large_ratios) / median(small_ratios)
            ratios = {goal.ratio: Spread(growth, growth, growth, 1)}
            lines.append(line("growth with the visual tokens", labels, ratios, [goal]))
    return lines


def _work(opponents: Opponents, done: Mapping[str, Work | None]) -> Line:
    """Language-model tokens and vision-tower calls of each opponent, and the engine's cache of an image."""
    parts = {
        ENGINE: (ENGINE,), SECOND: (SECOND,), EAGER: (EAGER_TASK, EAGER_REST), RELEASE: (RELEASE,),
        PRICE: (PLAIN, REFINED),
    }  # fmt: skip
    case = opponents.case
    labels = _labels(case)
    for name, counted in parts.items():
        works = [work for part in counted if (work := done.get(part)) is not None]
        if works:
            labels[name] = f"{sum(work.tokens for work in works)} + {sum(work.images for work in works)}"
    cached = opponents.caching_engine.memory.held()
    labels["cached: MiB"] = f"{(cached.prefix_bytes + cached.maps_bytes) / MIB:.1f}"
    return line("work: tokens of the language model + calls of the vision tower", labels, {}, [])


def _check_rounded(opponents: Opponents) -> Pass:
    """In the timed dtype: the number of tokens and the first maps; in bfloat16, eager's rounding moves later ones."""
    result, task, second = opponents.result, opponents.eager_task(), opponents.second()
    for ids in (result.answer_ids, result.refined_ids, second.answer_ids, second.refined_ids):
        if len(ids) != opponents.case.new_tokens:
            raise WrongAnswer(f"{ENGINE}: expected answers of {opponents.case.new_tokens} tokens, got {len(ids)}")
    maps = result.task.values[0, :, 0, 0]
    check_truth(ENGINE, maps, peak_of_case(opponents.case))
    correlation = correlate(maps, task.maps[:, 0])
    if not correlation >= 0.98:
        raise WrongAnswer(f"{ENGINE}: expected maps with a correlation of 0.98 with eager's, got {correlation:.4f}")
    return task


def _check_user(opponents: Opponents, user: UserOpponent) -> None:
    """In the timed dtype: the number of tokens, and a saliency of the image; rounding may move both."""
    ids, saliency = opponents.own(user)
    if len(ids) != opponents.case.new_tokens:
        raise WrongAnswer(f"{user.name}: expected {opponents.case.new_tokens} tokens, got {len(ids)}")
    if saliency.shape != opponents.result.saliency.shape or not bool(saliency.isfinite().all()):
        raise WrongAnswer(
            f"{user.name}: expected a finite saliency {tuple(opponents.result.saliency.shape)}, "
            f"got {tuple(saliency.shape)}"
        )


def _same_saliency(name: str, saliency: torch.Tensor, truth: torch.Tensor) -> None:
    if saliency.shape != truth.shape:
        raise WrongAnswer(f"{name}: expected a saliency [H, W] {tuple(truth.shape)}, got {tuple(saliency.shape)}")
    error = float((saliency.double() - truth.double()).abs().max() / truth.double().abs().max())
    # `not <=` instead of `>`, so that NaN fails.
    if not error <= 1e-3:
        raise WrongAnswer(f"{name}: expected a saliency within 1e-3 of its largest value, got {error:.1e}")


def _same_tokens(name: str, ids: Sequence[int], truth: Sequence[int]) -> None:
    if list(ids) != list(truth):
        raise WrongAnswer(f"{name}: expected the tokens {list(truth)}, got {list(ids)}")


def _same_maps(name: str, captured: AttentionMaps, truth: Pass, peak: float) -> None:
    maps = captured.values[0, :, :, 0]
    check_truth(name, truth.maps, peak)
    check_maps(name, maps, truth.maps[:, : maps.shape[1]], relative=2e-4, correlation=1 - 1e-6)


def _sum(seconds: Mapping[str, list[float]], *names: str) -> list[float]:
    return [sum(parts) for parts in zip(*(seconds[name] for name in names), strict=True)]


def _over(seconds: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(seconds, other, strict=True)]


def test_engine(benchmark: Any) -> None:
    import pytest

    if not has_small():
        pytest.skip("the embedded model is not in this checkout")
    engine = CarveEngine(*load(small()), memory=False)
    result = benchmark(engine, noise(336), QUESTION)
    assert float(result.saliency.max()) > float(result.saliency.min())
