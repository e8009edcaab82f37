"""Opponents with the same answers: the engine, calls with eager, the release's procedure, two plain answers.

Their peak memory is measured in fresh processes; see `memory` for the method.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, wraps
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from PIL import Image

from benchmarks.support.answers import WrongAnswer
from benchmarks.support.memory import in_fresh_process, peak_of_tensors, peak_resident
from benchmarks.support.models import MERGE, PATCH, Shape, noise, processor, random_model, twin
from benchmarks.support.user_opponent import UserOpponent
from carve_kernels import CarveEngine, Preset, VisualLayout, carve, layout_of, load
from carve_kernels.hf.engine.result import CarveResult
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.model import decoder_layers

FIRST, QUESTION = "what digit is blue", "what digit is red"
ENGINE, EAGER, RELEASE, PRICE = "engine", "eager", "release", "price"


class Pass(NamedTuple):
    """New tokens [T], and maps [L, T, N] of the last rows."""

    ids: list[int]
    maps: torch.Tensor


@dataclass(frozen=True)
class Case:
    """An image of so many visual tokens, answers of so many new tokens, a preset, and the device of the models."""

    shape: Shape
    preset_name: str
    visual: int
    new_tokens: int
    device: str = "cpu"

    @property
    def side(self) -> int:
        """Pixels of a side of the image."""
        return math.isqrt(self.visual) * MERGE * PATCH

    @cached_property
    def preset(self) -> Preset:
        # The paper's share of the layers (20 to 25 of 28) for both presets, and an image of any size.
        return replace(
            Preset.of(self.preset_name), layers="paper", max_new_tokens=self.new_tokens, max_pixels=self.side**2
        )

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the keys and values of the prompt up to the last image token."""
        length = int(self.columns[-1]) + 1
        model = self.model.config.get_text_config()
        size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
        return int(length * 2 * model.num_hidden_layers * heads * size * self.model.dtype.itemsize)

    @cached_property
    def layout(self) -> VisualLayout:
        """Where the image is in the prompt of the question."""
        return layout_of(self.model, self.processor, self.inputs([self.image], QUESTION), [self.image])

    @property
    def columns(self) -> torch.Tensor:
        """The columns of the visual tokens, which all prompts have in the same place."""
        return self.layout.tokens()[0].long()

    @property
    def exact(self) -> bool:
        """Whether all opponents give the same tokens: in other dtypes than float32, eager rounds otherwise."""
        return bool(self.model.dtype == torch.float32)

    @cached_property
    def image(self) -> Image.Image:
        return noise(self.side)

    @cached_property
    def processor(self) -> Any:
        presets = Preset.paper(), Preset.release()
        return processor(
            [FIRST, QUESTION, *(text for preset in presets for text in (preset.general_prompt, preset.suffix))]
        )

    @property
    def model(self) -> Any:
        return _sdpa(self.shape, self.device)

    @property
    def eager(self) -> Any:
        """The same weights with eager attention."""
        return _eager(self.shape, self.device)

    def inputs(self, images: list[Image.Image], text: str) -> Any:
        prompt = build_prompt(self.processor, text + self.preset.suffix, len(images))
        return prepare(self.processor, images, prompt, self.device, self.preset.max_pixels)


@dataclass(frozen=True)
class CheckpointCase(Case):
    """The same for a checkpoint in its own dtype, whose answers never end early; `visual` tokens are what it makes."""

    directory: Path = field(kw_only=True)
    pixels: int = field(kw_only=True)

    @classmethod
    def of(cls, directory: Path, preset_name: str, pixels: int, new_tokens: int) -> CheckpointCase:
        """The case of an image with so many pixels a side."""
        case = cls(Shape(0, 0, ""), preset_name, 0, new_tokens, directory=directory, pixels=pixels)
        return replace(case, visual=len(case.columns))

    @property
    def side(self) -> int:
        return self.pixels

    @property
    def processor(self) -> Any:  # type: ignore[override]
        return _loaded(self.directory)[1]

    @property
    def model(self) -> Any:
        return _loaded(self.directory)[0]

    @property
    def eager(self) -> Any:
        return _eager_twin(self.directory)

    @property
    def eager_bytes(self) -> int:
        """Bytes of eager's probabilities of the last prompt, which may have a second image of the size of the first."""
        config = self.model.config.get_text_config()
        images = 1 if self.preset.images == "refined" else 2
        length = self.inputs([self.image] * images, QUESTION)["input_ids"].shape[1] + self.new_tokens
        return int(config.num_hidden_layers * config.num_attention_heads * length**2 * self.model.dtype.itemsize)


