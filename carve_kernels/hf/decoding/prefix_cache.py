"""What the model has read of a prompt, kept for every prompt that begins alike: ids, keys and values."""

from __future__ import annotations

import torch


class Prefix:
    """The first tokens of some prompts, and their keys and values in each layer, with room for more behind them.

    What stands behind the prefix belongs to whoever runs over it at the time: it is overwritten by the next one, so
    nothing is copied to begin again, and one at a time may use a prefix. `depth` is how many layers have read it.

    ==========  =======  =====================  ============================================
    name        dtype    shape                  meaning
    ==========  =======  =====================  ============================================
    ids         int64    [P]                    the tokens, on the CPU
    keys        model's  [1, KV, room, D]       of one layer; values likewise with their size
    ==========  =======  =====================  ============================================
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids
        self.depth = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """The bytes of its keys and values, the room behind them included."""
        return sum(part.untyped_storage().nbytes() for layer in self._layers.values() for part in layer)

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens; their room stays."""
        self.ids = self.ids[:length]

    def trim(self) -> None:
        """Give back the room behind it, where that is more than a quarter of it."""
        length = len(self)
        for layer, held in self._layers.items():
            if held[0].shape[2] > length + length // 4:
                keys, values = (_grown(part, part, length, length) for part in held)
                self._layers[layer] = keys, values

    def hold(
        self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor, room: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [1, KV, n, D] at column `start`; all of them up to there, as views."""
        end = start + key.shape[2]
        held = self._layers.get(layer)
        if held is None or held[0].shape[2] < end:
            held = self._layers[layer] = (
                _grown(held and held[0], key, start, max(end, room)),
                _grown(held and held[1], value, start, max(end, room)),
            )
        for part, new in zip(held, (key, value), strict=True):
            part[:, :, start:end] = new
        return held[0][:, :, :end], held[1][:, :, :end]


def common(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many tokens two prompts share at their beginning."""
    length = min(len(first), len(second))
    differ = (first[:length] != second[:length]).nonzero()
    return int(differ[0, 0]) if len(differ) else length


def _grown(before: torch.Tensor | None, like: torch.Tensor, kept: int, room: int) -> torch.Tensor:
    after = like.new_empty(*like.shape[:2], room, like.shape[3])
    if before is not None:
        after[:, :, :kept] = before[:, :, :kept]
    return after
