"""Errors of carve-kernels run: one clear line, and nothing changed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from carve_kernels.cli import output as output_module
from carve_kernels.cli.report import FILES, write_record
from carve_kernels.extras import needed_by
from tests.cli.conftest import QUESTION, Invoke, content


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["-i", "missing.png"], 2, "image: missing.png is missing"),
        (["-i", "text.png"], 2, "image: text.png cannot be read as an image"),
        (["-i", "huge.png"], 2, "image: huge.png is too large"),
        (["--max-image-pixels", "100"], 2, "160 x 96 = 15360 pixels"),
        (["--max-image-pixels", "0"], 2, "--max-image-pixels: "),
        (["-q", " "], 2, "question: "),
        (["-m", "missing"], 2, "--model: 'missing' is not a directory"),
        (["-m", "bare"], 2, "bare/model.safetensors is missing or not"),
        (["-m", "pickled"], 2, "as pickles"),
        (["-m", "pickled/config.json"], 2, "is a file"),
        (["--layers", "7"], 2, "layers: expected numbers from -4 to 3"),
        (["--layers", "two"], 2, "layers: expected 20-25, or 3,5"),
        (["--layers", "5-2"], 2, "layers: expected an ascending range"),
        (["--rows", "first"], 2, "rows: expected last, 4, question"),
        (["--rows", "word:blue"], 2, "rows: expected a word of the prompt, got 'blue'"),
        (["--rows", "0"], 2, "rows: "),
        (["--steps", "t_middle"], 2, "steps: expected one of 't_start'"),
        (["--max-new-tokens", "0"], 2, "--max-new-tokens: "),
        (["--lam", "-1"], 2, "lam: expected a number of at least 0"),
        (["--lam", "little"], 2, "lam: expected a number or mean"),
        (["--keep", "0"], 2, "keep: "),
        (["--keep", "1.5"], 2, "keep: "),
        (["--top", "0"], 2, "top: "),
        (["--preset", "mine"], 2, "preset: expected one of 'paper', 'release'"),
        (["--preset", "unknown.json"], 2, "'colour'"),
        (["--preset", "text.json"], 2, "preset: text.json cannot be read as JSON"),
        (["--preset", "missing.json"], 2, "--preset: expected the path"),
        (["--dtype", "float8"], 2, "--dtype: "),
        (["--device", "nowhere"], 2, "device: 'nowhere' cannot be used here"),
        (["--attn", "fast"], 2, "attn_implementation"),
        (["--backend", "gpu"], 2, "backend: "),
        (["--backend", "cuda"], 1, "--backend cuda: "),
        (["-o", "text.png"], 2, "text.png is not a folder"),
        (["-o", "text.png/deep/er"], 2, "text.png is not a folder"),
        (["-o", "blocked"], 2, "panel.png is a folder"),
        (["-o", "lost"], 2, "lost is not a folder"),
        (["-o", "long" * 99], 2, "cannot be a folder (File name too long)"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Invoke,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.png", "text.json"):
        Path(name).write_text("not what its name says")
    if "huge.png" in words:
        Image.new("1", (20_000, 20_000)).save("huge.png")
    Path("unknown.json").write_text('{"colour": "red"}')
    Path("blocked/panel.png").mkdir(parents=True)
    Path("lost").symlink_to("nowhere")
    for name in ("bare", "pickled"):
        Path(name).mkdir()
        for file in checkpoint.iterdir():
            if file.suffix != ".safetensors":
                Path(name, file.name).write_bytes(file.read_bytes())
    Path("pickled/pytorch_model.bin").write_bytes(b"")
    before = content(tmp_path)

    done = run(*words)
    assert done.exit_code == code, done.output
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert content(tmp_path) == before
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(".carve-*"))


def test_a_bad_output_is_found_before_the_model_is_loaded(
    run: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carve_kernels.hf.loading.load", lambda *args, **kwargs: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    assert run("-o", tmp_path / "file").exit_code == 2

    def refuse(**settings: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output_module.tempfile, "mkdtemp", refuse)
    done = run()
    assert done.exit_code == 1
    assert "cannot write into" in done.stderr
    assert "Permission denied" in done.stderr


def interrupt(*args: Any, **settings: Any) -> None:
    raise KeyboardInterrupt


def interrupt_import(*args: Any, **settings: Any) -> None:
    """Ctrl-C while transformers imports lazily, as it reports it."""
    try:
        try:
            interrupt()
        except KeyboardInterrupt as error:
            raise RuntimeError("Failed to import") from error
    except RuntimeError as error:
        raise ModuleNotFoundError("Could not import module 'PreTrainedModel'", name="transformers") from error


@pytest.mark.parametrize("how", [interrupt, interrupt_import])
@pytest.mark.parametrize("place", ["hf.engine.CarveEngine.answer", "hf.loading.load", "cli.ours.json.dumps"])
def test_an_interruption_leaves_everything_as_it_was(
    run: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, how: Any
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_record(folder, {"question": "old"})
    before = content(tmp_path)
    monkeypatch.setattr(f"carve_kernels.{place}", how)
    done = run()
    assert done.exit_code == 130
    assert done.stderr == "error: interrupted; nothing was written\n"
    assert content(tmp_path) == before


def test_an_interruption_waits_until_files_are_exchanged(
    run: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def replace_and_interrupt(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith("panel.png"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(output_module.os, "replace", replace_and_interrupt)
    done = run()
    assert done.exit_code == 130 and done.stderr == "error: interrupted; all files were written\n"
    assert sorted(content(tmp_path / "out")) == sorted(FILES)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_import_of_an_extra_is_an_interruption() -> None:
    with pytest.raises(KeyboardInterrupt), needed_by("CarveEngine"):
        interrupt_import()
    with pytest.raises(ImportError, match="pip install"), needed_by("CarveEngine"):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")


def test_a_failure_while_moving_leaves_no_record(run: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run().exit_code == 0
    rename = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == FILES[4]:
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(output_module.os, "replace", fail)
        done = run()
    assert done.exit_code == 1 and "No space left" in done.stderr
    assert sorted(content(tmp_path)) == sorted(f"out/{name}" for name in FILES[:4])
    assert run().exit_code == 0 and sorted(content(tmp_path)) == sorted(f"out/{name}" for name in FILES)


def test_debug_shows_where_an_error_came_from(carve: Invoke, tmp_path: Path) -> None:
    done = carve("--debug", "run", "-m", tmp_path, "-i", "missing.png", "-q", QUESTION)
    assert isinstance(done.exception, ValueError)


def test_an_unexpected_error_is_not_hidden(run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*args: Any, **settings: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("carve_kernels.hf.engine.engine.CarveEngine.ask", fault)
    assert isinstance(run().exception, KeyError)


def test_a_missing_library_points_to_the_doctor(run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **settings: Any) -> None:
        raise ImportError("the processor needs\n  a library")

    monkeypatch.setattr("carve_kernels.hf.loading.load", missing)
    done = run()
    assert done.exit_code == 1
    assert done.stderr == "error: the processor needs a library; carve-kernels doctor says what is missing\n"
