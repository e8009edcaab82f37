"""Recurrent and convolution layers in packed forwards: each prompt continues a copy of the states of its prefix.

Such a layer mixes the tokens that it is given, so it runs once for the prefix and once for the next tokens of each
prompt, by its own forward and with the states of transformers' own cache. What else a layer does to its tokens is done
for all of them at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from carve_kernels.hf import caches, names
from carve_kernels.hf.decoding.prefix_cache import PREFIX, Segment, TokenTree
from carve_kernels.hf.model import attention_modules, decoder_layers, devices_of, dtype_of, text_backbone

_SETTINGS = (bool, int, float, str)
# Tokens of the trial: of the prefix, and of the runs that continue it.
_TRIAL = 5, (4, 1, 1)
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def recurrent_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The module that keeps states in each text layer without softmax attention, by the layer's number, where found."""
    attention = attention_modules(model)
    found = {}
    for number, layer in enumerate(decoder_layers(model)):
        if number not in attention:
            modules = (module for name, module in layer.named_modules() if name)
            found[number] = next((module for module in modules if caches.cache_argument(module)), None)
    return {number: module for number, module in found.items() if module is not None}


def states_reason(model: Any) -> str | None:
    """Why the states of a model's recurrent layers cannot be copied and continued, or None; each class is tried."""
    config: Any = text_backbone(model).config
    tried: set[type[nn.Module]] = set()
    for number, module in recurrent_modules(model).items():
        if type(module) in tried:
            continue
        tried.add(type(module))
        try:
            continues = _continues(module, config)
        # It may be any forward.
        except Exception as error:
            return f"the states of its layer {number} cannot be tried ({type(error).__name__}: {error})"
        if not continues:
            return f"its layer {number} ({type(module).__name__}) does not continue a copy of its states"
    return None


def state_bytes(model: Any) -> int:
    """The bytes of one prompt's states in all recurrent layers; a class that cannot be tried counts as none."""
    config: Any = text_backbone(model).config
    sizes: dict[type[nn.Module], int] = {}
    modules = recurrent_modules(model).values()
    for module in modules:
        if type(module) not in sizes:
            # It may be any forward.
            with suppress(Exception):
                sizes[type(module)] = caches.states_nbytes(_tried(module, config))
    return sum(sizes.get(type(module), 0) for module in modules)


class States(NamedTuple):
    """A cache of transformers, of which recurrent layers use their states."""

    cache: Any

    @property
    def nbytes(self) -> int:
        """The bytes of its states."""
        return caches.states_nbytes(self.cache)


class RecurrentLayers:
    """The recurrent layers of one model, in the packed forwards of tree decoding."""

    def __init__(self, model: Any) -> None:
        self._config = text_backbone(model).config
        self._modules = recurrent_modules(model)

    def __len__(self) -> int:
        return len(self._modules)

    @contextmanager
    def installed(self, segments: Callable[[], list[Segment]]) -> Iterator[None]:
        """Replace the forwards of these layers until the block is left; `segments` are those of a packed forward."""
        with ExitStack() as stack:
            for number, module in self._modules.items():
                before = module.__dict__.get("forward")
                restore = partial(module.__dict__.pop, "forward", None)
                stack.callback(restore if before is None else partial(module.__dict__.__setitem__, "forward", before))
                module.__dict__["forward"] = self._by_prompt(number, module, segments)
            yield

    def _by_prompt(self, number: int, module: nn.Module, segments: Callable[[], list[Segment]]) -> Callable[..., Any]:
        """The forward of a layer that runs each prompt of a packed forward by itself."""
        forward, cache = module.forward, str(caches.cache_argument(module))
        signature = inspect.signature(forward)
        hidden = next(iter(signature.parameters))

        def by_prompt(*args: Any, **kwargs: Any) -> Any:
            packed = segments()
            if not packed:
                return forward(*args, **kwargs)
            given = names.arguments(signature, args, kwargs)
            # A mask would hide padding, of which a packed forward has none.
            settings = {name: value for name, value in given.items() if isinstance(value, _SETTINGS)}
            outputs = []
            for segment in packed:
                for branch, start, stop in segment.runs:
                    settings[cache] = self._states(segment.tree, branch, number, module)
                    outputs.append(forward(given[hidden][:, start:stop], **settings))
                segment.tree.prefix.depth = max(segment.tree.prefix.depth, number + 1)
            return torch.cat(outputs, 1)

        return by_prompt

    def _states(self, tree: TokenTree, branch: int, number: int, module: nn.Module) -> Any:
        """The states of a branch; before its first run in a layer they are a copy of the prefix's."""
        if tree.prefix.states is None:
            tree.prefix.states = States(caches.new_states(self._config))
        prefix = tree.prefix.states.cache
        if branch == PREFIX:
            return prefix
        if branch not in tree.states:
            tree.states[branch] = caches.new_states(self._config)
        if (branch, number) not in tree.copied:
            tree.copied.add((branch, number))
            caches.copy_state(prefix, tree.states[branch], module)
        return tree.states[branch]


def _continues(module: nn.Module, config: Any) -> bool:
    """Whether runs after a copy of the prefix's state give what one run over all tokens does."""
    prefix, runs = _TRIAL
    hidden, name = _hidden(module, config, prefix + sum(runs)), str(caches.cache_argument(module))
    with torch.no_grad():
        expected = module(hidden, **{name: caches.new_states(config)})
        states = caches.new_states(config)
        module(hidden[:, :prefix], **{name: states})
        for _ in range(2):
            branch, start = caches.new_states(config), prefix
            caches.copy_state(states, branch, module)
            for count in runs:
                found = module(hidden[:, start : start + count], **{name: branch})
                if not _is_close(found, expected[:, start : start + count]):
                    return False
                start += count
    return True


def _tried(module: nn.Module, config: Any) -> Any:
    """A cache with the states of one layer."""
    states = caches.new_states(config)
    with torch.no_grad():
        module(_hidden(module, config, 1), **{str(caches.cache_argument(module)): states})
    return states


def _hidden(module: nn.Module, config: Any, count: int) -> torch.Tensor:
    device, dtype = min(devices_of(module), key=str), dtype_of(module) or torch.float32
    return torch.randn(1, count, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    bound = _TOLERANCE.get(found.dtype, 0.05) * float(expected.abs().max())
    return bool(((found - expected).abs() <= bound).all())
