"""The price of a session in a whole model: seconds beside a plain `generate`, and peak memory.

`python -m benchmarks session` gives the tables; `pytest benchmarks/bench_session.py` times the runs one by one, on a
smaller model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from rich.table import Table

from benchmarks.answers import WrongAnswer, check_maps, check_truth
from benchmarks.machine import kilobytes
from benchmarks.memory import EAGER, PLAIN, SESSION, eager_bytes, peak_in_fresh_process
from benchmarks.models import Shape, prompt, random_model
from benchmarks.timing import Spread, as_it_comes, paired, ratio
from carve_kernels import capture_attention

LAYERS = "paper"
# Long enough for a map with a peak, short enough for a check in float32.
CHECK_LENGTH = 256
# Above this share of the free memory, eager's matrices are computed and not allocated.
MEMORY_SHARE = 0.5
MIB = 2**20


class Answer(NamedTuple):
    """New tokens [T], and the maps [L, T, N], empty where the way gives none."""

    ids: torch.Tensor
    maps: torch.Tensor


def opponents(shape: Shape, length: int, new_tokens: int) -> dict[str, Callable[[], Answer]]:
    """The same `generate` with a dynamic cache: plain under sdpa, in a session, under eager with output_attentions."""
    model, other = random_model(shape, "sdpa"), random_model(shape, "eager")
    other.load_state_dict(model.state_dict(), assign=True)
    inputs = prompt(length, shape.dtype)
    visual = inputs["mm_token_type_ids"][0].bool()

    def answer(model: Any, **options: Any) -> Any:
        with torch.no_grad():
            return model.generate(
                **inputs, do_sample=False, max_new_tokens=new_tokens, return_dict_in_generate=True, **options
            )

    def plain() -> Answer:
        return Answer(answer(model).sequences[0, length:], torch.empty(0))

    def session() -> Answer:
        with capture_attention(model, layers=LAYERS, max_steps=new_tokens) as session:
            ids = answer(model).sequences[0, length:]
        return Answer(ids, session.maps.values[0, :, :, 0])

    def eager() -> Answer:
        output = answer(other, output_attentions=True)
        layers = capture_attention(other, layers=LAYERS).layers
        maps = [
            [step[layer][0, :, -1, : len(visual)][:, visual].float().mean(0) for step in output.attentions]
            for layer in layers
        ]
        return Answer(output.sequences[0, length:], torch.stack([torch.stack(steps) for steps in maps]))

    return {PLAIN: plain, SESSION: session, EAGER: eager}


def check(shape: Shape, runs: dict[str, Callable[[], Answer]]) -> None:
    """The session changes no token, and its maps are eager's; in bf16 eager itself rounds and wanders off."""
    found = {name: run() for name, run in runs.items()}
    plain, session, eager = found[PLAIN], found[SESSION], found.get(EAGER)
    exact = shape.dtype == "float32"
    for name in (SESSION, EAGER) if exact and eager else (SESSION,):
        if not torch.equal(found[name].ids, plain.ids):
            raise WrongAnswer(
                f"{name}: expected the tokens {plain.ids.tolist()} of {PLAIN}, got {found[name].ids.tolist()}"
            )
    check_truth(SESSION, session.maps)
    if eager is None:
        return
    # Once their tokens part, the steps behind have other questions.
    steps = int((session.ids == eager.ids).long().cumprod(0).sum()) + 1
    bounds = {"relative": 2e-4, "correlation": 1 - 1e-6} if exact else {"relative": math.inf, "correlation": 0.98}
    check_maps(SESSION, session.maps[:, :steps], eager.maps[:, :steps], **bounds)


