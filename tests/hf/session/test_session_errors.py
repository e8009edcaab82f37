"""What a session refuses, when it raises, and that the model has not changed by then."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from carve_kernels import CarveEngine, Preset, VisualLayout, capture_attention, layout_of
from carve_kernels.hf.profile.profile import Probe, profile
from tests.support.families import IMAGES, TEXTS, family, generate, inputs_of, state
from tests.support.tiny_models import inputs_for, tiny_llama, tiny_llava
from tests.support.zoo.kinds import build

AT_ONCE: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "layer too high": (ValueError, "layers: expected numbers from -4 to 3 for 4 layers, got", {"layers": [4]}),
    "layer too low": (ValueError, "layers: expected numbers from -4 to 3", {"layers": [-5]}),
    "layer twice": (ValueError, "layers: expected each layer once", {"layers": [3, -1]}),
    "no layer": (ValueError, "layers: expected at least one number", {"layers": []}),
    "layer name": (ValueError, "layers: expected 'paper'", {"layers": "deep"}),
    "layer float": (TypeError, r"layers\[0\]: expected an integer", {"layers": [1.0]}),
    "steps": (ValueError, "max_steps: expected an integer of at least 1", {"max_steps": 0}),
    "steps float": (TypeError, "max_steps: expected an integer", {"max_steps": 2.0}),
    "callback": (TypeError, "on_layer: expected a function", {"on_layer": 3}),
    "backend": (ValueError, "backend: expected one of", {"backend": "torch"}),
    "tokens text": (TypeError, "tokens: expected a VisualLayout", {"tokens": "image"}),
    "tokens empty": (ValueError, "tokens: expected at least one column", {"tokens": []}),
    "tokens below -1": (ValueError, "tokens: expected columns from 0 on", {"tokens": [3, -2]}),
    "tokens beyond any prompt": (ValueError, "tokens: expected columns", {"tokens": torch.tensor([2**33])}),
    "a token beyond any prompt": (ValueError, r"tokens\[0\]: expected an integer of at most 64", {"tokens": [2**70]}),
    "tokens all padding": (ValueError, "tokens: expected columns from 0 on", {"tokens": [-1, -1]}),
    "tokens of a bool array": (ValueError, "tokens: expected at least one column", {"tokens": np.array([True])}),
    "tokens of no view": (ValueError, "tokens: expected a VisualLayout", {"tokens": VisualLayout(((),), ((),))}),
    "layers of a float array": (TypeError, r"layers\[0\]: expected an integer", {"layers": np.array([1.0])}),
    "layers of a bool tensor": (TypeError, r"layers\[0\]: expected an integer", {"layers": torch.tensor([True])}),
    "tokens float": (ValueError, "tokens: expected at least one column", {"tokens": torch.zeros(3)}),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_refused_at_once(name: str) -> None:
    error, message, options = AT_ONCE[name]
    model = family("llava")[0]
    before = state(model)
    with pytest.raises(error, match=message):
        capture_attention(model, **{"layers": [0], **options})
    assert state(model) == before


@pytest.mark.parametrize("layers", [np.arange(1, 3), np.array([-3, 2]), torch.tensor([1, 2]), range(1, 3), (1, 2)])
def test_layers_of_any_integer_type(layers: Any) -> None:
    model = family("llava")[0]
    assert capture_attention(model, layers=layers).layers == (1, 2)
    assert capture_attention(model, layers=layers[0]).layers == (1,)
    assert Preset(layers=layers).layers == Preset(layers=tuple(int(layer) for layer in layers)).layers


@pytest.mark.parametrize("tokens", [np.arange(5, 9), torch.arange(5, 9), range(5, 9), [5, 6, 7, 8]])
def test_tokens_of_any_integer_type(tokens: Any) -> None:
    with capture_attention(family("llava")[0], layers=[0], tokens=tokens) as session:
        generate(family("llava")[0], inputs_of("llava", 1), steps=1)
    assert session.maps.tokens.tolist() == [[5, 6, 7, 8]]


def test_a_row_without_tokens_has_no_map() -> None:
    with capture_attention(
        family("llava")[0], layers=[0], tokens=torch.tensor([[40, 41], [-1, -1], [42, -1]])
    ) as session:
        generate(family("llava")[0], inputs_of("llava", 3), steps=1)
    assert session.maps.valid[:, 0, 0, 0].tolist() == [True, False, True]


def test_a_model_is_not_copied_inside_a_session() -> None:
    """The copy's generate would run the original model."""
    model = family("llava")[0]
    copies = (copy.deepcopy, pickle.dumps, lambda module: torch.save(module, io.BytesIO()))
    before = state(model)
    with capture_attention(model, layers=[0]):
        for duplicate in copies:
            for module in (model, model.model.language_model):
                with pytest.raises(TypeError, match=r"^model: "):
                    duplicate(module)
    assert state(model) == before
    assert generate(copy.deepcopy(model), inputs_of("llava", 1)).sequences.shape[0] == 1


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="model: expected a transformers model"):
        capture_attention("llava")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a transformers model"):
        capture_attention(torch.nn.Linear(2, 2))


