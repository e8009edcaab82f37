"""Compiled models and wrappers: one full graph, no recompilation per step, the same maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from carve_kernels import capture_attention
from tests.support.families import family, generate, inputs_of
from tests.support.tiny_models import tiny_llava

DECODED = 5


class Counting:
    """A compiler backend that counts graphs and captures, and runs the graphs unchanged."""

    def __init__(self) -> None:
        self.graphs = 0
        self.captures = 0

    def __call__(self, graph: Any, _examples: Any) -> Any:
        self.graphs += 1
        self.captures += sum("capture_layers" in str(node.target) for node in graph.graph.nodes)
        return graph.forward


def decode(prefill: Any, step: Any, inputs: Any, cache: Any) -> torch.Tensor:
    """A prefill by one callable, greedy steps by another; all logits."""
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = [prefill(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
        for index in range(DECODED):
            output = step(
                input_ids=logits[-1].argmax(-1)[:, None],
                past_key_values=cache,
                use_cache=True,
                position_ids=torch.tensor([[length + index]]),
            )
            logits.append(output.logits[:, -1])
    return torch.stack(logits, 1)


def static(model: Any) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=100)


# aot_eager is inductor without its C++, which takes a minute to compile.
@pytest.mark.parametrize("backend", ["counting", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_decode_step_is_one_graph_at_any_step(backend: str) -> None:
    torch._dynamo.reset()
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    counting = Counting()
    compiled = torch.compile(model, fullgraph=True, backend=counting if backend == "counting" else backend)
    plain = decode(model, compiled, inputs, static(model))
    with capture_attention(model, layers=[1, 2]) as session:
        expected = decode(model, model, inputs, static(model))
    counting.graphs = 0
    with capture_attention(compiled, layers=[1, 2]) as captured:
        logits = decode(model, compiled, inputs, static(model))
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)
    if backend == "counting":
        assert torch.equal(logits, plain) and (counting.graphs, counting.captures) == (1, 1)
    assert captured.maps.steps == session.maps.steps == tuple(range(DECODED + 1))
    assert bool(captured.maps.valid.all())
    assert torch.allclose(captured.maps.values, session.maps.values, rtol=2e-4, atol=1e-7)
    counting.graphs = 0
    with capture_attention(compiled, layers=[1, 2]) as repeated:
        decode(model, compiled, inputs, static(model))
    assert counting.graphs == 0
    assert torch.equal(repeated.maps.values, captured.maps.values)
    assert torch.equal(decode(model, compiled, inputs, static(model)), plain)


def test_a_growing_cache_compiles_too() -> None:
    torch._dynamo.reset()
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=Counting())
    with capture_attention(model, layers=[1, 2]) as session:
        decode(model, model, inputs, DynamicCache())
    with capture_attention(compiled, layers=[1, 2]) as captured:
        decode(model, compiled, inputs, DynamicCache())
    assert torch.allclose(captured.maps.values, session.maps.values, rtol=2e-4, atol=1e-7)


def test_a_model_compiled_in_place() -> None:
    torch._dynamo.reset()
    model, inputs = tiny_llava()[0], inputs_of("llava", 1)
    with capture_attention(model, layers="all") as session:
        decode(model, model, inputs, static(model))
    model.compile(backend=Counting())
    before = model._compiled_call_impl
    with capture_attention(model, layers="all") as captured:
        decode(model, model, inputs, static(model))
    assert model._compiled_call_impl is before
    assert captured.maps.steps == session.maps.steps
    assert torch.allclose(captured.maps.values, session.maps.values, rtol=2e-4, atol=1e-7)


def test_generate_that_compiles_by_itself() -> None:
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, inputs = tiny_llava()[0], inputs_of("llava", 1)
    with capture_attention(model, layers=[0, 3]) as session:
        generate(model, inputs, cache_implementation="static")
    config = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config._compile_all_devices = True
    with capture_attention(model, layers=[0, 3]) as captured:
        generate(model, inputs, cache_implementation="static", compile_config=config)
    assert hasattr(model, "_compiled_call")
    assert captured.maps.steps == session.maps.steps
    assert torch.allclose(captured.maps.values, session.maps.values, rtol=2e-4, atol=1e-7)


class Wrapped(torch.nn.Module):
    """Wraps like DistributedDataParallel: the model is its `module`."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Adapter(torch.nn.Module):
    """Wraps like PEFT: calls `forward` of the inner model without its hooks, and its `generate`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.generate(*args, **kwargs)


@pytest.mark.parametrize("wrapper", [Wrapped, Adapter])
def test_wrappers_are_unwrapped(wrapper: Any) -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 3)
    with torch.no_grad(), capture_attention(model, layers="all") as session:
        model(**inputs)
    wrapped = wrapper(model)
    with torch.no_grad(), capture_attention(wrapped, layers="all") as captured:
        wrapped(**inputs)
    assert torch.equal(captured.maps.values, session.maps.values)
    assert not wrapped._forward_pre_hooks and not wrapped._forward_hooks
    if wrapper is Adapter:
        with capture_attention(wrapped, layers="all") as captured:
            generate(wrapped, inputs)
        assert len(captured.maps.steps) == 5
