"""carve-kernels run: ask any local checkpoint of a supported family about one image."""

from __future__ import annotations

from typing import Annotated

import typer

from carve_kernels.cli import options
from carve_kernels.cli.output import say


@options.spread
def run(
    model: options.ModelOption,
    image: Annotated[str, options.path("Image file.", "--image", "-i")],
    question: Annotated[str, typer.Option("--question", "-q", help="The question about it.")],
    output: Annotated[str, options.path("Folder for the results.", "--output", "-o")] = "out/run",
    *,
    settings: options.MethodSettings,
) -> None:
    """Ask a local checkpoint about an image, see where it looks, keep that part, and ask again."""
    from carve_kernels import checks
    from carve_kernels.cli.ask import ask
    from carve_kernels.cli.ours import refuse_inputs
    from carve_kernels.cli.report import FILES, Question, unseen_warning
    from carve_kernels.hf.inputs import open_image

    checks.text("question", question)
    folder = checks.path("output", output)
    name, preset = settings.preset_of(model)
    opened = open_image(image, settings.pixel_limit)
    inputs = {"--image": [checks.path("image", image)], "--preset": settings.preset_files}
    refuse_inputs((folder / file for file in FILES), inputs)
    report = ask(folder, Question(opened, question), {name: preset}, lambda: settings.load(model), **settings.engine)
    warning = unseen_warning(report.results[name].unseen)
    if warning is not None:
        say(warning, "yellow")
