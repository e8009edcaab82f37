"""The release's and ViCrop's own programs and our modules of the same names, on one model with the same weights.

Their peak memory is measured in fresh processes; see `memory` for the method.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from PIL import Image

from benchmarks.support import llava, models, programs
from benchmarks.support.memory import in_fresh_process, peak_of_tensors, peak_resident
from benchmarks.support.models import Shape, noise, twin
from carve_kernels import Preset, load
from carve_kernels.frontends import release, vicrop
from carve_kernels.frontends.release.pipeline import ANSWER_SUFFIX
from carve_kernels.hf.model import decoder_layers

THEIRS, OURS = "program", "ours"
RELEASE, MAP, ANSWERS = "release", "ViCrop, map and box", "ViCrop, both answers"
QUESTION = "what digit is red"
# Layers and the size of a head of CLIP-L; of Qwen2.5-VL's tower.
TOWERS = {"llava": (24, 64), "qwen2_5": (32, 80)}
# The last is of 336 pixels, as LLaVA-1.5 reads it, or nearly 256 tokens of 28 pixels, the most that the release takes.
SIZES = {"llava": ((672, 672), (896, 896), (336, 336)), "qwen2_5": ((588, 336), (392, 504), (448, 448))}
# ViCrop cuts at least 336 x 336 pixels out.
LARGE = ((672, 672), (896, 896), (1008, 1008))
MOST_PIXELS = 256 * 28 * 28

Runs = dict[str, Callable[[], Any]]


class Subject(NamedTuple):
    """A model, the same weights with eager attention for the program, and the processor of both."""

    family: str
    model: Any
    eager: Any
    processor: Any

    @property
    def adapted(self) -> programs.Processor:
        """The processor as the program calls it."""
        return programs.Processor(self.processor, self.model.dtype)

    @property
    def depth(self) -> int:
        return len(decoder_layers(self.model))


@dataclass(frozen=True)
class Source:
    """Where a subject comes from: a checkpoint, or a random model of a shape."""

    family: str
    shape: Shape
    model: str | None = None

    def subject(self, dtype: str) -> Subject:
        return _subject(self, dtype)

    def created(self, dtype: str) -> tuple[Any, Any]:
        """The model and its processor."""
        return self._loaded(dtype) if self.model else self._random(dtype)

    def create(self, dtype: str) -> Subject:
        model, processor = self.created(dtype)
        eager = twin(model)
        eager.set_attn_implementation("eager")
        return Subject(self.family, model, programs.adapt(eager), processor)

    def _random(self, dtype: str) -> tuple[Any, Any]:
        shape = self.shape._replace(dtype=dtype)
        texts = [QUESTION, release.GENERAL_INSTRUCTION, ANSWER_SUFFIX]
        if self.family == "llava":
            return llava.random_llava(shape._replace(group=1), "sdpa"), llava.processor(texts)
        processor = models.processor(texts)
        processor.image_processor.size["longest_edge"] = MOST_PIXELS
        return models.random_model(shape, "sdpa"), processor

    def _loaded(self, dtype: str) -> tuple[Any, Any]:
        model, processor = load(str(self.model), dtype=getattr(torch, dtype))
        if self.family == "qwen2_5":
            processor.image_processor.size["longest_edge"] = MOST_PIXELS
        return model, processor


# What is measured of one program shares a model, which takes seconds to fill; memory holds one.
@lru_cache(maxsize=1)
def _subject(source: Source, dtype: str) -> Subject:
    return source.create(dtype)


def with_tower(shape: Shape, family: str) -> Shape:
    """A shape with the layers of the family's vision tower, which is as wide beside the decoder as there."""
    layers, head = TOWERS[family]
    # 16 heads beside 4096 in LLaVA-1.5, and beside 3584 in Qwen2.5-VL-7B.
    return shape._replace(tower_layers=layers, tower_hidden=head * max(1, round(shape.hidden / 256)))


def family_of(directory: Path) -> str:
    """The family of a checkpoint. Raises ValueError for one that the programs cannot read."""
    model, processor = load(directory)
    kind = model.config.model_type
    found = [name for name, kinds in release.pipeline.FAMILIES.items() if kind in kinds]
    if not found:
        raise ValueError(f"expected a model_type of {list(release.pipeline.FAMILIES.values())}, got {kind!r}")
    config = model.config
    if found == ["llava"]:
        ids = processor(images=[noise(llava.SIDE)], text=["<image>"], return_tensors="pt")["input_ids"][0]
        got = config.image_token_id, int((ids == config.image_token_id).sum())
        if got != (llava.IMAGE_TOKEN, llava.TOKENS):
            raise ValueError(
                f"the programs take the image token {llava.IMAGE_TOKEN} and {llava.TOKENS} of them an image for "
                f"granted, got {got[0]} and {got[1]}"
            )
    else:
        marks = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
        expected = [config.vision_start_token_id, config.vision_end_token_id]
        if marks != expected:
            raise ValueError(
                f"the release looks for <|vision_start|> and <|vision_end|>, in the config {expected}, got {marks}"
            )
    return found[0]


