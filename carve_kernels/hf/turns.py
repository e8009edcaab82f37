"""What a chat template writes around the texts of a user, and where the user's last text is in a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from carve_kernels.hf.spelling import find_written, spellings, unknown_of

# Texts that no template holds.
_FIRST, _ANSWER, _SECOND = "carvefirstquestion", "carvefirstanswer", "carvesecondquestion"
_Form = Callable[[str], Any]
_SAID = re.compile("|".join((_FIRST, _ANSWER, _SECOND)), re.IGNORECASE)


class Turns(NamedTuple):
    """What stands around the user's texts.

    =======  ====================================================================
    name     meaning
    =======  ====================================================================
    lead     between the image and the user's text; white space in it counts as the user's
    call     behind the user's text, the call for an answer included
    close    behind the user's text where no answer is called for
    answer   between the user's text and an answer
    turn     between an answer and the user's next text
    =======  ====================================================================
    """

    lead: str
    call: str
    close: str
    answer: str
    turn: str


def template_of(processor: Any) -> Any:
    """The processor, or its tokenizer, whichever has a chat template; None where neither has one."""
    for holder in (processor, getattr(processor, "tokenizer", None)):
        if getattr(holder, "chat_template", None):
            return holder
    return None


def turns_of(processor: Any) -> list[Turns]:
    """What the chat template writes around texts: beside an image, alone, not in parts; none where it rewrites them."""
    template, image = template_of(processor), getattr(processor, "image_token", None)
    if template is None:
        return []
    forms: list[tuple[_Form, _Form]] = [(_shown, _in_parts), (_in_parts, _in_parts), (str, str)]
    return [turns for form in forms if (turns := _turns(template, image, *form)) is not None]


def last_call(text: str, start: int, turns: list[Turns], tokenizer: Any) -> tuple[int, int] | None:
    """The characters of the last call for an answer behind `start`."""
    return max((span for each in turns for span in _calls(text, start, each, tokenizer)), default=None)


def last_question(text: str, start: int, turns: list[Turns], tokenizer: Any) -> tuple[int, int]:
    """The characters between an image that ends at `start` and the end of the user's last text.

    Raises ValueError if the prompt has a part of the template, but not what would say where the user's text ends.
    """
    for each in turns:
        found = _question(text, start, each, tokenizer)
        if found is not None:
            return found
    for each in turns:
        parts = [(part, start) for wanted in (each.call, each.close, each.answer) for part in wanted.split()]
        # Where a user's text has an end that can be seen, one that was begun has lost it.
        parts += [(part, 0) for part in each.turn.split() if each.close.strip()]
        # What the tokenizer does not know may have been the template's.
        parts.append((unknown_of(tokenizer) or "", start))
        for part, first in parts:
            if _places(text, part, first, tokenizer):
                raise ValueError(
                    f"rows: expected the chat template's {(each.call or each.close)!r} behind the question, the prompt "
                    f"has only {part!r}; make it by apply_chat_template, or use rows=('text', TEXT)"
                )
    return start, len(text)


def _question(text: str, start: int, turns: Turns, tokenizer: Any) -> tuple[int, int] | None:
    """The same, None where the prompt was not made by this template."""
    calls = _calls(text, start, turns, tokenizer)
    if len({first for first, _ in calls}) > 1 and not turns.turn.strip():
        raise ValueError(
            "rows: expected one call for an answer behind the image, since the chat template does not show where a "
            f"user's next text begins, got {turns.call!r} twice; use rows=('text', TEXT)"
        )
    # A user's next text stands behind an answer.
    answered = min((stop for _, stop in calls), default=len(text)) if turns.answer.strip() else start
    nexts = [span for span in _places(text, turns.turn, start, tokenizer) if span[0] >= answered]
    begin = _visible(text, nexts[-1][1]) if nexts else _behind(text, start, turns.lead, tokenizer)
    if calls and calls[-1][0] >= begin:
        return begin, calls[-1][0]
    closes = _places(text, turns.close, begin, tokenizer)
    if closes:
        return begin, closes[-1][0]
    calling = (turns.call + turns.answer).strip()
    return None if turns.close.strip() or (calling and not calls) else (begin, len(text))


def _calls(text: str, start: int, turns: Turns, tokenizer: Any) -> list[tuple[int, int]]:
    return sorted(_places(text, turns.call, start, tokenizer) + _places(text, turns.answer, start, tokenizer))


def _behind(text: str, start: int, lead: str, tokenizer: Any) -> int:
    """Where the text goes on behind a lead that it may begin with."""
    for first, stop in _places(text, lead, start, tokenizer)[:1]:
        if not text[start:first].strip():
            return stop
    return start


def _visible(text: str, place: int) -> int:
    """The next place that is no white space."""
    while text[place : place + 1].isspace():
        place += 1
    return place


def _places(text: str, wanted: str, start: int, tokenizer: Any) -> list[tuple[int, int]]:
    if wanted.strip():
        for spelling in spellings(tokenizer, wanted):
            found = find_written(text, spelling, start)
            if found:
                return found
    return []


def _turns(template: Any, image: str | None, first: _Form, later: _Form) -> Turns | None:
    called, closed = (_around(template, [first(_FIRST)], call) for call in (True, False))
    if called is None or closed is None:
        return None
    # Some take a user's texts in parts and an answer as it is.
    longer = (_around(template, [first(_FIRST), answered(_ANSWER), later(_SECOND)]) for answered in (str, later))
    _, answer, turn, _ = next(filter(None, longer), ("", "", "", ""))
    lead = called[0].rpartition(image)[2] if image and image in called[0] else ""
    return Turns(lead, called[1], closed[1], answer, turn)


def _in_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _shown(text: str) -> list[dict[str, str]]:
    return [{"type": "image"}, *_in_parts(text)]


def _around(template: Any, said: list[Any], call: bool = False) -> list[str] | None:
    """What a template writes before, between and behind texts; None where it refuses or rewrites them."""
    chat = [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(said)]
    try:
        rendered = template.apply_chat_template(chat, add_generation_prompt=call, tokenize=False)
    except Exception:
        # Templates refuse what they do not know by errors of many kinds.
        return None
    around = _SAID.split(rendered)
    return around if len(around) == len(said) + 1 else None
