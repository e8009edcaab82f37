"""What a session costs a whole model on a CPU, and what one call costs; see `python -m benchmarks cpu`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import bench_capture
from benchmarks.answers import WrongAnswer, check_truth
from benchmarks.cases import Case, problem, truth
from benchmarks.lines import Goal, Line, line
from benchmarks.models import VISUAL_SHARE, Shape, prompt, random_model
from benchmarks.timing import Run, Spread, as_it_comes, paired, ratio, warm
from carve_kernels import capture, capture_attention, contrast
from carve_kernels.hf.session.recording import Record

PLAIN, SESSION = "plain", "session"
CAPTURES, PREFILL, SDPA = "captures", "prefill", "sdpa prefill"
ROW_LENGTH = 2048
# Goals of a decode step, by the number of keys.
_STEP_GOALS = {2048: 1.02, 8192: 1.05}


class Decoder:
    """A model behind a cache of random keys and values, which every step makes one longer."""

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
        place = torch.full((3, 1, 1), self.length)
        self.length += 1
        with torch.no_grad():
            output = self.model(
                input_ids=torch.full((1, 1), 7), position_ids=place, past_key_values=self.cache, use_cache=True
            )
        return output.logits


def decode(shape: Shape, lengths: Iterable[int], *, rounds: int, advance: Callable[[str], None]) -> Iterator[Line]:
    """A step with six captured layers beside the same step of the same weights without, step by step."""
    model, other = random_model(shape, "sdpa"), random_model(shape, "sdpa")
    other.load_state_dict(model.state_dict(), assign=True)
    for length in lengths:
        plain, within = Decoder(model, shape, length), Decoder(other, shape, length)
        tokens = list(range(length // 10, length // 10 + int(VISUAL_SHARE * length)))
        with capture_attention(other, layers="paper", tokens=tokens, max_steps=rounds + 8) as session:
            for _ in range(3):
                if not torch.equal(plain(), within()):
                    raise WrongAnswer(f"{SESSION}, S={length}: expected the logits of {PLAIN}, got others")
            maps = session.maps.values[0, :, :, 0]
            if maps.shape[:2] != (len(session.layers), 3):
                raise WrongAnswer(f"{SESSION}: expected 3 steps of each layer, got {tuple(maps.shape)}")
            check_truth(SESSION, maps)
            seconds = paired({PLAIN: plain, SESSION: within}, rounds=rounds, before=as_it_comes)
            captured = len(session.layers)
        labels = {"layers": shape.layers, "captured": captured, "S": length, "threads": torch.get_num_threads()}
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
    """The summed time of the captures inside a prefill, and all that the session does there, as shares of it."""
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
    """Seconds of each call that a session makes in a captured layer: the gather of the rows and the kernel."""
    spent: list[float] = []
    honest = Record.record

    def timed(*args: Any) -> None:
        start = time.perf_counter()
        honest(*args)
        spent.append(time.perf_counter() - start)

    with patch.object(Record, "record", timed):
        yield spent


def one_row(length: int, *, budget: float, advance: Callable[[str], None]) -> Iterator[Line]:
    """One captured row of a layer of the 7B beside the attention of all rows of that layer."""
    case = Case("qwen2.5-vl-7b", length, 1, "bf16")
    given = problem(case)
    given = replace(given, key=given.key.contiguous())
    found = capture(given.query, given.key, given.tokens, **given.options).maps
    bench_capture.check_maps(str(case), found, truth(given), relative=1e-4, correlation=1 - 1e-6)
    key = given.key.repeat_interleave(given.group, 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    runs: dict[str, Run] = {
        bench_capture.AUTO: lambda: capture(given.query, given.key, given.tokens, **given.options),
        SDPA: lambda: attend(given.queries, key, key, is_causal=True, scale=given.scale),
    }
    seconds = paired(runs, rounds=51, before=warm, budget=2 * budget)
    labels = {"geometry": case.geometry, "S": length, "R": 1, "dtype": case.dtype, "threads": torch.get_num_threads()}
    goals = [Goal(bench_capture.AUTO, 0.003, most=True)]
    yield line(
        "one row: ms, and times the sdpa prefill of its layer",
        labels,
        {bench_capture.AUTO: ratio(seconds, bench_capture.AUTO, SDPA)},
        goals,
        seconds=seconds,
    )
    advance("one row")


def overhead(*, budget: float, advance: Callable[[str], None], calls: int = 200) -> Iterator[Line]:
    """What one call costs whose work is nothing, in microseconds."""
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 4, 16)
    tokens = torch.arange(4, dtype=torch.int32)[None]
    task, general = torch.rand(1, 1, 4), torch.rand(1, 1, 4)
    out = (torch.empty(1, 1, 4), torch.empty(1, 1), torch.empty(1, 1))
    operator = torch.ops.carve_kernels.capture_cpu
    found = capture(query, key, tokens, scale=0.25)
    runs: dict[str, tuple[Run, float]] = {
        "torch.ops capture_cpu": (
            lambda: operator([query], [key], tokens, None, None, [], None, 0.25, 0.0, 0, False, None, 0, *out),
            10.0,
        ),
        "capture": (lambda: capture(query, key, tokens, scale=0.25), 30.0),
        "contrast": (lambda: contrast(task, general, (2, 2), (4, 4)), 30.0),
    }
    runs["torch.ops capture_cpu"][0]()
    if not torch.equal(out[0], found.maps):
        raise WrongAnswer("torch.ops capture_cpu: expected the maps of capture, got others")
    many = {name: _many(run, calls) for name, (run, _) in runs.items()}
    seconds = paired(many, rounds=101, before=as_it_comes, budget=budget)
    for name, (_, limit) in runs.items():
        spread = Spread.of([1e6 * one / calls for one in seconds[name]])
        yield line("call overhead", {"call": name}, {"us": spread}, [Goal("us", limit, most=True)])
    advance("call overhead")


def _many(run: Run, calls: int) -> Run:
    def repeated() -> None:
        for _ in range(calls):
            run()

    return repeated
