"""Tree decoding: every answer equals `generate`, every map the session's, whatever the other prompts are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from carve_kernels import capture_attention, layout_of
from carve_kernels.hf.decoding.generation import preserved_positions
from carve_kernels.hf.decoding.prompt_groups import Branch, Decoded, PromptGroup
from carve_kernels.hf.decoding.sequential import greedy_generate
from carve_kernels.hf.decoding.tree_attention import TreeUnsupported
from carve_kernels.hf.decoding.tree_decoder import TreeDecoder
from carve_kernels.hf.image_inputs import ImageInputs
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.query_rows import RowsSpec
from tests.support.families import FAMILIES, family, state
from tests.support.tiny_models import make_image, tiny_llava, tiny_qwen2_5_vl

TEXTS = [
    "what digit is red",
    "Write a general description of the image.",
    "where is the square at the left of the image",
    "what",
]
PHOTO, OTHER = make_image(240, 160, 1), make_image(90, 200, 2)
NEW_TOKENS = 8
LAYERS = (1, 2)


def group_of(model: Any, processor: Any, image: Any, branches: Sequence[tuple[str, int, RowsSpec]]) -> PromptGroup:
    """Prompts about an image: texts, numbers of new tokens and rows."""
    image_inputs = ImageInputs(processor, model.device, None)
    group = None
    for text, count, rows in branches:
        inputs, features = image_inputs.inputs([image], build_prompt(processor, text))
        layout = layout_of(model, processor, {**inputs, **features.entries}, [image])
        group = group or PromptGroup(features, int(layout.tokens().max()) + 1, layout)
        group.branches.append(Branch(inputs, count, rows))
    assert group is not None
    return group


def decode(model: Any, processor: Any, *groups: PromptGroup) -> list[list[Decoded]]:
    with torch.no_grad(), preserved_positions(model):
        decoded = iter(TreeDecoder(model, processor, LAYERS, "auto").decode(groups))
    return [[next(decoded) for _ in group.branches] for group in groups]


def check(model: Any, processor: Any, image: Any, text: str, words: int, rows: RowsSpec, found: Decoded) -> None:
    """A decoded prompt against its own `generate` in a session."""
    inputs = prepare(processor, [image], build_prompt(processor, text))
    with capture_attention(model, layers=LAYERS, rows=rows, processor=processor, max_steps=words) as session:
        ids = greedy_generate(model, inputs, words, processor)
    assert list(found.ids) == ids.tolist()
    maps = found.maps
    assert maps is not None and maps.layers == session.maps.layers and maps.dtype == session.maps.dtype
    for part in ("values", "mass", "entropy"):
        mine, expected = getattr(maps, part), getattr(session.maps, part)
        assert mine.shape == expected.shape and torch.count_nonzero(expected)
        # float32's own floor for two paths through a whole model, relative to the element (docs/numerics.md).
        assert torch.allclose(mine, expected, rtol=2e-4, atol=1e-5 * float(expected.max()))
        assert float((mine - expected).abs().max()) <= 1e-5 * float(expected.max())
    assert torch.equal(maps.valid, session.maps.valid) and torch.equal(maps.tokens, session.maps.tokens)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_branches_equal_their_own_generation(name: str, implementation: str) -> None:
    model, processor = FAMILIES[name]()
    model.set_attn_implementation({"text_config": implementation})
    model.generation_config.repetition_penalty = 1.05
    found = decode(model, processor, group_of(model, processor, PHOTO, [(text, NEW_TOKENS, "last") for text in TEXTS]))
    for text, result in zip(TEXTS, found[0], strict=True):
        check(model, processor, PHOTO, text, NEW_TOKENS, "last", result)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_tree_attention_replaces_any_implementation(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_llava()

    def uncalled(*_: Any, **__: Any) -> None:
        raise AssertionError(implementation)

    with monkeypatch.context() as patch:
        # FlashAttention runs on no CPU, so its name is put where `set_attn_implementation` would refuse it.
        for config in (model.config.text_config, model.model.language_model.config):
            patch.setattr(config, "_attn_implementation_internal", implementation)
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, implementation, uncalled)  # type: ignore[arg-type]
        branches = [(text, NEW_TOKENS, "last") for text in TEXTS]
        found = decode(model, processor, group_of(model, processor, PHOTO, branches))
    for text, result in zip(TEXTS, found[0], strict=True):
        check(model, processor, PHOTO, text, NEW_TOKENS, "last", result)


def test_images_and_branches_of_all_lengths_in_one_batch() -> None:
    model, processor = tiny_qwen2_5_vl()
    # Tokens that these answers hold at different places: branches end one by one.
    first = greedy_generate(model, prepare(processor, [PHOTO], build_prompt(processor, TEXTS[0])), NEW_TOKENS).tolist()
    second = greedy_generate(model, prepare(processor, [OTHER], build_prompt(processor, TEXTS[2])), NEW_TOKENS).tolist()
    model.generation_config.eos_token_id = [first[2], second[4]]
    branches = [(text, words, "last") for text, words in zip(TEXTS, (NEW_TOKENS, 3, NEW_TOKENS, 1), strict=True)]
    groups = [group_of(model, processor, image, branches) for image in (PHOTO, OTHER)]
    found = decode(model, processor, *groups)
    assert len(found[0][0].ids) == 3 and len(found[1][2].ids) <= 5
    for image, results in zip((PHOTO, OTHER), found, strict=True):
        for (text, words, rows), result in zip(branches, results, strict=True):
            check(model, processor, image, text, words, rows, result)


@pytest.mark.parametrize("rows", ["question", ("word", "red"), 3, (-2, -1)])
def test_rows_of_the_prompt(rows: RowsSpec) -> None:
    model, processor = family("llava")
    pair = [("what digit is red", 4, rows), ("the square is red as well", 4, rows)]
    found = decode(model, processor, group_of(model, processor, PHOTO, pair))
    for (text, words, _), result in zip(pair, found[0], strict=True):
        check(model, processor, PHOTO, text, words, rows, result)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [5, 30, 60])
def test_sliding_windows_count_in_the_prompt_of_the_branch(window: int, implementation: str) -> None:
    model, processor = tiny_qwen2_5_vl()
    text = model.config.text_config
    text.layer_types, text.sliding_window = ["full_attention", "sliding_attention"] * 2, window
    text.use_sliding_window = True
    layers = model.model.language_model.layers
    for number in (1, 3):
        layers[number].self_attn.sliding_window = window
    model.model.language_model.has_sliding_layers = True
    model.set_attn_implementation({"text_config": implementation})
    branches = [(text, NEW_TOKENS, "last") for text in TEXTS]
    found = decode(model, processor, group_of(model, processor, PHOTO, branches))
    missing = False
    for (question, words, _), result in zip(branches, found[0], strict=True):
        inputs = prepare(processor, [PHOTO], build_prompt(processor, question))
        assert list(result.ids) == greedy_generate(model, inputs, words).tolist()
        maps = result.maps
        assert maps is not None
        with capture_attention(model, layers=LAYERS, max_steps=words) as session:
            greedy_generate(model, inputs, words)
        valid = session.maps.valid
        missing |= not bool(valid.all())
        assert torch.equal(maps.valid, valid)
        assert torch.allclose(maps.values, session.maps.values, rtol=2e-4, atol=1e-7)
    assert missing == (window < 60)


SETTINGS: dict[str, dict[str, Any]] = {
    "least number of words": {"min_new_tokens": 6},
    "forbidden tokens": {"suppress_tokens": list(range(100, 300))},
    "a last token": {"forced_eos_token_id": 7},
    "no pair twice": {"no_repeat_ngram_size": 1, "repetition_penalty": 1.3},
    "a bias": {"sequence_bias": [[[40], 30.0], [[41], 29.0]]},
    "bad words": {"bad_words_ids": [[number] for number in range(150, 250)]},
    "a decay": {"exponential_decay_length_penalty": (2, 1.9)},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_generation_config_holds_for_each_branch(setting: str) -> None:
    model, processor = tiny_llava()
    plain = greedy_generate(model, prepare(processor, [PHOTO], build_prompt(processor, TEXTS[0])), NEW_TOKENS).tolist()
    model.generation_config.eos_token_id = [plain[1], 2]
    model.generation_config.update(**SETTINGS[setting])
    found = decode(model, processor, group_of(model, processor, PHOTO, [(text, NEW_TOKENS, "last") for text in TEXTS]))
    changed = False
    for text, result in zip(TEXTS, found[0], strict=True):
        check(model, processor, PHOTO, text, NEW_TOKENS, "last", result)
        changed |= list(result.ids) != plain[: len(result.ids)]
    assert changed


def test_texts_that_end_an_answer() -> None:
    model, processor = tiny_llava()
    inputs = prepare(processor, [PHOTO], build_prompt(processor, TEXTS[0]))
    answer = greedy_generate(model, inputs, NEW_TOKENS)
    texts = [processor.decode([token]) for token in answer.tolist()[1:-1]]
    model.generation_config.stop_strings = [next(text for text in texts if text.isascii() and text.strip())]
    found = decode(model, processor, group_of(model, processor, PHOTO, [(text, NEW_TOKENS, "last") for text in TEXTS]))
    assert 2 <= len(found[0][0].ids) < NEW_TOKENS
    for text, result in zip(TEXTS, found[0], strict=True):
        check(model, processor, PHOTO, text, NEW_TOKENS, "last", result)


def test_a_prefix_cache_may_be_repeated() -> None:
    model, processor = tiny_llava()
    first = group_of(model, processor, PHOTO, [(TEXTS[0], NEW_TOKENS, "last"), (TEXTS[1], NEW_TOKENS, "last")])
    decode(model, processor, first)
    assert first.prefix is not None
    cached = first.prefix
    for texts in (TEXTS[2:], TEXTS[:1], TEXTS):
        again = group_of(model, processor, PHOTO, [(text, NEW_TOKENS, "last") for text in texts])
        again.prefix = cached
        seen: list[Any] = []
        hook = model.model.vision_tower.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        found = decode(model, processor, again)
        hook.remove()
        assert again.prefix is cached and not seen
        for text, result in zip(texts, found[0], strict=True):
            check(model, processor, PHOTO, text, NEW_TOKENS, "last", result)


def test_a_prefix_that_some_layers_have_not_read_is_read_again() -> None:
    model, processor = tiny_llava()
    short = group_of(model, processor, PHOTO, [(TEXTS[0], 0, "last"), (TEXTS[1], 0, "last")])
    with torch.no_grad():
        TreeDecoder(model, processor, (0, 1), "auto").decode([short])
    assert short.prefix is not None and short.prefix.depth == 2
    again = group_of(model, processor, PHOTO, [(TEXTS[2], NEW_TOKENS, "last")])
    again.prefix = short.prefix
    found = decode(model, processor, again)
    assert again.prefix is not short.prefix
    check(model, processor, PHOTO, TEXTS[2], NEW_TOKENS, "last", found[0][0])


@given(order=st.permutations(range(len(TEXTS))))
def test_the_order_of_the_branches_changes_nothing(order: list[int]) -> None:
    model, processor = family("qwen2_vl")
    found = decode(model, processor, group_of(model, processor, PHOTO, [(TEXTS[each], 3, "last") for each in order]))
    for each, result in zip(order, found[0], strict=True):
        expected = _in_order()[each]
        assert result.ids == expected.ids and result.maps is not None and expected.maps is not None
        assert torch.allclose(result.maps.values, expected.maps.values, rtol=1e-4, atol=1e-8)


_EXPECTED: list[Decoded] = []


def _in_order() -> list[Decoded]:
    if not _EXPECTED:
        model, processor = family("qwen2_vl")
        branches = [(text, 3, "last") for text in TEXTS]
        _EXPECTED.extend(decode(model, processor, group_of(model, processor, PHOTO, branches))[0])
    return _EXPECTED


def test_unsupported_prompts_have_a_reason() -> None:
    model, processor = family("llava")
    with pytest.raises(TreeUnsupported, match="captured before their end"):
        decode(model, processor, group_of(model, processor, PHOTO, [(TEXTS[0], 2, (3, 4))]))
    inputs, features = ImageInputs(processor, model.device, None).inputs([PHOTO], "what is <image>")
    layout = layout_of(model, processor, {**inputs, **features.entries}, [PHOTO])
    with pytest.raises(TreeUnsupported, match="no text follows the image tokens"):
        group = PromptGroup(features, int(layout.tokens().max()) + 1, layout)
        group.branches.append(Branch(inputs, 2, "last"))
        decode(model, processor, group)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [1, 3])
def test_an_end_in_the_middle_leaves_the_model_as_it_was(at: int, error: type[BaseException]) -> None:
    model, processor = family("qwen2_5_vl")
    before, deltas = state(model), model.model.rope_deltas
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise error

    hook = model.model.language_model.layers[2].register_forward_pre_hook(interrupt)
    branches = [(text, NEW_TOKENS, "last") for text in TEXTS]
    with pytest.raises(error):
        decode(model, processor, group_of(model, processor, PHOTO, branches))
    hook.remove()
    assert state(model) == before and model.model.rope_deltas is deltas
    found = decode(model, processor, group_of(model, processor, PHOTO, branches[:1]))
    assert state(model) == before
    check(model, processor, PHOTO, TEXTS[0], NEW_TOKENS, "last", found[0][0])