def price(shape: Shape, lengths: Iterable[int], new_tokens: int, *, rounds: int, advance: Callable[[str], None]) -> Any:
    """Seconds of each way, prefill alone and with decoding, after a check in float32 and one as it is timed."""
    exact = shape._replace(dtype="float32")
    check(exact, opponents(exact, CHECK_LENGTH, new_tokens))
    results = []
    for length in lengths:
        for count in (1, new_tokens):
            runs = opponents(shape, length, count)
            if not _eager_fits(shape, length):
                del runs[EAGER]
            check(shape, runs)
            seconds = paired(runs, rounds=rounds, before=as_it_comes)
            results.append(
                {
                    "length": length,
                    "new_tokens": count,
                    "seconds": {name: Spread.of(values)._asdict() for name, values in seconds.items()},
                    "ratio_to_plain": {
                        name: ratio(seconds, name, PLAIN)._asdict() for name in seconds if name != PLAIN
                    },
                }
            )
            advance(f"price S={length}, {count} new tokens")
    return results


def memory(shape: Shape, lengths: Iterable[int], *, rows: int, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Peaks of a prefill, plain, in a session and under eager, each in a process of its own."""
    results = []
    for length in lengths:
        plain = peak_in_fresh_process(PLAIN, shape, length, rows)
        session = peak_in_fresh_process(SESSION, shape, length, rows)
        fits = _eager_fits(shape, length)
        eager = peak_in_fresh_process(EAGER, shape, length, rows) if fits else None
        results.append(
            {
                "length": length,
                "rows": rows,
                "plain": plain._asdict(),
                "session_extra": {name: getattr(session, name) - getattr(plain, name) for name in plain._fields},
                "bound": rows * shape.heads * length * 4,
                "eager_measured": fits,
                "eager_extra": eager.tensors - plain.tensors if eager else eager_bytes(shape, length),
            }
        )
        advance(f"memory S={length}")
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    prices = Table("S", "new tokens", *(PLAIN, SESSION, EAGER), title="generate: s, and times plain")
    for line in results["price"]:
        cells = [_cell(line, name) for name in (PLAIN, SESSION, EAGER)]
        prices.add_row(str(line["length"]), str(line["new_tokens"]), *cells)
    peaks = Table(
        "S", "rows", "plain", "session: + tensors", "+ resident", "rows x heads x S x 4", "eager: + tensors",
        title="peak memory of a prefill: MiB",
    )  # fmt: skip
    for line in results["memory"]:
        extra = line["session_extra"]
        peaks.add_row(
            str(line["length"]), str(line["rows"]), f"{line['plain']['tensors'] / MIB:.1f}",
            f"{extra['tensors'] / MIB:.3f}", f"{extra['resident'] / MIB:.1f}", f"{line['bound'] / MIB:.3f}",
            f"{line['eager_extra'] / MIB:.1f}" + ("" if line["eager_measured"] else " (computed, matrices alone)"),
        )  # fmt: skip
    return [prices, peaks]


def _eager_fits(shape: Shape, length: int) -> bool:
    return eager_bytes(shape, length) < MEMORY_SHARE * kilobytes("/proc/meminfo", "MemAvailable")


def _cell(line: dict[str, Any], name: str) -> str:
    if name not in line["seconds"]:
        return "does not fit"
    cell = Spread(**line["seconds"][name]).show()
    if name in line["ratio_to_plain"]:
        cell += f"\nx {Spread(**line['ratio_to_plain'][name]).show(digits=4)}"
    return cell


@lru_cache(maxsize=1)
def _checked(dtype: str) -> dict[str, Callable[[], Answer]]:
    shape = Shape(4, 512, dtype)
    runs = opponents(shape, 512, 4)
    check(shape, runs)
    return runs


def pytest_generate_tests(metafunc: Any) -> None:
    if "opponent" in metafunc.fixturenames:
        metafunc.parametrize("dtype", ("float32", "bfloat16"))
        metafunc.parametrize("opponent", (PLAIN, SESSION, EAGER))


def test_generate(benchmark: Any, dtype: str, opponent: str) -> None:
    benchmark.group = dtype
    benchmark(_checked(dtype)[opponent])
