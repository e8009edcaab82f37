"""Draw scenes with two questions each, the input of `carve-kernels profile` and `carve-kernels batch`.

    python examples/small_vlm/questions.py --output DIR

The seeds are larger than those of training, validation and test, and the glyphs are held out from training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from carve_kernels.models.scenes import LEVELS, draw_scene

SEED = 20_000_000
QUESTIONS = 2


def main() -> None:
    """Write the images, then questions.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=25, help="scenes a level")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    lines = []
    for level in LEVELS:
        for seed in range(SEED, SEED + options.scenes):
            scene = draw_scene(seed, level, split="test")
            name = f"level-{level}-{seed}.png"
            scene.image.save(options.output / name)
            for placed in scene.digits[:QUESTIONS]:
                question = f"what digit is {placed.colour}"
                lines.append(json.dumps({"image": name, "question": question, "box": placed.box}) + "\n")
    (options.output / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
