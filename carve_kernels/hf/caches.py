"""Names of transformers' KV caches: where the arguments of a forward hold one, and what is read from it."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache

from carve_kernels.hf import names
from carve_kernels.hf.model import version_of

# Newer name first.
_CACHES = ("cache", "past_key_values")
# The argument of a recurrent layer has an older name.
_STATES = (*_CACHES, "cache_params")
# Every cache has it, except a paged one.
_LENGTH = "get_seq_length"
_SAMPLES = 16
_KINDS_OF_STATES = ("conv_states", "recurrent_states")


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, or None.

    Known in: `past_key_values` to 5.23, deprecated to 5.39; `cache` since 5.24. Raises UpstreamChanged for a cache
    under any other name, ValueError for a paged one.
    """
    known = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    if known is None:
        other = next((name for name, value in given.items() if name not in _CACHES and hasattr(value, _LENGTH)), None)
        if other is not None:
            raise names.changed(f"it passes the cache to a forward as {other!r}, expected {cache_names()}")
    elif not hasattr(known, _LENGTH):
        raise ValueError(
            f"model: its cache is a {type(known).__name__} (not one of transformers, or paged, as for continuous "
            "batching); use generate, or a DynamicCache"
        )
    return known


def cache_names() -> str:
    """The argument names of a cache, for a message."""
    return " or ".join(map(repr, _CACHES))


def cached_tokens(cache: Any) -> int | torch.Tensor:
    """The number of tokens in a cache; a tensor if it counts on its device."""
    count: int | torch.Tensor = 0 if cache is None else cache.get_seq_length()
    return count


