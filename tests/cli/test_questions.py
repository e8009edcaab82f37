"""Files of questions: the keys of a line, and how bad lines are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from carve_kernels.cli.questions import QuestionLine, read


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_lines_become_questions(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"image": "a.png", "question": "what\u2028is red"},
        "",
        {"image": "/b.png", "question": "why", "id": 7, "prompt": "<image> why", "answer": "so", "box": [1, 2, 3, 4]},
        '{"image": "c/d.png", "question": "who", "id": "x", "prompt": null}\r',
    )
    assert read(path) == [
        QuestionLine("1", 1, tmp_path / "a.png", "what\u2028is red", None, None, {}),
        QuestionLine("7", 3, Path("/b.png"), "why", "<image> why", "so", {"box": [1, 2, 3, 4]}),
        QuestionLine("x", 4, tmp_path / "c/d.png", "who", None, None, {}),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path)[0].id == "1"


GOOD = {"image": "a.png", "question": "what"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON (Expecting property name"),
        ("[1]", "line 2: expected a JSON object, got list [1]"),
        ("[" * 100_000, "line 2: not JSON ("),
        ({"question": "what"}, "line 2: image: missing"),
        ({"image": "a.png"}, "line 2: question: missing"),
        ({"image": None}, "line 2: image: missing; question: missing"),
        ({**GOOD, "image": []}, "line 2: image: expected at least one path, got an empty list"),
        ({**GOOD, "image": ["a.png", 3]}, "line 2: image[1]: expected a string, got int 3"),
        ({**GOOD, "video": "a.mp4"}, "line 2: image, video: expected one of them, got both"),
        ({"video": ["a.mp4"], "question": "why"}, "line 2: video: expected a string, got list"),
        ({**GOOD, "question": " "}, "line 2: question: expected a string with"),
        ({**GOOD, "image": 3}, "line 2: image: expected a string, got int 3"),
        ({**GOOD, "image": "a\0b"}, "line 2: image: expected characters that can be written"),
        ({**GOOD, "question": "\ud800"}, "line 2: question: expected characters that can be written"),
        ({**GOOD, "prompt": ""}, "line 2: prompt: expected a string with"),
        ({**GOOD, "answer": 3}, "line 2: answer: expected a string, got int 3"),
        ({**GOOD, "id": True}, "line 2: id: expected a text or a number"),
        ({**GOOD, "id": ["x"]}, "line 2: id: expected a text or a number"),
        ({**GOOD, "id": ""}, "line 2: id: expected a string with"),
        ({**GOOD, "id": "\u00e9" * 100}, "line 2: id: expected at most 200 characters"),
        ({**GOOD, "id": "1"}, "line 2: id: '1' is also the id of line 1"),
        ({**GOOD, "id": 1}, "line 2: id: '1' is also the id of line 1"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(written(tmp_path, GOOD, line, GOOD))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always name files in UTF-8")
def test_a_path_that_the_locale_cannot_spell_is_named_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, {**GOOD, "id": "\u732b", "image": "\u732b/x.png"})
    program = (
        "import sys; from pathlib import Path; from carve_kernels.cli.questions import read; read(Path(sys.argv[1]))"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], env={**os.environ, **ascii_only}, capture_output=True, text=True
    )
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ValueError: input: ") and ": line 2: image: expected a path in ascii" in error, error
    assert len(read(path)) == 2


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 5: .*; and 4 more"):
        read(written(tmp_path, *["{}"] * 9))


def test_files_without_questions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no questions"):
        read(written(tmp_path, "", " "))
    with pytest.raises(ValueError, match=r"missing\.jsonl cannot be read"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin").write_bytes(b'\n{"image": "\xe9"}')
    with pytest.raises(ValueError, match=r"line 2: .*can't decode byte 0xe9"):
        read(tmp_path / "latin")


def test_names_are_safe_and_differ() -> None:
    ids = ["a", "A/b", "A%2Fb", "..", ".", ".hidden", "a b", "\u00fcber", "/etc/passwd", "x\\y", "a:b", "a\nb", "%2E."]
    ids += ["a.", "a ", "a%20", "con", "CON", "Nul.txt", "com1", "com1.", "%63on", "console", "lpt", "aux .b"]
    names = [QuestionLine(each, 1, Path("p"), "q", None, None, {}).name for each in ids]
    assert len(set(names)) == len(ids) and names[0] == "a" and names[6] == "a b"
    for name in names:
        assert not name.startswith(".") and not name.endswith((".", " "))
        assert name.split(".")[0].strip().lower() not in ("con", "nul", "com1", "aux")
        assert not set(name) & set('/\\:\n\0"<>|?*') and name.isascii()
