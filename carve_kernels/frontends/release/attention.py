"""Maps of every layer and step of a greedy answer, and their contrast on the pixels of the image, as the release's."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from carve_kernels import checks
from carve_kernels.arrays import as_array
from carve_kernels.hf import processors
from carve_kernels.hf.decoding.sequential import greedy_generate
from carve_kernels.hf.model import attention_modules, check_decoder, decoder_layers, image_token_positions, unwrap
from carve_kernels.hf.session import capture_attention
from carve_kernels.maps import AttentionMaps
from carve_kernels.ops.contrast import contrast
from carve_kernels.presets import Preset
from carve_kernels.types import Size

Array = NDArray[Any]
StepMaps = list[list[Array]]
"""Maps float32 [N] by step and layer."""

GENERAL_INSTRUCTION = Preset.release().general_prompt
DEFAULT_LAYERS = list(range(20, 26))
STEP_MODES = ("first", "all")


def generate_with_attention(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int = 32,
    vision_start_token_id: int | None = None,
    vision_end_token_id: int | None = None,
    num_image_tokens: int = 576,
) -> dict[str, Any]:
    """The greedy answer to one prompt, with the attention of each new token to the image in every layer.

    =====================  ============================================================================================
    inputs                 what the processor returned for one prompt
    max_new_tokens         at most so many argmax tokens, until the tokenizer's end token
    vision_start_token_id  with an end: the columns between their first occurrences. Without an end: the columns that
                           hold this token, at most `num_image_tokens`. None, or no such token in the prompt: the image
                           tokens by the model's config
    =====================  ============================================================================================

    Returns "generated_text"; "all_attention_maps", float32 [N] by step and layer; "vision_token_positions", the first
    column and the one after the last. The prompt is read once, with the model's own attention implementation.

    Raises ValueError for several prompts, for one without image tokens, and for a model with layers that have no
    softmax attention.
    """
    steps = checks.integer("max_new_tokens", max_new_tokens, low=1)
    checks.integer("num_image_tokens", num_image_tokens, low=1)
    for name, token in (("start", vision_start_token_id), ("end", vision_end_token_id)):
        if token is not None:
            checks.integer(f"vision_{name}_token_id", token, low=0)
    rows = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(rows, torch.Tensor):
        raise TypeError(f"inputs: expected what the processor returned, with input_ids, got {checks.describe(inputs)}")
    checks.tensor("inputs['input_ids']", rows, shape=("B", "S"), dtypes=(torch.int64, torch.int32))
    if rows.shape[0] != 1:
        raise ValueError(f"inputs: expected one prompt, got {rows.shape[0]}")
    check_decoder(model)
    processors.check(processor)
    every_layer(model)
    start, stop = _columns(model, rows, vision_start_token_id, vision_end_token_id, num_image_tokens)
    end = processor.tokenizer.eos_token_id
    twin = argmax_twin(model, end)
    with capture_attention(twin, layers="all", tokens=list(range(start, stop)), max_steps=steps) as session:
        new = greedy_generate(twin, dict(inputs), steps).tolist()
    return {
        "generated_text": answer_text(processor, new),
        "all_attention_maps": by_step(session.maps),
        "vision_token_positions": (start, stop),
    }


def dynamic_reshape_attention(att: Array, fallback_shape: Any = None) -> tuple[Any, Any]:
    """A map [N] on its grid, and the grid: `fallback_shape`, or without one a square; (None, None) if it is neither.

    A map of at most one token has no grid. Raises ValueError for a `fallback_shape` that does not hold the N tokens.
    """
    values = as_array("att", att)
    count = int(values.size)
    if count <= 1:
        return None, None
    grid = _grid("fallback_shape", count, fallback_shape)
    return (None, None) if grid is None else (values.reshape(grid), grid)


def fuse_contrastive_attention(
    query_maps: Sequence[Sequence[Array]],
    general_maps: Sequence[Sequence[Array]],
    image_size: tuple[int, int],
    *,
    layers: Sequence[int] = DEFAULT_LAYERS,
    lam: float = 1e-8,
    output_shape: Any = None,
    step_mode: str = "all",
) -> Array:
    """The sum over steps and layers of step weight * query / (general + lam), float64 [height, width].

    ============  =====================================================================================================
    query_maps    maps [N] by step and layer, as `generate_with_attention` returns them; also `general_maps`
    image_size    (width, height)
    layers        numbers; those beyond the model are skipped
    output_shape  the grid of the N tokens, (rows, columns); None: a square
    step_mode     "all": step t of both answers, up to the shorter one, with weight t + 1; "first": step 0
    ============  =====================================================================================================

    Raises ValueError if no layer or no step is left, and for a grid that does not hold the tokens.
    """
    checks.choice("step_mode", step_mode, STEP_MODES)
    width, height = checks.numbers("image_size", image_size, ("width", "height"), partial(checks.integer, low=1))
    checks.number("lam", lam, low=0)
    for name, maps in (("query_maps", query_maps), ("general_maps", general_maps)):
        if not _is_list(maps) or not all(map(_is_list, maps)):
            raise TypeError(f"{name}: expected a list of steps, each a list of maps [N], got {checks.describe(maps)}")
    steps = min(len(query_maps), len(general_maps))
    if not steps:
        raise ValueError("query_maps, general_maps: expected at least one step, got none")
    used = 1 if step_mode == "first" else steps
    depths = {len(maps) for maps in (*query_maps[:used], *general_maps[:used])}
    if len(depths) > 1:
        raise ValueError(f"query_maps, general_maps: expected as many layers at each step, got {sorted(depths)}")
    chosen = layers_within(layers, depths.pop())
    task, general = (
        _stacked(name, maps[:used], chosen)
        for name, maps in (("query_maps", query_maps), ("general_maps", general_maps))
    )
    if task.shape != general.shape:
        raise ValueError(f"general_maps: expected {task.shape[2]} tokens as in query_maps, got {general.shape[2]}")
    grid = _grid("output_shape", task.shape[2], output_shape) if task.shape[2] > 1 else None
    if grid is None:
        raise ValueError(
            f"output_shape: expected the grid of the {task.shape[2]} tokens, which are not a square, got {output_shape}"
        )
    return contrast(task, general, grid, (height, width), lam=lam).numpy()


def layers_within(layers: Sequence[int], depth: int) -> list[int]:
    """The numbers of layers that a model of so many has, of which there must be one."""
    if not checks.is_many(layers) and not _is_list(layers):
        raise TypeError(f"layers: expected a list of numbers, got {checks.describe(layers)}")
    numbers = [checks.integer(f"layers[{index}]", layer) for index, layer in enumerate(checks.plain(layers))]
    chosen = [layer for layer in numbers if -depth <= layer < depth]
    if not chosen:
        raise ValueError(f"layers: expected numbers below {depth}, the layers of the model, got {numbers}")
    return chosen


def argmax_twin(model: Any, end: int | None) -> Any:
    """A shallow copy of a model, whose `generate` takes the argmax until the token `end`, and does nothing else."""
    twin = copy.copy(unwrap(model))
    twin.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return twin


def every_layer(model: Any) -> tuple[int, ...]:
    """The numbers of all layers, which must all have softmax attention."""
    depth, having = len(decoder_layers(model)), tuple(attention_modules(model))
    if len(having) < depth:
        raise ValueError(f"model: expected softmax attention in all of its {depth} layers, got it in {list(having)}")
    return having


def answer_text(processor: Any, new: Sequence[int]) -> str:
    """The text of new tokens up to the tokenizer's end token."""
    end = processor.tokenizer.eos_token_id
    text: str = processor.tokenizer.decode(list(takewhile(lambda token: token != end, new)), skip_special_tokens=True)
    return text.strip()


