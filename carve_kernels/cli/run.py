"""carve-kernels run: any checkpoint of a supported family on this machine looks at any image."""

from __future__ import annotations

from typing import Annotated

import typer

from carve_kernels.cli import options


def run(
    model: options.ModelOption,
    image: Annotated[str, options.path("Image file.", "--image", "-i")],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask about it.")],
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
    from carve_kernels.cli.looking import look
    from carve_kernels.cli.ours import refuse_inputs
    from carve_kernels.cli.report import FILES, Question
    from carve_kernels.hf.inputs import MAX_IMAGE_PIXELS, open_image

    checks.text("question", question)
    dtype = options.check_machine(dtype, backend)
    options.check_fit(fit)
    folder = checks.path("output", output)
    name, settings = options.preset_of(
        model,
        preset,
        layers=layers,
        rows=rows,
        steps=steps,
        keep=keep,
        top=top,
        lam=lam,
        max_new_tokens=max_new_tokens,
    )
    limit = MAX_IMAGE_PIXELS if max_image_pixels is None else max_image_pixels
    opened = open_image(image, limit)
    inputs = {"--image": [checks.path("image", image)], "--preset": options.preset_files(preset)}
    refuse_inputs((folder / file for file in FILES), inputs)
    seen = look(
        folder,
        Question(opened, question),
        {name: settings},
        lambda: options.load_model(model, dtype, options.device_of(device), attn, allow_pickle),
        backend=backend,
        max_image_pixels=limit,
        fit=fit,
    )
    told = options.outside(seen.by_preset[name].unseen)
    if told is not None:
        Console().print(Text(told, style="yellow"), soft_wrap=True)
