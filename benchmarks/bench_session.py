"""The cost of a session in a whole model: seconds against a plain `generate`, decode steps, peak memory.

`python -m benchmarks session` prints the tables; `pytest benchmarks/bench_session.py` times the runs one by one, on a
smaller model.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.table import Table

from benchmarks.support.answers import PEAK, WrongAnswer, check_maps, check_truth
from benchmarks.support.lines import Goal, Line, line
from benchmarks.support.machine import kilobytes
from benchmarks.support.memory import EAGER, PLAIN, SESSION, eager_bytes, peak_in_fresh_process
from benchmarks.support.models import VISUAL_SHARE, Shape, noise, prompt, random_model, twin
from benchmarks.support.timing import Spread, no_preparation, paired, ratio
from benchmarks.support.user_opponent import UserOpponent
from carve_kernels import capture_attention, load
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.session.recording import Record

LAYERS = "paper"
CAPTURES, PREFILL = "captures", "prefill"
# Goals of a decode step, by the number of keys.
_STEP_GOALS = {2048: 1.02, 8192: 1.05}
# Long enough for a map with a peak, short enough for a check in float32.
CHECK_LENGTH = 256
# A checkpoint need not have a peak in each row of its maps, as the random model does; a flat map is refused.
CHECKPOINT_PEAK = 1.05
QUESTION = "What is in the image?"
# Pixels of a side of the image that a checkpoint is shown.
SIDE, QUICK_SIDE = 896, 112
# Above this share of the free memory, the size of eager's matrices is computed instead of measured.
MEMORY_SHARE = 0.5
MIB = 2**20


class Answer(NamedTuple):
    """New tokens [T], and the maps [L, T, N], empty where there are none."""

    ids: torch.Tensor
    maps: torch.Tensor


class Subject(NamedTuple):
    """A model, the inputs of one prompt, and the columns [N] of its visual tokens."""

    model: Any
    inputs: dict[str, torch.Tensor]
    tokens: torch.Tensor

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1])

    @property
    def eager_bytes(self) -> int:
        config = self.model.config.get_text_config()
        size = self.model.dtype.itemsize
        return int(config.num_hidden_layers * config.num_attention_heads * self.length**2 * size)


def opponents(
    shape: Shape, length: int, new_tokens: int, user: UserOpponent | None = None
) -> dict[str, Callable[[], Answer]]:
    """`generate` with a dynamic cache: plain with sdpa, in a session, and with eager and output_attentions."""
    inputs = prompt(length, shape.dtype)
    tokens = inputs["mm_token_type_ids"][0].nonzero()[:, 0]
    return of_subject(Subject(random_model(shape, "sdpa"), inputs, tokens), new_tokens, user)


def of_checkpoint(directory: Path, side: int) -> Subject:
    """A checkpoint in its own dtype with an image of noise and a question; its answers never end early."""
    model, processor = load(directory)
    model.generation_config.eos_token_id = None
    inputs = dict(prepare(processor, [noise(side)], build_prompt(processor, QUESTION)))
    with torch.no_grad(), capture_attention(model, layers=LAYERS) as session:
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
    return Subject(model, inputs, session.maps.tokens[0].long())


def of_subject(subject: Subject, new_tokens: int, user: UserOpponent | None = None) -> dict[str, Callable[[], Answer]]:
    """The opponents on one model; each of eager and the user's function has a model of its own with these weights."""
    model, inputs, tokens = subject
    length = subject.length
    other = twin(model)
    other.set_attn_implementation("eager")

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
        for step, layer in product(output.attentions, layers):
            if len(step) <= layer or step[layer] is None or step[layer].shape[-1] < length:
                raise WrongAnswer(f"{EAGER}: layer {layer} has no probabilities of the whole prompt to check maps with")
        maps = [[step[layer][0, :, -1, tokens].float().mean(0) for step in output.attentions] for layer in layers]
        return Answer(output.sequences[0, length:], torch.stack([torch.stack(steps) for steps in maps]))

    layers = capture_attention(other, layers=LAYERS).layers
    runs = {PLAIN: plain, SESSION: session, EAGER: eager}
    if user is not None:
        own_model, own_inputs = twin(model), copy.deepcopy(inputs)

        def own() -> Answer:
            return Answer(*user(own_model, own_inputs, layers=layers, tokens=tokens, new_tokens=new_tokens))

        runs[user.name] = own
    return runs


