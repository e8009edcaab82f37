"""carve-kernels demo: the embedded model answers a question about an embedded scene."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from carve_kernels.cli import options

# A scene of the test split whose plain answer is wrong and whose refined answer, with the profile, is right.
SEED, LEVEL = 18, 4


def demo(
    output: Annotated[str, options.path("Folder for the results.", "--output", "-o")] = "out/demo",
    scene: Annotated[
        int, typer.Option("--scene", min=0, help="Seed of the scene; each number draws another one.")
    ] = SEED,
    level: Annotated[
        int, typer.Option("--level", min=1, max=4, help="How crowded: 1 has 2 large digits, 4 has 8.")
    ] = LEVEL,
) -> None:
    """Show CARVE on the embedded small model: one scene, with the profile of the model and with the preset paper."""
    from carve_kernels import checks
    from carve_kernels.cli.ask import ask
    from carve_kernels.cli.report import Question
    from carve_kernels.hf.loading import load, preset_of_checkpoint
    from carve_kernels.models import small
    from carve_kernels.models.scenes import draw_scene
    from carve_kernels.presets import Preset

    drawn = draw_scene(scene, level, split="test")
    facts = {
        "scene": {"seed": scene, "level": level, "split": "test", "box": list(drawn.box), "general": drawn.general}
    }
    profile = preset_of_checkpoint(small()) or Preset.paper()
    # Prompts that the model knows; everything else is as in the paper.
    paper = Preset.paper(
        general_prompt=profile.general_prompt, suffix=profile.suffix, max_new_tokens=profile.max_new_tokens
    )
    with _one_thread():
        ask(
            checks.path("output", output),
            Question([drawn.image], drawn.question, drawn.answer, facts),
            {"profile": profile, "paper": paper},
            lambda: load(small(), dtype="float32"),
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a busy machine, threads of such a small model wait for each other: 40 s with two, 0.5 s with one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
