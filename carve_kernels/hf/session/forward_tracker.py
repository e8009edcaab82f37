"""Before each forward: a prefill starts a record, a decode step continues that of its cache, the rest is an error."""

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
from carve_kernels.hf.attention_patch import CaptureCalls, LayerSizes
from carve_kernels.hf.fused_attention import log_unfused
from carve_kernels.hf.head_shares import head_shares
from carve_kernels.hf.model import (
    decoder_layers,
    devices_of,
    dtype_of,
    image_token_positions,
    is_capturing,
    layer_window,
    text_backbone,
)
from carve_kernels.hf.query_rows import Rows, resolve_rows
from carve_kernels.hf.session.attention_masks import attended_columns, check_call, is_prepared
from carve_kernels.hf.session.cache_tracker import CacheTable, CompleteForward, TrackedPrompt
from carve_kernels.hf.session.device_state import DeviceState
from carve_kernels.hf.session.graphs import check_model
from carve_kernels.hf.session.hidden_tokens import LayerWindows
from carve_kernels.hf.session.recording import CONDITIONS, Record, SessionOptions
from carve_kernels.hf.session.token_drops import TokenDrops
from carve_kernels.types import VisualLayout

_LAST_COLUMN = 2**31 - 1


class _Forward(NamedTuple):
    """The current forward: its prompt, new ids and cache, the tokens after it; whether it only goes into a graph."""

    prompt: TrackedPrompt
    ids: torch.Tensor | None
    cache: Any
    total: int
    in_graph: bool = False


class GenerateCall(NamedTuple):
    """The arguments of a running `generate` that matter for its forwards.

    `eos` are the end tokens, `chunked` whether the prompt is prefilled in chunks, `ids` the whole prompt if it is given
    as ids, `length` the number of its tokens, `mask` [B, length or more] its padding mask, and `callback` the name of
    an argument that may call the model itself.
    """

    eos: tuple[int, ...]
    chunked: bool
    ids: torch.Tensor | None = None
    length: int | None = None
    mask: torch.Tensor | None = None
    callback: str | None = None


