"""Batches whose prompts differ in length, in images and in the rows that are captured, against each prompt alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from carve_kernels import capture_attention, layout_of
from tests.support.families import family, generate, in_eager, visual
from tests.support.tiny_models import inputs_for, make_image

STEPS = 4
# Two images of two sizes, one of a third, and a prompt without one.
IMAGES = [[make_image(120, 80, 1), make_image(57, 140, 2)], [make_image(200, 60, 3)], []]
TEXTS = ["what digit is red", "where is the small square at the left", "hello, is the digit blue"]
WORDS = ["digit", "square", "blue"]
SIDES = ["left", "right"]


@functools.cache
def batch(name: str, side: str) -> Any:
    return inputs_for(family(name)[1], IMAGES, TEXTS, padding_side=side)


@functools.cache
def alone(name: str, row: int, answer: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    """Eager's head means [L, S, N] in float64 of one prompt with its answer behind it, and the prompt's length."""
    model = in_eager(name).double()
    inputs = inputs_for(family(name)[1], IMAGES[row : row + 1], TEXTS[row : row + 1])
    length = inputs["input_ids"].shape[1]
    inputs["pixel_values"] = inputs["pixel_values"].double()
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
    for key in {"attention_mask", "mm_token_type_ids"} & set(inputs):
        fill = torch.full((1, len(answer)), int(key == "attention_mask"))
        inputs[key] = torch.cat([inputs[key], fill], 1)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    columns = visual(model, inputs)[0]
    return torch.stack([layer[0].mean(0)[:, columns] for layer in attentions]), length


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A map of a session, [L, N] padded with zeros, and eager's [L, n]."""
    count = expected.shape[-1]
    assert float((found[:, :count] - expected).abs().max()) <= 5e-5 * float(expected.max())
    assert not found[:, count:].any()


def check_missing(maps: Any) -> None:
    """The last prompt, without an image, has no map, rather than a black one."""
    assert not maps.valid[2].any() and not maps.values[2].any() and bool(maps.entropy.isfinite().all())
    with pytest.raises(ValueError, match="for batch row 2"):
        maps.last_step(2)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_last_row_and_the_steps_after_left_padding(name: str) -> None:
    model, inputs = family(name)[0], batch(name, "left")
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == 3
    with capture_attention(model, layers="all") as session:
        output = generate(model, inputs, STEPS)
    maps = session.maps
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    for row in range(2):
        expected, length = alone(name, row, tuple(answers[row, :-1].tolist()))
        assert lengths[row] == length
        steps = maps.valid[row].all(0)[:, 0].nonzero()[:, 0].tolist()
        assert len(steps) > 1
        for step in steps:
            agree(maps.values[row, :, step, 0], expected[:, length - 1 + step])
    check_missing(maps)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_last_row_and_the_steps_after_right_padding(name: str) -> None:
    model, inputs = family(name)[0], batch(name, "right")
    with capture_attention(model, layers="all") as session:
        output = generate(model, inputs, STEPS)
    maps, eager_model = session.maps, in_eager(name).double()
    doubled = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    truth = generate(eager_model, doubled, STEPS, output_attentions=True)
    assert torch.equal(truth.sequences, output.sequences)
    columns = visual(model, inputs)
    for row in range(2):
        # The last row is the prompt's last token; generate itself continues from the padding, at its positions.
        expected, length = alone(name, row, ())
        agree(maps.values[row, :, 0, 0], expected[:, length - 1])
        for step in maps.valid[row].all(0)[:, 0].nonzero()[1:, 0].tolist():
            layers = [layer[row, :, -1, columns[row]].mean(0) for layer in truth.attentions[step]]
            agree(maps.values[row, :, step, 0], torch.stack(layers))
    assert maps.valid[:2, :, 1].all(1).any()
    check_missing(maps)


