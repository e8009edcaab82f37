"""The captured rows: the last, the last k, positions, the question's tokens, a word, a text."""

from __future__ import annotations

import re
from typing import Any

import numpy
import pytest
import torch

from carve_kernels import capture_attention
from tests.support.families import IMAGES, TEXTS, eager, family, generate, in_eager, inputs_of, visual
from tests.support.generation_kinds import Prompted, processor_of_kind, user
from tests.support.tiny_models import inputs_for, tiny_llava

LAYERS = 4


def full(name: str, batch: int) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """Inputs, eager's head means of the prefill [B, L, S, S], image columns."""
    model, inputs = in_eager(name), inputs_of(name, batch)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    return inputs, torch.stack([layer.mean(1) for layer in attentions], 1), visual(model, inputs)


def captured(name: str, batch: int, rows: Any, **options: Any) -> Any:
    model, processor = family(name)
    with capture_attention(model, layers="all", rows=rows, processor=processor, **options) as session:
        generate(model, inputs_of(name, batch), steps=3)
    return session.maps


def agree(maps: Any, attention: torch.Tensor, columns: list[torch.Tensor], groups: list[list[list[int]]]) -> None:
    """`groups[b][r]` are the rows of the prompt whose mean is row r of the maps of prompt b."""
    for b, of_prompt in enumerate(groups):
        for r, group in enumerate(of_prompt):
            expected = attention[b][:, group][..., columns[b]].mean(1)
            found = maps.values[b, :, 0, r, : len(columns[b])]
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
            assert torch.allclose(maps.mass[b, :, 0, r], expected.sum(-1), rtol=1e-4)
            share = expected / expected.sum(-1, keepdim=True)
            entropy = -(share * share.log()).sum(-1) / torch.log(torch.tensor(float(len(columns[b]))))
            assert torch.allclose(maps.entropy[b, :, 0, r], entropy, rtol=1e-4)


def words(name: str, inputs: Any, b: int) -> list[str]:
    tokenizer = family(name)[1].tokenizer
    return [tokenizer.decode([token]) for token in inputs["input_ids"][b].tolist()]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_last_rows_of_a_left_padded_batch(name: str) -> None:
    inputs, attention, columns = full(name, 3)
    length = inputs["input_ids"].shape[1]
    maps = captured(name, 3, 4)
    assert maps.values.shape[2:4] == (3, 4)
    agree(maps, attention, columns, [[[length - 4 + r] for r in range(4)]] * 3)
    assert (
        bool(maps.valid[:, :, 0].all()) and not maps.valid[:, :, 1:, :3].any() and bool(maps.valid[:, :, 1:, 3].all())
    )
    expected = eager(name, 3, "dynamic")[1][:, :, 1:3]
    assert torch.allclose(maps.values[:, :, 1:, 3], expected, rtol=1e-4, atol=1e-7)
    assert not maps.values[:, :, 1:, :3].any()


