"""Fused steps in CUDA graphs and under torch.compile, by the reference, the emulated kernels, and those of a GPU."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from carve_kernels import backends, capture_attention
from tests.support.attended import CUDA, entered
from tests.support.families import family, inputs_of
from tests.support.graphs import Graphs, Operators, capturing
from tests.support.tiny_models import tiny_llava

FUSED: dict[str, Any] = {"backend": "reference", "fused": True}
OPERATOR = "carve_kernels.attend_layer_in.default"
TOKENS = [70, 45, 12, 33, 51]


class Steps:
    """A prefill and steps of a model with a static cache, one of which a graph may hold."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def prefill(self) -> None:
        inputs = {name: value.to(self.device) for name, value in inputs_of("llava", 1).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        del inputs["attention_mask"]
        with torch.no_grad():
            self.model(**inputs, past_key_values=self.cache, use_cache=True)

    def run(self) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits
        return logits

    def step(self, token: int) -> torch.Tensor:
        self.token.fill_(token)
        with torch.no_grad():
            return self.run().clone()


def of_steps(model: Any, device: torch.device, **options: Any) -> tuple[torch.Tensor, Any]:
    steps = Steps(model, device)
    with capture_attention(model, layers=[1, 2], **options) as session:
        steps.prefill()
        logits = torch.stack([steps.step(token) for token in TOKENS])
    return logits, session.maps


def in_graphs(model: Any, device: torch.device, **options: Any) -> tuple[torch.Tensor, Any]:
    """The same with all steps but the first by replays."""
    steps = Steps(model, device)
    with capture_attention(model, layers=[1, 2], **options) as session:
        steps.prefill()
        logits = [steps.step(TOKENS[0])]
        graph, replayed = Graphs(device).capture(steps.run)
        for token in TOKENS[1:]:
            steps.token.fill_(token)
            graph.replay()
            logits.append(replayed.clone())
    return torch.stack(logits), session.maps


def test_each_replay_of_a_graph_is_a_step() -> None:
    model = family("llava")[0]
    logits, maps = in_graphs(model, torch.device("cpu"), **FUSED)
    expected, unfused = of_steps(model, torch.device("cpu"))
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert maps.steps == unfused.steps and torch.allclose(maps.values, unfused.values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("static", [False, True])
def test_a_step_costs_few_operators_and_keeps_no_memory(static: bool) -> None:
    model, counts = family("llava")[0], []
    for options in (None, FUSED):
        steps = Steps(model, torch.device("cpu"))
        steps.cache = steps.cache if static else DynamicCache()
        with ExitStack() as stack:
            if options is not None:
                session = stack.enter_context(capture_attention(model, layers=[1, 2], **options))
            steps.prefill()
            for token in TOKENS[:3]:
                steps.token.fill_(token)
                with torch.no_grad(), Operators() as operators:
                    steps.run()
            gc.collect()
            if static:
                assert operators.left() == []
                if options is not None:
                    with torch.no_grad(), Operators() as in_graph, capturing():
                        steps.run()
                    gc.collect()
                    assert in_graph.left() == []
        counts.append(Counter(operators.names))
    plain, fused = counts
    assert fused[OPERATOR] == 2 and sum(plain.values()) > sum((plain & fused).values())
    assert plain["aten._local_scalar_dense.default"] + static == fused["aten._local_scalar_dense.default"]
    assert fused["aten.index_copy_.default"] == plain["aten.index_copy_.default"] + 1
    assert session.maps.steps == tuple(range(5 if static else 4)) or static


class Counting:
    """A compiler backend that counts operators, and runs the graphs unchanged."""

    def __init__(self) -> None:
        self.graphs = 0
        self.operators: Counter[str] = Counter()

    def __call__(self, graph: Any, _examples: Any) -> Any:
        self.graphs += 1
        self.operators.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward


def compiled_steps(model: Any, step: Any, **options: Any) -> tuple[torch.Tensor, Any]:
    """A prefill by a model, steps by another callable; all logits of the steps, and the maps."""
    inputs = dict(inputs_of("llava", 1))
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), capture_attention(step, layers=[1, 2], **options) as session:
        model(**inputs, past_key_values=cache, use_cache=True)
        logits = [
            step(
                input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True,
                position_ids=torch.tensor([[length + index]]),
            ).logits
            for index, token in enumerate(TOKENS)
        ]  # fmt: skip
    return torch.stack(logits), session.maps


@pytest.mark.parametrize("compiler", ["counting", "aot_eager"])
def test_a_compiled_step_attends_and_captures(compiler: str) -> None:
    torch._dynamo.reset()
    model, counting = family("llava")[0], Counting()
    compiled = torch.compile(model, fullgraph=True, backend=counting if compiler == "counting" else compiler)
    expected, unfused = compiled_steps(model, model)
    logits, maps = compiled_steps(model, compiled, **FUSED)
    if compiler == "counting":
        assert counting.graphs == 1 and counting.operators[OPERATOR] == 2
        assert not any("capture_layers" in name for name in counting.operators)
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)
    assert maps.steps == unfused.steps and bool(maps.valid.all())
    assert torch.allclose(maps.values, unfused.values, rtol=2e-4, atol=1e-7)


