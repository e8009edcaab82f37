"""Before each forward: a prefill starts a record, a decode step continues it, and anything else is an error."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from carve_kernels import checks
from carve_kernels.hf import caches, names
from carve_kernels.hf.attention import attended_columns
from carve_kernels.hf.backbone import image_token_positions
from carve_kernels.hf.decoding import Decoding, end_tokens
from carve_kernels.hf.record import OnLayer, Record
from carve_kernels.hf.rows import RowsSpec, resolve_rows
from carve_kernels.types import VisualLayout


class Planner:
    """Follows the forwards of one model: their ids, their place behind the cache, the record they belong to."""

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[int, ...],
        device: torch.device | None,
        rows: RowsSpec,
        tokens: VisualLayout | torch.Tensor | Sequence[int] | None,
        processor: Any,
        max_steps: int,
        on_layer: OnLayer | None,
        backend: str,
    ) -> None:
        self.record: Record | None = None
        self.decoding: Decoding | None = None
        self._model, self._layers, self._device, self._rows = model, layers, device, rows
        self._processor = processor
        self._tokens, self._layout = check_tokens(tokens)
        self._max_steps, self._on_layer, self._backend = max_steps, on_layer, backend
        self._signature = inspect.signature(model.forward)
        # The ids behind the cache, in the pieces that came, on their device: joined only where a prefill needs them.
        self._history: list[torch.Tensor] | None = None
        # The generate whose first forward has been planned.
        self._begun: Decoding | None = None
        self._inside: list[object] = []
        # Whether a forward that was planned is under way: a part of the model that is called alone is none.
        self.running = False
        self._thread: threading.Thread | None = None

    def begin(self, source: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward; a wrapper and the model inside it count as one. Raises before the model has run."""
        if self._inside and self._thread is not threading.current_thread():
            raise RuntimeError("model: two threads run it inside one session, give each its own model and session")
        # A forward that Ctrl-C ended is never reported as ended: the same source begins again.
        if self._inside and self._inside[0] is not source:
            self._inside.append(source)
            return
        self._inside, self.running = [], False
        given = names.arguments(self._signature, args, kwargs)
        record = self._plan(given)
        if record is not None:
            record.together = self._on_layer is None and caches.keeps_cache(self._model, given)
        self.record = record
        self._begun = self.decoding
        self._inside, self.running = [source], True

    def end(self) -> None:
        """After a forward."""
        if self._inside:
            self._inside.pop()
        self.running = bool(self._inside)

    def _plan(self, given: dict[str, Any]) -> Record | None:
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        source = ids if ids is not None else embeds
        if source is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds in the call of the model, got neither")
        length = source.shape[1]
        record, cache = self.record, caches.cache_of(given)
        behind = self.decoding is not None and self._begun is self.decoding
        if behind and cache is None and (ids is not None or length == 1) and not self._repeats(ids):
            raise names.changed(f"behind the first forward of generate, {length} token(s) come without a known cache")
        if record is not None and length == 1 and _follows(cache, record.length):
            self._own_thread()
            record.advance(ids, record.length + 1, 0)
            self._history = None if ids is None or self._history is None else [*self._history, ids.detach()]
            return record
        past = int(caches.cached_tokens(cache))
        if record is not None and past == 0 and self._repeats(ids):
            self._own_thread()
            record.advance(ids, length, length - 1)
            self._history = [ids.detach()]  # type: ignore[union-attr]
            return record
        return self._prefill(ids, source, past, given.get("attention_mask"))

    def _prefill(self, ids: torch.Tensor | None, source: torch.Tensor, past: int, attention_mask: Any) -> Record | None:
        self._own_thread()
        self.record, self._thread = None, threading.current_thread()
        batch, length = source.shape[:2]
        total = past + length
        if ids is None:
            self._history = None
        elif past == 0:
            self._history = [ids.detach()]
        elif self._history is not None:
            self._history.append(ids.detach())
        known = self._known(batch, total)
        attended = attended_columns(attention_mask, batch, length, total)
        tokens = self._visual_tokens(known, batch, total)
        if tokens is None:
            return None
        rows = resolve_rows(self._rows, known, attended, tokens, self._processor)
        if bool((rows.columns < past).any()):
            raise ValueError(
                f"rows: expected rows of this forward, which starts at column {past} behind a cache, got "
                f"column {int(rows.columns.min())}; use rows='last' for a chunked prefill"
            )
        return Record(
            self._layers,
            rows,
            tokens,
            self._layout,
            device=self._device if self._device is not None else source.device,
            past=past,
            length=length,
            max_steps=self._max_steps,
            eos=self._end_tokens(),
            on_layer=self._on_layer,
            backend=self._backend,
        )

    def _visual_tokens(self, ids: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
        """The columns of the visual tokens, int32 [B, N]; None in a chunk of a prompt before its first image."""
        if self._tokens is None:
            if ids is None:
                raise ValueError(
                    "tokens: expected the columns of the visual tokens, since the model was given no input_ids of the "
                    "whole prompt; got None"
                )
            found = image_token_positions(self._model, ids)
            if not any(len(row) for row in found):
                if self.decoding is not None and self.decoding.chunked:
                    return None
                if length == 1:
                    raise ValueError(
                        "input_ids: expected a prompt with image tokens, or one token behind a cache "
                        f"({caches.cache_names()}), got one token without a cache"
                    )
                raise ValueError("input_ids: expected image tokens in the prompt, got none; was the image left out?")
            width = max(len(row) for row in found)
            return torch.stack([nn.functional.pad(row, (0, width - len(row)), value=-1) for row in found])
        tokens = self._tokens.expand(batch, -1) if self._tokens.shape[0] == 1 else self._tokens
        if tokens.shape[0] != batch:
            raise ValueError(f"tokens: expected 1 or {batch} rows as the batch, got {checks.describe(self._tokens)}")
        if tokens.numel() and int(tokens.max()) >= length:
            raise ValueError(
                f"tokens: expected columns below the prompt's {length} tokens, got {int(tokens.max())}; was the prompt "
                "truncated?"
            )
        return tokens

    def _known(self, batch: int, length: int) -> torch.Tensor | None:
        """The ids of the whole sequence on the CPU, if they passed through this session."""
        if self._history is None or any(piece.shape[0] != batch for piece in self._history):
            return None
        ids = torch.cat(self._history, 1).cpu()
        return ids if ids.shape[1] == length else None

    def _repeats(self, ids: torch.Tensor | None) -> bool:
        """Whether a forward without a cache repeats the last one with one more token: a decode step all the same."""
        if ids is None:
            return False
        before = self._known(ids.shape[0], ids.shape[1] - 1)
        return before is not None and bool(torch.equal(ids[:, :-1].detach().cpu(), before))

    def _end_tokens(self) -> tuple[int, ...]:
        if self.decoding is not None:
            return self.decoding.eos
        return end_tokens(getattr(getattr(self._model, "generation_config", None), "eos_token_id", None))

    def _own_thread(self) -> None:
        """A session follows one thread; another may take over once that one has ended, as workers of a streamer do."""
        if self._thread not in (None, threading.current_thread()) and self._thread.is_alive():
            raise RuntimeError(
                f"model: {threading.current_thread().name} runs it inside a session that captures another thread, "
                f"{self._thread.name}; give each thread its own model and session"
            )


def check_tokens(
    tokens: VisualLayout | torch.Tensor | Sequence[int] | None,
) -> tuple[torch.Tensor | None, VisualLayout | None]:
    """The tokens argument as int32 [1 or B, N] and a layout; None finds them later."""
    if tokens is None:
        return None, None
    if isinstance(tokens, VisualLayout):
        return tokens.tokens(), tokens
    if not isinstance(tokens, torch.Tensor):
        if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence):
            raise TypeError(f"tokens: expected a VisualLayout, columns or None, got {checks.describe(tokens)}")
        tokens = torch.tensor([checks.integer(f"tokens[{place}]", token) for place, token in enumerate(tokens)])
    if tokens.ndim not in (1, 2) or tokens.is_floating_point() or tokens.dtype == torch.bool or not tokens.numel():
        raise ValueError(f"tokens: expected at least one column, int [N] or [B, N], got {checks.describe(tokens)}")
    return tokens.detach().cpu().to(torch.int32).reshape(-1, tokens.shape[-1]), None


def _follows(cache: Any, length: int) -> bool:
    """Whether a cache holds so many tokens; one that counts on its device is believed, since asking it would wait."""
    if not caches.is_filled(cache):
        return False
    held = caches.cached_tokens(cache)
    return not isinstance(held, int) or held == length
