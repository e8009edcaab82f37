"""Before each forward: a prefill starts a record, a decode step continues that of its cache, all else is an error."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn

from carve_kernels import checks
from carve_kernels.hf import caches, names
from carve_kernels.hf.attention_patch import attended_columns, check_call
from carve_kernels.hf.model import decoder_layers, image_token_positions
from carve_kernels.hf.query_rows import RowsSpec, resolve_rows
from carve_kernels.hf.session.cache_tracker import Caches, Followed, Whole
from carve_kernels.hf.session.generate_guard import Decoding, end_tokens
from carve_kernels.hf.session.recording import OnLayer, Record
from carve_kernels.types import VisualLayout

_LAST_COLUMN = 2**31 - 1


class _UnderWay(NamedTuple):
    """A forward's prompt, new ids, the cache that it was given, and how many tokens are seen when it ends."""

    followed: Followed
    ids: torch.Tensor | None
    cache: Any
    total: int


class Planner:
    """Follows the forwards of one model: which prompt each belongs to, and so which record."""

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
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
        self._model, self._modules, self._layers, self._device, self._rows = model, modules, layers, device, rows
        self._processor = processor
        self._tokens, self._layout = check_tokens(tokens)
        self._max_steps, self._on_layer, self._backend = max_steps, on_layer, backend
        self._signature = inspect.signature(model.forward)
        self._caches = Caches()
        self._noting = [module for module, _ in names.position_notes(model)]
        # The last forward that read a whole prompt, and the prompt and cache of the one under way.
        self._whole: Whole | None = None
        self._under_way = _UnderWay(Followed(), None, None, 0)
        # Whether hooks may write to keys and masks where no counter tells.
        self._careful = False
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
        before, self.record = self.record, None
        try:
            record = self._plan(given, before)
        except RuntimeError:
            # It is about who called, and not about a prompt.
            self.record = before
            raise
        if record is not None:
            if record.step == 0:
                self._careful = self._may_write()
            record.together = self._on_layer is None and caches.keeps_cache(self._model, given) and not self._careful
        self.record = record
        self._begun = self.decoding
        self._inside, self.running = [source], True

    def end(self, output: Any) -> None:
        """After a forward; `output` is None if it failed."""
        if self._inside:
            self._inside.pop()
        self.running = bool(self._inside)
        followed, ids, cache, total = self._under_way
        if output is None or followed.length == total:
            return
        found = caches.cache_in(output)
        cache = cache if found is None else found
        if cache is not None:
            self._caches.bind(cache, followed)
        followed.note(ids, total, cache, self._modules, names.noted_positions(self._noting))

    def _may_write(self) -> bool:
        """Whether a hook may write to what was given to an attention, and no counter tells."""
        if not torch.is_inference_mode_enabled():
            return False
        return any(
            part._forward_hooks or part._forward_pre_hooks
            for layer in decoder_layers(self._model)
            for part in layer.modules()
        )

    def _plan(self, given: dict[str, Any], before: Record | None) -> Record | None:
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        source = ids if ids is not None else embeds
        if source is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds in the call of the model, got neither")
        length = source.shape[1]
        cache = caches.cache_of(given)
        followed = None if cache is None else self._caches.get(cache)
        if followed is not None:
            # A step that is refused takes nothing from what was there.
            self.record = before
        told = {name: value for name, value in given.items() if value is not cache}
        check_call(self._model, told, length)
        repeats = self._whole is not None and self._whole.repeated(ids, told)
        behind = self.decoding is not None and self._begun is self.decoding
        if behind and cache is None and (ids is not None or length == 1) and not repeats:
            raise self._foreign(f"{length} token(s) come without a known cache")
        if behind and cache is not None and followed is None:
            raise self._foreign(f"{length} token(s) come with another cache")
        past = self._past(cache, followed, length)
        if followed is not None and past and (given.get("position_ids") is None or self.decoding is not None):
            self._check_positions(followed)
        if followed is not None and followed.record is not None and length == 1 and self._is_step(followed, past):
            self._whole = None
            return self._step(followed, followed.record, ids, cache, past + 1, 0)
        whole = self._whole
        if repeats and past == 0 and whole is not None and whole.followed.record is not None:
            # A cache that holds the shorter prompt goes on by itself from there.
            followed, repeated = Followed(), whole.followed.record
            followed.record, followed.prompt, whole.followed.record = repeated, whole.followed.prompt, None
            self._whole = Whole(followed, told, self.decoding is not None)
            return self._step(followed, repeated, ids, cache, length, length - 1)
        if followed is None or past == 0:
            followed = Followed()
        record = self._prefill(followed, ids, source, past, cache, given)
        self._whole = Whole(followed, told, self.decoding is not None) if past == 0 else None
        self._under_way = _UnderWay(followed, ids, cache, past + length)
        return record

    def _step(
        self, followed: Followed, record: Record, ids: torch.Tensor | None, cache: Any, total: int, column: int
    ) -> Record:
        """A decode step after which so many tokens were seen; row `column` of the query is captured."""
        self._own_thread()
        if total <= record.length:
            record.rewind(total - 1)
        if record.step == 0:
            record.reaches, record.shared = self._reaches(cache), caches.reaches_in(cache)
        record.advance(ids, total, column)
        self._under_way = _UnderWay(followed, ids, cache, total)
        return record

    def _check_positions(self, followed: Followed) -> None:
        """Whether a model that keeps notes of a prompt's positions, as Qwen-VL, has those of this one."""
        if not followed.has_positions(names.noted_positions(self._noting)):
            raise ValueError(
                "position_ids: expected those of this prompt, since the model has noted the positions of another one "
                "since and would go on from there; give them in a forward, or run the prompt anew"
            )

    def _foreign(self, what: str) -> Exception:
        """The error for a forward inside generate that is not generate's own, or that hides its cache."""
        if self.decoding is not None and self.decoding.beside is not None:
            return ValueError(
                f"{self.decoding.beside}: expected none that calls the model inside capture_attention, since "
                f"a forward of its own is no step of the answer; behind the first forward of generate, {what}"
            )
        return names.changed(f"behind the first forward of generate, {what}")

    def _past(self, cache: Any, followed: Followed | None, length: int) -> int:
        """How many tokens a cache holds; one that is known is checked, and followed to where it was cropped."""
        held = caches.cached_tokens(cache)
        if followed is None:
            return int(held)
        # To ask a cache that counts on its device would wait for the device at each step: the record is told later.
        if length == 1 and isinstance(held, torch.Tensor) and held.device.type != "cpu":
            past = followed.length
            if followed.record is not None:
                followed.record.doubts["cache"].logical_or_(held != past)
        else:
            past = int(held)
        if past > 0:
            followed.follow(cache, self._modules, self._layers, past)
            written = followed.was_written(cache, self._modules[0])
            if written is not None and written.device.type != "cpu" and followed.record is not None:
                followed.record.doubts["cache"].logical_or_(written)
            elif written is not None and bool(written):
                raise ValueError(
                    "cache: expected it as the last forward left it, but other keys were written to it since; run the "
                    "prompt anew"
                )
        return past

    def _is_step(self, followed: Followed, past: int) -> bool:
        """Whether one token behind a cache is a decode step: the rest of a prompt may be one token as well."""
        prompt = 0 if self.decoding is None else self.decoding.length or 0
        return past >= max(prompt, followed.prompt)

    def _reaches(self, cache: Any) -> tuple[caches.Reach | None, ...]:
        return tuple(caches.reach(cache, module) for module in self._modules)

    def _prefill(
        self,
        followed: Followed,
        ids: torch.Tensor | None,
        source: torch.Tensor,
        past: int,
        cache: Any,
        given: Mapping[str, Any],
    ) -> Record | None:
        self._own_thread()
        self.record, self._thread = None, threading.current_thread()
        batch, length = source.shape[:2]
        total = past + length
        known = self._known(followed, ids, past, total)
        mask = given.get("attention_mask")
        if self.decoding is not None and self.decoding.mask is not None and self.decoding.mask.shape[1] >= total:
            mask = self.decoding.mask[:, :total]
        attended = attended_columns(mask, batch, length, total)
        tokens = self._visual_tokens(known, batch, total)
        if tokens is None:
            followed.record, followed.prompt = None, total
            return None
        rows = resolve_rows(self._rows, known, attended, tokens, self._processor)
        if bool((rows.columns < past).any()):
            raise ValueError(
                f"rows: expected rows of this forward, which starts at column {past} behind a cache, got "
                f"column {int(rows.columns.min())}; use rows='last' for a chunked prefill"
            )
        followed.record = Record(
            self._layers,
            rows,
            tokens,
            self._layout,
            reaches=self._reaches(cache),
            shared=caches.reaches_in(cache),
            device=self._device if self._device is not None else source.device,
            past=past,
            length=length,
            kept=names.rows_kept(self._model, given),
            max_steps=self._max_steps,
            eos=self._end_tokens(),
            on_layer=self._on_layer,
            backend=self._backend,
        )
        followed.prompt = total
        return followed.record

    def _known(self, followed: Followed, ids: torch.Tensor | None, past: int, total: int) -> torch.Tensor | None:
        """The ids of the whole prompt on the CPU, by what went through the cache or what generate was given."""
        told = None if self.decoding is None or self.decoding.ids is None else self.decoding.ids[:, :total].cpu()
        if past and followed.length == 0:
            followed.ids.append(None if told is None or told.shape[1] < total else told[:, :past])
        known = followed.known(ids, total)
        if known is not None and told is not None and told.shape == known.shape and not torch.equal(known, told):
            if self.decoding is not None and self.decoding.beside is not None:
                raise self._foreign("other tokens come than it was given")
            raise ValueError(
                "input_ids: expected the tokens that the cache was filled with, followed by new ones, but they differ "
                f"from column {int((known != told).any(0).nonzero()[0])} on; run the prompt anew"
            )
        return known

    def _visual_tokens(self, ids: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
        """The columns of the visual tokens, int32 [B, N]; None in a chunk of a prompt before its first image."""
        if self._tokens is None:
            if ids is None:
                raise ValueError(
                    "tokens: expected the columns of the visual tokens, since the whole prompt did not go through "
                    "this session as input_ids (a cache filled elsewhere, a copy of one, or inputs_embeds); got None"
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
            if self.decoding is not None and self.decoding.chunked:
                return None
            raise ValueError(
                f"tokens: expected columns below the prompt's {length} tokens, got {int(tokens.max())}; was the prompt "
                "truncated?"
            )
        return tokens

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
        columns = tokens.tokens()
        if not bool((columns >= 0).any()):
            raise ValueError("tokens: expected a VisualLayout with tokens, got one without any")
        return columns, tokens
    tokens = torch.as_tensor(tokens) if isinstance(tokens, numpy.ndarray) else tokens
    if not isinstance(tokens, torch.Tensor):
        if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence):
            raise TypeError(f"tokens: expected a VisualLayout, columns or None, got {checks.describe(tokens)}")
        numbers = [checks.integer(f"tokens[{place}]", checks.plain(token)) for place, token in enumerate(tokens)]
        if max((abs(number) for number in numbers), default=0) > _LAST_COLUMN:
            raise ValueError(f"tokens: expected columns of a prompt, got {checks.describe(numbers)}")
        tokens = torch.tensor(numbers)
    if tokens.ndim not in (1, 2) or tokens.is_floating_point() or tokens.dtype == torch.bool or not tokens.numel():
        raise ValueError(f"tokens: expected at least one column, int [N] or [B, N], got {checks.describe(tokens)}")
    columns = tokens.detach().cpu().to(torch.int64).reshape(-1, tokens.shape[-1])
    if int(columns.min()) < -1 or int(columns.max()) > _LAST_COLUMN or not bool((columns >= 0).any()):
        raise ValueError(
            f"tokens: expected columns from 0 on, and -1 for padding, got {checks.describe(columns.tolist())}"
        )
    return columns.to(torch.int32), None
