"""carve-kernels batch: a file of questions about many images; a stopped run is continued by the next one."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carve_kernels.cli import options
from carve_kernels.cli.output import (
    INTERRUPTED,
    as_typed,
    clock,
    counted,
    fail,
    first_few,
    note,
    number_of,
    say,
    versions,
)
from carve_kernels.extras import is_interrupted

if TYPE_CHECKING:
    from carve_kernels.cli.questions import QuestionLine
    from carve_kernels.cli.store import Store
    from carve_kernels.hf.engine.result import CarveFailure, CarveResult
    from carve_kernels.presets import Preset

_Marks = dict[str, str | None]


@options.spread
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
            help=f"{options.MODEL} Default: small, which only knows the scenes of demo.",
        ),
    ] = None,
    output: Annotated[str, options.path("Folder for the results.", "--output", "-o")] = "out/batch",
    images: Annotated[
        bool, typer.Option("--images", help="Write all files of run for each question, not just result.json.")
    ] = False,
    old_images: Annotated[bool, typer.Option("--pictures", hidden=True)] = False,
    memory: Annotated[
        str | None,
        options.path("Folder that caches general maps and may be shared with other runs.", "--memory"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Most tokens in the KV cache at once. Default: as memory allows.")
    ] = None,
    *,
    settings: options.MethodSettings,
) -> None:
    """Ask a local checkpoint many questions about many images, and continue where an earlier run stopped.

    Each question has a folder with a result.json, named by its id or else its line; results.jsonl has all of them at
    the end. A question is answered again if it, its image, the checkpoint or the settings changed, or if it failed.
    Exit code 1: some questions failed; their result.json gives the reason.
    """
    from carve_kernels import checks
    from carve_kernels.cli.questions import read
    from carve_kernels.cli.store import Store
    from carve_kernels.hf.loading import SMALL

    folder, questions = checks.path("output", output), checks.path("input", input)
    if memory is not None and os.path.isfile(checks.path("memory", memory)):
        raise ValueError(f"memory: {memory} is not a folder; choose another --memory")
    lines = read(questions)
    if model is None:
        model = SMALL
        note("no --model: the embedded model answers, which only knows the scenes of carve-kernels demo")
    name, preset = settings.preset_of(model)
    if tokens is not None:
        checks.integer("tokens", tokens, low=1)

    def load() -> Any:
        from carve_kernels.hf.engine.engine import CarveEngine

        return CarveEngine(*settings.load(model), preset=preset, memory=memory, **settings.engine)

    inputs = {"--input": [questions, *(line.image for line in lines)], "--preset": settings.preset_files}
    with Store(folder).opened() as store:
        store.refuse_twins(line.name for line in lines)
        store.refuse_inputs([line.name for line in lines], inputs)
        facts = _facts(model, preset, settings)
        _Run(store, lines, facts, name, images or old_images, tokens).work(load)


def _facts(model: str, preset: Preset, settings: options.Settings) -> dict[str, Any]:
    """What answers depend on besides questions and images."""
    from carve_kernels.cli.digests import checkpoint_digest
    from carve_kernels.hf.loading import find

    folder = find(model).folder
    digest = checkpoint_digest(folder) if folder.is_dir() else None
    machine = {"dtype": settings.dtype, "attention": settings.attn, "fit": settings.fit}
    return {"model": digest, "preset": preset.to_dict(), **machine}


@dataclass
class _Run:
    """One run of the command over its questions."""

    store: Store
    lines: list[QuestionLine]
    facts: Mapping[str, Any]
    preset: str
    images: bool
    tokens: int | None
    done: int = 0

    def work(self, load: Any) -> None:
        """Answer what is not answered yet, write the tables, print a summary."""
        from carve_kernels.cli.ask import quiet

        start = time.perf_counter()
        try:
            todo = self._todo()
            self.store.refuse_foreign(todo)
            if todo:
                with quiet():
                    self._answer(load(), todo)
            self._finish(len(todo), time.perf_counter() - start)
        except (KeyboardInterrupt, ImportError) as error:
            if not is_interrupted(error):
                raise
            fail(f"interrupted; {self._progress()}")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise type(error)(f"{error}; {self._progress()}") from error

    def _todo(self) -> dict[str, _Marks]:
        """The questions that are not answered yet: by name, what tells an answer under these settings from others."""
        from carve_kernels.cli.digests import file_digest
        from carve_kernels.hf.engine.fingerprint import key_of

        todo = {}
        digests = {image: file_digest(image) for image in {line.image for line in self.lines}}
        for line in self.lines:
            key = key_of(format=2, question=line.text, prompt=line.prompt, truth=line.truth, **self.facts)
            marks = {"fingerprint": key, "image_digest": digests[line.image]}
            if self.store.has(line.name, marks, self.images):
                self.done += 1
            else:
                todo[line.name] = marks
        return todo

    def _answer(self, engine: Any, todo: Mapping[str, _Marks]) -> None:
        lines = [line for line in self.lines if line.name in todo]
        images, questions, prompts = zip(*((line.image, line.text, line.prompt) for line in lines), strict=True)
        results = engine.stream(images, questions, prompts=prompts, tokens=self.tokens)
        with counted(len(self.lines), self.done, "questions") as advance:
            for line, result in zip(lines, results, strict=True):
                self._write(line, result, engine, todo[line.name])
                self.done += 1
                advance()

    def _write(self, line: QuestionLine, result: CarveResult | CarveFailure, engine: Any, marks: _Marks) -> None:
        from carve_kernels import deprecation
        from carve_kernels.cli.ask import model_facts
        from carve_kernels.cli.report import FILES, RECORD, Question, Report, notes_of, record, write, write_record
        from carve_kernels.hf.engine.result import CarveFailure

        facts: dict[str, Any] = {"id": line.id, "image_path": str(line.image), **marks, "error": None}
        facts = deprecation.with_old_keys(facts, picture="image_path", picture_digest="image_digest")
        if isinstance(result, CarveFailure):
            error = {"type": type(result.error).__name__, "message": as_typed(result.error)}
            values = {"question": line.text, **facts, "error": error}
        else:
            question = Question([result.image], line.text, line.truth, facts)
            notes = {self.preset: notes_of(result, engine.model, engine.processor)}
            total = sum(result.seconds.values())
            seconds = {"load": 0.0, "answer": total, "total": total}
            report = Report(question, model_facts(engine.model), {self.preset: result}, notes, seconds)
            if self.images:
                self.store.write(line.name, FILES, lambda folder: write(folder, report))
                return
            values = record(report)
        self.store.write(line.name, (RECORD,), lambda folder: write_record(folder, values))

    def _finish(self, done: int, seconds: float) -> None:
        from carve_kernels.cli.report import unseen_warning

        rows = [self._row(line) for line in self.lines]
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
        counts = f"{summary['answered']} of {total} answered, {len(rows) - done} of them before this run"
        if summary["right"] is not None:
            known = sum(row.get("right") is not None for row in rows)
            counts += f"; right of {known}: plain {summary['right']}, refined {summary['refined_right']}"
        total_seconds, new = clock.seconds(), summary["answered"] - (len(rows) - done)
        rate = f", {number_of(new, 'new answer')}: {new / total_seconds:.2f} a second" if new else ""
        say(f"{counts}; {total_seconds:.1f} s{rate}")
        say(f"{self.store.folder}/: results.jsonl, summary.json")
        unseen = [row.get("unseen") or 0.0 for row in rows]
        # Nothing can be advised where a layout is measured, which is that of all questions to a model.
        warning = unseen_warning(max(unseen), any(row.get("measured") for row in rows))
        if warning is not None:
            count = sum(unseen_warning(share) is not None for share in unseen)
            say(f"in {count} of {total} up to {warning}", "yellow")
        notes: dict[str, list[int]] = {}
        for row in rows:
            for text in row.get("notes") or ():
                notes.setdefault(text, []).append(row["line"])
        if notes:
            note(first_few([f"{_lines(numbers)}: {text}" for text, numbers in notes.items()]))
        if failed:
            reasons = first_few([f"line {row['line']}: {row['error']['message']}" for row in failed])
            fail(f"{len(failed)} of {total} failed: {reasons}")
            raise typer.Exit(1)

    def _row(self, line: QuestionLine) -> dict[str, Any]:
        """The row of a question in the table."""
        lost: dict[str, Any] = {"error": {"type": "FileNotFoundError", "message": "its result.json is gone"}}
        values = self.store.read(line.name) or lost
        row = {"id": line.id, "line": line.line, "image": str(line.image), "question": line.text}
        if values.get("error") is not None:
            return {**row, "error": values["error"]}
        (numbers,) = values["presets"].values()
        keys = (
            "answer",
            "refined_answer",
            "right",
            "refined_right",
            "box",
            "kept",
            "unseen",
            "measured",
            "reason",
            "notes",
        )
        return {**row, **{key: numbers.get(key) for key in keys}, "error": None}

    def _progress(self) -> str:
        done = f"{self.done} of {number_of(len(self.lines), 'question')}"
        verb = "is" if len(self.lines) == 1 else "are"
        return f"{done} {verb} done, in {self.store.folder}; run the command again to continue"


def _lines(numbers: list[int]) -> str:
    """The first of the lines that a note is about, and how many more there are."""
    more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    return f"line {numbers[0]}{more}"


def _count(rows: list[dict[str, Any]], key: str) -> int | None:
    """How many answers are right; None where no true answer is known."""
    verdicts = [row[key] for row in rows if row.get(key) is not None]
    return sum(verdicts) if verdicts else None