def test_a_layer_without_softmax_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()[0]
    types = ["linear_attention", "full_attention", "full_attention", "full_attention"]
    monkeypatch.setattr(model.config.text_config, "layer_types", types, raising=False)
    with pytest.raises(ValueError, match=r"layer 0 has no softmax attention, expected layers among \[1, 2, 3\]"):
        capture_attention(model, layers=[0, 1])


IN_THE_FORWARD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "beams": ("num_beams: expected 1 inside capture_attention, got 2", {}, {"num_beams": 2}),
    "sequences": (
        "num_return_sequences: expected 1", {}, {"num_return_sequences": 2, "do_sample": True},
    ),
    "lookup": ("prompt_lookup_num_tokens: expected None", {}, {"prompt_lookup_num_tokens": 3}),
    "guidance": ("guidance_scale: expected 1 inside capture_attention, got 1.5", {}, {"guidance_scale": 1.5}),
    "assistant": ("assistant_model: expected None", {}, {"assistant_model": object()}),
    "tokens beyond the prompt": ("tokens: expected columns below the prompt's 60 tokens, got 66", {"tokens": [66]}, {}),
    "tokens of another batch": ("tokens: expected 1 or 3 rows", {"tokens": torch.zeros(2, 4).int()}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_THE_FORWARD)
def test_refused_before_the_model_runs(name: str) -> None:
    message, session_options, options = IN_THE_FORWARD[name]
    model = family("llava")[0]
    before = state(model)
    ran: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: ran.append(1))
    with (
        pytest.raises(ValueError, match=message),
        capture_attention(model, **{"layers": [0], **session_options}),
        torch.no_grad(),
    ):
        model.generate(**{**inputs_of("llava", 3), "max_new_tokens": 2, "do_sample": False, **options})
    hook.remove()
    assert not ran and state(model) == before


def test_beams_in_the_generation_config() -> None:
    model = tiny_llava()[0]
    model.generation_config.num_beams = 3
    with pytest.raises(ValueError, match="num_beams"), capture_attention(model, layers=[0]):
        model.generate(**inputs_of("llava", 1), max_new_tokens=2)


def test_no_image_in_the_prompt() -> None:
    model, processor = family("llava")
    ids = processor.tokenizer("what digit is red", return_tensors="pt")["input_ids"]
    with (
        pytest.raises(ValueError, match="input_ids: expected image tokens in the prompt, got none"),
        capture_attention(model, layers=[0]),
    ):
        model(input_ids=ids)


def test_a_text_model_needs_tokens() -> None:
    model = tiny_llama()
    ids = torch.arange(20)[None]
    with capture_attention(model, layers="all", tokens=[3, 4, 5]) as session, torch.no_grad():
        model(input_ids=ids)
    assert session.maps.values.shape == (1, 4, 1, 1, 3) and bool((session.maps.mass > 0).all())
    with pytest.raises(ValueError, match="names no image token"), capture_attention(model, layers=[0]):
        model(input_ids=ids)


def test_embeddings_need_tokens() -> None:
    model = tiny_llama()
    embeds = model.get_input_embeddings()(torch.arange(20)[None])
    with torch.no_grad(), capture_attention(model, layers=[0], tokens=[3]) as session:
        model(inputs_embeds=embeds)
    assert session.maps.steps == (0,)
    with pytest.raises(ValueError, match="tokens: expected the columns"), capture_attention(model, layers=[0]):
        model(inputs_embeds=embeds)


def test_a_prefix_from_outside_the_session_needs_tokens() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    more = torch.tensor([[70, 71]])
    with pytest.raises(ValueError, match="tokens: expected the columns"), capture_attention(model, layers=[0]):
        model(input_ids=more, past_key_values=cache)


def test_truncated_and_miscounted_images() -> None:
    model, processor = family("llava")
    inputs = inputs_for(processor, IMAGES[:1], TEXTS[:1])
    cut = {**inputs, "input_ids": inputs["input_ids"][:, :20], "attention_mask": inputs["attention_mask"][:, :20]}
    with pytest.raises(ValueError, match=r"image tokens, its grid of 6 x 6 needs 36; the prompt was probably trunc"):
        layout_of(model, processor, cut, IMAGES[:1])
    layout = layout_of(model, processor, inputs, IMAGES[:1])
    with (
        pytest.raises(ValueError, match="was the prompt truncated"),
        capture_attention(model, layers=[0], tokens=layout),
        torch.no_grad(),
    ):
        model(**{name: value[:, :20] if value.ndim == 2 else value for name, value in inputs.items()})


def test_maps_before_a_forward_and_a_session_twice() -> None:
    session = capture_attention(family("llava")[0], layers=[0])
    with session, pytest.raises(RuntimeError, match="maps: expected a forward of the model inside the session"):
        _ = session.maps
    with pytest.raises(RuntimeError, match="session: expected a new session"):
        session.__enter__()


