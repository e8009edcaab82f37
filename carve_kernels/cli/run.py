"""carve-kernels run: ask any local checkpoint of a supported family about one image."""

from __future__ import annotations

from typing import Annotated

import typer

from carve_kernels.cli import options


def run(
    model: options.ModelOption,
    image: Annotated[str, options.path("Image file.", "--image", "-i")],
    question: Annotated[str, typer.Option("--question", "-q", help="The question about it.")],
    output: Annotated[str, options.path("Folder for the results.", "--output", "-o")] = "out/run",
    preset: options.PresetOption = None,
    layers: options.LayersOption = None,
    rows: options.RowsOption = None,
    steps: options.StepsOption = None,
    keep: options.KeepOption = None,
    top: options.TopOption = None,
    lam: options.LamOption = None,
    max_new_tokens: options.MaxNewTokensOption = None,
    fit: options.FitOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    attn: options.AttentionOption = None,
    backend: options.BackendOption = "auto",
    allow_pickle: options.AllowPickleOption = False,
    max_image_pixels: options.MaxImagePixelsOption = None,
) -> None:
    """Ask a local checkpoint about an image, see where it looks, keep that part, and ask again."""
    from rich.console import Console
    from rich.text import Text

    from carve_kernels import checks
    from carve_kernels.cli.ask import ask
    from carve_kernels.cli.ours import refuse_inputs
    from carve_kernels.cli.report import FILES, Question
    from carve_kernels.hf.inputs import open_image

    checks.text("question", question)
    dtype = options.check_machine(dtype, backend)
    options.check_fit(fit)
    folder = checks.path("output", output)
    name, values = options.build_preset(model, preset, layers, rows, steps, keep, top, lam, max_new_tokens)
    limit = options.pixel_limit(max_image_pixels)
    opened = open_image(image, limit)
    inputs = {"--image": [checks.path("image", image)], "--preset": options.preset_files(preset)}
    refuse_inputs((folder / file for file in FILES), inputs)
    report = ask(
        folder,
        Question(opened, question),
        {name: values},
        lambda: options.load_model(model, dtype, options.device_of(device), attn, allow_pickle),
        backend=backend,
        max_image_pixels=limit,
        fit=fit,
    )
    warning = options.unseen_warning(report.results[name].unseen)
    if warning is not None:
        Console().print(Text(warning, style="yellow"), soft_wrap=True)
