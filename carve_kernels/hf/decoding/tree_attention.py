"""One row of tokens that belong to many prompts: each attends to its own prefix and branch, and is captured there.

All that a layer does to a token alone (projections, rotation, the feed-forward part, the head) is done for all tokens
of the row at once; the weights are read once, whatever the number of prompts. Only the attention looks at more than
one token, so only the attention is another one: for each picture, its tokens over the keys of its own prefix, which are
neither copied nor repeated. The model is given no cache, and a mask that says nothing.
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
from carve_kernels.hf.attention_patch import INSTEAD, PATCHES
from carve_kernels.hf.decoding.token_tree import Part
from carve_kernels.hf.decoding.tree_capture import Taking
from carve_kernels.hf.model import attention_modules, text_backbone

# From this many query tokens on, sdpa on a CPU is faster over whole heads than with a group of heads folded into rows.
_FOLDED = 64
_OPENING = threading.Lock()


class Unshareable(Exception):
    """The model attends in a way that one row of many prompts cannot; the reason."""


class _Enough(Exception):
    """Ends a forward behind its last captured layer."""


class Row:
    """Forwards of rows of many prompts through one model; `layers` are captured by the room `backend`."""

    def __init__(self, model: Any, layers: tuple[int, ...], backend: str) -> None:
        self._model, self._layers, self._backend = model, layers, backend
        self._modules = attention_modules(model)
        self._windows = names.windows(text_backbone(model).config)
        self._thread = threading.get_ident()
        self._parts: list[Part] = []
        self._depth: int | None = None
        self._taking: Taking | None = None
        self._attended = 0
        self.dtype = ""

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return len(self._modules)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The attention of this row stands in the model, until the block is left.

        Raises RuntimeError if another row's does.
        """
        with ExitStack() as stack:
            with _OPENING:
                if any(INSTEAD in module.__dict__ for module in self._modules.values()):
                    raise RuntimeError(
                        "model: an engine is at work on it, in another thread or further up; wait for it"
                    )
                for layer, module in self._modules.items():
                    stack.callback(module.__dict__.pop, INSTEAD, None)
                    module.__dict__[INSTEAD] = partial(self._attend, layer)
            places = [names.attention_entry(module, layer) for layer, module in self._modules.items()]
            for place, name in {(id(place), name): (place, name) for place, name in places}.values():
                PATCHES.enter(place, name)
                stack.callback(PATCHES.leave, place, name)
            yield

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        parts: list[Part],
        *,
        logits: list[int],
        depth: int | None = None,
        pictures: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Run tokens ids [1, n] at positions [C, 1, n]; the logits [R, V] of the rows `logits`.

        A `depth` ends the forward in the attention of layer depth - 1, without logits. `pictures` is what the model
        takes for the image tokens among `ids`.
        """
        self._attended = 0
        self._parts, self._depth = parts, depth
        captured = [part for part in parts if len(part.rows)]
        self._taking = Taking(captured, self._layers, self._backend) if captured else None
        keep = torch.tensor(logits, dtype=torch.int64, device=ids.device)
        options = names.logits_of(self._model, keep)
        says_nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        try:
            output = self._model(
                input_ids=ids,
                position_ids=positions[0] if len(positions) == 1 else positions,
                attention_mask=says_nothing,
                use_cache=False,
                return_dict=True,
                **options,
                **(pictures or {}),
            )
        except _Enough:
            return torch.empty(0, device=ids.device)
        finally:
            self._parts, self._taking = [], None
        if self._attended != len(self._modules):
            raise Unshareable(f"{len(self._modules) - self._attended} of its layers attend in a way of their own")
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
        if not self._parts or threading.get_ident() != self._thread:
            return None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.numel() > 1:
            raise Unshareable("its layers attend under a mask of their own")
        self._attended += 1
        self.dtype = str(query.dtype).removeprefix("torch.")
        window = self._windows[layer] if self._windows is not None else names.attention_options(query, options).window
        held = []
        for part in self._parts:
            mine = slice(part.start, part.stop)
            room = part.tree.room
            held.append(part.tree.prefix.hold(layer, part.past, key[:, :, mine], value[:, :, mine], room))
            part.tree.prefix.depth = max(part.tree.prefix.depth, layer + 1)
        if self._taking is not None and layer in self._layers:
            keys = [keys for part, (keys, _) in zip(self._parts, held, strict=True) if len(part.rows)]
            self._taking.take(layer, query, keys, window, options)
        if layer + 1 == self._depth:
            raise _Enough
        eager = names.implementation_of(module) == "eager"
        attend = partial(_eager, attention, module) if eager else _sdpa
        outputs = [
            attend(part, query[:, :, part.start : part.stop], *kept, window, options)
            for part, kept in zip(self._parts, held, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), None


def _eager(
    attention: Callable[..., Any],
    module: nn.Module,
    part: Part,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """The model's own function, which adds its mask, for the tokens of one part."""
    mask = part.kept(("eager", window), lambda: _additive(part.sees(0, window), query, torch.finfo(query.dtype).min))
    output: torch.Tensor = attention(module, query, keys, values, mask, **options)[0]
    return output