def test_on_a_cpu_a_compiled_step_has_the_attention_of_the_model() -> None:
    torch._dynamo.reset()
    model, counting = family("llava")[0], Counting()
    expected, unfused = compiled_steps(model, model)
    logits, maps = compiled_steps(model, torch.compile(model, fullgraph=True, backend=counting), fused=True)
    assert counting.graphs == 1 and not any("attend_layer" in name for name in counting.operators)
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(maps.values, unfused.values, rtol=2e-4, atol=1e-7)


def test_the_emulated_kernels_attend_in_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model, counting = tiny_llava()[0].to(torch.bfloat16), Counting()
    expected, unfused = compiled_steps(model, model)
    with entered(CUDA):
        monkeypatch.setitem(backends.PREFERRED, "cpu", ("cuda",))
        logits, maps = compiled_steps(model, torch.compile(model, fullgraph=True, backend=counting), fused=True)
    assert counting.graphs == 1 and counting.operators["carve_emulated.attend_layer.default"] == 2
    close_to(logits, expected, torch.bfloat16)
    assert torch.allclose(maps.values, unfused.values, rtol=0.1, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_emulated_kernels_attend_in_a_session(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()[0].to(dtype)
    expected, unfused = of_steps(model, torch.device("cpu"))
    with entered(CUDA):
        monkeypatch.setitem(backends.PREFERRED, "cpu", ("cuda",))
        for run in (of_steps, in_graphs):
            logits, maps = run(model, torch.device("cpu"), fused=True)
            assert not torch.equal(maps.values, unfused.values)
            close_to(logits, expected, dtype)
            assert torch.allclose(maps.values, unfused.values, rtol=0.1, atol=1e-5)


def close_to(logits: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal up to some roundings of the dtype, relative to the largest logit."""
    error = (logits - expected).abs().max() / expected.abs().max()
    assert float(error) <= 8 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [of_steps, in_graphs])
def test_steps_on_a_gpu(
    run: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    caplog.set_level(logging.INFO, "carve_kernels")
    device = torch.device("cuda")
    if reason := backends.why_not("attention", "cuda", device):
        pytest.skip(reason)
    model = tiny_llava()[0].to(device, dtype)
    expected, unfused = of_steps(model, device)
    logits, maps = run(model, device, fused=True)
    assert "fused: " not in caplog.text and not torch.equal(logits, expected)
    close_to(logits, expected, dtype)
    assert maps.steps == unfused.steps and bool(maps.valid.all())
    assert torch.allclose(maps.values, unfused.values, rtol=0.1, atol=1e-5)


@pytest.mark.gpu
def test_compiled_steps_in_cuda_graphs_on_a_gpu() -> None:
    torch._dynamo.reset()
    device = torch.device("cuda")
    if reason := backends.why_not("attention", "cuda", device):
        pytest.skip(reason)
    model = tiny_llava()[0].to(device, torch.bfloat16)
    expected, unfused = of_steps(model, device)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    steps = Steps(model, device)
    with capture_attention(compiled, layers=[1, 2], fused=True) as session:
        steps.prefill()
        steps.model = compiled
        logits = torch.stack([steps.step(token) for token in TOKENS])
    close_to(logits, expected, torch.bfloat16)
    assert session.maps.steps == unfused.steps and bool(session.maps.valid.all())
    assert torch.allclose(session.maps.values, unfused.values, rtol=0.1, atol=1e-5)
