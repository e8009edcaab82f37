"""What open sessions change on a model: `generate` refuses ways of decoding, and compiled calls run the hooks."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from carve_kernels.hf import names
from carve_kernels.hf.session.forward_tracker import ForwardTracker, GenerateCall, end_tokens
from carve_kernels.hf.session.token_drops import TokenDrops

GUARD = "_carve_guard"

# Arguments of `generate` that select decoding in which a forward is not one new token per prompt, and their off values.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "dola_layers": (None,),
    "penalty_alpha": (None,),
    # A second prompt runs between the steps of the first.
    "guidance_scale": (None, 1),
}

_OPENING = threading.Lock()


class GenerateGuard:
    """The open sessions of one model; replaces its `generate` and its compiled calls while there are any."""

    def __init__(self, model: Any) -> None:
        self.trackers: list[ForwardTracker] = []
        self.thread = threading.get_ident()
        self.stack = ExitStack()
        self.drops = TokenDrops(model, self.trackers)
        self.stack.callback(self.drops.close)
        self._model = model
        if hasattr(model, "generate"):
            self._replace("generate", self._guard(model.generate))
        for name, call in list(names.compiled_calls(model, self._with_hooks)):
            self._replace(name, call)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        # The replaced methods are bound to this model: a copy would run and change this model.
        raise TypeError("model: cannot be copied or pickled inside capture_attention; do that before it, or after it")

    def _guard(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(generate)

        def guarded_generate(*args: Any, **kwargs: Any) -> Any:
            generation = self._generation(names.arguments(signature, args, kwargs))
            for tracker in self.trackers:
                tracker.generation = generation
            try:
                return generate(*args, **kwargs)
            finally:
                for tracker in self.trackers:
                    tracker.generation = None

        return guarded_generate

    def _generation(self, given: dict[str, Any]) -> GenerateCall:
        """Raises ValueError for ways of decoding whose maps are not defined."""
        configs = [given.get("generation_config"), getattr(self._model, "generation_config", None)]

        def setting(name: str) -> Any:
            """A setting as `generate` resolves it: the argument, else the config's, else the model's."""
            values = [given[name]] if name in given else [getattr(config, name, None) for config in configs]
            return next((value for value in values if value is not None), None)

        if any(tracker.grad for tracker in self.trackers):
            raise ValueError(
                "grad: expected calls of the model itself, got generate, which records no gradients; run the prompt "
                "and its answer as one prompt"
            )
        if given.get("assistant_model") is not None:
            raise ValueError("assistant_model: expected None inside capture_attention, got an assistant model")
        for name, off in _REFUSED.items():
            value = setting(name)
            if value not in off:
                raise ValueError(f"{name}: expected {off[-1]} inside capture_attention, got {value!r}")
        if setting("cache_implementation") == "paged":
            raise ValueError("cache_implementation: expected no paged cache inside capture_attention, got 'paged'")
        prompt = names.prompt_of(given)
        return GenerateCall(
            end_tokens(setting("eos_token_id")),
            setting("prefill_chunk_size") is not None,
            None if prompt is None or prompt.is_floating_point() else prompt,
            None if prompt is None else prompt.shape[1],
            mask if isinstance(mask := given.get("attention_mask"), torch.Tensor) and mask.ndim == 2 else None,
            names.callback_in(given),
        )

    def _with_hooks(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled call, which skips hooks, with what the sessions' hooks do."""

        def hooked_call(*args: Any, **kwargs: Any) -> Any:
            begun: list[ForwardTracker] = []
            output = None
            try:
                for tracker in self.trackers:
                    tracker.begin(self, args, kwargs)
                    begun.append(tracker)
                output = call(*args, **kwargs)
                return output
            finally:
                for tracker in begun:
                    tracker.end(self, args, output)

        return hooked_call

    def _replace(self, name: str, value: Any) -> None:
        """Set an attribute of the instance; the stack restores the original."""
        attributes = self._model.__dict__
        if name in attributes:
            self.stack.callback(attributes.__setitem__, name, attributes[name])
        else:
            self.stack.callback(attributes.pop, name, None)
        attributes[name] = value


@contextmanager
def guarded(model: nn.Module, tracker: ForwardTracker) -> Iterator[None]:
    """Add a session to a model; one thread may have several, and the last one to end restores the model."""
    with _OPENING:
        guard = model.__dict__.get(GUARD)
        if guard is not None and guard.thread != threading.get_ident():
            raise RuntimeError("model: another thread has an open session on this model, open one at a time")
        if guard is None:
            guard = model.__dict__[GUARD] = GenerateGuard(model)
        guard.trackers.append(tracker)
        tracker.drops = guard.drops
    try:
        yield
    finally:
        with _OPENING:
            guard.trackers.remove(tracker)
            if not guard.trackers:
                guard.stack.close()
                del model.__dict__[GUARD]
