"""What chat templates write around a user's texts, and where the user's last text is in a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from carve_kernels.hf.names import templates_of
from carve_kernels.hf.prompt_text import find_written, special_tokens, spellings, unknown_of

# Texts that no template contains.
_FIRST, _ANSWER, _SECOND = "carvefirstquestion", "carvefirstanswer", "carvesecondquestion"
_Form = Callable[[str], Any]
_PROBES = re.compile("|".join((_FIRST, _ANSWER, _SECOND)), re.IGNORECASE)


class Turns(NamedTuple):
    """What a template writes around the user's texts."""

    # Between the image and the user's text; its white space counts as the user's.
    lead: str
    # After the user's text, with add_generation_prompt and without it.
    generation_prompt: str
    close: str
    # Between the user's text and an answer, an answer and the user's next text, and two consecutive texts of the user.
    answer: str
    turn: str
    again: str


def turns_of(processor: Any) -> list[Turns]:
    """The turns of each template for texts with an image, texts in parts and strings, unless it rewrites them."""
    image = getattr(processor, "image_token", None)
    owners: dict[str, Any] = {}
    for owner, named in templates_of(processor):
        for template in named.values():
            owners.setdefault(template, owner)
    forms: list[tuple[_Form, _Form]] = [(_with_image, _in_parts), (_in_parts, _in_parts), (str, str)]
    probed = [_probe(owner, template, image, *form) for template, owner in owners.items() for form in forms]
    return [turns for turns in probed if turns is not None]


def last_generation_prompt(text: str, start: int, turns: list[Turns], tokenizer: Any) -> tuple[int, int] | None:
    """The span of the last generation prompt after `start`."""
    return max((span for each in turns for span in _generation_prompts(text, start, each, tokenizer)), default=None)


def last_question(text: str, start: int, turns: list[Turns], tokenizer: Any) -> tuple[int, int]:
    """The span of the user's last text after an image that ends at `start`.

    Raises ValueError if the prompt contains parts of the template, but not those that mark where the text begins
    and ends.
    """
    # The special tokens that templates write after a user's text; users do not write them.
    written = "".join(text for each in turns for text in each[1:])
    marks = {token for token in special_tokens(tokenizer) - {unknown_of(tokenizer)} if token in written}
    begin, stop = _last_text(text, start, turns, tokenizer, marks)
    between = re.split("|".join(map(re.escape, marks)), text[begin:stop]) if marks else []
    if sum(bool(text.strip()) for text in between) > 1:
        raise ValueError(
            f"rows: expected one text of the user after the image, the prompt has {text[begin:stop]!r}, which contains "
            "special tokens of a chat template; build it by apply_chat_template, or use rows=('text', TEXT)"
        )
    return begin, stop


def _last_text(text: str, start: int, turns: list[Turns], tokenizer: Any, marks: set[str]) -> tuple[int, int]:
    for each in turns:
        span = _question(text, start, each, tokenizer, marks)
        if span is not None:
            return span
    for each in turns:
        after_text = f"{each.generation_prompt} {each.close} {each.answer}"
        parts = [(part, start) for part in after_text.split()]
        # If the template marks the end of a text, a text that began has lost its end.
        parts += [(part, 0) for part in each.turn.split() if each.close.strip()]
        # An unknown token may have been the template's.
        parts.append((unknown_of(tokenizer) or "", start))
        for part, first in parts:
            if _spans(text, part, first, tokenizer):
                raise ValueError(
                    f"rows: expected the chat template's {(each.generation_prompt or each.close)!r} after the "
                    f"question, the prompt has only {part!r}; build it by apply_chat_template, or use "
                    "rows=('text', TEXT)"
                )
        _refuse_two(text[start:], each, tokenizer)
    return start, len(text)


def _question(text: str, start: int, turns: Turns, tokenizer: Any, marks: set[str]) -> tuple[int, int] | None:
    """The span of the user's last text; None if the prompt was not built by this template."""
    prompts = _generation_prompts(text, start, turns, tokenizer)
    if len({first for first, _ in prompts}) > 1 and not turns.turn.strip():
        raise ValueError(
            "rows: expected one generation prompt after the image, since the chat template does not mark where a "
            f"user's next text begins, got {turns.generation_prompt!r} twice; use rows=('text', TEXT)"
        )
    begin = _begin(text, start, turns, tokenizer, marks)
    ends = [first for first, _ in prompts if first >= begin]
    closes = [first for first, _ in _spans(text, turns.close, begin, tokenizer)]
    for candidates, wanted in ((ends, turns.generation_prompt + turns.answer), (closes, turns.close)):
        if candidates:
            stop = candidates[0] if _has_mark(wanted, marks) else _last_before_mark(text, begin, candidates, marks)
            _refuse_two(text[begin:stop], turns, tokenizer)
            return begin, stop
    expected = (turns.generation_prompt + turns.answer).strip()
    if turns.close.strip() or (expected and not prompts):
        return None
    _refuse_two(text[begin:], turns, tokenizer)
    return begin, len(text)


