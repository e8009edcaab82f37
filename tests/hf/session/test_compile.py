"""Compiled models and wrappers: one full graph, no recompilation per step, the same maps."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from carve_kernels import capture_attention
from tests.support.families import family, generate, inputs_of
from tests.support.graphs import pool_bytes
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


def test_a_compiled_step_has_one_more_operator_and_keeps_no_memory() -> None:
    torch._dynamo.reset()
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    graphs: list[Any] = []

    def keep(graph: Any, _examples: Any) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    decode(model, compiled, inputs, static(model))
    with capture_attention(compiled, layers="all") as session:
        cache = static(model)
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
            before = addresses(session)
            step = {"input_ids": torch.tensor([[7]]), "position_ids": inputs["input_ids"].new_tensor([[50]])}
            compiled(**step, past_key_values=cache, use_cache=True)
        # All that is kept was allocated before the step, in no memory pool of a graph.
        assert addresses(session) <= before
    plain, captured = (Counter(str(node.target) for node in graph.nodes if node.op[:4] == "call") for graph in graphs)
    assert captured - plain == Counter(["carve_kernels.capture_layers.default"]) and not plain - captured
    given = [node for node in graphs[1].find_nodes(op="placeholder") if "record" in node.name]
    # A graph takes static inputs where they are; it copies others, and their maps would be lost.
    assert len(given) == 8
    assert {node.meta["tensor_dict"].get("_dynamo_static_input_type") for node in given} == {"unguarded"}


def addresses(session: Any) -> set[int]:
    """The memory of the current record's tensors."""
    found: set[int] = set()
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, (list, tuple)):
            for each in value:
                walk(each)
        elif isinstance(value, dict):
            walk(list(value.values()))
        elif type(value).__module__.startswith("carve_kernels"):
            walk(vars(value))

    walk(session._trackers[0].record)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_cuda_graphs_of_a_compiled_step(backend: str) -> None:
    """Plain and captured graphs of one model share a pool, which keeps its size."""
    torch._dynamo.reset()
    model, inputs = tiny_llava()[0].cuda(), inputs_of("llava", 1).to("cuda")
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def run(step: Any, steps: int, session: bool) -> tuple[torch.Tensor, Any]:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=320)
        context = capture_attention(step, layers=[1, 2], backend=backend) if session else nullcontext()
        with torch.no_grad(), context as captured:
            logits = [model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]]
            for number in range(steps):
                if number == steps - 200:
                    sizes.append(pool_bytes())
                torch.compiler.cudagraph_mark_step_begin()
                token = logits[-1].argmax(-1)[:, None]
                logits.append(step(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].clone())
            sizes.append(pool_bytes())
        return torch.stack(logits, 1), captured

    sizes: list[int] = []
    plain, _ = run(compiled, DECODED, False)
    _, expected = run(model, DECODED, True)
    with torch._inductor.config.patch("triton.fast_path_cudagraph_asserts", True):
        for _ in range(3):
            logits, captured = run(compiled, DECODED, True)
            assert torch.allclose(logits, plain, rtol=1e-3, atol=1e-4)
            assert captured.maps.steps == expected.maps.steps and bool(captured.maps.valid.all())
            assert torch.allclose(captured.maps.values, expected.maps.values, rtol=2e-4, atol=1e-7)
            assert torch.allclose(run(compiled, DECODED, False)[0], plain, rtol=1e-3, atol=1e-4)
    sizes.clear()
    run(compiled, 210, True)
    assert sizes[0] == sizes[1]


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", [1, 3])
def test_static_generate_compiles_by_itself_on_a_gpu(prompts: int) -> None:
    torch._dynamo.reset()
    model, inputs = tiny_llava()[0].cuda(), inputs_of("llava", prompts).to("cuda")
    with capture_attention(model, layers=[0, 3]) as session:
        generate(model, inputs, cache_implementation="static", disable_compile=True)
    with capture_attention(model, layers=[0, 3]) as captured:
        for _ in range(2):
            generate(model, inputs, cache_implementation="static")
    assert hasattr(model, "_compiled_call")
    assert captured.maps.steps == session.maps.steps
    assert torch.allclose(captured.maps.values, session.maps.values, rtol=2e-4, atol=1e-7)


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
