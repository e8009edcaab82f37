"""Code of other packages in a model's forward: what rules out tree decoding, and what leaves tokens alone."""

from __future__ import annotations

import functools
import pkgutil
import types
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from carve_kernels import CarveEngine, Preset, capture_attention
from carve_kernels.hf.decoding import sequential_reason
from carve_kernels.hf.engine.fingerprint import Unidentified, fingerprint
from carve_kernels.hf.profile.candidate_maps import CandidateReader
from tests.support.families import as_written_in, family, watched
from tests.support.tiny_models import inputs_for, make_image, prompts_for, tiny_llava

QUESTION, OTHER = "what digit is red", "where is the square"
PHOTO = make_image(240, 160, 1)
PRESET = Preset.paper(layers=(1, 2), max_new_tokens=4)
UP = "model.language_model.layers.1.mlp.up_proj"


def nothing(*_: Any) -> None:
    """A hook that changes nothing, which cannot be known."""


def steer(_module: Any, _args: Any, output: Any) -> Any:
    """Steers the last row only."""
    states = output[0] if isinstance(output, tuple) else output
    states = states.clone()
    states[:, -1] += torch.linspace(-8, 8, states.shape[-1])
    return (states, *output[1:]) if isinstance(output, tuple) else states


def module(model: Any, name: str = UP) -> Any:
    return model.get_submodule(name)


def replace(model: Any, name: str, build: Callable[[Any], nn.Module]) -> None:
    model.set_submodule(name, build(module(model, name)))


def as_of(package: str, base: type, name: str, **members: Any) -> Any:
    """A class of a library that is not installed, by its names."""
    return type(name, (base,), {"__module__": package, **members})


def turn_into(package: str, name: str, **members: Any) -> Callable[[Any], None]:
    def turn(model: Any) -> None:
        forward = as_written_in(package, lambda self, x: nn.Linear.forward(self, x))
        module(model).__class__ = as_of(package, nn.Linear, name, forward=forward, **members)

    return turn


