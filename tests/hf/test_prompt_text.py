"""Words and texts are found by the characters of a prompt, for any tokenizer."""

from __future__ import annotations

import unicodedata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carve_kernels.hf.prompt_text import PromptText, find_last
from carve_kernels.hf.query_rows import resolve_rows
from tests.support.generation_kinds import IMAGE, KINDS, Prompted, processor_of_kind, tokenizer_of_kind, user

SPELLING = [kind for kind in KINDS if kind != "word-piece"]


def found(processor: Any, rows: tuple[str, str], text: str, call: bool = True) -> tuple[Prompted, list[int]]:
    prompt = processor.apply_chat_template([user(text)], add_generation_prompt=call, tokenize=False)
    prompted = Prompted(processor.tokenizer, prompt)
    return prompted, resolve_rows(rows, prompted.ids, prompted.attended, prompted.tokens, processor).columns[0].tolist()


def are_those_of(prompted: Prompted, columns: list[int], start: int, spelled: str, tokenizer: Any) -> None:
    expected = prompted.columns(start, start + len(spelled))
    if columns != expected:
        # Some tokenizers give all bytes of unknown characters the offsets of all of these.
        assert set(columns) < set(expected)
        assert tokenizer.decode(prompted.ids[0, columns]).strip() == unicodedata.normalize("NFKC", spelled)


def is_at(kind: str, rows: tuple[str, str], text: str, spelled: str, template: str = "llava") -> None:
    """The columns are those of the last occurrence of `spelled` in the user's text."""
    processor = processor_of_kind(kind, template)
    prompted, columns = found(processor, rows, text)
    start = prompted.text.rindex(text) + text.rindex(spelled)
    are_those_of(prompted, columns, start, spelled, processor.tokenizer)


@pytest.mark.parametrize("kind", SPELLING)
@pytest.mark.parametrize(
    ("spelled", "before", "after"),
    [
        ("猫", "一只", "在"),
        ("猫", "is ", " a cat"),
        ("カメラ", "この", "は"),
        ("고양이", "", "가 있나요"),
        ("แมว", "มี", "ดำไหม"),
        ("café", "un ", " noir"),
        ("हिन्दी", "क्या ", " है"),
        ("traffic light", "is the ", " red"),
        ("what's", "so ", " the left-hand cat"),
        ("left-hand", "so what's the ", " cat"),
        ("cat", "the cat's 3.5 cats, (", ") scat cats"),
        ("5", "is it 3.", " or 55"),
        ("👩\u200d💻", "is 👩\u200d💻 by the 👩 or ", "?"),
        ("👩", "is ", " here with 👩\u200d💻 and 👩🏽"),
        ("❤\ufe0f", "is ", " red"),
        ("C++", "is ", " a cat"),
        ("e", "is ", " h\u00e9r\u00e9 but not e\u0301 th\u00e9r\u00e9"),
    ],
)
def test_a_whole_word_is_found(kind: str, spelled: str, before: str, after: str) -> None:
    processor = processor_of_kind(kind, "llava")
    for wanted in {spelled, spelled.rstrip("\ufe0f")}:
        prompted, columns = found(processor, ("word", wanted), before + spelled + after)
        start = prompted.text.rindex(before + spelled + after) + len(before)
        are_those_of(prompted, columns, start, spelled, processor.tokenizer)


@pytest.mark.parametrize("kind", SPELLING)
def test_case_and_the_form_of_accents_may_differ(kind: str) -> None:
    is_at(kind, ("word", "red"), "İİİ ßß is red İ", "red")
    is_at(kind, ("word", "RED"), "İİİ ßß is red İ", "red")
    # The same case takes precedence over a later occurrence.
    is_at(kind, ("word", "Red"), "is Red", "Red")
    prompted, columns = found(processor_of_kind(kind, "llava"), ("word", "Red"), "is Red or red")
    start = prompted.text.index("Red")
    assert columns == prompted.columns(start, start + 3)
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for spelled in (composed, decomposed):
        for wanted in (composed, decomposed):
            is_at(kind, ("word", wanted), f"un {spelled} noir", spelled)
            is_at(kind, ("text", wanted), f"un {spelled}s noir", spelled)
    is_at(kind, ("text", "the cat\tis"), "where the  cat \n is", "the  cat \n is")


@pytest.mark.parametrize("kind", SPELLING)
def test_all_bytes_of_a_character_are_captured(kind: str) -> None:
    prompted, columns = found(processor_of_kind(kind, "llava"), ("text", "猫"), "一只猫在")
    assert len(columns) == 3
    assert processor_of_kind(kind, "llava").tokenizer.decode(prompted.ids[0, columns]).strip() == "猫"


def test_a_tokenizer_that_changes_case_and_accents() -> None:
    is_at("word-piece", ("word", "Café"), "un CAFÉ cat", "CAFÉ")
    is_at("word-piece", ("text", "what's the Cat, cat"), "so what's the cat, cat.", "what's the cat, cat")
    is_at("word-piece", ("word", "cat."), "is it a cat.", "cat.")
    # Unknown words cannot be distinguished from each other.
    with pytest.raises(ValueError, match=r"^rows:"):
        found(processor_of_kind("word-piece", "llava"), ("word", "bbb"), "is it bbb or qqq")
    # NFKC.
    is_at("first", ("word", "ﬁne"), "is it ﬁne", "ﬁne")
    is_at("first", ("word", "\uff32\uff25\uff24"), "is it \uff32\uff25\uff24", "\uff32\uff25\uff24")


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_words_take_precedence_over_the_templates(kind: str) -> None:
    is_at(kind, ("word", "assistant"), "what is the assistant at", "assistant")
    is_at(kind, ("word", "assistant"), "what is the assistant at", "assistant", "qwen")
    is_at(kind, ("word", "ASSISTANT"), "what is the assistant at", "assistant")
    prompted, columns = found(processor_of_kind(kind, "llava"), ("word", "assistant"), "hello")
    start = prompted.text.rindex("ASSISTANT")
    assert columns == prompted.columns(start, start + len("ASSISTANT"))