class Opponents:
    """The opponents on one case. All of them use `refined`, the refined image of the engine."""

    def __init__(self, case: Case, refined: Image.Image | None = None) -> None:
        self.case = case
        if refined is not None:
            self.refined = refined

    @cached_property
    def result(self) -> CarveResult:
        """The result of the engine."""
        return self.engine()

    @cached_property
    def refined(self) -> Image.Image:
        # In bfloat16, rounding may move a region by a pixel, which would change the number of tokens.
        return self.result.refined

    @cached_property
    def caching_engine(self) -> CarveEngine:
        """An engine that has answered another question about the image."""
        engine = CarveEngine(self.case.model, self.case.processor, preset=self.case.preset)
        engine(self.case.image, FIRST)
        return engine

    def engine(self) -> CarveResult:
        """(a) The first question about an image."""
        return self._uncached_engine(self.case.image, QUESTION)

    def second(self) -> CarveResult:
        """The second question about an image."""
        return self.caching_engine(self.case.image, QUESTION)

    def plain(self) -> list[int]:
        """(d) The plain answer on the original with sdpa."""
        return _generate(self.case.model, self.case.inputs([self.case.image], QUESTION), self.case.new_tokens)

    def answer_refined(self) -> list[int]:
        """(d) The plain answer on the refined image with sdpa."""
        return _generate(self.case.model, self.case.inputs([self.refined], QUESTION), self.case.new_tokens)

    def eager_task(self) -> Pass:
        """(b) The question with eager and output_attentions."""
        return self._eager_pass(QUESTION)

    def eager_general(self) -> Pass:
        """(b) The general prompt with eager and output_attentions."""
        return self._eager_pass(self.case.preset.general_prompt)

    def last(self, task: Pass, general: Pass) -> list[int]:
        """(b), (c) Contrast, regions and zoom from the maps, then the second pass with eager."""
        case = self.case
        carve(case.image, task.maps, general.maps, grid=case.layout.views[0], preset=case.preset)
        images = [self.refined] if case.preset.images == "refined" else [case.image, self.refined]
        return _generate(case.eager, case.inputs(images, QUESTION), case.new_tokens)

    def release_task(self) -> Pass:
        """(c) The question by the procedure of the release."""
        return self._without_cache(QUESTION)

    def release_general(self) -> Pass:
        """(c) The general prompt by the procedure of the release."""
        return self._without_cache(self.case.preset.general_prompt)

    def own(self, user: UserOpponent) -> tuple[torch.Tensor, torch.Tensor]:
        """The user's function: the tokens of the refined answer, and the saliency [H, W]."""
        case = self.case
        return user(self._own_model, case.processor, case.image.copy(), QUESTION, preset=case.preset)

    @cached_property
    def _own_model(self) -> Any:
        return twin(self.case.model)

    @cached_property
    def _uncached_engine(self) -> CarveEngine:
        return CarveEngine(self.case.model, self.case.processor, preset=self.case.preset, memory=False)

    def _eager_pass(self, text: str) -> Pass:
        case = self.case
        inputs = case.inputs([case.image], text)
        with torch.no_grad():
            output = case.eager.generate(
                **inputs, do_sample=False, max_new_tokens=case.new_tokens, return_dict_in_generate=True,
                output_attentions=True,
            )  # fmt: skip
        length = inputs["input_ids"].shape[1]
        maps = [self._last_rows(attentions) for attentions in output.attentions]
        return Pass(output.sequences[0, length:].tolist(), torch.stack(maps, 1))

    def _without_cache(self, text: str) -> Pass:
        """Each new token runs the whole prompt again, vision tower included, with eager and output_attentions."""
        case = self.case
        inputs = dict(case.inputs([case.image], text))
        length = inputs["input_ids"].shape[1]
        # One value for each token of the prompt, such as its type.
        grows = [name for name, value in inputs.items() if value.shape[:2] == (1, length) and value.ndim == 2]
        maps = []
        for _ in range(case.new_tokens):
            with torch.no_grad():
                output = case.eager(**inputs, use_cache=False, output_attentions=True, logits_to_keep=1)
            maps.append(self._last_rows(output.attentions))
            token = output.logits[:, -1:].argmax(-1)
            added = {"input_ids": token, "attention_mask": torch.ones_like(token)}
            for name in grows:
                more = added.get(name, torch.zeros_like(token)).to(inputs[name].dtype)
                inputs[name] = torch.cat([inputs[name], more], 1)
        return Pass(inputs["input_ids"][0, length:].tolist(), torch.stack(maps, 1))

    def _last_rows(self, attentions: Any) -> torch.Tensor:
        """Head means of the last row at the visual tokens: [L, N]."""
        columns = self.case.columns
        layers = self.case.preset.layers_of(len(decoder_layers(self.case.eager)))
        for layer in layers:
            if len(attentions) <= layer or attentions[layer] is None or attentions[layer].shape[-1] <= columns[-1]:
                raise WrongAnswer(f"eager: layer {layer} has no probabilities of the whole prompt to compare maps with")
        return torch.stack([attentions[layer][0, :, -1, columns].float().mean(0) for layer in layers])


