"""carve-kernels doctor --model: the layout of a model's image tokens as a figure and a table, and a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

FIGURE = "layout.png"
# In cells: the layouts of the package are tested to be this near.
TOLERANCE = 0.05


def show_layout(model: str, image: str | None, output: str) -> bool:
    """Write the figure and print the table. Returns whether the layout is where it is measured."""
    from PIL import Image

    from carve_kernels import checks
    from carve_kernels.cli.ask import quiet
    from carve_kernels.cli.layout_figure import layout_figure
    from carve_kernels.cli.ours import png_info, png_texts, refuse_inputs
    from carve_kernels.cli.output import number_of, replace_files, say
    from carve_kernels.cli.tables import screen, table
    from carve_kernels.hf.inputs import build_prompt, open_image, prepare
    from carve_kernels.hf.layouts import layout_of
    from carve_kernels.hf.loading import load
    from carve_kernels.models.scenes import draw_scene

    folder = checks.path("output", output)
    if image is None:
        opened = draw_scene(seed=3, level=1, split="test").image.resize((640, 480), Image.Resampling.NEAREST)
    else:
        opened = open_image(image)
        refuse_inputs([folder / FIGURE], {"--image": [checks.path("image", image)]})
    with replace_files(folder, [FIGURE], lambda path: png_texts(path) is not None) as temporary, quiet():
        loaded, processor = load(model)
        inputs = prepare(processor, [opened], build_prompt(processor, "x"))
        layout = layout_of(loaded, processor, inputs, [opened])
        how, fits = _compared(loaded, processor, layout, (opened.height, opened.width))
        tokens = _image_tokens(loaded, inputs)
        numbers = {token: number for number, token in enumerate(tokens)}
        title = f"{loaded.config.model_type}: {len(tokens)} image tokens of {opened.width} x {opened.height} pixels"
        outside = len(tokens) - sum(view.tokens.numel() for view in layout.views[0])
        caption = how
        if f"{layout.unseen():.1%}" != "0.0%":
            caption += f"; the model does not see {layout.unseen():.1%} of the image"
        if outside:
            caption += f"; {number_of(outside, 'image token')} without a place, such as newlines"
        figure = layout_figure(opened, layout, numbers, title, caption)
        figure.save(temporary / FIGURE, pnginfo=png_info())
    lines = [
        (
            Text(str(number), style=_style(number)),
            view.kind,
            f"{view.grid[0]} x {view.grid[1]}",
            f"{numbers[int(view.tokens[0])]} to {numbers[int(view.tokens[-1])]}",
            ", ".join(f"{edge:.1f}" for edge in view.box),
        )
        for number, view in enumerate(layout.views[0])
    ]
    screen().print(table(title, ("view", "kind", "rows x columns", "tokens", "box x0, y0, x1, y1"), lines))
    say(f"{caption}.", "green" if fits else "red")
    say(f"Figure: {Path(folder) / FIGURE}")
    return fits


def _compared(model: Any, processor: Any, layout: Any, size: tuple[int, int]) -> tuple[str, bool]:
    """What the measurement says of a layout, and whether it agrees."""
    from carve_kernels.cli.output import one_line
    from carve_kernels.hf.layouts.comparison import deviations
    from carve_kernels.hf.layouts.measured import measure

    if layout.measured:
        return "no layout is known for this family, so the boxes were measured", True
    try:
        off = deviations(layout, measure(model, processor, size))
    except ValueError as error:
        return f"the layout of the family, which cannot be measured here: {one_line(error)}", True
    worst = float(off.max())
    text = f"its boxes differ from the measured ones by at most {worst:.3f} of a token's side (limit: {TOLERANCE})"
    return f"the layout of the family; {text}", worst <= TOLERANCE


def _image_tokens(model: Any, inputs: Any) -> list[int]:
    from carve_kernels.hf import names

    found: list[int] = (inputs["input_ids"][0] == names.image_id(model.config)).nonzero().flatten().tolist()
    return found


def _style(view: int) -> str:
    from carve_kernels.cli.layout_figure import colour_of

    return "rgb({},{},{})".format(*colour_of(view))
