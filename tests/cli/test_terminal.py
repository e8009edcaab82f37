"""Output on any terminal: encodings, widths, a closed pipe, none at all; and the notes on a result."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich.cells
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from carve_kernels.cli import app, output
from carve_kernels.cli.report import _settings, percent
from carve_kernels.cli.tables import show
from carve_kernels.hf.engine.engine import CarveEngine
from carve_kernels.hf.inputs import BARE_PROMPTS
from carve_kernels.hf.loading import load
from carve_kernels.presets import Preset
from tests.cli.conftest import LINES, QUESTION, QUICK, Ask, Invoke, table


def test_an_encoding_that_lacks_a_character_is_no_error(checkpoint: Path, image_file: Path, tmp_path: Path) -> None:
    words = ["-m", checkpoint, "-i", image_file, "-q", "\u732b\u5728\u54ea\u91cc", "-o", tmp_path / "out", *QUICK]
    done = CliRunner(charset="ascii").invoke(app, ["run", *map(str, words)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "\\u732b" in done.stdout
    assert json.loads((tmp_path / "out/result.json").read_text())["question"] == "\u732b\u5728\u54ea\u91cc"


@pytest.mark.parametrize("words", [["--help"], ["batch", "-h"], ["run", "-m", "\u732b", "-i", "x", "-q", "x"]])
def test_every_command_prints_in_ascii(words: list[str]) -> None:
    done = CliRunner(charset="ascii").invoke(app, words)
    assert not isinstance(done.exception, UnicodeError) and done.exit_code == (2 if "run" in words else 0), done.output


def test_a_name_with_broken_bytes_is_printed(run: Invoke, tmp_path: Path) -> None:
    done = run("-o", tmp_path / "o\udcff")
    assert done.exit_code == 0, done.exception
    assert "\\udcff" in done.stdout


def test_streams_are_restored_after_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    with output.printable():
        print("\u732b")
    assert stream.errors == "strict"
    stream.flush()
    assert stream.buffer.getvalue() == f"\\u732b{os.linesep}".encode()  # type: ignore[attr-defined]


def test_a_closed_pipe_is_no_error_of_ours(run: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_args: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("carve_kernels.cli.ask.summarise", closed)
    done = run()
    assert done.exit_code == 1 and done.stderr == "" and (tmp_path / "out/result.json").is_file()


@pytest.mark.parametrize(("width", "kept"), [(80, "abcde"), (50, "abe"), (20, "ae"), (12, "ae")])
def test_a_narrow_screen_does_without_spare_columns(width: int, kept: str) -> None:
    console = Console(width=width, file=io.StringIO())
    lines = [[letter * 10 for letter in "abcde"], ["x"] * 5]
    show(console, "title", list("abcde"), lines, ["d", "c", "b"])
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert {letter for letter in "abcde" if printed.count(letter) >= 10} == set(kept)
    assert all(rich.cells.cell_len(line) <= width for line in printed.splitlines()) and "\u2026" not in printed
    assert ("On a wider" in printed) == (len(kept) < 5)


def test_the_table_of_profile_can_be_read(
    carve: Invoke, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "dumb")
    (folder / "questions.jsonl").write_text(json.dumps({**LINES[0], "box": [1, 2, 90, 80]}))
    words = ("--rows", "last", "--steps", "t_start", *QUICK[:2], "-o", folder / "carve.json")
    done = carve("profile", "-m", checkpoint, "-i", folder / "questions.jsonl", *words)
    assert done.exit_code == 0, done.output
    title, _, heads = done.stdout.splitlines()[:3]
    assert title.strip() == "1 question about 1 image" and "t_start" in done.stdout
    assert all(name in heads for name in ("layer", "rows", "steps", "score", "pointing"))


def test_help_has_no_lines_that_end_early(carve: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = carve("batch", "-h").stdout
    (paragraph,) = (part for part in printed.split("\u256d")[0].split(f"\n{' ' * 80}\n") if "Each question" in part)
    lines = [line.strip() for line in paragraph.splitlines()]
    # The next word would not have fitted.
    for line, after in itertools.pairwise(lines):
        assert len(line) + 1 + len(after.split()[0]) > 78, lines
    assert max(len(line) for line in printed.splitlines()) <= 80


def test_without_a_terminal_long_work_prints_its_progress(
    ask: Ask, run: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_INTERVAL", 0.0)
    assert "1 of 5: loading the model" in run().stderr
    printed = ask(LINES).stderr
    assert "1 of 3 questions" in printed and "3 of 3 questions" in printed


def test_the_total_time_is_printed(run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    # A command that began a day ago.
    monkeypatch.setattr(output.clock, "seconds", lambda: 86_400.0)
    line = next(line for line in run().stdout.splitlines() if "all" in line)
    assert "all 86400.0 s" in line and all(
        part in line for part in ("libraries 86400.0 s", "model", "answers", "files")
    )


@pytest.fixture
def altered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Changes to the engine's results."""
    changes: dict[str, Any] = {}
    answer = CarveEngine.answer

    def changed(self: CarveEngine, *args: Any, **settings: Any) -> Any:
        results = []
        for result in answer(self, *args, **settings):
            shares = {"unseen": changes["unseen"]} if "unseen" in changes else {}
            images = tuple(dataclasses.replace(image, **shares) for image in result.images)
            results.append(dataclasses.replace(result, **changes, images=images))
        return results

    monkeypatch.setattr(CarveEngine, "answer", changed)
    return changes