def keeps_cache(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether a forward with these arguments writes to a cache."""
    use = given.get("use_cache")
    return bool(use if use is not None else getattr(model.config.get_text_config(), "use_cache", False))


class Reach(NamedTuple):
    """How many keys a cache layer passes to the attention.

    All new keys and at most `window` - 1 old ones (None: all old ones), or always `capacity` keys, the unwritten ones
    last (None: no fixed buffer).
    """

    window: int | None
    capacity: int | None

    def allows(self, keys: int, total: int, length: int) -> bool:
        """Whether an attention with so many keys got the last ones of `total` tokens, of which `length` are new."""
        if keys == self.capacity and keys >= total:
            return True
        return keys == (total if self.window is None else min(total, self.window - 1 + length))


class KeyState(NamedTuple):
    """The state of a layer's keys.

    `addresses` are those of the keys, of quantised keys and of a pending reordering; `references` keep them from being
    reused. `version` counts the writes to the keys, `keys` is their number, and `tensor` returns them while they exist.
    """

    addresses: tuple[tuple[int, int], ...]
    version: int | None
    keys: int
    references: tuple[Any, ...]
    tensor: Callable[[], Any]

    def same_storage(self, other: KeyState) -> bool:
        """Whether both are of the same tensor, not written to in between as far as its version counter tells."""
        return (self.addresses, self.version) == (other.addresses, other.version)


def cache_in(output: Any) -> Any:
    """The cache in the output of a forward, or None. Known in: as `cache_of`."""
    values: Iterable[Any] = output if isinstance(output, (tuple, list)) else ()
    if isinstance(output, Mapping):
        # Read lazily: transformers warns when an old name is read.
        values = (output.get(name) for name in _CACHES)
    return next((value for value in values if hasattr(value, _LENGTH)), None)


def reaches(cache: Any, modules: Sequence[nn.Module]) -> list[tuple[Reach | None, ...]]:
    """The possible reaches of each attention module: that of its cache layer.

    A module without a cache layer reuses the keys of any other layer, or has the window of its attention call (None).
    Known in: `layers`, `is_sliding`, `sliding_window`, `max_cache_len` 5.12 to 5.24; `is_kv_shared_layer` since 5.20.
    """
    others = {_reach(layer) for layer in getattr(cache, "layers", None) or ()}
    layers = (_layer(cache, module) for module in modules)
    return [(None, *others) if layer is None else (_reach(layer),) for layer in layers]


def _reach(layer: Any) -> Reach:
    capacity = getattr(layer, "max_cache_len", None)
    if not getattr(layer, "is_sliding", False):
        return Reach(None, capacity)
    return Reach(capacity if capacity is not None else getattr(layer, "sliding_window", None), capacity)


def key_state(cache: Any, module: Any, before: KeyState | None = None) -> KeyState | None:
    """The state of a layer's keys, None if it has none; `before` itself if nothing has changed.

    Known in: as `reaches`; `_quantized_keys` and `_pending_beam_idx` of quantised layers in 5.24.
    """
    layer = _layer(cache, module)
    keys, packed = getattr(layer, "keys", None), getattr(layer, "_quantized_keys", None)
    if before is not None and packed is None and before.tensor() is keys and before.version == version_of(keys):
        return before
    keys = keys if isinstance(keys, torch.Tensor) and keys.ndim == 4 else None
    # The buffer of a static cache, in which a forward has written.
    if before is not None and packed is None and keys is not None and before.tensor() is keys:
        return before._replace(version=version_of(keys), keys=keys.shape[2])
    quantised = packed if isinstance(packed, (tuple, list)) else (packed,)
    parts = (keys, *quantised, getattr(layer, "_pending_beam_idx", None))
    located = [_address(part) for part in parts if isinstance(part, torch.Tensor)]
    if not located:
        return None
    addresses, references = zip(*located, strict=True)
    count, tensor = (0, lambda: None) if keys is None else (keys.shape[2], weakref.ref(keys))
    return KeyState(addresses, version_of(keys), count, references, tensor)


def _address(tensor: torch.Tensor) -> tuple[tuple[int, int], Any]:
    """The address of a tensor, and a weak reference that keeps the address from being reused."""
    try:
        reference = StorageWeakRef(tensor.untyped_storage())
        return (reference.cdata, int(tensor.storage_offset())), reference
    except (RuntimeError, NotImplementedError):
        # Tensors without a storage, such as sharded ones.
        return (id(tensor), 0), tensor


def sample(cache: Any, module: Any, length: int) -> torch.Tensor | None:
    """A few elements of a layer's first `length` keys, to detect writes where there is no version counter."""
    keys = getattr(_layer(cache, module), "keys", None)
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4 or not keys.shape[2]:
        return None
    return keys[:, -1, : length : max(1, length // _SAMPLES), -1].clone()


def cache_argument(module: nn.Module) -> str | None:
    """The argument with which a module's forward takes a cache, or None. Known in: `cache_params` to 5.23."""
    known = inspect.signature(module.forward).parameters
    return next((name for name in _STATES if name in known), None)


def new_states(config: Any) -> Any:
    """A new cache for a text config, of which the recurrent layers use their states."""
    return DynamicCache(config=config)


def copy_state(source: Any, target: Any, module: Any) -> None:
    """Copy the state of a recurrent layer to another cache. Raises ValueError if the layer has none."""
    if not hasattr(_layer(source, module), "conv_states"):
        raise ValueError(f"{type(module).__name__} has no states in a {type(source).__name__}")
    target.layers[module.layer_idx] = copy.deepcopy(_layer(source, module))


def states_nbytes(cache: Any) -> int:
    """The bytes of the states of a cache's recurrent layers; None has none."""
    kinds = (getattr(layer, kind, None) for layer in getattr(cache, "layers", ()) for kind in _KINDS_OF_STATES)
    # A layer of transformers 5.12 has one tensor of a kind, later ones have several by number.
    tensors = (tensor for states in kinds for tensor in (states.values() if isinstance(states, dict) else (states,)))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


def reuses_keys(module: Any) -> bool:
    """Whether an attention module reads the keys of an earlier layer. Known in: since 5.20."""
    return bool(getattr(module, "is_kv_shared_layer", False))


def has_layers(cache: Any) -> bool:
    """Whether a cache has layers whose keys can be read. Known in: as `reaches`."""
    return getattr(cache, "layers", None) is not None


def _layer(cache: Any, module: Any) -> Any:
    # A layer that reuses the keys of another one has a layer in the cache that it never writes to.
    if reuses_keys(module):
        return None
    layers, index = getattr(cache, "layers", None), getattr(module, "layer_idx", None)
    return layers[index] if layers is not None and index is not None and index < len(layers) else None


def most_keys(reaches: Iterable[Sequence[Reach | None]]) -> int | None:
    """The keys of the largest buffer of a cache; None if it has layers that grow."""
    possible = [reach for layer in reaches for reach in layer]
    if not possible or any(reach is None or reach.capacity is None for reach in possible):
        return None
    return max(reach.capacity for reach in possible if reach is not None and reach.capacity is not None)


def has_windows(reaches: Iterable[Sequence[Reach | None]]) -> bool:
    """Whether layers of a cache keep the last keys only, so that it holds more tokens than keys."""
    return any(reach is not None and reach.window is not None for layer in reaches for reach in layer)


def keep_with(cache: Any, value: Any) -> None:
    """Keep a value in memory for as long as a cache is."""
    weakref.finalize(cache, _nothing, value).atexit = False


def _nothing(_value: Any) -> None:
    """Holds its argument until it is called."""
