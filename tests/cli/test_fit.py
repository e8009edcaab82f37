"""`--fit pad` in run, batch and profile, and their warnings of images that the model did not see in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from carve_kernels.cli.report import unseen_warning
from carve_kernels.hf import families
from tests.cli.conftest import LINES, QUESTION, Ask, Invoke, records, table, written

WARNING = "40 % of the image was outside the model's view (centre crop); --fit pad shows it whole"


def test_a_share_is_never_rounded_to_all_or_nothing() -> None:
    warnings = [unseen_warning(share) for share in (0.0, 0.005, 0.0051, 0.4, 0.9985, 0.99999, 1.0)]
    assert warnings[:2] == [None, None] and warnings[3] == WARNING
    assert [text and text.split(" %")[0] for text in warnings[2:]] == ["1", "40", "99", "99", "100"]


def test_no_fit_is_advised_where_it_would_be_refused(run: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(families.FAMILIES, "llava")
    done = run()
    assert done.exit_code == 0 and done.stdout.splitlines().count(WARNING.split(" (")[0]) == 1
    done = run("--fit", "pad")
    assert done.exit_code == 2 and "--fit: expected None, got 'pad': what a processor of 'llava' crops" in done.stderr


def test_batch_advises_no_fit_where_it_would_be_refused(
    ask: Ask, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(families.FAMILIES, "llava")
    expected = f"in 1 of 1 question up to {WARNING.split(' (')[0]}"
    assert expected in ask(LINES[:1]).stdout.splitlines()
    assert [row["measured"] for row in table(folder)] == [True]


def test_of_several_images_each_says_what_was_unseen_of_it(run: Invoke, folder: Path) -> None:
    done = run("-i", folder / "2.png", "-i", folder / "1.png")
    printed = [line for line in done.stdout.splitlines() if "outside" in line]
    assert done.exit_code == 0 and [line.split(" was")[0] for line in printed] == ["20 % of image 0", "40 % of image 1"]


def numbers(values: Any) -> Any:
    (found,) = values["presets"].values()
    return found


def test_run_says_what_was_unseen_and_pad_shows_it(run: Invoke, tmp_path: Path) -> None:
    plain = run()
    assert plain.exit_code == 0 and plain.stdout.splitlines().count(WARNING) == 1
    first = numbers(json.loads((tmp_path / "out/result.json").read_text()))
    assert first["unseen"] == pytest.approx(0.4)
    padded = run("--fit", "pad")
    assert padded.exit_code == 0 and "--fit" not in padded.output
    found = numbers(json.loads((tmp_path / "out/result.json").read_text()))
    assert found["unseen"] == 0.0 and found["views"][0]["box"] == [0, -32, 160, 128]
    assert found["mass"] != first["mass"]


def test_batch_asks_again_under_another_fit(ask: Ask, folder: Path) -> None:
    lines = LINES[:2]
    assert f"in 2 of 2 questions up to {WARNING}" in ask(lines).stdout.splitlines()
    assert [row["unseen"] for row in table(folder)] == pytest.approx([0.4, 0.2])
    before = written(folder)
    assert ask(lines).exit_code == 0 and written(folder) == before
    padded = ask(lines, "--fit", "pad")
    assert padded.exit_code == 0 and "--fit" not in padded.output
    after = written(folder)
    assert not set(before.values()) & set(after.values())
    assert [row["unseen"] for row in table(folder)] == [0.0, 0.0]
    assert json.loads((folder / "out/summary.json").read_text())["fit"] == "pad"
    assert all(numbers(values)["unseen"] == 0.0 for values in records(folder).values())
    assert ask(lines).exit_code == 0 and not set(after.values()) & set(written(folder).values())


def test_profile_can_point_at_what_a_crop_hides(carve: Invoke, checkpoint: Path, folder: Path) -> None:
    path = folder / "probes.jsonl"
    path.write_text(
        json.dumps({"image": "1.png", "question": QUESTION, "box": [0, 0, 20, 20], "paraphrases": ["which"]})
    )
    words = (
        "profile",
        "-m",
        checkpoint,
        "-i",
        path,
        "--rows",
        "last",
        "--steps",
        "t_start",
        "-o",
        folder / "carve.json",
    )
    counts = []
    for more in ((), ("--fit", "pad")):
        outcome = carve(*words, *more)
        assert outcome.exit_code == 0, outcome.output
        counts.append(json.loads((folder / "carve.json").read_text())["evidence"]["boxes"])
    assert counts == [0, 1]


@pytest.mark.parametrize("command", ["run", "batch", "profile"])
def test_another_fit_is_refused_at_once(carve: Invoke, image_file: Path, tmp_path: Path, command: str) -> None:
    more = ("-q", QUESTION) if command == "run" else ()
    outcome = carve(command, "-m", tmp_path / "none", "-i", image_file, "-o", tmp_path / "out", *more, "--fit", "crop")
    assert outcome.exit_code == 2
    assert "--fit: expected 'pad', got" in " ".join(outcome.stderr.split())
    assert not (tmp_path / "out").exists()