def test_an_empty_answer_is_noted(run: Invoke, ask: Ask, folder: Path, altered: dict[str, Any]) -> None:
    altered.update(unseen=0.0)
    plain = Image.open(folder / "out/panel.png").height if run().exit_code == 0 else 0
    altered.update(answer="", refined_answer=" ")
    done = run()
    assert done.exit_code == 0 and done.stderr == "the model returned no text in its plain and its refined answer\n"
    (numbers,) = json.loads((folder / "out/result.json").read_text())["presets"].values()
    assert [f"{note}\n" for note in numbers["notes"]] == [done.stderr]
    assert Image.open(folder / "out/panel.png").height > plain > 0
    altered.update(answer="red")
    assert ask(LINES[:1]).exit_code == 0
    assert table(folder)[0]["notes"] == ["the model returned no text in its refined answer"]


def test_a_checkpoint_without_a_chat_template_is_noted_once(
    run: Invoke, ask: Ask, checkpoint: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = folder / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "chat_template.jinja").unlink()
    done = run("-m", bare)
    assert done.exit_code == 0 and done.stderr.splitlines().count(BARE_PROMPTS) == 1
    (numbers,) = json.loads((folder / "out/result.json").read_text())["presets"].values()
    assert numbers["notes"].count(BARE_PROMPTS) == 1 and BARE_PROMPTS not in caplog.text
    done = ask(LINES, "-m", bare, "-o", folder / "many")
    assert done.exit_code == 0 and f"line 1 and 2 more: {BARE_PROMPTS}" in done.stderr
    assert BARE_PROMPTS not in run().stderr
    CarveEngine(*load(bare))
    assert caplog.text.count(BARE_PROMPTS) == 1


def test_what_the_model_did_not_see_is_printed(run: Invoke, folder: Path, altered: dict[str, Any]) -> None:
    altered.update(unseen=0.4)
    done = run()
    assert done.exit_code == 0 and "40 % of the image was outside the model's view" in done.stdout
    (numbers,) = json.loads((folder / "out/result.json").read_text())["presets"].values()
    assert numbers["unseen"] == 0.4 and not numbers["notes"]


def test_words_that_the_embedded_model_does_not_know(carve: Invoke, image_file: Path, tmp_path: Path) -> None:
    for question, count in (("is there a cat", "3 of the 4 tokens"),):
        done = carve("run", "-m", "small", "-i", image_file, "-q", question, "-o", tmp_path / "out")
        assert done.exit_code == 0 and count in done.stderr and "'what digit is red'" in done.stderr, done.output


def test_shares_are_never_rounded_to_nothing_or_all() -> None:
    assert [percent(share) for share in (0.0, 0.001, 0.4, 0.999, 1.0)] == ["0%", "less than 1%", "40%", "99%", "100%"]


@pytest.mark.parametrize(
    ("keep", "text"), [(0.2, "20%"), (0.29, "29%"), (0.999, "99.9%"), (0.001, "0.1%"), (1.0, "100%")]
)
def test_the_share_to_keep_is_printed_as_it_was_set(keep: float, text: str) -> None:
    result: Any = SimpleNamespace(preset=Preset(keep=keep), task=SimpleNamespace(layers=(1, 2)))
    assert f"top {text} of the pixels" in _settings(result)


