"""Visual tokens that `on_layer` drops: the layers behind process the other columns, and outputs have all of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from carve_kernels import checks
from carve_kernels.hf import caches, names
from carve_kernels.hf.model import (
    attention_modules,
    decoder_layers,
    is_mixer,
    layer_window,
    text_backbone,
    unwrap,
    version_of,
)
from carve_kernels.hf.session.hidden_tokens import selects_keys
from carve_kernels.hf.session.kept_columns import KeptColumns, columns_to_keep
from carve_kernels.hf.session.recording import Record


class Tracked(Protocol):
    """What a session knows of the current forward: its record, whether it still runs, and the call of generate."""

    record: Record | None
    running: bool
    generation: Any


class _Dropped(NamedTuple):
    """The states before tokens were dropped, the places of the others, and those that only fill up a row."""

    states: torch.Tensor
    places: torch.Tensor
    filling: tuple[torch.Tensor, torch.Tensor] | None

    def restored(self, states: torch.Tensor) -> torch.Tensor:
        """The states of all tokens: those of the dropped ones as they were."""
        if self.filling is not None:
            hidden, before = self.filling
            states = torch.where(hidden[..., None].to(states.device), before.to(states.device), states)
        whole = self.states.to(states.device)
        return whole.scatter(1, self.places.to(states.device)[..., None].expand_as(states), states)


class TokenDrops:
    """The columns that layers of one model process, for all of its open sessions.

    Hooks on the layers are added when a function returns columns for the first time; `close` removes them. A layer
    behind gets the hidden states, position embeddings and masks of the kept columns, so its cache holds their keys
    alone. Dropped tokens skip the layers behind: in the output of the last layer they have the states with which they
    were dropped.
    """

    def __init__(self, model: nn.Module, trackers: Sequence[Tracked]) -> None:
        self._model, self._trackers = model, trackers
        self._hooks = ExitStack()
        # Layers behind which tokens can be dropped, with the implementation of the attention.
        self._checked: set[tuple[int, str | None]] = set()
        self._layers = decoder_layers(model)
        # The first layer with a hook.
        self._hooked = len(self._layers)
        self.end()

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()
        self._hooked = len(self._layers)

    def end(self) -> None:
        """After a forward: nothing of it stays in memory."""
        self._dropped: list[_Dropped] = []
        # The output of the layer before, and how often it had been written to.
        self._output: tuple[torch.Tensor | None, int | None] = (None, None)
        # By the identities of a mask and of the columns: the mask itself, so that it stays alive, and its part.
        self._masks: dict[tuple[int, int], tuple[Any, torch.Tensor | None]] = {}

    def drop(self, record: Record, layer: int, returned: Any) -> None:
        """Let the layers behind `layer` process the columns that `on_layer` returned in a forward over a prompt."""
        if torch.compiler.is_compiling():
            raise ValueError("on_layer: expected None in a compiled forward, whose tokens cannot be dropped")
        chunked = any(each.generation is not None and each.generation.chunked for each in self._trackers)
        if record.decoding or chunked or record.forward_length != record.prompt:
            raise ValueError(
                "on_layer: expected None except in the forward that reads a whole prompt (step 0), got columns in "
                f"{'a decode step' if record.decoding else 'a chunk of a prompt'}"
            )
        if any(each.layer == layer for each in record.kept):
            raise ValueError(f"on_layer: expected one session that returns columns for layer {layer}, got two")
        checked = layer, names.implementation_of(self._model)
        if checked not in self._checked:
            check_droppable(self._model, layer)
            self._checked.add(checked)
        columns = columns_to_keep(returned, layer, record.state.tokens, record.attended, record.kept_behind(layer - 1))
        for tracker in self._trackers:
            if tracker.running and tracker.record is not None:
                tracker.record.keep(layer, columns)
        for number in range(layer + 1, self._hooked):
            self._add_hooks(number, self._layers[number])
        self._hooked = min(self._hooked, layer + 1)

    def _add_hooks(self, number: int, layer: nn.Module) -> None:
        signature = inspect.signature(layer.forward)

        def before(_layer: nn.Module, args: Any, kwargs: Any) -> Any:
            return self._before(number, signature, args, kwargs)

        def after(_layer: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            return self._after(number, output)

        self._hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._hooks.callback(layer.register_forward_hook(after, with_kwargs=True).remove)

    def _record(self, number: int) -> tuple[Record, KeptColumns] | None:
        """The record of the current forward, and what a layer processes, if that is not all columns."""
        for tracker in self._trackers:
            if tracker.running and tracker.record is not None:
                kept = tracker.record.kept_behind(number - 1)
                if kept is not None:
                    return tracker.record, kept
        return None

    def _before(self, number: int, signature: inspect.Signature, args: Any, kwargs: Any) -> Any:
        found = self._record(number)
        if found is None:
            return None
        record, kept = found
        known = list(signature.parameters)
        given = {**dict(zip(known, args, strict=False)), **kwargs}
        try:
            if not record.decoding:
                self._check_cache(caches.cache_of(given), self._layers[number])
                given[known[0]] = self._states(number, given[known[0]], record, kept)
            for name, value in given.items():
                if name != known[0]:
                    given[name] = self._part(number, name, value, record, kept)
        except ValueError as error:
            for tracker in self._trackers:
                if tracker.running and tracker.record is not None:
                    tracker.record.error = error
            raise
        return tuple(given.pop(name) for name in known[: len(args)]), given

    @staticmethod
    def _check_cache(cache: Any, layer: nn.Module) -> None:
        attention = names.attention_in(layer)
        [reach] = caches.reaches(cache, [layer if attention is None else attention])
        if any(each is not None and each.capacity is not None for each in reach) or caches.has_windows([reach]):
            raise ValueError(
                f"cache: expected one that grows where tokens are dropped, got a {type(cache).__name__} with buffers "
                "of a fixed size or sliding windows; use a DynamicCache"
            )

    def _states(self, number: int, states: torch.Tensor, record: Record, kept: KeptColumns) -> torch.Tensor:
        """The hidden states that a layer of a prefill processes."""
        before = record.kept_behind(number - 2)
        output, version = self._output
        if before is not None and (states is not output or version_of(states) != version):
            raise ValueError(
                f"model: expected layers that pass their states on unchanged where tokens are dropped, but "
                f"{_kind(self._model)} changes them between layers {number - 1} and {number}"
            )
        if kept is before:
            return states
        places = kept.columns if before is None else before.places_of_all(kept.columns)
        places = places.to(states.device)
        narrowed = _narrowed(states, places, -2, 0)
        self._dropped.append(_Dropped(states, places, None if kept.hidden is None else (kept.hidden, narrowed)))
        return narrowed

    def _part(self, number: int, name: str, value: Any, record: Record, kept: KeptColumns) -> Any:
        """The part of an argument of a layer that belongs to the kept columns."""
        if name == names.LAYER_MASK:
            return self._mask(number, value, record, kept)
        axis = names.COLUMN_AXES.get(name)
        parts = [each for each in _flat(value) if isinstance(each, torch.Tensor)]
        if not parts or record.decoding:
            return value
        if axis is None or not all(_has_columns(each, axis, record.prompt, len(kept.columns)) for each in parts):
            shapes = ", ".join(map(checks.describe, parts))
            raise ValueError(
                f"model: expected layers whose arguments have known columns where tokens are dropped, but layer "
                f"{number} of {_kind(self._model)} gets {name!r}, {shapes}"
            )
        if isinstance(value, torch.Tensor):
            return _narrowed(value, kept.columns, axis, axis - 1)
        return type(value)(_narrowed(each, kept.columns, axis, axis - 1) for each in value)

    def _mask(self, number: int, mask: Any, record: Record, kept: KeptColumns) -> torch.Tensor | None:
        """The part of a layer's mask for the kept columns, in which those that only fill up a row are hidden."""
        before, part = self._masks.get((id(mask), id(kept)), (self, None))
        if before is not mask:
            part = self._mask_part(number, mask, record, kept)
            self._masks[id(mask), id(kept)] = mask, part
        return part

    def _mask_part(self, number: int, mask: Any, record: Record, kept: KeptColumns) -> torch.Tensor | None:
        if mask is None and kept.hidden is None:
            return None
        rows = 1 if record.decoding else record.prompt
        attention = names.attention_in(self._layers[number])
        # It takes None for a causal mask.
        if mask is None and attention is not None and names.implementation_of(attention) == "sdpa":
            mask = torch.ones(1, 1, rows, record.length, dtype=torch.bool, device=kept.columns.device)
            mask = mask.tril(record.length - rows) if names.is_causal(attention) else mask
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
            raise ValueError(
                "attention_mask: expected a mask of four dimensions where tokens are dropped, but layer "
                f"{number} gets {checks.describe(mask)}; use attn_implementation='sdpa' or 'eager'"
            )
        if mask.shape[2] not in (1, rows) or mask.shape[3] != record.length:
            raise ValueError(
                f"attention_mask: expected a mask of {rows} rows and {record.length} keys where tokens are dropped, "
                f"got {checks.describe(mask)}"
            )
        columns = kept.columns.to(mask.device)
        part = mask if mask.shape[2] == 1 else _narrowed(mask, columns, -2, 0)
        later = torch.arange(record.prompt, record.length, device=mask.device).expand(len(columns), -1)
        part = _narrowed(part, torch.cat([columns, later], 1), -1, 0)
        if kept.hidden is None:
            return part
        hidden = nn.functional.pad(kept.hidden.to(mask.device), (0, later.shape[1]))[:, None, None]
        return part.masked_fill(hidden, False if part.dtype == torch.bool else torch.finfo(part.dtype).min)

    def _after(self, number: int, output: Any) -> Any:
        found = self._record(number)
        if found is None or found[0].decoding:
            return None
        states = output if isinstance(output, torch.Tensor) else output[0]
        if number < len(self._layers) - 1:
            self._output = states, version_of(states)
            return None
        for dropped in reversed(self._dropped):
            states = dropped.restored(states)
        self.end()
        return states if isinstance(output, torch.Tensor) else (states, *output[1:])