def _begin(text: str, start: int, turns: Turns, tokenizer: Any, marks: set[str]) -> int:
    """Where the user's last text begins."""
    nexts = _spans(text, turns.turn, start, tokenizer)
    if turns.answer.strip() and not _has_mark(turns.turn, marks):
        # A user's next text follows an answer, and may contain what looks like the start of another one.
        last = max(nexts, default=(0, 0))[0]
        prompts = _generation_prompts(text, start, turns, tokenizer)
        answered = max((stop for _, stop in prompts if stop <= last), default=len(text))
        nexts = [span for span in nexts if span[0] >= answered][:1]
    if _has_mark(turns.again, marks):
        nexts += _spans(text, turns.again, start, tokenizer)
    if nexts:
        return len(text) - len(text[max(nexts)[1] :].lstrip())
    lead = next(iter(_spans(text, turns.lead, start, tokenizer)), None)
    return start if lead is None or text[start : lead[0]].strip() else lead[1]


def _last_before_mark(text: str, begin: int, ends: list[int], marks: set[str]) -> int:
    """The last possible end of a user's text, which may contain what the template writes, but no special tokens."""
    limit = min((index for mark in marks if (index := text.find(mark, begin)) >= 0), default=len(text))
    return [end for end in ends if end <= limit or end == ends[0]][-1]


def _refuse_two(question: str, turns: Turns, tokenizer: Any) -> None:
    """Raise ValueError for a text that may be two, if the template separates texts by what a user may write."""
    for wanted in (turns.again, turns.turn):
        if _spans(question, wanted, 0, tokenizer):
            raise ValueError(
                f"rows: expected one text of the user after the image, got {question!r}, where {wanted!r} may begin "
                "another one; use rows=('text', TEXT)"
            )


def _has_mark(wanted: str, marks: set[str]) -> bool:
    return any(mark in wanted for mark in marks)


def _generation_prompts(text: str, start: int, turns: Turns, tokenizer: Any) -> list[tuple[int, int]]:
    beginnings = (turns.generation_prompt, turns.answer)
    return sorted(span for wanted in beginnings for span in _spans(text, wanted, start, tokenizer))


def _spans(text: str, wanted: str, start: int, tokenizer: Any) -> list[tuple[int, int]]:
    if wanted.strip():
        for spelling in spellings(tokenizer, wanted, unknown=True):
            spans = find_written(text, spelling, start)
            if spans:
                return spans
    return []


def _probe(owner: Any, template: str, image: str | None, first: _Form, later: _Form) -> Turns | None:
    """The turns of one template, from its renderings of texts that it cannot contain; None if it rewrites them."""
    question = ("user", first(_FIRST))
    prompted, closed = (_around(owner, template, [question], added) for added in (True, False))
    if prompted is None or closed is None:
        return None
    # Some templates take a user's texts in parts, but answers as strings.
    answers = [("assistant", form(_ANSWER)) for form in (str, later)]
    longer = (_around(owner, template, [question, answer, ("user", later(_SECOND))]) for answer in answers)
    _, answer, turn, _ = next(filter(None, longer), ("", "", "", ""))
    _, again, _ = _around(owner, template, [question, ("user", later(_SECOND))]) or ("", "", "")
    lead = prompted[0].rpartition(image)[2] if image and image in prompted[0] else ""
    return Turns(lead, prompted[1], closed[1], answer, turn, again)


def _in_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _with_image(text: str) -> list[dict[str, str]]:
    return [{"type": "image"}, *_in_parts(text)]


def _around(
    owner: Any, template: str, messages: list[tuple[str, Any]], add_generation_prompt: bool = False
) -> list[str] | None:
    """What a template writes before, between and after texts; None if it refuses or rewrites them."""
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        rendered = owner.apply_chat_template(
            chat, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception:
        # Templates refuse unsupported messages by errors of many kinds.
        return None
    around = _PROBES.split(rendered)
    return around if len(around) == len(messages) + 1 else None
