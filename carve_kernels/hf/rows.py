"""Which rows of a prompt are captured: the last, the last k, positions, the question's tokens, a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from carve_kernels import checks

RowsSpec = str | int | Sequence[int] | tuple[str, str]


class Rows(NamedTuple):
    """Captured rows of a prefill.

    =======  =======  =========  ================================================================
    name     dtype    shape      meaning
    =======  =======  =========  ================================================================
    columns  int64    [B, Q]     columns of the captured rows
    weight   float32  [B, R, Q]  mean over rows: maps[R] = weight @ maps[Q]; None where R = Q
    last     bool                whether the last of them is the prompt's last row
    =======  =======  =========  ================================================================
    """

    columns: torch.Tensor
    weight: torch.Tensor | None
    last: bool


def check_rows(rows: RowsSpec, tokenizer: Any) -> RowsSpec:
    """Check a rows argument before anything runs; a list of positions becomes a tuple."""
    if isinstance(rows, str):
        return checks.choice("rows", rows, ("last", "question"))
    if isinstance(rows, int):
        return checks.integer("rows", rows, low=1)
    if isinstance(rows, Sequence) and len(rows) == 2 and rows[0] in ("word", "text"):
        if tokenizer is None:
            raise ValueError(f"processor: expected a processor beside rows={tuple(rows)!r}, got None")
        return (str(rows[0]), checks.text("rows[1]", rows[1]))
    if isinstance(rows, Sequence) and len(rows):
        return tuple(checks.integer(f"rows[{place}]", row) for place, row in enumerate(rows))
    raise TypeError(
        "rows: expected 'last', 'question', a number of last rows, positions, ('word', WORD) or ('text', TEXT), got "
        + checks.describe(rows)
    )


def resolve_rows(
    rows: RowsSpec, ids: torch.Tensor | None, attended: torch.Tensor, tokens: torch.Tensor, tokenizer: Any, suffix: int
) -> Rows:
    """Find the rows in a prompt: ids int64 [B, S], attended bool [B, S], visual tokens int32 [B, N], on the CPU."""
    if rows == "last" or isinstance(rows, int):
        count = 1 if rows == "last" else int(rows)
        picked = []
        for row, mask in enumerate(attended):
            columns = mask.nonzero()[:, 0]
            if len(columns) < count:
                raise ValueError(f"rows: expected at most the {len(columns)} tokens of prompt {row}, got {count}")
            picked.append(columns[-count:])
        return Rows(torch.stack(picked), None, True)
    if not isinstance(rows, str) and isinstance(rows[0], int):
        return Rows(_positions(tuple(int(row) for row in rows), attended), None, False)
    if ids is None:
        raise ValueError(f"input_ids: expected them beside rows={rows!r}, got none (a forward with inputs_embeds?)")
    groups = []
    for row in range(ids.shape[0]):
        columns = attended[row].nonzero()[:, 0]
        if rows == "question":
            groups.append(_question(ids[row], columns, tokens[row], tokenizer, suffix))
        else:
            groups.append(_span(str(rows[0]), str(rows[1]), ids[row], columns, tokens[row], tokenizer))
    width = max(len(group) for group in groups)
    index = torch.stack([torch.cat([group, group[-1:].expand(width - len(group))]) for group in groups])
    weight = torch.zeros(len(groups), 1, width)
    for row, group in enumerate(groups):
        weight[row, 0, : len(group)] = 1.0 / len(group)
    return Rows(index, weight, False)


def template_suffix(processor: Any) -> int:
    """How many tokens the chat template puts behind the user's text, the call for an answer included."""
    tokenizer = tokenizer_of(processor)
    if not getattr(processor, "chat_template", None):
        return 0
    marker = "carve"
    message = [{"role": "user", "content": [{"type": "text", "text": marker}]}]
    rendered: str = processor.apply_chat_template(message, add_generation_prompt=True)
    tail = rendered[rendered.rindex(marker) + len(marker) :]
    return len(tokenizer(tail, add_special_tokens=False)["input_ids"]) if tail else 0


def tokenizer_of(processor: Any) -> Any:
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


def _question(
    ids: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor, tokenizer: Any, suffix: int
) -> torch.Tensor:
    last_visual = int(tokens.max()) if tokens.numel() else -1
    columns = columns[: len(columns) - suffix]
    columns = columns[columns > last_visual]
    special = torch.tensor(sorted(getattr(tokenizer, "all_special_ids", None) or []), dtype=ids.dtype)
    found = columns[~torch.isin(ids[columns], special)]
    if not len(found):
        raise ValueError("rows: expected a question behind the image, found no token of one; use rows='last'")
    return found


def _span(
    kind: str, text: str, ids: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor, tokenizer: Any
) -> torch.Tensor:
    """The tokens of the last occurrence of a word or a text, found in the decoded prompt without the visual tokens."""
    columns = columns[~torch.isin(columns, tokens.to(columns.dtype))]
    ends: list[int] = []
    decoded = ""
    for end in range(1, len(columns) + 1):
        decoded = tokenizer.decode(ids[columns[:end]].tolist(), clean_up_tokenization_spaces=False)
        ends.append(len(decoded))
    start = _last_occurrence(kind, text.strip(), decoded)
    if start < 0:
        start = _last_occurrence(kind, text.strip().lower(), decoded.lower())
    if start < 0:
        raise ValueError(f"rows: expected a {kind} of the prompt, got {text!r}; the prompt reads {decoded[-200:]!r}")
    stop = start + len(text.strip())
    begins = [0, *ends[:-1]]
    inside = [place for place in range(len(ends)) if begins[place] < stop and ends[place] > start]
    return columns[inside]


def _last_occurrence(kind: str, text: str, decoded: str) -> int:
    place = decoded.rfind(text)
    while kind == "word" and place >= 0:
        before, after = decoded[:place][-1:], decoded[place + len(text) :][:1]
        if not before.isalnum() and not after.isalnum():
            break
        place = decoded.rfind(text, 0, place + len(text) - 1)
    return place
