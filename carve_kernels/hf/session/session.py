"""capture_attention: a context in which the forwards of a model also give back the attention of chosen rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from carve_kernels import checks
from carve_kernels.backends import BACKENDS
from carve_kernels.hf import names
from carve_kernels.hf.attention_patch import PATCHES, RECORDERS
from carve_kernels.hf.model import (
    attention_modules,
    check_decoder,
    decoder_layers,
    devices_of,
    text_backbone,
    unwrap,
    wrappers,
)
from carve_kernels.hf.query_rows import RowsSpec, check_rows, tokenizer_of
from carve_kernels.hf.session import contract
from carve_kernels.hf.session.forward_tracker import Planner
from carve_kernels.hf.session.generate_guard import join, leave
from carve_kernels.hf.session.recording import OnLayer
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

    =========  =========================================================================================================
    argument   meaning
    =========  =========================================================================================================
    model      a transformers model with a text decoder; PEFT, torch.compile and DDP wrappers are looked through
    layers     numbers (negative ones count from the end), a range, one number, "paper" or "all"
    rows       "last": the prompt's last token, then every new token; k: the last k; a list of columns of input_ids;
               "question": mean of the tokens between the image (or the user's last turn behind it) and the end of the
               user's text; ("word", WORD): mean of the pieces of its last occurrence behind the image, the user's
               before the template's; ("text", TEXT): likewise. Rows but the last exist at step 0 only
    tokens     the visual tokens: None finds them in input_ids; a VisualLayout; columns [N] or [B, N], -1 is padding
    processor  processor or tokenizer; needed for ("word", ...) and ("text", ...), and to tell a question from the
               chat template around it
    max_steps  forward passes that are kept of one generation; later ones run uncaptured, which the log tells
    on_layer   called inside the forward as on_layer(layer, step, Capture of [B, Q, N] and [B, Q]) after each layer
    backend    the room that captures
    =========  =========================================================================================================

    `session.maps` is the AttentionMaps of the prompt that ran last and its steps; a new prefill starts anew, and a step
    belongs to the cache that its prompt was read into. The vision tower is not touched, and on leaving, by an error or
    Ctrl-C too, the model is as before. Raises TypeError or ValueError at once for arguments that do not fit, and for a
    prompt, a mask, a cache or a way of decoding whose map cannot be known, before the model runs where that can be told
    by then. docs/refusals.md has all of them, and what to do instead.
    Source: A[l, t] of CARVE, arXiv 2509.06461, section 3.
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
        contract.ensure()
        self._outer, self._model = model, unwrap(model)
        check_decoder(model)
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
            for place, name in (
                names.attention_entry(module, layer) for module, layer in zip(self._modules, self.layers, strict=True)
            )
        }
        if on_layer is not None and not callable(on_layer):
            raise TypeError(f"on_layer: expected a function or None, got {checks.describe(on_layer)}")
        self._planner = Planner(
            self._model,
            self._modules,
            self.layers,
            _device(self._modules, self.layers),
            check_rows(rows, None if processor is None else tokenizer_of(processor)),
            tokens,
            processor,
            checks.integer("max_steps", max_steps, low=1),
            on_layer,
            checks.choice("backend", backend, ("auto", *BACKENDS)),
        )
        self._stack: ExitStack | None = None

    @property
    def maps(self) -> AttentionMaps:
        """The maps of the prompt that ran last and the steps behind it, copied out of the buffers.

        Raises RuntimeError before the first forward, and ValueError where something in it was refused.
        """
        record = self._planner.record
        if record is None:
            raise RuntimeError(
                "maps: expected a forward of the model inside the session, saw none; call the model (or its wrapper) "
                "that was given to capture_attention"
            )
        return record.result()

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

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise TypeError(
            "model: neither it nor a part of it can be copied or pickled inside capture_attention; do that before it"
        )

    def record(self, index: int, *call: Any) -> None:
        """Called by the attention of a captured layer."""
        record = self._planner.record
        if record is not None and self._planner.running:
            record.record(index, *call)

    def _install(self, stack: ExitStack) -> None:
        join(self._model, self._planner)
        stack.callback(leave, self._model, self._planner)
        for index, module in enumerate(self._modules):
            _push(stack, module, (self, index))
        for place, name in self._places.values():
            PATCHES.enter(place, name)
            stack.callback(PATCHES.leave, place, name)
        if names.has_own_generate(self._model):
            stack.callback(text_backbone(self._outer).register_forward_pre_hook(self._beside).remove)
        for module in (*wrappers(self._outer), self._model):
            stack.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(self._after, always_call=True).remove)

    # Under a compiler the hooks of the wrapper have run already; those inside would break the graph.
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._planner.begin(module, args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._planner.end(output)

    def _beside(self, *_call: Any) -> None:
        """Before a forward of the text decoder: `generate` may run it past the model that the session follows."""
        if self._planner.decoding is not None and not self._planner.running:
            kind = type(self._model).__name__
            raise ValueError(
                f"model: expected a generate that runs {kind} itself, got one that runs the language model inside of "
                "it; open the session on that one, with the columns of the image's tokens as tokens"
            )


def _layers(layers: str | int | Iterable[int], depth: int) -> tuple[int, ...]:
    """The layers argument as ascending numbers: the order in which a forward meets them."""
    return (
        tuple(range(depth)) if isinstance(layers, str) and layers == "all" else tuple(sorted(layers_of(layers, depth)))
    )


def _device(modules: list[nn.Module], layers: tuple[int, ...]) -> torch.device | None:
    """Where the captured layers run; None where nobody says so before they do."""
    devices = set().union(*(devices_of(module) for module in modules))
    if len(devices) > 1:
        raise ValueError(
            f"layers: expected layers on one device, got layers {list(layers)} on {sorted(map(str, devices))}; open a "
            "session for the layers of each device"
        )
    return devices.pop() if devices else None


def _push(stack: ExitStack, module: nn.Module, entry: tuple[CaptureSession, int]) -> None:
    """Add a recorder to a module, and take it away again when the stack closes."""

    def pop() -> None:
        left = tuple(other for other in getattr(module, RECORDERS, ()) if other is not entry)
        if left:
            setattr(module, RECORDERS, left)
        elif hasattr(module, RECORDERS):
            delattr(module, RECORDERS)

    stack.callback(pop)
    setattr(module, RECORDERS, (*getattr(module, RECORDERS, ()), entry))
