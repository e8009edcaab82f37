"""What the session tests share: models, inputs, and what eager `output_attentions` says of the same generation."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from carve_kernels import Preset
from carve_kernels.hf.inputs import build_prompt, prepare
from carve_kernels.hf.model import attention_modules
from tests.support.tiny_models import inputs_for, make_image, tiny_llava, tiny_qwen2_5_vl, tiny_qwen2_vl

FAMILIES = {"llava": tiny_llava, "qwen2_5_vl": tiny_qwen2_5_vl, "qwen2_vl": tiny_qwen2_vl}
TEXTS = ["what digit is red", "where is the square at the left of the image", "hello"]
IMAGES = [make_image(120, 80, 1), make_image(90, 140, 2), make_image(100, 100, 3)]
STEPS = 5


@functools.cache
def family(name: str) -> tuple[Any, Any]:
    """A model that all tests of a process share; they must leave it as it was."""
    model, processor = FAMILIES[name]()
    # transformers puts hooks and notes of its own on a model that runs for the first time.
    generate(model, inputs_for(processor, IMAGES[:1], TEXTS[:1]), steps=1, cache_implementation="static")
    return model, processor


@functools.cache
def inputs_of(name: str, batch: int) -> Any:
    return inputs_for(family(name)[1], IMAGES[:batch], TEXTS[:batch])


FORMATS = ["jpg", "png", "webp", "tiff", "mpo", *(["avif"] if ".avif" in Image.registered_extensions() else [])]


def tagged_photo(path: Path, orientation: int, size: tuple[int, int] = (120, 80)) -> Path:
    """Write an image whose file says that it is to be turned; the suffix says in which format."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    more: dict[str, Any] = {"save_all": True, "append_images": [make_image(*size, 9)]} if path.suffix == ".mpo" else {}
    make_image(*size).save(path, exif=exif, **more)
    return path


def visual(model: Any, inputs: Any) -> list[torch.Tensor]:
    """The columns of the image tokens of each row, found without the package."""
    return [(row == model.config.image_token_id).nonzero()[:, 0] for row in inputs["input_ids"]]


def generate(model: Any, inputs: Any, steps: int = STEPS, **options: Any) -> Any:
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )


def own_generate(model: Any) -> None:
    """Give a model a generate of its own, which is the one it had: its prompts are looked at one by one."""

    class Generates(type(model)):  # type: ignore[misc]
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return super().generate(*args, **kwargs)

    model.__class__ = Generates


def in_eager(name: str) -> Any:
    """A model with the same weights that attends by eager; built again, since a copy may run parts of its original."""
    model, _ = FAMILIES[name]()
    model.set_attn_implementation({"text_config": "eager"})
    return model


@functools.cache
def eager(name: str, batch: int, cache: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences, and the head means of eager's last rows at the image tokens: [B, L, T, N], zero where padded."""
    model, inputs = in_eager(name), inputs_of(name, batch)
    output = generate(model, inputs, output_attentions=True, cache_implementation=cache)
    columns = visual(model, inputs)
    maps = torch.zeros(batch, 4, STEPS, max(map(len, columns)))
    for step, layers in enumerate(output.attentions):
        for layer, attention in enumerate(layers):
            for row in range(batch):
                maps[row, layer, step, : len(columns[row])] = attention[row, :, -1, columns[row]].mean(0)
    return output.sequences, maps


@functools.cache
def exact(name: str, batch: int) -> torch.Tensor:
    """The same maps in float64: each prompt alone, without padding, its answer behind it in one forward."""
    model = in_eager(name).double()
    answers = eager(name, batch, "dynamic")[0][:, -STEPS:]
    maps = torch.zeros(batch, 4, STEPS, eager(name, batch, "dynamic")[1].shape[-1], dtype=torch.float64)
    for row in range(batch):
        alone = inputs_for(family(name)[1], IMAGES[row : row + 1], TEXTS[row : row + 1])
        alone["pixel_values"] = alone["pixel_values"].double()
        length = alone["input_ids"].shape[1]
        alone["input_ids"] = torch.cat([alone["input_ids"], answers[row : row + 1, :-1]], 1)
        for key in ("attention_mask", "mm_token_type_ids"):
            if key in alone:
                fill = torch.full((1, STEPS - 1), int(key == "attention_mask"))
                alone[key] = torch.cat([alone[key], fill], 1)
        with torch.no_grad():
            attentions = model(**alone, output_attentions=True).attentions
        columns = visual(model, alone)[0]
        for layer, attention in enumerate(attentions):
            maps[row, layer, :, : len(columns)] = attention[0, :, length - 1 :][..., columns].mean(0)
    return maps


def state(model: Any) -> Any:
    """All that a session might leave behind."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modeling = {sys.modules[type(module).__module__] for module in attention_modules(model).values()}
    return (
        {(name, key) for name, module in model.named_modules() for key in module.__dict__},
        {(name, len(module._forward_pre_hooks), len(module._forward_hooks)) for name, module in model.named_modules()},
        model.config._attn_implementation,
        model.config.text_config._attn_implementation,
        model.config.vision_config._attn_implementation,
        dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
        {module.__name__: module.eager_attention_forward for module in modeling},
        dict(model.generation_config.to_dict()),
    )


def as_written_in(path: str, function: Any) -> Any:
    """A function that is taken for one of another module, which it says that it is a part of."""
    code, inside = function.__code__, {**function.__globals__, "__name__": path}
    written = types.FunctionType(code, inside, function.__name__, function.__defaults__, function.__closure__)
    written.__kwdefaults__ = function.__kwdefaults__
    return written


@contextmanager
def watched(module: Any, before: Any = None, after: Any = None) -> Iterator[None]:
    """Call `before(args, kwargs)` and `after(args, kwargs)` at each forward of a module, by way of its class.

    A hook would be seen, or a function of this file: an engine entries one by one at a model that has them.
    """
    kind = type(module)
    forward, own = kind.forward, "forward" in kind.__dict__

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not module:
            return forward(self, *args, **kwargs)
        if before is not None:
            before(args, kwargs)
        output = forward(self, *args, **kwargs)
        if after is not None:
            after(args, kwargs)
        return output

    kind.forward = functools.wraps(forward)(as_written_in(kind.__module__, watching))
    try:
        yield
    finally:
        if own:
            kind.forward = forward
        else:
            del kind.forward


def keeps_features(model: Any) -> bool:
    """Whether this transformers takes what a vision tower gave before, so that an image images twice is seen once."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def greedy(name: str, images: list[Image.Image], text: str, preset: Preset) -> list[int]:
    """The new tokens of `model.generate`, with nothing of the engine around it."""
    model, processor = family(name)
    inputs = prepare(processor, images, build_prompt(processor, text, len(images)), None, preset.max_pixels)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=preset.max_new_tokens)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()
