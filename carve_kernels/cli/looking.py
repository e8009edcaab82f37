"""What demo and run share: load a model, look at one image under one or more presets, write what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carve_kernels.cli.notes import notes_of
from carve_kernels.cli.output import Announce, clock, results, stages
from carve_kernels.cli.report import FILES, Look, Question, is_ours, summarise, write
from carve_kernels.hf import names
from carve_kernels.hf.engine.engine import CarveEngine
from carve_kernels.hf.model import input_device
from carve_kernels.presets import Preset

_TEXTS = {
    "task": "looking for the question",
    "general": "looking at the whole",
    "carve": "contrast, regions, zoom",
    "answer": "asking again",
}


def look(
    output: Path,
    asked: Question,
    presets: Mapping[str, Preset],
    load: Callable[[], tuple[Any, Any]],
    **options: Any,
) -> Look:
    """Fill the folder `output` with everything seen under each preset, the first one's in full, and print a summary.

    `options` are the engine's: backend, max_image_pixels, fit.
    """
    imported = clock.seconds()
    with results(output, FILES, is_ours) as folder, quiet(), stages(2 + 4 * len(presets)) as announce:
        announce("loading the model")
        model, processor = load()
        loaded = clock.seconds()
        found = {}
        for name, preset in presets.items():
            engine = CarveEngine(model, processor, preset=preset, **options)
            found[name] = engine(asked.image, asked.text, on_progress=_announcer(announce, name))
        announce("writing")
        looked = clock.seconds()
        notes = {name: notes_of(result, model, processor) for name, result in found.items()}
        seconds = {"imports": imported, "load": loaded - imported, "look": looked - loaded, "total": looked}
        seen = Look(asked, facts_of(model), found, notes, seconds)
        write(folder, seen)
    summarise(seen, output, {**seconds, "write": clock.seconds() - looked})
    return seen


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars and the advice of transformers off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _announcer(announce: Announce, name: str) -> Callable[[str, int, int], None]:
    def report(stage: str, done: int, total: int) -> None:
        if stage in _TEXTS:
            announce(f"{name}: {_TEXTS[stage]}")

    return report


def facts_of(model: Any) -> dict[str, Any]:
    """What a record says of a model."""
    return {
        "directory": model.name_or_path,
        "type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(input_device(model)),
        "attention": names.implementation_of(model),
    }
