"""The time of `layout_of` beside that of the processor, by the models and processors of the tests.

Some of these need torchvision, which the other benchmarks hide, so they are measured in a process of their own:
`python -m benchmarks.support.layouts TASK` prints what it found as JSON.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # transformers looks for torchvision once, at its first import.
    if sys.modules.get("torchvision", sys) is None:
        del sys.modules["torchvision"]
    import tests.conftest  # noqa: F401

import json
import time
from typing import Any

import numpy
import torch
from PIL import Image

from benchmarks.support.answers import WrongAnswer
from benchmarks.support.layout_cases import CASES, expected
from benchmarks.support.timing import Run, no_preparation, paired
from carve_kernels import VisualLayout, layout_of
from carve_kernels.hf import names
from carve_kernels.hf.families import family_of
from carve_kernels.hf.inputs import build_prompt
from carve_kernels.types import Size
from tests.support.processors.kinds import pairs
from tests.support.zoo.kinds import build, kinds

PROCESSOR, LAYOUT = "processor", "layout_of"
# Of a box's edges, in cells, as in the tests that measure them.
TOLERANCE = 0.05


def photograph(size: Size) -> Image.Image:
    """An image with another colour everywhere."""
    levels = numpy.random.default_rng(0).integers(0, 256, (size[0] // 40, size[1] // 40, 3), dtype=numpy.uint8)
    return Image.fromarray(levels).resize(size[::-1], Image.Resampling.BICUBIC)


def configured(name: str) -> tuple[Any, Any]:
    """The model and the processor of a case."""
    model, processor = build(pairs()[name].kind)[0], pairs()[name].make()
    for owner, settings in ((model.config, CASES[name].config), (processor, CASES[name].settings)):
        for path, value in settings.items():
            _set(owner, path, value)
    if hasattr(processor, "full_image_sequence"):
        # Made of the number of tokens when it was built.
        tokens = processor.tokenizer.image_token * processor.image_seq_length
        processor.full_image_sequence = f"\n\n{processor.boi_token}{tokens}{processor.tokenizer.eoi_token}\n\n"
    return model, processor


def _set(owner: Any, path: str, value: Any) -> None:
    *outer, name = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    before = getattr(owner, name, None)
    # A size of an image processor has a class of its own.
    is_size = isinstance(value, dict) and before is not None and not isinstance(before, dict)
    setattr(owner, name, type(before)(**value) if is_size else value)


def check(name: str, ids: torch.Tensor, token: int, found: VisualLayout, size: Size) -> None:
    """The views are those of the case, and their tokens all image tokens but newlines, in order."""
    views, parts = found.views[0], list(expected(name, size))
    grids, needed = [view.grid for view in views], [grid for grid, _ in parts]
    if grids != needed:
        raise WrongAnswer(f"{LAYOUT} of {name}: expected grids {needed}, got {grids}")
    for view, (grid, box) in zip(views, parts, strict=True):
        cells = [(box[axis + 2] - box[axis]) / grid[1 - axis] for axis in (0, 1)] * 2
        off = max(abs(edge - other) / cell for edge, other, cell in zip(view.box, box, cells, strict=True))
        if not off <= TOLERANCE:
            raise WrongAnswer(f"{LAYOUT} of {name}: expected the box {box}, got {view.box}, {off:.3f} cells off")
    is_image = ids == token
    tokens = torch.cat([view.tokens for view in views])
    if not bool((tokens[1:] > tokens[:-1]).all()) or not bool(is_image[tokens].all()):
        raise WrongAnswer(f"{LAYOUT} of {name}: expected columns of image tokens in order, got others")
    # Newlines: one a row of all tiles, and a line of HunYuan-VL has two more.
    newlines = int(is_image.sum()) - len(tokens)
    rows = max(grid[0] for grid in grids)
    if newlines not in (0, rows, rows + 2):
        raise WrongAnswer(f"{LAYOUT} of {name}: expected {len(tokens)} image tokens and newlines, got {newlines} more")


def measure_here(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the processor and of `layout_of`, by the clock and of the process, of each family of a task."""
    photo = photograph((task["size"][0], task["size"][1]))
    existing = [name for name in task["names"] if kinds()[pairs()[name].kind].exists()]
    try:
        return {"results": [_measured(name, photo, task["rounds"]) for name in existing]}
    except WrongAnswer as error:
        return {"wrong": str(error)}


def _measured(name: str, photo: Image.Image, rounds: int) -> dict[str, Any]:
    model, processor = configured(name)
    prompt = build_prompt(processor, "what is red")

    def process() -> Any:
        return processor(images=[photo], text=[prompt], return_tensors="pt")

    inputs = process()
    found = layout_of(model, processor, inputs, [photo])
    check(name, inputs["input_ids"][0], names.image_id(model.config), found, (photo.height, photo.width))
    used: dict[str, list[float]] = {PROCESSOR: [], LAYOUT: []}
    runs = {
        PROCESSOR: _counting(process, used[PROCESSOR]),
        LAYOUT: _counting(lambda: layout_of(model, processor, inputs, [photo]), used[LAYOUT]),
    }
    seconds = paired(runs, rounds=rounds, before=no_preparation)
    family = family_of(model.config.model_type, processor)
    return {
        "name": name,
        "kind": family and family.kind,
        "views": len(found.views[0]),
        "tokens": sum(len(view.tokens) for view in found.views[0]),
        "seconds": seconds,
        # Without the call before the first round.
        "process": {each: values[1:] for each, values in used.items()},
    }


def _counting(run: Run, used: list[float]) -> Run:
    """The same run, whose seconds of the process are appended."""

    def counted() -> Any:
        start = time.process_time()
        found = run()
        used.append(time.process_time() - start)
        return found

    return counted


if __name__ == "__main__":
    print(json.dumps(measure_here(json.loads(sys.argv[1]))))
