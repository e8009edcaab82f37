"""carve-kernels run: ask a local checkpoint about an image, about several, or about a video."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from carve_kernels.cli import options
from carve_kernels.cli.output import check_folder, say

if TYPE_CHECKING:
    from carve_kernels.presets import Preset


@options.spread
def run(
    model: options.ModelOption,
    question: Annotated[str, typer.Option("--question", "-q", help="The question to ask.")],
    image: Annotated[
        list[str] | None, options.path("Image file; repeat it for a question about several.", "--image", "-i")
    ] = None,
    video: Annotated[str | None, options.path("Video file, in place of images.", "--video")] = None,
    output: Annotated[str, options.path("Folder for the results.", "--output", "-o")] = "out/run",
    refine: Annotated[
        str | None,
        options.option(
            "Of several images, which to refine: numbers in the order of --image from 0, such as 1 or 0,2, or all. "
            "Not with --video. Default: the image with the strongest contrast."
        ),
    ] = None,
    max_frames: Annotated[int | None, options.option("With --video: frames at most. Default: 32.")] = None,
    fps: Annotated[
        float | None, options.option("With --video: frames for each second, while the limit allows.")
    ] = None,
    *,
    settings: options.MethodSettings,
) -> None:
    """Ask a local checkpoint about images or a video, see where it looks, keep that part, and ask again."""
    from carve_kernels import checks
    from carve_kernels.cli.ask import ask
    from carve_kernels.cli.ours import refuse_inputs
    from carve_kernels.cli.report import Question, files_of, unseen_warning
    from carve_kernels.hf.engine.requests import chosen_images
    from carve_kernels.hf.inputs import open_image

    checks.text("question", question)
    folder = checks.path("output", output)
    check_folder(folder)
    if (video is None) == (not image):
        raise ValueError("--image, --video: expected images or a video, got " + ("none" if not image else "both"))
    name, preset = settings.preset_of(model)
    if video is not None:
        _about_video(folder, video, question, preset, model, max_frames, fps, refine, settings)
        return
    image = image or []
    for option, value in (("--max-frames", max_frames), ("--fps", fps)):
        if value is not None:
            raise ValueError(f"{option}: expected with --video alone, got {value!r}")
    chosen = options.parse_refine(refine)
    try:
        chosen_images(chosen, len(image))
    except ValueError as error:
        several = f"all, or numbers of images from 0 to {len(image) - 1}, each once, such as 1 or 0,1"
        expected = several if len(image) > 1 else "0, the only image, or no --refine"
        raise ValueError(f"--refine: expected {expected}, got {refine!r}") from error
    opened = [open_image(each, settings.pixel_limit) for each in image]
    inputs = {"--image": [checks.path("image", each) for each in image], "--preset": settings.preset_files}
    refuse_inputs((folder / file for file in files_of(len(image))), inputs)
    asked = Question(opened, question)
    report = ask(folder, asked, {name: preset}, lambda: settings.load(model), chosen, **settings.engine)
    result = report.results[name]
    for number, each in enumerate(result.images):
        warning = unseen_warning(each.unseen, result.layout.measured, number if asked.several else None)
        if warning is not None:
            say(warning, "yellow")


def _about_video(
    folder: Path,
    file: str,
    question: str,
    preset: Preset,
    model: str,
    max_frames: int | None,
    fps: float | None,
    refine: str | None,
    settings: options.MethodSettings,
) -> None:
    from carve_kernels import checks
    from carve_kernels.cli import video
    from carve_kernels.cli.ours import refuse_inputs
    from carve_kernels.hf.engine.video import refuse_fit
    from carve_kernels.hf.videos import MAX_FRAMES, open_frames

    refuse_fit(settings.fit)
    if refine is not None:
        raise ValueError(f"--refine: expected with several images alone, got {refine!r}")
    frames = MAX_FRAMES if max_frames is None else max_frames
    opened = open_frames("video", file, max_frames=frames, fps=fps, max_image_pixels=settings.pixel_limit)
    inputs = {"--video": [checks.path("video", file)], "--preset": settings.preset_files}
    refuse_inputs((folder / name for name in video.files()), inputs)
    video.ask(folder, opened, question, preset, lambda: settings.load(model), **settings.engine)
