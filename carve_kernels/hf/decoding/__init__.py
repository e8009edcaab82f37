"""Greedy decoding with captured attention: tree decoding where the model allows it, else one `generate` per prompt.

    decoder = Decoder(model, processor, layers, backend)
    decoder.decode(groups)  # -> list[Decoded]

`sequential_reason` decides between the two. prompt_groups.py has the input and the output; tree_decoder.py does
tree decoding with tree_attention.py and prefix_cache.py; sequential.py is the fallback; generation.py has the rules of
`generate` by which both choose tokens. Answers and maps are the same either way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from carve_kernels.hf import names
from carve_kernels.hf.decoding.generation import preserved_positions
from carve_kernels.hf.decoding.prefix_cache import PrefixCache
from carve_kernels.hf.decoding.prompt_groups import Branch, Decoded, PromptGroup
from carve_kernels.hf.decoding.recurrent import recurrent_modules, states_reason
from carve_kernels.hf.decoding.sequential import decode_prompt
from carve_kernels.hf.decoding.tree_attention import TreeUnsupported
from carve_kernels.hf.decoding.tree_decoder import TreeDecoder
from carve_kernels.hf.model import (
    attention_modules,
    decoder_layers,
    devices_of,
    foreign_code,
    tensor_parallel_group,
    text_backbone,
    token_mixer,
    unwrap,
    wrapped_models,
)
from carve_kernels.hf.processors import routes_by_type
from carve_kernels.hf.session.generate_guard import GUARD

__all__ = [
    "Branch",
    "Decoded",
    "Decoder",
    "PrefixCache",
    "PromptGroup",
    "exclusive",
    "sequential_reason",
]

_LOG = logging.getLogger("carve_kernels")
_LOCK = threading.Lock()
_MODEL_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
# Rotary embeddings of these kinds depend on the length of the whole forward.
_LENGTH_DEPENDENT = {"dynamic", "longrope"}
_EXACT_CACHES = (None, "dynamic", "static")


class Decoder:
    """Decodes groups of prompts on one model; `layers` are captured by the backend `backend`."""

    def __init__(self, model: Any, processor: Any, layers: tuple[int, ...], backend: str) -> None:
        self._model, self._processor, self._layers, self._backend = model, processor, layers, backend
        self._set_reason(sequential_reason(model))

    def decode(self, groups: Sequence[PromptGroup]) -> list[Decoded]:
        """The greedy answers and the maps of all prompts, in order; each branch gets its `ids` and `maps`."""
        if self.sequential_reason is None:
            # Later calls write to the cached keys, which inference tensors would allow only in inference mode.
            with (
                exclusive(self._model),
                torch.inference_mode(False),
                torch.no_grad(),
                preserved_positions(unwrap(self._model)),
            ):
                try:
                    tree = TreeDecoder(unwrap(self._model), self._processor, self._layers, self._backend)
                    return _assign(groups, tree.decode(groups))
                except TreeUnsupported as error:
                    self._set_reason(str(error))
                    for group in groups:
                        # The prefix cache may be incomplete.
                        group.prefix = None
        return _assign(
            groups,
            [
                decode_prompt(self._model, self._processor, group, branch, self._layers, self._backend)
                for group in groups
                for branch in group.branches
            ],
        )

    def _set_reason(self, reason: str | None) -> None:
        self.sequential_reason = reason
        if reason is not None:
            _LOG.info("prompts are decoded one by one, since %s", reason)


def sequential_reason(model: Any) -> str | None:
    """Why the prompts of this model must be decoded one by one, or None.

    Tree attention (tree_attention.py) replaces the attention of the model, so this has to be causal softmax attention,
    with sliding windows or without; recurrent layers (recurrent.py) must continue a copy of their states. All keys are
    written to buffers, so the kind of cache does not matter as long as the cache stores keys unchanged. All other
    modules must process each token independently: a packed forward holds tokens of several prompts, so its last token
    or its largest activation is not that of each prompt.
    """
    inner: Any = unwrap(model)
    modules, recurrent = attention_modules(model), recurrent_modules(model)
    others = len(decoder_layers(model)) - len(modules) - len(recurrent)
    if others:
        return f"{others} of its layers have neither softmax attention nor states that can be copied"
    try:
        places = {names.attention_entry(module, layer)[1] for layer, module in modules.items()}
    except ValueError as error:
        return str(error)
    unknown = [name for name in places if not names.is_builtin(name)]
    if unknown:
        return f"its attention implementation {unknown[0]!r} is not one of transformers'"
    config: Any = text_backbone(model).config
    changing = sorted(names.rotations(config) & _LENGTH_DEPENDENT)
    if changing:
        return f"its rotation is {changing[0]!r}, which depends on the length of the prompt"
    if not all(names.is_causal(module) for module in modules.values()):
        return "its attention is not causal"
    return names.tree_reason(inner, config) or _decoding_reason(model, inner)


def _decoding_reason(model: Any, inner: Any) -> str | None:
    if GUARD in inner.__dict__:
        return "a session of capture_attention is open on it"
    if routes_by_type(inner):
        return "its experts depend on which tokens are of an image"
    if names.has_own_generate(inner):
        return "it has its own generate"
    if inner.training:
        return "it is in training mode"
    if any(names.compiled_in_place(module) is not None for module in inner.modules()):
        return "it was compiled in place"
    for module in wrapped_models(model):
        adapter = names.adapter_reason(module)
        if adapter is not None:
            return adapter
    places = [devices_of(layer) for layer in decoder_layers(model)]
    if any(len(place) != 1 or place != places[0] for place in places):
        return "its layers are not on one device"
    if tensor_parallel_group(inner) is not None:
        return "it is tensor parallel: its heads are divided among processes"
    if inner.generation_config.cache_implementation not in _EXACT_CACHES:
        return f"its cache is {inner.generation_config.cache_implementation!r}"
    recurrent = {id(each) for module in recurrent_modules(model).values() for each in module.modules()}
    return foreign_code(inner) or token_mixer(inner, text_backbone(model), recurrent) or states_reason(model)


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Blocks other threads that decode on this model until the context exits."""
    with _LOCK:
        lock = _MODEL_LOCKS.setdefault(unwrap(model), threading.RLock())
    with lock:
        yield


def _assign(groups: Sequence[PromptGroup], decoded: list[Decoded]) -> list[Decoded]:
    branches = [branch for group in groups for branch in group.branches]
    for branch, result in zip(branches, decoded, strict=True):
        branch.ids = result.ids
        if result.maps is not None:
            branch.maps = result.maps
    return decoded
