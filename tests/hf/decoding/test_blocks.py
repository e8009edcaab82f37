"""Images whose tokens attend to each other in both directions, in tree decoding: the model's own masks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from carve_kernels import capture_attention
from carve_kernels.hf.decoding import Decoder, sequential_reason
from carve_kernels.hf.decoding.blocks import MasksUnknown, blocks_of, whole_blocks
from carve_kernels.hf.decoding.prompt_groups import Branch, PromptGroup
from carve_kernels.hf.decoding.sequential import greedy_generate
from carve_kernels.hf.decoding.tree_attention import TreeUnsupported
from carve_kernels.hf.image_inputs import ImageFeatures
from carve_kernels.hf.model import attention_modules
from tests.support.families import state
from tests.support.zoo.kinds import IMAGE, build, kinds, set_text_attention
from tests.support.zoo.prompts import QUESTIONS, alone, asking, counted_tokens, decode, group_of, layout_at

WORDS = 5


@functools.cache
def model_of(name: str, window: int | None = None) -> tuple[Any, dict[str, torch.Tensor], list[int], tuple[int, ...]]:
    if not kinds()[name].exists():
        pytest.skip(f"this transformers has no {name}")
    model, inputs, columns = build(name)
    if name == "molmo2":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if window is not None:
        model.config.get_text_config().sliding_window = window
        for module in attention_modules(model).values():
            if getattr(module, "sliding_window", None):
                module.sliding_window = window
    return model, inputs, columns, tuple(attention_modules(model))


# A window of 3 is narrower than the images, of 4 and 6 tokens: Gemma 3 attends to all of a block, Gemma 4 to what the
# window leaves of it, and its full layers to none. A window of 12 leaves the image while the answers are written.
@pytest.mark.parametrize(
    ("name", "window", "attention"),
    [
        ("gemma3", None, "sdpa"), ("gemma3", 3, "sdpa"), ("gemma3", 12, "eager"), ("gemma4", None, "sdpa"),
        ("gemma4", 3, "sdpa"), ("gemma4", 12, "sdpa"), ("gemma4", 3, "eager"), ("gemma4_e", None, "sdpa"),
        ("gemma4_e", 12, "sdpa"), ("gemma4_unified", 3, "sdpa"), ("molmo2", None, "sdpa"), ("molmo2", None, "eager"),
    ],
)  # fmt: skip
def test_prompts_equal_their_own_generate_and_the_prefix_is_read_once(
    name: str, window: int | None, attention: str
) -> None:
    model, inputs, columns, layers = model_of(name, window)
    assert sequential_reason(model) is None
    # transformers notes some things on a model that runs for the first time.
    alone(model, inputs, columns, QUESTIONS[0], 1, layers)
    before = state(model)
    set_text_attention(model, attention)
    try:
        group = group_of(inputs, columns, WORDS)
        with counted_tokens(model) as tokens:
            found = decode(model, layers, group)
        start = columns[-1] + 1
        suffixes = sum(1 + len(question) for question in QUESTIONS) + len(QUESTIONS) * (WORDS - 1)
        # Two of the questions begin with a token in common, and all with the token after the image.
        assert set(tokens) == {start + suffixes - 2}
        for question, result in zip(QUESTIONS, found, strict=True):
            ids, maps = alone(model, inputs, columns, question, WORDS, layers)
            assert list(result.ids) == ids
            assert torch.allclose(result.maps.values, maps.values, rtol=1e-3, atol=1e-6)
            assert torch.equal(result.maps.seen, maps.seen) and torch.equal(result.maps.valid, maps.valid)
        again = group_of(inputs, columns, WORDS)
        again.prefix = group.prefix
        with counted_tokens(model) as tokens:
            second = decode(model, layers, again)
        assert set(tokens) == {suffixes - 3} and [each.ids for each in second] == [each.ids for each in found]
    finally:
        set_text_attention(model, "sdpa")
    assert state(model) == before


def test_the_blocks_are_those_of_the_models_masks() -> None:
    model, inputs, columns, _ = model_of("gemma4", 3)
    text = asking(inputs, columns, QUESTIONS[0])
    found = blocks_of(model, {name: text[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")})
    # The last token in view of a token of the block is that of the block, whatever the window hides before it.
    assert found.ids.tolist() == [
        columns[-1] if column in columns else -1 for column in range(text["input_ids"].shape[1])
    ]
    assert found.kinds == {"full_attention": ("causal",), "sliding_attention": ("within window",)}
    plain = blocks_of(model, {name: text[name] for name in ("input_ids", "attention_mask")})
    assert plain.ids.tolist() == [-1] * text["input_ids"].shape[1]
    assert whole_blocks(found.ids, 30) == 30 and whole_blocks(found.ids, columns[2]) == columns[0]
    assert blocks_of(build("qwen2_5_vl")[0], text).kinds == {}


def two_images(name: str) -> tuple[Any, PromptGroup, dict[str, torch.Tensor]]:
    """A group with one image, read before, and a prompt that shows another one after it."""
    model, inputs, columns, layers = model_of(name)
    start, type_name = columns[0] - 1, "token_type_ids" if name == "gemma3" else "mm_token_type_ids"
    ids = inputs["input_ids"][:, : columns[-1] + 2]
    ids_of_both = torch.cat([ids, ids[:, start:], torch.tensor([QUESTIONS[0]])], 1)
    both = {
        "input_ids": ids_of_both,
        "attention_mask": torch.ones_like(ids_of_both),
        type_name: (ids_of_both == IMAGE).long(),
    }
    group = group_of(inputs, columns, WORDS)
    decode(model, layers, group)
    pixels = {key: value for key, value in inputs.items() if key not in (*both, "token_type_ids")}
    other = {key: value.flip(-1) if value.is_floating_point() else value for key, value in pixels.items()}
    branch = Branch(both, WORDS)
    branch.later_images = ImageFeatures(lambda: other)
    branch.images = ImageFeatures(lambda: {key: torch.cat([pixels[key], other[key]]) for key in pixels})
    again = PromptGroup(group.images, group.start, layout_at(columns), prefix=group.prefix)
    again.branches.append(branch)
    return model, again, {**both, **branch.images.entries}


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_a_later_image_has_a_block_of_its_own(name: str) -> None:
    model, group, both = two_images(name)
    with counted_tokens(model) as tokens:
        [found] = decode(model, model_of(name)[3], group)
    assert list(found.ids) == greedy_generate(model, both, WORDS).tolist()
    # The first image is not read again.
    assert set(tokens) == {both["input_ids"].shape[1] - group.start + WORDS - 1 - 1}


def test_images_that_attend_to_each_other_are_decoded_one_by_one() -> None:
    model, group, _ = two_images("molmo2")
    with pytest.raises(TreeUnsupported, match="tokens up to the end of its image attend to later ones"):
        decode(model, model_of("molmo2")[3], group)


def test_a_prompt_that_is_one_block_is_decoded_one_by_one() -> None:
    model, inputs, columns, layers = model_of("paligemma")
    assert sequential_reason(model) == "its attention is not causal"
    with pytest.raises(TreeUnsupported, match="tokens up to the end of its image attend to later ones"):
        decode(model, layers, group_of(inputs, columns, WORDS))
    found = Decoder(model, None, layers, "auto").decode([group_of(inputs, columns, WORDS)])
    for question, result in zip(QUESTIONS, found, strict=True):
        ids, maps = alone(model, inputs, columns, question, WORDS, layers)
        assert list(result.ids) == ids and torch.equal(result.maps.values, maps.values)


@pytest.mark.parametrize("column", [1, 12])
def test_masks_that_are_not_causal_beside_blocks_are_not_guessed_at(
    column: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, columns, _ = model_of("gemma3")
    from carve_kernels.hf.decoding import blocks

    make = blocks.masks_by_generate

    def hides(*args: Any) -> Any:
        masks = make(*args)
        masks["full_attention"][..., -3, column] ^= True
        return masks

    monkeypatch.setattr(blocks, "masks_by_generate", hides)
    text = asking(inputs, columns, QUESTIONS[0])
    with pytest.raises(MasksUnknown, match="its masks are not causal beside blocks"):
        blocks_of(model, {name: text[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    monkeypatch.setattr(blocks, "masks_by_generate", lambda *_: {"full_attention": object()})
    with pytest.raises(MasksUnknown, match="its mask of a prompt is a object of an unknown form"):
        blocks_of(model, text)
    monkeypatch.setattr(blocks, "masks_by_generate", lambda *_: 1 / 0)
    with pytest.raises(MasksUnknown, match=r"the masks of its prompts are unknown \(ZeroDivisionError"):
        blocks_of(model, text)


def test_a_session_sees_an_image_through_its_block() -> None:
    """Rows inside of a block see the tokens behind themselves."""
    model, inputs, columns, layers = model_of("gemma3")
    with torch.no_grad(), capture_attention(model, layers="all", tokens=columns, rows=[columns[1], 15]) as session:
        model(**inputs)
    assert session.maps.layers == layers and bool(session.maps.seen.all())
