"""carve-kernels batch: a file of questions about many images; a stopped run is continued by the next one."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    from carve_kernels.hf.engine.video import VideoResult
    from carve_kernels.presets import Preset

_Marks = dict[str, str | None]


@options.spread
def batch(
    input: Annotated[
        str,
        options.path(
            'Lines of JSON: {"image": path or list of paths, "question": text, "id": ...}, or "video" for "image".',
            "--input",
            "-i",
        ),
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
    """Ask a local checkpoint many questions about images and videos, and continue where an earlier run stopped.

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

    paths = (path for line in lines for path in line.paths)
    inputs = {"--input": [questions, *paths], "--preset": settings.preset_files}
    if any(line.is_video for line in lines):
        from carve_kernels.hf.engine.video import refuse_fit

        refuse_fit(settings.fit)
    with Store(folder).opened() as store:
        store.refuse_twins(line.name for line in lines)
        store.refuse_inputs({line.name: _files(line) for line in lines}, inputs)
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
            self.store.refuse_foreign({line.name: _files(line) for line in self.lines if line.name in todo})
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
        digests = {path: file_digest(path) for path in {path for line in self.lines for path in line.paths}}
        for line in self.lines:
            key = key_of(format=2, question=line.text, prompt=line.prompt, truth=line.truth, **self.facts)
            each = [digests[path] for path in line.paths]
            digest = None if None in each else "+".join(map(str, each))
            marks = {"fingerprint": key, "video_digest" if line.is_video else "image_digest": digest}
            if self.store.has(line.name, marks, self.images, _files(line)):
                self.done += 1
            else:
                todo[line.name] = marks
        return todo

    def _answer(self, engine: Any, todo: Mapping[str, _Marks]) -> None:
        lines = [line for line in self.lines if line.name in todo]
        with counted(len(self.lines), self.done, "questions") as advance:
            for is_video, group in itertools.groupby(lines, lambda line: line.is_video):
                together = list(group)
                results = self._about_videos(engine, together) if is_video else self._about_images(engine, together)
                for line, result in zip(together, results, strict=True):
                    try:
                        self._write(line, result, engine, todo[line.name])
                    except KeyboardInterrupt as error:
                        # With a text, it waited until the files were there.
                        self.done += bool(str(error))
                        raise
                    self.done += 1
                    advance()

    def _about_images(self, engine: Any, lines: Sequence[QuestionLine]) -> Any:
        images = [list(line.paths) if line.others else line.image for line in lines]
        prompts = [line.prompt for line in lines]
        return engine.stream(images, [line.text for line in lines], prompts=prompts, tokens=self.tokens)

    @staticmethod
    def _about_videos(engine: Any, lines: Sequence[QuestionLine]) -> Iterator[VideoResult | CarveFailure]:
        import torch

        from carve_kernels.hf.engine.result import CarveFailure

        for line in lines:
            try:
                yield engine.ask_video(line.image, line.text, prompt=line.prompt)
            except (ValueError, TypeError, OSError, MemoryError, torch.OutOfMemoryError) as error:
                yield CarveFailure(line.text, line.image, error, line.prompt)

    def _write(
        self, line: QuestionLine, result: CarveResult | VideoResult | CarveFailure, engine: Any, marks: _Marks
    ) -> None:
        from carve_kernels.cli.report import RECORD, write_record
        from carve_kernels.hf.engine.result import CarveFailure, CarveResult

        facts = self._facts_of(line, marks)
        if isinstance(result, CarveFailure):
            error = {"type": type(result.error).__name__, "message": as_typed(result.error)}
            values = {"question": line.text, **facts, "error": error}
            self.store.write(line.name, (RECORD,), lambda folder: write_record(folder, values))
        elif isinstance(result, CarveResult):
            self._write_images(line, result, engine, facts)
        else:
            self._write_video(line, result, engine, facts)

    @staticmethod
    def _facts_of(line: QuestionLine, marks: _Marks) -> dict[str, Any]:
        from carve_kernels import deprecation

        if line.is_video:
            return {"id": line.id, "video_path": str(line.image), **marks, "error": None}
        facts: dict[str, Any] = {"id": line.id, "image_path": str(line.image), **marks, "error": None}
        if line.others:
            facts["image_paths"] = [str(path) for path in line.paths]
        return deprecation.with_old_keys(facts, picture="image_path", picture_digest="image_digest")

    def _write_images(self, line: QuestionLine, result: CarveResult, engine: Any, facts: dict[str, Any]) -> None:
        from carve_kernels.cli.ask import model_facts
        from carve_kernels.cli.report import RECORD, Question, Report, notes_of, record, write, write_record

        question = Question([each.image for each in result.images], line.text, line.truth, facts)
        notes = {self.preset: notes_of(result, engine.model, engine.processor)}
        total = sum(result.seconds.values())
        seconds = {"load": 0.0, "answer": total, "total": total}
        report = Report(question, model_facts(engine.model), {self.preset: result}, notes, seconds)
        if self.images:
            self.store.write(line.name, _files(line), lambda folder: write(folder, report))
            return
        values = record(report)
        self.store.write(line.name, (RECORD,), lambda folder: write_record(folder, values))

    def _write_video(self, line: QuestionLine, result: VideoResult, engine: Any, facts: dict[str, Any]) -> None:
        from carve_kernels.cli import video
        from carve_kernels.cli.ask import model_facts
        from carve_kernels.cli.report import RECORD, is_right, write_record

        total = sum(result.seconds.values())
        found = video.record(result, model_facts(engine.model), {"total": total})
        verdicts = {
            "right": is_right(result.answer, line.truth),
            "refined_right": is_right(result.refined_answer, line.truth),
        }
        kept = float(result.regions.mask.double().mean())
        whole = ("question", "video", "model", "seconds", "versions")
        numbers = {name: value for name, value in found.items() if name not in whole}
        presets = {self.preset: {**numbers, **verdicts, "kept": kept, "notes": []}}
        values = {**{name: found[name] for name in whole}, "truth": line.truth, **facts, "presets": presets}

        def fill(folder: Path) -> None:
            if self.images:
                video.write(folder, result, found)
            write_record(folder, values)

        self.store.write(line.name, _files(line) if self.images else (RECORD,), fill)

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
        row: dict[str, Any] = {"id": line.id, "line": line.line}
        row |= {"video" if line.is_video else "image": str(line.image), "question": line.text}
        if line.others:
            row["images"] = [str(path) for path in line.paths]
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


def _files(line: QuestionLine) -> tuple[str, ...]:
    """The files of a question with --images, the record last."""
    from carve_kernels.cli import video
    from carve_kernels.cli.report import RECORD, files_of

    return (*video.files(), RECORD) if line.is_video else files_of(len(line.paths))


def _lines(numbers: list[int]) -> str:
    """The first of the lines that a note is about, and how many more there are."""
    more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    return f"line {numbers[0]}{more}"


def _count(rows: list[dict[str, Any]], key: str) -> int | None:
    """How many answers are right; None where no true answer is known."""
    verdicts = [row[key] for row in rows if row.get(key) is not None]
    return sum(verdicts) if verdicts else None
