"""capture_attention: a context in which the forwards of a model also capture the attention of selected rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from carve_kernels import checks
from carve_kernels.backends import BACKENDS, why_not
from carve_kernels.hf import names
from carve_kernels.hf.attention_patch import RECORDERS, patched
from carve_kernels.hf.model import (
    attention_modules,
    check_decoder,
    decoder_layers,
    devices_of,
    dtype_of,
    text_backbone,
    unwrap,
    wrapped_models,
)
from carve_kernels.hf.query_rows import check_rows, tokenizer_of
from carve_kernels.hf.session import contract
from carve_kernels.hf.session.forward_tracker import ForwardTracker, check_tokens
from carve_kernels.hf.session.generate_guard import guarded
from carve_kernels.hf.session.merging import merge_layers
from carve_kernels.hf.session.recording import OnLayer, SessionOptions
from carve_kernels.maps import AttentionMaps
from carve_kernels.ops.attention_operator import attention_operator
from carve_kernels.presets import layers_of
from carve_kernels.types import HeadsSpec, RowsSpec, VisualLayout


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
    fused: bool = False,
    grad: bool = False,
    heads: HeadsSpec = "mean",
) -> CaptureSession:
    """A session in which forwards and `generate` of a model also capture the attention of selected rows.

    Equals, for one prompt, `output_attentions=True` under eager attention, for any attention implementation and without
    the [S, S] matrices::

        with capture_attention(model, layers=[14]) as session:
            model.generate(**inputs)
        # session.maps.values[0, 0, t, 0] == outputs.attentions[t][14][0, :, -1, visual_tokens].mean(0)

    =========  =========================================================================================================
    argument   meaning
    =========  =========================================================================================================
    model      a transformers model with a text decoder; PEFT, torch.compile and DDP wrappers are unwrapped
    layers     numbers (negative ones count from the end), a range, one number, or "paper", "release" or "all" of those
               that have softmax attention
    rows       "last": the prompt's last token, then every new token; k: the last k; a list of columns of input_ids;
               "question": mean over the user's last text after the image; ("word", WORD): mean over the tokens of its
               last occurrence after the image, in the user's text if it is there, else in the template;
               ("text", TEXT): the same for a text. Rows other than the last exist at step 0 only. For a batch also a
               choice for each prompt: ("word", [WORD, WORD]), [("word", WORD), "question"], [[40, 41], [38, 39]]
    tokens     the visual tokens: None finds them in input_ids; a VisualLayout; columns [N] or [B, N], -1 is padding
    processor  processor or tokenizer; needed for ("word", ...) and ("text", ...), and to separate a question from the
               chat template
    max_steps  the number of forward passes captured of one generation (1: of the prompt); later ones are not, with a
               warning in the log if there are some of decode steps
    on_layer   called inside the forward as on_layer(layer, step, Capture of [B, Q, N] and [B, Q]) after each layer's
               attention. At step 0 it may return the columns of the visual tokens to keep, [n] or [B, n] (-1: none):
               then the layers behind process, and cache, these and the text alone
    backend    the backend of the capture and, with `fused`, of that operator
    fused      True: in decode steps on a GPU in bfloat16 or float16, one operator computes the attention of a captured
               layer and its map; outputs then differ from those of the model's own attention in the last bits. Where it
               does not serve, the model's own is called, as in prefills, and one line in the log says why
    grad       True: maps, mass and entropy of a prompt are parts of the graph of its forward, for losses of attention
               and gradients of maps by any weight or input; generate and decode steps are refused. False: they are
               detached
    heads      "each": on_layer gets the maps of each head, [B, A, Q, N], with the mass and the entropy of their mean,
               which `session.maps` holds
    =========  =========================================================================================================

    `session.maps` is the AttentionMaps of the last prompt and its decode steps. A prefill starts a new record, and a
    step belongs to the prompt of its cache. Layers may run on several devices, and their heads in several processes
    (docs/platforms.md). The vision tower is not touched, and the model is restored on leaving, also after an error or
    Ctrl-C. Tokens that `on_layer` drops are `missing` behind that layer, in all open sessions of the model, and a row
    that has lost all of them is not `valid`; in the output they have the states with which they were dropped.

    Raises TypeError or ValueError for invalid arguments, and for a prompt, a mask, a cache or a way of decoding whose
    map cannot be known, if possible before the model runs. docs/refusals.md lists them all,
    with alternatives. Raises BackendUnavailable if a named backend cannot serve the capture or, with `fused`, the
    operator of the decode steps.
    Source: A[l, t] of CARVE, arXiv 2509.06461, section 3.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model, got {checks.describe(model)}")
    contract.ensure()
    check_decoder(model)
    attention = attention_modules(model)
    # Ascending, the order in which a forward runs them.
    numbers = tuple(sorted(layers_of(layers, len(decoder_layers(model)), attention)))
    modules = _whole({number: attention[number] for number in numbers})
    if on_layer is not None and not callable(on_layer):
        raise TypeError(f"on_layer: expected a function or None, got {checks.describe(on_layer)}")
    if not isinstance(fused, bool):
        raise TypeError(f"fused: expected True or False, got {checks.describe(fused)}")
    if not isinstance(grad, bool):
        raise TypeError(f"grad: expected True or False, got {checks.describe(grad)}")
    checks.choice("heads", heads, ("mean", "each"))
    if heads == "each" and on_layer is None:
        raise ValueError("on_layer: expected a function beside heads='each', which gets the maps, got None")
    if fused and heads == "each":
        raise ValueError("fused: expected False beside heads='each', whose maps its operator does not write, got True")
    if fused and grad:
        raise ValueError("fused: expected False beside grad=True, where there are no decode steps, got True")
    options = SessionOptions(
        numbers,
        check_rows(rows, None if processor is None else tokenizer_of(processor)),
        *check_tokens(tokens),
        processor,
        checks.integer("max_steps", max_steps, low=1),
        on_layer,
        checks.choice("backend", backend, ("auto", *BACKENDS)),
        fused,
        grad,
        heads,
    )
    if fused and backend != "auto":
        for indices in _by_device(modules):
            _check_fused(model, modules[indices[0]], backend)
    return CaptureSession(model, modules, options)


