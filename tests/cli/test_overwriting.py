"""A command never replaces its inputs or the files of others; it does replace files that the commands wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from carve_kernels import AttentionMaps, selfcheck
from carve_kernels.cli.report import FILES
from tests.cli.conftest import LINES, QUESTION, QUICK, Ask, Invoke, content
from tests.support import tiny_models


@pytest.fixture
def before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come before a model is loaded."""
    monkeypatch.setattr("carve_kernels.hf.loading.load", lambda *args, **kwargs: pytest.fail("loaded"))


early = pytest.mark.usefixtures("before_loading")


def link(source: Path, target: Path) -> None:
    target.symlink_to(source)


@early
@pytest.mark.parametrize("place", [lambda source, target: source.rename(target), link, os.link])
@pytest.mark.parametrize("name", ["image.png", "panel.png", "refined.png", "saliency.png"])
def test_an_image_is_never_an_output_of_run(
    run: Invoke, folder: Path, name: str, place: Callable[[Path, Path], object]
) -> None:
    place(folder / "1.png", folder / name)
    before = content(folder)
    image = folder / "1.png" if (folder / "1.png").exists() else folder / name
    for given in {image, folder / name}:
        done = run("-i", given, "-o", folder)
        assert done.exit_code == 2 and done.stderr.startswith("error: --output: "), done.output
        assert "--image" in done.stderr and content(folder) == before


@early
def test_a_preset_is_never_an_output(run: Invoke, folder: Path) -> None:
    (folder / "result.json").write_text('{"keep": 0.3}')
    done = run("--preset", folder / "result.json", "-o", folder)
    assert done.exit_code == 2 and done.stderr.startswith("error: --output: ") and "--preset" in done.stderr
    assert (folder / "result.json").read_text() == '{"keep": 0.3}'


@early
@pytest.mark.parametrize("name", ["results.jsonl", "summary.json"])
def test_the_questions_are_never_an_output_of_batch(ask: Ask, folder: Path, name: str) -> None:
    path = folder / name
    path.write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
    before = content(folder)
    done = ask(LINES, "-i", path, "-o", folder)
    assert done.exit_code == 2 and done.stderr.startswith("error: --output: ") and "--input" in done.stderr
    assert {**content(folder), "questions.jsonl": b""} == {**before, "questions.jsonl": b""}


@early
def test_an_image_of_the_questions_is_never_an_output_of_batch(ask: Ask, folder: Path) -> None:
    place = folder / "out/results/2/refined.png"
    place.parent.mkdir(parents=True)
    os.link(folder / "1.png", place)
    for more in ((), ("--images",)):
        done = ask([LINES[0], {"image": "2.png", "question": QUESTION}], *more)
        assert done.exit_code == 2 and done.stderr.startswith("error: --output: "), done.output
    assert place.read_bytes() == (folder / "1.png").read_bytes()


@early
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content_of", ["text", "array", "same kind", "link"])
def test_a_file_of_another_program_is_not_replaced(
    run: Invoke, ask: Ask, folder: Path, name: str, content_of: str
) -> None:
    for command, place in ((run, folder / "out"), (ask, folder / "out/results/1")):
        place.mkdir(parents=True)
        path = place / name
        if content_of == "link":
            path.symlink_to(folder / "2.png")
        elif content_of == "same kind" and path.suffix == ".png":
            Image.new("RGB", (3, 3)).save(path)
        elif content_of == "same kind":
            path.write_text(json.dumps({"format": "another.program/1", "presets": {}, "versions": {}}))
        else:
            path.write_bytes(b"mine" if content_of == "text" else b"\x93NUMPY\x01\x00")
        before = content(folder / "out")
        done = command() if command is run else ask(LINES[:1], "--images")
        assert done.exit_code == 2 and done.stderr.startswith("error: --output: "), done.output
        assert str(path) in done.stderr and content(folder / "out") == before
        assert path.is_symlink() == (content_of == "link")
        path.unlink()


@early
@pytest.mark.parametrize("name", ["results.jsonl", "summary.json"])
def test_tables_of_another_program_are_not_replaced(ask: Ask, folder: Path, name: str) -> None:
    (folder / "out").mkdir()
    (folder / "out" / name).write_text(json.dumps(LINES[0]))
    done = ask(LINES)
    assert done.exit_code == 2 and done.stderr.startswith("error: --output: ") and name in done.stderr, done.output
    assert content(folder / "out") == {name: json.dumps(LINES[0]).encode()}


