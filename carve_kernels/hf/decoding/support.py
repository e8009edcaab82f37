"""Whether prompts can be looked at together on a model, and if not, why."""

from __future__ import annotations

from typing import Any

from carve_kernels.hf import names
from carve_kernels.hf.model import (
    attention_modules,
    code_on,
    decoder_layers,
    devices_of,
    mixer,
    text_backbone,
    unwrap,
    wrappers,
)
from carve_kernels.hf.session.generate_guard import GUARD

# Rotations of these kinds depend on the length of the whole row.
_LENGTH = {"dynamic", "longrope"}
_EXACT_CACHES = (None, "dynamic", "static")


def obstacle(model: Any) -> str | None:
    """Why the prompts of this model must be looked at one by one, or None.

    The row of many prompts has an attention of its own (row.py), which is causal softmax attention, with sliding
    windows or without. It holds all keys in buffers of its own, so the kind of cache does not matter as long as that
    keeps keys as they are. All else must treat each token by itself, since the last row of many prompts is no more the
    prompt's last than the largest activation is its own.
    """
    inner: Any = unwrap(model)
    modules = attention_modules(model)
    if len(modules) < len(decoder_layers(model)):
        return f"{len(decoder_layers(model)) - len(modules)} of its layers have no softmax attention"
    try:
        places = {names.attention_entry(module, layer)[1] for layer, module in modules.items()}
    except ValueError as error:
        return str(error)
    unknown = [name for name in places if not names.is_builtin(name)]
    if unknown:
        return f"its attention implementation {unknown[0]!r} is not one of transformers'"
    config: Any = text_backbone(model).config
    changing = sorted(names.rotations(config) & _LENGTH)
    if changing:
        return f"its rotation is {changing[0]!r}, which depends on the length of the prompt"
    if not all(names.is_causal(module) for module in modules.values()):
        return "its layers see what comes later"
    return names.tree_obstacle(inner, config) or _decodes_otherwise(model, inner)


def _decodes_otherwise(model: Any, inner: Any) -> str | None:
    if GUARD in inner.__dict__:
        return "a session of capture_attention is open on it"
    if names.has_own_generate(inner):
        return "it has a generate of its own"
    if inner.training:
        return "it is in training mode"
    if any(names.compiled_in_place(module) is not None for module in inner.modules()):
        return "it was compiled in place"
    for module in (*wrappers(model), inner):
        adapter = names.adapter_obstacle(module)
        if adapter is not None:
            return adapter
    places = [devices_of(layer) for layer in decoder_layers(model)]
    if any(len(place) != 1 or place != places[0] for place in places):
        return "its layers are not on one device"
    if inner.generation_config.cache_implementation not in _EXACT_CACHES:
        return f"its cache is {inner.generation_config.cache_implementation!r}"
    return code_on(inner) or mixer(inner, text_backbone(model))