@pytest.mark.parametrize("key", ["keeep", "Layers", "general_promt"])
def test_an_unknown_key_is_named_with_the_one_that_was_meant(run: Invoke, tmp_path: Path, key: str) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({key: 1}))
    done = run("--preset", tmp_path / "mine.json")
    meant = {"keeep": "keep", "Layers": "layers", "general_promt": "general_prompt"}[key]
    assert done.exit_code == 2 and done.stderr.startswith("error: --preset: "), done.output
    assert done.stderr.index(f"{key!r} (did you mean {meant!r}?)") < done.stderr.index("step_weights")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--image", value) for value in ("https://a.b/c.png", "", "none.png")),
        *(("--output", value) for value in ("https://a.b/c", "")),
        *(("--model", value) for value in ("https://huggingface.co/a/b", "~/none")),
        *(("--dtype", "fp99"), ("--device", "cuda:99"), ("--device", "meta"), ("--attn", "fast"), ("--backend", "gpu")),
        *(("--question", ""), ("--question", "what <image>"), ("--preset", "papr"), ("--backend", "cuda")),
        *(
            ("--rows", "word:blue"),
            ("--layers", "99"),
            ("--steps", "x"),
            ("--keep", "nan"),
            ("--lam", "x"),
            ("--top", 0),
        ),
    ],
)
def test_an_option_is_named_as_it_was_typed(run: Invoke, option: str, value: Any) -> None:
    done = run(option, value)
    assert done.exit_code in (1, 2) and done.stderr.startswith(f"error: {option}"), done.output
    assert "https:/a" not in done.stderr and done.stderr.count("\n") == 1


def test_an_implementation_that_is_not_installed_is_named_as_it_was_typed(
    run: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise ImportError("FlashAttention2 is not installed")

    monkeypatch.setattr("carve_kernels.hf.names.set_implementation", refuse)
    done = run("--attn", "flash_attention_2")
    assert done.exit_code == 1 and done.stderr.startswith("error: --attn: FlashAttention2 is not installed"), (
        done.output
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "batch", "profile"])
@pytest.mark.parametrize("whose", ["ours", "Pillow's"])
def test_advice_is_given_in_options(
    carve: Invoke, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, whose: str
) -> None:
    if whose == "Pillow's":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    limit = ("--max-image-pixels", 100) if whose == "ours" else ()
    (folder / "lines.jsonl").write_text(json.dumps(LINES[0]))
    given = ("-i", folder / "1.png", "-q", QUESTION) if command == "run" else ("-i", folder / "lines.jsonl")
    done = carve(command, "-m", checkpoint, *given, "-o", folder / "out", *limit, *QUICK[:2])
    assert done.exit_code in (1, 2) and "raise --max-image-pixels" in done.stderr, done.output
    assert "max_image_pixels" not in done.stderr
    if command == "batch":
        assert "max_image_pixels" not in (folder / "out/results.jsonl").read_text()


def test_pickles_are_allowed_by_an_option(run: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "pickled" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"")
    done = run("-m", tmp_path / "pickled")
    assert done.exit_code == 2 and "pass --allow-pickle if" in done.stderr and "allow_pickle" not in done.stderr


def test_a_url_among_the_questions_is_named_with_its_line(ask: Ask) -> None:
    done = ask([*LINES, {"image": "https://a.b/c.png", "question": QUESTION}])
    assert done.exit_code == 2 and "line 4: image: " in done.stderr and "https://a.b/c.png is a URL" in done.stderr


def test_short_names_of_dtypes_and_a_tilde(
    run: Invoke, ask: Ask, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run("-i", "~/1.png", "-o", "~/deep/out", "--dtype", "bf16").exit_code == 0
    assert json.loads((tmp_path / "deep/out/result.json").read_text())["model"]["dtype"] == "bfloat16"
    lines = [{**LINES[0], "image": "~/2.png"}]
    assert ask(lines, "-o", "~/batch", "--memory", "~/maps", "--dtype", "fp32").exit_code == 0
    # The same dtype by another name asks nothing again.
    monkeypatch.setattr("carve_kernels.hf.loading.load", lambda *args, **kwargs: pytest.fail("loaded"))
    assert ask(lines, "-o", "~/batch", "--dtype", "float32").exit_code == 0
    assert (tmp_path / "maps").is_dir() and not (tmp_path / "~").exists()