@early
def test_results_of_another_version_are_not_called_foreign(run: Invoke, ask: Ask, folder: Path) -> None:
    # As 0.2.0 wrote them: without a format.
    (folder / "out/results/1").mkdir(parents=True)
    old = json.dumps({"question": QUESTION, "versions": {"carve_kernels": "0.2.0"}, "presets": {}})
    for place, command in (("out/results/1", lambda: ask(LINES[:1])), ("out", run)):
        (folder / place / "result.json").write_text(old)
        done = command()
        assert done.exit_code == 2 and done.stderr.startswith("error: --output: "), done.output
        assert "by this version of carve_kernels, or was changed since" in done.stderr
        assert (folder / place / "result.json").read_text() == old


def test_batch_removes_no_hidden_files_of_others(ask: Ask, folder: Path) -> None:
    kept = [".batch-settings/mine", ".carve-notes/mine", ".results.jsonl.swp", ".summary.json.bak"]
    for name in kept:
        (folder / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "out" / name).write_text("mine")
    assert ask(LINES[:1]).exit_code == 0
    assert {name: (folder / "out" / name).read_text() for name in kept} == dict.fromkeys(kept, "mine")


def test_a_command_replaces_what_the_commands_wrote(run: Invoke, ask: Ask, folder: Path) -> None:
    for question in ("hello", QUESTION):
        assert run("-q", question, "-o", folder / "out/results/1").exit_code == 0
        assert json.loads((folder / "out/results/1/result.json").read_text())["question"] == question
    assert ask(LINES[:1]).exit_code == 0
    assert ask(LINES[:1], "--images").exit_code == 0
    # A panel or an array that was edited belongs to the user.
    place = folder / "out/results/1"
    Image.open(place / "panel.png").convert("L").save(place / "panel.png")
    before = content(folder)
    assert run("-o", place).exit_code == 2 and content(folder) == before
    (place / "panel.png").unlink()
    array = bytearray((place / "saliency.npy").read_bytes())
    array[-1] ^= 1
    (place / "saliency.npy").write_bytes(array)
    assert "saliency.npy" in run("-o", place).stderr


@early
@pytest.mark.parametrize("given", ["questions.jsonl", "a.png", "preset.json", "mine.json", "linked.json"])
def test_profile_replaces_no_other_file(carve: Invoke, checkpoint: Path, tmp_path: Path, given: str) -> None:
    tiny_models.make_image(96, 96).save(tmp_path / "a.png")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"image": "a.png", "question": QUESTION}))
    for name in ("preset.json", "mine.json"):
        (tmp_path / name).write_text('{"keep": 0.3}')
    (tmp_path / "linked.json").symlink_to("mine.json")
    before = content(tmp_path)
    words = ("-i", tmp_path / "questions.jsonl", "--preset", tmp_path / "preset.json", *QUICK[:2])
    done = carve("profile", "-m", checkpoint, *words, "-o", tmp_path / given)
    assert done.exit_code == 2 and done.stderr.startswith("error: --output: "), done.output
    assert content(tmp_path) == before and (tmp_path / "linked.json").is_symlink()


def test_profile_replaces_what_it_wrote_unless_it_was_changed(carve: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    tiny_models.make_image(96, 96).save(tmp_path / "a.png")
    (tmp_path / "questions.jsonl").write_text(json.dumps({"image": "a.png", "question": QUESTION}))
    path = tmp_path / "carve.json"
    quick = ("--rows", "last", "--steps", "t_start", *QUICK[:2])
    words = ("profile", "-m", checkpoint, "-i", tmp_path / "questions.jsonl", "-o", path, *quick)
    for _ in range(2):
        assert carve(*words).exit_code == 0
    path.write_text(json.dumps({**json.loads(path.read_text()), "keep": 0.31}))
    before = path.read_bytes()
    assert carve(*words).exit_code == 2 and path.read_bytes() == before


def test_check_replaces_no_other_file(carve: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "examine", lambda *_args, **_options: pytest.fail("worked before it checked"))
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path / "notes.txt", "/dev/null"):
        done = carve("check", "--device", "cpu", "-o", path)
        assert done.exit_code == 2 and done.stderr.startswith("error: --output: "), done.output
    assert content(tmp_path) == {"notes.txt": b"mine"} and not Path("/dev/null").is_file()


def test_maps_replace_maps_alone(tmp_path: Path) -> None:
    import torch

    *parts, tokens = (torch.zeros(1) for _ in range(5))
    maps = AttentionMaps(*parts, (0,), (0,), tokens, "float32")
    for name, data in (("a", b"mine"), ("b", b""), ("c.safetensors", b"\x02\0\0\0\0\0\0\0{}")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"^path: "):
            maps.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == data
    for _ in range(2):
        maps.save(tmp_path / "maps.safetensors")
    # Damaged, but one of ours.
    os.truncate(tmp_path / "maps.safetensors", (tmp_path / "maps.safetensors").stat().st_size - 1)
    maps.save(tmp_path / "maps.safetensors")
    assert AttentionMaps.load(tmp_path / "maps.safetensors").layers == (0,)
