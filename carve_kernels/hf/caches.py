"""Every name of transformers' caches: where a forward's arguments hold one, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from carve_kernels.hf import names

# In the order in which they are asked for: the newer name first.
_CACHES = ("cache", "past_key_values")
_LENGTH = "get_seq_length"  # what every cache has but a paged one


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
            f"model: its cache is a {type(known).__name__} (continuous batching), which cannot be captured; "
            "use generate"
        )
    return known


def cache_names() -> str:
    """The names of the cache among a forward's arguments, for a message."""
    return " or ".join(map(repr, _CACHES))


def cached_tokens(cache: Any) -> int | torch.Tensor:
    """How many tokens a cache holds; a tensor where it counts on its device. Known in: 5.12 to 5.24."""
    held: int | torch.Tensor = 0 if cache is None else cache.get_seq_length()
    return held


def is_filled(cache: Any) -> bool:
    """Whether a cache has been written to, as far as it says. Known in: 5.12 to 5.24."""
    layers = getattr(cache, "layers", None)
    return layers is not None and len(layers) > 0 and bool(getattr(layers[0], "is_initialized", True))


def keeps_cache(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether a forward with these arguments writes to a cache. Known in: 5.12 to 5.24."""
    wanted = given.get("use_cache")
    return bool(wanted if wanted is not None else getattr(model.config.get_text_config(), "use_cache", False))
