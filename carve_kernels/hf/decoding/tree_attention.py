"""Tree attention: one packed forward over the next tokens of many prompts, each with its image's prefix cache.

Everything that a layer does to a token alone (projections, rotary embedding, MLP, head) is done for all tokens of the
forward at once, so the weights are read once, whatever the number of prompts. Attention runs per image, over that
image's prefix cache, which is neither copied nor repeated. The model gets no KV cache and an all-True mask, because its
attention is replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from carve_kernels.hf import names
from carve_kernels.hf.attention_patch import INSTEAD, CaptureCalls, LayerBatch, patched
from carve_kernels.hf.decoding.prefix_cache import BLOCKS, Segment
from carve_kernels.hf.decoding.recurrent import RecurrentLayers
from carve_kernels.hf.model import attention_modules, decoder_layers, text_backbone
from carve_kernels.maps import new_buffers
from carve_kernels.types import Capture

# From this many query tokens on, sdpa on a CPU is faster over whole heads than with a group of heads folded into rows.
_FOLDED = 64
_LOCK = threading.Lock()
# The window of a layer, and how it attends in blocks.
View = tuple[int | None, str]


class TreeUnsupported(Exception):
    """Raised with the reason why the model's attention or a prompt rules out tree decoding."""


class _LastLayerReached(Exception):
    """Ends a forward after its last captured layer."""


