"""What demo and run share: load a model, ask about one image under each preset, write and print the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from carve_kernels.cli.output import Announce, clock, replace_files, stages
from carve_kernels.cli.report import Question, Report, files_of, is_ours, notes_of, stale_in, summarise, write
from carve_kernels.hf import names
from carve_kernels.hf.engine.engine import STAGES, CarveEngine
from carve_kernels.hf.inputs import BARE_PROMPTS
from carve_kernels.hf.model import input_device
from carve_kernels.presets import Preset


def ask(
    output: Path,
    question: Question,
    presets: Mapping[str, Preset],
    load: Callable[[], tuple[Any, Any]],
    refine: str | Sequence[int] | None = None,
    **options: Any,
) -> Report:
    """Write the results of each preset into the folder `output`, those of the first one in full; print a summary.

    `refine` is that of `CarveEngine.ask`; `options` are the engine's: backend, max_image_pixels, fit.
    """
    imported = clock.seconds()
    total = 2 + len(STAGES) * len(presets)
    names = files_of(len(question.images))
    replacing = replace_files(output, names, is_ours, stale=stale_in(output, names))
    with replacing as folder, quiet(), stages(total) as announce:
        announce("loading the model")
        model, processor = load()
        loaded = clock.seconds()
        results = {}
        for name, preset in presets.items():
            engine = CarveEngine(model, processor, preset=preset, **options)
            on_progress = partial(_announce_stage, announce, name)
            results[name] = engine.ask(list(question.images), question.text, refine=refine, on_progress=on_progress)
        announce("writing")
        answered = clock.seconds()
        notes = {name: notes_of(result, model, processor) for name, result in results.items()}
        seconds = {"imports": imported, "load": loaded - imported, "answer": answered - loaded, "total": answered}
        report = Report(question, model_facts(model), results, notes, seconds)
        write(folder, report)
    summarise(report, output, {**seconds, "write": clock.seconds() - answered})
    return report


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and the advice of transformers off the terminal, and what the notes of a result say."""
    import logging as standard

    from transformers.utils import logging

    def is_no_note(record: standard.LogRecord) -> bool:
        return record.getMessage() != BARE_PROMPTS

    log = standard.getLogger("carve_kernels")
    log.addFilter(is_no_note)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        log.removeFilter(is_no_note)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _announce_stage(announce: Announce, preset: str, stage: str, _done: int, _total: int) -> None:
    if stage in STAGES:
        announce(f"{preset}: {stage}")


def model_facts(model: Any) -> dict[str, Any]:
    """The description of a model in a record."""
    return {
        "directory": model.name_or_path,
        "type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(input_device(model)),
        "attention": names.implementation_of(model),
    }