class CaptureSession:
    """The session that `capture_attention` returns."""

    def __init__(self, model: nn.Module, modules: list[nn.Module], options: SessionOptions) -> None:
        self.layers, self.fused = options.layers, options.fused
        self._outer, self._model, self._modules = model, unwrap(model), modules
        entries = map(names.attention_entry, modules, options.layers)
        self._entries = {(id(registry), name): (registry, name) for registry, name in entries}.values()
        # A tracker records on one device; each captured layer has its tracker, and its index there.
        self._trackers: list[ForwardTracker] = []
        self._places: dict[int, tuple[ForwardTracker, int]] = {}
        for indices in _by_device(modules):
            part = options._replace(layers=tuple(options.layers[index] for index in indices))
            tracker = ForwardTracker(self._model, [modules[index] for index in indices], part)
            self._trackers.append(tracker)
            self._places.update({index: (tracker, place) for place, index in enumerate(indices)})
        self._stack: ExitStack | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """The columns of the visual tokens of the last prompt, int32 [B, N], -1 is padding; also inside `on_layer`.

        Raises RuntimeError before the first forward.
        """
        record = self._trackers[0].record
        if record is None:
            raise RuntimeError("tokens: expected a forward of the model inside the session, got none")
        return record.state.tokens.clone()

    @property
    def maps(self) -> AttentionMaps:
        """The maps of the last prompt and its decode steps, copied out of the buffers.

        Where the captured layers run on several devices, all maps are on that of the first layer. Raises RuntimeError
        before the first forward, and the ValueError of a forward that was refused.
        """
        parts = []
        for tracker in self._trackers:
            if tracker.record is None:
                raise RuntimeError(
                    "maps: expected a forward of the model inside the session, got none; call the model (or its "
                    "wrapper) that was passed to capture_attention"
                )
            tracker.check_replays()
            parts.append(tracker.record.result())
        return merge_layers(parts)

    def __enter__(self) -> CaptureSession:
        if self._stack is not None:
            raise RuntimeError(
                "session: expected a new session, this one was opened before; call capture_attention again"
            )
        with ExitStack() as stack:
            self._install(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._stack is not None:
            self._stack.close()

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise TypeError(
            "model: it and its modules cannot be copied or pickled inside capture_attention; do that before it"
        )

    def record(self, index: int, *call: Any) -> None:
        """Called after the attention of a captured layer."""
        tracker, place = self._places[index]
        if tracker.record is not None and tracker.running:
            tracker.record.record(place, *call)

    def attend(self, index: int, *call: Any) -> Any:
        """Called before the attention of a captured layer; its output if it was computed and captured, else None."""
        tracker, place = self._places[index]
        return tracker.record.attend(place, *call) if tracker.record is not None and tracker.running else None

    def _install(self, stack: ExitStack) -> None:
        for tracker in self._trackers:
            stack.enter_context(guarded(self._model, tracker))
        for index, module in enumerate(self._modules):
            _add_recorder(stack, module, (self, index))
        for registry, name in self._entries:
            stack.enter_context(patched(registry, name))
        if names.has_own_generate(self._model):
            stack.callback(text_backbone(self._outer).register_forward_pre_hook(self._check_generate).remove)
        for module in wrapped_models(self._outer):
            for tracker in self._trackers:
                stack.callback(module.register_forward_pre_hook(tracker.begin, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(tracker.end, always_call=True).remove)

    def _check_generate(self, *_call: Any) -> None:
        """Before a forward of the text decoder: a custom `generate` may bypass the model that the session follows."""
        if self._trackers[0].generation is not None and not self._trackers[0].running:
            kind = type(self._model).__name__
            raise ValueError(
                f"model: expected a generate that calls {kind} itself, got one that calls the language model inside "
                "it; open the session on the language model, with the columns of the image tokens as tokens"
            )


def _whole(modules: dict[int, nn.Module]) -> list[nn.Module]:
    """The attention modules of some layers, each of which must run on one device."""
    for layer, module in modules.items():
        if len(devices := devices_of(module)) > 1:
            raise ValueError(
                f"layers: expected the attention of a layer on one device, layer {layer} has its weights on "
                f"{sorted(map(str, devices))}; keep layers whole, as device_map='auto' does"
            )
    return list(modules.values())


def _by_device(modules: list[nn.Module]) -> list[list[int]]:
    """The indices of the modules that run on each device, in the order of the modules; those not known are one part."""
    parts: dict[torch.device | None, list[int]] = {}
    for index, module in enumerate(modules):
        parts.setdefault(next(iter(devices_of(module)), None), []).append(index)
    return list(parts.values())


def _check_fused(model: nn.Module, module: nn.Module, backend: str) -> None:
    """Raise BackendUnavailable for a backend that cannot attend and capture in an attention module of a model."""
    device, dtype = next(iter(devices_of(module)), None), dtype_of(module)
    reason: Any = why_not("attention", backend)
    if reason is not None:
        reason = f"{backend} cannot serve attention: {reason}"
    elif device is not None and dtype is not None:
        size = names.heads_of(text_backbone(model).config)[2]
        reason = attention_operator(backend, device, dtype=dtype, size=size, value_size=size)
    if isinstance(reason, str):
        raise checks.BackendUnavailable(f"fused: expected a backend that attends and captures: {reason}")


def _add_recorder(stack: ExitStack, module: nn.Module, entry: tuple[CaptureSession, int]) -> None:
    """Add a recorder to a module, and remove it when the stack closes."""

    def remove() -> None:
        others = tuple(other for other in getattr(module, RECORDERS, ()) if other is not entry)
        if others:
            setattr(module, RECORDERS, others)
        elif hasattr(module, RECORDERS):
            delattr(module, RECORDERS)

    # First, so that an interruption between the two lines leaves no recorder on the model.
    stack.callback(remove)
    setattr(module, RECORDERS, (*getattr(module, RECORDERS, ()), entry))
