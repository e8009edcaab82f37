"""carve-kernels run: ask any local checkpoint of a supported family about an image, or about several."""

from __future__ import annotations

from typing import Annotated

import typer

from carve_kernels.cli import options
from carve_kernels.cli.output import say


@options.spread
def run(
    model: options.ModelOption,
    image: Annotated[list[str], options.path("Image file; repeat it for a question about several.", "--image", "-i")],
    question: Annotated[str, typer.Option("--question", "-q", help="The question about it.")],
    output: Annotated[str, options.path("Folder for the results.", "--output", "-o")] = "out/run",
    refine: Annotated[
        str | None,
        options.option(
            "Which of several images to refine: their numbers from 0, such as 1 or 0,2, or all. "
            "Default: the one with the strongest contrast."
        ),
    ] = None,
    *,
    settings: options.MethodSettings,
) -> None:
    """Ask a local checkpoint about an image, or several, see where it looks, keep that part, and ask again."""
    from carve_kernels import checks
    from carve_kernels.cli.ask import ask
    from carve_kernels.cli.ours import refuse_inputs
    from carve_kernels.cli.report import Question, files_of, unseen_warning
    from carve_kernels.hf.engine.requests import chosen_images
    from carve_kernels.hf.inputs import open_image

    checks.text("question", question)
    folder = checks.path("output", output)
    name, preset = settings.preset_of(model)
    chosen = options.parse_refine(refine)
    chosen_images(chosen, len(image))
    opened = [open_image(each, settings.pixel_limit) for each in image]
    inputs = {"--image": [checks.path("image", each) for each in image], "--preset": settings.preset_files}
    refuse_inputs((folder / file for file in files_of(len(image))), inputs)
    asked = Question(opened, question)
    report = ask(folder, asked, {name: preset}, lambda: settings.load(model), chosen, **settings.engine)
    warning = unseen_warning(max(each.unseen for each in report.results[name].images))
    if warning is not None:
        say(warning, "yellow")