def check_droppable(model: Any, layer: int) -> None:
    """Raise ValueError unless the layers of a model behind `layer` can process a part of the columns."""
    backbone = text_backbone(model)
    reason = names.states_added(backbone)
    attention = attention_modules(model)
    for number, each in enumerate(decoder_layers(model)):
        if reason is not None:
            break
        if number > layer:
            reason = _layer_reason(model, number, each, attention.get(number))
    if reason is not None:
        raise ValueError(
            f"model: expected one whose layers behind layer {layer} can process a part of the tokens, got "
            f"{_kind(model)}, of which {reason}"
        )


def _layer_reason(model: Any, number: int, layer: nn.Module, attention: nn.Module | None) -> str | None:
    """Why a layer cannot process a part of the columns, or None."""
    if attention is None:
        return f"layer {number} has no softmax attention: what it keeps of a token depends on its neighbours"
    if caches.reuses_keys(attention):
        return f"layer {number} attends to the keys of an earlier layer"
    if selects_keys(attention):
        return f"layer {number} selects keys in blocks"
    if layer_window(model, number) is not False:
        return f"layer {number} has a window, which counts keys"
    if names.is_flash(names.implementation_of(attention) or ""):
        return (
            f"layer {number} runs FlashAttention, which takes gaps in the positions for the ends of packed prompts; "
            "use attn_implementation='sdpa'"
        )
    inside = {id(each) for each in attention.modules()}
    for name, module in layer.named_modules():
        keeps_states = name and id(module) not in inside and caches.cache_argument(module) is not None
        if keeps_states or is_mixer(module):
            return f"layer {number} also mixes neighbouring tokens, in {name} ({type(module).__name__})"
    return None


def _has_columns(tensor: torch.Tensor, axis: int, length: int, batch: int) -> bool:
    """Whether a tensor has `length` columns along an axis, counted from the end, of each row of the batch or of all.

    Of one dimension are the places in a cache, which only buffers of a fixed size read.
    """
    if tensor.ndim < -axis or tensor.shape[axis] != length:
        return False
    return tensor.ndim == 1 or batch == 1 or (tensor.ndim > -axis and tensor.shape[axis - 1] in (1, batch))


def _narrowed(tensor: torch.Tensor, places: torch.Tensor, axis: int, batch_axis: int) -> torch.Tensor:
    """The places [B, K] of a tensor along an axis, whose rows of the batch, or one for all, are along `batch_axis`."""
    places = places.to(tensor.device)
    if len(places) == 1 or tensor.ndim < -batch_axis:
        return tensor.index_select(axis, places[0])
    shape = [1] * tensor.ndim
    shape[batch_axis], shape[axis] = places.shape
    return torch.take_along_dim(tensor, places.view(shape), axis % tensor.ndim)


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _kind(model: Any) -> str:
    return type(unwrap(model)).__name__