def check(runs: dict[str, Callable[[], Answer]], *, exact: bool, peak: float = PEAK) -> None:
    """A session changes no token, and its maps equal eager's; in bf16, eager's own rounding moves its tokens.

    The user's function is checked last, against the session, which must give the same answer after it.
    """
    users = [name for name in runs if name not in (PLAIN, SESSION, EAGER)]
    answers = {name: run() for name, run in runs.items() if name not in users}
    plain, session, eager = answers[PLAIN], answers[SESSION], answers.get(EAGER)
    for name in (SESSION, EAGER) if exact and eager else (SESSION,):
        _same_ids(name, answers[name], plain)
    check_truth(SESSION, session.maps, peak)
    if eager is not None:
        _same_maps(SESSION, session, eager, exact)
    for name in users:
        user = runs[name]()
        if exact or len(user.ids) != len(plain.ids):
            _same_ids(name, user, plain)
        if user.maps.shape != session.maps.shape:
            raise WrongAnswer(
                f"{name}: expected maps [L, T, N] {tuple(session.maps.shape)}, got {tuple(user.maps.shape)}"
            )
        _same_maps(name, user, session, exact)
        again = runs[SESSION]()
        if not (torch.equal(again.ids, session.ids) and torch.allclose(again.maps, session.maps, rtol=1e-4, atol=0)):
            raise WrongAnswer(f"{name}: {SESSION} gives another answer after it; it must leave others as they are")


def _same_ids(name: str, answer: Answer, plain: Answer) -> None:
    if not torch.equal(answer.ids, plain.ids):
        raise WrongAnswer(f"{name}: expected the tokens {plain.ids.tolist()} of {PLAIN}, got {answer.ids.tolist()}")


def _same_maps(name: str, answer: Answer, truth: Answer, exact: bool) -> None:
    # After the first different token, the steps have different inputs.
    steps = int((answer.ids == truth.ids).long().cumprod(0).sum()) + 1
    bounds = {"relative": 2e-4, "correlation": 1 - 1e-6} if exact else {"relative": math.inf, "correlation": 0.98}
    check_maps(name, answer.maps[:, :steps], truth.maps[:, :steps], **bounds)


def price(
    shape: Shape,
    lengths: Iterable[int],
    new_tokens: int,
    *,
    rounds: int,
    advance: Callable[[str], None],
    user: UserOpponent | None = None,
) -> Any:
    """Seconds of each opponent, for the prefill and with decoding, after checks in float32 and in the timed dtype."""
    exact = shape._replace(dtype="float32")
    more = (user,) if user is not None else ()
    check(opponents(exact, CHECK_LENGTH, new_tokens, *more), exact=True)
    results = []
    for length in lengths:
        for count in (1, new_tokens):
            runs = opponents(shape, length, count, *more)
            if not _eager_fits(shape, length):
                del runs[EAGER]
            check(runs, exact=shape.dtype == "float32")
            results.append(_priced(runs, length, count, rounds))
            advance(f"price S={length}, {count} new tokens")
    return results


