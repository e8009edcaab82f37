"""The columns of a prompt that layers process after visual tokens were dropped, and where tokens and rows are then."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from carve_kernels import checks


class Selection(NamedTuple):
    """Columns int64 [B, K] of a prompt, ascending. Those that are `hidden`, bool [B, K], only fill up a row."""

    columns: torch.Tensor
    hidden: torch.Tensor


class KeptColumns:
    """What the layers behind `layer` process: the columns int64 [B, K] of a prompt, ascending.

    Dropped columns fill up rows of the batch that keep fewer than others: they are `hidden`, bool [B, K], or None where
    there are none. `tokens` int32 [B, N] are the places of the visual tokens, -1 for padding and for dropped ones;
    `span` int32 [2] are the lowest and the highest place.
    """

    def __init__(self, layer: int, selection: Selection, tokens: torch.Tensor) -> None:
        self.layer, self.columns = layer, selection.columns.to(tokens.device)
        self.hidden = selection.hidden.to(tokens.device) if bool(selection.hidden.any()) else None
        batch, count = tokens.shape
        # Both parts at multiples of 16 bytes, as in DeviceState.
        memory = torch.zeros(4 + batch * count, dtype=torch.int32, device=tokens.device)
        self.span, _, places = memory.split_with_sizes([2, 2, batch * count])
        self.tokens = places.view(batch, count)
        self.tokens.copy_(self.places(tokens))
        used = self.tokens[self.tokens >= 0]
        ends = used.aminmax() if used.numel() else (used.new_zeros(()), used.new_full((), -1))
        self.span.copy_(torch.stack(tuple(ends)))

    @property
    def count(self) -> int:
        return self.columns.shape[1]

    def places(self, columns: torch.Tensor) -> torch.Tensor:
        """The places of columns [B, n] of the prompt among the kept ones, int64; -1 where a column was dropped."""
        columns = columns.to(self.columns.device, torch.int64)
        places = self.places_of_all(columns)
        there = self.columns.gather(1, places) == columns
        if self.hidden is not None:
            there &= ~self.hidden.gather(1, places)
        return torch.where(there, places, -1)

    def places_of_all(self, columns: torch.Tensor) -> torch.Tensor:
        """The places of columns [B, n] that are all among those of this, hidden ones included."""
        return torch.searchsorted(self.columns, columns.contiguous()).clamp(max=self.count - 1)


def columns_to_keep(
    returned: Any, layer: int, tokens: torch.Tensor, attended: torch.Tensor, before: KeptColumns | None
) -> Selection:
    """What layers behind `layer` process: the columns that `on_layer` returned, and those of the text.

    `tokens` int32 [B, N] are the visual tokens, `attended` bool [B, S] the columns that are not padding, and `before`
    what the layer itself processed.
    """
    batch, length = attended.shape
    numbers = _integers(returned, batch)
    if numbers.numel() and (int(numbers.min()) < -1 or int(numbers.max()) >= length):
        raise ValueError(
            f"on_layer: expected columns below the prompt's {length} tokens to be returned, and -1 for padding, got "
            f"numbers from {int(numbers.min())} to {int(numbers.max())}"
        )
    present = processed = torch.ones(batch, length, dtype=torch.bool)
    if before is not None:
        present = torch.zeros_like(processed).scatter(1, before.columns.cpu(), True)
        processed = (
            present
            if before.hidden is None
            else torch.zeros_like(processed).scatter(1, before.columns.cpu(), ~before.hidden.cpu())
        )
    visual = _marked(tokens.cpu().long(), length)
    keep = processed & ~visual
    named = _marked(numbers, length)
    if bool((named & ~visual).any()):
        row, column = (named & ~visual).nonzero()[0].tolist()
        raise ValueError(
            f"on_layer: expected columns of visual tokens to be returned, as `session.tokens` has them, got column "
            f"{column} of row {row}, which is none; all other columns are kept"
        )
    if bool((named & ~processed).any()):
        row, column = (named & ~processed).nonzero()[0].tolist()
        raise ValueError(
            f"on_layer: expected columns that layer {layer} has processed to be returned, got column {column} of row "
            f"{row}, which was dropped before it"
        )
    keep |= named
    last = length - 1 - attended.flip(1).int().argmax(1)
    if not bool(keep.gather(1, last[:, None]).all()):
        raise ValueError("on_layer: expected the last column of each prompt to be kept, got columns without it")
    # Layers run on a tensor, so every row has as many columns: the fewest that hold what each row keeps.
    kept, needed = keep.sum(1), (keep & attended).sum(1)
    count = max(int(kept.min()), int(needed.max()))
    columns = keep.clone()
    for row in range(batch):
        for places, value, change in (
            (keep[row] & ~attended[row], False, int(kept[row]) - count),
            (present[row] & ~keep[row], True, count - int(kept[row])),
        ):
            columns[row, places.nonzero().flatten()[: max(0, change)]] = value
    selected = columns.nonzero()[:, 1].view(batch, count)
    return Selection(selected, ~keep.gather(1, selected))


def _integers(returned: Any, batch: int) -> torch.Tensor:
    """What `on_layer` returned as int64 [B, n] on the CPU."""
    expected = f"None or columns of the prompt, int [n] or [{batch}, n], to be returned"
    try:
        numbers = returned if isinstance(returned, torch.Tensor) else torch.as_tensor(returned)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"on_layer: expected {expected}, got {checks.describe(returned)}") from None
    if not numbers.numel() and not isinstance(returned, torch.Tensor):
        numbers = numbers.long()
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"on_layer: expected {expected}, got {checks.describe(returned)}")
    if numbers.ndim not in (1, 2) or (numbers.ndim == 2 and numbers.shape[0] not in (1, batch)):
        raise ValueError(f"on_layer: expected {expected}, got {checks.describe(returned)}")
    return numbers.detach().cpu().long().expand(batch, -1)


def _marked(columns: torch.Tensor, length: int) -> torch.Tensor:
    """Which of `length` columns are among columns [B, n], bool [B, length]; -1 is none."""
    marked = torch.zeros(columns.shape[0], length + 1, dtype=torch.bool)
    return marked.scatter(1, torch.where(columns < 0, length, columns), True)[:, :length]