def _sdpa(
    part: Part,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """torch's attention for the tokens of one part, whatever the implementation is called: [1, n, A, D]."""
    told = names.attention_options(query, options)
    if told.beyond_sdpa is not None:
        raise Unshareable(f"its attention takes {told.beyond_sdpa}, which torch's does not")
    scale, fresh = told.scale, part.fresh
    if window is not None and window < fresh:
        fresh = 0
    outputs = []
    if fresh:
        head = query[:, :, :fresh], keys[:, :, :fresh], values[:, :, :fresh]
        outputs.append(nn.functional.scaled_dot_product_attention(*head, is_causal=True, scale=scale, enable_gqa=True))
    if fresh < query.shape[2]:
        outputs.append(_masked(part, fresh, query[:, :, fresh:], keys, values, window, scale))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return output.transpose(1, 2)


def _masked(
    part: Part,
    first: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Tokens under a mask; few of them with the query heads that share a key head as rows of it, none is repeated."""
    _, heads, length, size = query.shape
    groups = heads // keys.shape[1]
    fold = length < _FOLDED or query.device.type != "cpu"
    if not fold and _is_plain(query, keys, values) and part.continues(first, window):
        return _continued(query, keys, values, scale)
    mask = part.kept(
        ("sdpa", first, window),
        lambda: _additive(part.sees(first, window), query, -torch.inf, groups if fold else 1),
    )
    if not fold:
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
    folded = query.reshape(1, keys.shape[1], groups * length, size)
    output = nn.functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return output.reshape(1, heads, length, values.shape[3])


def _is_plain(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the kernel that sdpa itself calls on a CPU takes them as they are."""
    parts = (query, keys, values)
    alike = len({(part.dtype, part.shape[3], part.stride(3)) for part in parts}) == 1 and query.stride(3) == 1
    return alike and not torch.is_autocast_enabled("cpu")


def _continued(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """The last tokens, which see all before them and a triangle of themselves, on a CPU and without a mask.

    Two softmaxes, joined by their sums: a mask over all keys would cost the half of the triangle that it hides.
    """
    past = keys.shape[2] - query.shape[2]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before, weight_before = attend(query, keys[:, :, :past], values[:, :, :past], 0.0, False, scale=scale)
    own, weight_own = attend(query, keys[:, :, past:], values[:, :, past:], 0.0, True, scale=scale)
    share = torch.sigmoid(weight_before - weight_own)[..., None]
    return torch.lerp(own.to(share.dtype), before.to(share.dtype), share).to(query.dtype)


def _additive(seen: torch.Tensor | None, like: torch.Tensor, hidden: float, repeats: int = 1) -> torch.Tensor | None:
    """A mask to be added, [1, 1, repeats * Q, S] in the dtype of the query."""
    if seen is None:
        return None
    mask = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, hidden)
    return mask.repeat(repeats, 1)[None, None].to(like.device)