def images(sizes: tuple[tuple[int, int], ...]) -> list[Image.Image]:
    return [noise(max(size), seed).resize(size) for seed, size in enumerate(sizes)]


def of_release(program: ModuleType, subject: Subject, image: Image.Image, version: str, new_tokens: int) -> Runs:
    """`carve` of both."""
    layers = list(replace(Preset.release(), layers="paper").layers_of(subject.depth))
    options = {"family": subject.family, "version": version, "layers": layers, "max_new_tokens": new_tokens}
    return {
        THEIRS: lambda: program.carve(subject.eager, subject.adapted, image, QUESTION, **options),
        OURS: lambda: release.carve(subject.model, subject.processor, image, QUESTION, **options),
    }


def of_map(program: ModuleType, subject: Subject, image: Image.Image) -> Runs:
    """The map of relative attention and its box, by both."""
    layer = _layer(program, subject)
    texts = QUESTION, vicrop.GENERAL_QUESTION
    prompts = [f"<image>\nUSER: {text} {ANSWER_SUFFIX}\nASSISTANT:" for text in texts]

    def theirs() -> tuple[Any, tuple[int, ...]]:
        found = program.llava_methods.rel_attention_llava(image, *prompts, subject.eager, subject.adapted)
        return found, program.bbox_from_att_image_adaptive(found, image.size)

    def ours() -> tuple[Any, tuple[int, ...]]:
        found = vicrop.rel_attention_llava(image, *prompts, subject.model, subject.processor, layer=layer)
        return found, vicrop.bbox_from_att_image_adaptive(found, image.size)

    return {THEIRS: theirs, OURS: ours}


def of_answers(program: ModuleType, subject: Subject, file: Path) -> Runs:
    """`vicrop_qa` with relative attention, of both."""
    layer = _layer(program, subject)
    names = "llava", "rel_att", str(file), QUESTION
    return {
        THEIRS: lambda: program.vicrop_qa(*names, subject.eager, subject.adapted, QUESTION),
        OURS: lambda: vicrop.vicrop_qa(*names, subject.model, subject.processor, QUESTION, layer=layer),
    }


def _layer(program: ModuleType, subject: Subject) -> int:
    """The layer of the map, a hyperparameter of the program: 14 where the model has it."""
    layer = 14 if subject.depth > 14 else subject.depth // 2
    program.llava_methods.ATT_LAYER = layer
    return layer


class Peak(NamedTuple):
    """Bytes above those before the call (mostly the weights)."""

    tensors: int
    resident: int


def peak_of(what: str, who: str, folder: Path, source: Source, dtype: str, new_tokens: int) -> Peak:
    """The peak of one call about the last image, by the program or by ours."""
    given = {**asdict(source), "shape": source.shape._asdict()}
    task = {"what": what, "who": who, "folder": str(folder), "source": given, "dtype": dtype, "new_tokens": new_tokens}
    return Peak(**in_fresh_process("benchmarks.support.frontends", task))


def measure_here(task: dict[str, Any]) -> Peak:
    """The peak of one call in this process."""
    given = task["source"]
    subject = Source(given["family"], Shape(**given["shape"]), given["model"]).subject(task["dtype"])
    folder = Path(task["folder"])
    if task["what"] == RELEASE:
        image = images(SIZES[subject.family])[-1]
        runs = of_release(programs.release(folder), subject, image, "v4", task["new_tokens"])
    elif task["what"] == MAP:
        runs = of_map(programs.vicrop(folder), subject, images(LARGE)[-1])
    else:
        with tempfile.TemporaryDirectory() as place:
            file = Path(place, "image.png")
            images(LARGE)[-1].save(file)
            return _peak(of_answers(programs.vicrop(folder), subject, file)[task["who"]])
    return _peak(runs[task["who"]])


def _peak(run: Callable[[], Any]) -> Peak:
    # In this order, since libraries load some parts in the first call.
    tensors = peak_of_tensors(run)
    return Peak(tensors, peak_resident(run))


if __name__ == "__main__":
    print(json.dumps(measure_here(json.loads(sys.argv[1]))._asdict()))
