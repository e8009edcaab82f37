"""Which visual tokens the captured rows of a layer cannot attend to: by masks, positions and windows, not by zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from carve_kernels.hf import names
from carve_kernels.hf.session.attention_masks import Visibility

_BY_POSITION = (None, "full_attention", "sliding_attention", "chunked_attention")


class LayerWindows:
    """For each captured layer, whether positions alone decide what its rows see, and whether old tokens leave its view.

    A layer that selects keys by their content (an indexer) looks at what it selects: what it leaves out is not missing.
    """

    def __init__(self, config: Any, modules: Sequence[nn.Module], layers: Sequence[int]) -> None:
        types = names.types_of_layers(config) or []
        of_layers = [types[layer] if layer < len(types) else None for layer in layers]
        window = None if types else getattr(config, "sliding_window", None)
        self.by_position = [
            kind in _BY_POSITION and not any("index" in type(each).__name__.lower() for each in module.modules())
            for kind, module in zip(of_layers, modules, strict=True)
        ]
        self.limited = [
            by_position and (window is not None or kind not in (None, "full_attention"))
            for kind, by_position in zip(of_layers, self.by_position, strict=True)
        ]
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
