"""carve-kernels batch: a file of questions about many images; what is done stays done, whatever stops it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carve_kernels.cli import options
from carve_kernels.cli.output import INTERRUPTED, as_typed, clock, counted, fail, note, number_of, versions

if TYPE_CHECKING:
    from carve_kernels.cli.questions import Asked
    from carve_kernels.cli.store import Store
    from carve_kernels.hf.engine.result import CarveFailure, CarveResult
    from carve_kernels.presets import Preset

_SHOWN = 5
_BLOCK = 2**20

_Marks = dict[str, str | None]


def batch(
    input: Annotated[
        str,
        options.path('Lines of JSON: {"image": path, "question": text, "id": ...}.', "--input", "-i"),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            show_default=False,
            help=f"{options.MODEL} Default: small, which knows demo's scenes alone.",
        ),
    ] = None,
    output: Annotated[str, options.path("Folder for the results.", "--output", "-o")] = "out/batch",
    pictures: Annotated[
        bool, typer.Option("--pictures", help="For each question all that run writes, not result.json alone.")
    ] = False,
    memory: Annotated[
        str | None,
        options.path("Folder of general maps, kept for other runs and shared with them.", "--memory"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Most tokens in the cache at once. Default: what memory allows.")
    ] = None,
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
    """Ask a local checkpoint many questions about many images, and go on where an earlier run stopped.

    Each question has a folder, named by its id (its line where it has none), with result.json; results.jsonl has all
    of them in the end. A question is done again if it, its image, the checkpoint or the settings are others, or if it
    failed. Exit code 1: some questions failed, their result.json says why.
    """
    from carve_kernels import checks
    from carve_kernels.cli.questions import read
    from carve_kernels.cli.store import Store
    from carve_kernels.hf.inputs import MAX_IMAGE_PIXELS
    from carve_kernels.hf.loading import SMALL

    dtype = options.check_machine(dtype, backend)
    options.check_fit(fit)
    folder, questions = checks.path("output", output), checks.path("input", input)
    if memory is not None and os.path.isfile(checks.path("memory", memory)):
        raise NotADirectoryError(f"memory: {memory} is no folder; choose another --memory")
    asked = read(questions)
    if model is None:
        model = SMALL
        note("no --model: the embedded model is asked, which knows the scenes of carve-kernels demo alone")
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
    limit = (
        MAX_IMAGE_PIXELS if max_image_pixels is None else checks.integer("max_image_pixels", max_image_pixels, low=1)
    )
    if tokens is not None:
        checks.integer("tokens", tokens, low=1)

    def load() -> Any:
        from carve_kernels.hf.engine.engine import CarveEngine

        loaded = options.load_model(model, dtype, options.device_of(device), attn, allow_pickle)
        return CarveEngine(*loaded, preset=settings, backend=backend, max_image_pixels=limit, memory=memory, fit=fit)

    inputs = {"--input": [questions, *(each.picture for each in asked)], "--preset": options.preset_files(preset)}
    with Store(folder).opened() as store:
        store.refuse_twins(each.name for each in asked)
        store.refuse_inputs([each.name for each in asked], inputs)
        facts = _facts(model, settings, dtype, attn, fit)
        _Run(store, asked, facts, name, pictures, tokens).work(load)


def _facts(model: str, preset: Preset, dtype: str, attn: str | None, fit: str | None) -> dict[str, Any]:
    """All that answers depend on but the questions and the images."""
    from carve_kernels.hf.engine.fingerprint import fingerprint_of_directory
    from carve_kernels.hf.loading import find

    folder = find(model).folder
    known = fingerprint_of_directory(folder) if folder.is_dir() else None
    return {"model": known, "preset": preset.to_dict(), "dtype": dtype, "attention": attn, "fit": fit}


@dataclass
class _Run:
    """One run of the command over its questions."""

    store: Store
    asked: list[Asked]
    facts: Mapping[str, Any]
    name: str
    pictures: bool
    tokens: int | None
    done: int = 0

    def work(self, load: Any) -> None:
        """Answer what is not answered yet, write the tables, say how it went."""
        from carve_kernels.cli.looking import quiet

        start = time.perf_counter()
        try:
            todo = self._todo()
            self.store.refuse_foreign(todo)
            if todo:
                with quiet():
                    self._answer(load(), todo)
            self._finish(len(todo), time.perf_counter() - start)
        except KeyboardInterrupt:
            fail(f"interrupted; {self._kept()}")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise type(error)(f"{error}; {self._kept()}") from error

    def _todo(self) -> dict[str, _Marks]:
        """The marks of what is not answered yet."""
        found = {}
        digests: dict[Path, str | None] = {}
        for asked in self.asked:
            if asked.picture not in digests:
                digests[asked.picture] = _digest(asked.picture)
            marks = self._marks(asked, digests[asked.picture])
            if self.store.has(asked.name, marks, self.pictures):
                self.done += 1
            else:
                found[asked.name] = marks
        return found

    def _marks(self, asked: Asked, digest: str | None) -> _Marks:
        """What tells an answer to this question under these settings from any other, by the keys of its record."""
        from carve_kernels.hf.engine.fingerprint import key_of

        asking = key_of(format=2, question=asked.text, prompt=asked.prompt, truth=asked.truth, **self.facts)
        return {"fingerprint": asking, "picture_digest": digest}

    def _answer(self, engine: Any, todo: Mapping[str, _Marks]) -> None:
        waiting = [asked for asked in self.asked if asked.name in todo]
        columns: dict[str, list[Any]] = {
            "images": [asked.picture for asked in waiting],
            "questions": [asked.text for asked in waiting],
            "prompts": [asked.prompt for asked in waiting],
        }
        outcomes = engine.stream(**columns, tokens=self.tokens)
        with counted(len(self.asked), len(self.asked) - len(todo), "questions") as advance:
            for asked, outcome in zip(waiting, outcomes, strict=True):
                self._write(asked, outcome, engine, todo[asked.name])
                self.done += 1
                advance()

    def _write(self, asked: Asked, outcome: CarveResult | CarveFailure, engine: Any, marks: _Marks) -> None:
        from carve_kernels.cli.looking import facts_of
        from carve_kernels.cli.notes import notes_of
        from carve_kernels.cli.report import FILES, RECORD, Look, Question, record, write, write_record
        from carve_kernels.hf.engine.result import CarveFailure

        facts: dict[str, Any] = {
            "id": asked.id,
            "picture": str(asked.picture),
            **marks,
            "error": None,
        }
        if isinstance(outcome, CarveFailure):
            error = {"type": type(outcome.error).__name__, "message": as_typed(outcome.error)}
            self.store.write_error(asked.name, {"question": asked.text, **facts, "error": error})
            return
        question = Question(outcome.image, asked.text, asked.truth, facts)
        notes = {self.name: notes_of(outcome, engine.model, engine.processor)}
        seconds = {"load": 0.0, "look": sum(outcome.seconds.values()), "total": sum(outcome.seconds.values())}
        seen = Look(question, facts_of(engine.model), {self.name: outcome}, notes, seconds)
        if self.pictures:
            self.store.write(asked.name, FILES, lambda folder: write(folder, seen))
        else:
            self.store.write(asked.name, (RECORD,), lambda folder: write_record(folder, record(seen)))

    def _finish(self, done: int, seconds: float) -> None:
        from rich.console import Console
        from rich.text import Text

        rows = [self._row(asked) for asked in self.asked]
        failed = [row for row in rows if row["error"] is not None]
        summary = {
            "questions": len(rows),
            "answered": len(rows) - len(failed),
            "failed": len(failed),
            "right": _count(rows, "right"),
            "refined_right": _count(rows, "refined_right"),
            "last_run": {"done": done, "seconds": seconds},
            **self.facts,
            "versions": versions(),
        }
        self.store.write_tables(rows, summary)
        total = number_of(len(rows), "question")
        told = f"{summary['answered']} of {total} answered, {len(rows) - done} of them before this run"
        if summary["right"] is not None:
            told += f"; right: plain {summary['right']}, refined {summary['refined_right']}"
        console = Console()
        rate = f"; {done / seconds:.2f} a second" if done else ""
        console.print(Text(f"{told}; {clock.seconds():.1f} s{rate}"), soft_wrap=True)
        console.print(Text(f"{self.store.folder}/: results.jsonl, summary.json"), soft_wrap=True)
        unseen = [row.get("unseen") or 0.0 for row in rows]
        warning = options.outside(max(unseen))
        if warning is not None:
            count = sum(options.outside(share) is not None for share in unseen)
            told = f"in {count} of {number_of(len(rows), 'question')} up to {warning}"
            console.print(Text(told, style="yellow"), soft_wrap=True)
        noted = [f"line {row['line']}: {text}" for row in rows for text in row.get("notes") or ()]
        if noted:
            note(_first(noted))
        if failed:
            told = _first([f"line {row['line']}: {row['error']['message']}" for row in failed])
            fail(f"{len(failed)} of {total} failed: {told}")
            raise typer.Exit(1)

    def _row(self, asked: Asked) -> dict[str, Any]:
        """The line of a question in the table."""
        lost: dict[str, Any] = {"error": {"type": "FileNotFoundError", "message": "its result.json is gone"}}
        values = self.store.read(asked.name) or lost
        given = {"id": asked.id, "line": asked.line, "image": str(asked.picture), "question": asked.text}
        if values.get("error") is not None:
            return {**given, "error": values["error"]}
        (numbers,) = values["presets"].values()
        kept = ("answer", "refined_answer", "right", "refined_right", "box", "kept", "unseen", "reason", "notes")
        return {**given, **{key: numbers.get(key) for key in kept}, "error": None}

    def _kept(self) -> str:
        done = f"{self.done} of {number_of(len(self.asked), 'question')}"
        told = "is done and stays" if len(self.asked) == 1 else "are done and stay"
        return f"{done} {told} in {self.store.folder}; run it again to go on"


def _digest(picture: Path) -> str | None:
    """The content of an image file, None where it cannot be read."""
    found = hashlib.sha256()
    try:
        # A device or a pipe has no end.
        if not picture.is_file():
            return None
        with picture.open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
    except OSError:
        return None
    return found.hexdigest()


def _first(lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return f"{'; '.join(lines[:_SHOWN])}{more}"


def _count(rows: list[dict[str, Any]], key: str) -> int | None:
    """How many answers are right, None where no true answer is known."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return sum(known) if known else None
