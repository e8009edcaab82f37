"""Every name of transformers' caches: where a forward's arguments hold one, and what it says of itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from carve_kernels.hf import names

# In the order in which they are asked for: the newer name first.
_CACHES = ("cache", "past_key_values")
_LENGTH = "get_seq_length"  # what every cache has but a paged one
_SAMPLES = 16


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, or None.

    Known in: `past_key_values` to 5.23, and as an older name to 5.39; `cache` since 5.24. Raises UpstreamChanged for a
    cache under any other name, ValueError for a paged one.
    """
    known = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    if known is None:
        other = next((name for name, value in given.items() if name not in _CACHES and hasattr(value, _LENGTH)), None)
        if other is not None:
            raise names.changed(f"it hands the cache to a forward as {other!r}, known is {cache_names()}")
    elif not hasattr(known, _LENGTH):
        raise ValueError(
            f"model: its cache is a {type(known).__name__} (not one of transformers, or in pages as for continuous "
            "batching); use generate, or a DynamicCache"
        )
    return known


def cache_names() -> str:
    """The names of the cache among a forward's arguments, for a message."""
    return " or ".join(map(repr, _CACHES))


def cached_tokens(cache: Any) -> int | torch.Tensor:
    """How many tokens a cache holds; a tensor where it counts on its device. Known in: 5.12 to 5.24."""
    held: int | torch.Tensor = 0 if cache is None else cache.get_seq_length()
    return held


def keeps_cache(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether a forward with these arguments writes to a cache. Known in: 5.12 to 5.24."""
    wanted = given.get("use_cache")
    return bool(wanted if wanted is not None else getattr(model.config.get_text_config(), "use_cache", False))


class Reach(NamedTuple):
    """How many keys a layer of a cache hands to the attention.

    `window` - 1 old ones at most and all the new ones (None: all old ones), or always `capacity`, the unwritten last
    (None: no such buffer).
    """

    window: int | None
    capacity: int | None

    def hands_over(self, keys: int, seen: int, length: int) -> bool:
        """Whether a layer with so many keys has the last of the `seen` ones, of which `length` are new."""
        if keys == self.capacity and keys >= seen:
            return True
        return keys == (seen if self.window is None else min(seen, self.window - 1 + length))


class Mark(NamedTuple):
    """What tells the keys of a layer from others: where they lie, how often they were written to, how many they are.

    `apart` is the same of keys that a quantised layer holds in another form, and of an order of rows that is to come;
    `kept` keeps the addresses from being given to others, and `tensor` gives the keys while they are there.
    """

    address: tuple[int, int]
    version: int | None
    keys: int
    apart: tuple[tuple[int, int], ...]
    kept: tuple[Any, ...]
    tensor: Callable[[], Any]

    def same_place(self, other: Mark) -> bool:
        """Whether both are of the same keys, of which nothing was written in between, as far as a counter tells."""
        return (self.address, self.version, self.apart) == (other.address, other.version, other.apart)


def cache_in(output: Any) -> Any:
    """The cache in what a forward returned, or None. Known in: as `cache_of`."""
    if isinstance(output, Mapping):
        parts = [output.get(name) for name in _CACHES]
    else:
        parts = list(output) if isinstance(output, (tuple, list)) else []
    return next((part for part in parts if hasattr(part, _LENGTH)), None)


def reach(cache: Any, module: Any) -> Reach | None:
    """What the layer of a cache that an attention module writes to hands over; None where there is none for it.

    Known in: `layers`, `is_sliding`, `sliding_window` and `max_cache_len` 5.12 to 5.24.
    """
    layer = _layer(cache, module)
    return None if layer is None else _reach(layer)


def _reach(layer: Any) -> Reach:
    capacity = getattr(layer, "max_cache_len", None)
    if not getattr(layer, "is_sliding", False):
        return Reach(None, capacity)
    return Reach(capacity if capacity is not None else getattr(layer, "sliding_window", None), capacity)


def mark(cache: Any, module: Any, before: Mark | None = None) -> Mark | None:
    """What tells the keys of a layer of a cache from others; None where there are none. Known in: as `reach`.

    `before` is given back where nothing has changed. Quantised layers: `_quantized_keys` and `_pending_beam_idx` in
    5.24.
    """
    layer = _layer(cache, module)
    keys, packed = getattr(layer, "keys", None), getattr(layer, "_quantized_keys", None)
    if before is not None and packed is None and before.tensor() is keys and before.version == _version(keys):
        return before
    apart = [*(packed if isinstance(packed, (tuple, list)) else (packed,)), getattr(layer, "_pending_beam_idx", None)]
    elsewhere = [_address(each) for each in apart if isinstance(each, torch.Tensor)]
    rest, kept = tuple(each for each, _ in elsewhere), tuple(each for _, each in elsewhere)
    if isinstance(keys, torch.Tensor) and keys.ndim == 4:
        address, own = _address(keys)
        return Mark(address, _version(keys), keys.shape[2], rest, (own, *kept), weakref.ref(keys))
    return Mark((0, 0), None, 0, rest, kept, _nothing) if elsewhere else None


def _nothing() -> None:
    """Stands for a reference to a tensor that there is not."""


def _version(tensor: Any) -> int | None:
    return None if not isinstance(tensor, torch.Tensor) or tensor.is_inference() else tensor._version


def _address(tensor: torch.Tensor) -> tuple[tuple[int, int], Any]:
    """Where a tensor lies, and what keeps others from lying there: a reference that does not keep the numbers."""
    try:
        kept = StorageWeakRef(tensor.untyped_storage())
        return (kept.cdata, int(tensor.storage_offset())), kept
    except (RuntimeError, NotImplementedError):
        # Tensors without a storage of their own, as those that are spread over devices.
        return (id(tensor), 0), tensor


def sample(cache: Any, module: Any, length: int) -> torch.Tensor | None:
    """A few numbers of a layer's first `length` keys, which tell them from others where no counter does."""
    keys = getattr(_layer(cache, module), "keys", None)
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4 or not keys.shape[2]:
        return None
    return keys[:, -1, : length : max(1, length // _SAMPLES), -1].clone()


def has_layers(cache: Any) -> bool:
    """Whether the keys of a cache can be found. Known in: as `reach`."""
    return getattr(cache, "layers", None) is not None


def reaches_in(cache: Any) -> tuple[Reach, ...]:
    """What the layers of a cache hand over, for a module that uses those of another one. Known in: as `reach`."""
    return tuple({_reach(layer) for layer in getattr(cache, "layers", None) or ()})


def _layer(cache: Any, module: Any) -> Any:
    layers, index = getattr(cache, "layers", None), getattr(module, "layer_idx", None)
    return layers[index] if layers is not None and index is not None and index < len(layers) else None
