"""Ways to the same answers: the engine's one look, plain calls under eager, the release's procedure, the bare price."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, wraps
from types import FunctionType
from typing import Any, NamedTuple

import torch
from PIL import Image

from benchmarks.models import MERGE, PATCH, Shape, noise, processor, random_model
from carve_kernels import CarveEngine, Preset, carve
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.model import decoder_layers
from carve_kernels.hf.engine.result import CarveResult

FIRST, QUESTION = "what digit is blue", "what digit is red"


class Look(NamedTuple):
    """New tokens [T], and maps [L, T, N] of the last rows."""

    ids: list[int]
    maps: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A picture of so many visual tokens, answers of so many tokens, a preset's steps, prompts and last question."""

    shape: Shape
    preset_name: str
    visual: int
    new_tokens: int

    @property
    def side(self) -> int:
        return math.isqrt(self.visual) * MERGE * PATCH

    @cached_property
    def preset(self) -> Preset:
        # Layers as the paper's share of the depth (20 to 25 of 28 for both presets), and a picture of any size.
        return replace(
            Preset.of(self.preset_name), layers="paper", max_new_tokens=self.new_tokens, max_pixels=self.side**2
        )

    @property
    def prefix_bytes(self) -> int:
        """Keys and values of the prompt up to the last token of the picture."""
        ids = self.inputs([self.picture], QUESTION)["input_ids"][0]
        length = int((ids == self.processor.image_token_id).nonzero()[-1]) + 1
        model = self.model.config.get_text_config()
        size = model.hidden_size // model.num_attention_heads
        width = 2 * model.num_hidden_layers * model.num_key_value_heads * size
        return length * width * getattr(torch, self.shape.dtype).itemsize

    @cached_property
    def picture(self) -> Image.Image:
        return noise(self.side)

    @cached_property
    def processor(self) -> Any:
        presets = Preset.paper(), Preset.release()
        return processor(
            [FIRST, QUESTION, *(text for preset in presets for text in (preset.general_prompt, preset.suffix))]
        )

    @property
    def model(self) -> Any:
        return _sdpa(self.shape)

    @property
    def eager(self) -> Any:
        """The same weights, which attend by eager."""
        return _eager(self.shape)

    def inputs(self, images: list[Image.Image], text: str) -> Any:
        prompt = build_prompt(self.processor, text + self.preset.suffix, len(images))
        return prepare(self.processor, images, prompt, None, self.preset.max_pixels)


