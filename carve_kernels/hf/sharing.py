"""Whether prompts can be looked at together on a model, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationMixin

from carve_kernels.hf.attention import EAGER, place_of
from carve_kernels.hf.backbone import attention_modules, decoder_layers, text_backbone, unwrap
from carve_kernels.hf.decoding import GUARD

_SEES = ("full_attention", "sliding_attention")
# Rotations of these kinds depend on the length of the whole row.
_LENGTH = {"dynamic", "longrope"}
_EXACT_CACHES = (None, "dynamic", "static")


def obstacle(model: Any) -> str | None:
    """Why the prompts of this model must be looked at one by one, or None.

    The row of many prompts has an attention of its own (row.py), which is causal softmax attention, with sliding
    windows or without. It holds all keys in buffers of its own, so the kind of cache does not matter as long as that
    keeps keys as they are.
    """
    inner: Any = unwrap(model)
    kind: Any = type(inner)
    modules = attention_modules(model)
    if len(modules) < len(decoder_layers(model)):
        return f"{len(decoder_layers(model)) - len(modules)} of its layers have no softmax attention"
    try:
        places = {place_of(module, layer)[1] for layer, module in modules.items()}
    except ValueError as error:
        return str(error)
    unknown = [name for name in places if not _is_known(name)]
    if unknown:
        return f"its attention implementation {unknown[0]!r} is not one of transformers'"
    config: Any = text_backbone(model).config
    others = sorted({each for each in getattr(config, "layer_types", None) or () if each not in _SEES})
    if others:
        return f"it has layers of type {', '.join(others)}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "some of its layers use the keys of others"
    changing = sorted(_rotations(config) & _LENGTH)
    if changing:
        return f"its rotation is {changing[0]!r}, which depends on the length of the prompt"
    if not all(getattr(module, "is_causal", True) for module in modules.values()) or getattr(
        config, "use_bidirectional_attention", None
    ):
        return "its layers see what comes later"
    if hasattr(kind, "create_masks_for_generate"):
        return f"{kind.__name__} makes masks of its own, under which a picture may be seen both ways"
    if inner.config.is_encoder_decoder:
        return "it is an encoder and a decoder"
    return _decodes_otherwise(model, inner, kind)


def _decodes_otherwise(model: Any, inner: Any, kind: Any) -> str | None:
    if GUARD in inner.__dict__:
        return "a session of capture_attention is open on it"
    if kind.generate is not GenerationMixin.generate or "generate" in inner.__dict__:
        return "it has a generate of its own"
    if inner.training:
        return "it is in training mode"
    if inner._compiled_call_impl is not None:
        return "it was compiled in place"
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(peft, "is_prompt_learning", False) for peft in adapters):
        return "its adapter puts tokens of its own before a prompt"
    if any(getattr(peft, "alora_invocation_tokens", None) for peft in adapters):
        return "its adapter begins in the middle of a prompt"
    devices = {parameter.device for layer in decoder_layers(model) for parameter in layer.parameters()}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        return "its layers are not on one device"
    if inner.generation_config.cache_implementation not in _EXACT_CACHES:
        return f"its cache is {inner.generation_config.cache_implementation!r}"
    return None


def _rotations(config: Any) -> set[str]:
    """The kinds of rotation in use; some configurations have one for each type of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer = [value for value in given.values() if isinstance(value, Mapping)]
    return {str(each.get("rope_type", each.get("type", "default"))) for each in by_layer or [given]}


def _is_known(implementation: str) -> bool:
    return implementation in (EAGER, "sdpa", "flex_attention") or implementation.startswith("flash_attention_")
