"""Sessions with `fused=True`: one operator attends and captures in decode steps, and maps and answers stay the same.

On a CPU the reference attends and captures.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from carve_kernels import BackendUnavailable, backends, capture_attention
from carve_kernels.hf import names
from carve_kernels.hf.model import attention_modules
from tests.support.families import STEPS, eager, family, generate, inputs_of, state
from tests.support.graphs import Operators
from tests.support.tiny_models import tiny_llava
from tests.support.windowed_models import model_of

FUSED: dict[str, Any] = {"backend": "reference", "fused": True}
OPERATOR = "carve_kernels.attend_layer_in.default"
TOKENS = [70, 45, 12, 33, 51]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines of the log on attention that is not fused, as in a new process."""
    monkeypatch.setattr(backends, "_warned", set())
    caplog.set_level(logging.INFO, "carve_kernels")
    return lambda: [record.getMessage() for record in caplog.records if "fused: " in record.getMessage()]


def counted(model: Any, inputs: Any, **options: Any) -> tuple[Any, Counter[str]]:
    with Operators() as operators:
        output = generate(model, inputs, **options)
    return output, Counter(operators.names)


@pytest.mark.parametrize(
    ("name", "batch", "cache"),
    [("llava", 1, "dynamic"), ("llava", 3, "dynamic"), ("llava", 3, "static"), ("qwen2_5_vl", 3, "static")],
)
def test_steps_attend_and_capture_in_one_operator(name: str, batch: int, cache: str, logged: Any) -> None:
    model, inputs = family(name)[0], inputs_of(name, batch)
    plain = generate(model, inputs, cache_implementation=cache)
    with capture_attention(model, layers=[0, 1, 3]) as separate:
        generate(model, inputs, cache_implementation=cache)
    unchanged = state(model)
    with capture_attention(model, layers=[0, 1, 3], **FUSED) as session:
        output, after = counted(model, inputs, cache_implementation=cache)
    assert state(model) == unchanged
    # The prefill and the layer that is not captured attend as before.
    assert after[OPERATOR] == 3 * (STEPS - 1) and after["carve_kernels.capture_layers_in.default"] == 1
    assert torch.equal(output.sequences, plain.sequences)
    assert torch.equal(output.logits[0], plain.logits[0]) and not torch.equal(output.logits[1], plain.logits[1])
    for one, other in zip(output.logits, plain.logits, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert session.maps.steps == separate.maps.steps and bool(session.maps.valid.all())
    assert torch.allclose(session.maps.values, separate.maps.values, rtol=1e-4, atol=1e-7)
    expected = eager(name, batch, cache)[1][:, [0, 1, 3]]
    assert torch.allclose(session.maps.values[:, :, :, 0], expected, rtol=1e-4, atol=1e-7)
    assert logged() == []


@pytest.mark.parametrize("layer_types", [None, ["full_attention", "sliding_attention"] * 2])
def test_sliding_windows(layer_types: list[str] | None) -> None:
    model = model_of("mistral") if layer_types is None else model_of("gemma3", layer_types=layer_types)
    model.set_attn_implementation("sdpa")
    ids = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    found = {}
    for options in ({}, FUSED):
        with torch.no_grad(), capture_attention(model, layers="all", tokens=list(range(4, 12)), **options) as session:
            answer = model.generate(**inputs)
        found[bool(options)] = answer, session.maps
    (answer, maps), (fused_answer, fused_maps) = found[False], found[True]
    assert torch.equal(fused_answer, answer) and torch.equal(fused_maps.valid, maps.valid)
    assert not bool(maps.valid.all())
    assert torch.allclose(fused_maps.values, maps.values, rtol=1e-4, atol=1e-7)


def test_a_map_is_there_when_its_layer_returns() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 3)
    calls: list[tuple[int, int]] = []
    last: list[torch.Tensor] = []

    def on_layer(layer: int, step: int, captured: Any) -> None:
        calls.append((layer, step))
        last.append(captured.maps.clone())

    with capture_attention(model, layers=[1, 2], on_layer=on_layer, **FUSED) as session:
        _, operators = counted(model, inputs, steps=3)
    assert operators[OPERATOR] == 4
    assert calls == [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (2, 2)]
    assert torch.equal(last[-1][:, 0], session.maps.values[:, 1, 2, 0])


def test_on_a_cpu_auto_calls_sdpa_and_capture(logged: Any) -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 3)
    plain = generate(model, inputs)
    with capture_attention(model, layers="all") as separate:
        generate(model, inputs)
    for _ in range(2):
        with capture_attention(model, layers="all", fused=True) as session:
            output = generate(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(output.logits, plain.logits, strict=True))
    assert torch.equal(session.maps.values, separate.maps.values)
    (line,) = logged()
    assert "its rows captured beside it: cpu cannot serve attention: no kernel" in line