class TreeAttention:
    """Packed forwards of one model; `layers` are captured by the backend `backend`."""

    def __init__(self, model: Any, layers: tuple[int, ...], backend: str) -> None:
        self._model, self._layers, self._backend = model, layers, backend
        self._modules = attention_modules(model)
        self._recurrent = RecurrentLayers(model)
        self._windows = names.windows(text_backbone(model).config)
        types = names.types_of_layers(text_backbone(model).config)
        self._types: list[Any] = types or [None] * len(decoder_layers(model))
        # How each type of layers attends in blocks; it is known from the masks of prompts.
        self.blocks: dict[Any, str] = {}
        self._thread = threading.get_ident()
        self._segments: list[Segment] = []
        self._depth: int | None = None
        self._capture: TreeCapture | None = None
        self._calls = 0
        # The memory of captures, which all forwards share.
        self._memory: dict[torch.device, CaptureCalls] = {}
        self.dtype = ""

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self._modules) + len(self._recurrent)

    @property
    def keeps_states(self) -> bool:
        """Whether some layers are recurrent: their states are those after a certain token."""
        return len(self._recurrent) > 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the attention of the model until the block is left.

        Raises RuntimeError if another engine has replaced it.
        """
        with ExitStack() as stack:
            with _LOCK:
                if any(INSTEAD in module.__dict__ for module in self._modules.values()):
                    raise RuntimeError("model: already in use by another CarveEngine call; wait until it has ended")
                for layer, module in self._modules.items():
                    stack.callback(module.__dict__.pop, INSTEAD, None)
                    module.__dict__[INSTEAD] = partial(self._attend, layer)
            entries = [names.attention_entry(module, layer) for layer, module in self._modules.items()]
            for registry, name in {(id(registry), name): (registry, name) for registry, name in entries}.values():
                stack.enter_context(patched(registry, name))
            stack.enter_context(self._recurrent.installed(self._current))
            yield

    def _current(self) -> list[Segment]:
        """The segments of the packed forward that runs in this thread; none outside of one."""
        return self._segments if threading.get_ident() == self._thread else []

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        segments: list[Segment],
        *,
        logits: list[int],
        depth: int | None = None,
        features: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Run tokens ids [1, n] at positions [C, 1, n]; logits [R, V] of the tokens `logits`.

        A `depth` ends the forward in the attention of layer depth - 1, without logits. `features` are the model's
        arguments for the image tokens among `ids`.
        """
        self._calls = 0
        self._segments, self._depth = segments, depth
        captured = [segment for segment in segments if len(segment.rows)]
        self._capture = TreeCapture(captured, self._layers, self._backend, self._memory) if captured else None
        keep = torch.tensor(logits, dtype=torch.int64, device=ids.device)
        options = names.logits_of(self._model, keep)
        try:
            output = self._model(
                input_ids=ids,
                position_ids=positions[0] if len(positions) == 1 else positions,
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
                use_cache=False,
                return_dict=True,
                **options,
                **(features or {}),
            )
        except _LastLayerReached:
            output = None
        finally:
            capture, self._segments, self._capture = self._capture, [], None
        if capture is not None:
            capture.run()
        if output is None:
            return torch.empty(0, device=ids.device)
        if self._calls != len(self._modules):
            raise TreeUnsupported(
                f"{len(self._modules) - self._calls} of its layers do not call their registered attention function"
            )
        return output.logits[0] if options else output.logits[0, keep]

    def _attend(
        self,
        layer: int,
        attention: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        if not self._current():
            return None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.numel() > 1:
            raise TreeUnsupported("its layers build an attention mask themselves")
        self._calls += 1
        self.dtype = str(query.dtype).removeprefix("torch.")
        window = self._windows[layer] if self._windows is not None else names.attention_options(query, options).window
        blocks = self.blocks.get(self._types[layer], BLOCKS[0])
        cached = [self._write(segment, layer, key, value) for segment in self._segments]
        if self._capture is not None and layer in self._layers:
            keys = [keys for segment, (keys, _) in zip(self._segments, cached, strict=True) if len(segment.rows)]
            self._capture.add(layer, query, keys, (window, blocks), options)
        if layer + 1 == self._depth:
            raise _LastLayerReached
        eager = names.implementation_of(module) == "eager"
        attend = partial(_eager, attention, module) if eager else _sdpa
        outputs = []
        for segment, cache in zip(self._segments, cached, strict=True):
            outputs.append(
                attend(segment, query[:, :, segment.start : segment.stop], *cache, (window, blocks), options)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), None

    @staticmethod
    def _write(
        segment: Segment, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of a segment to its prefix cache."""
        tree, columns = segment.tree, slice(segment.start, segment.stop)
        tree.prefix.depth = max(tree.prefix.depth, layer + 1)
        return tree.prefix.write(layer, segment.past, key[:, :, columns], value[:, :, columns], tree.capacity)


class TreeCapture:
    """The captured rows of a packed forward: layers that are alike are captured with one call for each segment."""

    def __init__(
        self, segments: list[Segment], layers: tuple[int, ...], backend: str, calls: dict[torch.device, CaptureCalls]
    ) -> None:
        self._segments, self._layers, self._backend, self._calls = segments, layers, backend, calls
        self._rows = [segment.rows + segment.start for segment in segments]
        self._batches: list[list[LayerBatch]] = []
        for segment in segments:
            shape = len(layers), len(segment.rows), segment.tokens.shape[1]
            segment.hidden = torch.zeros(shape, dtype=torch.bool)

    def add(
        self, layer: int, query: torch.Tensor, keys: list[torch.Tensor], view: View, options: dict[str, Any]
    ) -> None:
        """A captured layer: query [1, A, n, D] of the packed forward, and the keys of each segment, [1, KV, S, D]."""
        index, attention = self._layers.index(layer), names.attention_options(query, options)
        alike = (attention.scale, attention.softcap, view)
        if not self._batches or not self._batches[-1][0].accepts(index, alike):
            self._batches.append(
                [self._batch(segment, index, alike, attention, query.device) for segment in self._segments]
            )
        for segment in self._segments:
            visible = segment.visible(segment.fresh, *view)
            if visible is not None and segment.hidden is not None:
                rows_seen = visible[segment.rows - segment.fresh]
                segment.hidden[index] = ~rows_seen[:, segment.tokens[0].clamp(min=0).long()]
        for batch, rows, key in zip(self._batches[-1], self._rows, keys, strict=True):
            batch.add(query[:, :, rows.to(query.device)], key, attention.sink)

    @staticmethod
    def _batch(
        segment: Segment,
        index: int,
        alike: tuple[float, float, View],
        attention: names.AttentionOptions,
        device: torch.device,
    ) -> LayerBatch:
        visible = segment.visible(segment.fresh, *alike[2])
        mask = None if visible is None else visible[segment.rows - segment.fresh][None, None].to(device)
        tokens = segment.tokens.to(device)
        return LayerBatch(index, alike, tokens, None, mask, None, attention.scale, attention.softcap, None)

    def run(self) -> None:
        """Capture all layers, after the forward; each segment gets its own as `captured`."""
        device = self._batches[0][0].tokens.device
        step = torch.zeros((), dtype=torch.int64, device=device)
        if device not in self._calls:
            self._calls[device] = CaptureCalls(self._backend, device, len(self._layers))
        for number, segment in enumerate(self._segments):
            buffers = new_buffers((1, len(self._layers), 1, len(segment.rows)), segment.tokens.shape[1], device)
            for batches in self._batches:
                self._calls[device].run(batches[number], buffers, step)
            segment.captured = Capture(*(buffer[0, :, 0] for buffer in buffers))


def _eager(
    attention: Callable[..., Any],
    module: nn.Module,
    segment: Segment,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    view: View,
    options: dict[str, Any],
) -> torch.Tensor:
    """The model's eager function, which adds its mask, for the tokens of one segment."""
    mask = segment.additive_mask(0, view[0], query, torch.finfo(query.dtype).min, blocks=view[1])
    output: torch.Tensor = attention(module, query, keys, values, mask, **options)[0]
    return output


def _sdpa(
    segment: Segment,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    view: View,
    options: dict[str, Any],
) -> torch.Tensor:
    """torch's attention for the tokens of one segment, whatever the implementation: [1, n, A, D]."""
    attention = names.attention_options(query, options)
    if attention.beyond_sdpa is not None:
        raise TreeUnsupported(
            f"its attention uses {attention.beyond_sdpa}, which scaled_dot_product_attention does not support"
        )
    scale, fresh, (window, blocks) = attention.scale, segment.fresh, view
    in_blocks = blocks != "causal" and not segment.tree.is_causal_prefix
    if fresh and ((window is not None and window < fresh) or in_blocks):
        fresh = 0
    outputs = []
    if fresh:
        head = query[:, :, :fresh], keys[:, :, :fresh], values[:, :, :fresh]
        outputs.append(nn.functional.scaled_dot_product_attention(*head, is_causal=True, scale=scale, enable_gqa=True))
    if fresh < query.shape[2]:
        outputs.append(_masked(segment, fresh, query[:, :, fresh:], keys, values, view, scale))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return output.transpose(1, 2)


def _masked(
    segment: Segment,
    first: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    view: View,
    scale: float,
) -> torch.Tensor:
    """Masked attention. For few tokens, query heads that share a key head are folded into its rows."""
    _, heads, length, size = query.shape
    groups = heads // keys.shape[1]
    fold = length < _FOLDED or query.device.type != "cpu"
    if not fold and _is_plain(query, keys, values) and segment.is_causal_continuation(first, *view):
        return _continue(query, keys, values, scale)
    mask = segment.additive_mask(first, view[0], query, -torch.inf, groups if fold else 1, view[1])
    if not fold:
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
    folded = query.reshape(1, keys.shape[1], groups * length, size)
    output = nn.functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return output.reshape(1, heads, length, values.shape[3])


def _is_plain(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the kernel that sdpa calls on a CPU takes these strides and dtypes."""
    tensors = (query, keys, values)
    alike = len({(tensor.dtype, tensor.shape[3], tensor.stride(3)) for tensor in tensors}) == 1 and query.stride(3) == 1
    return alike and not torch.is_autocast_enabled("cpu")


def _continue(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last tokens to all cached columns, on a CPU and without a mask.

    Two softmaxes, merged by their log-sum-exps: a mask would also compute the half of the triangle that it hides.
    """
    past = keys.shape[2] - query.shape[2]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before, weight_before = attend(query, keys[:, :, :past], values[:, :, :past], 0.0, False, scale=scale)
    own, weight_own = attend(query, keys[:, :, past:], values[:, :, past:], 0.0, True, scale=scale)
    share = torch.sigmoid(weight_before - weight_own)[..., None]
    return torch.lerp(own.to(share.dtype), before.to(share.dtype), share).to(query.dtype)
