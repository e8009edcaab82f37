"""The model card, written from the measured numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

HEAD = """---
license: apache-2.0
pipeline_tag: image-text-to-text
---

# The embedded small model

A genuine `LlavaForConditionalGeneration` of 1.74 M parameters (CLIP tower 3 x 128, Llama 5 x 128, patch 8, 12 x 12
visual tokens, word-level tokenizer), trained from scratch on a CPU by `examples/small_vlm/reproduce.py`. It answers
"what digit is red" with one word and "describe the image" with a list of colours and digits, and nothing else. It
exists to show and to test attention capture and CARVE on real, trained weights; it is not a general model.

**Data.** Drawn scenes (`carve_kernels.models.scenes`): digits in distinct colours, half rendered from fonts (DejaVu,
STIX, Computer Modern, Pillow's own), half from scikit-learn's handwriting; letters, strokes and textured noise around
them. Level 1 has 2 large digits, level 4 has 8 digits of one patch's size. The original image is 384 x 384, the model
sees 96 x 96. Five fonts and the last fifth of the handwriting are held out for the test scenes.

**Recipe.** One seed, one thread, bfloat16. Stage 1 ({stage1:g} minutes) classifies the projected patches against the
language model's own embeddings of digit and colour words. Stage 2 ({stage2:g} minutes) answers up to six questions and
lists the scene of one image, with stage 1's loss at a lower weight. Crops as CARVE makes them are among the training
views. The prompt ends with the colour word, so that the last query row is the word whose attention is captured.
"""

ACCURACY = """
## Accuracy

{samples} test scenes a level; chance is 10 %. `raw`, `contrast` and `general` are crops from these maps with the
profile (`carve.json`: `{profile}`), chosen on {validation_samples} validation scenes a level, which share no
seed with training. `random` and `perfect` are squares of the same size, anywhere and around the asked digit.
`paper` is preset `paper` with its own layers, steps, keep and top: its share of the depth is the last of five layers.
`described` is the share of the digits that the general list names with the right colour. All numbers are of the
exported fp16 weights, run in float32.

"""

MAPS = """
## Where the rows attend

`pointing`: the best token is one of the asked digit's. `mass`: share of the map on these tokens. `iou`: of the best
tokens, as many as the digit has, with the digit's. `entropy`: H / ln N. `visual share`: the share of attention on the
image. `t_start` is the prompt's last word, `t_end` the last word of the answer. The contrast of these tables has
lam = "mean".
"""


def _table(header: list[str], rows: list[list[Any]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in cells) + "\n"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _verdict(result: dict[str, Any]) -> str:
    """Whether contrast beats the raw map in the profile, on all levels together and with its uncertainty."""
    levels = list(result["accuracy"].values())
    count = result["samples"] * len(levels)
    contrast, raw = (sum(level[kind] for level in levels) / len(levels) for kind in ("contrast", "raw"))
    spread = 100 * math.sqrt((contrast * (1 - contrast) + raw * (1 - raw)) / count)
    gap = 100 * (contrast - raw)
    if gap > 2 * spread:
        judgement = "**Contrast beats the raw map here.**"
    elif gap < -2 * spread:
        judgement = "**Contrast is worse than the raw map here.**"
    else:
        judgement = "**Contrast does not beat the raw map here.**"
    return (
        f"{judgement} Over all levels: contrast {100 * contrast:.1f} %, raw {100 * raw:.1f} %, difference {gap:+.1f} "
        f"points (standard error about {spread:.1f}, as if the two were independent). "
        "The larger lam is relative to the general map, the closer contrast is to the raw map.\n"
    )


def _accuracy(result: dict[str, Any]) -> str:
    names = list(next(iter(result["accuracy"].values())))
    rows = [[name, *(_percent(level[name]) for level in result["accuracy"].values())] for name in names]
    return _table(["% right", *(f"level {level}" for level in result["accuracy"])], rows)


def _maps(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name not in ("steps", "layer")]
    return _table(["step", "layer", *names], [[r["steps"], r["layer"], *(f"{r[n]:.3f}" for n in names)] for r in rows])


def write_card(folder: Path, result: dict[str, Any], minutes: tuple[float, float]) -> None:
    """Write README.md beside the weights."""
    text = [
        HEAD.format(stage1=minutes[0], stage2=minutes[1]),
        ACCURACY.format(**{**result, "profile": json.dumps(result["profile"])}),
        _accuracy(result) + "\n" + _verdict(result),
        MAPS,
        *(f"\nLevel {level}:\n\n{_maps(rows)}" for level, rows in result["maps"].items()),
    ]
    (folder / "README.md").write_text("".join(text))