def test_steps_of_a_loop_after_right_padding() -> None:
    model, inputs = family("llava")[0], batch("llava", "right")
    lengths = inputs["attention_mask"].sum(1)
    answers = torch.tensor([[300, 21, 45], [33, 300, 17], [21, 22, 23]])
    mask = inputs["attention_mask"]
    with capture_attention(model, layers="all") as session, torch.no_grad():
        output = model(**inputs, use_cache=True)
        for step in range(3):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
            output = model(
                input_ids=answers[:, step : step + 1],
                attention_mask=mask,
                position_ids=(lengths + step)[:, None],
                past_key_values=output.past_key_values,
            )
    assert len(session.maps.steps) == 4
    for row in range(2):
        expected, length = alone("llava", row, tuple(answers[row].tolist()))
        for step in range(4):
            agree(session.maps.values[row, :, step, 0], expected[:, length - 1 + step])
    check_missing(session.maps)


def pieces_of(name: str, row: int, wanted: str) -> list[int]:
    """The tokens of the last occurrence of a text in a prompt alone, by decoding one token after the other."""
    tokenizer = family(name)[1].tokenizer
    inputs = inputs_for(family(name)[1], IMAGES[row : row + 1], TEXTS[row : row + 1])
    pieces = [tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist()]
    place = "".join(pieces).rindex(wanted)
    starts = [sum(map(len, pieces[:index])) for index in range(len(pieces))]
    return [
        index
        for index, (start, piece) in enumerate(zip(starts, pieces, strict=True))
        if start < place + len(wanted) and start + len(piece) > place
    ]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_each_prompt_has_its_own_word(name: str, side: str) -> None:
    model, processor = family(name)
    groups = [pieces_of(name, row, WORDS[row]) for row in range(2)]
    counts = {len(group) for group in groups}
    assert len(counts) == 2 and min(counts) > 0
    spellings: list[Any] = [
        ("word", WORDS),
        [("word", word) for word in WORDS],
        [("text", WORDS[0]), ["word", WORDS[1]], "question"],
    ]
    for rows in spellings:
        with capture_attention(model, layers="all", rows=rows, processor=processor) as session, torch.no_grad():
            model(**batch(name, side))
        maps = session.maps
        assert maps.values.shape[2:4] == (1, 1)
        for row, group in enumerate(groups):
            agree(maps.values[row, :, 0, 0], alone(name, row, ())[0][:, group].mean(1))
        assert bool(maps.valid[:2].all()) and not maps.valid[2].any()


@pytest.mark.parametrize("side", SIDES)
def test_choices_of_several_kinds(side: str) -> None:
    model, processor = family("llava")
    rows = ["last", "question", ("text", "the digit")]
    with capture_attention(model, layers="all", rows=rows, processor=processor) as session:
        generate(model, batch("llava", side), 2)
    expected, length = alone("llava", 0, ())
    # A choice for each prompt is of step 0 only, the last row included.
    assert session.maps.steps == (0,)
    agree(session.maps.values[0, :, 0, 0], expected[:, length - 1])
    with capture_attention(model, layers="all", rows="question", processor=processor) as single, torch.no_grad():
        model(**batch("llava", side))
    agree(session.maps.values[1, :, 0, 0], single.maps.values[1, :, 0, 0])


