"""The KV cache of a prompt prefix, shared by all prompts that begin with it."""

from __future__ import annotations

import torch


class PrefixCache:
    """The first tokens of some prompts with their keys and values in each layer, and spare columns after them.

    The columns after the prefix belong to the current user of the cache: the next one overwrites them, so nothing is
    copied to start again, and a cache has one user at a time. `depth` counts the layers that have read the prefix.

    ==========  =======  =======================  ============================================
    name        dtype    shape                    meaning
    ==========  =======  =======================  ============================================
    ids         int64    [P]                      the tokens, on the CPU
    keys        model's  [1, KV, capacity, D]     of one layer; values likewise with their size
    ==========  =======  =======================  ============================================
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids
        self.depth = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """The bytes of its keys and values, the spare columns included."""
        return sum(tensor.untyped_storage().nbytes() for layer in self._layers.values() for tensor in layer)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; their columns become spare."""
        self.ids = self.ids[:length]

    @torch.inference_mode(False)
    @torch.no_grad()
    def trim(self) -> None:
        """Free the spare columns if they are more than a quarter of the prefix."""
        length = len(self)
        for layer, cached in self._layers.items():
            if cached[0].shape[2] > length + length // 4:
                keys, values = (_resize(tensor, tensor, length, length) for tensor in cached)
                self._layers[layer] = keys, values

    def write(
        self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [1, KV, n, D] at column `start`; views of all columns up to their end."""
        end = start + key.shape[2]
        cached = self._layers.get(layer)
        if cached is None or cached[0].shape[2] < end:
            columns = max(end, capacity)
            cached = self._layers[layer] = (
                _resize(cached and cached[0], key, start, columns),
                _resize(cached and cached[1], value, start, columns),
            )
        for tensor, new in zip(cached, (key, value), strict=True):
            tensor[:, :, start:end] = new
        return cached[0][:, :, :end], cached[1][:, :, :end]


def common_length(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many tokens two prompts share at their beginning."""
    length = min(len(first), len(second))
    different = (first[:length] != second[:length]).nonzero()
    return int(different[0, 0]) if len(different) else length


def _resize(cached: torch.Tensor | None, like: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    resized = like.new_empty(*like.shape[:2], capacity, like.shape[3])
    if cached is not None:
        resized[:, :, :length] = cached[:, :, :length]
    return resized