def by_step(maps: AttentionMaps) -> StepMaps:
    """Maps of the last row of one prompt, as arrays by step and layer."""
    return [list(step) for step in maps.values[0, :, :, 0].transpose(0, 1).cpu().numpy()]


def _columns(model: Any, ids: torch.Tensor, start: int | None, end: int | None, most: int) -> tuple[int, int]:
    """The columns of the image in a prompt: the first one, and the one after the last."""
    row = ids[0].tolist()
    if start is None or start not in row:
        columns = image_token_positions(model, ids)[0].tolist()
        if not columns:
            raise ValueError(f"inputs: expected a prompt with image tokens, got none among its {len(row)} tokens")
        first, last = columns[0], columns[-1]
        if last - first + 1 != len(columns):
            raise ValueError(
                "inputs: expected the image tokens of one image, one after the other, got other tokens between them; "
                "pass vision_start_token_id and vision_end_token_id"
            )
        return first, last + 1
    first = row.index(start)
    if end is None:
        return first, first + min(most, len(list(takewhile(lambda token: token == start, row[first:]))))
    if end not in row or row.index(end) <= first + 1:
        raise ValueError(
            f"vision_end_token_id: expected a token after vision_start_token_id, {start}, with others between them, "
            f"got {end}"
        )
    return first + 1, row.index(end)


def _grid(name: str, count: int, given: Any) -> Size | None:
    """The grid of so many tokens: the given one, else a square, else None."""
    if given is None:
        side = math.isqrt(count)
        return (side, side) if side * side == count else None
    rows, columns = checks.size(name, checks.plain(given))
    if rows * columns != count:
        raise ValueError(f"{name}: expected the grid of {count} tokens, got {rows} x {columns}")
    return rows, columns


def _is_list(value: Any) -> bool:
    """Whether this is a list, or an array that is one of its items."""
    return isinstance(value, (list, tuple)) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim > 0)


def _stacked(name: str, maps: Sequence[Sequence[Array]], layers: Sequence[int]) -> torch.Tensor:
    """The maps of some layers, float64 [L, T, N]."""
    try:
        stacked = np.stack([[np.asarray(step[layer], dtype=np.float64) for step in maps] for layer in layers])
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected arrays [N] of one length by step and layer ({error})") from error
    if stacked.ndim != 3 or not (np.isfinite(stacked).all() and (stacked >= 0).all()):
        raise ValueError(f"{name}: expected finite maps [N] of at least 0 by step and layer")
    return torch.from_numpy(stacked)