class Work(NamedTuple):
    """Tokens through the first layer of the language model, and calls of the vision tower."""

    tokens: int
    images: int


class Counted:
    """An opponent whose first call also counts its work."""

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


# Cases of one shape share a model, which takes seconds to fill; memory holds one shape only.
@lru_cache(maxsize=1)
def _sdpa(shape: Shape, device: str) -> Any:
    return random_model(shape, "sdpa", device=device)


@lru_cache(maxsize=1)
def _eager(shape: Shape, device: str) -> Any:
    model = random_model(shape, "eager", device=device)
    model.load_state_dict(_sdpa(shape, device).state_dict(), assign=True)
    return model


@lru_cache(maxsize=1)
def _loaded(directory: Path) -> tuple[Any, Any]:
    model, processor = load(directory)
    model.generation_config.eos_token_id = None
    return model, processor


@lru_cache(maxsize=1)
def _eager_twin(directory: Path) -> Any:
    model = twin(_loaded(directory)[0])
    model.set_attn_implementation("eager")
    return model


@contextmanager
def _counted(model: Any) -> Iterator[list[int]]:
    counts = [0, 0]

    def tokens(args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        counts[0] += states.shape[0] * states.shape[1]

    def images(_args: Any, _kwargs: Any) -> None:
        counts[1] += 1

    with _watched(decoder_layers(model)[0], tokens), _watched(model.get_encoder(modality="image"), images):
        yield counts


@contextmanager
def _watched(module: Any, before: Callable[[Any, Any], None]) -> Iterator[None]:
    """Call `before(args, kwargs)` at each forward of a module, through its class.

    Tree decoding is not used with hooks or code of another package, so the wrapper claims the module of the forward.
    """
    kind, forward = type(module), type(module).forward

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is module:
            before(args, kwargs)
        return forward(self, *args, **kwargs)

    namespace = {"__name__": forward.__module__}
    kind.forward = wraps(forward)(FunctionType(watching.__code__, namespace, closure=watching.__closure__))
    try:
        yield
    finally:
        kind.forward = forward


def _generate(model: Any, inputs: Any, new_tokens: int) -> list[int]:
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


class Peak(NamedTuple):
    """Bytes above those before the call (mostly the weights), and the size of the refined image."""

    tensors: int
    resident: int
    refined: tuple[int, int]


def peak_of(what: str, case: Case, refined: tuple[int, int] | None = None) -> Peak:
    """The peak of one opponent; `refined` is the size of the refined image, which the engine determines itself."""
    task = {
        "what": what, "shape": case.shape._asdict(), "preset": case.preset_name, "visual": case.visual,
        "new_tokens": case.new_tokens, "refined": refined,
    }  # fmt: skip
    if isinstance(case, CheckpointCase):
        task |= {"directory": str(case.directory), "pixels": case.pixels}
    peak = in_fresh_process("benchmarks.support.engine_opponents", task)
    return Peak(peak["tensors"], peak["resident"], tuple(peak["refined"]))


def _run(what: str, opponents: Opponents) -> Callable[[], Any]:
    return {
        ENGINE: opponents.engine,
        EAGER: lambda: opponents.last(opponents.eager_task(), opponents.eager_general()),
        RELEASE: lambda: opponents.last(opponents.release_task(), opponents.release_general()),
        PRICE: lambda: (opponents.plain(), opponents.answer_refined()),
    }[what]


def measure_here(task: dict[str, Any]) -> Peak:
    """The peak of one opponent in this process."""
    size = task["refined"]
    if "directory" in task:
        case: Case = CheckpointCase.of(Path(task["directory"]), task["preset"], task["pixels"], task["new_tokens"])
    else:
        case = Case(Shape(**task["shape"]), task["preset"], task["visual"], task["new_tokens"])
    opponents = Opponents(case, None if size is None else noise(max(size)).resize(size))
    run = _run(task["what"], opponents)
    # Created before any question.
    _ = case.processor, case.model, case.layout, task["what"] in (EAGER, RELEASE) and case.eager
    # In this order, since libraries load some parts in the first call.
    tensors = peak_of_tensors(run)
    resident = peak_resident(run)
    return Peak(tensors, resident, tuple(size or opponents.refined.size))


if __name__ == "__main__":
    print(json.dumps(measure_here(json.loads(sys.argv[1]))._asdict()))
