"""What a chat template writes around the texts of a user, and where the user's last text is in a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from carve_kernels.hf.spelling import find_written, special_tokens, spellings, unknown_of

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
    again    between a user's text and the same user's next one, no answer between them
    =======  ====================================================================
    """

    lead: str
    call: str
    close: str
    answer: str
    turn: str
    again: str


def templates_of(processor: Any) -> list[tuple[Any, dict[str, str]]]:
    """The processor and its tokenizer where they have chat templates, with these by name, the default one first."""
    found = []
    for owner in (processor, getattr(processor, "tokenizer", None)):
        held = getattr(owner, "chat_template", None)
        named = dict(held) if isinstance(held, Mapping) else {"default": held}
        names = sorted((name for name in named if named[name]), key=lambda name: name != "default")
        if names:
            found.append((owner, {name: str(named[name]) for name in names}))
    return found


def turns_of(processor: Any) -> list[Turns]:
    """What each chat template writes around texts: beside an image, alone, not in parts; not where it rewrites them."""
    image = getattr(processor, "image_token", None)
    owners: dict[str, Any] = {}
    for owner, named in templates_of(processor):
        for template in named.values():
            owners.setdefault(template, owner)
    forms: list[tuple[_Form, _Form]] = [(_shown, _in_parts), (_in_parts, _in_parts), (str, str)]
    each = [_turns(owner, template, image, *form) for template, owner in owners.items() for form in forms]
    return [turns for turns in each if turns is not None]


def last_call(text: str, start: int, turns: list[Turns], tokenizer: Any) -> tuple[int, int] | None:
    """The characters of the last call for an answer behind `start`."""
    return max((span for each in turns for span in _calls(text, start, each, tokenizer)), default=None)


def last_question(text: str, start: int, turns: list[Turns], tokenizer: Any) -> tuple[int, int]:
    """The characters between an image that ends at `start` and the end of the user's last text.

    Raises ValueError if the prompt has a part of the template, but not what would say where the user's text begins and
    ends.
    """
    marks = _marks(turns, tokenizer)
    begin, stop = _last_text(text, start, turns, tokenizer, marks)
    between = re.split("|".join(map(re.escape, marks)), text[begin:stop]) if marks else []
    if sum(bool(part.strip()) for part in between) > 1:
        raise ValueError(
            f"rows: expected one text of the user behind the image, the prompt has {text[begin:stop]!r} with special "
            "tokens of a chat template in it; make it by apply_chat_template, or use rows=('text', TEXT)"
        )
    return begin, stop


def _marks(turns: list[Turns], tokenizer: Any) -> set[str]:
    """The special tokens that templates write behind a user's text: no user writes them."""
    written = "".join(text for each in turns for text in each[1:])
    return {token for token in special_tokens(tokenizer) - {unknown_of(tokenizer)} if token in written}


def _last_text(text: str, start: int, turns: list[Turns], tokenizer: Any, marks: set[str]) -> tuple[int, int]:
    for each in turns:
        found = _question(text, start, each, tokenizer, marks)
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
        _refuse_two(text[start:], each, tokenizer)
    return start, len(text)


def _question(text: str, start: int, turns: Turns, tokenizer: Any, marks: set[str]) -> tuple[int, int] | None:
    """The characters of the user's last text, None where the prompt was not made by this template."""
    calls = _calls(text, start, turns, tokenizer)
    if len({first for first, _ in calls}) > 1 and not turns.turn.strip():
        raise ValueError(
            "rows: expected one call for an answer behind the image, since the chat template does not show where a "
            f"user's next text begins, got {turns.call!r} twice; use rows=('text', TEXT)"
        )
    begin = _begin(text, start, turns, tokenizer, marks)
    ends = [first for first, _ in calls if first >= begin]
    closes = [first for first, _ in _places(text, turns.close, begin, tokenizer)]
    for found, wanted in ((ends, turns.call + turns.answer), (closes, turns.close)):
        if found:
            stop = found[0] if _marked(wanted, marks) else _last_before_mark(text, begin, found, marks)
            _refuse_two(text[begin:stop], turns, tokenizer)
            return begin, stop
    calling = (turns.call + turns.answer).strip()
    if turns.close.strip() or (calling and not calls):
        return None
    _refuse_two(text[begin:], turns, tokenizer)
    return begin, len(text)


def _begin(text: str, start: int, turns: Turns, tokenizer: Any, marks: set[str]) -> int:
    """Where the user's last text begins."""
    nexts = _places(text, turns.turn, start, tokenizer)
    if turns.answer.strip() and not _marked(turns.turn, marks):
        # A user's next text stands behind an answer, and may hold what looks like the beginning of another one.
        last = max(nexts, default=(0, 0))[0]
        answered = max((stop for _, stop in _calls(text, start, turns, tokenizer) if stop <= last), default=len(text))
        nexts = [span for span in nexts if span[0] >= answered][:1]
    if _marked(turns.again, marks):
        nexts += _places(text, turns.again, start, tokenizer)
    return _visible(text, max(nexts)[1]) if nexts else _behind(text, start, turns.lead, tokenizer)


def _last_before_mark(text: str, begin: int, found: list[int], marks: set[str]) -> int:
    """The last place that a text of a user may reach: it may hold what the template writes, but no special tokens."""
    limit = min((place for mark in marks if (place := text.find(mark, begin)) >= 0), default=len(text))
    return [place for place in found if place <= limit or place == found[0]][-1]


def _refuse_two(asked: str, turns: Turns, tokenizer: Any) -> None:
    """Refuse a text of the user's that may be two, where the template marks them by what a user may write."""
    for wanted in (turns.again, turns.turn):
        if _places(asked, wanted, 0, tokenizer):
            raise ValueError(
                f"rows: expected one text of the user behind the image, got {asked!r}, where {wanted!r} may begin "
                "another one; use rows=('text', TEXT)"
            )


def _marked(wanted: str, marks: set[str]) -> bool:
    return any(mark in wanted for mark in marks)


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
        for spelling in spellings(tokenizer, wanted, unknown=True):
            found = find_written(text, spelling, start)
            if found:
                return found
    return []


def _turns(owner: Any, template: str, image: str | None, first: _Form, later: _Form) -> Turns | None:
    asked = ("user", first(_FIRST))
    called, closed = (_around(owner, template, [asked], call) for call in (True, False))
    if called is None or closed is None:
        return None
    # Some take a user's texts in parts and an answer as it is.
    answers = [("assistant", answered(_ANSWER)) for answered in (str, later)]
    longer = (_around(owner, template, [asked, answer, ("user", later(_SECOND))]) for answer in answers)
    _, answer, turn, _ = next(filter(None, longer), ("", "", "", ""))
    _, again, _ = _around(owner, template, [asked, ("user", later(_SECOND))]) or ("", "", "")
    lead = called[0].rpartition(image)[2] if image and image in called[0] else ""
    return Turns(lead, called[1], closed[1], answer, turn, again)


def _in_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _shown(text: str) -> list[dict[str, str]]:
    return [{"type": "image"}, *_in_parts(text)]


def _around(owner: Any, template: str, said: list[tuple[str, Any]], call: bool = False) -> list[str] | None:
    """What a template writes before, between and behind texts; None where it refuses or rewrites them."""
    chat = [{"role": role, "content": content} for role, content in said]
    try:
        rendered = owner.apply_chat_template(chat, chat_template=template, add_generation_prompt=call, tokenize=False)
    except Exception:
        # Templates refuse what they do not know by errors of many kinds.
        return None
    around = _SAID.split(rendered)
    return around if len(around) == len(said) + 1 else None