def price_of_checkpoint(
    subject: Subject, new_tokens: int, *, rounds: int, advance: Callable[[str], None], user: UserOpponent | None = None
) -> Any:
    """The same for a checkpoint, checked in its own dtype; without eager there is no check, so that it must fit."""
    available = kilobytes("/proc/meminfo", "MemAvailable")
    if subject.eager_bytes >= MEMORY_SHARE * available:
        raise WrongAnswer(
            f"--model: the check needs {subject.eager_bytes / MIB:.0f} MiB for the probabilities of eager, "
            f"and {available / MIB:.0f} MiB are free"
        )
    results = []
    for count in (1, new_tokens):
        runs = of_subject(subject, count, user)
        check(runs, exact=subject.model.dtype == torch.float32, peak=CHECKPOINT_PEAK)
        results.append(_priced(runs, subject.length, count, rounds))
        advance(f"price S={subject.length}, {count} new tokens")
    return results


def _priced(runs: dict[str, Callable[[], Answer]], length: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    seconds = paired(runs, rounds=rounds, before=no_preparation)
    return {
        "length": length,
        "new_tokens": new_tokens,
        "seconds": {name: Spread.of(values)._asdict() for name, values in seconds.items()},
        "ratio_to_plain": {name: ratio(seconds, name, PLAIN)._asdict() for name in seconds if name != PLAIN},
    }


def memory(shape: Shape, lengths: Iterable[int], *, rows: int, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Peaks of a prefill, plain, in a session and with eager, each in a new process."""
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


class Decoder:
    """A model with a cache of random keys and values; each call is one decode step."""

    def __init__(self, model: Any, shape: Shape, length: int) -> None:
        from transformers import DynamicCache

        self.model, self.length = model, length
        self.cache = DynamicCache(config=model.config.get_text_config())
        random = torch.Generator().manual_seed(length)
        size = model.config.get_text_config().hidden_size // shape.heads
        for layer in range(shape.layers):
            keys, values = torch.randn(2, 1, shape.key_heads, length, size, generator=random).bfloat16()
            self.cache.update(keys, values, layer)

    def __call__(self) -> torch.Tensor:
        position = torch.full((3, 1, 1), self.length)
        self.length += 1
        with torch.no_grad():
            output = self.model(
                input_ids=torch.full((1, 1), 7), position_ids=position, past_key_values=self.cache, use_cache=True
            )
        return output.logits


def decode(shape: Shape, lengths: Iterable[int], *, rounds: int, advance: Callable[[str], None]) -> Iterator[Line]:
    """A step with six captured layers against the same step without, in turns."""
    model, other = random_model(shape, "sdpa"), random_model(shape, "sdpa")
    other.load_state_dict(model.state_dict(), assign=True)
    for length in lengths:
        plain, captured = Decoder(model, shape, length), Decoder(other, shape, length)
        tokens = list(range(length // 10, length // 10 + int(VISUAL_SHARE * length)))
        with capture_attention(other, layers="paper", tokens=tokens, max_steps=rounds + 8) as session:
            for _ in range(3):
                if not torch.equal(plain(), captured()):
                    raise WrongAnswer(f"{SESSION}, S={length}: expected the logits of {PLAIN}, got others")
            maps = session.maps.values[0, :, :, 0]
            if maps.shape[:2] != (len(session.layers), 3):
                raise WrongAnswer(f"{SESSION}: expected 3 steps of each layer, got {tuple(maps.shape)}")
            check_truth(SESSION, maps)
            seconds = paired({PLAIN: plain, SESSION: captured}, rounds=rounds, before=no_preparation)
        count = len(session.layers)
        labels = {"layers": shape.layers, "captured": count, "S": length, "threads": torch.get_num_threads()}
        goals = [Goal(SESSION, _STEP_GOALS[length], most=True)] if length in _STEP_GOALS else []
        yield line(
            "decode step: ms, and times plain",
            labels,
            {SESSION: ratio(seconds, SESSION, PLAIN)},
            goals,
            seconds=seconds,
        )
        advance(f"decode step, S={length}")


def prefill(shape: Shape, length: int, *, rounds: int, advance: Callable[[str], None]) -> Iterator[Line]:
    """The total time of the captures in a prefill, as a share of it."""
    model = random_model(shape, "sdpa")
    inputs = prompt(length, shape.dtype)
    with torch.no_grad(), capture_attention(model, layers="paper") as session, _summed() as spent:

        def run() -> None:
            model(**inputs, use_cache=True, logits_to_keep=1)

        run()
        check_truth(PREFILL, session.maps.values[0, :, :, 0])
        spent.clear()
        whole: list[float] = []
        sums: list[float] = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            whole.append(time.perf_counter() - start)
            sums.append(sum(spent))
            spent.clear()
    seconds = {CAPTURES: sums, PREFILL: whole}
    labels = {"layers": shape.layers, "S": length, "threads": torch.get_num_threads()}
    goals = [Goal(CAPTURES, 0.002, most=True)]
    yield line(
        "captures of a prefill: ms, and times the prefill",
        labels,
        {CAPTURES: ratio(seconds, CAPTURES, PREFILL)},
        goals,
        seconds=seconds,
    )
    advance(f"prefill, S={length}")


@contextmanager
def _summed() -> Iterator[list[float]]:
    """Seconds of each call of a session in a captured layer: the gather of the rows and the kernel."""
    spent: list[float] = []
    record = Record.record

    def timed(*args: Any) -> None:
        start = time.perf_counter()
        record(*args)
        spent.append(time.perf_counter() - start)

    with patch.object(Record, "record", timed):
        yield spent


def tables(results: dict[str, Any]) -> list[Table]:
    names = list(
        dict.fromkeys((PLAIN, SESSION, EAGER, *(name for entry in results["price"] for name in entry["seconds"])))
    )
    prices = Table("S", "new tokens", *names, title="generate: s, and times plain")
    for entry in results["price"]:
        cells = [_cell(entry, name) for name in names]
        prices.add_row(str(entry["length"]), str(entry["new_tokens"]), *cells)
    peaks = Table(
        "S", "rows", "plain", "session: + tensors", "+ resident", "rows x heads x S x 4", "eager: + tensors",
        title="peak memory of a prefill: MiB",
    )  # fmt: skip
    for entry in results["memory"]:
        extra = entry["session_extra"]
        peaks.add_row(
            str(entry["length"]), str(entry["rows"]), f"{entry['plain']['tensors'] / MIB:.1f}",
            f"{extra['tensors'] / MIB:.3f}", f"{extra['resident'] / MIB:.1f}", f"{entry['bound'] / MIB:.3f}",
            f"{entry['eager_extra'] / MIB:.1f}" + ("" if entry["eager_measured"] else " (computed, only the matrices)"),
        )  # fmt: skip
    return [prices, peaks] if results["memory"] else [prices]


def _eager_fits(shape: Shape, length: int) -> bool:
    return eager_bytes(shape, length) < MEMORY_SHARE * kilobytes("/proc/meminfo", "MemAvailable")


def _cell(entry: dict[str, Any], name: str) -> str:
    if name not in entry["seconds"]:
        return "does not fit"
    cell = Spread(**entry["seconds"][name]).show()
    if name in entry["ratio_to_plain"]:
        cell += f"\nx {Spread(**entry['ratio_to_plain'][name]).show(digits=4)}"
    return cell


@lru_cache(maxsize=1)
def _checked(dtype: str) -> dict[str, Callable[[], Answer]]:
    shape = Shape(4, 512, dtype)
    runs = opponents(shape, 512, 4)
    check(runs, exact=dtype == "float32")
    return runs


def pytest_generate_tests(metafunc: Any) -> None:
    if "opponent" in metafunc.fixturenames:
        metafunc.parametrize("dtype", ("float32", "bfloat16"))
        metafunc.parametrize("opponent", (PLAIN, SESSION, EAGER))


def test_generate(benchmark: Any, dtype: str, opponent: str) -> None:
    benchmark.group = dtype
    benchmark(_checked(dtype)[opponent])