def test_an_implementation_switched_inside_the_session() -> None:
    model = tiny_llava()[0]
    with capture_attention(model, layers=[0]) as session:
        model.set_attn_implementation({"text_config": "eager"})
        generate(model, inputs_of("llava", 1), steps=1)
        with pytest.raises(RuntimeError, match=r"nothing was captured in layers \[0\]"):
            _ = session.maps


def test_an_entry_replaced_meanwhile_is_left_alone() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_llava()[0]

    def other(*args: Any, **kwargs: Any) -> Any:
        return ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"](*args, **kwargs)

    try:
        with capture_attention(model, layers=[0]):
            ALL_ATTENTION_FUNCTIONS["sdpa"] = other
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_positional_generation_config() -> None:
    from transformers import GenerationConfig

    model, inputs = family("llava")[0], dict(inputs_of("llava", 1))
    ids = inputs.pop("input_ids")
    with pytest.raises(ValueError, match="num_beams: expected 1"), capture_attention(model, layers=[0]):
        model.generate(ids, GenerationConfig(num_beams=3, max_new_tokens=2), **inputs)
    answer = generate(model, inputs_of("llava", 1)).sequences[0, -5:].tolist()
    with capture_attention(model, layers=[0]) as session:
        model.generate(ids, GenerationConfig(eos_token_id=answer[2], max_new_tokens=5, do_sample=False), **inputs)
    assert session.maps.steps == (0, 1, 2)


def test_a_forward_of_another_thread_does_not_replace_a_record() -> None:
    import threading

    model, inputs = family("llava")[0], inputs_of("llava", 1)
    errors: list[Exception] = []

    def run() -> None:
        try:
            generate(model, inputs, steps=1)
        except RuntimeError as error:
            errors.append(error)

    with capture_attention(model, layers=[0]) as session, torch.no_grad():
        model(**inputs)
        before = session.maps
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert "captures another thread" in str(errors[0])
        assert torch.equal(session.maps.values, before.values)


def with_a_known_name(model: Any) -> None:
    model.model.language_model.layers[2].cross_attn = nn.Linear(2, 2)


def with_an_unknown_class(model: Any) -> None:
    model.model.language_model.layers[2].gate = type("GatedCrossAttentionBlock", (nn.Identity,), {})()


def by_the_config(model: Any) -> None:
    model.config.text_config.cross_attention_layers = [2]


def virtual_tokens(model: Any) -> None:
    model.peft_config = {"default": SimpleNamespace(is_prompt_learning=True)}


NO_SELF_ATTENTION: list[Callable[[Any], None]] = [
    with_a_known_name, with_an_unknown_class, by_the_config, virtual_tokens,
]  # fmt: skip


@pytest.mark.parametrize("change", NO_SELF_ATTENTION)
def test_a_model_without_self_attention_to_the_image_is_refused_everywhere(change: Callable[[Any], None]) -> None:
    model, processor = tiny_llava()
    inputs = inputs_of("llava", 1)
    change(model)
    wrapper = nn.DataParallel(model)
    for refused in (
        lambda: capture_attention(model, layers=[1]),
        lambda: capture_attention(wrapper, layers=[1]),
        lambda: CarveEngine(model, processor),
        lambda: layout_of(model, processor, inputs, IMAGES[:1]),
        lambda: profile(model, processor, [Probe(IMAGES[0], "what")]),
    ):
        with pytest.raises(TypeError, match=r"^model: "):
            refused()


def test_a_decoder_without_generate_is_captured() -> None:
    model = tiny_llama().model
    with capture_attention(model, layers=[1], tokens=[3, 4]) as session, torch.no_grad():
        model(input_ids=torch.arange(20)[None])
    assert session.maps.steps == (0,)


def test_mllama_is_refused_by_name() -> None:
    model, inputs, _ = build("mllama")
    for refused in (
        lambda: capture_attention(model, layers=[1]),
        lambda: capture_attention(model, layers=[0], tokens=[1]),
        lambda: CarveEngine(model, None),
        lambda: layout_of(model, None, inputs, IMAGES[:1]),
    ):
        with pytest.raises(TypeError, match=r"^model: .*MllamaForConditionalGeneration.*cross-attention"):
            refused()


def test_a_generate_that_bypasses_the_model_is_refused_before_its_decoder_runs() -> None:
    model, inputs, columns = build("blip_2")
    ran: list[int] = []
    model.language_model.model.decoder.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with (
        pytest.raises(ValueError, match=r"^model: .*Blip2ForConditionalGeneration"),
        capture_attention(model, layers=[1], tokens=columns),
        torch.no_grad(),
    ):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert not ran
    # A forward of the model, and a session on its language model, are captured.
    with capture_attention(model, layers=[1], tokens=columns) as session, torch.no_grad():
        model(**inputs)
    expected = session.maps.values[0, 0, 0]
    with capture_attention(model.language_model, layers=[1], tokens=columns) as session, torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert session.maps.steps == (0, 1)
    assert float((session.maps.values[0, 0, 0] - expected).abs().max()) <= 1e-5 * float(expected.max())
