"""Decode steps of a random model with a static cache: plain beside a session, eager, compiled and in CUDA graphs.

A model with the shape of a 7B decodes in one CUDA graph: plain, in a session, and in one with fused=True.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import engine
from benchmarks.gpu.timing import Clock, in_graph
from benchmarks.support.answers import WrongAnswer, check_truth, correlate
from benchmarks.support.lines import Goal, Line, line
from benchmarks.support.models import Shape, prompt, random_model
from benchmarks.support.timing import ratio
from carve_kernels import capture_attention

PLAIN, SESSION, FUSED = "plain", "session", "session, fused"
SHAPE, LENGTH, LAYERS = Shape(12, 1024, "bfloat16"), 4096, "paper"
EAGER, COMPILED, GRAPHS = "eager", "compiled", "CUDA graphs"
# How a step is called: the mode of torch.compile, None without it; the goal of a session's step in plain ones.
MODES: dict[str, tuple[str | None, float | None]] = {
    EAGER: (None, None),
    GRAPHS: ("reduce-overhead", 1.02),
    COMPILED: ("default", 1.03),
}
# The steps of the 7B, by one captured graph each; what they may take, in plain steps.
LARGE_SHAPE, IN_ONE_GRAPH = engine.SHAPE, "one CUDA graph"
LIMITS = {SESSION: 1.02, FUSED: 1.0}
# Steps before the first timed one; a graph is captured in the second or third.
WARM_UP = 6


class Steps:
    """Each call is one decode step after a prefill; the first one compiles."""

    def __init__(self, model: Any, mode: str | None, length: int, dtype: str, most: int, device: torch.device) -> None:
        from transformers import StaticCache

        self._step = model if mode is None else torch.compile(model, mode=mode)
        self._device, self._length = device, length
        config = model.config.get_text_config()
        self._cache = StaticCache(config=config, max_cache_len=length + most)
        inputs = {name: value.to(device) for name, value in prompt(length, dtype).items()}
        with torch.no_grad():
            model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def __call__(self) -> torch.Tensor:
        token = torch.full((1, 1), 7, device=self._device)
        position = torch.full((3, 1, 1), self._length, device=self._device)
        self._length += 1
        with torch.no_grad():
            output = self._step(input_ids=token, position_ids=position, past_key_values=self._cache, use_cache=True)
        return output.logits


def measure(how: str, shape: Shape, length: int, clock: Clock) -> Iterator[Line]:
    """A model in a session and the same model without, in turns; the logits and the maps are checked first."""
    mode, limit = MODES[how]
    torch.compiler.reset()
    skipped = _skipped_graphs()
    device = clock.device
    model, other = (random_model(shape, "sdpa", device=str(device)) for _ in range(2))
    other.load_state_dict(model.state_dict(), assign=True)
    most = WARM_UP + clock.rounds + 2
    plain = Steps(model, mode, length, shape.dtype, most, device)
    with capture_attention(other, layers=LAYERS, max_steps=most + 1) as session:
        captured = Steps(other, mode, length, shape.dtype, most, device)
        for _ in range(WARM_UP):
            # Replays of graphs overwrite their outputs.
            logits = plain().clone(), captured().clone()
            _same(how, *logits)
        _check(f"{SESSION}, {how}", session.maps)
        seconds = clock.called({PLAIN: plain, SESSION: captured}, clock.rounds)
        _check(f"{SESSION}, {how}", session.maps)
        count = len(session.layers)
    labels = {"how": how, "layers": shape.layers, "captured": count, "S": length}
    labels["compiled parts without a graph"] = _skipped_graphs() - skipped
    ratios = {SESSION: ratio(seconds, SESSION, PLAIN)}
    goals = [] if limit is None else [Goal(SESSION, limit, most=True)]
    yield line("decode step: ms, and times plain", labels, ratios, goals, seconds=seconds)


class GraphSteps:
    """One decode step after a prefill, of which each replay of a graph is the next; nothing of it is Python."""

    def __init__(self, model: Any, length: int, dtype: str, most: int, device: torch.device) -> None:
        from transformers import StaticCache

        self._model = model
        self._cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + most)
        self._token = torch.full((1, 1), 7, device=device)
        self._position = torch.full((3, 1, 1), length, device=device)
        inputs = {name: value.to(device) for name, value in prompt(length, dtype).items()}
        with torch.no_grad():
            model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self.logits: Any = None

    def __call__(self) -> None:
        with torch.no_grad():
            self.logits = self._model(
                input_ids=self._token, position_ids=self._position, past_key_values=self._cache, use_cache=True
            ).logits


class _FusedCalls(TorchDispatchMode):
    """Counts the calls of the operator that attends and captures."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "attend_layer" in str(function)
        return function(*args, **(kwargs or {}))


def measure_in_one_graph(shape: Shape, length: int, clock: Clock, backend: str = "auto") -> Iterator[Line]:
    """The step of one set of weights by three models in turns; the logits and the maps are checked first."""
    device = clock.device
    models = {PLAIN: random_model(shape, "sdpa", device=str(device))}
    options: dict[str, dict[str, Any]] = {SESSION: {}, FUSED: {"fused": True, "backend": backend}}
    for name in options:
        models[name] = random_model(shape, "sdpa", device=str(device))
        models[name].load_state_dict(models[PLAIN].state_dict(), assign=True)
    most = WARM_UP + clock.rounds + 2
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(capture_attention(models[name], layers=LAYERS, max_steps=most + 1, **more))
            for name, more in options.items()
        }
        steps = {name: GraphSteps(model, length, shape.dtype, most, device) for name, model in models.items()}
        with _FusedCalls() as calls:
            for step in steps.values():
                step()
        graphs = {name: in_graph(step, device) for name, step in steps.items()}
        for graph in graphs.values():
            graph()
        # The same kernels run with the first session, and others with the second.
        _same(EAGER, steps[PLAIN].logits, steps[SESSION].logits)
        _same(IN_ONE_GRAPH, steps[PLAIN].logits, steps[FUSED].logits)
        seconds = clock.replayed(graphs)
        maps = {name: session.maps for name, session in sessions.items()}
    for name, found in maps.items():
        _check(f"{name}, {IN_ONE_GRAPH}", found)
    if not correlate(maps[SESSION].values, maps[FUSED].values) >= 0.999:
        raise WrongAnswer(f"{FUSED}, {IN_ONE_GRAPH}: expected the maps of {SESSION}, got others")
    labels = {"how": IN_ONE_GRAPH, "layers": shape.layers, "captured": len(sessions[FUSED].layers), "S": length}
    labels["fused"] = calls.count
    ratios = {name: ratio(seconds, name, PLAIN) for name in LIMITS}
    goals = [Goal(name, limit, most=True) for name, limit in LIMITS.items()]
    yield line("decode step of a 7B: ms, and times plain", labels, ratios, goals, seconds=seconds)


def _skipped_graphs() -> int:
    """What inductor has compiled but not put into a CUDA graph, though its mode asks for one."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def _same(how: str, plain: torch.Tensor, captured: torch.Tensor) -> None:
    found = correlate(plain, captured)
    # Two compilations may round differently; without them the same kernels run.
    if not (torch.equal(plain, captured) if how == EAGER else found >= 0.999):
        raise WrongAnswer(f"{SESSION}, {how}: expected the logits of {PLAIN}, got others of correlation {found:.5f}")


def _check(name: str, maps: Any) -> None:
    if not bool(maps.valid.all()):
        raise WrongAnswer(f"{name}: expected a map of every step, got {int((~maps.valid).sum())} that are not valid")
    check_truth(name, maps.values[0, :, :, 0])
