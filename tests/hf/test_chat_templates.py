"""The question is the user's last text after the image, for any tokenizer and any chat template."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.query_rows import resolve_rows
from tests.support.generation_kinds import (
    IMAGE,
    KINDS,
    NO_BREAKS,
    TEMPLATES,
    Prompted,
    assistant,
    processor_of_kind,
    tokenizer_of_kind,
    user,
)

QUESTION = "What color is the cat"
# A template of a text model, for plain strings.
VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}{{ m['content'] }}"
    "{{ ' ' if m['role'] == 'user' else '</s>' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Nothing but white space after the user's text.
BARE = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}\n{% endfor %}"
)
CALLING = BARE + "{% if add_generation_prompt %}## Answer:{% endif %}"


def rendered(processor: Any, *chat: dict[str, Any], call: bool = True) -> str:
    return processor.apply_chat_template(list(chat), add_generation_prompt=call, tokenize=False)


def question(processor: Any, text: str) -> tuple[Prompted, list[int]]:
    prompted = Prompted(processor.tokenizer, text)
    rows = resolve_rows("question", prompted.ids, prompted.attended, prompted.tokens, processor)
    assert rows.weight is not None and not rows.last
    columns = rows.columns[0].tolist()
    assert len(set(columns)) == len(columns)
    return prompted, columns


def is_question(processor: Any, text: str, expected_text: str) -> None:
    """The columns are those of the last `expected_text`, and perhaps of white space before it."""
    prompted, columns = question(processor, text)
    start = prompted.text.rindex(expected_text)
    expected = prompted.columns(start, start + len(expected_text))
    assert columns[-len(expected) :] == expected
    before = processor.tokenizer.convert_ids_to_tokens(prompted.ids[0, columns[: -len(expected)]].tolist())
    assert not "".join(before).strip("▁ĠĊ").replace("<0x0A>", "")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer_with_every_template(kind: str, template: str) -> None:
    processor = processor_of_kind(kind, template)
    once = rendered(processor, user(QUESTION))
    is_question(processor, once, QUESTION)
    # Text after the generation prompt is not a question, and may contain another generation prompt.
    is_question(processor, f"{once} The answer is", QUESTION)
    is_question(processor, rendered(processor, user(QUESTION), assistant("It is red"), call=False), QUESTION)
    is_question(processor, rendered(processor, user(QUESTION), call=False), QUESTION)
    # Only the last of several turns is the question.
    chat = (user("what digit is red"), assistant("seven"), user(QUESTION, images=0))
    is_question(processor, rendered(processor, *chat), QUESTION)
    is_question(processor, rendered(processor, *chat, call=False), QUESTION)
    is_question(processor, rendered(processor, *chat, assistant("the cat is red"), call=False), QUESTION)
    is_question(processor, rendered(processor, user("hello", 0), assistant("seven"), user(QUESTION, 2)), QUESTION)
    # A user may write as the template does.
    is_question(
        processor, rendered(processor, user("is it ASSISTANT: or [/INST] what")), "is it ASSISTANT: or [/INST] what"
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_without_the_template_is_the_users_text(kind: str, template: str) -> None:
    is_question(processor_of_kind(kind, template), f"{IMAGE} {QUESTION}", QUESTION)
    is_question(processor_of_kind(kind, template), f"{IMAGE}\n{QUESTION}</s>", QUESTION)


@pytest.mark.parametrize("kind", KINDS)
def test_templates_for_strings_and_templates_without_an_end(kind: str) -> None:
    processor = processor_of_kind(kind, VICUNA)
    messages = [{"role": "user", "content": f"{IMAGE}\n{QUESTION}"}]
    is_question(processor, rendered(processor, *messages), QUESTION)
    is_question(processor, rendered(processor, *messages) + " It is", QUESTION)
    bare = processor_of_kind(kind, BARE)
    is_question(bare, rendered(bare, user(QUESTION)), QUESTION)
    # Users' texts in parts, and answers as strings.
    mixed = processor_of_kind(kind, TEMPLATES["inst"].replace("m['content'][0]['text']", "m['content']"))
    chat = (user("what digit is red"), {"role": "assistant", "content": "seven"}, user(QUESTION, images=0))
    is_question(mixed, rendered(mixed, *chat), QUESTION)
    # The tokenizer's template works like the processor's.
    tokenizer = tokenizer_of_kind(kind)
    tokenizer.chat_template = TEMPLATES["llava"]
    try:
        is_question(_Holder(tokenizer), rendered(processor_of_kind(kind, "llava"), user(QUESTION)), QUESTION)
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_mark_turns_resolve_every_chat(kind: str) -> None:
    processor = processor_of_kind(kind, "qwen")
    again = (user(QUESTION), assistant("It is the cat"))
    is_question(processor, rendered(processor, *again), QUESTION)
    is_question(processor, rendered(processor, *again, assistant("red")), QUESTION)
    is_question(processor, rendered(processor, *again, call=False), QUESTION)
    twice = (user("what digit is red"), user(QUESTION, images=0))
    is_question(processor, rendered(processor, *twice), QUESTION)
    is_question(processor, rendered(processor, *twice, call=False), QUESTION)
    is_question(processor, rendered(processor, *twice, assistant("It is the cat")), QUESTION)
    # Other special tokens may be part of a user's text.
    prompted, columns = question(processor, rendered(processor, user("is it <s> or red")))
    start = prompted.text.rindex("is it <s>")
    assert [prompted.columns(start, start + 1)[0], prompted.columns(start + 15, start + 16)[0]] == [
        columns[0],
        columns[-1],
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["llava", "inst", "glued"])
def test_two_texts_that_may_be_one_are_refused(kind: str, template: str) -> None:
    processor = processor_of_kind(kind, template)
    for call in (True, False):
        with pytest.raises(ValueError, match=r"^rows:"):
            question(processor, rendered(processor, user("what digit is red"), user(QUESTION, images=0), call=call))
    chat = (user("hello"), assistant("seven"), user("what digit is red", images=0), user(QUESTION, images=0))
    with pytest.raises(ValueError, match=r"^rows:"):
        question(processor, rendered(processor, *chat))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "word-piece"])
def test_a_text_ends_before_a_special_token_after_an_answer(kind: str) -> None:
    processor = processor_of_kind(kind, VICUNA)
    messages = [{"role": "user", "content": f"{IMAGE}\n{QUESTION}"}, {"role": "assistant", "content": "It is the cat"}]
    is_question(processor, rendered(processor, *messages), QUESTION)
    # Written by hand: only the special token is the template's.
    with pytest.raises(ValueError, match=r"^rows:"):
        question(processor, f"{IMAGE} {QUESTION}</s> and now {QUESTION}")


@pytest.mark.parametrize("template", ["qwen", "llava"])
def test_a_template_with_characters_unknown_to_the_tokenizer(template: str) -> None:
    processor = processor_of_kind(NO_BREAKS, template)
    assert processor.tokenizer.unk_token_id in processor.tokenizer("\n")["input_ids"]
    chat = (user("what digit is red"), assistant("seven"), user(QUESTION, images=0))
    for each in ((user(QUESTION),), chat):
        is_question(processor, rendered(processor, *each), QUESTION)
        is_question(processor, rendered(processor, *each, assistant("the cat is red"), call=False), QUESTION)


def test_a_template_of_unknown_characters_only_is_refused() -> None:
    processor = processor_of_kind(NO_BREAKS, TEMPLATES["glued"].replace("ASSISTANT:", "\u0416\u0416"))
    with pytest.raises(ValueError, match=r"^rows:"):
        question(processor, rendered(processor, user(f"{QUESTION} \u0416 {QUESTION}")))


@pytest.mark.parametrize("of_tokenizer", ["llava", "qwen", "inst"])
@pytest.mark.parametrize("of_processor", ["llava", "qwen", "inst"])
def test_a_prompt_by_the_tokenizers_template_with_another_in_the_processor(
    of_processor: str, of_tokenizer: str
) -> None:
    tokenizer = copy.copy(tokenizer_of_kind("llama"))
    tokenizer.chat_template = TEMPLATES[of_tokenizer]
    processor = processor_of_kind("llama", of_processor)
    processor.tokenizer = tokenizer
    text = tokenizer.apply_chat_template([user(QUESTION)], add_generation_prompt=True, tokenize=False)
    is_question(processor, text, QUESTION)
    is_question(processor, rendered(processor, user(QUESTION)), QUESTION)


@pytest.mark.parametrize("names", [("vision",), ("default", "vision"), ("plain", "vision")])
def test_named_templates(names: tuple[str, ...]) -> None:
    text = rendered(processor_of_kind("llama", "llava"), user(QUESTION))
    processor = _Holder(copy.copy(tokenizer_of_kind("llama")))
    processor.tokenizer.chat_template = dict.fromkeys(names, TEMPLATES["qwen"]) | {"vision": TEMPLATES["llava"]}
    is_question(processor, text, QUESTION)
    if len(names) == 1:
        assert build_prompt(processor, QUESTION) == text


class _Holder:
    """A processor without a chat template."""

    chat_template, image_token = None, IMAGE

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.apply_chat_template = tokenizer.apply_chat_template


def test_a_template_may_trim_and_lower_the_text_but_not_drop_it() -> None:
    trimmed = TEMPLATES["llava"].replace("part['text']", "part['text'] | trim | lower")
    processor = processor_of_kind("llama", trimmed)
    is_question(processor, rendered(processor, user(f"  {QUESTION} ")), QUESTION.lower())
    dropped = TEMPLATES["llava"].replace("part['text']", "'a question'")
    with pytest.raises(ValueError, match=r"^processor:"):
        question(processor_of_kind("llama", dropped), f"USER: {IMAGE} {QUESTION} ASSISTANT:")


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_before_the_image_is_refused(kind: str) -> None:
    for template in TEMPLATES:
        processor = processor_of_kind(kind, template)
        last = {"role": "user", "content": [{"type": "text", "text": f"{QUESTION}\n"}, {"type": "image"}]}
        for text in (rendered(processor, last), rendered(processor, last) + " It is", f"{QUESTION} {IMAGE}\n"):
            with pytest.raises(ValueError, match=r"^rows:"):
                question(processor, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("qwen", f"<|im_start|>user\n{IMAGE} {QUESTION}"),
        ("qwen", f"{IMAGE} {QUESTION} <|im_start|>assistant"),
        (CALLING, f"{IMAGE} {QUESTION} Answer:"),
        # Nothing marks where the second text begins.
        (CALLING, f"{IMAGE} {QUESTION}\n## Answer: red {QUESTION}\n## Answer:"),
    ],
)
def test_a_prompt_with_a_part_of_the_template_is_refused(kind: str, template: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"^rows:"):
        question(processor_of_kind(kind, template), text)


def test_unknown_tokens_may_have_been_the_template() -> None:
    processor = processor_of_kind("word-piece", "glued")
    with pytest.raises(ValueError, match=r"^rows:"):
        question(processor, rendered(processor, user("is it İstanbul")))
    processor = processor_of_kind("word-piece", "llava")
    is_question(processor, rendered(processor, user("İstanbul is it")), "is it")
    with pytest.raises(ValueError, match=r"^rows:"):
        question(processor, rendered(processor, user("İstanbul")))


def test_without_a_processor_the_question_is_all_after_the_image() -> None:
    processor = processor_of_kind("llama", "llava")
    prompted = Prompted(processor.tokenizer, rendered(processor, user(QUESTION)))
    rows = resolve_rows("question", prompted.ids, prompted.attended, prompted.tokens, None)
    assert rows.columns[0].tolist() == list(range(int(prompted.tokens.max()) + 1, prompted.ids.shape[1]))


def test_padding_and_rows_of_several_lengths() -> None:
    import torch

    processor = processor_of_kind("llama", "llava")
    texts = [QUESTION, "what digit is red", "a"]
    each = [Prompted(processor.tokenizer, rendered(processor, user(text))) for text in texts]
    width, pad = max(one.ids.shape[1] for one in each), processor.tokenizer.pad_token_id
    for left in (True, False):
        spare = [width - one.ids.shape[1] for one in each]
        sides = [(count, 0) if left else (0, count) for count in spare]
        pads = torch.nn.functional.pad
        rows = resolve_rows(
            "question",
            torch.cat([pads(one.ids, side, value=pad) for one, side in zip(each, sides, strict=True)]),
            torch.cat([pads(one.attended, side, value=False) for one, side in zip(each, sides, strict=True)]),
            torch.cat([one.tokens + count * left for one, count in zip(each, spare, strict=True)]),
            processor,
        )
        for index, one in enumerate(each):
            expected = resolve_rows("question", one.ids, one.attended, one.tokens, processor).columns[0]
            assert rows.weight is not None
            used = rows.columns[index][rows.weight[index, 0] > 0]
            assert used.tolist() == (expected + spare[index] * left).tolist()
            assert rows.weight[index].sum() == pytest.approx(1)


@given(
    text=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffc"), min_size=1, max_size=20),
    kind=st.sampled_from([kind for kind in KINDS if kind != "word-piece"]),
    template=st.sampled_from(sorted(TEMPLATES)),
    more=st.sampled_from(["", " The answer is", "\n"]),
)
@example(text="猫\u0301 a", kind="llama", template="glued", more="")
def test_any_text_is_found_exactly(text: str, kind: str, template: str, more: str) -> None:
    processor = processor_of_kind(kind, template)
    prompt = rendered(processor, user(text)) + more
    if not text.strip():
        with pytest.raises(ValueError, match=r"^rows:"):
            question(processor, prompt)
        return
    prompted, columns = question(processor, prompt)
    lead = {"llava": "\n", "qwen": "<|vision_end|>"}.get(template, "")
    start = prompted.text.index(IMAGE + lead + text) + len(IMAGE + lead)
    inside = prompted.columns(start, start + len(text))
    visible = prompted.columns(start + len(text) - len(text.lstrip()), start + len(text.rstrip()))
    assert set(visible) <= set(columns)
    outside = processor.tokenizer.convert_ids_to_tokens(prompted.ids[0, sorted(set(columns) - set(inside))].tolist())
    assert not "".join(outside).strip("▁ĠĊ").replace("<0x0A>", "")
