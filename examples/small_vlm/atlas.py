"""Build the glyph atlas of the scenes: rendered digits and letters, and handwritten digits.

Needs matplotlib (its bundled fonts) and scikit-learn (its handwriting); the scenes themselves need neither.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

SIDE = 40
# Letters that look like a digit in some font are left out.
LETTERS = "ACEFHJKLMNPRTUVWXYadefhkmnrtwxy"
TRAIN_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "cmr10", "cmb10", "cmtt10", "default",
)  # fmt: skip
TEST_FONTS = (
    "DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSerif-BoldItalic", "STIXGeneralBolIta", "cmss10",
)  # fmt: skip


def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == "default":
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _render(name: str, character: str) -> np.ndarray:
    """One character as alpha, its ink scaled to the tile and rounded to 16 levels, which halves the file."""
    tile = Image.new("L", (160, 160))
    ImageDraw.Draw(tile).text((30, 10), character, fill=255, font=_font(name, 100))
    ink = tile.crop(tile.getbbox())
    scale = (SIDE - 4) / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS)
    out = Image.new("L", (SIDE, SIDE))
    out.paste(ink, ((SIDE - ink.width) // 2, (SIDE - ink.height) // 2))
    return np.asarray(out) // 17 * 17


def build_atlas(path: Path) -> None:
    """Write the atlas: per kind the glyphs, their value, and whether they are held out for the test split."""
    fonts = [(name, False) for name in TRAIN_FONTS] + [(name, True) for name in TEST_FONTS]
    arrays: dict[str, np.ndarray] = {}
    for kind, characters in (("digits", "0123456789"), ("letters", LETTERS)):
        rows = [(_render(name, c), value, held) for name, held in fonts for value, c in enumerate(characters)]
        arrays[kind] = np.stack([row[0] for row in rows])
        arrays[f"{kind}_value"] = np.array([row[1] for row in rows], dtype=np.uint8)
        arrays[f"{kind}_test"] = np.array([row[2] for row in rows])
    written = load_digits()
    bordered = np.pad((written.images * 15.9).astype(np.uint8), ((0, 0), (1, 1), (1, 1)))
    arrays["handwriting"] = bordered
    arrays["handwriting_value"] = written.target.astype(np.uint8)
    # The set is ordered by writer, so its tail has writers that are rare in training.
    arrays["handwriting_test"] = np.arange(len(bordered)) >= len(bordered) * 4 // 5
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    build_atlas(Path(__file__).resolve().parents[2] / "carve_kernels" / "models" / "glyphs.npz")
