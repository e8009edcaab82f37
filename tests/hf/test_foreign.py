"""What other code puts on a model: which of it keeps prompts apart, and which does nothing to a token."""

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
from tests.support.tiny_models import inputs_for, picture, prompts_for, tiny_llava

QUESTION, OTHER = "what digit is red", "where is the square"
PHOTO = picture(240, 160, 1)
PRESET = Preset.paper(layers=(1, 2), max_new_tokens=4)
UP = "model.language_model.layers.1.mlp.up_proj"


def nothing(*_: Any) -> None:
    """A hook that changes nothing; nobody can know."""


def steer(_module: Any, _args: Any, output: Any) -> Any:
    """As steering vectors do: the last row alone."""
    states = output[0] if isinstance(output, tuple) else output
    states = states.clone()
    states[:, -1] += torch.linspace(-8, 8, states.shape[-1])
    return (states, *output[1:]) if isinstance(output, tuple) else states


def part(model: Any, name: str = UP) -> Any:
    return model.get_submodule(name)


def replaced(model: Any, name: str, made: Callable[[Any], nn.Module]) -> None:
    model.set_submodule(name, made(part(model, name)))


def as_of(package: str, base: type, name: str, **members: Any) -> Any:
    """A class of a library that is not installed, by its names."""
    return type(name, (base,), {"__module__": package, **members})


def turned_into(package: str, name: str, **members: Any) -> Callable[[Any], None]:
    def turn(model: Any) -> None:
        forward = as_written_in(package, lambda self, x: nn.Linear.forward(self, x))
        part(model).__class__ = as_of(package, nn.Linear, name, forward=forward, **members)

    return turn


def holding(package: str, name: str, **says: Any) -> Callable[[Any], None]:
    def hold(model: Any) -> None:
        weight = part(model).weight.detach().as_subclass(as_of(package, torch.Tensor, name))
        for key, value in says.items():
            setattr(weight, key, value)
        part(model).weight = None
        part(model).__dict__["weight"] = part(model)._parameters["weight"] = weight

    return hold


def dynamic_int8(model: Any, only: type = nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model.model.language_model, {only}, dtype=torch.qint8)
    model.model.language_model = quantised.eval()


def class_wide(model: Any) -> None:
    """As some packages put kernels of theirs into every layer."""
    kind = as_of(type(part(model)).__module__, nn.Linear, "Patched")
    kind.forward = lambda self, x: nn.functional.linear(x, self.weight)
    part(model).__class__ = kind


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


CODE: dict[str, Callable[[Any], Any]] = {
    "hook": lambda model: part(model).register_forward_hook(nothing),
    "hook with kwargs": lambda model: part(model).register_forward_hook(nothing, with_kwargs=True, always_call=True),
    "pre-hook": lambda model: part(model).register_forward_pre_hook(nothing),
    "hook object": lambda model: part(model).register_forward_hook(functools.partial(nothing)),
    "method": lambda model: part(model).__dict__.update(
        forward=types.MethodType(lambda self, x: type(self).forward(self, x), part(model))
    ),
    "function": lambda model: setattr(
        part(model), "forward", functools.partial(type(part(model)).forward, part(model))
    ),
    "wrapper": lambda model: replaced(model, UP, Wrapped),
    "class": class_wide,
}
ELSEWHERE = {
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
    "bitsandbytes int8": turned_into("bitsandbytes.nn.modules", "Linear8bitLt"),
    "fbgemm": turned_into("transformers.integrations.fbgemm_fp8", "FbgemmFp8Linear"),
    "fp8": turned_into("transformers.integrations.finegrained_fp8", "FP8Linear"),
    "quanto": turned_into("optimum.quanto.nn.qlinear", "QLinear"),
    "torchao int8": holding("torchao.quantization", "Int8Tensor", act_quant_kwargs=object()),
    "torchao float8": holding("torchao.quantization", "Float8Tensor", act_quant_kwargs=object()),
    "torchao intx": holding("torchao.quantization", "IntxUnpackedToInt8Tensor", activation_quantization="int8"),
    "torchao of another version": holding("torchao.quantization", "Int8Tensor"),
    "torchao unknown": holding("torchao.quantization", "Int3Tensor"),
    "a subclass of somebody's": holding("theirs", "Int8Tensor", act_quant_kwargs=None),
}
HARMLESS: dict[str, Callable[[Any], Any]] = {
    "notes of outputs": lambda model: model(
        **inputs_of_model(model), output_hidden_states=True, output_attentions=False
    ),
    "parametrization": lambda model: parametrize.register_parametrization(
        part(model), "weight", Wrapped(nn.Identity())
    ),
    "pruning": lambda model: prune.l1_unstructured(part(model), "weight", amount=0.1),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(part(model)),
    "bitsandbytes four bits": turned_into("bitsandbytes.nn.modules", "Linear4bit"),
    "torchao weights alone": holding("torchao.quantization", "Int8Tensor", act_quant_kwargs=None),
    "torchao four bits": holding("torchao.quantization", "Int4TilePackedTo4dTensor"),
}


