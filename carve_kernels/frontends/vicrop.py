"""The names of ViCrop's program (mllms_know), on this package: relative attention, its box, the answer about both.

Its `utils`, `llava_methods` and `run` become this module; docs/frontends.md lists what is equal and what is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from carve_kernels import checks
from carve_kernels.arrays import as_array
from carve_kernels.frontends.second_answer import has_beams, second_answer
from carve_kernels.hf import names, processors
from carve_kernels.hf.attention_patch import INSTEAD, patched
from carve_kernels.hf.decoding import Branch, Decoder, PromptGroup, exclusive
from carve_kernels.hf.decoding.generation import preserved_positions
from carve_kernels.hf.engine.requests import Prompt, locate_prompt
from carve_kernels.hf.image_inputs import ImageFeatures, ImageInputs
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.hf.model import (
    attention_modules,
    check_decoder,
    check_steady,
    layer_window,
    tensor_parallel_group,
    unwrap,
)
from carve_kernels.hf.session import contract
from carve_kernels.ops.capture import capture
from carve_kernels.types import RowsSpec, VisualLayout

Array = NDArray[Any]
MapFunction = Callable[[Image.Image, str, str, Any, Any], Array]
Pixels = tuple[int, int, int, int]
Located = tuple[Prompt, ImageFeatures]

RATIOS = (1, 1.2, 1.4, 1.6, 1.8, 2)
"""The sides of the windows, as multiples of `bbox_size`."""

GENERAL_QUESTION = "Write a general description of the image."
MOST_TOKENS = 20
ANSWER_SUFFIX = "Answer the question using a single word or phrase."


class Family(NamedTuple):
    """A model_name: its model types, the layer of its maps and the side of its smallest box."""

    model_types: tuple[str, ...]
    layer: int
    bbox_size: int


FAMILIES = {"llava": Family(("llava",), 14, 336), "qwen2_5": Family(("qwen2_5_vl",), 22, 224)}

METHODS = ("rel_att", "rel_att_high", "grad_att", "grad_att_high")


def bbox_from_att_image_adaptive(att_map: Array, image_size: tuple[int, int], bbox_size: int = 336) -> Pixels:
    """The box, x0 y0 x1 y1, of the window with the largest sum whose neighbours have the least.

    ==========  =======================================================================================================
    att_map     a map [rows, columns] of the whole image
    image_size  (width, height)
    bbox_size   the side of the smallest window in pixels; others are up to twice as large, see RATIOS
    ==========  =======================================================================================================

    At each ratio the window with the largest sum competes by (sum - mean of the sums of the windows one token beside
    it) / tokens. Among equal windows the first column wins, then the first row; among equal ratios the smallest. A
    window that holds all tokens has no neighbours: at ratio 1 the whole image is returned, larger ones do not compete.

    Raises TypeError or ValueError for a map that is not finite, and for a window that is smaller than a token.
    """
    values = as_array("att_map", att_map)
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ValueError(f"att_map: expected finite numbers [rows, columns], got {checks.describe(att_map)}")
    width, height = _sides("image_size", image_size)
    smallest = checks.integer("bbox_size", bbox_size, low=1)
    rows, columns = values.shape
    token = width / columns, height / rows
    best: tuple[float, float, tuple[int, int], tuple[int, int]] | None = None
    for ratio in RATIOS:
        across = min(int(smallest * ratio / token[0]), columns)
        down = min(int(smallest * ratio / token[1]), rows)
        if not across or not down:
            raise ValueError(
                f"bbox_size: expected at least the {math.ceil(max(token))} pixels of a token, got {smallest}; split "
                "the image, as high_res does"
            )
        if (across, down) == (columns, rows):
            break
        place, sharpness = _sharpest(values, across, down)
        if best is None or sharpness > best[0]:
            best = sharpness, ratio, place, (across, down)
    if best is None:
        return 0, 0, width, height
    _, ratio, place, count = best
    half = smallest * ratio // 2
    edges = []
    for axis, side in enumerate((width, height)):
        centre = int(place[axis] * token[axis] + token[axis] * count[axis] / 2)
        kept = min(max(centre, half), side - half)
        edges.append((int(max(0, kept - half)), int(min(side, kept + half))))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def high_res_split_threshold(image: Image.Image, res_threshold: int = 1024) -> tuple[list[Image.Image], int, int]:
    """The parts of an image by rows, the number of rows and the number of parts in each.

    There are so many rows that none is higher than `res_threshold`, and about as many parts in each as make them
    square, at least one. Parts have one size; what is beyond the image is black.
    """
    _check_image(image)
    rows = math.ceil(image.height / checks.integer("res_threshold", res_threshold, low=1))
    columns = max(1, int(rows * image.width / image.height))
    across, down = math.ceil(image.width / columns), math.ceil(image.height / rows)
    parts = [
        image.crop((column * across, row * down, (column + 1) * across, (row + 1) * down))
        for row in range(rows)
        for column in range(columns)
    ]
    return parts, rows, columns


def high_res(
    map_func: MapFunction, image: Image.Image, prompt: str, general_prompt: str, model: Any, processor: Any
) -> Array:
    """The maps of the parts of an image, by `map_func` with the other arguments, side by side."""
    if not callable(map_func):
        raise TypeError(f"map_func: expected a function, got {checks.describe(map_func)}")
    parts, rows, columns = high_res_split_threshold(image)
    maps = [map_func(part, prompt, general_prompt, model, processor) for part in parts]
    return np.block([maps[row * columns : (row + 1) * columns] for row in range(rows)])


def rel_attention_llava(
    image: Image.Image,
    prompt: str,
    general_prompt: str,
    model: Any,
    processor: Any,
    *,
    layer: int = FAMILIES["llava"].layer,
) -> Array:
    """The map of a prompt divided by that of a general one, float32 [rows, columns], as ViCrop's for LLaVA-1.5.

    Both are attention of the last token of the prompt, averaged over the heads of one layer; both prompts hold an
    image token. Of an image that is not square, the processor shows the middle: the map has tokens of 0 beside it, so
    that it is one of the whole image. 0 / 0 is 0.

    Raises TypeError or ValueError, before the model runs, for another model_type, a layer without softmax attention,
    and a prompt without the image; and for a general map of 0 where the other is not.
    """
    return _relative("llava", image, (prompt, general_prompt), model, processor, layer)


def rel_attention_qwen2_5(
    image: Image.Image,
    prompt: str,
    general_prompt: str,
    model: Any,
    processor: Any,
    *,
    layer: int = FAMILIES["qwen2_5"].layer,
) -> Array:
    """The same for Qwen2.5-VL, whose prompts are texts that the chat template puts behind the image."""
    checks.text("prompt", prompt)
    checks.text("general_prompt", general_prompt)
    prompts = build_prompt(processor, prompt, 1), build_prompt(processor, general_prompt, 1)
    return _relative("qwen2_5", image, prompts, model, processor, layer)


def gradient_attention_llava(
    image: Image.Image,
    prompt: str,
    general_prompt: str,
    model: Any,
    processor: Any,
    *,
    layer: int = FAMILIES["llava"].layer,
) -> Array:
    """The map of a prompt weighted by its gradient, float32 [rows, columns], as ViCrop's for LLaVA-1.5.

    Attention of the last token of the prompt at one layer, times the positive part of the gradient by it of the
    log-probability of the likeliest next token, averaged over the heads. `general_prompt` is not used, as in ViCrop.
    The implementation of the attention must be differentiable; the map is one of the whole image, and errors are as of
    `rel_attention_llava`.
    """
    return _gradient("llava", image, prompt, model, processor, layer)


def gradient_attention_qwen2_5(
    image: Image.Image,
    prompt: str,
    general_prompt: str,
    model: Any,
    processor: Any,
    *,
    layer: int = FAMILIES["qwen2_5"].layer,
) -> Array:
    """The same for Qwen2.5-VL, whose prompts are texts that the chat template puts behind the image."""
    checks.text("prompt", prompt)
    return _gradient("qwen2_5", image, build_prompt(processor, prompt, 1), model, processor, layer)


def vicrop_qa(
    model_name: str,
    method_name: str,
    image_path: Any,
    question: str,
    model: Any,
    processor: Any,
    short_question: str,
    *,
    layer: int | None = None,
) -> tuple[str, str, Pixels]:
    """The answer about an image, the answer about it and its part that the question is about, and the box of that.

    ==============  ===================================================================================================
    model_name      "llava" or "qwen2_5"
    method_name     "rel_att" or "grad_att"; "rel_att_high" or "grad_att_high" split the image by `high_res`
    image_path      a file, as `PIL.Image.open` takes it
    short_question  the question for the map
    layer           None: 14 for "llava", 22 for "qwen2_5"
    ==============  ===================================================================================================

    Answers are at most 20 tokens of the model's own `generate`, without sampling. Raises TypeError or ValueError,
    before the model runs, for an argument of the wrong kind.
    """
    checks.choice("model_name", model_name, tuple(FAMILIES))
    checks.choice("method_name", method_name, METHODS)
    checks.text("question", question)
    checks.text("short_question", short_question)
    family = FAMILIES[model_name]
    number = _check_model(model_name, model, processor, family.layer if layer is None else layer)
    # Pillow opens files that are open as well.
    source = image_path if hasattr(image_path, "read") else checks.path("image_path", image_path)
    with Image.open(source) as opened:
        image = _plain(opened)
    texts = {"question": question, "short_question": short_question, "general_question": GENERAL_QUESTION}
    prompts = {name: _whole_prompt(model_name, processor, text, 1) for name, text in texts.items()}
    image_inputs = ImageInputs.for_model(model, processor, None)
    with exclusive(model):
        asked, *of_map = _located(image, prompts, model, processor, image_inputs)
        groups: dict[tuple[int, ...], PromptGroup] = {}
        answer = _branch(groups, asked, MOST_TOKENS, None)
        # In one batch with the answer, whose prompt begins as theirs.
        branches = [_branch(groups, prompt, 0, "last") for prompt in of_map] if method_name == "rel_att" else []
        if has_beams(model):
            answer.ids = _generated(model, asked)
            groups[asked[0].prefix_ids].branches.remove(answer)
        Decoder(model, processor, (number,), "auto").decode([group for group in groups.values() if group.branches])
        if branches:
            att_map = _ratio(branches, number)
        else:
            att_map = _of_method(model_name, method_name, image, short_question, model, processor, number)
        bbox = bbox_from_att_image_adaptive(att_map, image.size, family.bbox_size)
        both = second_answer(
            model, processor, image_inputs, (image, image.crop(bbox)),
            _whole_prompt(model_name, processor, question, 2), MOST_TOKENS,
            group=groups[asked[0].prefix_ids], first=asked[0],
        )  # fmt: skip
        return _text(processor, list(answer.ids)), _text(processor, both), bbox


_MAPS: dict[tuple[str, str], Callable[..., Array]] = {
    ("llava", "rel_att"): rel_attention_llava,
    ("llava", "grad_att"): gradient_attention_llava,
    ("qwen2_5", "rel_att"): rel_attention_qwen2_5,
    ("qwen2_5", "grad_att"): gradient_attention_qwen2_5,
}


def _sharpest(values: Array, across: int, down: int) -> tuple[tuple[int, int], float]:
    """The place (column, row) of the window of so many tokens with the largest sum, and how far it is above others."""
    sums = np.empty((values.shape[0] - down + 1, values.shape[1] - across + 1))
    # Each by itself: other ways to sum round otherwise, which decides between equal windows.
    for row, column in np.ndindex(sums.shape):
        sums[row, column] = values[row : row + down, column : column + across].sum()
    column, row = np.unravel_index(int(sums.T.argmax()), sums.T.shape)
    beside = [(row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column)]
    neighbours = [sums[y, x] for y, x in beside if 0 <= y < sums.shape[0] and 0 <= x < sums.shape[1]]
    return (int(column), int(row)), float((sums[row, column] - np.mean(neighbours)) / (across * down))


def _sides(name: str, size: Any) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"{name}: expected (width, height), got {checks.describe(size)}")
    width, height = (checks.integer(f"{name}[{axis}]", side, low=1) for axis, side in enumerate(size))
    return width, height


def _check_image(image: Any) -> None:
    if not isinstance(image, Image.Image):
        raise TypeError(f"image: expected a PIL image, got {checks.describe(image)}")


def _relative(
    model_name: str, image: Image.Image, prompts: tuple[str, str], model: Any, processor: Any, layer: int
) -> Array:
    _check_image(image)
    number = _check_model(model_name, model, processor, layer)
    named = dict(zip(("prompt", "general_prompt"), prompts, strict=True))
    located = _located(_plain(image), named, model, processor, ImageInputs.for_model(model, processor, None))
    groups: dict[tuple[int, ...], PromptGroup] = {}
    branches = [_branch(groups, prompt, 0, "last") for prompt in located]
    with exclusive(model):
        Decoder(model, processor, (number,), "auto").decode(list(groups.values()))
    return _ratio(branches, layer)


def _branch(groups: dict[tuple[int, ...], PromptGroup], located: Located, steps: int, rows: RowsSpec | None) -> Branch:
    """A branch of the group of prompts that begin as this one; without new tokens its forward ends after the layer."""
    prompt, features = located
    group = groups.setdefault(prompt.prefix_ids, PromptGroup(features, prompt.prefix_length, prompt.layout))
    group.branches.append(Branch(prompt.inputs, steps, rows))
    return group.branches[-1]


def _ratio(branches: Sequence[Branch], layer: int) -> Array:
    """The map of the first branch over that of the second, of the whole image."""
    for branch in branches:
        if not bool(branch.maps.whole().all()):
            raise ValueError(f"layer: expected one whose last row sees all tokens of the image, got {layer}")
    task, general = (branch.maps.values[0, 0, 0, 0].cpu().numpy() for branch in branches)
    if (general[task > 0] == 0).any():
        raise ValueError("general_prompt: expected attention to each token that the prompt looks at, got 0")
    ratio = np.divide(task, general, out=np.zeros_like(task), where=general > 0)
    layout = branches[0].maps.layout
    if layout is None:
        raise ValueError("processor: expected one whose image tokens have a known place in the image")
    return _on_whole_image(ratio, layout)


def _of_method(
    model_name: str, method_name: str, image: Image.Image, question: str, model: Any, processor: Any, layer: int
) -> Array:
    """The map of an image by a method that needs forwards of its own."""
    of_method = _MAPS[model_name, method_name.removesuffix("_high")]

    def map_func(part: Image.Image, prompt: str, general_prompt: str, model: Any, processor: Any) -> Array:
        return of_method(part, prompt, general_prompt, model, processor, layer=layer)

    prompts = _prompt(model_name, question), _prompt(model_name, GENERAL_QUESTION)
    if method_name.endswith("_high"):
        return high_res(map_func, image, *prompts, model, processor)
    return map_func(image, *prompts, model, processor)


def _gradient(model_name: str, image: Image.Image, prompt: str, model: Any, processor: Any, layer: int) -> Array:
    _check_image(image)
    number = _check_model(model_name, model, processor, layer)
    if layer_window(model, number) is not False:
        raise ValueError(f"layer: expected one whose last row sees every token, got {layer}, which has a window")
    module = attention_modules(model)[number]
    if tensor_parallel_group(module) is not None:
        raise ValueError("model: expected whole layers, got one whose heads are divided among processes")
    with exclusive(model), torch.inference_mode(False), preserved_positions(unwrap(model)):
        image_inputs = ImageInputs.for_model(model, processor, None)
        [(located, features)] = _located(_plain(image), {"prompt": prompt}, model, processor, image_inputs)
        inputs = {**located.inputs, **features.entries}
        weighted = _weighted_by_gradient(unwrap(model), inputs, number, module, located.layout.tokens())
    return _on_whole_image(weighted.cpu().numpy(), located.layout)


def _weighted_by_gradient(
    model: Any, inputs: dict[str, Any], layer: int, module: Any, tokens: torch.Tensor
) -> torch.Tensor:
    """The last row's attention times the positive part of its gradient, averaged over the heads, float32 [N].

    The gradient of a probability is that of its head's output times the value: no attention of all rows is needed.
    """
    calls: list[tuple[torch.Tensor, ...]] = []

    def attend(attention: Any, module: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            output, *others = attention(module, query, key, value, *args, **options)
            columns = tokens.to(query.device)
            row = query[:, :, -1:]
            scale = names.attention_options(query, options).scale
            maps = capture(row, key, columns, scale=scale, heads="each").maps[:, :, 0]
        # The graph begins here: neither the layers before nor the vision tower keep anything.
        torch.set_grad_enabled(True)
        output = output.detach().requires_grad_()
        calls.append((output, value[:, :, columns[0].long()], maps))
        return output, *others

    with ExitStack() as stack:
        stack.callback(vars(module).pop, INSTEAD, None)
        setattr(module, INSTEAD, attend)
        stack.enter_context(patched(*names.attention_entry(module, layer)))
        stack.enter_context(torch.no_grad())
        last = names.logits_of(model, torch.tensor([-1], device=tokens.device))
        logits = model(**inputs, use_cache=False, **last).logits[:, -1].float()
        [(output, value, maps)] = calls
        [gradient] = torch.autograd.grad(logits.log_softmax(-1).max(), output)
    value = value.repeat_interleave(maps.shape[1] // value.shape[1], 1)
    of_maps = torch.einsum("bad,band->ban", gradient[:, -1].float(), value.float())
    weighted: torch.Tensor = (maps * of_maps.relu()).mean(1)[0]
    return weighted


def _located(
    image: Image.Image, prompts: dict[str, str], model: Any, processor: Any, image_inputs: ImageInputs
) -> list[Located]:
    """Prompts about an image, by the names of their arguments, and what the processor returned for the image."""
    for name, text in prompts.items():
        if (count := checks.text(name, text).count(processor.image_token)) != 1:
            raise ValueError(
                f"{name}: expected {processor.image_token!r} once, where the image is, got it {count} times"
            )
    found = []
    for text in prompts.values():
        inputs, features = image_inputs.inputs([image], text)
        found.append((locate_prompt(model, processor, [image], text, inputs, features), features))
    if any(len(prompt.layout.views[0]) != 1 for prompt, _ in found):
        raise ValueError("processor: expected one that shows an image as one grid of tokens, got several")
    return found


def _plain(image: Image.Image) -> Image.Image:
    """In RGB, without the entries of its file, whose orientation ViCrop does not apply."""
    return Image.fromarray(np.asarray(image.convert("RGB")))


def _on_whole_image(values: Array, layout: VisualLayout) -> Array:
    """A map on the grid of its view, made one of the whole image.

    Parts of the image that the view does not show are tokens of 0; those of the view that are outside of it are left
    out.
    """
    [[view]], [[sides]] = layout.views, layout.sizes
    found = values.reshape(view.grid)
    for axis, (low, high) in enumerate(((view.box[1], view.box[3]), (view.box[0], view.box[2]))):
        token = (high - low) / view.grid[axis]
        before, after = round(low / token), round((sides[axis] - high) / token)
        found = found.take(range(max(0, -before), view.grid[axis] - max(0, -after)), axis)
        beside = [(0, 0), (0, 0)]
        beside[axis] = max(0, before), max(0, after)
        found = np.pad(found, beside)
    return found


def _check_model(model_name: str, model: Any, processor: Any, layer: int) -> int:
    """The number of a layer, counted from 0, of a model that must be of the family."""
    contract.ensure()
    check_decoder(model)
    check_steady(model)
    processors.check(processor)
    kind, expected = unwrap(model).config.model_type, FAMILIES[model_name].model_types
    if kind not in expected:
        raise ValueError(f"model: expected the model_type {expected[0]!r} for {model_name}, got {kind!r}")
    having = attention_modules(model)
    number = checks.integer("layer", layer)
    if number not in having:
        raise ValueError(f"layer: expected the number of a layer with softmax attention, {list(having)}, got {number}")
    return number


def _prompt(model_name: str, question: str) -> str:
    text = f"{question} {ANSWER_SUFFIX}"
    return f"<image>\nUSER: {text}\nASSISTANT:" if model_name == "llava" else text


def _whole_prompt(model_name: str, processor: Any, question: str, images: int) -> str:
    """A prompt about so many images, as the processor takes it."""
    prompt = _prompt(model_name, question)
    return "<image>" * (images - 1) + prompt if model_name == "llava" else build_prompt(processor, prompt, images)


def _generated(model: Any, located: Located) -> tuple[int, ...]:
    """The new tokens of the model's own `generate`."""
    prompt, features = located
    with torch.no_grad(), preserved_positions(unwrap(model)):
        inner: Any = unwrap(model)
        ids = inner.generate(**{**prompt.inputs, **features.entries}, max_new_tokens=MOST_TOKENS, do_sample=False)
    return tuple(ids[0, prompt.inputs["input_ids"].shape[1] :].tolist())


def _text(processor: Any, new: list[int]) -> str:
    [text] = processor.batch_decode([new], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    answer: str = text.strip()
    return answer
