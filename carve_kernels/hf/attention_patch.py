"""Attention that also captures: the function in use runs as it is, then chosen rows of chosen layers are captured.

While a session is open, the entry of the implementation in use stands wrapped where the model looks it up: in the
registry of its modeling file (`sdpa`, `flex_attention`, the flash names), or as that file's own function for eager. The
configuration, the name and so the masks stay as they were. A module takes part only if it carries recorders, or a
function that attends in place of the one in use (the one-look engine's, see row.py).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from carve_kernels import checks
from carve_kernels.hf import names
from carve_kernels.hf.names import Attention, full_mask, own_entry, set_entry

# On a module that takes part: (recorder, index) pairs, whose `record` is told of every call of its attention.
RECORDERS = "_carve_recorders"
# On a module whose attention is another one for a while: that one, called with the function in use before the rest; it
# gives None for a forward that is not its own.
INSTEAD = "_carve_instead"

_FLASH = "flash"
# Rows of a block mask that are asked at a time.
_ROWS = 256
# Implementations that add a mask to the scores whatever its dtype.
_ADDING = ("eager", "flex_attention")


def capturing(attention: Attention) -> Attention:
    """An attention function that calls another one and then tells the module's recorders."""

    def capturing_attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        instead = getattr(module, INSTEAD, None)
        if instead is not None:
            output = instead(attention, module, query, key, value, attention_mask, *args, **options)
            if output is not None:
                return output
        output = attention(module, query, key, value, attention_mask, *args, **options)
        for recorder, index in getattr(module, RECORDERS, ()):
            recorder.record(index, module, query, key, attention_mask, options)
        return output

    return capturing_attention