def with_weight(package: str, name: str, **attributes: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        weight = module(model).weight.detach().as_subclass(as_of(package, torch.Tensor, name))
        for key, value in attributes.items():
            setattr(weight, key, value)
        module(model).weight = None
        module(model).__dict__["weight"] = module(model)._parameters["weight"] = weight

    return change


def dynamic_int8(model: Any, only: type = nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model.model.language_model, {only}, dtype=torch.qint8)
    model.model.language_model = quantised.eval()


def class_wide(model: Any) -> None:
    """As packages that replace kernels in every layer do."""
    kind = as_of(type(module(model)).__module__, nn.Linear, "Patched")
    kind.forward = lambda self, x: nn.functional.linear(x, self.weight)
    module(model).__class__ = kind


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


CODE: dict[str, Callable[[Any], Any]] = {
    "hook": lambda model: module(model).register_forward_hook(nothing),
    "hook with kwargs": lambda model: module(model).register_forward_hook(nothing, with_kwargs=True, always_call=True),
    "pre-hook": lambda model: module(model).register_forward_pre_hook(nothing),
    "hook object": lambda model: module(model).register_forward_hook(functools.partial(nothing)),
    "method": lambda model: module(model).__dict__.update(
        forward=types.MethodType(lambda self, x: type(self).forward(self, x), module(model))
    ),
    "function": lambda model: setattr(
        module(model), "forward", functools.partial(type(module(model)).forward, module(model))
    ),
    "wrapper": lambda model: replace(model, UP, Wrapped),
    "class": class_wide,
}
LOCATIONS = {
    "head": "lm_head",
    "decoder": "model.language_model",
    "layer": "model.language_model.layers.2",
    "attention": "model.language_model.layers.3.self_attn",
    "norm": "model.language_model.norm",
    "tower": "model.vision_tower",
    "projector": "model.multi_modal_projector",
}
QUANTISED: dict[str, Callable[[Any], Any]] = {
    "torch dynamic int8": dynamic_int8,
    "bitsandbytes int8": turn_into("bitsandbytes.nn.modules", "Linear8bitLt"),
    "fbgemm": turn_into("transformers.integrations.fbgemm_fp8", "FbgemmFp8Linear"),
    "fp8": turn_into("transformers.integrations.finegrained_fp8", "FP8Linear"),
    "quanto": turn_into("optimum.quanto.nn.qlinear", "QLinear"),
    "torchao int8": with_weight("torchao.quantization", "Int8Tensor", act_quant_kwargs=object()),
    "torchao float8": with_weight("torchao.quantization", "Float8Tensor", act_quant_kwargs=object()),
    "torchao intx": with_weight("torchao.quantization", "IntxUnpackedToInt8Tensor", activation_quantization="int8"),
    "torchao of another version": with_weight("torchao.quantization", "Int8Tensor"),
    "torchao unknown": with_weight("torchao.quantization", "Int3Tensor"),
    "an unknown subclass": with_weight("theirs", "Int8Tensor", act_quant_kwargs=None),
}
HARMLESS: dict[str, Callable[[Any], Any]] = {
    "recorded outputs": lambda model: model(
        **inputs_of_model(model), output_hidden_states=True, output_attentions=False
    ),
    "parametrization": lambda model: parametrize.register_parametrization(
        module(model), "weight", Wrapped(nn.Identity())
    ),
    "pruning": lambda model: prune.l1_unstructured(module(model), "weight", amount=0.1),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(module(model)),
    "bitsandbytes 4 bits": turn_into("bitsandbytes.nn.modules", "Linear4bit"),
    "torchao weight-only": with_weight("torchao.quantization", "Int8Tensor", act_quant_kwargs=None),
    "torchao 4 bits": with_weight("torchao.quantization", "Int4TilePackedTo4dTensor"),
}


def inputs_of_model(model: Any) -> Any:
    return inputs_for(family("llava")[1], [PHOTO], [QUESTION])


@pytest.mark.parametrize("code", CODE)
def test_foreign_code_rules_out_tree_decoding(code: str) -> None:
    model, processor = tiny_llava()
    engine = CarveEngine(model, processor, preset=PRESET)
    fingerprint(model, processor)
    CODE[code](model)
    assert f"module {UP!r}" in (engine.sequential_reason or "") and engine.sequential_reason == sequential_reason(model)
    with pytest.raises(Unidentified, match="up_proj"):
        fingerprint(model, processor)


LLAMA = "transformers.models.llama.modeling_llama"


def wrap(function: Any) -> Any:
    """A wrapper with the name and the module of the function inside."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def decorate(function: Any) -> Any:
    """A decorator of transformers around a function."""
    return functools.wraps(function)(as_written_in("transformers.utils.generic", wrap(function)))


def put(path: str, name: str, build: Callable[[Any], Any] = wrap) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Replace a function of Python, transformers or torch."""

    def change(_: Any, patch: pytest.MonkeyPatch) -> None:
        target: Any = pkgutil.resolve_name(path)
        patch.setattr(target, name, build(getattr(target, name)), raising=False)

    return change


class Bound:
    """A foreign descriptor."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __get__(self, instance: Any, _: Any) -> Any:
        return functools.partial(self.function, instance)


def activation(function: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def change(model: Any, _: pytest.MonkeyPatch) -> None:
        mlp = module(model, UP.rpartition(".")[0])
        del mlp.act_fn
        mlp.act_fn = function

    return change


def entry(model: Any, patch: pytest.MonkeyPatch) -> None:
    registry = pkgutil.resolve_name(f"{LLAMA}:ALL_ATTENTION_FUNCTIONS")
    patch.setitem(registry._local_mapping, "sdpa", wrap(registry["sdpa"]))


# A part of the message, and the change.
REPLACED: dict[str, tuple[str, Callable[[Any, pytest.MonkeyPatch], None]]] = {
    "forward": ("mlp' runs a forward", put(f"{LLAMA}:LlamaMLP", "forward")),
    "inner forward": ("mlp' runs a forward", put(f"{LLAMA}:LlamaMLP", "forward", lambda f: decorate(wrap(f)))),
    "descriptor": ("mlp' runs a forward", put(f"{LLAMA}:LlamaMLP", "forward", Bound)),
    "call of a class": ("mlp' runs a __call__", put(f"{LLAMA}:LlamaMLP", "__call__")),
    "call of all modules": ("runs a __call__", put("torch.nn:Module", "__call__")),
    "call implementation": ("runs a _call_impl", put("torch.nn:Module", "_call_impl")),
    "method": ("LlavaModel.get_placeholder_mask", put(
        "transformers.models.llava.modeling_llava:LlavaModel", "get_placeholder_mask")),
    "function": ("modeling_llama.apply_rotary_pos_emb", put(LLAMA, "apply_rotary_pos_emb")),
    "function called by a function": ("modeling_llama.rotate_half", put(LLAMA, "rotate_half")),
    "imported function": ("modeling_llama.create_causal_mask", put(LLAMA, "create_causal_mask")),
    "attention function": ("'sdpa'", entry),
    "function of torch": ("functional.scaled_dot_product_attention", put(
        "torch.nn.functional", "scaled_dot_product_attention", lambda f: lambda *a, **k: f(*a, **k))),
    "lambda": ("mlp' holds code", activation(lambda x: nn.functional.silu(x))),
    "partial": ("mlp' holds code", activation(functools.partial(torch.add, torch.zeros(1), out=nothing))),
    "object": ("mlp' holds code", activation(type("Activation", (), {"__call__": steer})())),
}  # fmt: skip


@pytest.mark.parametrize("what", REPLACED)
def test_replaced_code_rules_out_tree_decoding(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_llava()
    reason, change = REPLACED[what]
    assert sequential_reason(model) is None
    change(model, monkeypatch)
    assert reason in (sequential_reason(model) or "")
    with pytest.raises(Unidentified):
        fingerprint(model, processor)


ALLOWED: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    "decorator of transformers": put(f"{LLAMA}:LlamaMLP", "forward", decorate),
    "function of torch": activation(torch.tanh),
    "function of torch in Python": activation(nn.functional.silu),
    "partial": activation(functools.partial(nn.functional.gelu, approximate="tanh")),
    "its own method": lambda model, _: setattr(module(model), "mine", module(model).extra_repr),
    "function that is not called": put(LLAMA, "LlamaForCausalLM"),
    "attention function of another name": lambda _, patch: patch.setitem(
        pkgutil.resolve_name(f"{LLAMA}:ALL_ATTENTION_FUNCTIONS")._local_mapping, "mine", nothing
    ),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_known_code_allows_tree_decoding(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()[0]
    ALLOWED[what](model, monkeypatch)
    assert sequential_reason(model) is None


@pytest.mark.parametrize("where", LOCATIONS)
def test_hooks_are_found_everywhere(where: str) -> None:
    model = family("llava")[0]
    assert sequential_reason(model) is None
    handle = module(model, LOCATIONS[where]).register_forward_pre_hook(nothing)
    reason = sequential_reason(model)
    handle.remove()
    assert repr(LOCATIONS[where]) in (reason or "") and "test_foreign_code.nothing" in (reason or "")
    assert sequential_reason(model) is None


@pytest.mark.parametrize(
    "register",
    [nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook],
    ids=["hook", "pre-hook"],
)
def test_hooks_on_all_modules_are_found(register: Any) -> None:
    model = family("llava")[0]
    handle = register(nothing)
    try:
        assert "test_foreign_code.nothing" in (sequential_reason(model) or "")
    finally:
        handle.remove()
    assert sequential_reason(model) is None


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_activations_rule_out_tree_decoding(method: str) -> None:
    model = tiny_llava()[0]
    assert sequential_reason(model) is None
    QUANTISED[method](model)
    assert "by other tokens" in (sequential_reason(model) or "")


@pytest.mark.parametrize("what", HARMLESS)
def test_harmless_code_allows_tree_decoding(what: str) -> None:
    model = tiny_llava()[0]
    HARMLESS[what](model)
    model.eval()
    assert sequential_reason(model) is None


MIXING: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "convolution": ("mixes tokens", lambda model: replace(model, UP, lambda _: nn.Conv1d(2, 2, 3).eval())),
    "recurrence": ("mixes tokens", lambda model: replace(model, UP, lambda _: nn.GRU(2, 2).eval())),
    "batch": ("normalises", lambda model: replace(model, UP, lambda _: nn.BatchNorm1d(2, track_running_stats=False))),
    "training": ("in training mode", lambda model: module(model).train()),
    "compiled": ("compiled in place", lambda model: module(model).compile(backend="eager")),
    "overridden generate": (
        "its own generate",
        lambda model: setattr(model, "prepare_inputs_for_generation", model.prepare_inputs_for_generation),
    ),
    "x-lora": ("XLORA", lambda model: setattr(model, "peft_config", {"a": SimpleNamespace(peft_type=named("XLORA"))})),
}  # fmt: skip


def named(value: str) -> Any:
    return SimpleNamespace(value=value)


@pytest.mark.parametrize("what", MIXING)
def test_mixing_tokens_rules_out_tree_decoding(what: str) -> None:
    reason, change = MIXING[what]
    model = tiny_llava()[0]
    change(model)
    assert reason in (sequential_reason(model) or "")


def test_an_adapter_on_a_wrapper() -> None:
    model = nn.DataParallel(wrapper := Wrapped(tiny_llava()[0]))
    wrapper._modules["module"] = wrapper._modules.pop("inner")
    wrapper.peft_config = {"a": SimpleNamespace(peft_type=named("LORA"))}
    assert sequential_reason(model) is None
    wrapper.peft_config = {"a": SimpleNamespace(peft_type=named("PREFIX_TUNING"), is_prompt_learning=True)}
    assert "virtual tokens" in (sequential_reason(model) or "")


def expected_of(model: Any, processor: Any, question: str) -> tuple[list[int], torch.Tensor]:
    """The answer and the maps of one prompt, without an engine."""
    inputs = inputs_for(processor, [PHOTO], [question])
    with capture_attention(model, layers=[1, 2]) as session, torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist(), session.maps.values


@pytest.mark.parametrize(
    "change", [dynamic_int8, lambda model: module(model, LOCATIONS["layer"]).register_forward_hook(steer)]
)
def test_questions_in_a_batch_have_their_own_answers_and_maps(change: Callable[[Any], Any]) -> None:
    model, processor = tiny_llava()
    change(model)
    results = CarveEngine(model, processor, preset=PRESET)([PHOTO, PHOTO], [QUESTION, OTHER])
    for question, result in zip((QUESTION, OTHER), results, strict=True):
        ids, maps = expected_of(model, processor, question)
        assert prompts_for(processor, [question]) == [result.prompt] and list(result.answer_ids) == ids
        assert float((result.task.values - maps).abs().max()) <= 1e-5 * float(maps.max())


def test_hooks_are_found_at_each_answer() -> None:
    model, processor = tiny_llava()
    engine = CarveEngine(model, processor, preset=PRESET)
    before = engine(PHOTO, QUESTION)
    handle = module(model, "model.language_model.layers.0").register_forward_hook(steer)
    steered = engine(PHOTO, QUESTION)
    expected = CarveEngine(model, processor, preset=PRESET, memory=False)(PHOTO, QUESTION)
    handle.remove()
    # No map from before the hook is reused, and none from under it.
    assert torch.equal(steered.general.values, expected.general.values)
    assert not torch.equal(steered.general.values, before.general.values)
    assert torch.equal(engine(PHOTO, QUESTION).general.values, before.general.values)


def test_a_candidate_reader_finds_hooks_at_each_image() -> None:
    model, processor = tiny_llava()
    reader = CandidateReader(model, processor, PRESET, ["last"], ["t_start"], "auto")
    with ExitStack() as stack:
        stack.callback(module(model, "model.language_model.layers.0").register_forward_hook(steer).remove)
        general, task = reader.read(PHOTO, OTHER, [QUESTION])
        for found, question in ((general, OTHER), (task, QUESTION)):
            maps = expected_of(model, processor, question)[1][0, :, 0, 0]
            off = found.maps["last"][[1, 2], 0] - maps
            assert float(off.abs().max()) <= 1e-5 * float(maps.max())


def test_layers_that_make_their_own_mask_decode_sequentially(caplog: pytest.LogCaptureFixture) -> None:
    """As sparse attention does, or a bias by distance."""
    model, processor = tiny_llava()
    attention = module(model, LOCATIONS["attention"])
    kind = type(attention)

    forward = kind.forward

    def masked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is attention and kwargs["attention_mask"] is not None:
            length = kwargs["hidden_states"].shape[1]
            kwargs["attention_mask"] = torch.zeros(1, 1, length, length)
        return forward(self, *args, **kwargs)

    kind.forward = functools.wraps(forward)(as_written_in(kind.__module__, masked))
    try:
        with caplog.at_level("INFO", logger="carve_kernels"):
            CarveEngine(model, processor, preset=PRESET, memory=False)(PHOTO, QUESTION)
    finally:
        kind.forward = forward
    assert "build an attention mask themselves" in caplog.text


def test_watching_a_module_by_its_class_leaves_no_trace() -> None:
    model = family("llava")[0]
    kind, calls = type(module(model)), []
    forward = kind.forward
    with watched(module(model), before=lambda *_: calls.append(1), after=lambda *_: calls.append(2)), torch.no_grad():
        assert sequential_reason(model) is None
        model(**inputs_of_model(model))
    assert calls == [1, 2] and kind.forward is forward and "forward" in kind.__dict__
