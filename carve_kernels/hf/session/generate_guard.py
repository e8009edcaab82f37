"""What open sessions change about decoding on a model: refused ways of it, and compiled calls, which skip hooks."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from carve_kernels.hf import names

GUARD = "_carve_guard"

# Ways of decoding whose forwards are not one new token for each prompt, and the values that turn them off.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "dola_layers": (None,),
    "penalty_alpha": (None,),
    # A second prompt is run between the steps of the first.
    "guidance_scale": (None, 1),
}

_OPENING = threading.Lock()


class Decoding(NamedTuple):
    """What a running `generate` says of its forwards.

    `eos` are the tokens that end a row, `chunked` whether the prompt comes in chunks, `ids` the whole prompt where it
    is given as ids, `length` its tokens and `mask` [B, length or more] which are no padding, `beside` the name of an
    argument that may call the model itself.
    """

    eos: tuple[int, ...]
    chunked: bool
    ids: torch.Tensor | None = None
    length: int | None = None
    mask: torch.Tensor | None = None
    beside: str | None = None


class Decoder(Protocol):
    """What an open session does before and after a forward."""

    decoding: Decoding | None

    def begin(self, source: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...

    def end(self, output: Any) -> None: ...


class DecodingGuard:
    """The open sessions of one model, and its `generate` and compiled calls while there are any."""

    def __init__(self, model: Any) -> None:
        self.sessions: list[Decoder] = []
        self.thread = threading.get_ident()
        self.stack = ExitStack()
        self._model = model
        if hasattr(model, "generate"):
            self._shadow("generate", self._generate(model.generate))
        for name, call in list(names.compiled_calls(model, self._around)):
            self._shadow(name, call)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        # What stands on the model is bound to it: a copy would run and change this model in place of itself.
        raise TypeError("model: cannot be copied or pickled inside capture_attention; do that before it, or after it")

    def _generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(generate)

        def captured_generate(*args: Any, **kwargs: Any) -> Any:
            given = names.arguments(signature, args, kwargs)
            configs = [given.get("generation_config"), getattr(self._model, "generation_config", None)]

            def told(name: str) -> Any:
                """A setting as `generate` takes it: by name, else by the config, else by the model's own."""
                values = [given[name]] if name in given else [getattr(config, name, None) for config in configs]
                return next((value for value in values if value is not None), None)

            if given.get("assistant_model") is not None:
                raise ValueError("assistant_model: expected None inside capture_attention, got an assistant model")
            for name, off in _REFUSED.items():
                value = told(name)
                if value not in off:
                    raise ValueError(f"{name}: expected {off[-1]} inside capture_attention, got {value!r}")
            if told("cache_implementation") == "paged":
                raise ValueError("cache_implementation: expected none in pages inside capture_attention, got 'paged'")
            prompt = names.prompt_of(given)
            decoding = Decoding(
                end_tokens(told("eos_token_id")),
                told("prefill_chunk_size") is not None,
                None if prompt is None or prompt.is_floating_point() else prompt,
                None if prompt is None else prompt.shape[1],
                mask if isinstance(mask := given.get("attention_mask"), torch.Tensor) and mask.ndim == 2 else None,
                names.beside_generate(given),
            )
            for session in self.sessions:
                session.decoding = decoding
            try:
                return generate(*args, **kwargs)
            finally:
                for session in self.sessions:
                    session.decoding = None

        return captured_generate

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled call, which skips the hooks, with what the hooks of the sessions do."""

        def around(*args: Any, **kwargs: Any) -> Any:
            begun: list[Decoder] = []
            output = None
            try:
                for session in self.sessions:
                    session.begin(self, args, kwargs)
                    begun.append(session)
                output = call(*args, **kwargs)
                return output
            finally:
                for session in begun:
                    session.end(output)

        return around

    def _shadow(self, name: str, value: Any) -> None:
        """Set an attribute on the instance itself; the stack puts back what stood there."""
        attributes = self._model.__dict__
        if name in attributes:
            self.stack.callback(attributes.__setitem__, name, attributes[name])
        else:
            self.stack.callback(attributes.pop, name, None)
        attributes[name] = value


def join(model: nn.Module, session: Decoder) -> None:
    """Add a session to a model; one thread may have several on it."""
    with _OPENING:
        guard = model.__dict__.get(GUARD)
        if guard is not None and guard.thread != threading.get_ident():
            raise RuntimeError("model: another thread has a session open on this model, open one at a time")
        if guard is None:
            guard = model.__dict__[GUARD] = DecodingGuard(model)
        guard.sessions.append(session)


def leave(model: nn.Module, session: Decoder) -> None:
    """Take a session away; the last one leaves the model as it was."""
    with _OPENING:
        guard = model.__dict__[GUARD]
        guard.sessions.remove(session)
        if not guard.sessions:
            guard.stack.close()
            del model.__dict__[GUARD]


def end_tokens(ends: Any) -> tuple[int, ...]:
    """An eos_token_id of a generation config, as ids."""
    if ends is None:
        return ()
    if hasattr(ends, "tolist"):
        ends = ends.tolist()
    return tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)