class _Patches:
    """The wrapped entries of all open sessions, counted, so that sessions may end in any order."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._open: dict[tuple[int, str], tuple[int, Attention, Attention | None]] = {}

    def enter(self, place: Any, name: str) -> None:
        with self._lock:
            count, wrapper, before = self._open.get((id(place), name), (0, None, None))
            if wrapper is None:
                before = own_entry(place, name)
                wrapper = capturing(before if before is not None else place[name])
                set_entry(place, name, wrapper)
            self._open[id(place), name] = (count + 1, wrapper, before)

    def leave(self, place: Any, name: str) -> None:
        with self._lock:
            count, wrapper, before = self._open[id(place), name]
            if count > 1:
                self._open[id(place), name] = (count - 1, wrapper, before)
                return
            del self._open[id(place), name]
            # An entry that somebody else has replaced meanwhile is theirs.
            if own_entry(place, name) is wrapper:
                set_entry(place, name, before)


PATCHES = _Patches()


class Visible(NamedTuple):
    """What captured rows see: a bool mask [B, 1 or A, R, S], or positions [B, R] and a window, or all keys.

    `steered` says on the mask's device whether an additive mask does more than hide keys; None where there is none.
    """

    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    window: int | None = None
    steered: torch.Tensor | None = None


def visible(
    implementation: str,
    attention_mask: Any,
    rows: torch.Tensor,
    query_length: int,
    keys: int,
    *,
    causal: bool,
    window: int | None,
) -> Visible:
    """What the captured rows [B, R] see, from whatever the implementation was given.

    sdpa and eager get a 4-D mask, bool or additive; flex a BlockMask; flash a 2-D padding mask or None beside the
    window. None under sdpa means all keys for one row, else top-left causal over a tail that nobody sees.
    """
    flash = _FLASH in implementation
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        chosen = attention_mask[..., :keys].expand(rows.shape[0], -1, query_length, keys)
        # The one row of a decode step is that of the mask, which need not be copied.
        if query_length > 1 or rows.shape[1] > 1:
            index = rows[:, None, :, None].expand(-1, chosen.shape[1], -1, chosen.shape[3])
            chosen = chosen.gather(2, index)
        if chosen.dtype == torch.bool:
            return Visible(chosen)
        return Visible(chosen > _hidden(chosen.dtype), steered=_steered(chosen))
    if isinstance(attention_mask, torch.Tensor):
        width = attention_mask.shape[1]
        column = torch.arange(keys, device=rows.device)
        seen = torch.nn.functional.pad(attention_mask.bool(), (0, keys - width))[:, None, None, :]
        if causal:
            last = (rows + (width - query_length))[:, None, :, None]
            seen = seen & (column <= last)
            if window is not None:
                seen = seen & (column > last - window)
        return Visible(seen.expand(-1, -1, rows.shape[1], -1))
    if attention_mask is not None:
        return Visible(_block_mask_rows(attention_mask, rows, keys))
    if flash and causal and (query_length > 1 or window is not None):
        return Visible(positions=rows + (keys - query_length), window=window)
    if window is not None and window < keys and not flash and implementation != "eager":
        raise ValueError(
            f"attention_mask: expected one under {implementation} with a window of {window}, got none for {keys} keys; "
            "register a mask function of that name"
        )
    if not flash and implementation != "eager" and query_length > 1 and causal:
        return Visible(positions=rows)
    return Visible()


def check_call(model: Any, given: Mapping[str, Any], length: int) -> None:
    """What a forward is refused for before it runs: masks that steer, or that are added as numbers, and packed rows."""
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
            raise ValueError(f"attention_mask: expected one of {length} rows, got {checks.describe(mask)}")
        # To read a mask of a step would wait for its device each time; the record asks once, at the end.
        if mask.is_floating_point() and (length > 1 or mask.device.type == "cpu") and bool(_steered(mask)):
            raise steering()
    if isinstance(positions, torch.Tensor) and positions.ndim == 2 and not isinstance(masks, dict):
        attends = masks is not None and not bool(masks.all())
        refuse_packed(implementation, masks if attends else None, None, positions, length)
    refuse_packed(implementation, None, segments, None, length)


def check_mask(implementation: str, attention_mask: Any, keys: int = 0) -> None:
    """Raise ValueError for a mask that an implementation reads in another way than the mask says."""
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor):
        heads = getattr(attention_mask, "shape", (1, 1))[1]
        if heads != 1:
            raise ValueError(f"attention_mask: expected one for all heads, got a block mask of {heads} heads")
        return
    if attention_mask.ndim == 2:
        return
    wrong = _wrong(implementation, attention_mask, keys)
    if wrong is not None:
        raise ValueError(f"attention_mask: expected {wrong}, got {checks.describe(attention_mask)}")


def _wrong(implementation: str, attention_mask: torch.Tensor, keys: int) -> str | None:
    """What a mask should be in place of what it is, or None."""
    if attention_mask.ndim != 4:
        return "one of 2 or 4 dimensions"
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        return "a bool or an additive mask"
    if implementation in _ADDING and attention_mask.dtype == torch.bool:
        return (
            f"an additive mask (0 where a key is seen, -inf where it is not) under {implementation}, which adds a bool "
            "one to the scores as 0 and 1"
        )
    if implementation == "flex_attention" and attention_mask.shape[1] != 1:
        return f"one for all heads under {implementation}"
    return f"one of {keys} keys" if 1 < attention_mask.shape[3] < keys else None


def steering() -> ValueError:
    """The error for an additive mask that does more than hide keys."""
    return ValueError(
        "attention_mask: expected 0 where a key is seen and -inf (or the lowest number) where it is not, got other "
        "values, which steer the attention and are not captured; take them out, or read this model's maps under eager"
    )


def refuse_packed(implementation: str, attention_mask: Any, segments: str | None, positions: Any, length: int) -> None:
    """Raise ValueError where FlashAttention keeps several prompts of one row apart."""
    if _FLASH not in implementation or attention_mask is not None or length == 1:
        return
    name = segments
    if positions is not None and positions.shape == (1, length) and not bool((positions.diff() == 1).all()):
        name = "position_ids"
    if name is not None:
        raise ValueError(
            f"{name}: expected one prompt a row, got several that {implementation} keeps apart in one; give each a "
            "row of its own, or use attn_implementation='sdpa', which takes them as a mask"
        )


def _hidden(dtype: torch.dtype) -> float:
    """An additive mask of a dtype hides what is not above this."""
    return torch.finfo(dtype).min / 2


def _steered(mask: torch.Tensor) -> torch.Tensor:
    return ((mask != 0) & ~(mask <= _hidden(mask.dtype))).any()


def attended_columns(attention_mask: Any, batch: int, length: int, total: int) -> torch.Tensor:
    """Which columns of the prompt are no padding, bool [B, total] on the CPU, by the mask that a model was called with.

    A 2-D mask says so itself; of a prepared one (`generate` with a static cache hands over a dict of them) they are
    those that any row sees, and what stands in the cache.
    """
    attention_mask = full_mask(attention_mask)
    attended = torch.ones(batch, total, dtype=torch.bool)
    if attention_mask is None:
        return attended
    past = 0
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        seen = attention_mask.bool()
    elif isinstance(attention_mask, torch.Tensor):
        past = total - length
        seen = attention_mask[..., :total]
        seen = seen.any(2).any(1) if seen.dtype == torch.bool else seen.amax((1, 2)) > _hidden(seen.dtype)
    else:
        past = total - length
        rows = torch.arange(length)[None].expand(batch, -1).split(_ROWS, 1)
        parts = [_block_mask_rows(attention_mask, part.contiguous(), total).any(2).any(1) for part in rows]
        seen = torch.stack(parts).any(0)
    width = min(total, seen.shape[1])
    attended[:, past:width] = seen[:, past:width].cpu()
    return attended


def _block_mask_rows(block_mask: Any, rows: torch.Tensor, keys: int) -> torch.Tensor:
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
    column = torch.arange(keys, device=rows.device)[None, None, :]
    head = torch.zeros((), dtype=torch.long, device=rows.device)
    seen = block_mask.mask_mod(batch, head, rows[:, :, None], column)
    # A block that is left out is not seen, whatever the function says of its columns.
    high, wide = block_mask.BLOCK_SIZE
    blocks = block_mask.to_dense()[:, 0].bool().to(rows.device).expand(rows.shape[0], -1, -1)
    seen = seen & blocks[batch, (rows // high)[:, :, None], column // wide]
    return seen.expand(rows.shape[0], rows.shape[1], keys)[:, None].contiguous()
