"""The captured rows of a prompt: the last, the last k, given positions, those of the question, of a word or a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch

from carve_kernels import checks
from carve_kernels.hf.chat_templates import last_generation_prompt, last_question, turns_of
from carve_kernels.hf.names import templates_of
from carve_kernels.hf.prompt_text import IMAGE, PromptText, find_last, special_tokens, spellings
from carve_kernels.types import RowsSpec


class Rows(NamedTuple):
    """Captured rows of a prefill: their columns, int64 [B, Q].

    `weight`, float32 [B, R, Q], are the weights of a mean over rows: maps[R] = weight @ maps[Q]; None if R = Q. `last`
    says whether the last one is the prompt's last row.
    """

    columns: torch.Tensor
    weight: torch.Tensor | None
    last: bool


def check_rows(rows: RowsSpec, tokenizer: Any) -> RowsSpec:
    """Check a rows argument before the model runs; a list of positions becomes a tuple."""
    if isinstance(rows, (numpy.ndarray, numpy.generic, torch.Tensor)):
        rows = rows.tolist()
    by_text = isinstance(rows, Sequence) and len(rows) == 2 and rows[0] in ("word", "text")
    if by_text and tokenizer is None:
        raise ValueError(f"processor: expected a processor with rows={rows!r}, got None")
    if (by_text or rows == "question") and not hasattr(tokenizer, "convert_ids_to_tokens") and tokenizer is not None:
        raise TypeError(
            f"processor: expected a processor with a tokenizer, or a tokenizer, with rows={rows!r}, got "
            + checks.describe(tokenizer)
        )
    if isinstance(rows, str):
        return checks.choice("rows", rows, ("last", "question"))
    if isinstance(rows, int):
        return checks.integer("rows", rows, low=1)
    if by_text:
        return (str(rows[0]), checks.text("rows[1]", rows[1]))
    if isinstance(rows, Sequence) and len(rows):
        return tuple(checks.integer(f"rows[{index}]", row) for index, row in enumerate(rows))
    raise TypeError(
        "rows: expected 'last', 'question', a number of last rows, positions, ('word', WORD) or ('text', TEXT), got "
        + checks.describe(rows)
    )


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
    if not isinstance(rows, str) and isinstance(rows[0], int):
        return Rows(_positions(tuple(int(row) for row in rows), attended), None, False)
    if ids is None:
        raise ValueError(f"input_ids: expected input_ids with rows={rows!r}, got none (a forward with inputs_embeds?)")
    find = _Finder(rows, processor)
    groups = [find(ids[row], attended[row].nonzero()[:, 0], tokens[row]) for row in range(len(ids))]
    width = max(len(group) for group in groups)
    index = torch.stack([torch.cat([group, group[-1:].expand(width - len(group))]) for group in groups])
    weight = torch.zeros(len(groups), 1, width)
    for row, group in enumerate(groups):
        weight[row, 0, : len(group)] = 1.0 / len(group)
    return Rows(index, weight, False)


def general_rows(rows: RowsSpec) -> RowsSpec:
    """The rows of the general instruction: its own text instead of a word or text of the question."""
    return "question" if isinstance(rows, tuple) and rows[0] in ("word", "text") else rows


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def _positions(rows: tuple[int, ...], attended: torch.Tensor) -> torch.Tensor:
    length = attended.shape[1]
    for row in rows:
        if not -length <= row < length:
            raise ValueError(f"rows: expected positions from {-length} to {length - 1}, got {row}")
    index = torch.tensor([row % length for row in rows])
    for prompt, mask in enumerate(attended):
        if not bool(mask[index].all()):
            missing = index[~mask[index]][0].item()
            raise ValueError(f"rows: expected positions of tokens, got {missing}, which is padding in prompt {prompt}")
    return index.expand(attended.shape[0], -1)


class _Finder:
    """Finds the columns of a question, a word or a text in prompts."""

    def __init__(self, rows: Any, processor: Any) -> None:
        self._kind: str = rows if isinstance(rows, str) else rows[0]
        self._text: str = "" if isinstance(rows, str) else rows[1]
        self._tokenizer: Any = None if processor is None else tokenizer_of(processor)
        self._turns = [] if processor is None else turns_of(processor)
        if self._kind == "question" and not self._turns and templates_of(processor):
            raise ValueError(
                "processor: expected a chat template that keeps a user's text unchanged, this one refuses or rewrites "
                "it; use rows=('text', TEXT)"
            )

    def __call__(self, ids: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The columns in a prompt: ids int64 [S], the columns without padding, visual tokens int32 [N]."""
        after_image = int((columns <= tokens.max()).sum()) if tokens.numel() else 0
        if self._tokenizer is None:
            indices = list(range(after_image, len(columns)))
        else:
            prompt = ids[columns]
            visual = torch.isin(columns, tokens.to(columns.dtype)) | (prompt < 0)
            text = PromptText(self._tokenizer, prompt.tolist(), visual.tolist())
            question = self._kind == "question"
            indices = self._question(text, prompt.tolist(), after_image) if question else self._span(text)
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

    def _span(self, prompt: PromptText) -> list[int]:
        """The tokens of the last occurrence after the first image; in a generation prompt only if there is no other."""
        text, first = prompt.text, prompt.first
        call = last_generation_prompt(text, first, self._turns, self._tokenizer)
        masked = text if call is None else text[: call[0]] + IMAGE * (call[1] - call[0]) + text[call[1] :]
        forms = [form for form in spellings(self._tokenizer, self._text) if IMAGE not in form]
        for searched in dict.fromkeys((masked, text)):
            for form in forms:
                span = find_last(searched, form, self._kind == "word", first)
                if span is not None:
                    return prompt.tokens(*span)
        if any(find_last(text[:first], form, self._kind == "word") for form in forms):
            raise ValueError(
                f"rows: expected a {self._kind} after the image, got {self._text!r}, which is before it and cannot "
                "attend to it"
            )
        excerpt = text.replace(IMAGE, "")[-200:]
        raise ValueError(
            f"rows: expected a {self._kind} of the prompt, got {self._text!r}; the prompt reads {excerpt!r}"
        )