@pytest.mark.parametrize("kind", KINDS)
def test_missing_words_and_words_before_the_image_are_refused(kind: str) -> None:
    processor = processor_of_kind(kind, "llava")
    for rows in [("word", "hat"), ("word", "dog"), ("text", "the dog"), ("word", "user"), ("word", "\ufe0f")]:
        with pytest.raises(ValueError, match=r"^rows:"):
            found(processor, rows, "what is it")
    # An image is not a letter, but it separates the letters before and after it.
    prompted = Prompted(processor.tokenizer, f"is {IMAGE} it{IMAGE} red")
    for rows in (("word", "is"), ("text", "it red"), ("text", "\ufffc")):
        with pytest.raises(ValueError, match=r"^rows:"):
            resolve_rows(rows, prompted.ids, prompted.attended, prompted.tokens, processor)
    columns = resolve_rows(("word", "it"), prompted.ids, prompted.attended, prompted.tokens, processor).columns[0]
    assert columns.tolist() == prompted.columns(prompted.text.index("it"), prompted.text.index("it") + 2)


def test_words_added_to_the_vocabulary() -> None:
    tokenizer = tokenizer_of_kind("byte-level")
    ids = tokenizer("is <|im_end|> here")["input_ids"]
    prompt = PromptText(tokenizer, ids, [False] * len(ids))
    start, stop = find_last(prompt.text, "<|im_end|>", word=False) or (0, 0)
    assert [ids[token] for token in prompt.tokens(start, stop)] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_an_incomplete_character_counts_as_one() -> None:
    for kind, byte in (("byte-level", "ç"), ("llama", "<0xE7>")):
        tokenizer = tokenizer_of_kind(kind)
        ids = [*tokenizer("a red")["input_ids"], tokenizer.convert_tokens_to_ids(byte), *tokenizer("cat")["input_ids"]]
        prompt = PromptText(tokenizer, ids, [False] * len(ids))
        start, stop = find_last(prompt.text, "cat", word=False) or (0, 0)
        assert tokenizer.decode([ids[token] for token in prompt.tokens(start, stop)]).strip() == "cat"


def test_a_tokenizer_with_an_unknown_decoding_is_refused() -> None:
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: ["a"] * len(ids), decode=lambda ids, **_: "b")
    with pytest.raises(ValueError, match=r"^processor:"):
        PromptText(tokenizer, [1, 2], [False, False])


def test_a_long_prompt_takes_linear_time() -> None:
    """Counted in decoded tokens: each is decoded once, at any length."""
    processor = processor_of_kind("byte-level", "llava")
    tokenizer, counted = processor.tokenizer, []

    class Counts:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return tokenizer(*args, **options)

        def decode(self, ids: Any, **options: Any) -> Any:
            counted.append(len(ids))
            return tokenizer.decode(ids, **options)

    prompted = Prompted(tokenizer, f"{IMAGE} {'a red square ' * 400} cat")
    processor.tokenizer = Counts()
    resolve_rows(("word", "cat"), prompted.ids, prompted.attended, prompted.tokens, processor)
    assert sum(counted) < 1.1 * prompted.ids.shape[1]


@given(
    before=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12),
    wanted=st.text(
        st.characters(exclude_categories=["Cs", "Cc", "Z", "M"], exclude_characters="\ufffc"), min_size=1, max_size=6
    ),
    after=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12),
    kind=st.sampled_from(SPELLING),
)
def test_exactly_the_named_text_is_found(before: str, wanted: str, after: str, kind: str) -> None:
    processor = processor_of_kind(kind, None)
    tokenizer = processor.tokenizer
    prompted = Prompted(tokenizer, f"{IMAGE}{before} {wanted} {after}")
    try:
        rows = resolve_rows(("text", wanted), prompted.ids, prompted.attended, prompted.tokens, processor)
    except ValueError:
        # A part of a character, as in emoji of a family, or a lone accent.
        written = unicodedata.normalize("NFKC", wanted)
        assert "\u200d" in wanted or unicodedata.category(wanted[-1])[0] in "MC" or written[0] == " "
        return
    columns = rows.columns[0].tolist()
    assert columns == list(range(columns[0], columns[-1] + 1)) and not torch.isin(rows.columns, prompted.tokens).any()
    spelled = unicodedata.normalize("NFKC", tokenizer.decode(prompted.ids[0, columns])).casefold()
    assert unicodedata.normalize("NFKC", wanted).casefold() in spelled
    # Without the first or the last token the text is incomplete.
    for fewer in (columns[1:], columns[:-1]):
        less = unicodedata.normalize("NFKC", tokenizer.decode(prompted.ids[0, fewer])) if fewer else ""
        assert unicodedata.normalize("NFKC", wanted) not in less