class Ways:
    """The opponents on one case. `refined`, the engine's refined picture, is shown by all of them."""

    def __init__(self, case: Case, refined: Image.Image | None = None) -> None:
        self.case = case
        if refined is not None:
            self.refined = refined

    @cached_property
    def seen(self) -> CarveResult:
        """What the engine says of the case."""
        return self.engine()

    @cached_property
    def refined(self) -> Image.Image:
        # In bfloat16 rounding may move a region by a pixel, and then the ways would show different numbers of tokens.
        return self.seen.refined

    @cached_property
    def remembering(self) -> CarveEngine:
        """An engine that was asked another question about the picture before."""
        engine = CarveEngine(self.case.model, self.case.processor, preset=self.case.preset)
        engine(self.case.picture, FIRST)
        return engine

    def engine(self) -> CarveResult:
        """(a) The first question on a picture."""
        return self._forgetful(self.case.picture, QUESTION)

    def second(self) -> CarveResult:
        """The second question on a picture."""
        return self.remembering(self.case.picture, QUESTION)

    def plain(self) -> list[int]:
        """(d) The plain answer on the original under sdpa."""
        return _generate(self.case.model, self.case.inputs([self.case.picture], QUESTION), self.case.new_tokens)

    def answer_refined(self) -> list[int]:
        """(d) The plain answer on the refined picture under sdpa."""
        return _generate(self.case.model, self.case.inputs([self.refined], QUESTION), self.case.new_tokens)

    def eager_task(self) -> Look:
        """(b) The question under eager with output_attentions."""
        return self._eager_look(QUESTION)

    def eager_general(self) -> Look:
        """(b) The general instruction under eager with output_attentions."""
        return self._eager_look(self.case.preset.general_prompt)

    def last(self, task: Look, general: Look) -> list[int]:
        """(b), (c) Contrast, regions and zoom from the maps, and the last question under eager."""
        case = self.case
        side = math.isqrt(case.visual)
        carve(case.picture, task.maps, general.maps, grid=(side, side), preset=case.preset)
        shown = [self.refined] if case.preset.images == "refined" else [case.picture, self.refined]
        return _generate(case.eager, case.inputs(shown, QUESTION), case.new_tokens)

    def release_task(self) -> Look:
        """(c) The question as the release asks it."""
        return self._without_cache(QUESTION)

    def release_general(self) -> Look:
        """(c) The general instruction as the release asks it."""
        return self._without_cache(self.case.preset.general_prompt)

    @cached_property
    def _forgetful(self) -> CarveEngine:
        return CarveEngine(self.case.model, self.case.processor, preset=self.case.preset, memory=False)

    def _eager_look(self, text: str) -> Look:
        case = self.case
        inputs = case.inputs([case.picture], text)
        with torch.no_grad():
            output = case.eager.generate(
                **inputs, do_sample=False, max_new_tokens=case.new_tokens, return_dict_in_generate=True,
                output_attentions=True,
            )  # fmt: skip
        length = inputs["input_ids"].shape[1]
        maps = [self._last_rows(inputs, attentions) for attentions in output.attentions]
        return Look(output.sequences[0, length:].tolist(), torch.stack(maps, 1))

    def _without_cache(self, text: str) -> Look:
        """Every token runs the whole prompt again, the picture's tower included, under eager with all attentions."""
        case = self.case
        inputs = dict(case.inputs([case.picture], text))
        length = inputs["input_ids"].shape[1]
        maps = []
        for _ in range(case.new_tokens):
            with torch.no_grad():
                output = case.eager(**inputs, use_cache=False, output_attentions=True, logits_to_keep=1)
            maps.append(self._last_rows(inputs, output.attentions))
            token = output.logits[:, -1:].argmax(-1)
            added = {"input_ids": token, "attention_mask": torch.ones_like(token)}
            for name, more in (added | {"mm_token_type_ids": torch.zeros_like(token)}).items():
                inputs[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], 1)
        return Look(inputs["input_ids"][0, length:].tolist(), torch.stack(maps, 1))

    def _last_rows(self, inputs: Any, attentions: Any) -> torch.Tensor:
        """Head means of the last row at the visual tokens: [L, N]."""
        visual = inputs["input_ids"][0] == self.case.processor.image_token_id
        layers = self.case.preset.layers_of(len(decoder_layers(self.case.eager)))
        return torch.stack([attentions[layer][0, :, -1, : len(visual)][:, visual].float().mean(0) for layer in layers])


class Work(NamedTuple):
    """Tokens that the first layer of the language model was given, and calls of the vision tower."""

    tokens: int
    pictures: int


class Counted:
    """A way whose first call also counts its work, by two hooks."""

    def __init__(self, case: Case, run: Callable[[], Any]) -> None:
        self._case, self._run = case, run
        self.work: Work | None = None

    def __call__(self) -> None:
        if self.work is None:
            with _counted(self._case.model) as sdpa, _counted(self._case.eager) as eager:
                self._run()
            self.work = Work(sdpa[0] + eager[0], sdpa[1] + eager[1])
        else:
            self._run()


# Cases of one shape share a model, which takes seconds to fill; of two shapes only one fits beside the caches.
@lru_cache(maxsize=1)
def _sdpa(shape: Shape) -> Any:
    return random_model(shape, "sdpa")


@lru_cache(maxsize=1)
def _eager(shape: Shape) -> Any:
    model = random_model(shape, "eager")
    model.load_state_dict(_sdpa(shape).state_dict(), assign=True)
    return model


@contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    counts = [0, 0]

    def tokens(args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        counts[0] += states.shape[0] * states.shape[1]

    def pictures(_args: Any, _kwargs: Any) -> None:
        counts[1] += 1

    with _watched(decoder_layers(model)[0], tokens), _watched(model.model.visual, pictures):
        yield counts


@contextmanager
def _watched(module: Any, before: Callable[[Any, Any], None]) -> Iterator[None]:
    """Call `before(args, kwargs)` at each forward of a module, by way of its class.

    Hooks and code of another package keep prompts apart, so it says that it is written beside that forward.
    """
    kind, forward = type(module), type(module).forward

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is module:
            before(args, kwargs)
        return forward(self, *args, **kwargs)

    inside = {"__name__": forward.__module__}
    kind.forward = wraps(forward)(FunctionType(watching.__code__, inside, closure=watching.__closure__))
    try:
        yield
    finally:
        kind.forward = forward


def _generate(model: Any, inputs: Any, new_tokens: int) -> list[int]:
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()
