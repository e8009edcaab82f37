"""Kills `carve-kernels batch` at random moments, starts it again, and checks its results.

python -m tests.long.kill --images 200 --kills 10
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import tests.support.tiny_models  # noqa: F401
from carve_kernels import AttentionMaps
from carve_kernels.cli import app
from carve_kernels.models import small
from tests.long.scenes import write_questions

PROGRAM = """
import tests.support.tiny_models, torch
torch.set_num_threads(1)
from carve_kernels.cli import app
app()
"""
PATIENCE = 600.0

Marks = dict[str, tuple[int, int, bytes]]


def prove(folder: Path, images: int, kills: int, seed: int = 0) -> list[int]:
    """The number of results that each killed run finished; AssertionError if one was damaged or repeated."""
    draw = random.Random(seed)
    questions = write_questions(folder / "images", images)
    output, memory = folder / "out", folder / "memory"
    words = [
        *("batch", "--model", str(small()), "--dtype", "float32", "--images", "--tokens", "500"),
        *("--input", str(questions), "--output", str(output), "--memory", str(memory)),
    ]
    before: Marks = {}
    found = []
    for number in range(kills):
        # After so many new results, in the middle of the next one; the last kill leaves work to do.
        share = (images - 1 - len(before)) // (kills - number + 1)
        _kill(words, output, len(before) + draw.randint(0, max(1, share)), draw.uniform(0.0, 0.4))
        after = finished(output)
        _check_untouched(before, after)
        found.append(len(after) - len(before))
        before = after
    assert len(before) < images, "every run was killed before the last result"

    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f"{len(before)} of them before this run" in done.output, (found, done.output)
    after = finished(output)
    _check_untouched(before, after)
    assert len(after) == images
    lines = table(output)
    assert [line["line"] for line in lines] == list(range(1, images + 1))
    assert not [path for path in output.rglob(".*")], "no unfinished files are left"
    for path in output.rglob("maps.safetensors"):
        AttentionMaps.load(path)
    for path in memory.glob("*.safetensors"):
        AttentionMaps.load(path)

    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0 and finished(output) == after, "nothing is repeated"

    words[words.index(str(output))] = str(folder / "straight")
    assert CliRunner().invoke(app, words[:-2]).exit_code == 0
    answers = [(line["answer"], line["refined_answer"]) for line in lines]
    assert answers == [(line["answer"], line["refined_answer"]) for line in table(folder / "straight")]
    return found


def finished(output: Path) -> Marks:
    """Inode, time and content of every result, which must be complete."""
    found = {}
    for path in (output / "results").glob("*/result.json"):
        facts, data = path.stat(), path.read_bytes()
        assert json.loads(data)["error"] is None
        found[path.parent.name] = (facts.st_ino, facts.st_mtime_ns, data)
    return found


def table(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def _check_untouched(before: Marks, after: Marks) -> None:
    assert before == {name: after[name] for name in before}, "finished results are neither lost nor repeated"


def _kill(words: list[str], output: Path, results: int, delay: float) -> None:
    """Run until there are so many results and for `delay` seconds more, then kill -9."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        start = time.monotonic()
        while len(list((output / "results").glob("*/result.json"))) < results:
            assert run.poll() is None, "the run ended before it was killed"
            assert time.monotonic() - start < PATIENCE
            time.sleep(0.02)
        time.sleep(delay)
        run.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # On a busy machine, threads of a model this small wait for each other.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = prove(Path(folder), options.images, options.kills, options.seed)
    print(f"{options.images} images, killed {options.kills} times after {found} new results: each is there once")


if __name__ == "__main__":
    main()