def inputs_of_model(model: Any) -> Any:
    return inputs_for(family("llava")[1], [PHOTO], [QUESTION])


@pytest.mark.parametrize("code", CODE)
def test_code_of_somebody_elses_is_a_reason(code: str) -> None:
    model, processor = tiny_llava()
    engine = CarveEngine(model, processor, preset=PRESET)
    fingerprint(model, processor)
    CODE[code](model)
    assert f"module {UP!r}" in (engine.sequential_reason or "") and engine.sequential_reason == sequential_reason(model)
    with pytest.raises(Unidentified, match="up_proj"):
        fingerprint(model, processor)


LLAMA = "transformers.models.llama.modeling_llama"


def around(function: Any) -> Any:
    """As decorators do, that leave a function the name and the module of what it is around."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def noted(function: Any) -> Any:
    """A decorator of transformers around a function."""
    return functools.wraps(function)(as_written_in("transformers.utils.generic", around(function)))


def put(place: str, name: str, made: Callable[[Any], Any] = around) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Put a function in place of one that Python, transformers or torch has."""

    def change(_: Any, patch: pytest.MonkeyPatch) -> None:
        target: Any = pkgutil.resolve_name(place)
        patch.setattr(target, name, made(getattr(target, name)), raising=False)

    return change


class Bound:
    """A descriptor of somebody's own."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __get__(self, instance: Any, _: Any) -> Any:
        return functools.partial(self.function, instance)


def activation(made: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def change(model: Any, _: pytest.MonkeyPatch) -> None:
        mlp = part(model, UP.rpartition(".")[0])
        del mlp.act_fn
        mlp.act_fn = made

    return change


def entry(model: Any, patch: pytest.MonkeyPatch) -> None:
    registry = pkgutil.resolve_name(f"{LLAMA}:ALL_ATTENTION_FUNCTIONS")
    patch.setitem(registry._local_mapping, "sdpa", around(registry["sdpa"]))


# What is put, and what a message has of it.
PUT: dict[str, tuple[str, Callable[[Any, pytest.MonkeyPatch], None]]] = {
    "forward": ("mlp' runs a forward", put(f"{LLAMA}:LlamaMLP", "forward")),
    "forward within another": ("mlp' runs a forward", put(f"{LLAMA}:LlamaMLP", "forward", lambda f: noted(around(f)))),
    "forward that is bound": ("mlp' runs a forward", put(f"{LLAMA}:LlamaMLP", "forward", Bound)),
    "call of a class": ("mlp' runs a __call__", put(f"{LLAMA}:LlamaMLP", "__call__")),
    "call of all": ("runs a __call__", put("torch.nn:Module", "__call__")),
    "what a call calls": ("runs a _call_impl", put("torch.nn:Module", "_call_impl")),
    "method": ("LlavaModel.get_placeholder_mask", put(
        "transformers.models.llava.modeling_llava:LlavaModel", "get_placeholder_mask")),
    "function": ("modeling_llama.apply_rotary_pos_emb", put(LLAMA, "apply_rotary_pos_emb")),
    "function of a function": ("modeling_llama.rotate_half", put(LLAMA, "rotate_half")),
    "function from elsewhere": ("modeling_llama.create_causal_mask", put(LLAMA, "create_causal_mask")),
    "attention function": ("'sdpa'", entry),
    "function of torch": ("functional.scaled_dot_product_attention", put(
        "torch.nn.functional", "scaled_dot_product_attention", lambda f: lambda *a, **k: f(*a, **k))),
    "lambda": ("mlp' holds code", activation(lambda x: nn.functional.silu(x))),
    "partial": ("mlp' holds code", activation(functools.partial(torch.add, torch.zeros(1), out=nothing))),
    "object": ("mlp' holds code", activation(type("Activation", (), {"__call__": steer})())),
}  # fmt: skip


@pytest.mark.parametrize("what", PUT)
def test_what_is_put_in_place_of_known_code_is_a_reason(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_llava()
    reason, change = PUT[what]
    assert sequential_reason(model) is None
    change(model, monkeypatch)
    assert reason in (sequential_reason(model) or "")
    with pytest.raises(Unidentified):
        fingerprint(model, processor)


KEPT: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    "decorator of transformers": put(f"{LLAMA}:LlamaMLP", "forward", noted),
    "function of torch": activation(torch.tanh),
    "function of torch in Python": activation(nn.functional.silu),
    "partial": activation(functools.partial(nn.functional.gelu, approximate="tanh")),
    "method of its own": lambda model, _: setattr(part(model), "mine", part(model).extra_repr),
    "function that it does not call": put(LLAMA, "LlamaForCausalLM"),
    "attention function of another name": lambda _, patch: patch.setitem(
        pkgutil.resolve_name(f"{LLAMA}:ALL_ATTENTION_FUNCTIONS")._local_mapping, "mine", nothing
    ),
}


@pytest.mark.parametrize("what", KEPT)
def test_known_code_in_place_of_other_is_none(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()[0]
    KEPT[what](model, monkeypatch)
    assert sequential_reason(model) is None


@pytest.mark.parametrize("where", ELSEWHERE)
def test_hooks_are_found_wherever_they_are(where: str) -> None:
    model = family("llava")[0]
    assert sequential_reason(model) is None
    handle = part(model, ELSEWHERE[where]).register_forward_pre_hook(nothing)
    reason = sequential_reason(model)
    handle.remove()
    assert repr(ELSEWHERE[where]) in (reason or "") and "test_foreign.nothing" in (reason or "")
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
        assert "test_foreign.nothing" in (sequential_reason(model) or "")
    finally:
        handle.remove()
    assert sequential_reason(model) is None


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_activations_are_a_reason(method: str) -> None:
    model = tiny_llava()[0]
    assert sequential_reason(model) is None
    QUANTISED[method](model)
    assert "by those beside it" in (sequential_reason(model) or "")


@pytest.mark.parametrize("what", HARMLESS)
def test_what_does_nothing_to_a_token_is_none(what: str) -> None:
    model = tiny_llava()[0]
    HARMLESS[what](model)
    model.eval()
    assert sequential_reason(model) is None


MIXING: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "convolution": ("mixes tokens", lambda model: replaced(model, UP, lambda _: nn.Conv1d(2, 2, 3).eval())),
    "recurrence": ("mixes tokens", lambda model: replaced(model, UP, lambda _: nn.GRU(2, 2).eval())),
    "batch": ("normalises", lambda model: replaced(model, UP, lambda _: nn.BatchNorm1d(2, track_running_stats=False))),
    "training": ("in training mode", lambda model: part(model).train()),
    "compiled": ("compiled in place", lambda model: part(model).compile(backend="eager")),
    "own steps": (
        "its own generate",
        lambda model: setattr(model, "prepare_inputs_for_generation", model.prepare_inputs_for_generation),
    ),
    "x-lora": ("XLORA", lambda model: setattr(model, "peft_config", {"a": SimpleNamespace(peft_type=named("XLORA"))})),
}  # fmt: skip


def named(value: str) -> Any:
    return SimpleNamespace(value=value)


@pytest.mark.parametrize("what", MIXING)
def test_what_mixes_tokens_is_a_reason(what: str) -> None:
    reason, change = MIXING[what]
    model = tiny_llava()[0]
    change(model)
    assert reason in (sequential_reason(model) or "")


def test_a_wrapper_may_have_the_adapter() -> None:
    model = nn.DataParallel(wrapper := Wrapped(tiny_llava()[0]))
    wrapper._modules["module"] = wrapper._modules.pop("inner")
    wrapper.peft_config = {"a": SimpleNamespace(peft_type=named("LORA"))}
    assert sequential_reason(model) is None
    wrapper.peft_config = {"a": SimpleNamespace(peft_type=named("PREFIX_TUNING"), is_prompt_learning=True)}
    assert "tokens of its own" in (sequential_reason(model) or "")


def truth(model: Any, processor: Any, question: str) -> tuple[list[int], torch.Tensor]:
    """What the prompt alone gives, without an engine."""
    inputs = inputs_for(processor, [PHOTO], [question])
    with capture_attention(model, layers=[1, 2]) as session, torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist(), session.maps.values


@pytest.mark.parametrize(
    "change", [dynamic_int8, lambda model: part(model, ELSEWHERE["layer"]).register_forward_hook(steer)]
)
def test_a_question_beside_others_has_its_own_answer_and_maps(change: Callable[[Any], Any]) -> None:
    model, processor = tiny_llava()
    change(model)
    results = CarveEngine(model, processor, preset=PRESET)([PHOTO, PHOTO], [QUESTION, OTHER])
    for question, result in zip((QUESTION, OTHER), results, strict=True):
        ids, maps = truth(model, processor, question)
        assert prompts_for(processor, [question]) == [result.prompt] and list(result.answer_ids) == ids
        assert float((result.task.values - maps).abs().max()) <= 1e-5 * float(maps.max())


def test_hooks_that_come_and_go_are_asked_for_at_each_answer() -> None:
    model, processor = tiny_llava()
    engine = CarveEngine(model, processor, preset=PRESET)
    before = engine(PHOTO, QUESTION)
    handle = part(model, "model.language_model.layers.0").register_forward_hook(steer)
    steered = engine(PHOTO, QUESTION)
    expected = CarveEngine(model, processor, preset=PRESET, memory=False)(PHOTO, QUESTION)
    handle.remove()
    # Nothing of what was seen without it is remembered, and nothing of what was seen with it.
    assert torch.equal(steered.general.values, expected.general.values)
    assert not torch.equal(steered.general.values, before.general.values)
    assert torch.equal(engine(PHOTO, QUESTION).general.values, before.general.values)


def test_a_reader_of_rows_asks_at_each_picture() -> None:
    model, processor = tiny_llava()
    reader = CandidateReader(model, processor, PRESET, ["last"], ["t_start"], "auto")
    with ExitStack() as stack:
        stack.callback(part(model, "model.language_model.layers.0").register_forward_hook(steer).remove)
        general, task = reader.read(PHOTO, OTHER, [QUESTION])
        for found, question in ((general, OTHER), (task, QUESTION)):
            maps = truth(model, processor, question)[1][0, :, 0, 0]
            off = found.maps["last"][[1, 2], 0] - maps
            assert float(off.abs().max()) <= 1e-5 * float(maps.max())


def test_layers_that_make_a_mask_of_their_own_are_looked_at_alone(caplog: pytest.LogCaptureFixture) -> None:
    """As sparse attention does, or a bias by distance."""
    model, processor = tiny_llava()
    attention = part(model, ELSEWHERE["attention"])
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
    kind, seen = type(part(model)), []
    forward = kind.forward
    with watched(part(model), before=lambda *_: seen.append(1), after=lambda *_: seen.append(2)), torch.no_grad():
        assert sequential_reason(model) is None
        model(**inputs_of_model(model))
    assert seen == [1, 2] and kind.forward is forward and "forward" in kind.__dict__
