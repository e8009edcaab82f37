"""A decode step belongs to the prompt of its cache, and to the images of that prompt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from carve_kernels import AttentionMaps, capture_attention
from tests.support.conversations import LAYERS, Prompt, model_of, new_cache, prompt_of
from tests.support.families import family, generate, inputs_of
from tests.support.tiny_models import inputs_for, make_image

pytestmark = pytest.mark.filterwarnings("ignore")


def read(model: Any, prompt: Prompt, cache: Any = None, **options: Any) -> Any:
    with torch.no_grad():
        given = {
            "input_ids": prompt.ids,
            "pixel_values": prompt.pixels.flatten(0, 1),
            "past_key_values": cache,
            **options,
        }
        return model(**given).past_key_values


def step(model: Any, cache: Any, token: int = 7) -> None:
    with torch.no_grad():
        model(input_ids=torch.tensor([[token]]), past_key_values=cache)


def single(model: Any, prompt: Prompt, tokens: list[int], cache: str = "own") -> AttentionMaps:
    """The maps of a prompt and its new tokens in a separate session."""
    with capture_attention(model, layers="all") as session:
        filled = read(model, prompt, new_cache(cache, model))
        for token in tokens:
            step(model, filled, token)
    return session.maps


def same(one: AttentionMaps, other: AttentionMaps) -> None:
    assert one.steps == other.steps and torch.equal(one.tokens, other.tokens) and torch.equal(one.valid, other.valid)
    assert torch.allclose(one.values, other.values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lengths", [(3, 3), (3, 5)])
@pytest.mark.parametrize("cache", ["own", "dynamic", "static"])
def test_a_step_follows_its_cache(cache: str, lengths: tuple[int, int]) -> None:
    model = model_of("llama", "sdpa")
    prompts = [prompt_of(seed, 1, 2, length, [0], "left") for seed, length in enumerate(lengths)]
    with capture_attention(model, layers="all") as session:
        filled = [read(model, prompt, new_cache(cache, model)) for prompt in prompts]
        for token, number in ((7, 0), (8, 1), (9, 0)):
            step(model, filled[number], token)
            same(session.maps, single(model, prompts[number], [7, 9][: 1 + token // 9] if number == 0 else [8], cache))


def test_a_static_cache_is_reset_for_another_prompt() -> None:
    model = model_of("llama", "sdpa")
    first, second = (prompt_of(seed, 1, 2, 3, [0], "left") for seed in (1, 2))
    cache = new_cache("static", model)
    with capture_attention(model, layers="all") as session:
        read(model, first, cache)
        step(model, cache)
        cache.reset()
        read(model, second, cache)
        step(model, cache, 8)
        same(session.maps, single(model, second, [8]))


@pytest.mark.parametrize("cache", ["own", "static"])
def test_a_cropped_cache_continues_from_there(cache: str) -> None:
    model, prompt = model_of("llama", "sdpa"), prompt_of(3, 1, 2, 3, [0], "left")
    with capture_attention(model, layers="all") as session:
        filled = read(model, prompt, new_cache(cache, model))
        for token in (7, 8, 9):
            step(model, filled, token)
        if not hasattr(filled.layers[0], "crop"):
            pytest.skip("static caches of this transformers cannot be cropped")
        filled.crop(-2)
        step(model, filled, 10)
        same(session.maps, single(model, prompt, [7, 10]))
        # Cropped into the prompt, after its image: what follows makes a new prompt.
        filled.crop(-4)
        with torch.no_grad():
            model(input_ids=torch.tensor([[11, 12]]), past_key_values=filled)
    ids = torch.cat([prompt.ids[:, :-2], torch.tensor([[11, 12]])], 1)
    same(session.maps, single(model, Prompt(ids, prompt.columns, prompt.pixels, prompt.attended), []))


def test_one_more_token_with_another_image_is_another_prompt() -> None:
    model, inputs = family("llava")[0], dict(inputs_of("llava", 1))
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[70]])], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    with capture_attention(model, layers=[0]) as session, torch.no_grad():
        model(**inputs, use_cache=False)
        model(**longer, use_cache=False)
        assert session.maps.steps == (0, 1)
        model(**inputs, use_cache=False)
        model(**{**longer, "pixel_values": inputs["pixel_values"].flip(-1)}, use_cache=False)
        assert session.maps.steps == (0,)
        # An image that is changed in place is another image, too.
        pixels = inputs["pixel_values"].clone()
        model(**{**inputs, "pixel_values": pixels}, use_cache=False)
        pixels.mul_(-1)
        model(**{**longer, "pixel_values": pixels}, use_cache=False)
        assert session.maps.steps == (0,)


def evict(cache: Any, layers: Any) -> None:
    for layer in layers:
        of_layer = cache.layers[layer]
        rest = [index for index in range(of_layer.keys.shape[2]) if index != 3]
        of_layer.keys, of_layer.values = of_layer.keys[:, :, rest], of_layer.values[:, :, rest]


@pytest.mark.parametrize("layers", [[1], [0], range(LAYERS)], ids=["one", "the first", "all"])
@pytest.mark.parametrize("tokens", [None, "given"])
def test_evicted_keys(layers: Any, tokens: str | None) -> None:
    model, prompt = model_of("llama", "sdpa"), prompt_of(4, 1, 2, 3, [0], "left")
    columns = None if tokens is None else prompt.columns
    with capture_attention(model, layers="all", tokens=columns) as session:
        cache = read(model, prompt)
        before = session.maps
        evict(cache, layers)
        for new in ([[7]], [[7, 8]]):
            with pytest.raises(ValueError, match=r"^cache: "), torch.no_grad():
                model(input_ids=torch.tensor(new), past_key_values=cache)
        same(session.maps, before)


def test_keys_evicted_inside_the_forward() -> None:
    """As a hook does that compresses the cache after each layer."""
    model, prompt = model_of("llama", "sdpa"), prompt_of(4, 1, 2, 3, [0], "left")
    cache = new_cache("dynamic", model)
    attention = model.model.language_model.layers[1].self_attn
    hook = attention.register_forward_hook(lambda *_: evict(cache, [1]) if cache.layers[1].keys.shape[2] == 9 else None)
    with capture_attention(model, layers="all") as session:
        read(model, prompt, cache)
        hook.remove()
        assert session.maps.steps == (0,)
        with pytest.raises(ValueError, match=r"^cache: layer 1 has 9 keys, expected 10"):
            step(model, cache)
        with pytest.raises(ValueError, match=r"^cache: "):
            print(session.maps)


def test_rows_of_the_batch_are_reordered() -> None:
    model, prompt = model_of("llama", "sdpa"), prompt_of(5, 2, 2, 3, [0, 1], "left")
    with capture_attention(model, layers="all"), torch.no_grad():
        cache = read(model, prompt, attention_mask=prompt.attended.long())
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ValueError, match=r"^cache: "):
            model(input_ids=torch.tensor([[7], [8]]), past_key_values=cache)


def test_tokens_dropped_inside_the_forward() -> None:
    """As FastV does after a layer: later layers get fewer rows."""
    model, prompt = model_of("llama", "sdpa"), prompt_of(6, 1, 2, 3, [0], "left")

    def drop(_module: Any, args: Any, kwargs: Any) -> Any:
        shorter = {**kwargs, "position_embeddings": tuple(each[:, :7] for each in kwargs["position_embeddings"])}
        return (args[0][:, :7], *args[1:]), shorter

    later = model.model.language_model.layers[1:]
    hooks = [layer.register_forward_pre_hook(drop, with_kwargs=True) for layer in later]
    try:
        with (
            capture_attention(model, layers="all") as session,
            pytest.raises(ValueError, match=r"^layers: layer 1 has"),
        ):
            read(model, prompt)
        with pytest.raises(ValueError, match=r"^layers: layer 1 has"):
            print(session.maps)
        with capture_attention(model, layers=[0]) as session:
            read(model, prompt)
        assert session.maps.steps == (0,)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_copied_cache_is_unknown() -> None:
    model, prompt = model_of("llama", "sdpa"), prompt_of(7, 1, 2, 3, [0], "left")
    with capture_attention(model, layers="all"), pytest.raises(ValueError, match=r"^tokens: "):
        step(model, copy.deepcopy(read(model, prompt)))
    # Given tokens are used, and generate knows the prompt.
    with capture_attention(model, layers="all", tokens=prompt.columns) as session:
        step(model, copy.deepcopy(read(model, prompt)))
    same_values = single(model, prompt, [7]).values[:, :, 1:]
    assert session.maps.steps == (0,) and torch.allclose(session.maps.values, same_values, rtol=1e-4, atol=1e-7)
    ids = torch.cat([prompt.ids, torch.tensor([[7]])], 1)
    with torch.no_grad():
        cache = read(model, prompt)
        with capture_attention(model, layers="all") as session:
            model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), max_new_tokens=1, do_sample=False)
        assert torch.allclose(session.maps.values, same_values, rtol=1e-4, atol=1e-7)


def test_generate_gets_another_prompt_than_the_cache() -> None:
    model, prompt = model_of("llama", "sdpa"), prompt_of(7, 1, 2, 3, [0], "left")
    ids = torch.cat([prompt.ids, torch.tensor([[7, 8]])], 1)
    ids[0, 0] += 1
    with capture_attention(model, layers="all"), pytest.raises(ValueError, match=r"^input_ids: "), torch.no_grad():
        model.generate(input_ids=ids, past_key_values=read(model, prompt), max_new_tokens=2, do_sample=False)


def test_a_logits_processor_that_calls_the_model() -> None:
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

    model, prompt = model_of("llama", "sdpa"), prompt_of(8, 1, 2, 3, [0], "left")
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model, unconditional_ids=torch.tensor([[1, 2, 3]]))
    for tokens in (None, prompt.columns):
        with (
            capture_attention(model, layers="all", tokens=tokens),
            pytest.raises(ValueError, match=r"^logits_processor: "),
            torch.no_grad(),
        ):
            model.generate(
                input_ids=prompt.ids,
                pixel_values=prompt.pixels.flatten(0, 1),
                logits_processor=[guidance],
                max_new_tokens=3,
            )


def test_the_last_chunk_of_a_prompt_is_one_token() -> None:
    model, inputs = family("llava")[0], inputs_of("llava", 1)
    length = inputs["input_ids"].shape[1]
    plain = generate(model, inputs, steps=1)
    try:
        chunked = generate(model, inputs, steps=1, prefill_chunk_size=length - 1)
    except RuntimeError as error:
        pytest.skip(f"this transformers cannot read images in chunks: {error}")
    if not torch.allclose(plain.logits[0], chunked.logits[0], rtol=1e-2, atol=1e-2):
        pytest.skip("this transformers reads images in chunks wrongly")
    with capture_attention(model, layers="all") as session:
        generate(model, inputs, steps=3)
    expected = session.maps
    with capture_attention(model, layers="all") as session:
        generate(model, inputs, steps=3, prefill_chunk_size=length - 1)
    same(session.maps, expected)


def test_a_tensor_of_ids_is_reused() -> None:
    model, prompt = model_of("llama", "sdpa"), prompt_of(9, 1, 2, 3, [0], "left")
    ids = prompt.ids.clone()
    with capture_attention(model, layers="all") as session, torch.no_grad():
        given = {"input_ids": ids, "pixel_values": prompt.pixels.flatten(0, 1)}
        cache = model(**given).past_key_values
        ids.copy_(ids.roll(2, 1))
        model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)
    assert session.maps.tokens.tolist() == prompt.columns.tolist()


@pytest.mark.parametrize("kind", ["data", "numpy", "list"])
def test_pixels_changed_without_a_version_counter(kind: str) -> None:
    model, prompt = model_of("llama", "sdpa"), prompt_of(9, 1, 2, 3, [0], "left")
    longer = torch.cat([prompt.ids, torch.tensor([[7]])], 1)
    pixels = torch.from_numpy(prompt.pixels.flatten(0, 1).numpy().copy())
    with capture_attention(model, layers="all") as session, torch.no_grad():
        model(input_ids=prompt.ids, pixel_values=pixels, use_cache=False)
        if kind == "data":
            pixels.data.mul_(-1)
        elif kind == "numpy":
            pixels.numpy()[:] *= -1
        model(input_ids=longer, pixel_values=pixels, use_cache=False)
    assert session.maps.steps == ((0, 1) if kind == "list" else (0,))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_hook_writes_to_keys_after_their_attention(cache: str, mode: Any) -> None:
    """Each layer is captured from the keys that it attended to, or refused."""
    model, prompt = model_of("llama", "sdpa"), prompt_of(4, 1, 2, 3, [0], "left")
    expected = single(model, prompt, [])
    filled = new_cache(cache, model)
    attention = model.model.language_model.layers[1].self_attn

    def write(*_: Any) -> None:
        filled.layers[1].keys.mul_(1.5)

    hook = attention.register_forward_hook(write)
    try:
        with mode(), capture_attention(model, layers=[1, 2]) as session:
            given = {"input_ids": prompt.ids, "pixel_values": prompt.pixels.flatten(0, 1), "past_key_values": filled}
            try:
                model(**given)
                values = session.maps.values
            except ValueError as error:
                assert str(error).startswith("cache: ")
                return
        assert torch.allclose(values[:, 0], expected.values[:, 1], rtol=1e-4, atol=1e-7)
    finally:
        hook.remove()


def test_a_static_cache_is_refilled_without_a_version_counter() -> None:
    model = model_of("llama", "sdpa")
    first, second = (prompt_of(seed, 1, 2, 3, [0], "left") for seed in (1, 2))
    cache = new_cache("static", model)
    with torch.inference_mode(), capture_attention(model, layers="all"):
        read(model, first, cache)
        cache.reset()
        embeds = model.get_input_embeddings()(second.ids)
        model.model.language_model(inputs_embeds=embeds, past_key_values=cache)
        with pytest.raises(ValueError, match=r"^cache: "):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)


class Closed:
    """A foreign cache, whose keys cannot be read."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "layers":
            raise AttributeError(name)
        return getattr(self._inner, name)


