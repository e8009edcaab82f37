"""The captured rows of a prompt: the last, the last k, given positions, those of the question, of a word or a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from carve_kernels import checks
from carve_kernels.hf.chat_templates import last_generation_prompt, last_question, turns_of
from carve_kernels.hf.names import templates_of
from carve_kernels.hf.prompt_text import IMAGE, PromptText, find_last, special_tokens, spellings
from carve_kernels.types import RowsSpec

_WHOLE = ("last", "question")
_BY_TEXT = ("word", "text")


class Rows(NamedTuple):
    """Captured rows of a prefill: their columns, int64 [B, Q].

    `weight`, float32 [B, R, Q], are the weights of a mean over rows: maps[R] = weight @ maps[Q]; None if R = Q. `last`
    says whether the last one is the prompt's last row.
    """

    columns: torch.Tensor
    weight: torch.Tensor | None
    last: bool


def check_rows(rows: Any, tokenizer: Any) -> RowsSpec:
    """Check a rows argument before the model runs; lists become tuples, a choice for each prompt a tuple of choices."""
    checked = _checked(checks.plain(rows))
    choices = checked if _is_by_prompt(checked) else (checked,)
    by_text = any(isinstance(choice, tuple) and choice[0] in _BY_TEXT for choice in choices)
    if by_text and tokenizer is None:
        raise ValueError(f"processor: expected a processor with rows={rows!r}, got None")
    if tokenizer is not None and not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(
            f"processor: expected a processor with a tokenizer, or a tokenizer, got {checks.describe(tokenizer)}"
        )
    return checked


def resolve_rows(
    rows: RowsSpec, ids: torch.Tensor | None, attended: torch.Tensor, tokens: torch.Tensor, processor: Any
) -> Rows:
    """Find the rows in a prompt: ids int64 [B, S], attended bool [B, S], visual tokens int32 [B, N], on the CPU."""
    if rows == "last" or isinstance(rows, int):
        count = 1 if rows == "last" else int(rows)
        selected = []
        for row, mask in enumerate(attended):
            columns = mask.nonzero()[:, 0]
            if len(columns) < count:
                raise ValueError(f"rows: expected at most the {len(columns)} tokens of prompt {row}, got {count}")
            selected.append(columns[-count:])
        return Rows(torch.stack(selected), None, True)
    batch = len(attended)
    choices: Any = rows if _is_by_prompt(rows) else (rows,) * batch
    if len(choices) != batch:
        raise ValueError(f"rows: expected a choice for each of the {batch} prompts, got {len(choices)}: {rows!r}")
    if isinstance(choices[0], tuple) and isinstance(choices[0][0], int):
        return Rows(torch.stack(list(map(_positions, choices, attended, range(batch)))), None, False)
    if ids is None:
        raise ValueError(f"input_ids: expected input_ids with rows={rows!r}, got none (a forward with inputs_embeds?)")
    find, groups = _Finder(processor), []
    for row, choice in enumerate(choices):
        try:
            groups.append(find(choice, ids[row], attended[row].nonzero()[:, 0], tokens[row]))
        except ValueError as error:
            if batch == 1:
                raise
            raise ValueError(f"{error} (prompt {row} of the batch)") from error
    width = max(len(group) for group in groups)
    index = torch.stack([torch.cat([group, group[-1:].expand(width - len(group))]) for group in groups])
    weight = torch.zeros(batch, 1, width)
    for row, group in enumerate(groups):
        weight[row, 0, : len(group)] = 1.0 / len(group)
    return Rows(index, weight, False)


def general_rows(rows: RowsSpec) -> RowsSpec:
    """The rows of the general instruction: its own text instead of a word or text of the question."""
    return "question" if isinstance(rows, tuple) and rows[0] in _BY_TEXT else rows


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def _checked(rows: Any) -> Any:
    """A rows argument in its one form."""
    if isinstance(rows, str):
        return checks.choice("rows", rows, _WHOLE)
    if isinstance(rows, int):
        return checks.integer("rows", rows, low=1)
    if not isinstance(rows, Sequence) or isinstance(rows, bytes) or not len(rows):
        raise TypeError(
            "rows: expected 'last', 'question', a number of last rows, positions, ('word', WORD), ('text', TEXT), or a "
            f"list with one of these for each prompt, got {checks.describe(rows)}"
        )
    values = [checks.plain(value) for value in rows]
    if _is_text(values):
        kind, texts = values
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            return kind, checks.text("rows[1]", texts)
        return tuple((kind, checks.text(f"rows[1][{row}]", text)) for row, text in enumerate(texts))
    if not any(isinstance(value, (str, Sequence)) for value in values):
        return _integers("rows", values)
    if any(isinstance(value, str) or _is_text(value) for value in values):
        return tuple(_choice(f"rows[{row}]", value) for row, value in enumerate(values))
    positions = tuple(_integers(f"rows[{row}]", value) for row, value in enumerate(values))
    if len(set(map(len, positions))) > 1:
        raise ValueError(f"rows: expected as many positions for each prompt, got {[len(each) for each in positions]}")
    return positions


def _choice(name: str, value: Any) -> Any:
    """The choice of one prompt among those of a batch."""
    if isinstance(value, str) and value in _WHOLE:
        return value
    if not _is_text(value):
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(
            f"{name}: expected 'last', 'question', ('word', WORD) or ('text', TEXT), got {checks.describe(value)}"
        )
    return value[0], checks.text(f"{name}[1]", value[1])


def _integers(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or not len(values):
        raise TypeError(f"{name}: expected positions, got {checks.describe(values)}")
    return tuple(checks.integer(f"{name}[{index}]", checks.plain(value)) for index, value in enumerate(values))


def _is_text(value: Any) -> bool:
    """Whether a choice names a word or a text."""
    return isinstance(value, Sequence) and len(value) == 2 and isinstance(value[0], str) and value[0] in _BY_TEXT


def _is_by_prompt(rows: Any) -> bool:
    """Whether checked rows are a choice for each prompt of a batch."""
    return isinstance(rows, tuple) and not isinstance(rows[0], int) and rows[0] not in _BY_TEXT


def _positions(rows: tuple[int, ...], mask: torch.Tensor, prompt: int) -> torch.Tensor:
    length = len(mask)
    for row in rows:
        if not -length <= row < length:
            raise ValueError(f"rows: expected positions from {-length} to {length - 1}, got {row}")
    index = torch.tensor([row % length for row in rows])
    if not bool(mask[index].all()):
        missing = index[~mask[index]][0].item()
        raise ValueError(f"rows: expected positions of tokens, got {missing}, which is padding in prompt {prompt}")
    return index


class _Finder:
    """Finds the columns of a question, a word or a text in prompts."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer: Any = None if processor is None else tokenizer_of(processor)
        self._turns = [] if processor is None else turns_of(processor)

    def __call__(self, choice: Any, ids: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The columns of a choice in a prompt: ids int64 [S], the columns without padding, visual tokens int32 [N]."""
        question = choice == "question"
        # A prompt without an image in a batch has no map, whichever its rows.
        if choice == "last" or (question and tokens.numel() and int(tokens.max()) < 0):
            if not len(columns):
                raise ValueError("rows: expected tokens in the prompt, got padding only")
            return columns[-1:]
        if question and not self._turns and templates_of(self._processor):
            raise ValueError(
                "processor: expected a chat template that keeps a user's text unchanged, this one refuses or rewrites "
                "it; use rows=('text', TEXT)"
            )
        after_image = int((columns <= tokens.max()).sum()) if tokens.numel() else 0
        if self._tokenizer is None:
            indices = list(range(after_image, len(columns)))
        else:
            prompt = ids[columns]
            visual = torch.isin(columns, tokens.to(columns.dtype)) | (prompt < 0)
            text = PromptText(self._tokenizer, prompt.tolist(), visual.tolist())
            indices = self._question(text, prompt.tolist(), after_image) if question else self._span(text, *choice)
        if not indices:
            raise ValueError(
                "rows: expected a question after the image, found no token of one; put the image first, or use "
                "rows='last'"
            )
        return columns[indices]

    def _question(self, prompt: PromptText, ids: list[int], after_image: int) -> list[int]:
        start, stop = last_question(prompt.text, prompt.begin(after_image), self._turns, self._tokenizer)
        question = prompt.text[start:stop]
        special = special_tokens(self._tokenizer)
        indices = prompt.tokens(start, start + len(question.rstrip())) if question.strip() else []
        tokens = self._tokenizer.convert_ids_to_tokens([ids[index] for index in indices])
        return [index for index, token in zip(indices, tokens, strict=True) if token not in special]

    def _span(self, prompt: PromptText, kind: str, wanted: str) -> list[int]:
        """The tokens of the last occurrence after the first image; in a generation prompt only if there is no other."""
        text, first = prompt.text, prompt.first
        call = last_generation_prompt(text, first, self._turns, self._tokenizer)
        masked = text if call is None else text[: call[0]] + IMAGE * (call[1] - call[0]) + text[call[1] :]
        forms = [form for form in spellings(self._tokenizer, wanted) if IMAGE not in form]
        for searched in dict.fromkeys((masked, text)):
            for form in forms:
                span = find_last(searched, form, kind == "word", first)
                if span is not None:
                    return prompt.tokens(*span)
        if any(find_last(text[:first], form, kind == "word") for form in forms):
            raise ValueError(
                f"rows: expected a {kind} after the image, got {wanted!r}, which is before it and cannot attend to it"
            )
        excerpt = text.replace(IMAGE, "")[-200:]
        raise ValueError(f"rows: expected a {kind} of the prompt, got {wanted!r}; the prompt reads {excerpt!r}")
