"""capture_attention: a context in which the forwards of a model also give back the attention of chosen rows."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from carve_kernels import checks
from carve_kernels.backends import ROOMS
from carve_kernels.hf.attention import PATCHES, RECORDERS, attended_columns, place_of
from carve_kernels.hf.backbone import attention_modules, decoder_layers, image_token_positions, unwrap, wrappers
from carve_kernels.hf.decoding import end_tokens, join, leave
from carve_kernels.hf.record import OnLayer, Record
from carve_kernels.hf.rows import RowsSpec, check_rows, resolve_rows, template_suffix, tokenizer_of
from carve_kernels.maps import AttentionMaps
from carve_kernels.presets import layers_of
from carve_kernels.types import VisualLayout


def capture_attention(
    model: nn.Module,
    *,
    layers: str | int | Iterable[int] = "paper",
    rows: RowsSpec = "last",
    tokens: VisualLayout | torch.Tensor | Sequence[int] | None = None,
    processor: Any = None,
    max_steps: int = 64,
    on_layer: OnLayer | None = None,
    backend: str = "auto",
) -> CaptureSession:
    """A session in which forwards and `generate` of a model also capture where chosen rows look.

    Equals, for one prompt, `output_attentions=True` under eager attention, at any attention implementation and without
    the [S, S] matrices::

        with capture_attention(model, layers=[14]) as session:
            model.generate(**inputs)
        # session.maps.values[0, 0, t, 0] == outputs.attentions[t][14][0, :, -1, visual_tokens].mean(0)

    =========  ==========================================================================================================
    argument   meaning
    =========  ==========================================================================================================
    model      a transformers model with a text decoder; PEFT, torch.compile and DDP wrappers are looked through
    layers     numbers (negative ones count from the end), a range, one number, "paper" or "all"
    rows       "last": the prompt's last token, then every new token; k: the last k; a list of columns of input_ids;
               "question": mean of the tokens between the image and the end of the user's text; ("word", WORD): mean of
               the pieces of its last occurrence; ("text", TEXT): likewise. Rows but the last exist at step 0 only
    tokens     the visual tokens: None finds them in input_ids; a VisualLayout; columns [N] or [B, N], -1 is padding
    processor  processor or tokenizer; needed for ("word", ...) and ("text", ...), and to tell a question from the
               template behind it
    max_steps  forward passes that are kept of one generation; later ones run uncaptured
    on_layer   called inside the forward as on_layer(layer, step, Capture of [B, Q, N] and [B, Q]) after each layer
    backend    the room that captures
    =========  ==========================================================================================================

    `session.maps` is the AttentionMaps of the newest prefill and its steps; a new prefill starts anew. The vision tower
    is not touched, and on leaving, by an error or Ctrl-C too, the model is as before. Raises TypeError or ValueError at
    once for arguments that do not fit, and in the forward for a prompt that does not fit them, before it runs; beams,
    several return sequences and assisted decoding raise ValueError. Source: A[l, t] of CARVE, arXiv 2509.06461, section 3.
    """
    return CaptureSession(
        model,
        layers=layers,
        rows=rows,
        tokens=tokens,
        processor=processor,
        max_steps=max_steps,
        on_layer=on_layer,
        backend=backend,
    )


class CaptureSession:
    """What `capture_attention` returns; see there."""

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | int | Iterable[int],
        rows: RowsSpec,
        tokens: VisualLayout | torch.Tensor | Sequence[int] | None,
        processor: Any,
        max_steps: int,
        on_layer: OnLayer | None,
        backend: str,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a transformers model, got {checks.describe(model)}")
        self._outer, self._model = model, unwrap(model)
        depth = len(decoder_layers(model))
        self.layers = _layers(layers, depth)
        modules = attention_modules(model)
        for layer in self.layers:
            if layer not in modules:
                raise ValueError(
                    f"layers: layer {layer} has no softmax attention, expected layers among {sorted(modules)}"
                )
        self._modules = [modules[layer] for layer in self.layers]
        self._places = {
            (id(place), name): (place, name)
            for place, name in (place_of(module, layer) for module, layer in zip(self._modules, self.layers, strict=True))
        }
        self._tokenizer = None if processor is None else tokenizer_of(processor)
        self._rows = check_rows(rows, self._tokenizer)
        self._suffix = template_suffix(processor) if rows == "question" and processor is not None else 0
        self._tokens, self._layout = _check_tokens(tokens)
        self._max_steps = checks.integer("max_steps", max_steps, low=1)
        if on_layer is not None and not callable(on_layer):
            raise TypeError(f"on_layer: expected a function or None, got {checks.describe(on_layer)}")
        self._on_layer = on_layer
        self._backend: str = checks.choice("backend", backend, ("auto", *ROOMS))
        self._signature = inspect.signature(self._model.forward)
        self._stack: ExitStack | None = None
        self._record: Record | None = None
        self._ids: torch.Tensor | None = None
        self._attended: torch.Tensor | None = None
        self._depth = 0
        self._thread: int | None = None
        self.eos: tuple[int, ...] | None = None

    @property
    def maps(self) -> AttentionMaps:
        """The maps of the newest prefill and the steps behind it, copied out of the buffers."""
        if self._record is None:
            raise RuntimeError(
                "maps: expected a forward of the model inside the session, saw none; call the model (or its wrapper) that "
                "was given to capture_attention"
            )
        return self._record.result()

    def __enter__(self) -> CaptureSession:
        if self._stack is not None:
            raise RuntimeError("session: expected a new session, this one is open or was; call capture_attention again")
        self._stack = ExitStack()
        try:
            self._install(self._stack)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        if self._stack is not None:
            self._stack.close()

    def record(self, index: int, *call: Any) -> None:
        """Called by the attention of a captured layer."""
        if self._record is not None and self._depth:
            self._record.record(index, *call)

    def _install(self, stack: ExitStack) -> None:
        join(self._model, self)
        stack.callback(leave, self._model, self)
        for index, module in enumerate(self._modules):
            _push(stack, module, RECORDERS, (self, index))
        for place, name in self._places.values():
            PATCHES.enter(place, name)
            stack.callback(PATCHES.leave, place, name)
        for module in (*wrappers(self._outer), self._model):
            stack.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(self._after, always_call=True).remove)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Under a compiler the hook of the wrapper has run already; this one would break the graph.
        if not torch.compiler.is_compiling():
            self.begin(args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.end()

    def end(self) -> None:
        """After a forward of the model."""
        self._depth = max(0, self._depth - 1)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of the model; a wrapper and the model inside it count as one."""
        self._depth += 1
        if self._depth > 1:
            if self._thread != threading.get_ident():
                self._depth -= 1
                raise RuntimeError("model: two threads run it inside one session; give each its own model and session")
            return
        try:
            self._plan(args, kwargs)
        except BaseException:
            self._depth = 0
            raise

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell a prefill from a decode step, and prepare its record."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        source = ids if ids is not None else embeds
        if source is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds in the call of the model, got neither")
        length = source.shape[1]
        record = self._record
        cache = given.get("past_key_values")
        if record is not None and cache is not None and length == 1 and record.length > 0 and _filled(cache):
            self._same_thread()
            record.advance(ids, record.length + 1, 0)
            self._remember(ids)
            return
        past = 0 if cache is None else int(cache.get_seq_length())
        if record is not None and past == 0 and self._continues(ids):
            self._same_thread()
            record.advance(ids, length, length - 1)
            self._ids = ids.detach().cpu()  # type: ignore[union-attr]
            return
        self._prefill(ids, source, past, given.get("attention_mask"))

    def _prefill(
        self, ids: torch.Tensor | None, source: torch.Tensor, past: int, attention_mask: Any
    ) -> None:
        self._record, self._thread = None, threading.get_ident()
        batch, length = source.shape[:2]
        known = None if ids is None else ids.detach().cpu()
        if past:
            before = self._ids
            joined = known is not None and before is not None and before.shape == (batch, past)
            known = torch.cat([before, known], 1) if joined else None  # type: ignore[list-item]
        self._ids = known
        total = past + length
        attended = attended_columns(attention_mask, batch, length, total)
        tokens = self._visual_tokens(known, batch, total)
        rows = resolve_rows(self._rows, known, attended, tokens, self._tokenizer, self._suffix)
        if bool((rows.index < past).any()):
            raise ValueError(
                f"rows: expected rows of this forward, which starts at column {past} behind a cache, got "
                f"column {int(rows.index.min())}; use rows='last' for a chunked prefill"
            )
        self._record = Record(
            self.layers,
            rows,
            tokens,
            self._layout,
            device=source.device,
            past=past,
            length=length,
            max_steps=self._max_steps,
            eos=self._end_tokens(),
            on_layer=self._on_layer,
            backend=self._backend,
        )

    def _visual_tokens(self, ids: torch.Tensor | None, batch: int, length: int) -> torch.Tensor:
        if self._tokens is None:
            if ids is None:
                raise ValueError(
                    "tokens: expected the columns of the visual tokens, since the model was given no input_ids of the "
                    "whole prompt; got None"
                )
            found = image_token_positions(self._model, ids)
            if not any(len(row) for row in found):
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

    def _continues(self, ids: torch.Tensor | None) -> bool:
        """Whether a forward without a cache repeats the last one with one more token: a decode step all the same."""
        before = self._ids
        if ids is None or before is None or ids.shape != (before.shape[0], before.shape[1] + 1):
            return False
        return bool(torch.equal(ids[:, :-1].detach().cpu(), before))

    def _remember(self, ids: torch.Tensor | None) -> None:
        if ids is None:
            self._ids = None
        elif self._ids is not None:
            self._ids = torch.cat([self._ids, ids.detach().cpu()], 1)

    def _end_tokens(self) -> tuple[int, ...]:
        if self.eos is not None:
            return self.eos
        return end_tokens(getattr(getattr(self._model, "generation_config", None), "eos_token_id", None))

    def _same_thread(self) -> None:
        if self._thread != threading.get_ident():
            raise RuntimeError(
                "model: a step of another thread's generation came inside this session; give each thread its own model"
            )


def _layers(layers: str | int | Iterable[int], depth: int) -> tuple[int, ...]:
    """The layers argument as ascending numbers: the order in which a forward meets them."""
    return tuple(range(depth)) if layers == "all" else tuple(sorted(layers_of(layers, depth)))


def _push(stack: ExitStack, module: nn.Module, name: str, entry: tuple[Any, Any]) -> None:
    """Add an entry to a tuple on a module, and take it away again when the stack closes."""

    def pop() -> None:
        left = tuple(other for other in getattr(module, name, ()) if other is not entry)
        if left:
            setattr(module, name, left)
        elif hasattr(module, name):
            delattr(module, name)

    stack.callback(pop)
    setattr(module, name, (*getattr(module, name, ()), entry))


def _check_tokens(
    tokens: VisualLayout | torch.Tensor | Sequence[int] | None,
) -> tuple[torch.Tensor | None, VisualLayout | None]:
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


def _filled(cache: Any) -> bool:
    layers = getattr(cache, "layers", None)
    return bool(layers) and any(getattr(layer, "is_initialized", True) for layer in layers)
