"""Wraps the attention functions in use: the original runs unchanged, then the module's recorders get its arguments.

While a session is open, the entry of the implementation in use is wrapped where the model looks it up: in the registry
of its modeling file (`sdpa`, `flex_attention`, the flash names), or as that file's function for eager. The config, the
implementation's name and so the masks stay unchanged. Only modules that carry recorders, or a function that replaces
their attention (tree decoding), are affected.

Captured layers of one forward wait in a `LayerBatch`: one call captures those that are alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import carve_kernels.ops.capture  # noqa: F401  (registers the operator)
from carve_kernels.hf.model import version_of
from carve_kernels.hf.names import Attention, own_entry, set_entry
from carve_kernels.types import Capture

# Attribute of a module: (recorder, index) pairs, whose `record` is called after each call of its attention.
RECORDERS = "_carve_recorders"
# Attribute of a module: a function that is called in place of its attention, with that as first argument; it returns
# None for forwards that it leaves alone.
INSTEAD = "_carve_instead"
# The wrapped entries of all open sessions: the number of users, the wrapper, and the original.
_PATCHED: dict[tuple[int, str], tuple[int, Attention, Attention | None]] = {}
_LOCK = threading.RLock()


def wrap(attention: Attention) -> Attention:
    """An attention function that calls another one and then the module's recorders."""

    def recorded_attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        instead = getattr(module, INSTEAD, None)
        if instead is not None:
            output = instead(attention, module, query, key, value, attention_mask, *args, **options)
            if output is not None:
                return output
        output = attention(module, query, key, value, attention_mask, *args, **options)
        for recorder, index in getattr(module, RECORDERS, ()):
            recorder.record(index, module, query, key, attention_mask, options)
        return output

    return recorded_attention


@contextmanager
def patched(registry: Any, name: str) -> Iterator[None]:
    """Wrap an entry. Its users are counted, so that sessions may close in any order; the last one restores it."""
    key = id(registry), name
    with _LOCK:
        count, wrapper, original = _PATCHED.get(key, (0, None, None))
        if wrapper is None:
            original = own_entry(registry, name)
            wrapper = wrap(original if original is not None else registry[name])
            set_entry(registry, name, wrapper)
        _PATCHED[key] = (count + 1, wrapper, original)
    try:
        yield
    finally:
        with _LOCK:
            count, wrapper, original = _PATCHED.pop(key)
            if count > 1:
                _PATCHED[key] = (count - 1, wrapper, original)
            # An entry that other code has replaced meanwhile is left alone.
            elif own_entry(registry, name) is wrapper:
                set_entry(registry, name, original)


@dataclass
class LayerBatch:
    """Consecutive layers that differ in query, key and sink only and are captured with one call.

    `first` is the index of the first of them among the captured layers. `alike` and `attention_mask` (the mask that
    the model passed, compared by identity) decide whether the next layer belongs to the batch.
    """

    first: int
    alike: tuple[Any, ...]
    tokens: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    scale: float
    softcap: float
    window: int | None
    attention_mask: Any = None
    query: list[torch.Tensor] = field(default_factory=list)
    key: list[torch.Tensor] = field(default_factory=list)
    sink: list[torch.Tensor] = field(default_factory=list)
    key_versions: list[int | None] = field(default_factory=list)

    def accepts(self, index: int, alike: tuple[Any, ...], attention_mask: Any = None) -> bool:
        """Whether layer `index` can be captured in the same call."""
        same = self.attention_mask is attention_mask and self.alike == alike
        return same and index == self.first + len(self.query)

    def add(self, query: torch.Tensor, key: torch.Tensor, sink: torch.Tensor | None) -> None:
        """Add the next layer: the captured rows of its query, and its keys."""
        self.query.append(query)
        self.key.append(key)
        self.key_versions.append(version_of(key))
        if sink is not None:
            self.sink.append(sink)

    def keys_changed(self) -> bool:
        """Whether keys were written to after they were added, as far as tensors count their writes."""
        return [version_of(key) for key in self.key] != self.key_versions

    def capture(self, out: Capture, step: torch.Tensor, backend: str) -> None:
        """Capture all layers into step `step`, an int64 tensor [] on the device, of buffers `out`."""
        torch.ops.carve_kernels.capture_layers(
            self.query, self.key, self.tokens, self.mask, self.positions, self.sink, self.scale, self.softcap,
            self.window or 0, step, self.first, backend, *out,
        )  # fmt: skip