def test_a_cache_with_unreadable_keys() -> None:
    model, prompt = model_of("llama", "sdpa"), prompt_of(9, 1, 2, 3, [0], "left")
    cache = Closed(new_cache("dynamic", model))
    with capture_attention(model, layers="all") as session:
        read(model, prompt, cache)
        assert session.maps.steps == (0,)
        with pytest.raises(ValueError, match=r"^cache: "):
            step(model, cache)


@pytest.mark.parametrize("where", ["model", "config"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_beams", 2), ("guidance_scale", 1.5), ("prompt_lookup_num_tokens", 2), ("num_return_sequences", 2)],
)
def test_settings_of_the_models_config_and_of_a_given_one(name: str, value: Any, where: str) -> None:
    from transformers import GenerationConfig

    model, prompt = copy.deepcopy(model_of("llama", "sdpa")), prompt_of(9, 1, 2, 3, [0], "left")
    given = GenerationConfig(max_new_tokens=3)
    setattr(model.generation_config if where == "model" else given, name, value)
    with capture_attention(model, layers="all"), pytest.raises(ValueError, match=f"^{name}: "):
        model.generate(
            input_ids=prompt.ids, pixel_values=prompt.pixels.flatten(0, 1), generation_config=given, do_sample=False
        )


def test_the_models_end_token_holds_with_a_given_config() -> None:
    from transformers import GenerationConfig

    model, prompt = copy.deepcopy(model_of("llama", "sdpa")), prompt_of(9, 2, 2, 3, [0, 0], "left")
    given = {"input_ids": prompt.ids, "pixel_values": prompt.pixels.flatten(0, 1), "do_sample": False}
    answers = model.generate(**given, max_new_tokens=4)[:, prompt.ids.shape[1] :]
    model.generation_config.eos_token_id = int(answers[0, 0])
    with capture_attention(model, layers="all") as session:
        model.generate(**given, generation_config=GenerationConfig(max_new_tokens=4))
    assert session.maps.last_step(0) == 0


def test_positions_of_another_prompt() -> None:
    """Qwen-VL stores where a prompt's positions end; a step of an earlier prompt would continue from them."""
    model, processor = family("qwen2_5_vl")
    wide, small = (inputs_for(processor, [make_image(*size)], ["what digit is red"]) for size in ((224, 56), (84, 84)))
    with torch.no_grad(), capture_attention(model, layers=[1]) as session:
        first = model(**wide, use_cache=True).past_key_values
        model(**small, use_cache=True)
        with pytest.raises(ValueError, match=r"^position_ids: "):
            step(model, first)
        model(**wide, use_cache=True)
        assert session.maps.steps == (0,)


def test_rows_of_a_quantised_cache_are_reordered() -> None:
    transformers = pytest.importorskip("transformers")
    model, prompt = model_of("llama", "sdpa"), prompt_of(5, 2, 2, 3, [0, 1], "left")
    try:
        cache = transformers.QuantizedCache(backend="fp8", config=model.config.get_text_config())
    except (TypeError, ValueError) as error:
        pytest.skip(f"this transformers has no such cache: {error}")
    with capture_attention(model, layers="all") as session, torch.no_grad():
        read(model, prompt, cache, attention_mask=prompt.attended.long())
        token = torch.tensor([[7], [8]])
        model(input_ids=token, past_key_values=cache)
        assert session.maps.steps == (0, 1)
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ValueError, match=r"^cache: "):
            model(input_ids=token, past_key_values=cache)