@pytest.mark.parametrize("side", SIDES)
def test_positions_of_each_prompt(side: str) -> None:
    model, inputs = family("qwen2_5_vl")[0], batch("qwen2_5_vl", side)
    first = inputs["attention_mask"].argmax(1).tolist()
    lengths = inputs["attention_mask"].sum(1).tolist()
    inside = [[length - 2, length - 5] for length in lengths]
    rows = torch.tensor([[start + each for each in group] for start, group in zip(first, inside, strict=True)])
    for given in (rows, rows.tolist(), list(rows)):
        with capture_attention(model, layers="all", rows=given) as session, torch.no_grad():
            model(**inputs)
        assert session.maps.values.shape[3] == 2
        for row in range(2):
            for index, position in enumerate(inside[row]):
                agree(session.maps.values[row, :, 0, index], alone("qwen2_5_vl", row, ())[0][:, position])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("word", ["digit", "zebra", "blue"]), r"^rows: expected a word of the prompt, got 'zebra'.*\(prompt 1 of"),
        (["question", "question", ("text", "red")], r"^rows: expected a text of the prompt, got 'red'.*\(prompt 2 of"),
        (("word", ["digit", "square"]), "^rows: expected a choice for each of the 3 prompts, got 2"),
        ([[50], [50]], "^rows: expected a choice for each of the 3 prompts, got 2"),
        ([[-1], [-2], [2]], "^rows: expected positions of tokens, got 2, which is padding in prompt 2"),
        ([[-1], [-2], [999]], "^rows: expected positions from -"),
    ],
)
def test_a_row_that_is_missing_in_one_prompt_is_refused_by_its_number(rows: Any, message: str) -> None:
    model, processor = family("llava")
    ran: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        session = capture_attention(model, layers=[0], rows=rows, processor=processor)
        with pytest.raises(ValueError, match=message), session, torch.no_grad():
            model(**batch("llava", "left"))
    finally:
        hook.remove()
    assert not ran


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (["last", "first"], ValueError, r"^rows\[1\]: expected 'last', 'question', \('word'"),
        ([("word", "red"), 3], TypeError, r"^rows\[1\]: expected 'last', 'question', \('word', WORD\)"),
        ([("word", "red"), ("word", "")], ValueError, r"^rows\[1\]\[1\]: expected a string"),
        ([("word", "red"), ("word", ["blue"])], TypeError, r"^rows\[1\]\[1\]: expected a string"),
        (("word", ["red", 3]), TypeError, r"^rows\[1\]\[1\]: expected a string"),
        (("text", []), TypeError, r"^rows\[1\]: expected a string"),
        ([[1, 2], [3]], ValueError, r"^rows: expected as many positions for each prompt, got \[2, 1\]"),
        ([[1, 2], []], TypeError, r"^rows\[1\]: expected positions"),
        ([[1], [2.5]], TypeError, r"^rows\[1\]\[0\]: expected an integer"),
        ([[1], 2], TypeError, r"^rows\[1\]: expected positions"),
    ],
)
def test_choices_that_are_none_are_refused_at_once(rows: Any, error: type[Exception], message: str) -> None:
    model, processor = family("llava")
    with pytest.raises(error, match=message):
        capture_attention(model, layers=[0], rows=rows, processor=processor)


def test_a_word_of_each_prompt_needs_a_processor() -> None:
    for rows in (("word", ["red", "blue"]), ["question", ("text", "red")]):
        with pytest.raises(ValueError, match=r"^processor: expected a processor with rows"):
            capture_attention(family("llava")[0], layers=[0], rows=rows)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_layout_of_a_batch(name: str, side: str) -> None:
    model, processor = family(name)
    inputs = batch(name, side)
    layout = layout_of(model, processor, inputs, IMAGES)
    with capture_attention(model, layers=[1], tokens=layout) as session, torch.no_grad():
        model(**inputs)
    found = session.maps
    first = inputs["attention_mask"].argmax(1).tolist()
    for row in range(2):
        single = inputs_for(processor, IMAGES[row : row + 1], TEXTS[row : row + 1])
        views = layout_of(model, processor, single, IMAGES[row]).views[0]
        assert [(view.grid, view.box, view.image) for view in views] == [
            (view.grid, view.box, view.image) for view in layout.views[row]
        ]
        for index, (view, expected) in enumerate(zip(layout.views[row], views, strict=True)):
            assert torch.equal(view.tokens, expected.tokens + first[row])
            grid = alone(name, row, ())[0][1, -1, layout.spans(row)[index]].view(view.grid)
            assert torch.allclose(found.view(row, index)[0, 0, 0], grid.float(), rtol=1e-4, atol=1e-7)
    assert layout.views[2] == () and layout.sizes[2] == ()
