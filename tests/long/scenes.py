"""Small images with questions for the embedded model, as `carve-kernels batch` reads them."""

from __future__ import annotations

import json
from pathlib import Path

from carve_kernels.models.scenes import draw_scene


def write_questions(folder: Path, count: int) -> Path:
    """`count` images and a questions.jsonl of them, with the true answers."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(count):
        scene = draw_scene(seed, 1 + seed % 4, split="test")
        scene.image.save(folder / f"{seed}.png", compress_level=1)
        lines.append({"image": f"{seed}.png", "question": scene.question, "answer": scene.answer})
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path