class ForwardTracker:
    """Follows the forwards of one model: to which prompt, and so to which record, each belongs."""

    def __init__(self, model: nn.Module, modules: list[nn.Module], options: SessionOptions) -> None:
        self.record: Record | None = None
        self.generation: GenerateCall | None = None
        self.drops = TokenDrops(model, [self])
        self._model, self._modules, self._options = model, modules, options
        self.grad = options.grad
        # None if it is known only when the layers run.
        self._device = next(iter(set().union(*map(devices_of, modules))), None)
        self._shares = head_shares(model, modules)
        self._signature = inspect.signature(model.forward)
        self._windows = LayerWindows([layer_window(model, layer) for layer in options.layers], modules)
        self._prompts = CacheTable()
        self._position_modules = [module for module, _ in names.position_modules(model)]
        self._complete: CompleteForward | None = None
        self._forward = _Forward(TrackedPrompt(), None, None, 0)
        # Whether hooks may write to keys and masks that have no version counter.
        self._unsafe = False
        # The generate whose first forward has begun.
        self._begun: GenerateCall | None = None
        self._sources: list[object] = []
        # The tensors that CUDA graphs write to, and how many tokens they counted when another prompt followed.
        self._graphs: dict[DeviceState, int | None] = {}
        # Whether the model's forward is running; submodules that are called directly are not recorded.
        self.running = False
        self._thread: threading.Thread | None = None

    def begin(self, source: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward; a wrapper and the model inside it count once. Raises before the model has run."""
        # Under torch.compile the wrapper's hooks have run already; the inner ones would break the graph.
        if torch.compiler.is_compiling():
            return
        if self._sources and self._thread is not threading.current_thread():
            raise RuntimeError("model: two threads run it inside one session, give each its own model and session")
        # A forward interrupted by Ctrl-C never ends: the same source begins again.
        if self._sources and self._sources[0] is not source:
            self._sources.append(source)
            return
        self._sources, self.running = [], False
        given = names.arguments(self._signature, args, kwargs)
        before, self.record = self.record, None
        try:
            record = self._record_for(given, before)
        except RuntimeError:
            # The call came from the wrong thread; the prompt is unaffected.
            self.record = before
            raise
        if record is not None:
            if record.step == 0:
                self._unsafe = self._has_unsafe_hooks()
            waits = record.on_layer is None and record.graphs is None
            record.batching = waits and caches.keeps_cache(self._model, given) and not self._unsafe
        self.record = record
        self._leave_graphs()
        self._begun = self.generation
        self._sources, self.running = [source], True

    def end(self, _source: object, _args: tuple[Any, ...], output: Any) -> None:
        """After a forward; `output` is None if it failed."""
        if torch.compiler.is_compiling():
            return
        if self._sources:
            self._sources.pop()
        self.running = bool(self._sources)
        if not self.running:
            self.drops.end()
        prompt, ids, cache, total, in_graph = self._forward
        if output is None or prompt.length == total:
            return
        if in_graph:
            prompt.note_keys(cache, self._modules)
            return
        returned = caches.cache_in(output)
        cache = cache if returned is None else returned
        if cache is not None:
            self._prompts.bind(cache, prompt)
        prompt.update(ids, total, cache, self._modules, names.stored_positions(self._position_modules))

    def check_replays(self) -> None:
        """Raise ValueError if the graph of another prompt than the last one was replayed since that began."""
        for state, total in self._graphs.items():
            if total is not None and state.read() != total:
                raise ValueError(
                    "maps: expected replays of CUDA graphs of the last prompt only, but one that was captured with "
                    "another prompt was replayed since; read the maps before the next prompt, and capture the graph of "
                    "each prompt"
                )

    def _leave_graphs(self) -> None:
        """Note what the graphs of all prompts but the current one have counted."""
        current = None if self.record is None else self.record.state
        for state, total in self._graphs.items():
            if state is current:
                self._graphs[state] = None
            elif total is None:
                self._graphs[state] = state.total_so_far if is_capturing(state.device) else state.read()

    def _has_unsafe_hooks(self) -> bool:
        """Whether a hook may write to the inputs of an attention without a version counter noticing."""
        modules = (module for layer in decoder_layers(self._model) for module in layer.modules())
        hooked = (module._forward_hooks or module._forward_pre_hooks for module in modules)
        return torch.is_inference_mode_enabled() and any(hooked)

    def _record_for(self, given: dict[str, Any], before: Record | None) -> Record | None:
        """The record of a forward with these arguments; None for a chunk of a prompt before its first image."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        source = ids if ids is not None else embeds
        if source is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds in the call of the model, got neither")
        length = source.shape[1]
        cache = caches.cache_of(given)
        prompt = None if cache is None else self._prompts.get(cache)
        if prompt is not None:
            # A refused step leaves the maps of the prompt intact.
            self.record = before
            if not is_capturing(source.device):
                prompt.synchronise()
        arguments = {name: value for name, value in given.items() if value is not cache}
        check_call(self._model, arguments, length)
        self._windows.own_masks |= self.generation is None and is_prepared(given.get("attention_mask"))
        complete, generating = self._complete, self.generation is not None
        repeated = complete is not None and complete.is_repeated(ids, arguments)
        if generating and self._begun is self.generation:
            if cache is None and (ids is not None or length == 1) and not repeated:
                raise self._unexpected(f"{length} token(s) arrive without a known cache")
            if cache is not None and prompt is None:
                raise self._unexpected(f"{length} token(s) arrive with another cache")
        past = self._past(cache, prompt, length)
        if prompt is not None and past and (given.get("position_ids") is None or generating):
            self._check_positions(prompt)
        if prompt is not None and prompt.record is not None and length == 1 and self._is_step(prompt, past):
            self._complete = None
            return self._step(prompt, prompt.record, ids, cache, past + 1, 0)
        if repeated and past == 0 and complete is not None and complete.prompt.record is not None:
            # A cache that holds the shorter prompt may be continued separately.
            prompt, record = TrackedPrompt(), complete.prompt.record
            prompt.record, prompt.prompt, complete.prompt.record = record, complete.prompt.prompt, None
            self._complete = CompleteForward(prompt, arguments, generating)
            return self._step(prompt, record, ids, cache, length, length - 1)
        replaced = prompt if past == 0 else None
        if prompt is None or past == 0:
            prompt = TrackedPrompt()
        started = self._prefill(prompt, source, past, cache, given, replaced)
        self._complete = CompleteForward(prompt, arguments, generating) if past == 0 else None
        self._forward = _Forward(prompt, ids, cache, past + length)
        return started

    def _step(
        self, prompt: TrackedPrompt, record: Record, ids: torch.Tensor | None, cache: Any, total: int, row: int
    ) -> Record:
        """A decode step after which there are `total` tokens; `row` of its query is captured."""
        if self.grad:
            raise ValueError(
                "grad: expected whole prompts, got a decode step; run the prompt and its answer as one prompt, with "
                "the captured rows as rows"
            )
        self._check_thread()
        if is_capturing(record.state.device):
            return self._step_in_graph(prompt, record, ids, cache)
        if total <= record.length:
            record.rewind(total - 1)
        if record.step == 0:
            record.reaches = caches.reaches(cache, self._modules)
        record.advance(ids, total, row)
        self._forward = _Forward(prompt, ids, cache, total)
        return record

    def _step_in_graph(self, prompt: TrackedPrompt, record: Record, ids: torch.Tensor | None, cache: Any) -> Record:
        """A decode step that goes into a CUDA graph: each replay is the next step, of which Python sees nothing."""
        if record.step == 0:
            record.reaches = caches.reaches(cache, self._modules)
        fixed = caches.most_keys(record.reaches) is not None and not caches.has_windows(record.reaches)
        if not fixed or not isinstance(caches.cached_tokens(cache), torch.Tensor):
            raise ValueError(
                "cache: expected a static cache without sliding windows in a CUDA graph, whose keys stay in one buffer "
                f"and are counted on the device, got a {type(cache).__name__} with others; use StaticCache, or "
                "torch.compile(mode='reduce-overhead')"
            )
        if record.on_layer is not None:
            raise ValueError("on_layer: expected None in a CUDA graph, whose replays call no function")
        if record.state.total_so_far != prompt.length:
            raise ValueError("cache: was cropped right before a CUDA graph was captured; run a step before it")
        if record.state not in self._graphs:
            # A graph holds addresses, not references.
            caches.keep_with(cache, record.state)
            self._graphs[record.state] = None
        record.advance_in_graph(ids)
        self._forward = _Forward(prompt, ids, cache, -1, in_graph=True)
        return record

    def _check_positions(self, prompt: TrackedPrompt) -> None:
        """Check the position offsets that some models, such as Qwen-VL, store during a prefill."""
        if not prompt.has_positions(names.stored_positions(self._position_modules)):
            raise ValueError(
                "position_ids: expected the positions of this prompt, but the model has stored those of another prompt "
                "since and would continue from them; pass position_ids, or run the prompt again"
            )

    def _unexpected(self, reason: str) -> Exception:
        """The error for a forward inside generate that is not generate's own, or that hides its cache."""
        if self.generation is not None and self.generation.callback is not None:
            return ValueError(
                f"{self.generation.callback}: expected a function that does not call the model inside "
                f"capture_attention, since its forwards are not decode steps; after the first forward of generate, "
                f"{reason}"
            )
        return names.changed(f"after the first forward of generate, {reason}")

    def _past(self, cache: Any, prompt: TrackedPrompt | None, length: int) -> int:
        """The number of tokens in a cache; the cache of a known prompt is checked, and may have been cropped."""
        count = caches.cached_tokens(cache)
        if prompt is None:
            return int(count)
        # Reading a count on the device would synchronise at each step: the record defers the check.
        capturing = isinstance(count, torch.Tensor) and is_capturing(count.device)
        if length == 1 and isinstance(count, torch.Tensor) and (capturing or count.device.type != "cpu"):
            past = prompt.length
            if prompt.record is not None:
                expected = prompt.record.state.total if capturing else past
                prompt.record.state.deferred["cache"].logical_or_(count != expected)
        else:
            past = int(count)
        if past > 0:
            prompt.check_cache(cache, self._modules, self._options.layers, past, length)
            written = prompt.was_written(cache, self._modules[0])
            if written is not None and written.device.type != "cpu" and prompt.record is not None:
                prompt.record.state.deferred["cache"].logical_or_(written)
            elif written is not None and bool(written):
                raise ValueError(
                    "cache: expected it as the last forward left it, but its keys have been written to since; run the "
                    "prompt again"
                )
        return past

    def _is_step(self, prompt: TrackedPrompt, past: int) -> bool:
        """Whether one token after a cache is a decode step: the last chunk of a prompt may be one token, too."""
        length = 0 if self.generation is None else self.generation.length or 0
        return past >= max(length, prompt.prompt)

    def _prefill(
        self,
        prompt: TrackedPrompt,
        source: torch.Tensor,
        past: int,
        cache: Any,
        given: Mapping[str, Any],
        replaced: TrackedPrompt | None,
    ) -> Record | None:
        """Begin a record; `replaced` is the prompt that the cache held before it was reset."""
        self._check_thread()
        if is_capturing(source.device):
            raise ValueError(
                f"model: expected one token after a cache of this session in a CUDA graph, got {source.shape[1]}; run "
                "the prompt before the graph is captured"
            )
        if self._options.heads == "each" and self._shares is not None:
            raise ValueError("heads: expected 'mean' for a model whose heads are divided among processes, got 'each'")
        if self.grad:
            check_model(self._model, divided=self._shares is not None)
        self.record, self._thread = None, threading.current_thread()
        batch, length = source.shape[:2]
        total = past + length
        all_ids = self._all_ids(prompt, given.get("input_ids"), past, total)
        mask = given.get("attention_mask")
        if self.generation is not None and self.generation.mask is not None and self.generation.mask.shape[1] >= total:
            mask = self.generation.mask[:, :total]
        attended = attended_columns(mask, batch, length, total)
        tokens = self._visual_tokens(all_ids, batch, total)
        if tokens is None:
            prompt.record, prompt.prompt = None, total
            return None
        rows = resolve_rows(self._options.rows, all_ids, attended, tokens, self._options.processor)
        if bool((rows.columns < past).any()):
            raise ValueError(
                f"rows: expected rows of this forward, which starts at column {past} after a cache, got "
                f"column {int(rows.columns.min())}; use rows='last' for a chunked prefill"
            )
        reaches = caches.reaches(cache, self._modules)
        device = self._device if self._device is not None else source.device
        prompt.record = Record(
            self._options,
            rows,
            tokens,
            state=self._state(rows, tokens.to(device), total, reaches, replaced),
            reaches=reaches,
            past=past,
            length=length,
            rows_kept=names.rows_kept(self._model, given),
            eos=self._end_tokens(),
            windows=self._windows,
            attended=attended,
            drops=self.drops,
            shares=self._shares,
        )
        prompt.prompt = total
        return prompt.record

    def _state(
        self,
        rows: Rows,
        tokens: torch.Tensor,
        total: int,
        reaches: list[tuple[caches.Reach | None, ...]],
        replaced: TrackedPrompt | None,
    ) -> DeviceState:
        """The tensors of a new record: those of the prompt that it replaces, if they fit, for graphs that hold them."""
        options, (batch, captured) = self._options, rows.columns.shape
        later = options.max_steps - 1 if rows.last else 0
        capacity = caches.most_keys(reaches)
        # No graph holds the buffers beside a cache that grows: they grow, too.
        steps = 0 if capacity is None else later if caches.has_windows(reaches) else min(later, capacity)
        before = None if replaced is None else replaced.record
        if replaced is not None and before is not None and before.state.fits(tokens, captured, steps):
            replaced.record = None
            return before.state
        calls = CaptureCalls(options.backend, tokens.device, len(options.layers))
        dtype, keys = dtype_of(self._modules[0]), max(total + later, capacity or 0)
        if dtype is not None:
            heads = names.heads_of(text_backbone(self._model).config)
            for count in (captured, 1):
                sizes = LayerSizes(batch, *heads[:2], count, keys, heads[2], tokens.shape[1])
                calls.reserve(dtype, sizes)
            if options.fused and isinstance(reason := calls.reserve_attention(dtype, sizes, heads[2]), str):
                log_unfused(reason)
        state = DeviceState(calls, tokens, len(options.layers), captured, CONDITIONS)
        if steps:
            state.grow(steps)
        if steps and self._windows.any:
            state.follow_hidden()
        return state

    def _all_ids(self, prompt: TrackedPrompt, ids: torch.Tensor | None, past: int, total: int) -> torch.Tensor | None:
        """The ids of the whole prompt on the CPU, from what the cache has read or from generate's arguments."""
        generation = self.generation
        expected = None if generation is None or generation.ids is None else generation.ids[:, :total].cpu()
        if past and prompt.length == 0:
            prompt.ids.append(None if expected is None or expected.shape[1] < total else expected[:, :past])
        all_ids = prompt.all_ids(ids, total)
        if all_ids is None or expected is None or expected.shape != all_ids.shape or torch.equal(all_ids, expected):
            return all_ids
        if generation is not None and generation.callback is not None:
            raise self._unexpected("the tokens are not those of its prompt")
        raise ValueError(
            "input_ids: expected the tokens in the cache, followed by new ones, but they differ from column "
            f"{int((all_ids != expected).any(0).nonzero()[0])} on; run the prompt again"
        )

    def _visual_tokens(self, ids: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
        """The columns of the visual tokens, int32 [B, N]; None in a chunk of a prompt before its first image."""
        chunked = self.generation is not None and self.generation.chunked
        columns = self._options.tokens
        if columns is None:
            if ids is None:
                raise ValueError(
                    "tokens: expected the columns of the visual tokens, since this session has not seen the whole "
                    "prompt as input_ids (a cache filled elsewhere, a copy of one, or inputs_embeds); got None"
                )
            positions = image_token_positions(self._model, ids)
            if not any(len(row) for row in positions):
                if chunked:
                    return None
                if length == 1:
                    raise ValueError(
                        "input_ids: expected a prompt with image tokens, or one token after a cache "
                        f"({caches.cache_names()}), got one token without a cache"
                    )
                raise ValueError("input_ids: expected image tokens in the prompt, got none; was the image left out?")
            width = max(len(row) for row in positions)
            return torch.stack([nn.functional.pad(row, (0, width - len(row)), value=-1) for row in positions])
        tokens = columns.expand(batch, -1) if columns.shape[0] == 1 else columns
        if tokens.shape[0] != batch:
            raise ValueError(f"tokens: expected 1 or {batch} rows as the batch, got {checks.describe(columns)}")
        if tokens.numel() and int(tokens.max()) >= length:
            if chunked:
                return None
            raise ValueError(
                f"tokens: expected columns below the prompt's {length} tokens, got {int(tokens.max())}; was the prompt "
                "truncated?"
            )
        return tokens

    def _end_tokens(self) -> tuple[int, ...]:
        if self.generation is not None:
            return self.generation.eos
        return end_tokens(getattr(getattr(self._model, "generation_config", None), "eos_token_id", None))

    def _check_thread(self) -> None:
        """A session follows one thread; another may take over after that has ended, as streamers' workers do."""
        if self._thread not in (None, threading.current_thread()) and self._thread.is_alive():
            raise RuntimeError(
                f"model: {threading.current_thread().name} runs it inside a session that captures another thread, "
                f"{self._thread.name}; give each thread its own model and session"
            )


def check_tokens(
    tokens: VisualLayout | torch.Tensor | Sequence[int] | None,
) -> tuple[torch.Tensor | None, VisualLayout | None]:
    """The tokens argument as int32 [1 or B, N], and its layout; (None, None) if each prompt is searched for them."""
    if tokens is None:
        return None, None
    if isinstance(tokens, VisualLayout):
        columns = tokens.tokens()
        if not bool((columns >= 0).any()):
            raise ValueError("tokens: expected a VisualLayout with tokens, got one without tokens")
        return columns, tokens
    if isinstance(tokens, numpy.ndarray) and tokens.dtype.kind in "biuf":
        tokens = torch.as_tensor(tokens)
    if not isinstance(tokens, torch.Tensor):
        if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence):
            raise TypeError(f"tokens: expected a VisualLayout, columns or None, got {checks.describe(tokens)}")
        numbers = [checks.integer(f"tokens[{index}]", checks.plain(token)) for index, token in enumerate(tokens)]
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


def end_tokens(ends: Any) -> tuple[int, ...]:
    """An eos_token_id of a generation config as a tuple of ids."""
    if ends is None:
        return ()
    if hasattr(ends, "tolist"):
        ends = ends.tolist()
    return tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)
