"""Prompts decoded together: every answer is `generate`'s, every map the session's, whatever the others do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from carve_kernels import capture_attention, layout_of
from carve_kernels.hf.decoding.generation import positions_kept
from carve_kernels.hf.decoding.sequential import generated
from carve_kernels.hf.decoding.tree_attention import Unshareable
from carve_kernels.hf.decoding.tree_decoder import Branch, Joint, Look, Outcome
from carve_kernels.hf.image_features import Pictures
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.query_rows import RowsSpec
from tests.support.families import FAMILIES, family, state
from tests.support.tiny_models import picture, tiny_llava, tiny_qwen2_5_vl

TEXTS = [
    "what digit is red",
    "Write a general description of the image.",
    "where is the square at the left of the image",
    "what",
]
PHOTO, OTHER = picture(240, 160, 1), picture(90, 200, 2)
WORDS = 8
LAYERS = (1, 2)


def look(name: str, model: Any, processor: Any, image: Any, branches: Sequence[tuple[str, int, RowsSpec]]) -> Look:
    """A look at a picture with texts, numbers of words and rows."""
    pictures = Pictures(processor, model.device, None)
    made = []
    for text, words, rows in branches:
        inputs, shown = pictures.inputs([image], build_prompt(processor, text))
        made.append(Branch(inputs, words, rows))
        layout = layout_of(model, processor, {**inputs, **shown.entries}, [image])
    return Look(made, int(layout.tokens().max()) + 1, shown, layout)


def together(model: Any, processor: Any, *looks: Look) -> list[list[Outcome]]:
    with torch.no_grad(), positions_kept(model):
        return Joint(model, processor, LAYERS, "auto").run(looks)


def check(model: Any, processor: Any, image: Any, text: str, words: int, rows: RowsSpec, found: Outcome) -> None:
    """An outcome against a generation of its own under a session."""
    inputs = prepare(processor, [image], build_prompt(processor, text))
    with capture_attention(model, layers=LAYERS, rows=rows, processor=processor, max_steps=words) as session:
        ids = generated(model, inputs, words, processor)
    assert list(found.ids) == ids.tolist()
    maps = found.maps
    assert maps is not None and maps.layers == session.maps.layers and maps.dtype == session.maps.dtype
    for part in ("values", "mass", "entropy"):
        mine, expected = getattr(maps, part), getattr(session.maps, part)
        assert mine.shape == expected.shape and torch.count_nonzero(expected)
        # float32's own floor for two roads through a whole model, relative to the element (docs/numerics.md).
        assert torch.allclose(mine, expected, rtol=2e-4, atol=1e-5 * float(expected.max()))
        assert float((mine - expected).abs().max()) <= 1e-5 * float(expected.max())
    assert torch.equal(maps.valid, session.maps.valid) and torch.equal(maps.tokens, session.maps.tokens)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_branches_are_what_they_are_alone(name: str, implementation: str) -> None:
    model, processor = FAMILIES[name]()
    model.set_attn_implementation({"text_config": implementation})
    model.generation_config.repetition_penalty = 1.05
    found = together(model, processor, look(name, model, processor, PHOTO, [(text, WORDS, "last") for text in TEXTS]))
    for text, outcome in zip(TEXTS, found[0], strict=True):
        check(model, processor, PHOTO, text, WORDS, "last", outcome)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_the_row_attends_by_itself_whatever_the_implementation(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_llava()

    def uncalled(*_: Any, **__: Any) -> None:
        raise AssertionError(implementation)

    with monkeypatch.context() as patch:
        # FlashAttention runs on no CPU, so its name is put where `set_attn_implementation` would refuse it.
        for config in (model.config.text_config, model.model.language_model.config):
            patch.setattr(config, "_attn_implementation_internal", implementation)
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, implementation, uncalled)  # type: ignore[arg-type]
        branches = [(text, WORDS, "last") for text in TEXTS]
        found = together(model, processor, look("llava", model, processor, PHOTO, branches))
    for text, outcome in zip(TEXTS, found[0], strict=True):
        check(model, processor, PHOTO, text, WORDS, "last", outcome)


def test_pictures_and_branches_of_all_lengths_in_one_row() -> None:
    model, processor = tiny_qwen2_5_vl()
    # Tokens that these answers hold at different places: branches end one by one.
    first = generated(model, prepare(processor, [PHOTO], build_prompt(processor, TEXTS[0])), WORDS).tolist()
    second = generated(model, prepare(processor, [OTHER], build_prompt(processor, TEXTS[2])), WORDS).tolist()
    model.generation_config.eos_token_id = [first[2], second[4]]
    branches = [(text, words, "last") for text, words in zip(TEXTS, (WORDS, 3, WORDS, 1), strict=True)]
    looks = [look("qwen2_5_vl", model, processor, image, branches) for image in (PHOTO, OTHER)]
    found = together(model, processor, *looks)
    assert len(found[0][0].ids) == 3 and len(found[1][2].ids) <= 5
    for image, outcomes in zip((PHOTO, OTHER), found, strict=True):
        for (text, words, rows), outcome in zip(branches, outcomes, strict=True):
            check(model, processor, image, text, words, rows, outcome)


@pytest.mark.parametrize("rows", ["question", ("word", "red"), 3, (-2, -1)])
def test_rows_of_the_prompt(rows: RowsSpec) -> None:
    model, processor = family("llava")
    pair = [("what digit is red", 4, rows), ("the square is red as well", 4, rows)]
    found = together(model, processor, look("llava", model, processor, PHOTO, pair))
    for (text, words, _), outcome in zip(pair, found[0], strict=True):
        check(model, processor, PHOTO, text, words, rows, outcome)


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
    branches = [(text, WORDS, "last") for text in TEXTS]
    found = together(model, processor, look("qwen2_5_vl", model, processor, PHOTO, branches))
    missing = False
    for (question, words, _), outcome in zip(branches, found[0], strict=True):
        inputs = prepare(processor, [PHOTO], build_prompt(processor, question))
        assert list(outcome.ids) == generated(model, inputs, words).tolist()
        maps = outcome.maps
        assert maps is not None
        with capture_attention(model, layers=LAYERS, max_steps=words) as session:
            generated(model, inputs, words)
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
    plain = generated(model, prepare(processor, [PHOTO], build_prompt(processor, TEXTS[0])), WORDS).tolist()
    model.generation_config.eos_token_id = [plain[1], 2]
    model.generation_config.update(**SETTINGS[setting])
    found = together(
        model, processor, look("llava", model, processor, PHOTO, [(text, WORDS, "last") for text in TEXTS])
    )
    changed = False
    for text, outcome in zip(TEXTS, found[0], strict=True):
        check(model, processor, PHOTO, text, WORDS, "last", outcome)
        changed |= list(outcome.ids) != plain[: len(outcome.ids)]
    assert changed


def test_texts_that_end_an_answer() -> None:
    model, processor = tiny_llava()
    inputs = prepare(processor, [PHOTO], build_prompt(processor, TEXTS[0]))
    answer = generated(model, inputs, WORDS)
    texts = [processor.decode([token]) for token in answer.tolist()[1:-1]]
    model.generation_config.stop_strings = [next(text for text in texts if text.isascii() and text.strip())]
    found = together(
        model, processor, look("llava", model, processor, PHOTO, [(text, WORDS, "last") for text in TEXTS])
    )
    assert 2 <= len(found[0][0].ids) < WORDS
    for text, outcome in zip(TEXTS, found[0], strict=True):
        check(model, processor, PHOTO, text, WORDS, "last", outcome)


def test_a_prefix_serves_again_and_again() -> None:
    model, processor = tiny_llava()
    first = look("llava", model, processor, PHOTO, [(TEXTS[0], WORDS, "last"), (TEXTS[1], WORDS, "last")])
    together(model, processor, first)
    assert first.prefix is not None
    held = first.prefix
    for texts in (TEXTS[2:], TEXTS[:1], TEXTS):
        again = look("llava", model, processor, PHOTO, [(text, WORDS, "last") for text in texts])
        again.prefix = held
        seen: list[Any] = []
        hook = model.model.vision_tower.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        found = together(model, processor, again)
        hook.remove()
        assert again.prefix is held and not seen
        for text, outcome in zip(texts, found[0], strict=True):
            check(model, processor, PHOTO, text, WORDS, "last", outcome)


def test_a_prefix_that_some_layers_have_not_read_is_read_anew() -> None:
    model, processor = tiny_llava()
    short = look("llava", model, processor, PHOTO, [(TEXTS[0], 0, "last"), (TEXTS[1], 0, "last")])
    with torch.no_grad():
        Joint(model, processor, (0, 1), "auto").run([short])
    assert short.prefix is not None and short.prefix.depth == 2
    again = look("llava", model, processor, PHOTO, [(TEXTS[2], WORDS, "last")])
    again.prefix = short.prefix
    found = together(model, processor, again)
    assert again.prefix is not short.prefix
    check(model, processor, PHOTO, TEXTS[2], WORDS, "last", found[0][0])


@given(order=st.permutations(range(len(TEXTS))))
def test_the_order_of_the_branches_changes_nothing(order: list[int]) -> None:
    model, processor = family("qwen2_vl")
    found = together(
        model, processor, look("qwen2_vl", model, processor, PHOTO, [(TEXTS[each], 3, "last") for each in order])
    )
    for each, outcome in zip(order, found[0], strict=True):
        expected = _in_order()[each]
        assert outcome.ids == expected.ids and outcome.maps is not None and expected.maps is not None
        assert torch.allclose(outcome.maps.values, expected.maps.values, rtol=1e-4, atol=1e-8)


_EXPECTED: list[Outcome] = []


def _in_order() -> list[Outcome]:
    if not _EXPECTED:
        model, processor = family("qwen2_vl")
        branches = [(text, 3, "last") for text in TEXTS]
        _EXPECTED.extend(together(model, processor, look("qwen2_vl", model, processor, PHOTO, branches))[0])
    return _EXPECTED


def test_what_cannot_be_shared_says_so() -> None:
    model, processor = family("llava")
    with pytest.raises(Unshareable, match="captured before the end of it"):
        together(model, processor, look("llava", model, processor, PHOTO, [(TEXTS[0], 2, (3, 4))]))
    inputs, shown = Pictures(processor, model.device, None).inputs([PHOTO], "what is <image>")
    layout = layout_of(model, processor, {**inputs, **shown.entries}, [PHOTO])
    with pytest.raises(Unshareable, match="nothing behind its picture"):
        together(model, processor, Look([Branch(inputs, 2, "last")], int(layout.tokens().max()) + 1, shown, layout))


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
    branches = [(text, WORDS, "last") for text in TEXTS]
    with pytest.raises(error):
        together(model, processor, look("qwen2_5_vl", model, processor, PHOTO, branches))
    hook.remove()
    assert state(model) == before and model.model.rope_deltas is deltas
    found = together(model, processor, look("qwen2_5_vl", model, processor, PHOTO, branches[:1]))
    assert state(model) == before
    check(model, processor, PHOTO, TEXTS[0], WORDS, "last", found[0][0])
