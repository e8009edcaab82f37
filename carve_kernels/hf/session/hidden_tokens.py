"""Which visual tokens the captured rows of a layer cannot attend to: by masks, positions and windows, not by zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from carve_kernels.hf.session.attention_masks import Visibility


def selects_keys(attention: nn.Module) -> bool:
    """Whether an attention module selects the keys that it attends to by their content, with an indexer."""
    return any("index" in type(each).__name__.lower() for each in attention.modules())


class LayerWindows:
    """For each captured layer, whether positions alone decide what its rows see, and whether old tokens leave its view.

    A layer that selects keys by their content (an indexer) looks at what it selects: what it leaves out is not missing.
    """

    def __init__(self, windows: Sequence[bool | None], modules: Sequence[nn.Module]) -> None:
        self.by_position = [
            window is not None and not selects_keys(module) for window, module in zip(windows, modules, strict=True)
        ]
        self.limited = [window is True and known for window, known in zip(windows, self.by_position, strict=True)]
        # Whether a caller has prepared the mask of a step, which may hide any token.
        self.own_masks = False

    def may_hide(self, index: int, window: int | None) -> bool:
        """Whether a step of a layer, whose attention was called with this window, may not see all tokens."""
        return self.limited[index] or (self.by_position[index] and (self.own_masks or window is not None))

    @property
    def any(self) -> bool:
        """Whether it is known before a step that it may hide tokens."""
        return self.own_masks or any(self.limited)


def hidden_tokens(
    tokens: torch.Tensor, used: torch.Tensor, rows: torch.Tensor, visible: Visibility, by_position: bool
) -> torch.Tensor:
    """The visual tokens that rows [B, R] do not see, bool [B, R, N].

    `tokens` [B, N] are their columns among the keys of the layer, negative where there is none; `used` [B, N] says
    which of them are tokens.
    """
    columns, seen = tokens[:, None].long(), (tokens >= 0)[:, None].expand(-1, rows.shape[1], -1)
    if not by_position:
        return used[:, None] & ~seen
    if visible.mask is not None:
        heads = visible.mask.shape[1]
        index = columns.clamp(min=0)[:, :, None].expand(-1, heads, rows.shape[1], -1)
        seen = seen & visible.mask.gather(3, index).any(1)
    elif visible.positions is not None:
        position = visible.positions[:, :, None]
        seen = seen & (columns <= position)
        if visible.window is not None:
            seen = seen & (columns > position - visible.window)
    return used[:, None] & ~seen
