"""The mask arguments of attention functions: which keys the captured rows see, and masks that cannot be captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from carve_kernels import checks
from carve_kernels.hf import names

# Rows of a block mask that are evaluated at a time.
_ROWS = 256
# Implementations that add a mask to the scores, whatever its dtype.
_ADDITIVE = ("eager", "flex_attention")


class Visibility(NamedTuple):
    """The keys that captured rows see: a bool mask [B, 1 or A, R, S], or positions [B, R] and a window, or all keys.

    `biased`, a bool tensor on the mask's device, says whether an additive mask does more than hide keys; None if there
    is no such mask.
    """

    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    window: int | None = None
    biased: torch.Tensor | None = None


def visibility(
    implementation: str, mask: Any, rows: torch.Tensor, length: int, keys: int, *, causal: bool, window: int | None
) -> Visibility:
    """The keys that the captured rows [B, R] see, by the mask argument of the implementation.

    sdpa and eager get a 4-D mask, bool or additive; flex a BlockMask; flash a 2-D padding mask or None, and the window.
    None under sdpa means all keys for a single row, else causal from the top left, so that no row sees later keys.
    """
    flash = names.is_flash(implementation)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        selected = mask
        # The mask of a decode step fits as it is.
        if (mask.shape[0], *mask.shape[2:]) != (rows.shape[0], length, keys):
            selected = mask[..., :keys].expand(rows.shape[0], -1, length, keys)
        # The single row of a decode step needs no copy.
        if length > 1 or rows.shape[1] > 1:
            index = rows[:, None, :, None].expand(-1, selected.shape[1], -1, selected.shape[3])
            selected = selected.gather(2, index)
        if selected.dtype == torch.bool:
            return Visibility(selected)
        hidden = selected <= _hidden(selected.dtype)
        return Visibility(~hidden, biased=_is_biased(selected, hidden))
    if isinstance(mask, torch.Tensor):
        return Visibility(_padding_rows(mask, rows, length, keys, causal, window))
    if mask is not None:
        return Visibility(_block_mask_rows(mask, rows, keys))
    if flash and causal and (length > 1 or window is not None):
        return Visibility(positions=rows + (keys - length), window=window)
    if window is not None and window < keys and not flash and implementation != "eager":
        raise ValueError(
            f"attention_mask: expected a mask under {implementation} with a window of {window}, got None for {keys} "
            "keys; register a mask function of that name"
        )
    if not flash and implementation != "eager" and length > 1 and causal:
        return Visibility(positions=rows)
    return Visibility()


def check_call(model: Any, given: Mapping[str, Any], length: int) -> None:
    """Raise ValueError, before a forward runs, for biased masks, masks that are misread, and packed rows."""
    masks, positions = given.get("attention_mask"), given.get("position_ids")
    segments = names.segments_in(given)
    prepared = list(masks.values()) if isinstance(masks, dict) else [masks]
    if length == 1 and all(mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2) for mask in prepared):
        return
    implementation = names.implementation_of(model) or ""
    for mask in prepared:
        check_mask(implementation, mask)
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
            continue
        if mask.shape[2] not in (1, length):
            raise ValueError(f"attention_mask: expected a mask of {length} rows, got {checks.describe(mask)}")
        # Reading a step's mask would synchronise with its device each time; the record reads it once, at the end.
        if (
            mask.is_floating_point()
            and (length > 1 or mask.device.type == "cpu")
            and bool(_is_biased(mask, mask <= _hidden(mask.dtype)))
        ):
            raise bias_error()
    if isinstance(positions, torch.Tensor) and positions.ndim == 2 and not isinstance(masks, dict):
        padded = masks is not None and not bool(masks.all())
        refuse_packed(implementation, masks if padded else None, None, positions, length)
    refuse_packed(implementation, None, segments, None, length)


def is_prepared(attention_mask: Any) -> bool:
    """Whether a mask argument of a forward is more than a padding mask of two dimensions."""
    masks = attention_mask.values() if isinstance(attention_mask, dict) else [attention_mask]
    return any(mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2) for mask in masks)


def check_mask(implementation: str, mask: Any, keys: int = 0) -> None:
    """Raise ValueError for a mask that the implementation does not read as a mask of visible keys."""
    if not isinstance(mask, torch.Tensor):
        heads = getattr(mask, "shape", (1, 1))[1]
        if heads != 1:
            raise ValueError(f"attention_mask: expected one mask for all heads, got a block mask of {heads} heads")
        return
    expected = None
    if mask.ndim not in (2, 4):
        expected = "a mask of 2 or 4 dimensions"
    elif mask.ndim == 4 and mask.dtype != torch.bool and not mask.is_floating_point():
        expected = "a bool or an additive mask"
    elif mask.ndim == 4 and mask.dtype == torch.bool and implementation in _ADDITIVE:
        expected = (
            f"an additive mask (0 for visible keys, -inf for hidden ones) under {implementation}, which adds a bool "
            "mask to the scores as 0 and 1"
        )
    elif mask.ndim == 4 and mask.shape[1] != 1 and implementation == "flex_attention":
        expected = f"one mask for all heads under {implementation}"
    elif mask.ndim == 4 and 1 < mask.shape[3] < keys:
        expected = f"a mask of {keys} keys"
    if expected is not None:
        raise ValueError(f"attention_mask: expected {expected}, got {checks.describe(mask)}")


def bias_error() -> ValueError:
    """The error for an additive mask that does more than hide keys."""
    return ValueError(
        "attention_mask: expected 0 for visible keys and -inf (or the lowest number) for hidden ones, got others, "
        "which bias the attention and are not captured; remove them, or read this model's maps under eager"
    )


def refuse_packed(implementation: str, attention_mask: Any, segments: str | None, positions: Any, length: int) -> None:
    """Raise ValueError where FlashAttention separates several prompts packed into one row."""
    if not names.is_flash(implementation) or attention_mask is not None or length == 1:
        return
    name = segments
    if positions is not None and positions.shape == (1, length) and not bool((positions.diff() == 1).all()):
        name = "position_ids"
    if name is not None:
        raise ValueError(
            f"{name}: expected one prompt a row, got several prompts packed into a row, which {implementation} "
            "separates; give each prompt its own row, or use attn_implementation='sdpa', which separates them by a mask"
        )


def attended_columns(attention_mask: Any, batch: int, length: int, total: int) -> torch.Tensor:
    """The columns of the prompt that are not padding, bool [B, total] on the CPU, by a forward's mask argument.

    A 2-D mask lists them. In a prepared mask (with a static cache `generate` passes a dict of them) they are the
    columns that any row sees, and all columns in the cache.
    """
    attention_mask = names.full_mask(attention_mask)
    attended = torch.ones(batch, total, dtype=torch.bool)
    if attention_mask is None:
        return attended
    past = total - length
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        past, visible = 0, attention_mask.bool()
    elif isinstance(attention_mask, torch.Tensor):
        mask = attention_mask[..., :total]
        visible = mask.any(2).any(1) if mask.dtype == torch.bool else mask.amax((1, 2)) > _hidden(mask.dtype)
    else:
        chunks = torch.arange(length)[None].expand(batch, -1).split(_ROWS, 1)
        masks = [_block_mask_rows(attention_mask, chunk.contiguous(), total).any(2).any(1) for chunk in chunks]
        visible = torch.stack(masks).any(0)
    width = min(total, visible.shape[1])
    attended[:, past:width] = visible[:, past:width].cpu()
    return attended


def _padding_rows(
    padding: torch.Tensor, rows: torch.Tensor, query_length: int, keys: int, causal: bool, window: int | None
) -> torch.Tensor:
    """The rows of a 2-D padding mask, under causality and a window, bool [B, 1, R, S]."""
    width = padding.shape[1]
    column = torch.arange(keys, device=rows.device)
    visible = torch.nn.functional.pad(padding.bool(), (0, keys - width))[:, None, None, :]
    if causal:
        last = (rows + (width - query_length))[:, None, :, None]
        visible = visible & (column <= last)
        if window is not None:
            visible = visible & (column > last - window)
    return visible.expand(-1, -1, rows.shape[1], -1)


def _block_mask_rows(block_mask: Any, rows: torch.Tensor, keys: int) -> torch.Tensor:
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
    column = torch.arange(keys, device=rows.device)[None, None, :]
    head = torch.zeros((), dtype=torch.long, device=rows.device)
    visible = block_mask.mask_mod(batch, head, rows[:, :, None], column)
    # Columns of a skipped block are hidden, whatever mask_mod returns for them.
    block_rows, block_columns = block_mask.BLOCK_SIZE
    blocks = block_mask.to_dense()[:, 0].bool().to(rows.device).expand(rows.shape[0], -1, -1)
    visible = visible & blocks[batch, (rows // block_rows)[:, :, None], column // block_columns]
    return visible.expand(rows.shape[0], rows.shape[1], keys)[:, None].contiguous()


def _hidden(dtype: torch.dtype) -> float:
    """The threshold of an additive mask: keys are visible above it."""
    return torch.finfo(dtype).min / 2


def _is_biased(mask: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Whether a mask has other values than 0 and hidden ones, NaN included, as a bool tensor."""
    return torch.logical_xor(hidden, mask).any()