def test_the_last_rows_of_a_right_padded_batch() -> None:
    model, processor = family("llava")
    inputs = inputs_for(processor, IMAGES, TEXTS, padding_side="right")
    with capture_attention(model, layers="all", rows=2) as session, torch.no_grad():
        model(**inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == 3
    with capture_attention(model, layers="all") as single, torch.no_grad():
        for b, length in enumerate(lengths):
            model(
                input_ids=inputs["input_ids"][b : b + 1, :length],
                attention_mask=inputs["attention_mask"][b : b + 1, :length],
                pixel_values=inputs["pixel_values"][b : b + 1],
            )
            assert torch.allclose(session.maps.values[b, :, 0, 1], single.maps.values[0, :, 0, 0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows", [[55], [-1, 57, -3], (58, 56)])
def test_positions(rows: Any) -> None:
    inputs, attention, columns = full("llava", 3)
    length = inputs["input_ids"].shape[1]
    maps = captured("llava", 3, rows)
    agree(maps, attention, columns, [[[row % length] for row in rows]] * 3)
    assert maps.steps == (0,)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_question_is_the_users_text(name: str) -> None:
    inputs, attention, columns = full(name, 3)
    maps = captured(name, 3, "question")
    groups = []
    for b, text in enumerate(TEXTS):
        pieces = words(name, inputs, b)
        group: list[int] = []
        last = int(columns[b].max())
        # The tokens after the image whose letters are exactly the question.
        for start in range(last + 1, len(pieces)):
            for stop in range(start + 1, len(pieces) + 1):
                if "".join(pieces[start:stop]).strip() == text:
                    group = list(range(start, stop))
                    break
            if group:
                break
        assert group
        groups.append([group])
    found = maps.values[:, :, 0, 0]
    for b in range(3):
        # A newline or space that the template puts before the question may count as part of it.
        wider = [groups[b][0], [groups[b][0][0] - 1, *groups[b][0]]]
        close = [
            torch.allclose(
                found[b, :, : len(columns[b])], attention[b][:, group][..., columns[b]].mean(1), rtol=1e-4, atol=1e-7
            )
            for group in wider
        ]
        assert any(close)
    assert maps.steps == (0,) and maps.values.shape[3] == 1


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("rows", [("word", "square"), ("word", "the"), ("text", "left of the image")])
def test_a_word_is_its_last_occurrence(name: str, rows: tuple[str, str]) -> None:
    model, processor = family(name)
    text = "the square, is the square at the left of the image another squares"
    inputs = inputs_for(processor, IMAGES[:1], [text])
    with capture_attention(model, layers="all", rows=rows, processor=processor) as session, torch.no_grad():
        model(**inputs)
    pieces = words(name, inputs, 0)
    joined = "".join(pieces)
    place = [found.start() for found in re.finditer(rf"\b{rows[1]}\b", joined)][-1]
    assert place < joined.rindex("squares")
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    starts = ends - torch.tensor([len(piece) for piece in pieces])
    group = ((starts < place + len(rows[1])) & (ends > place)).nonzero()[:, 0].tolist()
    with capture_attention(model, layers="all", rows=group) as each, torch.no_grad():
        model(**inputs)
    expected = each.maps.values.mean(3)
    assert torch.allclose(session.maps.values[:, :, :, 0], expected, rtol=1e-5, atol=1e-8)


BAD = [
    ("first", ValueError, "rows: expected one of 'last', 'question'"),
    (0, ValueError, "rows: expected an integer of at least 1"),
    (2.5, TypeError, "rows: expected 'last'"),
    (None, TypeError, "rows: expected 'last'"),
    ([], TypeError, "rows: expected 'last'"),
    ([1.5], TypeError, r"rows\[0\]: expected an integer"),
    (("word", ""), ValueError, r"rows\[1\]: expected a string with at least one visible character"),
    (("word", 3), TypeError, r"rows\[1\]: expected a string"),
]


@pytest.mark.parametrize(("rows", "error", "message"), BAD)
def test_invalid_rows_are_refused_at_once(rows: Any, error: type[Exception], message: str) -> None:
    model, processor = family("llava")
    with pytest.raises(error, match=message):
        capture_attention(model, layers=[0], rows=rows, processor=processor)


def test_a_word_needs_a_processor() -> None:
    with pytest.raises(ValueError, match="processor: expected a processor with rows"):
        capture_attention(family("llava")[0], layers=[0], rows=("word", "red"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("word", "zebra"), "rows: expected a word of the prompt, got 'zebra'; the prompt reads"),
        ([66], "rows: expected positions from -60 to 59, got 66"),
        ([0], "rows: expected positions of tokens, got 0, which is padding"),
        (65, "rows: expected at most the"),
    ],
)
def test_rows_missing_in_the_prompt_are_refused_before_the_model_runs(rows: Any, message: str) -> None:
    model, processor = family("llava")
    ran: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with (
            pytest.raises(ValueError, match=message),
            capture_attention(model, layers=[0], rows=rows, processor=processor),
        ):
            generate(model, inputs_of("llava", 3))
    finally:
        hook.remove()
    assert not ran


@pytest.mark.parametrize("kind", ["byte-level", "llama", "first"])
def test_a_session_finds_the_question_and_its_words_in_any_tokens(kind: str) -> None:
    model, processor = tiny_llava()[0], processor_of_kind(kind, "llava")
    model.resize_token_embeddings(len(processor.tokenizer))
    text = "İ what color is the 猫 of the cat"
    prompt = processor.apply_chat_template([user(text)], add_generation_prompt=True, tokenize=False)
    prompted = Prompted(processor.tokenizer, f"{prompt} The answer is", width=36)
    inputs = {"input_ids": prompted.ids, "attention_mask": prompted.attended.long()}
    inputs["pixel_values"] = torch.rand(1, 3, 84, 84, generator=torch.Generator().manual_seed(0))

    def maps(rows: Any) -> torch.Tensor:
        with capture_attention(model, layers="all", rows=rows, processor=processor) as session, torch.no_grad():
            model(**inputs)
        return session.maps.values[0, :, 0]

    start = prompted.text.index(text)
    for rows, spelled in [
        ("question", text),
        (("word", "cat"), "cat"),
        (("word", "猫"), "猫"),
        (("text", "猫 OF"), "猫 of"),
    ]:
        place = start + text.rindex(spelled)
        columns = prompted.columns(place, place + len(spelled))
        # White space between the image and the question may be separate tokens.
        wider = [[*range(columns[0] - more, columns[0]), *columns] for more in range(3 if rows == "question" else 1)]
        found = maps(rows)[:, 0]
        assert any(torch.allclose(found, maps(each).mean(1), rtol=1e-4, atol=1e-7) for each in wider), rows


def test_an_image_after_the_question_is_refused_before_the_model_runs() -> None:
    model, processor = family("llava")
    content = [{"type": "text", "text": "what digit is red\n"}, {"type": "image"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=IMAGES[:1], text=[prompt], return_tensors="pt")
    ran: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        for rows in ("question", ("word", "red"), ("text", "what digit")):
            session = capture_attention(model, layers=[0], rows=rows, processor=processor)
            with pytest.raises(ValueError, match=r"^rows:"), session, torch.no_grad():
                model(**inputs)
    finally:
        hook.remove()
    assert not ran


@pytest.mark.parametrize("rows", [numpy.int64(2), numpy.arange(45, 47), torch.tensor([45, 46]), range(45, 47)])
def test_rows_from_numpy_and_torch(rows: Any) -> None:
    expected = captured("llava", 1, 2 if isinstance(rows, numpy.integer) else [45, 46])
    found = captured("llava", 1, rows)
    assert torch.equal(found.values, expected.values)


def test_without_a_tokenizer_no_question_is_found() -> None:
    model, processor = family("llava")
    for rows in ("question", ("word", "red"), ("text", "red")):
        with pytest.raises(TypeError, match=r"^processor:"):
            capture_attention(model, layers=[0], rows=rows, processor=processor.image_processor)