def without_cache(model: Any, inputs: Any) -> None:
    generate(model, inputs, use_cache=False)


def with_gradients(model: Any, inputs: Any) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    for token in TOKENS[:2]:
        logits = model(input_ids=torch.full((1, 1), token), past_key_values=cache).logits
        (gradient,) = torch.autograd.grad(logits.sum(), attention_modules(model)[1].v_proj.weight, retain_graph=True)
        assert bool(gradient.any())


def with_a_mask_that_is_added(model: Any, inputs: Any) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        mask = torch.zeros(1, 1, 1, cache.get_seq_length() + 1)
        model(input_ids=torch.full((1, 1), 7), past_key_values=cache, attention_mask=mask)


UNFUSED: dict[str, tuple[str, Callable[[Any, Any], None]]] = {
    "no cache": ("a step has more than one row", without_cache),
    "gradients": ("needs a gradient", with_gradients),
    "an additive mask": ("the mask is added to the logits", with_a_mask_that_is_added),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_what_is_not_fused_is_captured_beside_the_attention(name: str, logged: Any) -> None:
    reason, run = UNFUSED[name]
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    maps = []
    for options in ({}, FUSED):
        with capture_attention(model, layers=[1, 2], **options) as session, Operators() as operators:
            run(model, inputs)
        assert OPERATOR not in operators.names
        maps.append(session.maps)
    assert len(maps[1].steps) > 1 and torch.allclose(maps[0].values, maps[1].values, rtol=1e-5, atol=1e-8)
    (line,) = logged()
    assert reason in line


@pytest.mark.parametrize(("implementation", "named"), [("eager", "is eager"), ("sdpa", "is sdpa")])
def test_another_attention_than_transformers_own_is_called(
    implementation: str, named: str, using: Any, logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    using(model, implementation)
    calls: list[int] = []
    if implementation == "sdpa":
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def replaced(*args: Any, **options: Any) -> Any:
            calls.append(1)
            return inner(*args, **options)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", replaced)  # type: ignore[arg-type]
    with capture_attention(model, layers="all", **FUSED) as session:
        generate(model, inputs)
    assert torch.allclose(session.maps.values[:, :, :, 0], eager("llava", 1, "dynamic")[1], rtol=1e-4, atol=1e-7)
    assert len(calls) >= (4 * STEPS if implementation == "sdpa" else 0)
    (line,) = logged()
    assert named in line


def test_dropout_is_not_fused(logged: Any) -> None:
    model, inputs = tiny_llava()[0], inputs_of("llava", 1)
    model.train()
    for module in attention_modules(model).values():
        module.attention_dropout = 0.5
    torch.manual_seed(5)
    plain = generate(model, inputs)
    with capture_attention(model, layers="all", **FUSED) as session:
        torch.manual_seed(5)
        output = generate(model, inputs)
    assert torch.equal(output.logits[-1], plain.logits[-1]) and len(session.maps.steps) == STEPS
    assert ["the attention has dropout" in line for line in logged()] == [True]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("batch", [1, 3])
def test_flash_attention_is_replaced_in_steps(monkeypatch: pytest.MonkeyPatch, window: int | None, batch: int) -> None:
    """By a stub that does what FlashAttention would, with a softcap and a window as its arguments."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    lengths: list[int] = []

    def stub(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **options: Any) -> Any:
        lengths.append(query.shape[2])
        row = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
        allowed = (torch.arange(key.shape[2]) <= row).expand(query.shape[0], 1, -1, -1)
        if window is not None:
            allowed = allowed & (torch.arange(key.shape[2]) > row - window)
        if mask is not None:
            allowed = allowed & mask.bool()[:, None, None]
        logits = 3.0 * torch.tanh(query @ key.repeat_interleave(2, 1).mT * scaling / 3.0)
        weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
        return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2).contiguous(), None

    model, inputs = tiny_llava()[0], inputs_of("llava", batch)
    for config in (model.config, model.config.text_config):
        monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    more = {"softcap": 3.0} | ({} if window is None else {"sliding_window": window})
    for module in attention_modules(model).values():
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *args, forward=forward, **given: forward(*args, **more, **given))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", stub)  # type: ignore[arg-type]
    plain = generate(model, inputs)
    with capture_attention(model, layers="all") as separate:
        generate(model, inputs)
    lengths.clear()
    monkeypatch.setattr(names, "is_own", lambda _attention: True)
    with capture_attention(model, layers="all", **FUSED) as session:
        output = generate(model, inputs)
    assert len(lengths) == 4 and 1 not in lengths
    for one, other in zip(output.logits, plain.logits, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(session.maps.valid, separate.maps.valid)
    assert torch.allclose(session.maps.values, separate.maps.values, rtol=1e-4, atol=1e-7)


def test_steps_beyond_max_steps_call_the_attention() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    with capture_attention(model, layers=[1], max_steps=3, **FUSED) as session:
        _, operators = counted(model, inputs)
    assert operators[OPERATOR] == 2 and session.maps.steps == (0, 1, 2)


def test_two_sessions_of_which_one_is_fused() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    expected = eager("llava", 1, "dynamic")[1]
    for first, second in (({}, FUSED), (FUSED, {}), (FUSED, FUSED)):
        with (
            capture_attention(model, layers=[1, 2], **first) as one,
            capture_attention(model, layers=[2, 3], **second) as other,
        ):
            _, operators = counted(model, inputs)
        # A layer of both is attended once.
        layers = {*(one.layers if first else ()), *(other.layers if second else ())}
        assert operators[OPERATOR] == len(layers) * (STEPS - 1)
        assert torch.allclose(one.maps.values[:, :, :, 0], expected[:, 1:3], rtol=1e-4, atol=1e-7)
        assert torch.allclose(other.maps.values[:, :, :, 0], expected[:, 2:4], rtol=1e-4, atol=1e-7)


def test_a_layer_that_is_not_fused_leaves_the_others_fused() -> None:
    """Layers before and after it are captured in the order in which they run."""
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    module = attention_modules(model)[1]
    forward = module.forward
    module.forward = lambda *args, **given: forward(*args, **{**given, "position_ids": None, "dropped": None})
    real = names.attention_options
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                names, "attention_options",
                lambda query, given: real(query, given)._replace(dropout=0.1 if "dropped" in given else 0.0),
            )  # fmt: skip
            with capture_attention(model, layers="all", **FUSED) as session:
                _, operators = counted(model, inputs)
    finally:
        del module.forward
    assert operators[OPERATOR] == 3 * (STEPS - 1)
    assert torch.allclose(session.maps.values[:, :, :, 0], eager("llava", 1, "dynamic")[1], rtol=1e-4, atol=1e-7)


def test_a_refused_step_attends_nothing_and_leaves_nothing() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    before = state(model)

    def evict(cache: Any, layer: int) -> None:
        of_layer = cache.layers[layer]
        of_layer.keys, of_layer.values = of_layer.keys[:, :, 1:], of_layer.values[:, :, 1:]

    with capture_attention(model, layers=[0, 1, 2], **FUSED) as session, torch.no_grad():
        cache = DynamicCache()
        model(**inputs, past_key_values=cache)
        # As a hook does that compresses the cache after each layer.
        hook = attention_modules(model)[0].register_forward_hook(lambda *_: evict(cache, 1))
        with Operators() as operators, pytest.raises(ValueError, match=r"^cache: layer 1 has .* keys, expected"):
            model(input_ids=torch.full((1, 1), 7), past_key_values=cache)
        hook.remove()
        assert operators.names.count(OPERATOR) == 1
        with pytest.raises(ValueError, match=r"^cache: "):
            print(session.maps)
        generate(model, inputs)
    assert state(model) == before
    expected = eager("llava", 1, "dynamic")[1][:, :3]
    assert torch.allclose(session.maps.values[:, :, :, 0], expected, rtol=1e-4, atol=1e-7)


AT_ONCE: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a number": (TypeError, "fused: expected True or False, got int 1", {"fused": 1}),
    "None": (TypeError, "fused: expected True or False, got NoneType None", {"fused": None}),
    "cpu": (BackendUnavailable, "fused: expected .*: cpu cannot serve attention", {"fused": True, "backend": "cpu"}),
    "triton": (BackendUnavailable, "fused: expected .*triton cannot", {"fused": True, "backend": "triton"}),
    "cuda": (BackendUnavailable, "fused: expected .*: cuda cannot", {"fused": True, "backend": "cuda"}),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_ONCE)
def test_refused_at_once(name: str) -> None:
    error, message, options = AT_ONCE[name]
    model = family("llava")[0]
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("the CUDA kernels are named on a CPU")
    before = state(model)
    with pytest.raises(error, match=message):
        capture_attention(model, layers=[0], **options)
    assert state(model) == before
    capture_attention(model, layers=[0], **{**options, "fused": False})
